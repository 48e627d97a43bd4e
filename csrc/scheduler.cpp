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

namespace fastlocal {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMost = kNever / 4;  // so that no sum or difference of byte counts overflows

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// The plan, checked and with its edges packed by source.
struct Plan {
  const std::vector<Task>& tasks;
  const std::vector<std::string>& names;
  std::int64_t size;
  std::vector<std::int64_t> first, next, waits;  // successors of i: next[first[i] .. first[i + 1]); edges into i
  std::int64_t operations = 0;

  Plan(const std::vector<Task>& given, const std::vector<Edge>& edges, const std::vector<std::string>& labels)
      : tasks(given), names(labels), size(static_cast<std::int64_t>(given.size())) {
    if (!names.empty() && names.size() != tasks.size())
      refuse("names has ", names.size(), " entries for ", size, " tasks; give one per task, or none");
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      const Task& task = tasks[i];
      if (!std::isfinite(task.cost) || task.cost < 0)
        refuse("cost of ", label(i), " is ", task.cost, "; it must be finite and not negative");
      if (task.bytes_made < 0 || task.bytes_freed < 0)
        refuse(task.bytes_made < 0 ? "bytes_made" : "bytes_freed", " of ", label(i), " is ",
               task.bytes_made < 0 ? task.bytes_made : task.bytes_freed, "; it must not be negative");
      if (task.bytes_made > kMost - total) refuse("bytes_made adds up to more than ", kMost);
      total += task.bytes_made;
    }
    first.assign(size + 1, 0);
    waits.assign(size, 0);
    for (std::size_t e = 0; e < edges.size(); ++e) {
      const auto [before, after] = edges[e];
      if (before < 0 || before >= size || after < 0 || after >= size)
        refuse("edges[", e, "] = (", before, ", ", after, ") is out of range; there are ", size,
               " tasks, counted from 0");
      ++first[before + 1];
      ++waits[after];
    }
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

  // Longest path of costs from the start of each task to the end of the plan.
  std::vector<double> path_ahead() {
    std::vector<std::int64_t> open = waits, order;
    for (std::int64_t i = 0; i < size; ++i)
      if (open[i] == 0) order.push_back(i);
    for (std::size_t at = 0; at < order.size(); ++at)
      release(order[at], open, [&](std::int64_t task) { order.push_back(task); });
    if (static_cast<std::int64_t>(order.size()) < size) refuse_cycle(open);
    std::vector<double> ahead(size, 0);
    for (auto at = order.rbegin(); at != order.rend(); ++at) {
      for (std::int64_t e = first[*at]; e < first[*at + 1]; ++e, ++operations)
        ahead[*at] = std::max(ahead[*at], ahead[next[e]]);
      ahead[*at] += tasks[*at].cost;
    }
    return ahead;
  }
};

struct Memory {
  const Plan& plan;
  std::int64_t alive = 0, peak = 0, peak_task = -1;

  void start(std::int64_t task) {
    alive += plan.tasks[task].bytes_made;
    if (alive > peak) peak = alive, peak_task = task;
  }
  void end(std::int64_t task) {
    const std::int64_t freed = plan.tasks[task].bytes_freed;
    if (freed > alive)
      refuse("bytes_freed of ", plan.label(task), " is ", freed, ", but only ", alive,
             " bytes are alive when it ends; free only what it or its predecessors made");
    alive -= freed;
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
  // The first position >= begin whose value is at most `limit`; -1 if there is none.
  std::int64_t first_at_most(std::int64_t limit, std::int64_t begin) const {
    return first_at_most(1, leaves_, limit, begin);
  }

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
    const std::int64_t left = least_before(2 * node, width, end), right = least_before(2 * node + 1, width, end - width);
    return sum(std::min(left, right), added_[node]);
  }
  std::int64_t first_at_most(std::int64_t node, std::int64_t width, std::int64_t limit, std::int64_t begin) const {
    ++plan_.operations;
    if (begin >= width || least_[node] > limit || least_[node] == kNever) return -1;
    if (width == 1) return 0;
    limit -= added_[node], width /= 2;
    const std::int64_t left = first_at_most(2 * node, width, limit, begin);
    if (left >= 0) return left;
    const std::int64_t right = first_at_most(2 * node + 1, width, limit, begin - width);
    return right >= 0 ? right + width : -1;
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

constexpr int kTries = 16;

// Plays the plan through time; `by_rank` lists the tasks from the highest priority down. `way_out` is null without a
// budget.
Schedule play(Plan& plan, const std::vector<std::int64_t>& by_rank, std::int64_t streams, std::int64_t budget,
              WayOut* way_out) {
  using Running = std::pair<double, std::int64_t>;  // end, position in the order
  auto later = [&plan](const Running& a, const Running& b) { return ++plan.operations, a > b; };
  std::priority_queue<Running, std::vector<Running>, decltype(later)> running(later);
  Memory memory{plan};
  std::vector<std::int64_t> open = plan.waits, rank(plan.size), follows(plan.size, -1);
  for (std::int64_t r = 0; r < plan.size; ++r) rank[by_rank[r]] = r;
  LeastTree ready(plan);  // by rank: the bytes that a ready task needs
  std::set<std::int64_t> idle;
  for (std::int64_t s = 0; s < std::min(streams, plan.size); ++s) idle.insert(s);
  for (std::int64_t i = 0; i < plan.size; ++i)
    if (open[i] == 0) ready.set(rank[i], plan.tasks[i].bytes_made);

  Schedule out;
  out.stream.assign(plan.size, -1);
  out.start.assign(plan.size, 0);
  auto pick = [&]() -> std::int64_t {
    const std::int64_t room = budget - memory.alive;
    std::int64_t at = ready.first_at_most(room, 0);
    for (int tries = 0; at >= 0; at = ready.first_at_most(room, at + 1)) {
      if (!way_out || way_out->allows(by_rank[at])) return by_rank[at];
      if (++tries < kTries) continue;  // enough: many ready tasks, all of which would keep too much
      const std::int64_t head = way_out->head();
      return open[head] == 0 && plan.tasks[head].bytes_made <= room ? head : -1;
    }
    return -1;
  };

  double now = 0;
  while (true) {
    while (!running.empty() && running.top().first <= now) {
      const std::int64_t task = out.order[running.top().second];
      running.pop();
      memory.end(task);
      idle.insert(out.stream[task]);
      plan.release(task, open, [&](std::int64_t released) {
        follows[released] = out.stream[task];
        ready.set(rank[released], plan.tasks[released].bytes_made);
      });
    }
    const std::int64_t task = idle.empty() ? -1 : pick();
    if (task >= 0) {
      auto stream = idle.find(follows[task]);
      if (stream == idle.end()) stream = idle.begin();
      out.stream[task] = *stream;
      idle.erase(stream);
      ready.set(rank[task], kNever);
      if (way_out) way_out->start(task);
      memory.start(task);
      out.start[task] = now;
      running.emplace(now + plan.tasks[task].cost, static_cast<std::int64_t>(out.order.size()));
      out.order.push_back(task);
    } else if (!running.empty()) {
      now = running.top().first;
    } else {
      break;
    }
  }
  if (static_cast<std::int64_t>(out.order.size()) < plan.size) throw std::logic_error("the scheduler stopped early");
  out.makespan = now;
  out.peak_bytes = memory.peak;
  return out;
}

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

}  // namespace

Schedule schedule(const std::vector<Task>& tasks, const std::vector<Edge>& edges, std::int64_t streams,
                  std::optional<std::int64_t> memory_budget, const std::vector<std::string>& names) {
  if (streams < 1) refuse("streams is ", streams, "; give at least 1");
  if (memory_budget && *memory_budget < 0) refuse("memory_budget is ", *memory_budget, "; it must not be negative");
  Plan plan(tasks, edges, names);

  const std::vector<double> ahead = plan.path_ahead();
  std::vector<std::int64_t> by_rank(plan.size);
  std::iota(by_rank.begin(), by_rank.end(), 0);
  std::sort(by_rank.begin(), by_rank.end(), [&](std::int64_t a, std::int64_t b) {
    return ++plan.operations, ahead[a] != ahead[b] ? ahead[a] > ahead[b] : a < b;
  });

  Schedule result;
  if (!memory_budget) {
    result = play(plan, by_rank, streams, kMost, nullptr);
  } else {
    const std::int64_t budget = std::min(*memory_budget, kMost);
    std::vector<std::int64_t> frugal;
    std::int64_t least = kNever, peak_task = -1;
    for (auto& order : frugal_orders(plan, edges)) {
      Memory memory{plan};
      for (const std::int64_t task : order) memory.start(task), memory.end(task);
      if (memory.peak >= least) continue;
      least = memory.peak, peak_task = memory.peak_task, frugal = std::move(order);
    }
    if (least > budget)
      refuse("memory_budget of ", budget, " bytes cannot be met: the least that any order tried needs is ", least,
             ", at ", plan.label(peak_task), "; give ", least - budget, " bytes more, or use smaller tasks");
    WayOut way_out(plan, std::move(frugal), budget);
    result = play(plan, by_rank, streams, budget, &way_out);
  }
  result.operations = plan.operations;
  return result;
}

}  // namespace fastlocal
