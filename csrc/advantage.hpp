// Group-relative advantages with weighted statistics. Sums run in the order of the rows, in double, so that equal
// rows give equal bits whoever computes them.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace mgrpo {

// grpo: (R - mu) / (std + eps); dr_grpo: R - mu; rloo: R - mean of the others; batch: group mean, std of the whole
// batch; agent: mean and std of the whole batch (one agent = one role).
// Rewards of one group that differ by no more than this part of the largest among them are equal: what float32 sums of
// the same parts in another order differ by (8 ulp). The same number stands in mgrpo/ops/group_advantage.py.
inline constexpr double kEqualWithin = 8.0 / (1 << 23);

// Rewards beyond this are refused: differences of two, which dr_grpo and rloo give as advantages, must fit a float.
inline constexpr double kLargestReward = 1.7014118e38;

inline bool equal_rewards(double low, double high) {
  return !(high - low > kEqualWithin * std::fmax(std::fabs(low), std::fabs(high)));
}

enum class Estimator { grpo, dr_grpo, rloo, batch, agent };

Estimator parse_estimator(std::string_view name);

struct RewardRow {
  int32_t group;   // rows of one group are consecutive
  int32_t family;  // the role: `batch` and `agent` never mix roles
  double reward;
  double weight;  // w(k,i), multiplicity included; > 0
};

struct GroupStats {
  double mean = 0, deviation = 0;
};

// One advantage a row. A group of one row and a group whose rewards are all equal (see kEqualWithin) get exactly 0 (for
// `agent`: the same rule over all rows of the role). Moments are taken of rewards divided by a power of two, so that no
// square overflows or vanishes; ordinary numbers keep their bits. `unbiased` divides the variance by W - sum w^2 / W instead of W.
// `stats`, where given, receives the weighted mean and deviation of every group up to the last one with a row (0, 0 for
// groups without rows), whatever the estimator makes of them.
std::vector<float> group_advantages(std::span<const RewardRow> rows, Estimator estimator, double eps, bool unbiased,
                                    std::vector<GroupStats>* stats = nullptr);

}  // namespace mgrpo
