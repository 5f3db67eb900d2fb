#include "loss_rows.hpp"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string_view>

#include "check.hpp"
#include "loss_isa.hpp"
#include "parallel.hpp"

namespace mgrpo {
namespace {

constexpr double kLn2 = 0.69314718055994531, kLog2e = 1.4426950408889634;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kGrain = 4;  // rows a thread takes at a time
constexpr std::size_t kLine = 64;

struct Isa {
  const char* name;
  const IsaTable* table;
  bool (*supported)();
};

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &isa_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &isa_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"scalar", &isa_scalar, [] { return true; }},
};

const Isa* best_isa() {
  const Isa* isa = kIsas;
  while (!isa->supported()) ++isa;
  return isa;
}

std::atomic<const Isa*> current_isa{nullptr};

const Isa& isa() {
  const Isa* chosen = current_isa.load();
  if (!chosen) current_isa.store(chosen = best_isa());
  return *chosen;
}

// One thread's row of exponentials and the running maximum of each block.
class Scratch {
 public:
  explicit Scratch(int64_t vocabulary)
      : exponentials_(new (std::align_val_t{kLine}) float[vocabulary + int64_t(kLine)]),
        block_max_(new float[vocabulary / kBlock + 1]) {}
  float* exponentials() { return exponentials_.get(); }
  float* block_max() { return block_max_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{kLine}); }
  };
  std::unique_ptr<float, Free> exponentials_;
  std::unique_ptr<float[]> block_max_;
};

std::size_t element_size(const LogitRows& x) { return x.bfloat16 ? 2 : 4; }

const void* row_of(const LogitRows& x, int64_t row) {
  return static_cast<const char*>(x.logits) + row * x.stride * int64_t(element_size(x));
}

void* row_of(const LogitRows& x, void* grad, int64_t row) {
  return static_cast<char*>(grad) + row * x.stride * int64_t(element_size(x));
}

bool in_shard(const LogitRows& x, int64_t id) { return id >= 0 && id < x.vocabulary; }

uint16_t round_to_bfloat16(float x) {  // x is finite
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

double element(const LogitRows& x, const void* row, int64_t i) {
  if (!x.bfloat16) return static_cast<const float*>(row)[i];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(row)[i]} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The gradient sweep, then the target's own element c (1 - p) - e p (ln p + entropy), which does not cancel this way.
void write_gradient(const LogitRows& x, const void* row, const RowScale& scale, int64_t id, double logp,
                    const float* scratch, const float* block_max, void* out) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(out) % kLine == 0;
  isa().table->gradient(row, x.bfloat16, x.vocabulary, scale, scratch, block_max, out, out != row && aligned);
  if (!in_shard(x, id)) return;
  const double p = std::exp(logp);
  const auto g = float(-std::expm1(logp) * scale.c - scale.e * p * (logp + scale.entropy));
  if (x.bfloat16) {
    static_cast<uint16_t*>(out)[id] = round_to_bfloat16(g);
  } else {
    static_cast<float*>(out)[id] = g;
  }
}

void zero_row(const LogitRows& x, void* grad, int64_t row) {
  if (grad) std::memset(row_of(x, grad, row), 0, std::size_t(x.vocabulary) * element_size(x));
}

double policy_slope(const TokenSettings& s, double log_ratio, double advantage) {
  const double ratio = std::exp(std::fmin(log_ratio, s.log_ratio_clip));
  if (s.term == Term::cispo) return -std::fmin(ratio, s.clip_eps_high) * advantage;
  if (log_ratio > s.log_ratio_clip) return 0.0;
  if (s.term == Term::sapo) {
    const double tau = advantage > 0 ? s.sapo_temperature_pos : s.sapo_temperature_neg;
    const double gate = 1.0 / (1.0 + std::exp(-tau * (ratio - 1.0)));
    return -advantage * 4.0 * gate * (1.0 - gate) * ratio;
  }
  const double low = 1.0 - s.clip_eps_low, high = 1.0 + s.clip_eps_high;
  const double free = std::fmin(ratio, s.delta) * advantage;
  const double clipped = std::fmin(std::fmax(ratio, low), high) * advantage;
  // The gradient flows through the branch that wins; on a tie half through each, as torch.minimum does.
  const double slope_free = ratio <= s.delta ? 1.0 : 0.0;
  const double slope_clipped = ratio >= low && ratio <= high ? 1.0 : 0.0;
  const double slope = free < clipped   ? slope_free
                       : clipped < free ? slope_clipped
                                        : 0.5 * (slope_free + slope_clipped);
  return -slope * advantage * ratio;
}

double kl_slope(const TokenSettings& s, double diff) {
  if (s.kl_estimator == KlEstimator::k1) return 1.0;
  if (s.kl_estimator == KlEstimator::k2) return -diff;
  return diff > s.log_ratio_clip ? 0.0 : -std::expm1(diff);
}

double correction_factor(const TokenSettings& s, double log_rho) {
  if (std::isnan(log_rho)) log_rho = 0.0;  // the sampler has no log-prob
  const double rho = std::exp(log_rho), held = std::exp(std::fmin(log_rho, s.log_ratio_clip));
  if (s.correction == Correction::token_tis) return std::fmin(held, s.correction_high);
  return rho >= s.correction_low && rho <= s.correction_high ? held : 0.0;
}

}  // namespace

double token_coefficient(const TokenSettings& s, double logp, double advantage, double policy_weight, double weight,
                         const float* old_logprob, const float* ref_logprob, const float* rollout_logprob) {
  double c = 0.0;
  if (policy_weight != 0.0 && advantage != 0.0) {
    const double base = old_logprob ? *old_logprob : logp;
    c = policy_weight * policy_slope(s, logp - base, advantage);
    if (s.correction != Correction::none) c *= correction_factor(s, base - *rollout_logprob);
  }
  if (s.kl_coef != 0.0) {
    const double diff = *ref_logprob - logp;
    c += weight * s.kl_coef * kl_slope(s, diff);
  }
  return c;
}

void loss_rows(const LogitRows& x, const LossInputs& in, const TokenSettings& s, void* grad, float* logp,
               float* entropy, uint8_t* has_grad) {
  const float k = float(kLog2e / x.temperature);
  const bool other_terms = s.kl_coef != 0.0 || s.entropy_coef != 0.0;
  const auto one_row = [&](int64_t row, Scratch& scratch) {  // false: nothing to write but zeros
    const void* z = row_of(x, row);
    const int64_t id = x.target_ids[row];
    const RowStats r = isa().table->stats(z, x.bfloat16, x.vocabulary, k, grad ? scratch.exponentials() : nullptr,
                                          scratch.block_max());
    const double log2_sum = std::log2(r.sum);
    const double target = in_shard(x, id) ? (element(x, z, id) - r.maximum) * double(k) : kNan;
    const double lp = kLn2 * (target - log2_sum), h = kLn2 * (log2_sum - r.weighted / r.sum);
    if (!std::isfinite(float(lp)) || !std::isfinite(h)) {  // as the caller will see them
      logp[row] = entropy[row] = float(kNan);
      return false;
    }
    logp[row] = float(lp);
    entropy[row] = float(h);
    if (!grad) return true;
    const auto at = [row](const float* p) { return p ? p + row : nullptr; };
    const double c = token_coefficient(s, lp, in.advantages[row], in.policy_weight[row], in.weight[row],
                                       at(in.old_logprobs), at(in.ref_logprobs), at(in.rollout_logprobs));
    const double e = -s.entropy_coef * in.weight[row];
    if (c == 0.0 && e == 0.0) return false;
    const RowScale scale{k, r.maximum, log2_sum, float(c / x.temperature), float(e / x.temperature), float(h)};
    write_gradient(x, z, scale, id, lp, scratch.exponentials(), scratch.block_max(), row_of(x, grad, row));
    has_grad[row] = 1;
    return true;
  };
  parallel_for(x.rows, kGrain, x.threads, [&] {
    return [&, scratch = Scratch(x.vocabulary)](int64_t begin, int64_t end) mutable {
      for (int64_t row = begin; row < end; ++row) {
        logp[row] = entropy[row] = 0.0f;
        has_grad[row] = 0;
        const bool active =
            (in.policy_weight[row] != 0.0f && in.advantages[row] != 0.0f) || (other_terms && in.weight[row] != 0.0f);
        if (!active || !one_row(row, scratch)) zero_row(x, grad, row);
      }
    };
  });
}

void row_partials(const LogitRows& x, const uint8_t* active, float* maximum, float* sum, float* weighted,
                  float* target) {
  const float k = float(kLog2e / x.temperature);
  parallel_for(x.rows, kGrain, x.threads, [&] {
    return [&, scratch = Scratch(x.vocabulary)](int64_t begin, int64_t end) mutable {
      for (int64_t row = begin; row < end; ++row) {
        if (active && !active[row]) {
          maximum[row] = weighted[row] = target[row] = 0.0f;
          sum[row] = 1.0f;
          continue;
        }
        const void* z = row_of(x, row);
        const RowStats r = isa().table->stats(z, x.bfloat16, x.vocabulary, k, nullptr, scratch.block_max());
        const int64_t id = x.target_ids[row];
        maximum[row] = r.maximum;
        sum[row] = float(r.sum);
        weighted[row] = float(kLn2 * r.weighted);
        target[row] = float(in_shard(x, id) ? element(x, z, id) : -kInfinity);
      }
    };
  });
}

void row_gradients(const LogitRows& x, const RowCoefficients& in, void* grad) {
  const float k = float(kLog2e / x.temperature);
  const auto one_row = [&](int64_t row) {
    const double log2_sum = std::log2(double(in.sum[row])), entropy = in.entropy[row];
    const double c = in.c[row], e = in.e[row], m = in.maximum[row];
    if ((c == 0.0 && e == 0.0) || !std::isfinite(log2_sum) || !std::isfinite(m)) return zero_row(x, grad, row);
    const void* z = row_of(x, row);
    const int64_t id = x.target_ids[row];
    const RowScale scale{
        k, in.maximum[row], log2_sum, float(c / x.temperature), float(e / x.temperature), float(entropy)};
    const double logp = in_shard(x, id) ? kLn2 * ((element(x, z, id) - m) * double(k) - log2_sum) : 0.0;
    write_gradient(x, z, scale, id, logp, nullptr, nullptr, row_of(x, grad, row));
  };
  parallel_for(x.rows, kGrain, x.threads, [&] {
    return [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) one_row(row);
    };
  });
}

const char* active_isa() { return isa().name; }

void use_isa(const char* name) {
  for (const Isa& candidate : kIsas) {
    if (std::string_view(name) == candidate.name) {
      MGRPO_CHECK(candidate.supported(), "isa: this machine has no ", name);
      current_isa.store(&candidate);
      return;
    }
  }
  MGRPO_CHECK(std::string_view(name) == "auto", "isa: ", name, " is not one of auto, avx512, avx2, scalar");
  current_isa.store(best_isa());
}

}  // namespace mgrpo
