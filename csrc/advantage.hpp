// Group-relative advantages with weighted statistics. Sums run in the order of the rows, in double, so that equal
// rows give equal bits whoever computes them.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace mgrpo {

// grpo: (R - mu) / (std + eps); dr_grpo: R - mu; rloo: R - mean of the others; batch: group mean, std of the whole
// batch; agent: mean and std of the whole batch (one agent = one role).
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

// One advantage a row. A group of one row and a group whose rewards are all equal get exactly 0 (for `agent`: the
// same rule over all rows of the role). `unbiased` divides the variance by W - sum w^2 / W instead of W.
// `stats`, where given, receives the weighted mean and deviation of every group up to the last one with a row (0, 0 for
// groups without rows), whatever the estimator makes of them.
std::vector<float> group_advantages(std::span<const RewardRow> rows, Estimator estimator, double eps, bool unbiased,
                                    std::vector<GroupStats>* stats = nullptr);

}  // namespace mgrpo
