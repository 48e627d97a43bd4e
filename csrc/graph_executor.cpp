#include "graph_executor.h"

#include <algorithm>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastlocal {
namespace {

using Graph = CudaCalls::Graph;
using Node = CudaCalls::Node;
using Exec = CudaCalls::Exec;
using Stream = CudaCalls::Stream;
using Event = CudaCalls::Event;
using Runtime = std::shared_ptr<CudaRuntime>;

constexpr int kOldest = 11040;              // has cudaGraphInstantiateWithFlags
constexpr unsigned int kNonBlocking = 1;    // cudaStreamNonBlocking: does not wait for the default stream
constexpr unsigned int kDisableTiming = 2;  // cudaEventDisableTiming

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string quoted(const std::string& name) { return "task '" + name + "'"; }

// An object of the runtime, destroyed with this.
template <class T>
class Owned {
 public:
  using Destroy = int (*CudaCalls::*)(T);

  Owned(Runtime runtime, T value, Destroy destroy, const char* call)
      : runtime_(std::move(runtime)), value_(value), destroy_(destroy), call_(call) {}
  Owned(Owned&& other) noexcept
      : runtime_(other.runtime_),
        value_(std::exchange(other.value_, nullptr)),
        destroy_(other.destroy_),
        call_(other.call_) {}
  Owned& operator=(Owned&&) = delete;
  ~Owned() {
    if (value_ && (runtime_->calls.*destroy_)(value_) != 0) runtime_->calls.cudaGetLastError();
  }

  T get() const { return value_; }

  void close(std::string* failure) {
    if (!value_) return;
    const int error = (runtime_->calls.*destroy_)(std::exchange(value_, nullptr));
    try {
      runtime_->check(error, call_, "what a round had made");
    } catch (const std::runtime_error& e) {
      if (failure->empty()) *failure = e.what();
    }
  }

 private:
  Runtime runtime_;
  T value_;
  Destroy destroy_;
  const char* call_;
};

#define FASTLOCAL_CHECK(runtime, call, what, ...) (runtime)->check((runtime)->calls.call(__VA_ARGS__), #call, what)

Owned<Graph> new_graph(const Runtime& runtime) {
  Graph graph = nullptr;
  FASTLOCAL_CHECK(runtime, cudaGraphCreate, "the round", &graph, 0);
  return {runtime, graph, &CudaCalls::cudaGraphDestroy, "cudaGraphDestroy"};
}

Owned<Exec> instantiate(const Runtime& runtime, Graph graph, const std::string& what) {
  Exec exec = nullptr;
  FASTLOCAL_CHECK(runtime, cudaGraphInstantiateWithFlags, what, &exec, graph, 0);
  return {runtime, exec, &CudaCalls::cudaGraphExecDestroy, "cudaGraphExecDestroy"};
}

Owned<Stream> new_stream(const Runtime& runtime, std::int64_t stream) {
  Stream made = nullptr;
  FASTLOCAL_CHECK(runtime, cudaStreamCreateWithFlags, text("stream ", stream), &made, kNonBlocking);
  return {runtime, made, &CudaCalls::cudaStreamDestroy, "cudaStreamDestroy"};
}

Owned<Event> new_event(const Runtime& runtime, const std::string& what) {
  Event event = nullptr;
  FASTLOCAL_CHECK(runtime, cudaEventCreateWithFlags, what, &event, kDisableTiming);
  return {runtime, event, &CudaCalls::cudaEventDestroy, "cudaEventDestroy"};
}

template <class T>
T handle(std::uintptr_t address) {
  return reinterpret_cast<T>(address);
}

// Per segment, those that must end before it starts: of its stream the one before it, and what it waits for. Each once,
// as the runtime demands.
std::vector<std::vector<std::int64_t>> dependencies(const std::vector<Segment>& segments) {
  if (segments.empty()) throw std::invalid_argument("segments: none was given; a round runs at least one task");
  std::vector<std::vector<std::int64_t>> result;
  std::map<std::int64_t, std::int64_t> last;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(segments.size()); ++i) {
    const Segment& segment = segments[i];
    const auto refuse = [&](const auto&... parts) {
      throw std::invalid_argument(text("segments: number ", i, ", '", segment.name, "', ", parts...));
    };
    if (!segment.graph) refuse("has no graph: its handle is 0");
    if (segment.stream < 0) refuse("has stream ", segment.stream, "; streams count from 0");
    std::vector<std::int64_t> own = segment.waits;
    for (const std::int64_t before : own)
      if (before < 0 || before >= i)
        refuse("waits for number ", before, ", which is not before it; give them in an order that keeps every wait");
    const auto [at, first] = last.emplace(segment.stream, i);
    if (!first) own.push_back(std::exchange(at->second, i));
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    result.push_back(std::move(own));
  }
  return result;
}

[[noreturn]] void refuse_closed() { throw std::runtime_error("the round was closed; compose it anew"); }

// --- one executable graph --------------------------------------------------------------------------------------------

class Composed : public RoundExecutor {
 public:
  Composed(Runtime runtime, const std::vector<Segment>& segments) : runtime_(std::move(runtime)) {
    const auto before = dependencies(segments);
    Owned<Graph> graph = new_graph(runtime_);  // gone at the end: the executable graph needs no template
    std::vector<Node> nodes, own;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      own.clear();
      for (const std::int64_t j : before[i]) own.push_back(nodes[j]);
      Node node = nullptr;
      FASTLOCAL_CHECK(runtime_, cudaGraphAddChildGraphNode, quoted(segments[i].name), &node, graph.get(),
                      own.empty() ? nullptr : own.data(), own.size(), handle<Graph>(segments[i].graph));
      nodes.push_back(node);
      edges_ += static_cast<std::int64_t>(own.size());
    }
    nodes_ = static_cast<std::int64_t>(nodes.size());
    exec_.push_back(instantiate(runtime_, graph.get(), text("a round of ", nodes_, " tasks")));
    std::string failure;
    graph.close(&failure);
    if (!failure.empty()) throw std::runtime_error(failure);
  }

  void upload(std::uintptr_t stream) override {
    FASTLOCAL_CHECK(runtime_, cudaGraphUpload, round(), exec(), handle<Stream>(stream));
  }

  void launch(std::uintptr_t stream) override {
    FASTLOCAL_CHECK(runtime_, cudaGraphLaunch, round(), exec(), handle<Stream>(stream));
  }

  void close() override {
    std::string failure;
    for (auto& exec : exec_) exec.close(&failure);
    exec_.clear();
    if (!failure.empty()) throw std::runtime_error(failure);
  }

  std::int64_t nodes() const override { return nodes_; }
  std::int64_t edges() const override { return edges_; }

 private:
  std::string round() const { return text("a round of ", nodes_, " tasks"); }
  Exec exec() const {
    if (exec_.empty()) refuse_closed();
    return exec_.front().get();
  }

  Runtime runtime_;
  std::vector<Owned<Exec>> exec_;  // one, or none when closed
  std::int64_t nodes_ = 0, edges_ = 0;
};

// --- a loop over streams ---------------------------------------------------------------------------------------------

class Loop : public RoundExecutor {
 public:
  Loop(Runtime runtime, const std::vector<Segment>& segments) : runtime_(std::move(runtime)) {
    const auto before = dependencies(segments);
    std::map<std::int64_t, std::size_t> place{{segments.front().stream, 0}};
    for (const Segment& segment : segments)
      if (place.emplace(segment.stream, place.size()).second)
        streams_.push_back(new_stream(runtime_, segment.stream));
    for (std::size_t i = 0; i < segments.size(); ++i) {
      const Segment& segment = segments[i];
      Step step{segment.name, place.at(segment.stream),
                instantiate(runtime_, handle<Graph>(segment.graph), quoted(segment.name)), {}, {}};
      edges_ += static_cast<std::int64_t>(before[i].size());
      for (const std::int64_t j : before[i])
        if (steps_[j].place != step.place) {
          step.waits.push_back(j);
          if (steps_[j].done.empty()) steps_[j].done.push_back(new_event(runtime_, quoted(steps_[j].name)));
        }
      steps_.push_back(std::move(step));
    }
    if (!streams_.empty()) fork_.push_back(new_event(runtime_, "the start of the round"));
    for (std::size_t i = 0; i < streams_.size(); ++i) joins_.push_back(new_event(runtime_, "the end of the round"));
  }

  void upload(std::uintptr_t stream) override {
    if (steps_.empty()) refuse_closed();
    for (const Step& step : steps_)
      FASTLOCAL_CHECK(runtime_, cudaGraphUpload, quoted(step.name), step.exec.get(), handle<Stream>(stream));
  }

  void launch(std::uintptr_t stream) override {
    if (steps_.empty()) refuse_closed();
    const Stream main = handle<Stream>(stream);
    const auto at = [&](std::size_t place) { return place == 0 ? main : streams_[place - 1].get(); };
    std::size_t forked = 0;
    try {
      if (!streams_.empty()) {
        FASTLOCAL_CHECK(runtime_, cudaEventRecord, "the start of the round", fork_.front().get(), main);
        for (; forked < streams_.size(); ++forked)
          FASTLOCAL_CHECK(runtime_, cudaStreamWaitEvent, "the start of the round", streams_[forked].get(),
                          fork_.front().get(), 0);
      }
      for (const Step& step : steps_) {
        const Stream own = at(step.place);
        for (const std::size_t j : step.waits)
          FASTLOCAL_CHECK(runtime_, cudaStreamWaitEvent,
                          quoted(step.name) + ", which waits for " + quoted(steps_[j].name), own,
                          steps_[j].done.front().get(), 0);
        FASTLOCAL_CHECK(runtime_, cudaGraphLaunch, quoted(step.name), step.exec.get(), own);
        if (!step.done.empty())
          FASTLOCAL_CHECK(runtime_, cudaEventRecord, quoted(step.name), step.done.front().get(), own);
      }
      for (std::size_t i = 0; i < streams_.size(); ++i) {
        FASTLOCAL_CHECK(runtime_, cudaEventRecord, "the end of the round", joins_[i].get(), streams_[i].get());
        FASTLOCAL_CHECK(runtime_, cudaStreamWaitEvent, "the end of the round", main, joins_[i].get(), 0);
      }
    } catch (...) {
      // What was launched runs on: whatever follows in the caller's stream must not overtake it.
      for (std::size_t i = 0; i < forked; ++i)
        if (runtime_->calls.cudaEventRecord(joins_[i].get(), streams_[i].get()) != 0 ||
            runtime_->calls.cudaStreamWaitEvent(main, joins_[i].get(), 0) != 0)
          runtime_->calls.cudaGetLastError();
      throw;
    }
  }

  void close() override {
    std::string failure;
    for (Step& step : steps_) {
      step.exec.close(&failure);
      for (auto& event : step.done) event.close(&failure);
    }
    for (auto* events : {&fork_, &joins_})
      for (auto& event : *events) event.close(&failure);
    for (auto& stream : streams_) stream.close(&failure);
    nodes_at_close_ = nodes();
    steps_.clear(), fork_.clear(), joins_.clear(), streams_.clear();
    if (!failure.empty()) throw std::runtime_error(failure);
  }

  std::int64_t nodes() const override {
    return steps_.empty() ? nodes_at_close_ : static_cast<std::int64_t>(steps_.size());
  }
  std::int64_t edges() const override { return edges_; }

 private:
  struct Step {
    std::string name;
    std::size_t place;  // 0: the stream of the launch; else streams_[place - 1]
    Owned<Exec> exec;
    std::vector<std::size_t> waits;  // steps on other streams
    std::vector<Owned<Event>> done;  // one where another stream waits for it
  };

  Runtime runtime_;
  std::vector<Owned<Stream>> streams_;
  std::vector<Step> steps_;
  std::vector<Owned<Event>> fork_, joins_;  // a fork where there are streams, and one join for each
  std::int64_t edges_ = 0, nodes_at_close_ = 0;
};

}  // namespace

// --- the runtime -----------------------------------------------------------------------------------------------------

CudaRuntime::CudaRuntime(const CudaCalls& table) : calls(table) {
  check(calls.cudaRuntimeGetVersion(&version_), "cudaRuntimeGetVersion", "the CUDA runtime");
  if (version_ < kOldest)
    throw std::runtime_error(text("the CUDA runtime is version ", version_ / 1000, ".", version_ % 1000 / 10,
                                  "; composed graphs need 11.4 or newer"));
}

#if defined(__linux__)
std::shared_ptr<CudaRuntime> CudaRuntime::find(const std::string& name, bool loaded) {
  void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL | (loaded ? RTLD_NOLOAD : 0));
  if (!library) {
    const char* why = dlerror();
    throw std::runtime_error(loaded ? text("this process has not loaded ", name, "; is PyTorch built for CUDA?")
                                    : text(name, " does not load: ", why ? why : "no reason given"));
  }
  try {
    CudaCalls table;
    std::string missing;
#define FASTLOCAL_CUDA_FIND(call, result, arguments)                               \
  table.call = reinterpret_cast<decltype(table.call)>(dlsym(library, #call));      \
  if (!table.call) missing += std::string(missing.empty() ? "" : ", ") + #call;
    FASTLOCAL_CUDA_CALLS(FASTLOCAL_CUDA_FIND)
#undef FASTLOCAL_CUDA_FIND
    if (!missing.empty())
      throw std::runtime_error(text("neither ", name, " nor a library that it was linked with has ", missing));
    auto found = std::make_shared<CudaRuntime>(table);
    found->library_ = library;
    return found;
  } catch (...) {
    dlclose(library);
    throw;
  }
}

CudaRuntime::~CudaRuntime() {
  if (library_) dlclose(library_);
}
#else
std::shared_ptr<CudaRuntime> CudaRuntime::find(const std::string&, bool) {
  throw std::runtime_error("the CUDA runtime is looked for on Linux only");
}

CudaRuntime::~CudaRuntime() = default;
#endif

void CudaRuntime::check(int error, const char* call, const std::string& what) const {
  if (error == 0) return;
  const char *name = calls.cudaGetErrorName(error), *reason = calls.cudaGetErrorString(error);
  calls.cudaGetLastError();
  throw std::runtime_error(text(call, " failed for ", what, ": ", name ? name : "an unknown error", " (", error, "), ",
                                reason ? reason : "without a reason"));
}

std::unique_ptr<RoundExecutor> compose(std::shared_ptr<CudaRuntime> runtime, const std::vector<Segment>& segments) {
  return std::make_unique<Composed>(std::move(runtime), segments);
}

std::unique_ptr<RoundExecutor> stream_loop(std::shared_ptr<CudaRuntime> runtime, const std::vector<Segment>& segments) {
  return std::make_unique<Loop>(std::move(runtime), segments);
}

}  // namespace fastlocal
