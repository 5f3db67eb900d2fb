// The Python face of the loss rows and the group advantage: addresses and codes are checked here, and nothing else is
// done.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "check.hpp"
#include "group_advantage.hpp"
#include "loss_rows.hpp"

namespace py = pybind11;

namespace {

// Tensors come as addresses (torch's data_ptr), because bfloat16 has no numpy type. Their shapes and dtypes are
// mgrpo/ops/native.py's to check; what can be seen of an address is checked here.
using Address = std::uintptr_t;

template <typename T>
T* maybe(const char* name, Address address) {  // 0: absent
  MGRPO_CHECK(address % alignof(T) == 0, name, ": address ", address, " is not a multiple of ", alignof(T));
  return reinterpret_cast<T*>(address);
}

template <typename T>
T* at(const char* name, Address address, int64_t n) {
  MGRPO_CHECK(address != 0 || n == 0, name, ": no address for ", n, " values");
  return maybe<T>(name, address);
}

void* logits_at(const char* name, Address address, bool bfloat16, int64_t n) {
  if (bfloat16) return at<uint16_t>(name, address, n);
  return at<float>(name, address, n);
}

// The member of an enumeration whose codes run from `first` to `last`.
template <typename E>
E member(const char* name, int code, E first, E last) {
  MGRPO_CHECK(code >= int(first) && code <= int(last), name, ": code ", code, " is not in [", int(first), ", ",
              int(last), "]");
  return E(code);
}

double number(const char* name, double x) {
  MGRPO_CHECK(!std::isnan(x), name, ": NaN");
  return x;
}

mgrpo::LogitRows logit_rows(Address logits, bool bfloat16, int64_t rows, int64_t vocabulary, int64_t stride,
                            Address target_ids, double temperature, int threads) {
  MGRPO_CHECK(rows >= 0, "rows: ", rows, " is below 0");
  MGRPO_CHECK(vocabulary > 0 || rows == 0, "vocabulary: ", vocabulary, " is not above 0");
  MGRPO_CHECK(stride >= vocabulary, "stride: ", stride, " is below the vocabulary, ", vocabulary);
  MGRPO_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: ", temperature,
              " is not above 0 and finite");
  MGRPO_CHECK(threads > 0, "threads: ", threads, " is not above 0");
  return {logits_at("logits", logits, bfloat16, rows), bfloat16,    rows,   vocabulary, stride,
          at<int64_t>("target_ids", target_ids, rows), temperature, threads};
}

}  // namespace

void register_loss(py::module_& m) {
  using namespace mgrpo;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<LogitRows>(m, "LogitRows", "Rows of logits at an address, with their target ids.")
      .def(py::init(&logit_rows), py::kw_only(), py::arg("logits"), py::arg("bfloat16"), py::arg("rows"),
           py::arg("vocabulary"), py::arg("stride"), py::arg("target_ids"), py::arg("temperature"), py::arg("threads"));
  py::class_<TokenSettings>(m, "TokenSettings", "The scalar settings of the token loss.")
      .def(py::init([](int term, double clip_eps_low, double clip_eps_high, double delta, double log_ratio_clip,
                       double sapo_pos, double sapo_neg, double kl_coef, int kl_estimator, double entropy_coef,
                       int correction, double correction_low, double correction_high) {
             return TokenSettings{member("term", term, Term::clipped, Term::sapo),
                                  number("clip_eps_low", clip_eps_low),
                                  number("clip_eps_high", clip_eps_high),
                                  number("delta", delta),
                                  number("log_ratio_clip", log_ratio_clip),
                                  number("sapo_temperature_pos", sapo_pos),
                                  number("sapo_temperature_neg", sapo_neg),
                                  number("kl_coef", kl_coef),
                                  member("kl_estimator", kl_estimator, KlEstimator::k1, KlEstimator::k3),
                                  number("entropy_coef", entropy_coef),
                                  member("correction", correction, Correction::none, Correction::mis),
                                  number("correction_low", correction_low),
                                  number("correction_high", correction_high)};
           }),
           py::kw_only(), py::arg("term"), py::arg("clip_eps_low"), py::arg("clip_eps_high"), py::arg("delta"),
           py::arg("log_ratio_clip"), py::arg("sapo_temperature_pos"), py::arg("sapo_temperature_neg"),
           py::arg("kl_coef"), py::arg("kl_estimator"), py::arg("entropy_coef"), py::arg("correction"),
           py::arg("correction_low"), py::arg("correction_high"));
  m.def(
      "loss_rows",
      [](const LogitRows& x, const std::array<Address, 6>& in, const TokenSettings& s, Address grad, Address logp,
         Address entropy, Address has_grad) {
        const LossInputs inputs{at<float>("policy_weight", in[0], x.rows), at<float>("weight", in[1], x.rows),
                                at<float>("advantages", in[2], x.rows),    maybe<float>("old_logprobs", in[3]),
                                maybe<float>("ref_logprobs", in[4]),       maybe<float>("rollout_logprobs", in[5])};
        MGRPO_CHECK(s.kl_coef == 0.0 || inputs.ref_logprobs || !x.rows, "ref_logprobs: missing, with kl_coef ",
                    s.kl_coef);
        MGRPO_CHECK(s.correction == Correction::none || inputs.rollout_logprobs || !x.rows,
                    "rollout_logprobs: missing, with correction ", int(s.correction));
        loss_rows(x, inputs, s, grad ? logits_at("grad", grad, x.bfloat16, x.rows) : nullptr,
                  at<float>("logp", logp, x.rows), at<float>("entropy", entropy, x.rows),
                  at<uint8_t>("has_grad", has_grad, x.rows));
      },
      py::arg("rows"), py::arg("inputs"), py::arg("settings"), py::arg("grad"), py::arg("logp"), py::arg("entropy"),
      py::arg("has_grad"), unlocked,
      "inputs: addresses of policy_weight, weight, advantages, old, ref and rollout log-probs (0: absent).");
  m.def(
      "row_partials",
      [](const LogitRows& x, Address active, Address maximum, Address sum, Address weighted, Address target) {
        row_partials(x, maybe<uint8_t>("active", active), at<float>("maximum", maximum, x.rows),
                     at<float>("sum", sum, x.rows), at<float>("weighted", weighted, x.rows),
                     at<float>("target", target, x.rows));
      },
      py::arg("rows"), py::arg("active"), py::arg("maximum"), py::arg("sum"), py::arg("weighted"), py::arg("target"),
      unlocked, "Partial softmax statistics of each row (see loss_rows.hpp).");
  m.def(
      "row_gradients",
      [](const LogitRows& x, const std::array<Address, 5>& in, Address grad) {
        const RowCoefficients coefficients{at<float>("maximum", in[0], x.rows), at<float>("sum", in[1], x.rows),
                                           at<float>("entropy", in[2], x.rows), at<float>("c", in[3], x.rows),
                                           at<float>("e", in[4], x.rows)};
        row_gradients(x, coefficients, logits_at("grad", grad, x.bfloat16, x.rows));
      },
      py::arg("rows"), py::arg("inputs"), py::arg("grad"), unlocked,
      "inputs: addresses of maximum, sum, entropy, d loss / d logp, d loss / d entropy.");
  m.def(
      "group_advantage",
      [](Address rewards, Address group_id, Address weight, int64_t n, int estimator, double eps, bool unbiased,
         Address out) {
        MGRPO_CHECK(n >= 0, "n: ", n, " is below 0");
        MGRPO_CHECK(eps >= 0, "eps: ", eps, " is not at least 0");
        group_advantage(at<float>("rewards", rewards, n), at<int32_t>("group_id", group_id, n),
                        maybe<float>("weight", weight), n,
                        member("estimator", estimator, AdvantageEstimator::grpo, AdvantageEstimator::batch), eps,
                        unbiased, at<float>("out", out, n));
      },
      py::arg("rewards"), py::arg("group_id"), py::arg("weight"), py::arg("n"), py::arg("estimator"), py::arg("eps"),
      py::arg("unbiased"), py::arg("out"), unlocked, "Group-relative advantages; weight 0 means none.");
  m.def("active_isa", &active_isa, "Instruction set of the loss rows on this machine: avx512, avx2 or scalar.");
  m.def("use_isa", &use_isa, py::arg("name"), "Pin the instruction set (auto: the best there is), for tests.");
}
