#include "group_advantage.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <unordered_map>
#include <vector>

#include "check.hpp"

// The loader picks the AVX2 copy of the loops where the machine has it; inlined helpers come along.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define MGRPO_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MGRPO_CLONES
#endif
#define MGRPO_INLINE inline __attribute__((always_inline))

namespace mgrpo {
namespace {

// Four lanes of the same arithmetic; exact sums make their order free. (The build keeps products and sums apart here,
// so that the vector and the scalar code round alike.)
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));

constexpr double kCancelled = 1.0 / 1024;  // variance below this part of the raw second moment is taken again, centred

// 1.5 * 2^k with 2^k > bound: x + anchor - anchor rounds x to ulp(anchor), and sums below bound stay exact.
MGRPO_INLINE double anchor_for(double bound) {
  uint64_t bits;
  bound = std::max(bound, 1e-280);
  std::memcpy(&bits, &bound, sizeof bits);
  bits = ((bits >> 52) + 2) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return 1.5 * power;
}

template <typename T>
MGRPO_INLINE T snap(T x, double anchor) {
  return (x + anchor) - anchor;
}

// The members (weight > 0) of a group: range first, since it sets the grid, then sums of d = R - low.
struct Group {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();
  float heaviest = 0.0f;
  int32_t members = 0;
  double grid0 = 0.0, grid1 = 0.0, grid2 = 0.0;  // anchors of the sums of w, w d, w d^2
  double total = 0.0, first = 0.0, second = 0.0;
  double squares = 0.0;  // sum of w^2, of which only the sample deviation asks

  bool varied() const { return !equal_rewards(low, high); }
  void see(float reward, float weight) {
    low = std::min(low, reward);
    high = std::max(high, reward);
    heaviest = std::max(heaviest, weight);
    ++members;
  }
  void lay_grids() {
    const double mass = double(members) * heaviest, spread = double(high) - low;
    grid0 = anchor_for(mass);
    grid1 = anchor_for(mass * spread);
    grid2 = anchor_for(mass * spread * spread);
  }
  void add(float reward, double w) {
    const double d = double(reward) - low;
    total += snap(w, grid0);
    first += snap(w * d, grid1);
    second += snap(w * (d * d), grid2);
  }
  double shift() const { return first / total; }
  double variance() const {
    const double mean_square = second / total, centred = mean_square - shift() * shift();
    return centred < kCancelled * mean_square ? -1.0 : centred;  // negative: not to be trusted
  }
  double grid_of_squares() const { return anchor_for(double(members) * heaviest * heaviest); }
  // The sample's variance of the population's. Beside a weight that outweighs its group to the last bit the others are
  // no second member: infinite, so that the advantage is 0.
  double sample_variance(double variance) const {
    const double spare = total - squares / total;
    return spare > 0 ? variance * (total / spare) : std::numeric_limits<double>::infinity();
  }
};

// advantage = (d - shift) * factor; rloo's factor depends on the row's own weight.
struct Finish {
  AdvantageEstimator estimator;
  double eps;
  bool unbiased;
  double batch_deviation;

  double factor(const Group& g, double variance) const {
    if (estimator == AdvantageEstimator::grpo && unbiased) variance = g.sample_variance(variance);
    if (estimator == AdvantageEstimator::grpo) return 1.0 / (std::sqrt(variance) + eps);
    if (estimator == AdvantageEstimator::batch) return 1.0 / (batch_deviation + eps);
    return 1.0;
  }
  float apply(float reward, double w, const Group& g, double shift, double factor) const {
    if (!(w > 0)) return 0.0f;
    const double centred = (double(reward) - g.low) - shift;
    if (estimator != AdvantageEstimator::rloo) return float(centred * factor);
    const double others = g.total - w;
    return others > 0 ? float(centred * (g.total / others)) : 0.0f;
  }
};

struct Rows {
  const float* rewards;
  const float* weight;  // may be null
  float weight_of(int64_t i) const { return weight ? weight[i] : 1.0f; }
};

// Whether every reward is within kLargestReward, and every weight finite and at least 0. Cloned functions must not throw: an exception
// does not pass the loader's dispatch.
MGRPO_CLONES bool sound(const Rows& rows, int64_t n) noexcept {
  // (x + x) * 0 is NaN for NaN, infinities and what is beyond half of the range; the sum is 0 otherwise.
  Float4 sum{};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    Float4 x;
    std::memcpy(&x, rows.rewards + i, sizeof x);
    sum += (x + x) * 0.0f;
  }
  bool fit = sum[0] + sum[1] + sum[2] + sum[3] == 0.0f;
  for (; i < n; ++i) fit = fit && (rows.rewards[i] + rows.rewards[i]) * 0.0f == 0.0f;
  if (!rows.weight) return fit;
  for (i = 0; i < n; ++i) fit &= rows.weight[i] >= 0.0f && rows.weight[i] <= std::numeric_limits<float>::max();
  return fit;
}

// The first reward or weight that is not sound is an error that names it.
void check_finite(const Rows& rows, int64_t n) {
  if (sound(rows, n)) return;
  for (int64_t i = 0; i < n; ++i) {
    MGRPO_CHECK(std::isfinite(rows.rewards[i]), "rewards: ", rows.rewards[i], " at [", i, "] is not finite");
    MGRPO_CHECK(std::fabs(rows.rewards[i]) <= kLargestReward, "rewards: ", rows.rewards[i], " at [", i, "] is beyond ",
                kLargestReward, ", half of float32's range");
    MGRPO_CHECK(!rows.weight || (rows.weight[i] >= 0.0f && std::isfinite(rows.weight[i])),
                "weight: ", rows.weight ? rows.weight[i] : 0.0f, " at [", i, "] is not finite or is below 0");
  }
}

MGRPO_INLINE void see(const Rows& rows, int64_t begin, int64_t end, Group& g) {
  int64_t i = begin;
  if (!rows.weight && end - begin >= 4) {
    Float4 low, high, x;
    std::memcpy(&low, rows.rewards + begin, sizeof low);
    high = low;
    for (i += 4; i + 4 <= end; i += 4) {
      std::memcpy(&x, rows.rewards + i, sizeof x);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    for (int lane = 0; lane < 4; ++lane) {
      g.see(low[lane], 1.0f);
      g.see(high[lane], 1.0f);
    }
    g.members += int32_t(i - begin) - 8;
  }
  for (; i < end; ++i) {
    if (rows.weight_of(i) > 0) g.see(rows.rewards[i], rows.weight_of(i));
  }
}

MGRPO_INLINE void add(const Rows& rows, int64_t begin, int64_t end, Group& g) {
  int64_t i = begin;
  if (!rows.weight) {
    Double4 first{}, second{};
    for (; i + 4 <= end; i += 4) {
      Float4 x;
      std::memcpy(&x, rows.rewards + i, sizeof x);
      const Double4 d = __builtin_convertvector(x, Double4) - double(g.low);
      first += snap(d, g.grid1);
      second += snap(d * d, g.grid2);
    }
    for (int lane = 0; lane < 4; ++lane) {
      g.first += first[lane];
      g.second += second[lane];
    }
    g.total += double(i - begin);
  }
  for (; i < end; ++i) {
    if (rows.weight_of(i) > 0) g.add(rows.rewards[i], rows.weight_of(i));
  }
}

// Sum of w (d - shift)^2 of some rows, for variances that cancel in the raw moments.
MGRPO_INLINE double centred_square(const Rows& rows, int64_t i, const Group& g) {
  const double d = (double(rows.rewards[i]) - g.low) - g.shift();
  return rows.weight_of(i) > 0 ? snap(double(rows.weight_of(i)) * (d * d), g.grid2) : 0.0;
}

// The part of a member in sum w^2.
MGRPO_INLINE double weight_square(const Rows& rows, int64_t i, double grid) {
  const double w = rows.weight_of(i);
  return w > 0 ? snap(w * w, grid) : 0.0;
}

MGRPO_INLINE double weight_squares(const Rows& rows, int64_t begin, int64_t end, const Group& g) {
  if (!rows.weight) return double(end - begin);
  const double grid = g.grid_of_squares();
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) sum += weight_square(rows, i, grid);
  return sum;
}

MGRPO_INLINE void finish_run(const Rows& rows, int64_t begin, int64_t end, const Group& g, const Finish& finish,
                             double factor, float* out) {
  const double shift = g.shift();
  int64_t i = begin;
  if (!rows.weight && finish.estimator != AdvantageEstimator::rloo) {
    for (; i + 4 <= end; i += 4) {
      Float4 x;
      std::memcpy(&x, rows.rewards + i, sizeof x);
      const Double4 centred = (__builtin_convertvector(x, Double4) - double(g.low)) - shift;
      x = __builtin_convertvector(centred * factor, Float4);
      std::memcpy(out + i, &x, sizeof x);
    }
  }
  for (; i < end; ++i) out[i] = finish.apply(rows.rewards[i], rows.weight_of(i), g, shift, factor);
}

// One group that is the rows [begin, end).
MGRPO_INLINE void whole_group(const Rows& rows, int64_t begin, int64_t end, const Finish& finish, float* out) {
  Group g;
  see(rows, begin, end, g);
  if (!g.varied()) {
    std::fill(out + begin, out + end, 0.0f);
    return;
  }
  g.lay_grids();
  add(rows, begin, end, g);
  double variance = g.variance();
  if (variance < 0 && finish.estimator == AdvantageEstimator::grpo) {
    double square = 0.0;
    for (int64_t i = begin; i < end; ++i) square += centred_square(rows, i, g);
    variance = square / g.total;
  }
  if (finish.unbiased) g.squares = weight_squares(rows, begin, end, g);
  finish_run(rows, begin, end, g, finish, finish.factor(g, variance), out);
}

MGRPO_CLONES double batch_deviation(const Rows& rows, int64_t n, bool unbiased) {
  Group g;
  see(rows, 0, n, g);
  if (!(g.high > g.low)) return 0.0;
  g.lay_grids();
  add(rows, 0, n, g);
  double variance = g.variance();
  if (variance < 0) {
    double square = 0.0;
    for (int64_t i = 0; i < n; ++i) square += centred_square(rows, i, g);
    variance = square / g.total;
  }
  if (!unbiased) return std::sqrt(variance);
  g.squares = weight_squares(rows, 0, n, g);
  return std::sqrt(g.sample_variance(variance));
}

// Dense numbers for the ids, [0, width): the ids themselves less the smallest, or, when they are far more spread than
// there are rows, the order of first appearance (then `renamed` holds them).
struct Ids {
  const int32_t* id;
  int64_t base = 0, width = 0;
  std::vector<int32_t> renamed;

  Ids(const int32_t* ids, int64_t n) : id(ids) {
    if (n == 0) return;
    int32_t low = ids[0], high = ids[0];
    for (int64_t i = 0; i < n; ++i) {
      low = std::min(low, ids[i]);
      high = std::max(high, ids[i]);
    }
    base = low;
    width = int64_t{high} - low + 1;
    if (width <= 4 * n + 1024) return;
    std::unordered_map<int32_t, int32_t> names;
    renamed.resize(std::size_t(n));
    for (int64_t i = 0; i < n; ++i) {
      renamed[std::size_t(i)] = names.try_emplace(ids[i], int32_t(names.size())).first->second;
    }
    id = renamed.data();
    base = 0;
    width = int64_t(names.size());
  }
  std::size_t operator[](int64_t i) const { return std::size_t(int64_t{id[i]} - base); }
};

// Groups as runs of equal ids: false, with `out` unfinished, as soon as an id comes back.
MGRPO_CLONES bool contiguous(const Rows& rows, const Ids& ids, int64_t n, const Finish& finish, float* out) {
  std::vector<bool> seen(std::size_t(ids.width), false);
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    if (seen[ids[begin]]) return false;
    seen[ids[begin]] = true;
    while (end < n && ids.id[end] == ids.id[begin]) ++end;
    whole_group(rows, begin, end, finish, out);
  }
  return true;
}

void scattered(const Rows& rows, const Ids& ids, int64_t n, const Finish& finish, float* out) {
  std::vector<Group> groups(std::size_t(ids.width));
  for (int64_t i = 0; i < n; ++i) {
    if (rows.weight_of(i) > 0) groups[ids[i]].see(rows.rewards[i], rows.weight_of(i));
  }
  for (Group& g : groups) {
    if (g.varied()) g.lay_grids();
  }
  for (int64_t i = 0; i < n; ++i) {
    if (rows.weight_of(i) > 0) groups[ids[i]].add(rows.rewards[i], rows.weight_of(i));
  }
  if (finish.unbiased) {
    std::vector<double> grids(groups.size());
    for (std::size_t j = 0; j < groups.size(); ++j) grids[j] = groups[j].varied() ? groups[j].grid_of_squares() : 0.0;
    for (int64_t i = 0; i < n; ++i) groups[ids[i]].squares += weight_square(rows, i, grids[ids[i]]);
  }
  struct Scale {
    double shift = 0.0, factor = 0.0;
    float low = 0.0f;
    bool again = false;
  };
  std::vector<Scale> scales(groups.size());
  std::vector<double> squares;
  for (std::size_t j = 0; j < groups.size(); ++j) {
    const Group& g = groups[j];
    if (!g.varied()) continue;
    const double variance = g.variance();
    scales[j] = {g.shift(), finish.factor(g, variance), g.low,
                 variance < 0 && finish.estimator == AdvantageEstimator::grpo};
    if (scales[j].again && squares.empty()) squares.resize(groups.size());
  }
  if (!squares.empty()) {
    for (int64_t i = 0; i < n; ++i) {
      if (scales[ids[i]].again) squares[ids[i]] += centred_square(rows, i, groups[ids[i]]);
    }
    for (std::size_t j = 0; j < groups.size(); ++j) {
      if (scales[j].again) scales[j].factor = finish.factor(groups[j], squares[j] / groups[j].total);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const Scale& s = scales[ids[i]];
    if (finish.estimator == AdvantageEstimator::rloo) {
      const Group& g = groups[ids[i]];
      out[i] = g.varied() ? finish.apply(rows.rewards[i], rows.weight_of(i), g, s.shift, s.factor) : 0.0f;
    } else {
      out[i] = rows.weight_of(i) > 0 ? float(((double(rows.rewards[i]) - s.low) - s.shift) * s.factor) : 0.0f;
    }
  }
}

}  // namespace

void group_advantage(const float* rewards, const int32_t* group_id, const float* weight, int64_t n,
                     AdvantageEstimator estimator, double eps, bool unbiased, float* advantages) {
  const Rows rows{rewards, weight};
  check_finite(rows, n);
  const Ids ids(group_id, n);
  const bool batch = estimator == AdvantageEstimator::batch;
  const Finish finish{estimator, eps, unbiased, batch ? batch_deviation(rows, n, unbiased) : 0.0};
  if (!contiguous(rows, ids, n, finish, advantages)) scattered(rows, ids, n, finish, advantages);
}

}  // namespace mgrpo
