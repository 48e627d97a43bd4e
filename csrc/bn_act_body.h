// The four passes of bn_act over a range of rows, compiled once for each instruction set: bn_act_*.cpp set the target and
// FASTLOCAL_ISA and include this. No inline function of the standard library here: the linker keeps one copy of each, and it
// could be the one with instructions that this CPU lacks.
#include "bn_act_kernels.h"

#if defined(__GNUC__)
#define FASTLOCAL_INLINE inline __attribute__((always_inline))
#else
#define FASTLOCAL_INLINE inline
#endif

namespace fastlocal {
namespace FASTLOCAL_ISA {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;

constexpr int64_t kFlush = 128;  // rows summed in float before they are added to a double

FASTLOCAL_INLINE float load(const float* p) { return *p; }
FASTLOCAL_INLINE float load(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
FASTLOCAL_INLINE void store(float* p, float value) { *p = value; }
FASTLOCAL_INLINE void store(uint16_t* p, float value) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *p = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// Sixteen values at a time as a vector type: compilers find neither the bfloat16 conversions nor the registers by themselves.
#if defined(__GNUC__)
#define FASTLOCAL_VECTORS 1
typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

FASTLOCAL_INLINE void load(const float* p, Vec& v) { std::memcpy(&v, p, sizeof v); }
FASTLOCAL_INLINE void store(float* p, const Vec& v) { std::memcpy(p, &v, sizeof v); }
FASTLOCAL_INLINE void load(const uint16_t* p, Vec& v) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  v = reinterpret_cast<Vec>(__builtin_convertvector(half, Words) << 16);
}
FASTLOCAL_INLINE void store(uint16_t* p, const Vec& v) {
  const Words bits = reinterpret_cast<Words>(v), high = bits >> 16, rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
  const Words nan = reinterpret_cast<Words>((bits & 0x7fffffffu) > 0x7f800000u);  // all ones where true
  const Halves half = __builtin_convertvector((nan & (high | 0x40u)) | (~nan & rounded), Halves);
  std::memcpy(p, &half, sizeof half);
}
#endif

// Each pass has two forms: `wide` handles 16 * kVecs channels with their constants and sums in vector registers while the
// rows go by; `narrow` handles what is left, one channel at a time in the same order of rows.

// --- forward ---------------------------------------------------------------------------------------------------------

// Sums of (x - shift) and of its square.
template <typename T>
struct Sums {
  const T* x;
  const float* shift;
  int64_t channels, first, last;
  double *sum, *square;

#ifdef FASTLOCAL_VECTORS
  template <int kVecs>
  FASTLOCAL_INLINE void wide(int64_t c) const {
    Vec k[kVecs];
    for (int i = 0; i < kVecs; ++i) load(shift + c + 16 * i, k[i]);
    for (int64_t begin = first; begin < last; begin += kFlush) {
      const int64_t end = begin + kFlush < last ? begin + kFlush : last;
      Vec s[kVecs] = {}, q[kVecs] = {}, v[kVecs];
      for (int64_t r = begin; r < end; ++r) {
        const T* row = x + r * channels + c;
        for (int i = 0; i < kVecs; ++i) {
          load(row + 16 * i, v[i]);
          v[i] -= k[i];
          s[i] += v[i];
          q[i] += v[i] * v[i];
        }
      }
      for (int i = 0; i < kVecs; ++i)
        for (int j = 0; j < 16; ++j) sum[c + 16 * i + j] += s[i][j], square[c + 16 * i + j] += q[i][j];
    }
  }
#endif
  FASTLOCAL_INLINE void narrow(int64_t c) const {
    for (int64_t begin = first; begin < last; begin += kFlush) {
      const int64_t end = begin + kFlush < last ? begin + kFlush : last;
      float s = 0, q = 0;
      for (int64_t r = begin; r < end; ++r) {
        const float v = load(x + r * channels + c) - shift[c];
        s += v;
        q += v * v;
      }
      sum[c] += s;
      square[c] += q;
    }
  }
};

// y = relu(x * scale + offset + residual). A NaN passes through the ReLU, as in torch.relu.
template <typename T, bool kResidual, bool kRelu>
struct Transform {
  const T *x, *residual;
  T* y;
  const float *scale, *offset;
  int64_t channels, first, last;

#ifdef FASTLOCAL_VECTORS
  template <int kVecs>
  FASTLOCAL_INLINE void wide(int64_t c) const {
    Vec a[kVecs], b[kVecs];
    const Vec zero = {};
    for (int i = 0; i < kVecs; ++i) load(scale + c + 16 * i, a[i]), load(offset + c + 16 * i, b[i]);
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * channels + c;
      for (int i = 0; i < kVecs; ++i) {
        Vec v, other;
        load(x + at + 16 * i, v);
        v = v * a[i] + b[i];
        if (kResidual) load(residual + at + 16 * i, other), v += other;
        if (kRelu) v = v < zero ? zero : v;
        store(y + at + 16 * i, v);
      }
    }
  }
#endif
  FASTLOCAL_INLINE void narrow(int64_t c) const {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * channels + c;
      float v = load(x + at) * scale[c] + offset[c];
      if (kResidual) v += load(residual + at);
      if (kRelu) v = v < 0.0f ? 0.0f : v;
      store(y + at, v);
    }
  }
};

// --- backward --------------------------------------------------------------------------------------------------------

// Sums of g and of g * (x - mean), where g is dy behind the activation (dy where y is NaN, as in PyTorch).
template <typename T, bool kRelu>
struct Reduce {
  const T *dy, *x, *y;
  const float* mean;
  int64_t channels, first, last;
  double *sum, *product;

#ifdef FASTLOCAL_VECTORS
  template <int kVecs>
  FASTLOCAL_INLINE void wide(int64_t c) const {
    Vec m[kVecs];
    const Vec zero = {};
    for (int i = 0; i < kVecs; ++i) load(mean + c + 16 * i, m[i]);
    for (int64_t begin = first; begin < last; begin += kFlush) {
      const int64_t end = begin + kFlush < last ? begin + kFlush : last;
      Vec s[kVecs] = {}, q[kVecs] = {};
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * channels + c;
        for (int i = 0; i < kVecs; ++i) {
          Vec g, v, out;
          load(dy + at + 16 * i, g);
          load(x + at + 16 * i, v);
          if (kRelu) load(y + at + 16 * i, out), g = out <= zero ? zero : g;
          s[i] += g;
          q[i] += g * (v - m[i]);
        }
      }
      for (int i = 0; i < kVecs; ++i)
        for (int j = 0; j < 16; ++j) sum[c + 16 * i + j] += s[i][j], product[c + 16 * i + j] += q[i][j];
    }
  }
#endif
  FASTLOCAL_INLINE void narrow(int64_t c) const {
    for (int64_t begin = first; begin < last; begin += kFlush) {
      const int64_t end = begin + kFlush < last ? begin + kFlush : last;
      float s = 0, q = 0;
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * channels + c;
        float g = load(dy + at);
        if (kRelu) g = load(y + at) <= 0.0f ? 0.0f : g;
        s += g;
        q += g * (load(x + at) - mean[c]);
      }
      sum[c] += s;
      product[c] += q;
    }
  }
};

// dx = a * g + b * (x - mean) + d per channel; the residual's gradient is g.
template <typename T, bool kRelu, bool kResidual>
struct Gradient {
  const T *dy, *x, *y;
  T *dx, *dresidual;
  const float *a, *b, *d, *mean;
  int64_t channels, first, last;

#ifdef FASTLOCAL_VECTORS
  template <int kVecs>
  FASTLOCAL_INLINE void wide(int64_t c) const {
    Vec ka[kVecs], kb[kVecs], kd[kVecs], m[kVecs];
    const Vec zero = {};
    for (int i = 0; i < kVecs; ++i)
      load(a + c + 16 * i, ka[i]), load(b + c + 16 * i, kb[i]), load(d + c + 16 * i, kd[i]), load(mean + c + 16 * i, m[i]);
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * channels + c;
      for (int i = 0; i < kVecs; ++i) {
        Vec g, v, out;
        load(dy + at + 16 * i, g);
        load(x + at + 16 * i, v);
        if (kRelu) load(y + at + 16 * i, out), g = out <= zero ? zero : g;
        store(dx + at + 16 * i, ka[i] * g + kb[i] * (v - m[i]) + kd[i]);
        if (kResidual) store(dresidual + at + 16 * i, g);
      }
    }
  }
#endif
  FASTLOCAL_INLINE void narrow(int64_t c) const {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * channels + c;
      float g = load(dy + at);
      if (kRelu) g = load(y + at) <= 0.0f ? 0.0f : g;
      store(dx + at, a[c] * g + b[c] * (load(x + at) - mean[c]) + d[c]);
      if (kResidual) store(dresidual + at, g);
    }
  }
};

// All channels of a pass: 64 at once where there are so many, so that whole cache lines of a row are used together.
template <typename Pass>
FASTLOCAL_INLINE void over_channels(int64_t channels, const Pass& pass) {
  int64_t c = 0;
#ifdef FASTLOCAL_VECTORS
  for (; c + 64 <= channels; c += 64) pass.template wide<4>(c);
  for (; c + 32 <= channels; c += 32) pass.template wide<2>(c);
  for (; c + 16 <= channels; c += 16) pass.template wide<1>(c);
#endif
  for (; c < channels; ++c) pass.narrow(c);
}

template <typename T>
void sums(const T* x, const float* shift, int64_t c, int64_t first, int64_t last, double* sum, double* square) {
  over_channels(c, Sums<T>{x, shift, c, first, last, sum, square});
}

template <typename T>
void transform(const T* x, const T* res, T* y, const float* scale, const float* offset, int64_t c, int64_t first,
               int64_t last, bool relu) {
  if (res && relu) over_channels(c, Transform<T, true, true>{x, res, y, scale, offset, c, first, last});
  else if (res) over_channels(c, Transform<T, true, false>{x, res, y, scale, offset, c, first, last});
  else if (relu) over_channels(c, Transform<T, false, true>{x, res, y, scale, offset, c, first, last});
  else over_channels(c, Transform<T, false, false>{x, res, y, scale, offset, c, first, last});
}

template <typename T>
void reduce(const T* dy, const T* x, const T* y, const float* mean, int64_t c, int64_t first, int64_t last, double* sum,
            double* product, bool relu) {
  if (relu) over_channels(c, Reduce<T, true>{dy, x, y, mean, c, first, last, sum, product});
  else over_channels(c, Reduce<T, false>{dy, x, y, mean, c, first, last, sum, product});
}

template <typename T>
void gradient(const T* dy, const T* x, const T* y, T* dx, T* dres, const float* a, const float* b, const float* d,
              const float* mean, int64_t c, int64_t first, int64_t last, bool relu) {
  if (dres && relu) over_channels(c, Gradient<T, true, true>{dy, x, y, dx, dres, a, b, d, mean, c, first, last});
  else if (dres) over_channels(c, Gradient<T, false, true>{dy, x, y, dx, dres, a, b, d, mean, c, first, last});
  else if (relu) over_channels(c, Gradient<T, true, false>{dy, x, y, dx, dres, a, b, d, mean, c, first, last});
  else over_channels(c, Gradient<T, false, false>{dy, x, y, dx, dres, a, b, d, mean, c, first, last});
}

}  // namespace

extern const Kernels<float> kFloat32 = {sums<float>, transform<float>, reduce<float>, gradient<float>};
extern const Kernels<std::uint16_t> kBFloat16 = {sums<std::uint16_t>, transform<std::uint16_t>, reduce<std::uint16_t>,
                                                 gradient<std::uint16_t>};

}  // namespace FASTLOCAL_ISA
}  // namespace fastlocal
