#include "harness.hpp"
#include "soak.hpp"

// core_tests NAME runs one case; core_tests soak N runs the long simulation with N arrivals.
int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "soak") {
    soak(std::atoll(argv[2]));
    return 0;
  }
  const auto found = argc == 2 ? harness::cases().find(argv[1]) : harness::cases().end();
  if (found == harness::cases().end()) {
    std::fprintf(stderr, "usage: core_tests CASE | soak ARRIVALS; cases:\n");
    for (const auto& [name, body] : harness::cases()) std::fprintf(stderr, "  %s\n", name.c_str());
    return 2;
  }
  found->second();
  return 0;
}
