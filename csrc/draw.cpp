#include "draw.hpp"

#include <algorithm>
#include <numeric>

#include "check.hpp"

namespace mgrpo {

Mode parse_mode(std::string_view name) {
  if (name == "weights") return Mode::weights;
  if (name == "duplicate") return Mode::duplicate;
  if (name == "expected") return Mode::expected;
  MGRPO_CHECK(name == "none", "mode '", name, "' is not one of weights, duplicate, expected, none");
  return Mode::none;
}

SequenceWeight parse_sequence_weight(std::string_view name) {
  if (name == "per_rollout") return SequenceWeight::per_rollout;
  MGRPO_CHECK(name == "per_invocation", "sequence_weight '", name, "' is not one of per_rollout, per_invocation");
  return SequenceWeight::per_invocation;
}

uint64_t fnv1a64(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001b3ull;
  return hash;
}

PhiloxKey draw_key(uint64_t seed, std::string_view query, std::string_view role) {
  const uint64_t q = fnv1a64(query), r = fnv1a64(role);
  const PhiloxCounter names = {uint32_t(q), uint32_t(q >> 32), uint32_t(r), uint32_t(r >> 32)};
  const PhiloxCounter words = philox4x32_10(names, {uint32_t(seed), uint32_t(seed >> 32)});
  return {words[0], words[1]};
}

uint32_t DrawStream::next() {
  if (used_ == 4) {
    words_ = philox4x32_10({block_++, rollout_, uint32_t(step_), uint32_t(step_ >> 32)}, key_);
    used_ = 0;
  }
  return words_[used_++];
}

uint32_t DrawStream::bounded(uint32_t n) {
  uint64_t product = uint64_t{next()} * n;
  if (uint32_t(product) < n) {
    const uint32_t reject = uint32_t(-n) % n;
    while (uint32_t(product) < reject) product = uint64_t{next()} * n;
  }
  return uint32_t(product >> 32);
}

namespace {

// Adds one copy to `take` of the d invocations, chosen without replacement (partial Fisher-Yates).
void add_subset(DrawStream& stream, int d, int take, std::vector<int32_t>& copies) {
  std::vector<int32_t> order(d);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < take; ++i) {
    std::swap(order[i], order[i + int(stream.bounded(uint32_t(d - i)))]);
    ++copies[order[i]];
  }
}

}  // namespace

void multiplicities(DrawStream stream, int d, int d_max, Mode mode, std::vector<int32_t>& copies) {
  copies.assign(d, 0);
  if (d == 0) return;
  if (mode == Mode::none || d == d_max || (d < d_max && mode == Mode::expected)) {
    std::fill(copies.begin(), copies.end(), 1);
  } else if (d > d_max) {
    add_subset(stream, d, d_max, copies);
  } else {
    std::fill(copies.begin(), copies.end(), d_max / d);
    add_subset(stream, d, d_max % d, copies);
  }
}

double invocation_weight(int m, int d, int d_max, Mode mode, SequenceWeight sequence_weight) {
  switch (mode) {
    case Mode::weights:
    case Mode::duplicate:
      return double(m) / d_max;
    case Mode::expected:
      return 1.0 / std::min(d, d_max);
    case Mode::none:
      break;
  }
  return sequence_weight == SequenceWeight::per_rollout ? 1.0 / d : 1.0;
}

}  // namespace mgrpo
