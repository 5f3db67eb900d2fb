// The batcher under threads, under rejected input, and through its state.
#include "batcher.hpp"

#include <atomic>
#include <thread>

#include "arrivals.hpp"
#include "assemble.hpp"
#include "harness.hpp"
#include "plan.hpp"
#include "state.hpp"

using namespace mgrpo;

namespace {

// Assembles every rank of a plan and counts the tokens that carry their trajectory's mark.
int64_t assemble_and_count(const Batcher& batcher, const Plan& plan) {
  int64_t found = 0;
  for (int rank = 0; rank < plan.dp; ++rank) {
    const auto n = size_t(plan.packing.n_mb), s = size_t(plan.max_segments), c = size_t(plan.capacity);
    std::vector<int32_t> ids(n * c), cu(n * (s + 2)), n_seg(n);
    std::vector<uint8_t> mask(n * c);
    std::vector<float> logprobs(n * c), weight(n * s);
    std::vector<int64_t> traj(n * s);
    PackedBuffers b;
    b.n_mb = int64_t(n);
    b.capacity = int64_t(c);
    b.segments = int64_t(s);
    b.ids = ids.data();
    b.loss_mask = mask.data();
    b.logprobs = logprobs.data();
    b.cu_seqlens = cu.data();
    b.n_seg = n_seg.data();
    b.seg_weight = weight.data();
    b.seg_traj = traj.data();
    write_packed(batcher, plan, rank, b);
    for (size_t mb = 0; mb < n; ++mb) {
      for (int32_t seg = 0; seg < n_seg[mb]; ++seg) {
        const int32_t* bounds = &cu[mb * (s + 2) + size_t(seg)];
        for (int32_t t = bounds[0]; t < bounds[1]; ++t) {
          REQUIRE(ids[mb * c + size_t(t)] == traj[mb * s + size_t(seg)] % 1000);
          REQUIRE(mask[mb * c + size_t(t)] == 1 && logprobs[mb * c + size_t(t)] == -0.5f);
          ++found;
        }
      }
    }
    for (int mb = 0; mb < plan.padded().n_mb; ++mb) {
      const size_t bin = size_t(rank) * size_t(plan.padded().n_mb) + size_t(mb);
      PaddedBuffers p;
      p.rows = plan.padded().offsets[bin + 1] - plan.padded().offsets[bin] + 1;
      p.width = plan.padded().width[bin] + 3;
      std::vector<int32_t> rows(size_t(p.rows * p.width));
      p.ids = rows.data();
      write_padded(batcher, plan, plan.padded(), rank, mb, p);
    }
  }
  return found;
}

template <typename Body>
std::string kind_of_rejection(Body body) {
  try {
    body();
  } catch (const BatcherError& e) {
    return e.kind;
  }
  return "";
}

}  // namespace

CASE(producers_and_planner_run_together) {
  // Four threads add and seal their own queries while one plans, assembles, saves state and drops; no sleep, no order.
  Batcher batcher(small_options());
  constexpr int kProducers = 4, kQueries = 40;
  std::atomic<int> running{kProducers};
  std::vector<std::jthread> producers;
  for (int producer = 0; producer < kProducers; ++producer) {
    producers.emplace_back([&, producer] {
      harness::Random random(uint64_t(producer) + 1);
      for (int q = 0; q < kQueries; ++q) {
        const std::string name = std::to_string(producer) + "/" + std::to_string(q);
        for (int64_t k = 0; k < 4; ++k) {
          const int64_t d = random(0, 4);
          for (int64_t i = 0; i < d; ++i) {
            const Arrival a(name, k, i, ((producer * kQueries + q) * 4 + k) * 8 + i, random);
            while (kind_of_rejection([&] { batcher.add(a.view(), 0); }) == "arena_full") std::this_thread::yield();
          }
          batcher.seal(name, 0, k, d, 0);
        }
      }
      --running;
    });
  }
  int64_t planned = 0;
  while (running > 0 || !batcher.ready().empty()) {
    if (!batcher.wait_ready(1, {}, 0.05)) continue;
    const Plan plan = make_plan(batcher, 1, batcher.ready(), {});
    REQUIRE(assemble_and_count(batcher, plan) == plan.tokens);
    REQUIRE(save_state(batcher, 0).ids.size() >= plan.rows.size());
    for (const std::string& query : plan.queries) REQUIRE(batcher.drop(query));
    planned += int64_t(plan.queries.size());
  }
  REQUIRE(planned == kProducers * kQueries);
  REQUIRE(batcher.used_bytes() == 0 && batcher.n_queries() == 0);
}

CASE(rejected_calls_change_nothing) {
  harness::Random random(9);
  Batcher batcher(small_options());
  const Arrival good("q", 1, 0, 5, random);
  batcher.add(good.view(), 0);
  batcher.seal("q", 0, 1, 1, 0);
  const auto rejected = [&](auto change) {
    TrajectoryView t = good.view();
    t.rollout = 2;
    t.id = 6;
    change(t);
    return kind_of_rejection([&] { batcher.add(t, 0); });
  };
  const float infinite[2] = {0, -std::numeric_limits<float>::infinity()};
  const uint8_t zeros[200] = {};
  const int32_t negative[2] = {3, -3};
  REQUIRE(rejected([](auto& t) { t.n_tokens = t.n_mask = t.n_logprobs = 0; }) == "empty");
  REQUIRE(rejected([](auto& t) { t.n_tokens = t.n_mask = t.n_logprobs = 129; }) == "too_long");
  REQUIRE(rejected([](auto& t) { t.n_mask -= 1; }) == "length");
  REQUIRE(rejected([&](auto& t) { t.mask = zeros; }) == "no_trainable");
  REQUIRE(rejected([&](auto& t) {
            t.tokens = negative;
            t.n_tokens = t.n_mask = t.n_logprobs = 2;
          }) == (good.tokens.size() < 2 ? "length" : "token_id"));
  REQUIRE(rejected([&](auto& t) {
            t.logprobs = infinite;
            t.n_tokens = t.n_mask = t.n_logprobs = 2;
          }) == (good.tokens.size() < 2 ? "length" : "logprobs"));
  REQUIRE(rejected([](auto& t) { t.advantage = std::numeric_limits<float>::quiet_NaN(); }) == "advantage");
  const int64_t starts[2] = {0, 40}, late[1] = {1};
  REQUIRE(rejected([&](auto& t) { t.segment_starts = starts; }) == "segments");
  REQUIRE(rejected([&](auto& t) { t.segment_starts = late; }) == "segments");
  REQUIRE(rejected([](auto& t) { t.rollout = 4; }) == "rollout");
  REQUIRE(rejected([](auto& t) { t.id = 5; }) == "duplicate");
  REQUIRE(rejected([](auto& t) {
            t.rollout = 1;
            t.invocation = 1;
          }) == "sealed");
  const State s = save_state(batcher, 0);
  REQUIRE(s.ids.size() == 1 && s.queries.size() == 1 && batcher.counters().accepted == 1);
}

CASE(state_survives_a_round_trip) {
  harness::Random random(4);
  Batcher batcher(small_options());
  for (int64_t q = 0; q < 20; ++q) {
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t d = random(0, 4);
      for (int64_t i = 0; i < d; ++i)
        if (random(0, 9))
          batcher.add(Arrival(std::to_string(q), k, i, q * 100 + k * 10 + i, random, true).view(), double(q));
        else
          batcher.fail(std::to_string(q), 0, k, i, double(q));
      if (random(0, 9)) batcher.seal(std::to_string(q), 0, k, d, double(q));
    }
  }
  Batcher other(small_options());
  load_state(other, save_state(batcher, 30), 1000);
  REQUIRE(other.ready() == batcher.ready() && !batcher.ready().empty());
  const State a = save_state(batcher, 30), b = save_state(other, 1000);
  REQUIRE(a.queries == b.queries && a.tokens == b.tokens && a.places == b.places && a.sealed == b.sealed);
  REQUIRE(a.ages == b.ages && a.counters == b.counters);
  REQUIRE(a.segments == b.segments && a.segment_starts == b.segment_starts && a.segment_starts.size() > a.ids.size());
  const Plan plan = make_plan(other, 3, other.ready(), {});
  REQUIRE(assemble_and_count(other, plan) == plan.tokens);
}
