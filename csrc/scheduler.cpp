#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace fastlocal {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMost = kNever / 4;  // so that no sum or difference of byte counts overflows

using Edge = std::pair<std::int64_t, std::int64_t>;  // first must end before second starts

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Tasks, checked, and the edges inside one step or one round, packed by source.
struct Plan {
  const std::vector<Task>& tasks;
  const std::vector<std::string>& names;
  std::int64_t size;
  std::vector<std::int64_t> first, next, waits;  // successors of i: next[first[i] .. first[i + 1]); edges into i
  std::int64_t made = 0, freed = 0;
  std::int64_t operations = 0;

  Plan(const std::vector<Task>& given, const std::vector<Edge>& edges, const std::vector<std::string>& labels)
      : tasks(given), names(labels), size(static_cast<std::int64_t>(given.size())) {
    if (!names.empty() && names.size() != tasks.size())
      refuse("names has ", names.size(), " entries for ", size, " tasks; give one per task, or none");
    double duration = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      const Task& task = tasks[i];
      if (!std::isfinite(task.cost) || task.cost < 0)
        refuse("cost of ", label(i), " is ", task.cost, "; it must be finite and not negative");
      if (task.bytes_made < 0 || task.bytes_freed < 0)
        refuse(task.bytes_made < 0 ? "bytes_made" : "bytes_freed", " of ", label(i), " is ",
               task.bytes_made < 0 ? task.bytes_made : task.bytes_freed, "; it must not be negative");
      if (task.bytes_made > kMost - made) refuse("bytes_made adds up to more than ", kMost);
      if (task.bytes_freed > kMost - freed) refuse("bytes_freed adds up to more than ", kMost);
      made += task.bytes_made, freed += task.bytes_freed;
      duration += task.cost;
    }
    if (!std::isfinite(duration)) refuse("cost adds up to ", duration, "; give it in a larger unit");
    first.assign(size + 1, 0);
    waits.assign(size, 0);
    for (const auto& [before, after] : edges) ++first[before + 1], ++waits[after];
    std::partial_sum(first.begin(), first.end(), first.begin());
    next.resize(edges.size());
    std::vector<std::int64_t> fill(first.begin(), first.end() - 1);
    for (const auto& [before, after] : edges) next[fill[before]++] = after;
    operations += size + 2 * static_cast<std::int64_t>(edges.size());
  }

  std::string label(std::int64_t i) const {
    return "task " + std::to_string(i) + (names.empty() ? "" : " \"" + names[i] + "\"");
  }

  // Counts down what waits for `i`; hands over each task that nothing holds back any more.
  template <class Visit>
  void release(std::int64_t i, std::vector<std::int64_t>& open, Visit visit) {
    for (std::int64_t e = first[i]; e < first[i + 1]; ++e, ++operations)
      if (--open[next[e]] == 0) visit(next[e]);
  }

  [[noreturn]] void refuse_cycle(const std::vector<std::int64_t>& open) const {
    // Every task that is left has a predecessor that is left, so walking backwards must come round.
    std::vector<std::int64_t> held_by(size, -1), seen(size, -1), path;
    for (std::int64_t i = size - 1; i >= 0; --i)
      if (open[i] > 0)
        for (std::int64_t e = first[i]; e < first[i + 1]; ++e)
          if (open[next[e]] > 0) held_by[next[e]] = i;
    std::int64_t at = std::find_if(open.begin(), open.end(), [](std::int64_t n) { return n > 0; }) - open.begin();
    for (; seen[at] < 0; at = held_by[at]) {
      seen[at] = static_cast<std::int64_t>(path.size());
      path.push_back(at);
    }
    std::vector<std::int64_t> cycle(path.rbegin(), path.rend() - seen[at]);
    std::rotate(cycle.begin(), std::min_element(cycle.begin(), cycle.end()), cycle.end());
    std::string text;
    constexpr std::size_t kShown = 20;
    for (std::size_t i = 0; i < std::min(cycle.size(), kShown); ++i) text += label(cycle[i]) + " -> ";
    if (cycle.size() > kShown) text += "... -> ";
    refuse("edges form a cycle of ", cycle.size(), ": ", text, label(cycle[0]), "; remove one of these dependencies");
  }

  void refuse_cycles() {
    std::vector<std::int64_t> open = waits, order;
    for (std::int64_t i = 0; i < size; ++i)
      if (open[i] == 0) order.push_back(i);
    for (std::size_t at = 0; at < order.size(); ++at)
      release(order[at], open, [&](std::int64_t task) { order.push_back(task); });
    if (static_cast<std::int64_t>(order.size()) < size) refuse_cycle(open);
  }
};

// Values by position, with the least of every subtree, and a number to add to every value of a prefix. Positions that
// hold nothing read kNever.
class LeastTree {
 public:
  LeastTree(Plan& plan) : plan_(plan) {
    while (leaves_ < plan.size) leaves_ *= 2;
    least_.assign(2 * leaves_, kNever);
    added_.assign(leaves_, 0);
  }
  void set(std::int64_t position, std::int64_t value) { set(1, leaves_, position, value); }
  void add_before(std::int64_t end, std::int64_t value) { add_before(1, leaves_, end, value); }
  std::int64_t least_before(std::int64_t end) const { return least_before(1, leaves_, end); }

 private:
  static std::int64_t sum(std::int64_t value, std::int64_t added) { return value == kNever ? kNever : value + added; }
  void pull(std::int64_t node) { least_[node] = sum(std::min(least_[2 * node], least_[2 * node + 1]), added_[node]); }
  void set(std::int64_t node, std::int64_t width, std::int64_t position, std::int64_t value) {
    ++plan_.operations;
    if (width == 1) {
      least_[node] = value;
      return;
    }
    value = sum(value, -added_[node]), width /= 2;
    if (position < width)
      set(2 * node, width, position, value);
    else
      set(2 * node + 1, width, position - width, value);
    pull(node);
  }
  void add_before(std::int64_t node, std::int64_t width, std::int64_t end, std::int64_t value) {
    ++plan_.operations;
    if (end >= width) {
      least_[node] = sum(least_[node], value);
      if (width > 1) added_[node] += value;
      return;
    }
    if (end <= 0) return;
    width /= 2;
    add_before(2 * node, width, end, value);
    add_before(2 * node + 1, width, end - width, value);
    pull(node);
  }
  std::int64_t least_before(std::int64_t node, std::int64_t width, std::int64_t end) const {
    ++plan_.operations;
    if (end <= 0) return kNever;
    if (end >= width) return least_[node];
    width /= 2;
    const std::int64_t left = least_before(2 * node, width, end);
    const std::int64_t right = least_before(2 * node + 1, width, end - width);
    return sum(std::min(left, right), added_[node]);
  }
  Plan& plan_;
  std::vector<std::int64_t> least_, added_;
  std::int64_t leaves_ = 1;
};

// What a way out costs: a sequential order that fits the budget, less the tasks that have started. A task may be drawn
// forward only if the rest of that order still fits afterwards; so there is never a dead end, because the first of the
// rest fits as soon as all that runs has ended.
class WayOut {
 public:
  WayOut(Plan& plan, std::vector<std::int64_t> order, std::int64_t budget)
      : plan_(plan), order_(std::move(order)), position_(plan.size), started_(plan.size), slack_(plan) {
    std::int64_t alive = 0;
    for (std::int64_t p = 0; p < plan.size; ++p) {
      const Task& task = plan.tasks[order_[p]];
      position_[order_[p]] = p;
      slack_.set(p, budget - alive - task.bytes_made);
      alive += task.bytes_made - task.bytes_freed;
    }
  }
  bool allows(std::int64_t task) const { return slack_.least_before(position_[task]) >= kept(task); }
  void start(std::int64_t task) {
    slack_.set(position_[task], kNever);
    slack_.add_before(position_[task], -kept(task));
    started_[task] = true;
    while (head_ < plan_.size && started_[order_[head_]]) ++head_;
  }
  std::int64_t head() const { return order_[head_]; }  // while any task is left

 private:
  std::int64_t kept(std::int64_t task) const { return plan_.tasks[task].bytes_made - plan_.tasks[task].bytes_freed; }
  Plan& plan_;
  std::vector<std::int64_t> order_, position_;
  std::vector<bool> started_;
  std::int64_t head_ = 0;
  LeastTree slack_;
};

// A topological order for one stream: always the ready task with the least key, ties by index. The key may depend on
// the number of tasks done when it became ready.
template <class Key>
std::vector<std::int64_t> sequential_order(Plan& plan, Key key) {
  using Entry = std::pair<decltype(key(0, 0)), std::int64_t>;
  auto later = [&plan](const Entry& a, const Entry& b) { return ++plan.operations, a > b; };
  std::priority_queue<Entry, std::vector<Entry>, decltype(later)> ready(later);
  std::vector<std::int64_t> open = plan.waits, order;
  for (std::int64_t i = 0; i < plan.size; ++i)
    if (open[i] == 0) ready.emplace(key(i, 0), i);
  while (!ready.empty()) {
    order.push_back(ready.top().second);
    ready.pop();
    const auto done = static_cast<std::int64_t>(order.size());
    plan.release(order.back(), open, [&](std::int64_t task) { ready.emplace(key(task, done), task); });
  }
  return order;
}

// Orders worth trying for their low peak: the caller's own, depth first, and the task that leaves least behind first,
// forwards and, with making and freeing exchanged, backwards from the end.
std::vector<std::vector<std::int64_t>> frugal_orders(Plan& plan, const std::vector<Edge>& edges) {
  auto releasing = [](std::int64_t made, std::int64_t freed) {
    return made <= freed ? std::make_pair(std::int64_t{0}, made) : std::make_pair(std::int64_t{1}, -freed);
  };
  std::vector<Edge> backwards;
  for (const auto& [before, after] : edges) backwards.emplace_back(after, before);
  Plan reversed(plan.tasks, backwards, plan.names);
  auto from_end = sequential_order(reversed, [&](std::int64_t task, std::int64_t) {
    return releasing(plan.tasks[task].bytes_freed, plan.tasks[task].bytes_made);
  });
  std::reverse(from_end.begin(), from_end.end());
  plan.operations += reversed.operations;
  return {
      sequential_order(plan, [](std::int64_t task, std::int64_t) { return task; }),
      sequential_order(plan, [](std::int64_t, std::int64_t done) { return -done; }),
      sequential_order(
          plan, [&](std::int64_t task,
                    std::int64_t) { return releasing(plan.tasks[task].bytes_made, plan.tasks[task].bytes_freed); }),
      std::move(from_end),
  };
}

using Index = std::int32_t;
using Indices = std::vector<Index>;

constexpr std::size_t kTries = 8;  // ready tasks looked at for one that fits the budget
constexpr double kAsGood = 1.02;   // periods that differ by less count as equal, for costs are no better known
constexpr std::int64_t kLocalTasks = 1000;  // plans up to this size are searched locally
#ifndef FASTLOCAL_LOCAL_EFFORT  // tests under sanitizers, where it takes long, lower it
#define FASTLOCAL_LOCAL_EFFORT 500'000
#endif
constexpr std::int64_t kLocalEffort = FASTLOCAL_LOCAL_EFFORT;  // tasks and edges visited by that search

// A step's tasks and the dependencies that can bind with so many steps in flight; its groups as units, where a task
// without a group is a unit of its own.
struct Problem {
  const std::vector<Task>& tasks;
  Index size, streams, depth;
  Indices first, to, distance;                   // dependencies of i: [first[i] .. first[i + 1]), sorted, each once
  Indices came_first, came_from, came_distance;  // the same by their second task
  Indices topological, place;                    // by least index; and where each task stands in it
  Indices unit, pin;                             // unit of each task; stream of each unit, or -1
  std::vector<double> load;                      // of each unit
  Indices units_in_order;                        // by the place of their first task
  double bound = 0;                              // no period is shorter
  std::int64_t operations = 0;

  // Dependencies that reach further back than the steps in flight never bind.
  Problem(const std::vector<Task>& given, Index most_streams, Index most_depth, const std::vector<Dependency>& edges)
      : tasks(given), size(static_cast<Index>(given.size())), streams(most_streams), depth(most_depth) {
    first.assign(size + 1, 0);
    for (const auto& edge : edges) first[edge.first + 1] += edge.distance < depth;
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<std::pair<Index, Index>> packed(first[size]);
    Indices fill(first.begin(), first.end() - 1);
    for (const auto& edge : edges)
      if (edge.distance < depth)
        packed[fill[edge.first]++] = {static_cast<Index>(edge.second), static_cast<Index>(edge.distance)};
    came_first.assign(size + 1, 0);
    for (Index i = 0, begin = 0; i < size; ++i) {
      const auto row = packed.begin() + begin, end = packed.begin() + first[i + 1];
      begin = first[i + 1];
      std::sort(row, end);
      const auto last = std::unique(row, end);
      for (auto at = row; at != last; ++at)
        to.push_back(at->first), distance.push_back(at->second), ++came_first[at->first + 1];
      first[i + 1] = static_cast<Index>(to.size());
    }
    std::partial_sum(came_first.begin(), came_first.end(), came_first.begin());
    came_from.resize(to.size()), came_distance.resize(to.size());
    fill.assign(came_first.begin(), came_first.end() - 1);
    for (Index i = 0; i < size; ++i)
      for (Index e = first[i]; e < first[i + 1]; ++e) {
        const Index at = fill[to[e]]++;
        came_from[at] = i, came_distance[at] = distance[e];
      }
    operations = size + 4 * static_cast<std::int64_t>(edges.size());
  }

  bool large() const { return size > kLocalTasks; }  // too large to try much

  std::vector<Edge> same_step() const {
    std::vector<Edge> edges;
    for (Index i = 0; i < size; ++i)
      for (Index e = first[i]; e < first[i + 1]; ++e)
        if (distance[e] == 0) edges.emplace_back(i, to[e]);
    return edges;
  }
};

// A legal stage for every task, and one round of them played through time.
struct Round {
  Indices stage, stream, order;
  std::vector<double> start;
  double period = std::numeric_limits<double>::infinity();
  bool by_index = true;  // which rule of urgency it comes from
};

bool shorter(double a, double b) { return a < b * (1 - 1e-9); }

Index depth_of(const Indices& stage) { return stage.empty() ? 1 : 1 + *std::max_element(stage.begin(), stage.end()); }

bool better(const Round& a, const Round& b) {
  if (shorter(a.period, b.period) || shorter(b.period, a.period)) return a.period < b.period;
  return depth_of(a.stage) < depth_of(b.stage);
}

// Raises stages until s(first) <= s(second) + distance for every dependency, as little as possible. `from` lists the
// tasks to begin with.
void raise_to_legal(Problem& problem, Indices& stage, Indices from) {
  std::vector<bool> queued(problem.size);
  for (const Index task : from) queued[task] = true;
  for (std::size_t at = 0; at < from.size(); ++at) {
    const Index task = from[at];
    queued[task] = false;
    for (Index e = problem.first[task]; e < problem.first[task + 1]; ++e, ++problem.operations) {
      const Index after = problem.to[e], least = stage[task] - problem.distance[e];
      if (stage[after] >= least) continue;
      stage[after] = least;
      if (!queued[after]) queued[after] = true, from.push_back(after);
    }
  }
}

// Lowers stages, in the same way.
void lower_to_legal(Problem& problem, Indices& stage, Indices from) {
  for (std::size_t at = 0; at < from.size(); ++at)
    for (Index e = problem.came_first[from[at]]; e < problem.came_first[from[at] + 1]; ++e, ++problem.operations) {
      const Index before = problem.came_from[e], most = stage[from[at]] + problem.came_distance[e];
      if (stage[before] <= most) continue;
      stage[before] = most;
      from.push_back(before);
    }
}

// Numbers the stages in use from 0. That stays legal and makes no dependency bind that did not.
void close_gaps(Indices& stage) {
  if (stage.empty()) return;
  const Index least = *std::min_element(stage.begin(), stage.end());
  const Index most = *std::max_element(stage.begin(), stage.end());
  Indices number(most - least + 2, 0);
  for (const Index s : stage) number[s - least + 1] = 1;
  std::partial_sum(number.begin(), number.end(), number.begin());
  for (Index& s : stage) s = number[s - least];
}

// Stages from cutting the sequential order, or the units in that order, into `depth` pieces of equal cost.
Indices cut(Problem& problem, Index depth, bool whole_units) {
  Indices stage(problem.size, 0);
  if (depth > 1) {
    const double total = std::accumulate(problem.load.begin(), problem.load.end(), 0.0);
    double before = 0;
    auto piece = [&](double cost) {
      const double middle = before + cost / 2;
      before += cost;
      return total > 0 ? std::min<Index>(depth - 1, static_cast<Index>(middle / total * depth)) : 0;
    };
    if (whole_units) {
      Indices of_unit(problem.load.size());
      for (const Index unit : problem.units_in_order) of_unit[unit] = piece(problem.load[unit]);
      for (Index i = 0; i < problem.size; ++i) stage[i] = of_unit[problem.unit[i]];
    } else {
      for (const Index task : problem.topological) stage[task] = piece(problem.tasks[task].cost);
    }
    raise_to_legal(problem, stage, problem.topological);
    close_gaps(stage);
  }
  return stage;
}

// The urgency of each task by which the sequential order is kept.
std::vector<double> index_rule(const Problem& problem) {
  std::vector<double> urgency;
  for (const Index place : problem.place) urgency.push_back(-place);
  return urgency;
}

Indices streams_of(const Problem& problem, const Round& round) {
  Indices streams(problem.load.size(), 0);
  for (Index task = 0; task < problem.size; ++task) streams[problem.unit[task]] = round.stream[task];
  return streams;
}

// A stream for every unit: pieces of the sequential order of equal cost, or the longest unit first to the stream with
// the least to do.
Indices streams_in_pieces(const Problem& problem) {
  Indices stream = problem.pin;
  const double total = std::accumulate(problem.load.begin(), problem.load.end(), 0.0);
  double before = 0;
  for (const Index unit : problem.units_in_order) {
    const double middle = before + problem.load[unit] / 2;
    before += problem.load[unit];
    if (stream[unit] < 0)
      stream[unit] =
          total > 0 ? std::min<Index>(problem.streams - 1, static_cast<Index>(middle / total * problem.streams)) : 0;
  }
  return stream;
}

Indices streams_longest_first(Problem& problem) {
  Indices stream = problem.pin, by_load = problem.units_in_order;
  std::stable_sort(by_load.begin(), by_load.end(), [&](Index a, Index b) {
    return ++problem.operations, problem.load[a] > problem.load[b];
  });
  std::vector<double> loads(problem.streams, 0);
  for (const Index unit : by_load)
    if (stream[unit] >= 0) loads[stream[unit]] += problem.load[unit];
  using Load = std::pair<double, Index>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> least;
  for (Index s = 0; s < problem.streams; ++s) least.emplace(loads[s], s);
  for (const Index unit : by_load) {
    if (stream[unit] >= 0) continue;
    const auto [load, s] = least.top();
    least.pop(), ++problem.operations;
    stream[unit] = s;
    least.emplace(load + problem.load[unit], s);
  }
  return stream;
}

// Plays rounds through time. A stream that is idle takes the ready task of the greatest urgency, ties by index; a unit
// without a stream gets that of its first task.
class Player {
 public:
  explicit Player(Problem& problem)
      : problem_(problem), open_(problem.size), follows_(problem.size), urgency_(problem.size), own_(problem.streams) {}

  // Longest path of costs from each task to the end of the round.
  const std::vector<double>& critical_path(const Indices& stage) {
    for (const Index task : downstream(stage)) {
      double ahead = 0;
      for (Index e = problem_.first[task]; e < problem_.first[task + 1]; ++e, ++problem_.operations)
        if (binds(stage, task, e)) ahead = std::max(ahead, urgency_[problem_.to[e]]);
      urgency_[task] = ahead + problem_.tasks[task].cost;
    }
    return urgency_;
  }

  // `room` is what a budget leaves to one round; without a budget `way_out` is null.
  void play(const Indices& stage, Indices stream_of_unit, const std::vector<double>& urgency, Round& out,
            std::int64_t room = kMost, WayOut* way_out = nullptr) {
    const Index size = problem_.size;
    stream_of_unit_ = std::move(stream_of_unit);
    out.stage = stage;
    out.stream.assign(size, -1);
    out.start.assign(size, 0);
    out.order.clear();
    out.period = 0;
    std::fill(open_.begin(), open_.end(), 0);
    std::fill(follows_.begin(), follows_.end(), -1);
    for (Index u = 0; u < size; ++u)
      for (Index e = problem_.first[u]; e < problem_.first[u + 1]; ++e) open_[problem_.to[e]] += binds(stage, u, e);
    problem_.operations += size + static_cast<std::int64_t>(problem_.to.size());
    for (auto& heap : own_) heap.clear();
    unassigned_.clear();
    running_.clear();
    idle_.assign(problem_.streams, true);
    offering_.clear();
    where_.assign(problem_.streams, -1);
    lowest_.resize(problem_.streams);
    std::iota(lowest_.begin(), lowest_.end(), 0);
    busy_ = 0;
    for (Index i = 0; i < size; ++i)
      if (open_[i] == 0) add(i, urgency);
    double now = 0;
    while (true) {
      while (!running_.empty() && running_.front().first <= now) {
        const Index task = running_.front().second;
        std::pop_heap(running_.begin(), running_.end(), std::greater<Ending>());
        running_.pop_back();
        set_idle(out.stream[task]);
        room += problem_.tasks[task].bytes_freed;
        for (Index e = problem_.first[task]; e < problem_.first[task + 1]; ++e, ++problem_.operations)
          if (binds(stage, task, e) && --open_[problem_.to[e]] == 0) {
            follows_[problem_.to[e]] = out.stream[task];
            add(problem_.to[e], urgency);
          }
      }
      const Index task = busy_ < problem_.streams ? pick(out, room, way_out, urgency) : -1;
      if (task >= 0) {
        Index& stream = stream_of_unit_[problem_.unit[task]];
        if (stream < 0) stream = free_stream(follows_[task]);
        out.stream[task] = stream;
        out.start[task] = now;
        out.order.push_back(task);
        set_busy(stream);
        room -= problem_.tasks[task].bytes_made;
        if (way_out) way_out->start(task);
        running_.emplace_back(now + problem_.tasks[task].cost, task);
        std::push_heap(running_.begin(), running_.end(), std::greater<Ending>());
      } else if (!running_.empty()) {
        now = running_.front().first;
      } else {
        break;
      }
    }
    if (static_cast<Index>(out.order.size()) < size) throw std::logic_error("the scheduler stopped early");
    out.period = now;
  }

  // Takes the tasks in the order of urgency that the dependencies allow, and starts each as soon as what stands before
  // it has ended. Unlike `play` this can leave a stream idle for a task that is not ready yet.
  void line_up(const Indices& stage, const Indices& stream_of_unit, const std::vector<double>& urgency, Round& out) {
    out.stage = stage;
    out.stream.resize(problem_.size);
    out.start.assign(problem_.size, 0);
    out.order.clear();
    out.period = 0;
    std::fill(open_.begin(), open_.end(), 0);
    for (Index u = 0; u < problem_.size; ++u)
      for (Index e = problem_.first[u]; e < problem_.first[u + 1]; ++e)
        open_[problem_.to[e]] += binds(stage, u, e);
    problem_.operations += problem_.size + static_cast<std::int64_t>(problem_.to.size());
    unassigned_.clear();
    for (Index i = 0; i < problem_.size; ++i)
      if (open_[i] == 0) push(unassigned_, i, urgency);
    free_at_.assign(problem_.streams, 0);
    while (!unassigned_.empty()) {
      const Index task = pop(unassigned_);
      const Index stream = stream_of_unit[problem_.unit[task]];
      const double start = std::max(out.start[task], free_at_[stream]), end = start + problem_.tasks[task].cost;
      out.stream[task] = stream;
      out.start[task] = start;
      out.order.push_back(task);
      free_at_[stream] = end;
      out.period = std::max(out.period, end);
      for (Index e = problem_.first[task]; e < problem_.first[task + 1]; ++e, ++problem_.operations)
        if (binds(stage, task, e)) {
          const Index after = problem_.to[e];
          out.start[after] = std::max(out.start[after], end);
          if (--open_[after] == 0) push(unassigned_, after, urgency);
        }
    }
    std::stable_sort(out.order.begin(), out.order.end(), [&](Index a, Index b) { return out.start[a] < out.start[b]; });
  }

  const Indices& stream_of_unit() const { return stream_of_unit_; }  // as the last `play` left it

 private:
  using Urgent = std::pair<double, Index>;  // urgency, minus the index
  using Ending = std::pair<double, Index>;

  bool binds(const Indices& stage, Index task, Index e) const {
    return stage[task] == stage[problem_.to[e]] + problem_.distance[e];
  }

  // Tasks so that each stands before those that it waits for inside a round: along a dependency that binds the stage
  // falls, and where it stays equal the distance is 0.
  const Indices& downstream(const Indices& stage) {
    begin_.assign(depth_of(stage) + 1, 0);
    for (const Index s : stage) ++begin_[s + 1];
    std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
    downstream_.resize(problem_.size);
    for (auto at = problem_.topological.rbegin(); at != problem_.topological.rend(); ++at)
      downstream_[begin_[stage[*at]]++] = *at;
    return downstream_;
  }

  void push(std::vector<Urgent>& heap, Index task, const std::vector<double>& urgency) {
    heap.emplace_back(urgency[task], -task);
    std::push_heap(heap.begin(), heap.end());
    ++problem_.operations;
  }
  Index pop(std::vector<Urgent>& heap) {
    const Index task = -heap.front().second;
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    ++problem_.operations;
    return task;
  }
  void add(Index task, const std::vector<double>& urgency) {
    const Index stream = stream_of_unit_[problem_.unit[task]];
    push(stream < 0 ? unassigned_ : own_[stream], task, urgency);
    if (stream >= 0 && idle_[stream]) offer(stream);
  }

  void set_idle(Index stream) {
    idle_[stream] = true, --busy_;
    lowest_.push_back(stream);
    std::push_heap(lowest_.begin(), lowest_.end(), std::greater<>());
    if (!own_[stream].empty()) offer(stream);
  }
  void set_busy(Index stream) {
    idle_[stream] = false, ++busy_;
    withdraw(stream);
  }
  // Idle streams with ready tasks of their own, in any order.
  void offer(Index stream) {
    if (where_[stream] >= 0) return;
    where_[stream] = static_cast<Index>(offering_.size());
    offering_.push_back(stream);
  }
  void withdraw(Index stream) {
    const Index at = where_[stream];
    if (at < 0) return;
    where_[offering_.back()] = at;
    offering_[at] = offering_.back();
    offering_.pop_back();
    where_[stream] = -1;
  }

  Index free_stream(Index wished) {
    if (wished >= 0 && idle_[wished]) return wished;
    while (!idle_[lowest_.front()]) {
      std::pop_heap(lowest_.begin(), lowest_.end(), std::greater<>());
      lowest_.pop_back();
      ++problem_.operations;
    }
    return lowest_.front();
  }

  // The most urgent ready task that an idle stream may take, out of its heap; -1 if there is none.
  Index next(const Round& out, const std::vector<double>& urgency) {
    auto started = [&](Index task) { return out.stream[task] >= 0; };  // as the way out
    while (!unassigned_.empty()) {
      const Index task = -unassigned_.front().second;
      if (started(task))
        pop(unassigned_);
      else if (stream_of_unit_[problem_.unit[task]] >= 0)
        pop(unassigned_), add(task, urgency);  // its unit got a stream in the meantime
      else
        break;
    }
    std::vector<Urgent>* best = unassigned_.empty() ? nullptr : &unassigned_;
    for (std::size_t at = 0; at < offering_.size(); ++problem_.operations) {
      auto& heap = own_[offering_[at]];
      while (!heap.empty() && started(-heap.front().second)) pop(heap);
      if (heap.empty()) {
        withdraw(offering_[at]);
        continue;
      }
      if (!best || heap.front() > best->front()) best = &heap;
      ++at;
    }
    return best ? pop(*best) : -1;
  }

  Index pick(const Round& out, std::int64_t room, WayOut* way_out, const std::vector<double>& urgency) {
    Index taken = -1;
    passed_.clear();
    for (Index task; (task = next(out, urgency)) >= 0;) {
      if (!way_out || (problem_.tasks[task].bytes_made <= room && way_out->allows(task))) {
        taken = task;
        break;
      }
      passed_.push_back(task);
      if (passed_.size() >= kTries) break;  // enough: many ready tasks, none of which fits
    }
    for (const Index task : passed_) add(task, urgency);
    if (taken < 0 && !passed_.empty()) {
      const auto head = static_cast<Index>(way_out->head());
      const Index stream = stream_of_unit_[problem_.unit[head]];
      if (open_[head] == 0 && (stream < 0 || idle_[stream]) && problem_.tasks[head].bytes_made <= room) taken = head;
    }
    return taken;
  }

  Problem& problem_;
  Indices open_, follows_, stream_of_unit_, begin_, downstream_, passed_;
  std::vector<double> urgency_, free_at_;
  std::vector<std::vector<Urgent>> own_;  // ready tasks of each stream
  std::vector<Urgent> unassigned_;        // ready tasks of units without a stream
  std::vector<Ending> running_;
  std::vector<char> idle_;
  Indices offering_, where_;  // idle streams with ready tasks, and where each stands among them
  Indices lowest_;            // heap of streams; those that are not idle any more are passed over
  Index busy_ = 0;
};

// Pseudo-random numbers that are the same everywhere (splitmix64).
class Dice {
 public:
  Index below(Index limit) {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return static_cast<Index>((z ^ (z >> 31)) % static_cast<std::uint64_t>(limit));
  }

 private:
  std::uint64_t state_ = 0;
};

class Search {
 public:
  explicit Search(Problem& problem) : problem_(problem), player_(problem), index_rule_(index_rule(problem)) {}

  // The shortest rounds found, some for each depth, from the least depth on. Those that take tasks by their place in
  // the sequential order keep few blocks alive at a time; those that take the critical path first may be shorter.
  std::vector<Round> run() {
    enough_ = problem_.bound * (problem_.large() ? 1.001 : 1 + 1e-9);
    std::vector<Index> depths;
    for (Index d = 1; d <= problem_.depth; d += problem_.large() ? d : std::max<Index>(1, d / 2)) depths.push_back(d);
    if (depths.back() < problem_.depth) depths.push_back(problem_.depth);
    std::vector<Round> found;
    for (const Index depth : depths) {
      for (const bool by_index : {true, false}) {
        by_index_ = by_index;
        best_ = Round();
        starts(cut(problem_, depth, true));
        if (depth > 1) starts(cut(problem_, depth, false));
        if (depth > 1) rotate(depth);
        if (!problem_.large()) local(depth, kLocalEffort / 2 / static_cast<std::int64_t>(depths.size()));
        found.push_back(best_);
        found.back().by_index = by_index;
        if (best_.period <= enough_) break;
      }
      if (by_index_ && best_.period <= enough_) break;
    }
    return found;
  }

 private:
  const std::vector<double>& urgency(const Indices& stage) {
    return by_index_ ? index_rule_ : player_.critical_path(stage);
  }

  void attempt(const Indices& stage, const Indices& streams) {
    if (best_.period <= enough_) return;
    player_.play(stage, streams, urgency(stage), trial_);
    if (better(trial_, best_)) std::swap(best_, trial_);
  }

  void starts(const Indices& stage) {
    attempt(stage, streams_in_pieces(problem_));
    if (problem_.streams == 1) return;
    attempt(stage, streams_longest_first(problem_));
    attempt(stage, problem_.pin);
  }

  // Retimes the tasks of the first part of the best round to the end of the round before: all that a dependency binds
  // to stand before them is among them.
  void rotate(Index depth) {
    constexpr double kParts[] = {0.5, 0.25, 0.75, 0.125, 0.375, 0.0625};
    for (const double part : kParts) {
      if (problem_.large() && part != 0.5 && part != 0.25) return;
      if (best_.period <= enough_) return;
      Indices stage = best_.stage;
      for (Index task = 0; task < problem_.size; ++task) stage[task] -= best_.start[task] < part * best_.period;
      close_gaps(stage);
      if (depth_of(stage) <= depth) attempt(stage, streams_of(problem_, best_));
    }
  }

  // Small random changes of stages, streams and urgencies; those that make the round no longer are kept.
  void local(Index depth, std::int64_t effort) {
    const std::int64_t end = problem_.operations + effort;
    const double scale = best_.period > 0 ? best_.period : 1;
    Indices stage, streams, here_stage, here_streams, movable;
    for (Index u = 0; u < static_cast<Index>(problem_.pin.size()); ++u)
      if (problem_.pin[u] < 0) movable.push_back(u);
    std::vector<double> bias, here_bias(problem_.size, 0), urgent;
    double here = 0;
    Index quiet = 0;
    const Index patience = 50 + 4 * problem_.size;
    auto restart = [&] {
      here_stage = best_.stage, here_streams = streams_of(problem_, best_), here = best_.period, quiet = 0;
      std::fill(here_bias.begin(), here_bias.end(), 0);
    };
    restart();
    while (problem_.operations < end && best_.period > enough_) {
      stage = here_stage, streams = here_streams, bias = here_bias;
      for (Index moves = 1 + dice_.below(3); moves > 0; --moves) {
        const Index task = dice_.below(problem_.size);
        switch (by_index_ + dice_.below((depth > 1 ? 4 : 3) - by_index_)) {
          case 0:
            bias[task] = scale * (dice_.below(65) - 32) / 32;
            break;
          case 1:
            if (!movable.empty()) {
              const Index unit = movable[dice_.below(static_cast<Index>(movable.size()))];
              streams[unit] = dice_.below(problem_.streams);
            }
            break;
          case 2:
            if (!movable.empty()) {
              const Index a = movable[dice_.below(static_cast<Index>(movable.size()))];
              const Index b = movable[dice_.below(static_cast<Index>(movable.size()))];
              std::swap(streams[a], streams[b]);
            }
            break;
          default:
            if (dice_.below(2)) {
              ++stage[task];
              raise_to_legal(problem_, stage, {task});
            } else {
              --stage[task];
              lower_to_legal(problem_, stage, {task});
            }
            close_gaps(stage);
        }
      }
      if (depth_of(stage) > depth) {
        ++problem_.operations;
        continue;
      }
      urgent = urgency(stage);
      for (Index task = 0; task < problem_.size; ++task) urgent[task] += bias[task];
      player_.play(stage, streams, urgent, trial_);
      if (!by_index_ && problem_.size <= 64) {
        player_.line_up(stage, streams, urgent, second_);
        if (shorter(second_.period, trial_.period)) std::swap(trial_, second_);
      }
      const double period = trial_.period;
      if (better(trial_, best_)) std::swap(best_, trial_), quiet = 0;
      if (period <= here) {
        here = period;
        here_stage.swap(stage), here_streams.swap(streams), here_bias.swap(bias);
      }
      if (++quiet > patience) restart();
    }
  }

  Problem& problem_;
  Player player_;
  const std::vector<double> index_rule_;
  Dice dice_;
  Round best_, trial_, second_;
  double enough_ = 0;
  bool by_index_ = true;
};

// Most bytes alive at any dispatch of a full round, the steps that are in flight counted. Rounds that leave tasks out
// have no more: what a step has alive does not depend on the other steps, and is never negative. With `plan` that is
// checked.
std::int64_t peak_of(Problem& problem, const Round& round, const Plan* plan = nullptr) {
  const Index depth = depth_of(round.stage);
  std::vector<std::int64_t> alive(depth + 1, 0);  // of the step whose tasks of this stage run now
  for (Index i = 0; i < problem.size; ++i)
    alive[round.stage[i] + 1] += problem.tasks[i].bytes_made - problem.tasks[i].bytes_freed;
  std::partial_sum(alive.begin(), alive.end(), alive.begin());
  std::int64_t total = std::accumulate(alive.begin(), alive.end() - 1, std::int64_t{0}), peak = 0;
  using Ending = std::pair<double, Index>;  // end, position in the order
  std::priority_queue<Ending, std::vector<Ending>, std::greater<Ending>> running;
  auto end = [&](Index task) {
    const std::int64_t freed = problem.tasks[task].bytes_freed;
    if (plan && freed > alive[round.stage[task]])
      refuse("bytes_freed of ", plan->label(task), " is ", freed, ", but only ", alive[round.stage[task]],
             " bytes of its step are alive when it ends; free only what it or its predecessors made");
    alive[round.stage[task]] -= freed, total -= freed;
  };
  for (Index at = 0; at < problem.size; ++at, ++problem.operations) {
    const Index task = round.order[at];
    for (; !running.empty() && running.top().first <= round.start[task]; running.pop())
      end(round.order[running.top().second]);
    alive[round.stage[task]] += problem.tasks[task].bytes_made, total += problem.tasks[task].bytes_made;
    peak = std::max(peak, total);
    running.emplace(round.start[task] + problem.tasks[task].cost, at);
  }
  for (; !running.empty(); running.pop()) end(round.order[running.top().second]);
  return peak;
}

// Bytes that a round of these stages finds alive when it begins.
std::int64_t carried(const Problem& problem, const Indices& stage) {
  const Index depth = depth_of(stage);
  std::int64_t bytes = 0;
  for (Index i = 0; i < problem.size; ++i)
    bytes += (depth - 1 - stage[i]) * (problem.tasks[i].bytes_made - problem.tasks[i].bytes_freed);
  return bytes;
}

// The rounds that keep the budget. One that does not is played again under it, if its tasks one after another, in some
// order, keep it.
std::vector<Round> fit(Problem& problem, const Plan& plan, std::vector<Round>& found, std::int64_t budget) {
  const auto& tasks = problem.tasks;
  const std::vector<double> by_index = index_rule(problem);
  Player player(problem);
  std::vector<Round> fitting;
  Index tried = 0;
  for (Round& round : found) {
    const Index depth = depth_of(round.stage);
    const bool one_step = depth == 1;
    std::vector<Indices> stages{round.stage}, streams{streams_of(problem, round)};
    if (depth > tried) {
      if (!one_step && !problem.large()) stages.push_back(cut(problem, depth, true));
      streams.push_back(problem.pin);
      tried = depth;
    }
    if (peak_of(problem, round) <= budget) {
      fitting.push_back(std::move(round));
      continue;
    }
    for (const Indices& stage : stages) {
      std::vector<Edge> binding;
      for (Index u = 0; u < problem.size; ++u)
        for (Index e = problem.first[u]; e < problem.first[u + 1]; ++e)
          if (stage[u] == stage[problem.to[e]] + problem.distance[e]) binding.emplace_back(u, problem.to[e]);
      Plan round_plan(tasks, binding, plan.names);
      const std::int64_t base = carried(problem, stage);
      std::vector<std::int64_t> frugal;
      std::int64_t least = kNever, peak_task = -1;
      for (auto& order : frugal_orders(round_plan, binding)) {
        std::int64_t alive = base, peak = 0, where = -1;
        for (const std::int64_t task : order) {
          alive += tasks[task].bytes_made;
          if (alive > peak) peak = alive, where = task;
          alive -= tasks[task].bytes_freed;
        }
        if (peak < least) least = peak, peak_task = where, frugal = std::move(order);
      }
      if (least > budget && one_step)
        refuse("memory_budget of ", budget, " bytes cannot be met: the least that any order tried needs is ", least,
               ", at ", plan.label(peak_task), "; give ", least - budget, " bytes more, or use smaller tasks");
      if (least <= budget)
        for (const Indices& where : streams)
          for (const auto* urgency : {&by_index, &player.critical_path(stage)}) {
            if (problem.large() && (urgency == &by_index) != round.by_index) continue;
            WayOut way_out(round_plan, frugal, budget - base);
            fitting.emplace_back();
            player.play(stage, where, *urgency, fitting.back(), budget - base, &way_out);
          }
      problem.operations += round_plan.operations;
    }
  }
  return fitting;
}

// Of the rounds that are as good as the shortest, that with the lowest peak, then with the fewest steps in flight.
Round choose(Problem& problem, std::vector<Round>& rounds) {
  double shortest = std::numeric_limits<double>::infinity();
  for (const Round& round : rounds) shortest = std::min(shortest, round.period);
  Round* best = nullptr;
  std::tuple<std::int64_t, Index, double> least;
  for (Round& round : rounds) {
    if (round.period > shortest * kAsGood) continue;
    const std::tuple<std::int64_t, Index, double> key(peak_of(problem, round), depth_of(round.stage), round.period);
    if (!best || key < least) best = &round, least = key;
  }
  return std::move(*best);
}

// For every task: what it waits for on other streams. `keep_order`: not only its dependencies, but all that has ended
// when it starts. A wait may be dropped if it is implied in every round in which both tasks run. Fewest tasks run
// beside them in a round that has just the stages between theirs; so each pair of stages is looked at on its own, with
// the last task of every stream known to have ended.
std::vector<std::vector<std::int64_t>> waits_of(Problem& problem, const Round& round, bool keep_order) {
  const Index streams = problem.streams, depth = depth_of(round.stage);
  std::vector<std::vector<std::int64_t>> waits(problem.size);
  Indices at(problem.size);
  std::vector<Indices> by_stage(depth);
  for (Index p = 0; p < problem.size; ++p) {
    at[round.order[p]] = p;
    by_stage[round.stage[round.order[p]]].push_back(p);
  }
  auto binds = [&](Index u, Index v, Index distance) {
    return round.stage[u] == round.stage[v] + distance && round.stream[u] != round.stream[v];
  };
  std::set<std::pair<Index, Index>> pairs;
  if (keep_order) {
    for (Index least = 0; least < depth; ++least)
      for (Index most = least; most < depth; ++most) pairs.emplace(least, most);
  } else {
    for (Index u = 0; u < problem.size; ++u)
      for (Index e = problem.first[u]; e < problem.first[u + 1]; ++e)
        if (binds(u, problem.to[e], problem.distance[e])) pairs.emplace(round.stage[problem.to[e]], round.stage[u]);
  }
  Indices ended, row(problem.size, -1), run, before;
  std::vector<Indices> lines(streams);   // positions of the tasks of each stream so far
  std::vector<std::size_t> over(streams);  // how many of them have ended
  for (const auto& [least, most] : pairs) {
    run.clear();
    for (Index s = least; s <= most; ++s) run.insert(run.end(), by_stage[s].begin(), by_stage[s].end());
    std::sort(run.begin(), run.end());
    ended.assign(run.size() * streams, -1);
    for (auto& line : lines) line.clear();
    std::fill(over.begin(), over.end(), 0);
    for (Index r = 0; r < static_cast<Index>(run.size()); ++r) {
      const Index v = round.order[run[r]], own = round.stream[v];
      const auto mine = ended.begin() + static_cast<std::ptrdiff_t>(r) * streams;
      if (!lines[own].empty()) {
        const Index last = row[round.order[lines[own].back()]];
        std::copy_n(ended.begin() + static_cast<std::ptrdiff_t>(last) * streams, streams, mine);
      }
      before.clear();
      if (keep_order) {
        for (Index s = 0; s < streams; ++s, ++problem.operations) {
          auto has_ended = [&](Index p) {
            return round.start[round.order[p]] + problem.tasks[round.order[p]].cost <= round.start[v];
          };
          while (over[s] < lines[s].size() && has_ended(lines[s][over[s]])) ++over[s];
          if (s != own && over[s] > 0) before.push_back(lines[s][over[s] - 1]);
        }
      } else {
        for (Index e = problem.came_first[v]; e < problem.came_first[v + 1]; ++e, ++problem.operations) {
          const Index u = problem.came_from[e];
          if (binds(u, v, problem.came_distance[e]) && round.stage[u] <= most) before.push_back(at[u]);
        }
      }
      std::sort(before.rbegin(), before.rend());
      for (const Index p : before) {
        const Index u = round.order[p];
        if (mine[round.stream[u]] >= p) continue;
        if (std::min(round.stage[u], round.stage[v]) == least && std::max(round.stage[u], round.stage[v]) == most)
          waits[v].push_back(u);
        const auto theirs = ended.begin() + static_cast<std::ptrdiff_t>(row[u]) * streams;
        for (Index s = 0; s < streams; ++s, ++problem.operations) mine[s] = std::max(mine[s], theirs[s]);
      }
      mine[own] = run[r];
      row[v] = r;
      lines[own].push_back(run[r]);
    }
  }
  for (auto& list : waits) std::sort(list.begin(), list.end());
  return waits;
}

// Colours the lives of the groups of each stream, which are arcs on the circle of its round.
std::vector<std::int64_t> pools_of(Problem& problem, const Round& round, const std::vector<std::int64_t>& group,
                                   std::int64_t groups) {
  struct Life {
    Index group, from, last;  // positions in the round of its stream
    std::int64_t steps;       // borders of rounds between them
  };
  const Index streams = problem.streams;
  std::vector<std::int64_t> pools(groups, 0);
  std::vector<Index> length(streams, 0), place(problem.size), first(groups, -1), last(groups, -1);
  auto sooner = [&](Index a, Index b) {
    return std::make_pair(round.stage[a], place[a]) < std::make_pair(round.stage[b], place[b]);
  };
  for (const Index task : round.order) {
    place[task] = length[round.stream[task]]++;
    if (group[task] < 0) continue;
    Index &f = first[group[task]], &l = last[group[task]];
    if (f < 0 || sooner(task, f)) f = task;
    if (l < 0 || sooner(l, task)) l = task;
  }
  std::vector<std::vector<Life>> lives(streams);
  for (Index g = 0; g < groups; ++g)
    if (first[g] >= 0)
      lives[round.stream[first[g]]].push_back(
          {g, place[first[g]], place[last[g]], round.stage[last[g]] - round.stage[first[g]]});
  std::int64_t used = 0;
  for (Index s = 0; s < streams; ++s) {
    // Positions before which the fewest lives are open: there the circle is cut.
    std::vector<Life> arcs;
    std::vector<std::int64_t> open(length[s] + 1, 0);
    for (const Life& life : lives[s]) {
      if (life.steps > 1 || (life.steps == 1 && life.last >= life.from)) {
        pools[life.group] = used++;  // it lives all the time
        continue;
      }
      arcs.push_back(life);
      // It is open before positions from + 1 ... last, round the circle.
      if (life.steps == 0) {
        ++open[life.from + 1], --open[life.last + 1];
      } else {
        ++open[life.from + 1], --open[length[s]];
        ++open[0], --open[life.last + 1];
      }
      problem.operations += 4;
    }
    if (arcs.empty()) continue;
    std::partial_sum(open.begin(), open.end(), open.begin());
    const auto cut = static_cast<Index>(std::min_element(open.begin(), open.end() - 1) - open.begin());
    auto turned = [&](Index position) { return position >= cut ? position - cut : position - cut + length[s]; };
    for (Life& life : arcs) life.from = turned(life.from), life.last = turned(life.last);
    std::sort(arcs.begin(), arcs.end(), [](const Life& a, const Life& b) { return a.from < b.from; });
    // A life across the cut has a pool of its own, which others may use between its end and its beginning.
    std::set<std::pair<Index, std::int64_t>> until;  // where a pool free now is taken again
    std::vector<std::pair<Index, std::pair<Index, std::int64_t>>> taken;  // end, then what `until` gets
    for (const Life& life : arcs)
      if (life.from > life.last) {
        pools[life.group] = used;
        taken.emplace_back(life.last, std::make_pair(life.from, used++));
      }
    std::make_heap(taken.begin(), taken.end(), std::greater<>());
    for (const Life& life : arcs) {
      if (life.from > life.last) continue;
      for (; !taken.empty() && taken.front().first < life.from; taken.pop_back()) {
        until.insert(taken.front().second);
        std::pop_heap(taken.begin(), taken.end(), std::greater<>());
      }
      auto pool = until.upper_bound({life.last, kNever});
      std::pair<Index, std::int64_t> which{length[s], used};
      if (pool != until.end())
        which = *pool, until.erase(pool);
      else
        ++used;
      pools[life.group] = which.second;
      taken.emplace_back(life.last, which);
      std::push_heap(taken.begin(), taken.end(), std::greater<>());
      ++problem.operations;
    }
  }
  return pools;
}

}  // namespace

Pipeline pipeline(const std::vector<Task>& tasks, const std::vector<Dependency>& edges,
                  const std::vector<std::int64_t>& group, const std::vector<std::int64_t>& pinned,
                  std::int64_t streams, std::int64_t in_flight, std::optional<std::int64_t> memory_budget,
                  const std::vector<std::string>& names) {
  if (streams < 1) refuse("streams is ", streams, "; give at least 1");
  if (in_flight < 1) refuse("in_flight is ", in_flight, "; give at least 1");
  if (memory_budget && *memory_budget < 0) refuse("memory_budget is ", *memory_budget, "; it must not be negative");
  const auto size = static_cast<std::int64_t>(tasks.size());
  if (size >= std::numeric_limits<Index>::max() / 2 || edges.size() >= std::numeric_limits<Index>::max() / 2)
    refuse("there are ", size, " tasks and ", edges.size(), " edges; give fewer than ",
           std::numeric_limits<Index>::max() / 2, " of each");
  for (std::size_t e = 0; e < edges.size(); ++e) {
    const auto& [first, second, distance] = edges[e];
    if (first < 0 || first >= size || second < 0 || second >= size)
      refuse("edges[", e, "] = (", first, ", ", second, ", ", distance, ") is out of range; there are ", size,
             " tasks, counted from 0");
    if (distance < 0)
      refuse("edges[", e, "] = (", first, ", ", second, ", ", distance,
             ") has a negative distance; a task can need only its own step or an earlier one");
  }
  const auto within = [size](std::int64_t value) {
    return static_cast<Index>(std::min(value, std::max<std::int64_t>(size, 1)));
  };
  Problem problem(tasks, within(streams), within(in_flight), edges);
  Plan plan(tasks, problem.same_step(), names);
  plan.refuse_cycles();
  std::int64_t groups = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    if (group[i] < -1 || group[i] >= size)
      refuse("group of ", plan.label(i), " is ", group[i], "; give -1 (none) or a number below that of the tasks, ",
             size);
    if (pinned[i] < -1 || pinned[i] >= streams)
      refuse("pinned of ", plan.label(i), " is ", pinned[i], "; give -1 (any stream) or a stream below streams=",
             streams);
    groups = std::max(groups, group[i] + 1);
  }
  if (plan.made != plan.freed)
    refuse("bytes_made adds up to ", plan.made, " and bytes_freed to ", plan.freed,
           "; a step must free all that it makes, else memory grows with every step");
  if (plan.made > kMost / problem.depth)
    refuse("bytes_made adds up to more than ", kMost / problem.depth, " for in_flight=", problem.depth);

  for (const std::int64_t task : sequential_order(plan, [](std::int64_t task, std::int64_t) { return task; }))
    problem.topological.push_back(static_cast<Index>(task));
  problem.place.resize(size);
  for (Index at = 0; at < problem.size; ++at) problem.place[problem.topological[at]] = at;

  // Units, and their streams as far as they are given. Streams that no task is pinned to are alike, so those beyond the
  // number of tasks stay unused; the others keep their names by `label`.
  std::vector<std::int64_t> label;
  for (const std::int64_t stream : pinned)
    if (stream >= 0) label.push_back(stream);
  std::sort(label.begin(), label.end());
  label.erase(std::unique(label.begin(), label.end()), label.end());
  {
    std::vector<std::int64_t> all;
    std::size_t at = 0;
    std::int64_t spare = problem.streams - static_cast<std::int64_t>(label.size());
    for (std::int64_t s = 0; static_cast<std::int64_t>(all.size()) < problem.streams; ++s) {
      if (at < label.size() && (label[at] == s || spare == 0))
        all.push_back(label[at]), s = label[at++];
      else
        all.push_back(s), --spare;
    }
    label = std::move(all);
  }
  Indices unit_of_group(groups, -1);
  problem.unit.assign(size, -1);
  std::vector<double> loads(problem.streams, 0);
  for (const Index task : problem.topological) {
    Index& unit = group[task] < 0 ? problem.unit[task] : unit_of_group[group[task]];
    if (unit < 0) {
      unit = static_cast<Index>(problem.load.size());
      problem.load.push_back(0), problem.pin.push_back(-1);
      problem.units_in_order.push_back(unit);
    }
    problem.unit[task] = unit;
    problem.load[unit] += tasks[task].cost;
    if (pinned[task] < 0) continue;
    const auto stream = static_cast<Index>(std::lower_bound(label.begin(), label.end(), pinned[task]) - label.begin());
    if (problem.pin[unit] >= 0 && problem.pin[unit] != stream)
      refuse("pinned of ", plan.label(task), " is ", pinned[task], ", but another task of its group ", group[task],
             " is pinned to ", label[problem.pin[unit]], "; a group runs on one stream");
    problem.pin[unit] = stream;
  }
  for (std::size_t unit = 0; unit < problem.load.size(); ++unit) {
    problem.bound = std::max(problem.bound, problem.load[unit]);
    if (problem.pin[unit] >= 0) loads[problem.pin[unit]] += problem.load[unit];
  }
  for (const double load : loads) problem.bound = std::max(problem.bound, load);
  const double total = std::accumulate(problem.load.begin(), problem.load.end(), 0.0);
  problem.bound = std::max(problem.bound, total / problem.streams);

  std::vector<Round> fitting = Search(problem).run();
  if (memory_budget) fitting = fit(problem, plan, fitting, std::min(*memory_budget, kMost));
  const Round best = choose(problem, fitting);

  Pipeline result;
  result.peak_bytes = peak_of(problem, best, &plan);
  const std::int64_t most_alive = carried(problem, best.stage) + plan.made;  // if nothing ends before all has started
  result.waits = waits_of(problem, best, memory_budget && most_alive > *memory_budget);
  result.pools = pools_of(problem, best, group, groups);
  result.order.assign(best.order.begin(), best.order.end());
  result.stage.assign(best.stage.begin(), best.stage.end());
  for (const Index stream : best.stream) result.stream.push_back(label[stream]);
  result.start = best.start;
  result.period = best.period;
  result.in_flight = depth_of(best.stage);
  result.operations = problem.operations + plan.operations;
  return result;
}

}  // namespace fastlocal
