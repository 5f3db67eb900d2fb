#include "pack.hpp"

#include <algorithm>
#include <numeric>

#include "check.hpp"
#include "pack_bins.hpp"

namespace mgrpo {

namespace {

constexpr double kTight = 0.995;      // micro-steps fuller than this have no room to be rebalanced
constexpr double kEven = 1.0005;      // highest cost of a bin over the mean below which a micro-step is even
constexpr size_t kSecondPlan = 1024;  // bins up to which a second starting plan is worth its time
constexpr int kRankSwaps = 8;         // per rank

size_t rounded_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Bins of one micro-step stand together, in order of falling cost.
struct Steps {
  Bins bins;
  std::vector<int32_t> order;  // [step * dp + i] -> bin
  double slowest = 0;          // sum over steps of the highest cost of a bin
};

void rebalance(const Sequences& s, Steps& steps, int dp) {
  const size_t n = steps.order.size() / dp;
  std::vector<int32_t> uneven(n, -1), step_of(steps.order.size()), begin = {0};
  for (size_t step = 0; step < n; ++step) {
    double cost = 0, max_cost = 0;
    int64_t tokens = 0;
    int32_t count = 0;
    for (int i = 0; i < dp; ++i) {
      const int32_t b = steps.order[step * dp + i];
      const Bin& bin = steps.bins.bins[b];
      step_of[b] = int32_t(step);
      cost += bin.cost;
      max_cost = std::max(max_cost, bin.cost);
      tokens += bin.tokens;
      count += bin.count;
    }
    if (max_cost * dp <= kEven * cost || double(tokens) > kTight * double(s.capacity) * dp) continue;
    uneven[step] = int32_t(begin.size() - 1);
    begin.push_back(begin.back() + count);
  }
  if (begin.size() == 1) return;
  std::vector<int32_t> positions(begin.back()), fill(begin);
  for (int64_t p = 0; p < s.size(); ++p)
    if (const int32_t u = uneven[step_of[steps.bins.of[p]]]; u >= 0) positions[fill[u]++] = int32_t(p);
  for (size_t step = 0; step < n; ++step) {
    if (uneven[step] < 0) continue;
    const std::span<const int32_t> all(positions);
    const int32_t from = begin[uneven[step]], to = begin[uneven[step] + 1];
    rebalance(s, steps.bins, std::span(steps.order).subspan(step * dp, dp), all.subspan(from, to - from));
  }
}

Steps into_steps(const Sequences& s, Bins bins, int dp) {
  Steps steps{std::move(bins), {}, 0};
  auto& all = steps.bins.bins;
  all.resize(rounded_up(all.size(), dp));
  steps.order.resize(all.size());
  std::iota(steps.order.begin(), steps.order.end(), 0);
  std::sort(steps.order.begin(), steps.order.end(),
            [&](int32_t a, int32_t b) { return all[a].cost != all[b].cost ? all[a].cost > all[b].cost : a < b; });
  rebalance(s, steps, dp);
  for (size_t step = 0; step < steps.order.size() / dp; ++step) {
    double max_cost = 0;
    for (int i = 0; i < dp; ++i) max_cost = std::max(max_cost, all[steps.order[step * dp + i]].cost);
    steps.slowest += max_cost;
  }
  return steps;
}

// Heavy micro-steps first, the rest evenly over exactly n bins. No bins when that does not work out.
Bins heavy_then_even(const Sequences& s, size_t n, int dp) {
  Bins plan{{}, std::vector<int32_t>(s.size(), -1)};
  double rest = s.total_cost;
  int64_t next = 0;
  while (plan.bins.size() + dp < n) {
    while (next < s.size() && plan.of[next] >= 0) ++next;
    if (next == s.size() || s.cost[next] * double(n - plan.bins.size()) <= rest) break;
    const size_t first = plan.bins.size();
    heavy_step(s, plan, dp);
    for (size_t b = first; b < plan.bins.size(); ++b) rest -= plan.bins[b].cost;
  }
  int64_t tokens = s.tokens;
  for (const Bin& bin : plan.bins) tokens -= bin.tokens;
  if (double(tokens) <= kTight * double(s.capacity) * double(n - plan.bins.size())) {
    Bins even = plan;
    even.bins.resize(n);
    if (cheapest_first(s, even, int32_t(plan.bins.size()))) return even;
  }
  best_fit_decreasing(s, plan);
  if (plan.bins.size() > n) plan.bins.clear();
  return plan;
}

// Which rank runs which bin of a step is free: it moves tokens between ranks, never time between steps.
std::vector<int32_t> assign_ranks(const Steps& steps, int dp) {
  const auto& bins = steps.bins.bins;
  const size_t n = steps.order.size() / dp;
  std::vector<int32_t> at = steps.order, ranks(dp);
  std::vector<int64_t> load(dp, 0);
  for (size_t step = 0; step < n; ++step) {
    int32_t* mine = &at[step * dp];
    std::sort(mine, mine + dp, [&](int32_t a, int32_t b) {
      return bins[a].tokens != bins[b].tokens ? bins[a].tokens > bins[b].tokens : a < b;
    });
    std::iota(ranks.begin(), ranks.end(), 0);
    std::sort(ranks.begin(), ranks.end(),
              [&](int32_t a, int32_t b) { return load[a] != load[b] ? load[a] < load[b] : a < b; });
    const std::vector<int32_t> sorted(mine, mine + dp);
    for (int i = 0; i < dp; ++i) {
      mine[ranks[i]] = sorted[i];
      load[ranks[i]] += bins[sorted[i]].tokens;
    }
  }
  for (int swap = 0; swap < kRankSwaps * dp; ++swap) {
    const auto high = std::max_element(load.begin(), load.end()) - load.begin();
    int64_t best = 0, shift = 0;  // the swap that takes most from the fuller of its two ranks
    size_t where = n;
    int other = 0;
    for (int rank = 0; rank < dp; ++rank) {
      const int64_t gap = load[high] - load[rank];
      for (size_t step = 0; step < n && gap > 2 * best; ++step) {
        const int64_t moved = bins[at[step * dp + high]].tokens - bins[at[step * dp + rank]].tokens;
        const int64_t gain = std::min(moved, gap - moved);
        if (gain <= best) continue;
        best = gain;
        shift = moved;
        where = step;
        other = rank;
      }
    }
    if (where == n) break;
    std::swap(at[where * dp + high], at[where * dp + other]);
    load[high] -= shift;
    load[other] += shift;
  }
  return at;
}

}  // namespace

Packing pack(std::span<const int32_t> lengths, const PackOptions& o) { return pack({lengths, {}, {}}, o); }

Packing pack(const PackUnits& units, const PackOptions& o) {
  const std::span<const int32_t> lengths = units.lengths;
  MGRPO_CHECK(o.capacity >= 1, "capacity=", o.capacity, " is below 1");
  MGRPO_CHECK(o.dp >= 1, "dp=", o.dp, " is below 1");
  for (size_t i = 0; i < lengths.size(); ++i)
    MGRPO_CHECK(lengths[i] >= 1 && lengths[i] <= o.capacity, "lengths[", i, "]=", lengths[i], " is outside [1, ",
                o.capacity, "]");
  const Sequences s(units, o);
  Bins full{{}, std::vector<int32_t>(lengths.size(), -1)};
  best_fit_decreasing(s, full);
  const size_t n = rounded_up(full.bins.size(), o.dp);
  Steps steps = into_steps(s, std::move(full), o.dp);
  if (o.dp > 1 && n <= kSecondPlan) {
    Bins second = heavy_then_even(s, n, o.dp);
    if (!second.bins.empty()) {
      Steps other = into_steps(s, std::move(second), o.dp);
      if (other.slowest < steps.slowest) steps = std::move(other);
    }
  }
  const std::vector<int32_t> at = assign_ranks(steps, o.dp);

  Packing out;
  out.n_mb = int(n) / o.dp;
  out.rank_cost.assign(o.dp, 0);
  out.offsets.assign(n + 1, 0);
  std::vector<int32_t> place(n), bin_of(lengths.size());  // bin -> rank * n_mb + step
  for (int step = 0; step < out.n_mb; ++step) {
    for (int rank = 0; rank < o.dp; ++rank) {
      const int32_t bin = at[size_t(step) * o.dp + rank];
      place[bin] = rank * out.n_mb + step;
      out.offsets[place[bin] + 1] = steps.bins.bins[bin].count;
      out.rank_cost[rank] += steps.bins.bins[bin].cost;
    }
  }
  for (size_t b = 0; b < n; ++b) out.offsets[b + 1] += out.offsets[b];
  for (int64_t p = 0; p < s.size(); ++p) bin_of[s.index[p]] = place[steps.bins.of[p]];
  std::vector<int32_t> fill(out.offsets);
  out.items.resize(lengths.size());
  for (size_t i = 0; i < lengths.size(); ++i) out.items[fill[bin_of[i]]++] = int32_t(i);
  if (s.total_cost > 0) out.lockstep = steps.slowest / (s.total_cost / o.dp);
  if (n) out.efficiency = double(s.tokens) / (double(n) * double(o.capacity));
  return out;
}

}  // namespace mgrpo
