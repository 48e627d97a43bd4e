// Batch normalisation over rows [rows, channels] with an optional residual and ReLU, on a CPU: channels_last maps and matrices.
//
// Two passes forward (statistics; transform with the residual and the activation), two backward (both reductions; dx and
// the residual's gradient), where a composite of normalisation, addition and activation makes five and six.
// Deterministic for a given number of threads.
#pragma once

#include <cstdint>

namespace fastlocal {

struct BnActForward {
  const void* x;
  const void* residual;  // or null
  void* y;
  const float *weight, *bias;
  float *running_mean, *running_var;  // updated
  float *mean, *rstd;                 // written, for backward
  std::int64_t rows, channels;
  double momentum, eps;
  bool relu, bf16;
  int threads;
};

struct BnActBackward {
  const void *dy, *x, *y;  // y only with relu
  void *dx, *dresidual;    // dresidual or null
  const float *weight, *mean, *rstd;
  float *dweight, *dbias;
  std::int64_t rows, channels;
  bool relu, bf16;
  int threads;
};

void bn_act_forward(const BnActForward& p);
void bn_act_backward(const BnActBackward& p);

// Whether work is spread over the threads of the OpenMP runtime that is loaded already (PyTorch's).
bool shares_openmp();

}  // namespace fastlocal
