// Runs CUDA graphs that were captured one by one as one round of a plan: composed into a single executable graph, or
// launched on streams with events between them. Graphs and streams come as integers.
//
// No CUDA headers: the functions of the runtime are found by name in the library that PyTorch has loaded, so that this
// builds without nvcc, loads without CUDA, and no second runtime enters the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fastlocal {

// What is called, as F(name, result, arguments). Only functions whose signatures are the same in CUDA 12 and 13:
// dependencies are given with each node (cudaGraphAddDependencies takes edge data since 13), and WithFlags has had one
// form from the start (cudaGraphInstantiate changed in 12). CUDA's own headers check this list in the tests.
#define FASTLOCAL_CUDA_CALLS(F)                                                                       \
  F(cudaRuntimeGetVersion, Error, (int*))                                                             \
  F(cudaGetLastError, Error, ())                                                                      \
  F(cudaGetErrorName, const char*, (Error))                                                           \
  F(cudaGetErrorString, const char*, (Error))                                                         \
  F(cudaGraphCreate, Error, (Graph*, unsigned int))                                                   \
  F(cudaGraphAddChildGraphNode, Error, (Node*, Graph, const Node*, std::size_t, Graph))               \
  F(cudaGraphDestroy, Error, (Graph))                                                                 \
  F(cudaGraphInstantiateWithFlags, Error, (Exec*, Graph, unsigned long long))                         \
  F(cudaGraphUpload, Error, (Exec, Stream))                                                           \
  F(cudaGraphLaunch, Error, (Exec, Stream))                                                           \
  F(cudaGraphExecDestroy, Error, (Exec))                                                              \
  F(cudaStreamCreateWithFlags, Error, (Stream*, unsigned int))                                        \
  F(cudaStreamWaitEvent, Error, (Stream, Event, unsigned int))                                        \
  F(cudaStreamDestroy, Error, (Stream))                                                               \
  F(cudaEventCreateWithFlags, Error, (Event*, unsigned int))                                          \
  F(cudaEventRecord, Error, (Event, Stream))                                                          \
  F(cudaEventDestroy, Error, (Event))

template <class Types>
struct CudaTable {
  using Error = typename Types::Error;
  using Graph = typename Types::Graph;
  using Node = typename Types::Node;
  using Exec = typename Types::Exec;
  using Stream = typename Types::Stream;
  using Event = typename Types::Event;
#define FASTLOCAL_CUDA_MEMBER(name, result, arguments) result(*name) arguments = nullptr;
  FASTLOCAL_CUDA_CALLS(FASTLOCAL_CUDA_MEMBER)
#undef FASTLOCAL_CUDA_MEMBER
};

// The handles are pointers and the errors an enum of the size of int.
struct OpaqueCuda {
  using Error = int;
  using Graph = struct GraphTag*;
  using Node = struct NodeTag*;
  using Exec = struct ExecTag*;
  using Stream = struct StreamTag*;
  using Event = struct EventTag*;
};

using CudaCalls = CudaTable<OpaqueCuda>;

// A CUDA runtime, version 11.4 or newer.
class CudaRuntime {
 public:
  // Finds the functions in a shared library or in those that it was linked with, in the order of the linker. With
  // `loaded` a library that this process has not loaded already is refused. Throws std::runtime_error.
  static std::shared_ptr<CudaRuntime> find(const std::string& library, bool loaded);

  explicit CudaRuntime(const CudaCalls& calls);
  ~CudaRuntime();
  CudaRuntime(const CudaRuntime&) = delete;
  CudaRuntime& operator=(const CudaRuntime&) = delete;

  // Throws std::runtime_error, which names the call and what it was for, and clears the runtime's last error: PyTorch
  // would take it for its own at its next launch.
  void check(int error, const char* call, const std::string& what) const;

  const CudaCalls calls;
  int version() const { return version_; }  // as cudaRuntimeGetVersion gives it: 12080 is 12.8

 private:
  int version_ = 0;
  void* library_ = nullptr;
};

// One captured graph of a round. Only those before it in the list may stand in `waits`; it follows the one before it on
// its stream in any case.
struct Segment {
  std::string name;  // for messages
  std::uintptr_t graph;
  std::int64_t stream;  // of the plan
  std::vector<std::int64_t> waits;
};

// A round that can be launched again and again. What the segments' graphs read and write must live as long.
class RoundExecutor {
 public:
  virtual ~RoundExecutor() = default;
  // Brings what a launch needs to the device beforehand, in the order of `stream`.
  virtual void upload(std::uintptr_t stream) = 0;
  // All that was in `stream` before comes first, and what is put there later waits for the whole round.
  virtual void launch(std::uintptr_t stream) = 0;
  // Frees everything now, and throws for the first thing that could not be freed. Later calls of it do nothing.
  virtual void close() = 0;
  virtual std::int64_t nodes() const = 0;  // graphs that a launch runs
  virtual std::int64_t edges() const = 0;  // dependencies between them
};

// One executable graph with a child graph for each segment: a launch is one call. Throws std::invalid_argument for bad
// segments and std::runtime_error, with nothing left behind, where the runtime fails.
std::unique_ptr<RoundExecutor> compose(std::shared_ptr<CudaRuntime> runtime, const std::vector<Segment>& segments);

// The same round without composition: every segment's graph is launched on its own. The stream of the first segment is
// that of the launch; the others are made here.
std::unique_ptr<RoundExecutor> stream_loop(std::shared_ptr<CudaRuntime> runtime, const std::vector<Segment>& segments);

}  // namespace fastlocal
