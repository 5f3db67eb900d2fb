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

struct Moments {
  int64_t n = 0;
  double w = 0, w2 = 0, wr = 0, centred = 0, low = 0, high = 0;
  double mean = 0, deviation = 0;

  void count(const RewardRow& row) {
    low = n ? std::min(low, row.reward) : row.reward;
    high = n ? std::max(high, row.reward) : row.reward;
    ++n;
    w += row.weight;
    w2 += row.weight * row.weight;
    wr += row.weight * row.reward;
  }
  void spread(const RewardRow& row) {
    const double gap = row.reward - mean;
    centred += row.weight * gap * gap;
  }
  bool flat() const { return n < 2 || low == high; }
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
    for (Moments& m : *all)
      m.deviation = m.flat() ? 0 : std::sqrt(m.centred / (unbiased ? m.w - m.w2 / m.w : m.w));
  std::vector<float> advantages;
  advantages.reserve(rows.size());
  for (const RewardRow& row : rows) {
    const Moments& group = of_group[row.group];
    const Moments& family = of_family[row.family];
    const Moments& base = estimator == Estimator::agent ? family : group;
    double advantage = 0;
    if (!base.flat()) {
      advantage = row.reward - base.mean;
      if (estimator == Estimator::grpo) advantage /= group.deviation + eps;
      if (estimator == Estimator::rloo) advantage *= group.w / (group.w - row.weight);
      if (estimator == Estimator::batch || estimator == Estimator::agent)
        advantage /= family.deviation + eps;
    }
    advantages.push_back(float(advantage));
  }
  for (const Moments& group : of_group) {
    if (!stats) break;
    stats->push_back(group.n ? GroupStats{group.mean, group.deviation} : GroupStats{});
  }
  return advantages;
}

}  // namespace mgrpo
