// The Python face of the loss rows and the group advantage. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "group_advantage.hpp"
#include "loss_rows.hpp"

namespace py = pybind11;

namespace {

// Tensors come as addresses (torch's data_ptr), because bfloat16 has no numpy type; mgrpo/ops/native.py checks them.
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void register_loss(py::module_& m) {
  using namespace mgrpo;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<LogitRows>(m, "LogitRows", "Rows of logits at an address, with their target ids.")
      .def(py::init([](Address logits, bool bfloat16, int64_t rows, int64_t vocabulary, int64_t stride,
                       Address target_ids, double temperature, int threads) {
             return LogitRows{at<void>(logits),       bfloat16,    rows,   vocabulary, stride,
                              at<int64_t>(target_ids), temperature, threads};
           }),
           py::kw_only(), py::arg("logits"), py::arg("bfloat16"), py::arg("rows"), py::arg("vocabulary"),
           py::arg("stride"), py::arg("target_ids"), py::arg("temperature"), py::arg("threads"));
  py::class_<TokenSettings>(m, "TokenSettings", "The scalar settings of the token loss.")
      .def(py::init([](int loss_type, double clip_eps_low, double clip_eps_high, double delta, double sapo_pos,
                       double sapo_neg, double kl_coef, int kl_estimator, double entropy_coef, int correction,
                       double correction_low, double correction_high) {
             return TokenSettings{LossType(loss_type), clip_eps_low,   clip_eps_high,  delta,
                                  sapo_pos,            sapo_neg,       kl_coef,        kl_estimator,
                                  entropy_coef,        Correction(correction), correction_low, correction_high};
           }),
           py::kw_only(), py::arg("loss_type"), py::arg("clip_eps_low"), py::arg("clip_eps_high"), py::arg("delta"),
           py::arg("sapo_temperature_pos"), py::arg("sapo_temperature_neg"), py::arg("kl_coef"),
           py::arg("kl_estimator"), py::arg("entropy_coef"), py::arg("correction"), py::arg("correction_low"),
           py::arg("correction_high"));
  m.def(
      "loss_rows",
      [](const LogitRows& x, const std::array<Address, 6>& in, const TokenSettings& settings, Address grad,
         Address logp, Address entropy, Address moved) {
        loss_rows(x,
                  {at<float>(in[0]), at<float>(in[1]), at<float>(in[2]), at<float>(in[3]), at<float>(in[4]),
                   at<float>(in[5])},
                  settings, at<void>(grad), at<float>(logp), at<float>(entropy), at<uint8_t>(moved));
      },
      py::arg("rows"), py::arg("inputs"), py::arg("settings"), py::arg("grad"), py::arg("logp"), py::arg("entropy"),
      py::arg("moved"), unlocked,
      "inputs: addresses of policy_weight, weight, advantages, old, ref and rollout log-probs (0: absent).");
  m.def(
      "row_partials",
      [](const LogitRows& x, Address live, Address maximum, Address sum, Address weighted, Address target) {
        row_partials(x, at<uint8_t>(live), at<float>(maximum), at<float>(sum), at<float>(weighted), at<float>(target));
      },
      py::arg("rows"), py::arg("live"), py::arg("maximum"), py::arg("sum"), py::arg("weighted"), py::arg("target"), unlocked,
      "Partial softmax statistics of each row (see loss_rows.hpp).");
  m.def(
      "row_gradients",
      [](const LogitRows& x, const std::array<Address, 5>& in, Address grad) {
        row_gradients(x, {at<float>(in[0]), at<float>(in[1]), at<float>(in[2]), at<float>(in[3]), at<float>(in[4])},
                      at<void>(grad));
      },
      py::arg("rows"), py::arg("inputs"), py::arg("grad"), unlocked,
      "inputs: addresses of maximum, sum, entropy, d loss / d logp, d loss / d entropy.");
  m.def(
      "group_advantage",
      [](Address rewards, Address group_id, Address weight, int64_t n, int estimator, double eps, Address out) {
        group_advantage(at<float>(rewards), at<int32_t>(group_id), at<float>(weight), n, AdvantageEstimator(estimator), eps,
                        at<float>(out));
      },
      py::arg("rewards"), py::arg("group_id"), py::arg("weight"), py::arg("n"), py::arg("estimator"), py::arg("eps"),
      py::arg("out"), unlocked, "Group-relative advantages; weight 0 means none.");
  m.def("active_isa", &active_isa, "Instruction set of the loss rows on this machine: avx512, avx2 or scalar.");
  m.def("use_isa", &use_isa, py::arg("name"), "Pin the instruction set (auto: the best there is), for tests.");
}
