// A seeded source of small trajectories for the batcher's tests.
#pragma once

#include <string>
#include <vector>

#include "batcher.hpp"
#include "harness.hpp"

inline mgrpo::BatcherOptions small_options() {
  mgrpo::BatcherOptions o;
  o.k = 4;
  o.roles = {"sub"};
  o.d_max = {3};
  o.capacity = 128;
  o.dp = 2;
  o.threads = 3;
  o.arena_bytes = int64_t{1} << 20;
  return o;
}

// The arrays of one trajectory; view() borrows them.
struct Arrival {
  std::string query;
  int64_t rollout, invocation, id;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  std::vector<float> logprobs;
  std::vector<int64_t> segment_starts = {0};
  float advantage;

  // segments: up to four of them.
  Arrival(std::string query_, int64_t rollout_, int64_t invocation_, int64_t id_, harness::Random& random,
          bool segments = false)
      : query(std::move(query_)), rollout(rollout_), invocation(invocation_), id(id_) {
    const auto n = size_t(random(1, 40));
    tokens.assign(n, int32_t(id % 1000));
    mask.assign(n, 1);
    logprobs.assign(n, -0.5f);
    advantage = float(random(0, 2)) / 2;
    while (segments && segment_starts.size() < 4) {  // of the id: the stream of `random` is the same without them
      const int64_t start = segment_starts.back() + 1 + (id + int64_t(segment_starts.size())) % 20;
      if (start >= int64_t(n)) break;
      segment_starts.push_back(start);
    }
  }

  mgrpo::TrajectoryView view() const {
    mgrpo::TrajectoryView t;
    t.query = query;
    t.rollout = rollout;
    t.invocation = invocation;
    t.id = id;
    t.tokens = tokens.data();
    t.mask = mask.data();
    t.logprobs = logprobs.data();
    t.n_tokens = t.n_mask = t.n_logprobs = int64_t(tokens.size());
    t.advantage = advantage;
    t.segment_starts = segment_starts;
    return t;
  }
};
