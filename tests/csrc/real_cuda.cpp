// The functions that graph_executor calls by name, compared with CUDA's own headers by the compiler, and called.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <stdexcept>
#include <type_traits>

#include "graph_executor.h"

struct RealCuda {
  using Error = cudaError_t;
  using Graph = cudaGraph_t;
  using Node = cudaGraphNode_t;
  using Exec = cudaGraphExec_t;
  using Stream = cudaStream_t;
  using Event = cudaEvent_t;
};
using RealCalls = fastlocal::CudaTable<RealCuda>;

#define SAME(name, result, arguments) \
  static_assert(std::is_same_v<decltype(&::name), decltype(RealCalls::name)>, #name);
FASTLOCAL_CUDA_CALLS(SAME)

static_assert(std::is_enum_v<cudaError_t> && sizeof(cudaError_t) == sizeof(int) && cudaSuccess == 0);
static_assert(std::is_pointer_v<cudaGraph_t> && std::is_pointer_v<cudaGraphNode_t>);
static_assert(std::is_pointer_v<cudaGraphExec_t> && std::is_pointer_v<cudaStream_t> && std::is_pointer_v<cudaEvent_t>);
static_assert(cudaStreamNonBlocking == 1 && cudaEventDisableTiming == 2);

int main() {
  fastlocal::CudaCalls calls;
#define TAKE(name, result, arguments) calls.name = reinterpret_cast<decltype(calls.name)>(&::name);
  FASTLOCAL_CUDA_CALLS(TAKE)
  try {
    auto runtime = std::make_shared<fastlocal::CudaRuntime>(calls);
    std::printf("version %d\n", runtime->version());
    cudaGraph_t empty = nullptr;
    if (cudaGraphCreate(&empty, 0) != cudaSuccess) empty = reinterpret_cast<cudaGraph_t>(&runtime);  // never looked at
    for (auto* make : {&fastlocal::compose, &fastlocal::stream_loop}) {
      auto round = make(runtime, {{"forward 0", reinterpret_cast<std::uintptr_t>(empty), 0, {}},
                                  {"head 0", reinterpret_cast<std::uintptr_t>(empty), 1, {0}}});
      round->upload(0);
      round->launch(0);
      round->close();
      std::printf("launched\n");
    }
  } catch (const std::runtime_error& error) {
    std::printf("refused: %s\n", error.what());
  }
  return 0;
}
