// Group-relative advantages; the definition and its choices are in mgrpo/ops/group_advantage.py.
//
// Every sum is taken over terms first rounded to a grid on which all partial sums are exact in double, so neither the
// order of rows nor the number of passes can change a bit of the result.
#pragma once

#include <cmath>
#include <cstdint>

namespace mgrpo {

// Rewards of one group that differ by no more than this part of the largest among them are equal: what float32 sums of
// the same parts in another order differ by (8 ulp). The same number stands in mgrpo/ops/group_advantage.py.
inline constexpr double kEqualWithin = 8.0 / (1 << 23);

// Rewards beyond this are refused: differences of two, which dr_grpo and rloo give as advantages, must fit a float.
inline constexpr double kLargestReward = 1.7014118e38;

inline bool equal_rewards(double low, double high) {
  return !(high - low > kEqualWithin * std::fmax(std::fabs(low), std::fabs(high)));
}

enum class AdvantageEstimator : int { grpo = 0, dr_grpo = 1, rloo = 2, batch = 3 };

// rewards, weight (may be null: 1) and advantages have n entries; group ids are any int32, in any order.
// unbiased: grpo and batch divide by the sample deviation.
void group_advantage(const float* rewards, const int32_t* group_id, const float* weight, int64_t n,
                     AdvantageEstimator estimator, double eps, bool unbiased, float* advantages);

}  // namespace mgrpo
