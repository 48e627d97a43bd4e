#include "bn_act.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bn_act_kernels.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastlocal {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;

constexpr int64_t kGrain = 16384;  // elements below which another thread does not pay
constexpr int64_t kSamples = 64;   // rows whose mean the sums start from

float widen(float value) { return value; }
float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// --- instruction sets ------------------------------------------------------------------------------------------------

enum class Isa { generic, avx2, avx512 };

Isa isa() {
  static const Isa best = [] {
#ifdef FASTLOCAL_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
      return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      return Isa::avx2;
#endif
    return Isa::generic;
  }();
  return best;
}

template <typename T>
const Kernels<T>& kernels();

#ifdef FASTLOCAL_X86
#define FASTLOCAL_PICK(TABLE) \
  isa() == Isa::avx512 ? avx512::TABLE : isa() == Isa::avx2 ? avx2::TABLE : generic::TABLE
#else
#define FASTLOCAL_PICK(TABLE) generic::TABLE
#endif
template <>
const Kernels<float>& kernels<float>() {
  return FASTLOCAL_PICK(kFloat32);
}
template <>
const Kernels<uint16_t>& kernels<uint16_t>() {
  return FASTLOCAL_PICK(kBFloat16);
}

// --- threads ---------------------------------------------------------------------------------------------------------

// PyTorch's OpenMP runtime is used through its own entry points: a second runtime's idle threads would spin on the cores
// that PyTorch's need.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();

struct OpenMP {
  Parallel parallel = nullptr;
  Number number = nullptr, count = nullptr;
};

const OpenMP& openmp() {
  static const OpenMP found = [] {
    OpenMP o;
#if defined(__linux__)
    o.parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    o.number = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    o.count = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (!o.number || !o.count) o.parallel = nullptr;
#endif
    return o;
  }();
  return found;
}

// Runs body(part) for part = 0 .. parts - 1, in parallel where that is possible.
template <typename Body>
void each_part(int parts, const Body& body) {
  const OpenMP& omp = openmp();
  if (parts <= 1 || !omp.parallel) {
    for (int part = 0; part < parts; ++part) body(part);
    return;
  }
  struct Job {
    const Body* body;
    const OpenMP* omp;
    int parts;
  } job{&body, &omp, parts};
  omp.parallel(
      [](void* data) {
        const Job& j = *static_cast<Job*>(data);
        for (int part = j.omp->number(); part < j.parts; part += j.omp->count()) (*j.body)(part);
      },
      &job, static_cast<unsigned>(parts), 0);
}

int parts_for(int64_t rows, int64_t channels, int threads) {
  const int64_t worth = rows * channels / kGrain;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, worth, rows})));
}

// --- the two directions ----------------------------------------------------------------------------------------------

template <typename T>
void forward(const BnActForward& p) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t m = p.rows, n = p.channels;
  const int parts = parts_for(m, n, p.threads);
  const auto row = [&](int part) { return m * part / parts; };

  // Deviations from the mean of some rows instead of from zero: a mean far from zero costs no accuracy then. Not from one
  // row: the first, a padded corner, may be unlike all others.
  std::vector<float> shift(n), scale(n), offset(n);
  const int64_t samples = std::min(m, kSamples);
  for (int64_t c = 0; c < n; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < samples; ++i) sum += widen(x[m * i / samples * n + c]);
    const float v = static_cast<float>(sum / samples);
    shift[c] = std::isfinite(v) ? v : 0.0f;
  }
  std::vector<double> partial(static_cast<size_t>(2 * n * parts), 0.0);
  each_part(parts, [&](int part) {
    double* own = partial.data() + 2 * n * part;
    kernels<T>().sums(x, shift.data(), n, row(part), row(part + 1), own, own + n);
  });
  for (int64_t c = 0; c < n; ++c) {
    double s = 0, q = 0;
    for (int part = 0; part < parts; ++part) {
      s += partial[2 * n * part + c];
      q += partial[2 * n * part + n + c];
    }
    const bool bad = !(std::isfinite(s) && std::isfinite(q));  // max() would hide a NaN
    const double deviation = s / m, mean = shift[c] + deviation;
    const double var = bad ? std::nan("") : std::max(q / m - deviation * deviation, 0.0);
    p.mean[c] = static_cast<float>(mean);
    p.rstd[c] = static_cast<float>(1.0 / std::sqrt(var + p.eps));
    scale[c] = p.weight[c] * p.rstd[c];
    offset[c] = p.bias[c] - p.mean[c] * scale[c];
    const auto moved = [&](float old, double value) {
      return static_cast<float>((1 - p.momentum) * old + p.momentum * value);
    };
    p.running_mean[c] = moved(p.running_mean[c], mean);
    p.running_var[c] = moved(p.running_var[c], var * (static_cast<double>(m) / (m - 1)));
  }
  each_part(parts, [&](int part) {
    kernels<T>().transform(x, static_cast<const T*>(p.residual), static_cast<T*>(p.y), scale.data(), offset.data(), n,
                           row(part), row(part + 1), p.relu);
  });
}

template <typename T>
void backward(const BnActBackward& p) {
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x), *y = static_cast<const T*>(p.y);
  const int64_t m = p.rows, n = p.channels;
  const int parts = parts_for(m, n, p.threads);
  const auto row = [&](int part) { return m * part / parts; };

  std::vector<double> partial(static_cast<size_t>(2 * n * parts), 0.0);
  each_part(parts, [&](int part) {
    double* own = partial.data() + 2 * n * part;
    kernels<T>().reduce(dy, x, y, p.mean, n, row(part), row(part + 1), own, own + n, p.relu);
  });
  std::vector<float> a(n), b(n), d(n);
  for (int64_t c = 0; c < n; ++c) {
    double s = 0, q = 0;
    for (int part = 0; part < parts; ++part) {
      s += partial[2 * n * part + c];
      q += partial[2 * n * part + n + c];
    }
    const double rstd = p.rstd[c], scale = p.weight[c] * rstd, slope = -scale * rstd * rstd * q / m;
    p.dbias[c] = static_cast<float>(s);
    p.dweight[c] = static_cast<float>(q * rstd);
    a[c] = static_cast<float>(scale);
    b[c] = static_cast<float>(slope);
    d[c] = static_cast<float>(-scale * s / m);
  }
  each_part(parts, [&](int part) {
    kernels<T>().gradient(dy, x, y, static_cast<T*>(p.dx), static_cast<T*>(p.dresidual), a.data(), b.data(), d.data(),
                          p.mean, n, row(part), row(part + 1), p.relu);
  });
}

}  // namespace

void bn_act_forward(const BnActForward& p) { p.bf16 ? forward<uint16_t>(p) : forward<float>(p); }
void bn_act_backward(const BnActBackward& p) { p.bf16 ? backward<uint16_t>(p) : backward<float>(p); }
bool shares_openmp() { return openmp().parallel != nullptr; }

}  // namespace fastlocal
