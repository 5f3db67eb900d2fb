// The plan of one batch: which trajectories, how many copies, with which weight and advantage, in which micro-batch of
// which rank. Building it reads the batcher and changes nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "batcher.hpp"
#include "pack.hpp"
#include "padded_layout.hpp"

namespace mgrpo {

// One segment of a distinct kept trajectory, which mostly has one.
struct PlanRow {
  int32_t group = 0, rollout = 0, invocation = 0;
  int32_t segment = 0;  // its place in the trajectory; those without a trainable token have no row
  int32_t multiplicity = 1;
  int32_t length = 0, active = 0, policy_version = 0;
  int32_t handle = -1;
  int32_t start = 0;  // its first token in the arena's block
  uint32_t generation = 0;
  float advantage = 0;
  bool has_gradient = false;  // some trainable token has an advantage other than 0
  double weight = 0;          // w(k,i), all copies together, over the rows of the trajectory
  int64_t id = 0;
};

struct PlanOptions {
  bool skip_zero = false;  // rows without a gradient are left out of the micro-batches (they stay in rows and slots)
  int64_t min_saved = 0;   // > 0: padded rows share prefixes, in nodes that save so much (prefix_tree())
  bool hold_prefixes = false;
};

struct Plan {
  uint64_t owner = 0;  // Batcher::id() of the batcher whose arena the rows point into
  uint64_t step = 0;
  int dp = 1, k = 0, depth = 0;  // depth: slots a rollout
  int64_t capacity = 0;
  int32_t pad_id = 0;
  int threads = 1;
  bool token_advantages = false;  // the arena holds an advantage of each token
  std::vector<std::string> queries;
  std::vector<int32_t> group_query, group_role;  // [G]
  std::vector<int32_t> group_rollouts;           // [G] rollouts with d_k > 0: K'_q
  std::vector<PlanRow> rows;                     // [R] by group, rollout, invocation, segment
  std::vector<int32_t> slots;                    // [G, k, depth] -> first row of a trajectory, or -1
  std::vector<int32_t> item_row;                 // [N] packed sequences; N > R only in mode `duplicate`
  std::vector<float> item_weight;                // [N]
  Packing packing;
  int max_segments = 1;
  int max_rows = 0;    // bound on rows of a padded micro-batch; 0 = none
  int64_t tokens = 0;  // of all packed sequences

  int64_t shared_tokens = 0;        // entering tokens that no forward pass computes
  std::vector<int32_t> row_shared;  // [R] leading entering tokens computed elsewhere; of copies, the least

  // Of rows that share prefixes: share_prefixes(). Otherwise rows by decreasing length, cut so that rows x longest <=
  // capacity, a multiple of dp micro-batches. Computed on first use: most trainers want either this or the packing. Not
  // for two threads at once.
  const PaddedLayout& padded() const;

 private:
  friend Plan make_plan(const Batcher&, uint64_t, std::vector<std::string>, const PlanOptions&);
  mutable std::optional<PaddedLayout> padded_;
};

// `names` are queries of the batcher that are ready.
Plan make_plan(const Batcher& batcher, uint64_t step, std::vector<std::string> names, const PlanOptions& options);

}  // namespace mgrpo
