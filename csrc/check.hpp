// The one way the core reports bad input: MGRPO_CHECK(condition, "what was wrong, with the value and the bound").
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mgrpo {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace mgrpo

// std::invalid_argument reaches Python as ValueError; `...` are streamed, so values need no formatting by the caller.
#define MGRPO_CHECK(condition, ...)                                              \
  do {                                                                           \
    if (!(condition)) throw std::invalid_argument(::mgrpo::concat(__VA_ARGS__)); \
  } while (0)
