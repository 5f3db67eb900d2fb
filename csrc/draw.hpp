// Alignment of one rollout to D_max: which invocations are kept, and how often. Pure functions of
// (seed, step, query, rollout, role): no state, no clock, no thread.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "philox.hpp"

namespace mgrpo {

enum class Mode { weights, duplicate, expected, none };
enum class SequenceWeight { per_rollout, per_invocation };

Mode parse_mode(std::string_view name);
SequenceWeight parse_sequence_weight(std::string_view name);

// 64-bit FNV-1a over the bytes: the draw depends on what a name says, not on who interned it first.
uint64_t fnv1a64(std::string_view bytes);

// The key of all draws of one (seed, query, role). Counters below it are (block, rollout, step).
PhiloxKey draw_key(uint64_t seed, std::string_view query, std::string_view role);

// A stream of 32-bit words: blocks of Philox under one key, counter (block, rollout, step low, step high).
class DrawStream {
 public:
  DrawStream(PhiloxKey key, uint64_t step, uint32_t rollout) : key_(key), step_(step), rollout_(rollout) {}

  uint32_t next();

  // Uniform in [0, n), n >= 1, without modulo bias (Lemire, ACM TOMACS 29(1), 2019).
  uint32_t bounded(uint32_t n);

 private:
  PhiloxKey key_;
  uint64_t step_;
  uint32_t rollout_;
  uint32_t block_ = 0;
  int used_ = 4;
  PhiloxCounter words_{};
};

// Copies of each of the d invocations (in canonical order) of one rollout; 0 = dropped by the draw. In `weights` and
// `duplicate` they sum to d_max; in `expected` and `none` every kept invocation counts once. Overwrites `copies`.
void multiplicities(DrawStream stream, int d, int d_max, Mode mode, std::vector<int32_t>& copies);

// w(k,i) of one kept invocation with m copies, in a rollout of d invocations, before any token normalisation.
double invocation_weight(int m, int d, int d_max, Mode mode, SequenceWeight sequence_weight);

}  // namespace mgrpo
