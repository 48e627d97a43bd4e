// The passes of bn_act as function pointers, one table for each dtype and instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastlocal {

template <typename T>  // float, or uint16_t for bfloat16
struct Kernels {
  void (*sums)(const T* x, const float* shift, std::int64_t channels, std::int64_t first, std::int64_t last, double* sum,
               double* square);
  void (*transform)(const T* x, const T* residual, T* y, const float* scale, const float* offset, std::int64_t channels,
                    std::int64_t first, std::int64_t last, bool relu);
  void (*reduce)(const T* dy, const T* x, const T* y, const float* mean, std::int64_t channels, std::int64_t first,
                 std::int64_t last, double* sum, double* product, bool relu);
  void (*gradient)(const T* dy, const T* x, const T* y, T* dx, T* dresidual, const float* a, const float* b,
                   const float* d, const float* mean, std::int64_t channels, std::int64_t first, std::int64_t last,
                   bool relu);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTLOCAL_X86 1
namespace avx512 {
extern const Kernels<float> kFloat32;
extern const Kernels<std::uint16_t> kBFloat16;
}  // namespace avx512
namespace avx2 {
extern const Kernels<float> kFloat32;
extern const Kernels<std::uint16_t> kBFloat16;
}  // namespace avx2
#endif
namespace generic {
extern const Kernels<float> kFloat32;
extern const Kernels<std::uint16_t> kBFloat16;
}  // namespace generic

}  // namespace fastlocal
