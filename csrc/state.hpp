// The batcher's content as plain columns, for checkpoints. Half-filled groups survive; plans do not (they are pure).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "batcher.hpp"

namespace mgrpo {

struct State {
  std::vector<std::string> queries;
  std::vector<double> ages;        // [Q] seconds since the query was opened
  std::vector<int32_t> sealed;     // [Q, roles, k], -1 = not sealed
  std::vector<int32_t> places;     // [n, 4]: query index, role, rollout, invocation
  std::vector<int64_t> ids;        // [n]
  std::vector<int32_t> versions;   // [n]
  std::vector<int64_t> offsets;    // [n + 1] into the token columns; an empty range = a trajectory that left its group
  std::vector<int32_t> tokens;     // [T]
  std::vector<uint8_t> loss_mask;  // [T]
  std::vector<float> logprobs;     // [T]
  std::vector<float> advantages;   // [n], or [T] where every token has its own
  std::vector<int32_t> segments;   // [n] how many each trajectory has; no entry at all: one each
  std::vector<int64_t> segment_starts;  // [sum of segments] in the trajectory's tokens
  std::vector<int64_t> counters;        // in the order of Counters
};

State save_state(const Batcher& batcher, double now);

// Fills an empty batcher of the same options. Throws std::invalid_argument when columns do not fit together.
void load_state(Batcher& batcher, const State& state, double now);

}  // namespace mgrpo
