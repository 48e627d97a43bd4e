// Random steps, good and bad, for fastlocal::pipeline; meant to be built with sanitizers. Arguments: how many
// steps, seed.
// Checks what can be checked in a line or two; the tests in Python check the rest.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>

#include "../../csrc/scheduler.h"

using fastlocal::Dependency;
using fastlocal::Pipeline;
using fastlocal::Task;

namespace {

struct Arguments {
  std::vector<Task> tasks;
  std::vector<Dependency> edges;
  std::vector<std::int64_t> group, pinned;
  std::int64_t streams, in_flight;
  std::optional<std::int64_t> budget;
  std::vector<std::string> names;
};

using Random = std::mt19937_64;

std::int64_t below(Random& random, std::int64_t limit) { return static_cast<std::int64_t>(random() % limit); }

Arguments good(Random& random) {
  Arguments a;
  const std::int64_t size = below(random, below(random, 20) ? 30 : 1200);
  a.streams = 1 + below(random, 4), a.in_flight = 1 + below(random, 5);
  a.tasks.resize(size);
  a.group.assign(size, -1), a.pinned.assign(size, -1);
  for (std::int64_t i = 0; i < size; ++i) {
    a.tasks[i].cost = below(random, 4) ? static_cast<double>(below(random, 100)) / 10 : 0;
    const std::int64_t bytes = below(random, 50);
    a.tasks[i].bytes_made = bytes;
    std::int64_t by = i;
    if (i + 1 < size && below(random, 2)) {
      by = i + 1 + below(random, std::min<std::int64_t>(size - i - 1, 5));
      a.edges.push_back({i, by, 0});
    }
    a.tasks[by].bytes_freed += bytes;
    if (i > 0 && below(random, 2)) a.edges.push_back({below(random, i), i, 0});
    if (!below(random, 3)) a.edges.push_back({below(random, size), below(random, size), 1 + below(random, 3)});
    if (below(random, 2)) a.group[i] = below(random, std::min<std::int64_t>(size, 8));
    if (a.group[i] < 0 && !below(random, 4)) a.pinned[i] = below(random, a.streams);
    if (a.group[i] >= 0 && !below(random, 4)) a.pinned[i] = a.group[i] % a.streams;
  }
  if (below(random, 2)) a.budget = below(random, 300);
  if (below(random, 2)) a.names.assign(size, "a task");
  return a;
}

std::int64_t odd(Random& random) {
  const std::int64_t least = std::numeric_limits<std::int64_t>::min(), most = std::numeric_limits<std::int64_t>::max();
  const std::int64_t values[] = {least, least + 1, -2, -1, 0, 1, 7, 1 << 20, most / 4, most / 4 + 1, most - 1, most};
  return values[below(random, 12)];
}

void spoil(Random& random, Arguments& a) {
  const auto size = static_cast<std::int64_t>(a.tasks.size());
  if (size == 0) return;
  const std::int64_t i = below(random, size);
  const double costs[] = {-1, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), 1e308,
                          std::numeric_limits<double>::denorm_min(), -0.0};
  switch (below(random, 11)) {
    case 0: a.tasks[i].cost = costs[below(random, 6)]; break;
    case 1: a.tasks[i].bytes_made = odd(random); break;
    case 2: a.tasks[i].bytes_freed = odd(random); break;
    case 3: a.edges.push_back({odd(random), i, 0}); break;
    case 4: a.edges.push_back({i, odd(random), odd(random)}); break;
    case 5: a.edges.push_back({i, below(random, i + 1), 0}); break;  // closes a cycle, or may
    case 6: a.group[i] = odd(random); break;
    case 7: a.pinned[i] = odd(random); break;
    case 8: a.streams = odd(random); break;
    case 9: a.in_flight = odd(random); break;
    default: a.budget = odd(random); a.names.push_back("one too many");
  }
}

void check(bool good, const char* what) {
  if (good) return;
  std::printf("broken: %s\n", what);
  std::exit(1);
}

void look(const Arguments& a, const Pipeline& p) {
  const std::size_t size = a.tasks.size();
  check(p.order.size() == size && p.waits.size() == size, "sizes");
  check(!a.budget || p.peak_bytes <= *a.budget, "budget");
  check(p.in_flight <= a.in_flight, "steps in flight");
  std::vector<std::size_t> place(size);
  for (std::size_t at = 0; at < size; ++at) place[p.order[at]] = at;
  for (const auto& [u, v, distance] : a.edges) {
    check(p.stage[u] <= p.stage[v] + distance, "stage");
    if (p.stage[u] == p.stage[v] + distance && u != v)
      check(place[u] < place[v] && p.start[u] + a.tasks[u].cost <= p.start[v], "order");
  }
  for (std::size_t i = 0; i < size; ++i) {
    check(p.stream[i] >= 0 && p.stream[i] < a.streams, "stream");
    check(a.pinned[i] < 0 || p.stream[i] == a.pinned[i], "pinned");
  }
}

}  // namespace

int main(int count, char** values) {
  if (count != 3) return 2;
  Random random(std::strtoull(values[2], nullptr, 10));
  long plans = 0, refused = 0;
  for (long steps = std::atol(values[1]); steps > 0; --steps) {
    Arguments a = good(random);
    for (std::int64_t times = below(random, 2) * (1 + below(random, 2)); times > 0; --times) spoil(random, a);
    try {
      look(a, fastlocal::pipeline(a.tasks, a.edges, a.group, a.pinned, a.streams, a.in_flight, a.budget, a.names));
      ++plans;
    } catch (const std::invalid_argument& error) {
      ++refused;
    }
  }
  std::printf("plans %ld refused %ld\n", plans, refused);
  return 0;
}
