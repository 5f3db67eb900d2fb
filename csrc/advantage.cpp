#include "advantage.hpp"

#include <algorithm>
#include <cmath>

#include "check.hpp"

namespace mgrpo {

Estimator parse_estimator(std::string_view name) {
  if (name == "grpo") return Estimator::grpo;
  if (name == "dr_grpo") return Estimator::dr_grpo;
  if (name == "rloo") return Estimator::rloo;
  if (name == "batch") return Estimator::batch;
  MGRPO_CHECK(name == "agent", "estimator '", name, "' is not one of grpo, dr_grpo, rloo, batch, agent");
  return Estimator::agent;
}

namespace {

// mean and deviation are of rewards / 2^exponent, which lie in (-1, 1).
struct Moments {
  int64_t n = 0;
  double low = 0, high = 0;
  int exponent = 0;
  double w = 0, w2 = 0, wr = 0, centred = 0;
  double mean = 0, deviation = 0;

  void see(const RewardRow& row) {
    low = n ? std::min(low, row.reward) : row.reward;
    high = n ? std::max(high, row.reward) : row.reward;
    ++n;
  }
  void scale() { std::frexp(std::fmax(std::fabs(low), std::fabs(high)), &exponent); }
  double scaled(double x) const { return std::ldexp(x, -exponent); }
  double unscaled(double x) const { return std::ldexp(x, exponent); }
  void count(const RewardRow& row) {
    w += row.weight;
    w2 += row.weight * row.weight;
    wr += row.weight * scaled(row.reward);
  }
  double gap(const RewardRow& row) const { return scaled(row.reward) - mean; }
  void spread(const RewardRow& row) { centred += row.weight * gap(row) * gap(row); }
  void settle(bool unbiased) {
    deviation = n < 2 || low == high ? 0 : std::sqrt(centred / (unbiased ? w - w2 / w : w));
  }
  bool flat() const { return n < 2 || equal_rewards(low, high); }
};

}  // namespace

std::vector<float> group_advantages(std::span<const RewardRow> rows, Estimator estimator, double eps, bool unbiased,
                                    std::vector<GroupStats>* stats) {
  int32_t groups = 0, families = 0;
  for (const RewardRow& row : rows) {
    groups = std::max(groups, row.group + 1);
    families = std::max(families, row.family + 1);
  }
  std::vector<Moments> of_group(groups), of_family(families);
  for (const RewardRow& row : rows) {
    of_group[row.group].see(row);
    of_family[row.family].see(row);
  }
  for (auto* all : {&of_group, &of_family})
    for (Moments& m : *all) m.scale();
  for (const RewardRow& row : rows) {
    of_group[row.group].count(row);
    of_family[row.family].count(row);
  }
  for (auto* all : {&of_group, &of_family})
    for (Moments& m : *all) m.mean = m.wr / m.w;
  for (const RewardRow& row : rows) {
    of_group[row.group].spread(row);
    of_family[row.family].spread(row);
  }
  for (auto* all : {&of_group, &of_family})
    for (Moments& m : *all) m.settle(unbiased);
  std::vector<float> advantages;
  advantages.reserve(rows.size());
  for (const RewardRow& row : rows) {
    const Moments& group = of_group[row.group];
    const Moments& family = of_family[row.family];
    const Moments& base = estimator == Estimator::agent ? family : group;
    double advantage = 0;
    if (!base.flat()) {
      const double gap = base.gap(row);
      switch (estimator) {
        case Estimator::grpo:
          advantage = gap / (group.deviation + group.scaled(eps));
          break;
        case Estimator::dr_grpo:
          advantage = group.unscaled(gap);
          break;
        case Estimator::rloo:
          advantage = group.unscaled(gap * (group.w / (group.w - row.weight)));
          break;
        case Estimator::batch:
          advantage = std::ldexp(gap, group.exponent - family.exponent) / (family.deviation + family.scaled(eps));
          break;
        case Estimator::agent:
          advantage = gap / (family.deviation + family.scaled(eps));
          break;
      }
    }
    advantages.push_back(float(advantage));
  }
  for (const Moments& group : of_group) {
    if (!stats) break;
    stats->push_back(group.n ? GroupStats{group.unscaled(group.mean), group.unscaled(group.deviation)} : GroupStats{});
  }
  return advantages;
}

}  // namespace mgrpo
