// Group-relative advantages; the definition and its choices are in mgrpo/ops/group_advantage.py.
//
// Every sum is taken over terms first rounded to a grid on which all partial sums are exact in double, so neither the
// order of rows nor the number of passes can change a bit of the result.
#pragma once

#include <cstdint>

namespace mgrpo {

enum class AdvantageEstimator : int { grpo = 0, dr_grpo = 1, rloo = 2, batch = 3 };

// rewards, weight (may be null: 1) and advantages have n entries; group ids are any int32, in any order.
void group_advantage(const float* rewards, const int32_t* group_id, const float* weight, int64_t n,
                     AdvantageEstimator estimator, double eps, float* advantages);

}  // namespace mgrpo
