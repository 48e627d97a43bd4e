// A CUDA runtime without a device: it checks what it is asked, writes down what would run, and fails when told to.
//
// Handles are addresses of objects on the heap, so that sanitizers see a handle that is used too late. Launches are not
// carried out: the log says what was put where, and a test decides in which of the orders that this allows it happens.
#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

enum Error { success = 0, invalid = 1, told = 999 };

struct Graph;

struct Node {
  Graph* graph;
  int child;  // number of the graph that was cloned
  std::vector<int> after;
};

struct Graph {
  int number;
  bool captured;
  std::vector<Node*> nodes;
};

struct Exec {
  int number;
  std::vector<std::pair<int, std::vector<int>>> nodes;  // graph, and the nodes that it comes after
};

struct Other {  // a stream or an event
  int number;
  bool recorded = false;
};

struct State {
  int next = 1, calls = 0, fail_at = 0, last_error = 0, misuse = 0, version = 13000;
  std::set<Graph*> graphs;
  std::set<Exec*> execs;
  std::set<Other*> streams, given, events;  // `given` are the caller's, as are captured graphs
  std::vector<std::string> log;
  std::map<int, std::string> contents;  // of executable graphs, for as long as the state lives
} state;

template <class... Parts>
void note(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  state.log.push_back(out.str());
}

int fail(int error) { return state.last_error = error; }

int misused(const char* what) {
  ++state.misuse;
  note("misuse ", what);
  return fail(invalid);
}

bool told_to_fail() { return ++state.calls == state.fail_at; }

bool is_stream(Other* s) { return !s || state.streams.count(s) || state.given.count(s); }
int number(Other* s) { return s ? s->number : 0; }

std::string copied;
const char* keep(std::string text) { return copied = std::move(text), copied.c_str(); }

}  // namespace

#define CALL \
  if (told_to_fail()) return fail(told)

extern "C" {

// --- what the runtime offers -----------------------------------------------------------------------------------------

int cudaRuntimeGetVersion(int* version) {
  CALL;
  return *version = state.version, success;
}

int cudaGetLastError() { return std::exchange(state.last_error, 0); }
const char* cudaGetErrorName(int error) { return error == told ? "cudaErrorUnknown" : "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(int error) { return error == told ? "told to fail" : "invalid argument"; }

int cudaGraphCreate(Graph** graph, unsigned int flags) {
  CALL;
  if (!graph || flags) return misused("cudaGraphCreate");
  *graph = new Graph{state.next++, false, {}};
  state.graphs.insert(*graph);
  return success;
}

int cudaGraphAddChildGraphNode(Node** node, Graph* graph, Node* const* after, std::size_t count, Graph* child) {
  CALL;
  if (!node || !state.graphs.count(graph) || !state.graphs.count(child) || graph == child || graph->captured)
    return misused("cudaGraphAddChildGraphNode: a graph");
  if ((count == 0) != (after == nullptr)) return misused("cudaGraphAddChildGraphNode: dependencies");
  std::set<Node*> before(after, after + count);
  if (before.size() != count) return misused("cudaGraphAddChildGraphNode: a dependency is there twice");
  std::vector<int> places;
  for (Node* n : before) {
    const auto at = std::find(graph->nodes.begin(), graph->nodes.end(), n);
    if (at == graph->nodes.end()) return misused("cudaGraphAddChildGraphNode: a node of another graph");
    places.push_back(static_cast<int>(at - graph->nodes.begin()));
  }
  std::sort(places.begin(), places.end());
  *node = new Node{graph, child->number, places};
  graph->nodes.push_back(*node);
  return success;
}

int cudaGraphDestroy(Graph* graph) {
  if (!state.graphs.erase(graph)) return misused("cudaGraphDestroy");
  for (Node* node : graph->nodes) delete node;
  delete graph;
  CALL;
  return success;
}

int cudaGraphInstantiateWithFlags(Exec** exec, Graph* graph, unsigned long long flags) {
  CALL;
  if (!exec || flags || !state.graphs.count(graph)) return misused("cudaGraphInstantiateWithFlags");
  *exec = new Exec{state.next++, {}};
  if (graph->captured) (*exec)->nodes.push_back({graph->number, {}});
  for (Node* node : graph->nodes) (*exec)->nodes.push_back({node->child, node->after});
  state.execs.insert(*exec);
  std::ostringstream out;
  for (const auto& [child, after] : (*exec)->nodes) {
    out << child;
    for (const int n : after) out << ' ' << n;
    out << '\n';
  }
  state.contents[(*exec)->number] = out.str();
  return success;
}

int cudaGraphUpload(Exec* exec, Other* stream) {
  CALL;
  if (!state.execs.count(exec) || !is_stream(stream)) return misused("cudaGraphUpload");
  note("upload ", exec->number, ' ', number(stream));
  return success;
}

int cudaGraphLaunch(Exec* exec, Other* stream) {
  CALL;
  if (!state.execs.count(exec) || !is_stream(stream)) return misused("cudaGraphLaunch");
  note("launch ", exec->number, ' ', number(stream));
  return success;
}

int cudaGraphExecDestroy(Exec* exec) {
  if (!state.execs.erase(exec)) return misused("cudaGraphExecDestroy");
  delete exec;
  CALL;
  return success;
}

int cudaStreamCreateWithFlags(Other** stream, unsigned int flags) {
  CALL;
  if (!stream || flags != 1) return misused("cudaStreamCreateWithFlags");
  state.streams.insert(*stream = new Other{state.next++});
  return success;
}

int cudaStreamWaitEvent(Other* stream, Other* event, unsigned int flags) {
  CALL;
  if (!is_stream(stream) || !state.events.count(event) || flags) return misused("cudaStreamWaitEvent");
  if (!event->recorded) return misused("cudaStreamWaitEvent: the event was never recorded, so nothing would wait");
  note("wait ", event->number, ' ', number(stream));
  return success;
}

int cudaStreamDestroy(Other* stream) {
  if (!state.streams.erase(stream)) return misused("cudaStreamDestroy");
  delete stream;
  CALL;
  return success;
}

int cudaEventCreateWithFlags(Other** event, unsigned int flags) {
  CALL;
  if (!event || flags != 2) return misused("cudaEventCreateWithFlags");
  state.events.insert(*event = new Other{state.next++});
  return success;
}

int cudaEventRecord(Other* event, Other* stream) {
  CALL;
  if (!is_stream(stream) || !state.events.count(event)) return misused("cudaEventRecord");
  event->recorded = true;
  note("record ", event->number, ' ', number(stream));
  return success;
}

int cudaEventDestroy(Other* event) {
  if (!state.events.erase(event)) return misused("cudaEventDestroy");
  delete event;
  CALL;
  return success;
}

// --- what only tests call --------------------------------------------------------------------------------------------

// A captured graph or a stream of the caller's, as PyTorch has them; never counted as alive.
std::uintptr_t fake_graph(int* number) {
  Graph* graph = new Graph{state.next++, true, {}};
  state.graphs.insert(graph);
  *number = graph->number;
  return reinterpret_cast<std::uintptr_t>(graph);
}

std::uintptr_t fake_stream(int* number) {
  Other* stream = new Other{state.next++};
  state.given.insert(stream);
  *number = stream->number;
  return reinterpret_cast<std::uintptr_t>(stream);
}

void fake_free_graph(std::uintptr_t handle) {
  Graph* graph = reinterpret_cast<Graph*>(handle);
  if (state.graphs.erase(graph)) delete graph;
}

void fake_free_stream(std::uintptr_t handle) {
  Other* stream = reinterpret_cast<Other*>(handle);
  if (state.given.erase(stream)) delete stream;
}

void fake_fail_at(int call) { state.calls = 0, state.fail_at = call; }  // the n-th call from now; 0 is none
int fake_calls() { return state.calls; }
int fake_misuse() { return state.misuse; }
int fake_last_error() { return state.last_error; }
void fake_version(int version) { state.version = version; }

// Objects that the executor made and has not destroyed.
int fake_alive() {
  const auto own = std::count_if(state.graphs.begin(), state.graphs.end(), [](Graph* g) { return !g->captured; });
  return static_cast<int>(own + state.execs.size() + state.streams.size() + state.events.size());
}

// One line for each call that puts work somewhere: "launch <exec> <stream>", "record <event> <stream>", "wait <event>
// <stream>", "upload <exec> <stream>", and for each thing asked wrongly "misuse ...".
const char* fake_log() {
  std::string all;
  for (const auto& line : state.log) all += line + "\n";
  return keep(all);
}

void fake_clear_log() { state.log.clear(); }

// One line for each node of an executable graph, also of one that is gone: its captured graph, and the nodes before it.
const char* fake_contents(int exec) {
  const auto at = state.contents.find(exec);
  return keep(at == state.contents.end() ? "" : at->second);
}

}  // extern "C"
