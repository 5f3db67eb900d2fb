#include "soak.hpp"

#include <algorithm>
#include <cstdio>
#include <deque>

#include "arrivals.hpp"
#include "assemble.hpp"
#include "harness.hpp"
#include "plan.hpp"

using namespace mgrpo;

namespace {

int64_t resident_bytes() {
  long pages = 0, resident = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  REQUIRE(file != nullptr);
  REQUIRE(std::fscanf(file, "%ld %ld", &pages, &resident) == 2);
  std::fclose(file);
  return int64_t{resident} * 4096;
}

struct Totals {
  int64_t arrivals = 0, trained = 0, expired = 0, refused = 0;
};

// Trains on what is ready; returns the tokens assembled.
void train(Batcher& batcher, uint64_t step, std::vector<int32_t>& ids, std::vector<float>& weight, Totals& totals) {
  const Plan plan = make_plan(batcher, step, batcher.ready(), {.min_saved = int64_t(step % 2)});
  for (int rank = 0; rank < plan.dp && plan.packing.n_mb > 0; ++rank) {
    PackedBuffers b;
    b.n_mb = plan.packing.n_mb;
    b.capacity = plan.capacity;
    b.segments = plan.max_segments;
    ids.resize(std::max(ids.size(), size_t(b.n_mb * b.capacity)));
    weight.resize(std::max(weight.size(), size_t(b.n_mb * b.segments)));
    b.ids = ids.data();
    b.seg_weight = weight.data();
    write_packed(batcher, plan, rank, b);
  }
  totals.trained += int64_t(plan.queries.size());
  for (const std::string& query : plan.queries) REQUIRE(batcher.drop(query));
}

}  // namespace

void soak(int64_t arrivals) {
  harness::Random random(1);
  BatcherOptions options = small_options();
  options.threads = 1;
  options.arena_bytes = 96 << 10;  // small enough to push back now and then
  Batcher batcher(options);
  Totals totals;
  std::vector<int32_t> ids;
  std::vector<float> weight;
  int64_t baseline = 0, peak = 0, query = 0;
  double now = 0;
  while (totals.arrivals < arrivals) {
    const std::string name = std::to_string(query++);
    const bool abandoned = random(0, 9) == 0;
    for (int64_t k = 0; k < options.k; ++k) {
      const int64_t d = random(0, 4);
      for (int64_t i = 0; i < d; ++i) {
        if (random(0, 49) == 0) {
          batcher.fail(name, 0, k, i, now);
          continue;
        }
        const int64_t id = totals.arrivals++;
        const Arrival a(name, k, i, id, random, id % 3 == 0);
        try {
          batcher.add(a.view(), now);
          if (random(0, 19) == 0) REQUIRE(!batcher.add(a.view(), now));
        } catch (const BatcherError& e) {
          REQUIRE(e.kind == "arena_full");
          ++totals.refused;
          batcher.fail(name, 0, k, i, now);
        }
      }
      if (!abandoned || k % 2) batcher.seal(name, 0, k, d, now);
    }
    now += 1;
    if (random(0, 15) == 0) train(batcher, uint64_t(query), ids, weight, totals);
    if (random(0, 63) == 0) totals.expired += int64_t(batcher.expire(50, now).size());
    if (totals.arrivals < arrivals / 10)
      baseline = std::max(baseline, resident_bytes());
    else if (random(0, 255) == 0)
      peak = std::max(peak, resident_bytes());
  }
  train(batcher, 0, ids, weight, totals);
  totals.expired += int64_t(batcher.expire(-1, now).size());
  REQUIRE(batcher.n_queries() == 0 && batcher.used_bytes() == 0);
  REQUIRE(totals.trained + totals.expired == query && totals.expired > 0);
  std::printf("%lld arrivals, %lld groups trained, %lld expired, %lld refused by the full arena; ",
              (long long)totals.arrivals, (long long)totals.trained, (long long)totals.expired,
              (long long)totals.refused);
  std::printf("resident %.1f MB after a tenth, %.1f MB at most since\n", double(baseline) / 1e6, double(peak) / 1e6);
  REQUIRE(peak <= baseline + (int64_t{4} << 20));
}
