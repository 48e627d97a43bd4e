// Scheduling of training steps, independent of any device. No torch, no CUDA, no Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fastlocal {

struct Task {
  double cost;               // duration, in any unit; finite and >= 0
  std::int64_t bytes_made;   // allocated when the task starts
  std::int64_t bytes_freed;  // released when it ends: its own workspace, or what earlier tasks made
};

// second of step t needs first of step t - distance.
struct Dependency {
  std::int64_t first, second, distance;
};

struct Pipeline {
  std::vector<std::int64_t> order;               // tasks of a round as they are dispatched
  std::vector<std::int64_t> stage, stream;       // of each task
  std::vector<double> start;                     // of each task, within the round
  std::vector<std::vector<std::int64_t>> waits;  // of each task: tasks of the same round on other streams
  double period = 0;
  std::int64_t in_flight = 1;
  std::int64_t peak_bytes = 0;
  std::vector<std::int64_t> pools;  // of each group
  std::int64_t operations = 0;
};

// Software pipelining of training steps. A schedule is a stage s, a stream and a place in the round for every task: in
// round r the task works on step r - s. A round ends when all its tasks have ended. For every dependency
// s(first) <= s(second) + distance; where both sides are equal, first ends before second starts, within the round. All
// tasks of one group (`group` >= 0) share a stream, and a task with `pinned` >= 0 is on that stream. The aim is the
// shortest period (duration of a round). Of the rounds found that are at most 2 % longer than the shortest of them,
// that with the lowest peak of bytes is taken, then with the fewest steps in flight, then the shortest. With one stream
// and one step in flight the order is that of the indices, where that is topological and keeps the budget.
//
// Memory: a task's bytes_made are alive from its dispatch; its bytes_freed are gone at every later dispatch that starts
// no earlier than it ends. `peak_bytes` is the most alive at any dispatch of any round, those that fill and drain the
// pipeline included, in which tasks of steps that do not exist are left out and all others start as they do in a full
// round. A step must free all that it makes.
//
// Under a budget that could be exceeded if nothing ended before all of a round had started, `waits` also make a task
// wait for all that has ended when it starts; then the peak is never exceeded, whatever the tasks' durations.
//
// waits: with the order of every stream they imply each dependency of the round, also in rounds that leave tasks out;
// and none is implied by the others and the order of the streams in every round in which both of its tasks run.
//
// pools: a group lives from the start of its first task of a step to the end of its last. Two groups have the same pool
// only if they are on one stream and no life of one overlaps a life of the other in that stream's order, over all
// rounds; so they never overlap, whatever the tasks' durations. A group that lives longer than a round has a pool to
// itself (and lives there in several steps at once). The pools of a stream are as few as these rules allow wherever
// some point of its round lies in no life, else at most as many more as there are lives at the point in the fewest.
// Groups without tasks get pool 0.
//
// Work O((tasks + edges) log tasks) for each attempt, of which there are O(log in_flight) for plans of more than 1000
// tasks and a bounded number for smaller ones, and O((tasks + edges) * streams) for the waits (under a budget, times
// the square of the steps in flight); memory O(tasks * (streams + log in_flight) + edges). The result depends on the
// arguments alone, not on the order of `edges`. `names` is empty or one per task, for messages. Throws
// std::invalid_argument for bad arguments, a cycle of distance 0, bytes freed that are not alive, or a budget that no
// sequential order tried keeps, even with one step in flight.
Pipeline pipeline(const std::vector<Task>& tasks, const std::vector<Dependency>& edges,
                  const std::vector<std::int64_t>& group, const std::vector<std::int64_t>& pinned,
                  std::int64_t streams, std::int64_t in_flight, std::optional<std::int64_t> memory_budget,
                  const std::vector<std::string>& names);

}  // namespace fastlocal
