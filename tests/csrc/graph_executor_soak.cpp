// Rounds made, launched and closed, with each call of the runtime failing once, under a sanitizer: prints how many
// scenarios there were, and ends with 1 where an object was left behind or a handle misused.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "graph_executor.h"

extern "C" {
std::uintptr_t fake_graph(int*);
void fake_free_graph(std::uintptr_t);
void fake_fail_at(int);
int fake_calls();
int fake_misuse();
int fake_alive();
int fake_last_error();
}

int main(int count, char** arguments) {
  if (count != 2) return 2;
  auto runtime = fastlocal::CudaRuntime::find(arguments[1], false);
  int number = 0;
  std::vector<fastlocal::Segment> segments;
  for (std::int64_t i = 0; i < 9; ++i) {
    segments.push_back({"task " + std::to_string(i), fake_graph(&number), i % 3, {}});
    for (std::int64_t j = 1; j < i; j += 3) segments.back().waits.push_back(j);
  }
  int scenarios = 0, refused = 0;
  for (auto* make : {&fastlocal::compose, &fastlocal::stream_loop}) {
    for (int at = 0, total = 1; at <= total; ++at, ++scenarios) {
      fake_fail_at(at);
      try {
        auto round = make(runtime, segments);
        round->upload(0);
        for (int i = 0; i < 2; ++i) round->launch(0);
        if (at % 2) round->close();  // else by the destructor
      } catch (const std::runtime_error&) {
        ++refused;
      }
      if (at == 0) total = fake_calls() + 20;  // and some that are never reached
      fake_fail_at(0);
      if (fake_alive() || fake_misuse() || fake_last_error()) {
        std::printf("call %d: %d alive, %d misused, last error %d\n", at, fake_alive(), fake_misuse(), fake_last_error());
        return 1;
      }
    }
  }
  for (const auto& segment : segments) fake_free_graph(segment.graph);
  std::printf("%d scenarios, %d refused\n", scenarios, refused);
  return refused > 0 ? 0 : 1;
}
