// List scheduling of one training step, independent of any device. No torch, no CUDA, no Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastlocal {

struct Task {
  double cost;               // duration, in any unit; finite and >= 0
  std::int64_t bytes_made;   // allocated when the task starts
  std::int64_t bytes_freed;  // released when it ends: its own workspace, or what earlier tasks made
};

using Edge = std::pair<std::int64_t, std::int64_t>;  // first must end before second starts

struct Schedule {
  std::vector<std::int64_t> order;   // task indices as they are dispatched: topological, start times never fall
  std::vector<std::int64_t> stream;  // of each task
  std::vector<double> start;         // of each task
  double makespan = 0;
  std::int64_t peak_bytes = 0;  // most bytes alive at any dispatch; a task's bytes are freed before a later
                                // dispatch that starts no earlier than the task ends
  std::int64_t operations = 0;  // edges, comparisons and tree nodes visited: the work done, on any machine alike
};

// Gives every task a start time and one of `streams` streams. A free stream takes the ready task with the longest
// path of costs ahead of it (ties: the lowest index), and the stream of the predecessor that released a task is
// preferred. Under a budget a task starts only if it fits and a sequential order of all the others that fits is kept;
// so the peak stays within the budget and there is no dead end.
//
// O((tasks + edges) log tasks). The result depends on the arguments alone. `names` is empty or one per task, for
// messages. Throws std::invalid_argument for bad arguments, a cycle, or a budget that no sequential order tried meets.
Schedule schedule(const std::vector<Task>& tasks, const std::vector<Edge>& edges, std::int64_t streams,
                  std::optional<std::int64_t> memory_budget, const std::vector<std::string>& names);

}  // namespace fastlocal
