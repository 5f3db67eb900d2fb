// Rows of logits: log-prob and entropy of a target, the GRPO family's token coefficient, and the gradient over the
// vocabulary. One row never leaves the cache between the two; rows are independent, so threads change no bit.
//
// In base 2 with k = log2(e) / temperature, m = max z, t_v = (z_v - m) k:  S = sum 2^t, B = sum 2^t t, p_v = 2^t_v / S,
//   logp = ln2 (t_id - log2 S),  entropy = ln2 (log2 S - B / S),
//   d(c logp + e entropy) / dz_v = (c ([v = id] - p_v) - e p_v (ln p_v + entropy)) / temperature.
// -inf logits have p = 0. A row without a finite logp (NaN, +inf, target of probability 0) reports NaN and gets gradient 0.
#pragma once

#include <cstdint>

namespace mgrpo {

// The fused_id of the losses (mgrpo/losses/builtin.py)
enum class Term : int { clipped = 0, cispo = 1, sapo = 2 };
enum class KlEstimator : int { k1 = 1, k2 = 2, k3 = 3 };
enum class Correction : int { none = 0, token_tis = 1, mis = 2 };

struct TokenSettings {
  Term term;
  double clip_eps_low, clip_eps_high;
  double delta;           // infinity: no cap
  double log_ratio_clip;  // above it a ratio is constant
  double sapo_temperature_pos, sapo_temperature_neg;
  double kl_coef;
  KlEstimator kl_estimator;
  double entropy_coef;
  Correction correction;
  double correction_low, correction_high;
};

struct LogitRows {
  const void* logits;  // rows x stride, float or bfloat16
  bool bfloat16;
  int64_t rows, vocabulary, stride;  // stride in elements
  const int64_t* target_ids;         // rows; outside [0, vocabulary) = not in this shard
  double temperature;
  int threads;
};

// Per-row inputs of the loss; old, ref and rollout may be null, and rollout NaN where it is not known. weight 0 and
// policy_weight 0: the row is not read.
struct LossInputs {
  const float *policy_weight, *weight, *advantages, *old_logprobs, *ref_logprobs, *rollout_logprobs;
};

// One pass: logp and entropy of every active row and its gradient into grad (same dtype and stride; may be the logits).
// A masked row gets logp = entropy = 0 and gradient 0; has_grad (rows) is 1 where the gradient is not all 0. grad null: no
// gradient.
void loss_rows(const LogitRows& x, const LossInputs& in, const TokenSettings& settings, void* grad, float* logp,
               float* entropy, uint8_t* has_grad);

// Partial statistics of a (shard of a) row: maximum and the target's logit as they are (-infinity where the target is not
// in this shard), and with u = (z - maximum) / temperature the sums of exp(u) and exp(u) u.
// active (may be null: all): rows with 0 are not read and get 0, 1, 0, 0.
void row_partials(const LogitRows& x, const uint8_t* active, float* maximum, float* sum, float* weighted,
                  float* target);

// Gradient of sum_t c_t logp_t + e_t entropy_t, given the statistics of the whole vocabulary (maximum, sum of exp(u),
// entropy); c = e = 0 rows give 0 and are not read.
struct RowCoefficients {
  const float *maximum, *sum, *entropy, *c, *e;
};
void row_gradients(const LogitRows& x, const RowCoefficients& in, void* grad);

// What d loss / d logp is for one token: the scalar part of loss_rows, in double.
double token_coefficient(const TokenSettings& s, double logp, double advantage, double policy_weight, double weight,
                         const float* old_logprob, const float* ref_logprob, const float* rollout_logprob);

// "avx512", "avx2" or "scalar": what this machine runs; the names accepted by use_isa, which pins one (for tests).
const char* active_isa();
void use_isa(const char* name);

}  // namespace mgrpo
