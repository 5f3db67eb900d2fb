// Just enough of a test harness: named cases, a REQUIRE that says where, a seeded generator.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <string>

namespace harness {

inline std::map<std::string, std::function<void()>>& cases() {
  static std::map<std::string, std::function<void()>> all;
  return all;
}

struct Register {
  Register(const char* name, std::function<void()> body) { cases()[name] = std::move(body); }
};

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
  std::exit(1);
}

// Uniform in [low, high].
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t operator()(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }

 private:
  std::mt19937_64 engine_;
};

}  // namespace harness

#define REQUIRE(condition) ((condition) ? void() : ::harness::fail(__FILE__, __LINE__, #condition))
#define CASE(name)                                              \
  static void case_##name();                                    \
  static harness::Register register_##name(#name, case_##name); \
  static void case_##name()
