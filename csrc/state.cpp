#include "state.hpp"

#include <algorithm>

#include "check.hpp"

namespace mgrpo {

State save_state(const Batcher& batcher, double now) {
  const auto lock = batcher.read_lock();
  const int k = batcher.options().k;
  State s;
  s.offsets.push_back(0);
  for (const std::string& name : batcher.names()) {
    const Query& query = batcher.queries().find(name)->second;
    for (size_t c = 0; c < query.cells.size(); ++c) {
      s.sealed.push_back(query.cells[c].sealed);
      for (const Entry& e : query.of(c)) {
        s.places.insert(s.places.end(), {int32_t(s.queries.size()), int32_t(c) / k, int32_t(c) % k, e.invocation});
        s.ids.push_back(e.id);
        if (!batcher.options().token_advantages) s.advantages.push_back(e.advantage);
        s.versions.push_back(e.policy_version);
        const std::span<const Segment> segments = batcher.segments(e);
        s.segments.push_back(int32_t(std::max<size_t>(1, segments.size())));
        if (segments.empty()) s.segment_starts.push_back(0);
        for (const Segment& segment : segments) s.segment_starts.push_back(segment.start);
        if (e.length) {
          const Arena& arena = batcher.arena();
          s.tokens.insert(s.tokens.end(), arena.ids(e.handle), arena.ids(e.handle) + e.length);
          s.loss_mask.insert(s.loss_mask.end(), arena.masks(e.handle), arena.masks(e.handle) + e.length);
          s.logprobs.insert(s.logprobs.end(), arena.logprobs(e.handle), arena.logprobs(e.handle) + e.length);
          if (batcher.options().token_advantages)
            s.advantages.insert(s.advantages.end(), arena.advantages(e.handle), arena.advantages(e.handle) + e.length);
        }
        s.offsets.push_back(int64_t(s.tokens.size()));
      }
    }
    s.queries.push_back(name);
    s.ages.push_back(now - query.opened);
  }
  const Counters& c = batcher.counters_unlocked();
  s.counters = {c.accepted, c.redelivered, c.overlong, c.truncated, c.failed, c.expired};
  return s;
}

namespace {

void check_segments(const State& s) {
  MGRPO_CHECK(s.segments.empty() || s.segments.size() == s.ids.size(), "state: segments of ", s.segments.size(), " of ",
              s.ids.size(), " trajectories");
  int64_t starts = 0;
  for (const int32_t count : s.segments) {
    MGRPO_CHECK(count >= 1, "state: a trajectory of ", count, " segments");
    starts += count;
  }
  MGRPO_CHECK(starts == int64_t(s.segment_starts.size()), "state: ", s.segment_starts.size(),
              " segment starts, expected ", starts);
}

}  // namespace

void load_state(Batcher& batcher, const State& s, double now) {
  const size_t cells = batcher.options().roles.size() * size_t(batcher.options().k), n = s.ids.size();
  MGRPO_CHECK(batcher.n_queries() == 0, "load_state_dict needs an empty batcher, this one holds ", batcher.n_queries(),
              " queries");
  MGRPO_CHECK(s.ages.size() == s.queries.size() && s.sealed.size() == s.queries.size() * cells,
              "state: ", s.queries.size(), " queries, ", s.ages.size(), " ages, ", s.sealed.size(),
              " sealed counts of ", cells, " a query");
  MGRPO_CHECK(s.places.size() == 4 * n && s.versions.size() == n && s.offsets.size() == n + 1, "state: the columns of ",
              n, " trajectories differ in length");
  MGRPO_CHECK(s.counters.size() == 6, "state: ", s.counters.size(), " counters, expected 6");
  const int64_t total = int64_t(s.tokens.size());
  const bool per_token = batcher.options().token_advantages;
  MGRPO_CHECK(s.loss_mask.size() == s.tokens.size() && s.logprobs.size() == s.tokens.size() &&
                  s.advantages.size() == (per_token ? s.tokens.size() : n) && s.offsets[0] == 0 &&
                  s.offsets[n] == total,
              "state: the token columns differ in length");
  check_segments(s);
  int64_t first = 0;  // of the trajectory's segment starts
  for (size_t i = 0; i < n; ++i) {
    MGRPO_CHECK(s.offsets[i] <= s.offsets[i + 1] && s.offsets[i + 1] <= total, "state: offsets[", i + 1,
                "]=", s.offsets[i + 1], " is out of order");
    const int32_t* place = &s.places[4 * i];
    MGRPO_CHECK(place[0] >= 0 && size_t(place[0]) < s.queries.size() && place[1] >= 0 &&
                    size_t(place[1]) < batcher.options().roles.size(),
                "state: trajectory ", s.ids[i], " names query ", place[0], ", role ", place[1]);
    TrajectoryView t;
    t.query = s.queries[place[0]];
    t.role = place[1];
    t.rollout = place[2];
    t.invocation = place[3];
    t.id = s.ids[i];
    t.n_tokens = t.n_mask = t.n_logprobs = s.offsets[i + 1] - s.offsets[i];
    t.tokens = s.tokens.data() + s.offsets[i];
    t.mask = s.loss_mask.data() + s.offsets[i];
    t.logprobs = s.logprobs.data() + s.offsets[i];
    if (per_token) {
      t.token_advantages = s.advantages.data() + s.offsets[i];
      t.n_token_advantages = t.n_tokens;
    } else {
      t.advantage = s.advantages[i];
    }
    t.policy_version = s.versions[i];
    if (!s.segments.empty()) {
      t.segment_starts = {s.segment_starts.data() + first, size_t(s.segments[i])};
      first += s.segments[i];
    }
    if (t.n_tokens)
      batcher.add(t, now);
    else
      batcher.restore_absent(t, now);
  }
  for (size_t q = 0; q < s.queries.size(); ++q) {
    for (size_t c = 0; c < cells; ++c) {
      const int k = batcher.options().k;
      if (s.sealed[q * cells + c] >= 0)
        batcher.seal(s.queries[q], int(c) / k, int64_t(c) % k, s.sealed[q * cells + c], now);
    }
    batcher.restore_opened(s.queries[q], now - s.ages[q]);
  }
  batcher.restore_counters({s.counters[0], s.counters[1], s.counters[2], s.counters[3], s.counters[4], s.counters[5]});
}

}  // namespace mgrpo
