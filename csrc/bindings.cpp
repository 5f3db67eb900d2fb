// mgrpo._C: with the other bind files the only one that knows Python. One register line per unit; no logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "assemble.hpp"
#include "batcher.hpp"
#include "bind_arrays.hpp"
#include "check.hpp"
#include "draw.hpp"
#include "pack.hpp"
#include "philox.hpp"
#include "plan.hpp"
#include "state.hpp"

namespace py = pybind11;
using namespace py::literals;

void register_plan(py::module_& m);   // bind_plan.cpp
void register_loss(py::module_& m);   // bind_loss.cpp
void register_patch(py::module_& m);  // bind_patch.cpp
void register_tree(py::module_& m);   // bind_tree.cpp

namespace {

using Released = py::call_guard<py::gil_scoped_release>;

void register_philox(py::module_& m) {
  m.def("philox4x32_10", &mgrpo::philox4x32_10, py::arg("counter"), py::arg("key"),
        "One Philox4x32-10 block: counter u32[4], key u32[2] -> u32[4].");
}

template <typename T>
std::string describe(const py::array& a) {
  return mgrpo::concat(std::string(py::str(a.dtype())), " of ", a.ndim(), " dimensions",
                       (a.flags() & py::array::c_style) ? "" : ", not C-contiguous", "; expected C-contiguous ",
                       std::string(py::str(py::dtype::of<T>())));
}

template <typename T>
bool fits(const py::object& object, int ndim) {
  if (!py::isinstance<py::array_t<T>>(object)) return false;
  const auto a = py::reinterpret_borrow<py::array>(object);
  return a.ndim() == ndim && (a.flags() & py::array::c_style);
}

template <typename T>
std::string complaint(const char* name, const py::object& object) {
  if (!py::isinstance<py::array>(object)) return mgrpo::concat(name, " is not a numpy array");
  return mgrpo::concat(name, " is ", describe<T>(py::reinterpret_borrow<py::array>(object)));
}

template <typename T>
bool is_aligned(const py::array& a) {
  return reinterpret_cast<uintptr_t>(a.data()) % alignof(T) == 0;
}

// Inputs may be slices of a file or of a message, which begin at any byte; those are copied once. `Inputs` keeps what the
// pointers point into alive.
using Inputs = std::vector<py::array>;

template <typename T>
const T* data_of(const py::array& a, Inputs& inputs) {
  inputs.push_back(is_aligned<T>(a) ? a : py::array(a.attr("copy")()));
  return static_cast<const T*>(inputs.back().data());
}

// The data of a 1-d input column of one trajectory, whose names go into the error.
template <typename T>
const T* column(const py::object& object, const char* name, const mgrpo::TrajectoryView& t, int64_t& n,
                Inputs& inputs) {
  if (!fits<T>(object, 1))
    throw mgrpo::BatcherError("dtype", std::string(t.query), t.rollout, t.id, complaint<T>(name, object));
  const auto a = py::reinterpret_borrow<py::array>(object);
  n = a.shape(0);
  return data_of<T>(a, inputs);
}

template <typename T>
const T* batch_column(const py::object& object, const char* name, int64_t n, Inputs& inputs) {
  if (!fits<T>(object, 1)) throw py::type_error(complaint<T>(name, object));
  const auto a = py::reinterpret_borrow<py::array>(object);
  if (n >= 0 && a.shape(0) != n)
    throw py::value_error(mgrpo::concat(name, " has ", a.shape(0), " values, expected ", n));
  return data_of<T>(a, inputs);
}

// One named output buffer. Absent and optional: null. `shape` entries < 0 are set from the buffer, others must match.
template <typename T>
T* output(const py::dict& out, const char* name, bool required, std::vector<int64_t*> shape) {
  if (!out.contains(name)) {
    if (required) throw py::key_error(mgrpo::concat("out has no buffer '", name, "'"));
    return nullptr;
  }
  const py::object object = out[name];
  if (!fits<T>(object, int(shape.size()))) throw py::type_error(complaint<T>(name, object));
  auto a = py::reinterpret_borrow<py::array>(object);
  if (!a.writeable()) throw py::value_error(mgrpo::concat("output buffer '", name, "' is read-only"));
  if (!is_aligned<T>(a))
    throw py::value_error(mgrpo::concat("output buffer '", name, "' begins at an address that is not a multiple of ",
                                        alignof(T), " bytes (Plan.buffers() makes aligned ones)"));
  for (size_t i = 0; i < shape.size(); ++i) {
    if (*shape[i] < 0) *shape[i] = a.shape(py::ssize_t(i));
    if (*shape[i] != a.shape(py::ssize_t(i)))
      throw py::value_error(mgrpo::concat("output buffer '", name, "' has ", a.shape(py::ssize_t(i)),
                                          " entries in dimension ", i, ", expected ", *shape[i]));
  }
  return static_cast<T*>(a.mutable_data());
}

void reject_unknown(const py::dict& out, const std::vector<std::string>& known) {
  for (const auto& [key, value] : out)
    if (std::find(known.begin(), known.end(), py::cast<std::string>(key)) == known.end())
      throw py::key_error("out has an unknown buffer '" + py::cast<std::string>(key) + "'");
}

void write_packed(const mgrpo::Batcher& batcher, const mgrpo::Plan& plan, int rank, const py::dict& out) {
  reject_unknown(out, {"ids", "loss_mask", "logprobs", "advantages", "position_ids", "cu_seqlens", "n_seg",
                       "max_seqlen", "seg_advantage", "seg_weight", "seg_traj", "seg_row"});
  mgrpo::PackedBuffers b;
  b.n_mb = b.capacity = b.segments = -1;
  b.ids = output<int32_t>(out, "ids", true, {&b.n_mb, &b.capacity});
  b.seg_weight = output<float>(out, "seg_weight", true, {&b.n_mb, &b.segments});
  b.loss_mask = output<uint8_t>(out, "loss_mask", false, {&b.n_mb, &b.capacity});
  b.logprobs = output<float>(out, "logprobs", false, {&b.n_mb, &b.capacity});
  b.advantages = output<float>(out, "advantages", false, {&b.n_mb, &b.capacity});
  b.position_ids = output<int32_t>(out, "position_ids", false, {&b.n_mb, &b.capacity});
  int64_t bounds = b.segments + 2;
  b.cu_seqlens = output<int32_t>(out, "cu_seqlens", false, {&b.n_mb, &bounds});
  b.n_seg = output<int32_t>(out, "n_seg", false, {&b.n_mb});
  b.max_seqlen = output<int32_t>(out, "max_seqlen", false, {&b.n_mb});
  b.seg_advantage = output<float>(out, "seg_advantage", false, {&b.n_mb, &b.segments});
  b.seg_traj = output<int64_t>(out, "seg_traj", false, {&b.n_mb, &b.segments});
  b.seg_row = output<int32_t>(out, "seg_row", false, {&b.n_mb, &b.segments});
  const py::gil_scoped_release released;
  mgrpo::write_packed(batcher, plan, rank, b);
}

void write_padded(const mgrpo::Batcher& batcher, const mgrpo::Plan& plan, int rank, int micro_batch,
                  const py::dict& out) {
  reject_unknown(out, {"ids", "loss_mask", "logprobs", "advantages", "lengths", "seg_advantage", "seg_weight",
                       "seg_traj", "seg_row"});
  mgrpo::PaddedBuffers b;
  b.rows = b.width = -1;
  b.ids = output<int32_t>(out, "ids", true, {&b.rows, &b.width});
  b.loss_mask = output<uint8_t>(out, "loss_mask", false, {&b.rows, &b.width});
  b.logprobs = output<float>(out, "logprobs", false, {&b.rows, &b.width});
  b.advantages = output<float>(out, "advantages", false, {&b.rows, &b.width});
  b.lengths = output<int32_t>(out, "lengths", false, {&b.rows});
  b.seg_advantage = output<float>(out, "seg_advantage", false, {&b.rows});
  b.seg_weight = output<float>(out, "seg_weight", false, {&b.rows});
  b.seg_traj = output<int64_t>(out, "seg_traj", false, {&b.rows});
  b.seg_row = output<int32_t>(out, "seg_row", false, {&b.rows});
  const mgrpo::PaddedLayout& layout = plan.padded();
  const py::gil_scoped_release released;
  mgrpo::write_padded(batcher, plan, layout, rank, micro_batch, b);
}

py::dict pack_dict(const mgrpo::Packing& p) {
  return py::dict("n_mb"_a = p.n_mb, "offsets"_a = to_numpy(p.offsets), "items"_a = to_numpy(p.items),
                  "rank_cost"_a = to_numpy(p.rank_cost), "lockstep"_a = p.lockstep, "efficiency"_a = p.efficiency);
}

void register_pack(py::module_& m) {
  m.def(
      "pack",
      [](const py::object& lengths, int64_t capacity, int dp, double cost_a, double cost_b, int max_segments) {
        Inputs inputs;
        const int32_t* data = batch_column<int32_t>(lengths, "lengths", -1, inputs);
        const std::span<const int32_t> view(data, size_t(py::len(lengths)));
        mgrpo::Packing packing;
        {
          const py::gil_scoped_release released;
          packing = mgrpo::pack(view, {capacity, dp, cost_a, cost_b, max_segments});
        }
        return pack_dict(packing);
      },
      "lengths"_a, "capacity"_a, "dp"_a = 1, "cost_a"_a = 1.0, "cost_b"_a = 0.0, "max_segments"_a = 0);
}

mgrpo::TrajectoryView place(std::string_view query, int role, int64_t rollout, int64_t invocation, int64_t id) {
  mgrpo::TrajectoryView t;
  t.query = query;
  t.role = role;
  t.rollout = rollout;
  t.invocation = invocation;
  t.id = id;
  return t;
}

float number(const py::object& object, const char* name, const mgrpo::TrajectoryView& t) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw mgrpo::BatcherError("dtype", std::string(t.query), t.rollout, t.id, mgrpo::concat(name, " is no number"));
  }
  return float(value);
}

bool add(mgrpo::Batcher& batcher, const std::string& query, const std::string& role, int64_t rollout,
         int64_t invocation, int64_t traj_id, const py::object& tokens, const py::object& loss_mask,
         const py::object& logprobs, const py::object& advantage, int32_t policy_version,
         const std::vector<int64_t>& segment_starts, double now) {
  auto t = place(query, batcher.role_index(role), rollout, invocation, traj_id);
  Inputs inputs;
  t.tokens = column<int32_t>(tokens, "tokens", t, t.n_tokens, inputs);
  t.mask = column<uint8_t>(loss_mask, "loss_mask", t, t.n_mask, inputs);
  t.logprobs = column<float>(logprobs, "logprobs", t, t.n_logprobs, inputs);
  if (batcher.options().token_advantages)
    t.token_advantages = column<float>(advantage, "advantage", t, t.n_token_advantages, inputs);
  else
    t.advantage = number(advantage, "advantage", t);
  t.policy_version = policy_version;
  t.segment_starts = segment_starts;
  const py::gil_scoped_release released;
  return batcher.add(t, now);
}

int64_t add_many(mgrpo::Batcher& batcher, const std::vector<std::string>& queries, const std::string& role,
                 const py::dict& c, double now) {
  const int64_t n = int64_t(queries.size());
  Inputs inputs;
  const auto* rollout = batch_column<int32_t>(c["rollouts"], "rollouts", n, inputs);
  const auto* invocation = batch_column<int32_t>(c["invocations"], "invocations", n, inputs);
  const auto* id = batch_column<int64_t>(c["traj_ids"], "traj_ids", n, inputs);
  const auto* offset = batch_column<int64_t>(c["offsets"], "offsets", n + 1, inputs);
  const auto* tokens = batch_column<int32_t>(c["tokens"], "tokens", -1, inputs);
  const int64_t total = int64_t(py::len(c["tokens"]));
  const auto* mask = batch_column<uint8_t>(c["loss_mask"], "loss_mask", total, inputs);
  const auto* logprobs = batch_column<float>(c["logprobs"], "logprobs", total, inputs);
  const bool per_token = batcher.options().token_advantages;
  const auto* advantages = batch_column<float>(c["advantages"], "advantages", per_token ? total : n, inputs);
  const auto* version = batch_column<int32_t>(c["policy_versions"], "policy_versions", n, inputs);
  const auto segments = py::cast<std::vector<std::vector<int64_t>>>(c["segment_starts"]);
  if (!segments.empty() && int64_t(segments.size()) != n)
    throw py::value_error(mgrpo::concat("segment_starts has ", segments.size(), " entries, expected ", n));
  const int role_index = batcher.role_index(role);
  const py::gil_scoped_release released;
  int64_t fresh = 0;
  for (int64_t i = 0; i < n; ++i)
    MGRPO_CHECK(offset[i] >= 0 && offset[i] <= offset[i + 1] && offset[i + 1] <= total, "offsets[", i, "..", i + 1,
                "] = ", offset[i], ", ", offset[i + 1], " do not rise within [0, ", total, "]");
  for (int64_t i = 0; i < n; ++i) {
    auto t = place(queries[i], role_index, rollout[i], invocation[i], id[i]);
    t.tokens = tokens + offset[i];
    t.mask = mask + offset[i];
    t.logprobs = logprobs + offset[i];
    t.n_tokens = t.n_mask = t.n_logprobs = offset[i + 1] - offset[i];
    t.advantage = per_token ? 0 : advantages[i];
    t.token_advantages = per_token ? advantages + offset[i] : nullptr;
    t.n_token_advantages = t.n_tokens;
    t.policy_version = version[i];
    if (!segments.empty()) t.segment_starts = segments[i];
    fresh += batcher.add(t, now);
  }
  return fresh;
}

py::dict save_state(const mgrpo::Batcher& batcher, double now) {
  mgrpo::State s;
  {
    const py::gil_scoped_release released;
    s = mgrpo::save_state(batcher, now);
  }
  return py::dict(
      "queries"_a = s.queries, "ages"_a = to_numpy(s.ages), "sealed"_a = to_numpy(s.sealed),
      "places"_a = to_numpy(s.places), "traj_ids"_a = to_numpy(s.ids), "advantages"_a = to_numpy(s.advantages),
      "policy_versions"_a = to_numpy(s.versions), "offsets"_a = to_numpy(s.offsets), "tokens"_a = to_numpy(s.tokens),
      "loss_mask"_a = to_numpy(s.loss_mask), "logprobs"_a = to_numpy(s.logprobs), "segments"_a = to_numpy(s.segments),
      "segment_starts"_a = to_numpy(s.segment_starts), "counters"_a = to_numpy(s.counters));
}

template <typename T>
std::vector<T> from_numpy(const py::dict& state, const char* name) {
  if (!state.contains(name)) throw py::value_error(mgrpo::concat("state has no column '", name, "'"));
  Inputs inputs;
  const T* data = batch_column<T>(state[name], name, -1, inputs);
  return std::vector<T>(data, data + py::len(state[name]));
}

void load_state(mgrpo::Batcher& batcher, const py::dict& state, double now) {
  mgrpo::State s;
  s.queries = py::cast<std::vector<std::string>>(state["queries"]);
  s.ages = from_numpy<double>(state, "ages");
  s.sealed = from_numpy<int32_t>(state, "sealed");
  s.places = from_numpy<int32_t>(state, "places");
  s.ids = from_numpy<int64_t>(state, "traj_ids");
  s.advantages = from_numpy<float>(state, "advantages");
  s.versions = from_numpy<int32_t>(state, "policy_versions");
  s.offsets = from_numpy<int64_t>(state, "offsets");
  s.tokens = from_numpy<int32_t>(state, "tokens");
  s.loss_mask = from_numpy<uint8_t>(state, "loss_mask");
  s.logprobs = from_numpy<float>(state, "logprobs");
  if (state.contains("segments")) {  // states of before have none
    s.segments = from_numpy<int32_t>(state, "segments");
    s.segment_starts = from_numpy<int64_t>(state, "segment_starts");
  }
  s.counters = from_numpy<int64_t>(state, "counters");
  const py::gil_scoped_release released;
  mgrpo::load_state(batcher, s, now);
}

std::unique_ptr<mgrpo::Batcher> make_batcher(const py::dict& d) {
  mgrpo::BatcherOptions o;
  o.k = py::cast<int>(d["k"]);
  o.roles = py::cast<std::vector<std::string>>(d["roles"]);
  o.d_max = py::cast<std::vector<int>>(d["d_max"]);
  o.capacity = py::cast<int64_t>(d["capacity"]);
  o.dp = py::cast<int>(d["dp"]);
  o.mode = mgrpo::parse_mode(py::cast<std::string>(d["mode"]));
  o.sequence_weight = mgrpo::parse_sequence_weight(py::cast<std::string>(d["sequence_weight"]));
  o.empty = mgrpo::parse_empty(py::cast<std::string>(d["empty"]));
  o.overlong = mgrpo::parse_overlong(py::cast<std::string>(d["overlong"]));
  o.token_advantages = py::cast<bool>(d["token_advantages"]);
  std::tie(o.cost_a, o.cost_b) = py::cast<std::pair<double, double>>(d["cost"]);
  o.max_segments = py::cast<int>(d["max_segments"]);
  o.seed = py::cast<uint64_t>(d["seed"]);
  o.threads = py::cast<int>(d["threads"]);
  o.arena_bytes = py::cast<int64_t>(d["arena_bytes"]);
  o.vocab_size = py::cast<int64_t>(d["vocab_size"]);
  o.pad_id = py::cast<int32_t>(d["pad_id"]);
  return std::make_unique<mgrpo::Batcher>(std::move(o));
}

void register_batcher(py::module_& m) {
  using mgrpo::Batcher;
  py::class_<Batcher>(m, "Batcher")
      .def(py::init(&make_batcher), "options"_a)
      .def("add", &add)
      .def("add_many", &add_many)
      .def(
          "seal",
          [](Batcher& b, const std::string& query, const std::string& role, int64_t rollout, int64_t d, double now) {
            b.seal(query, b.role_index(role), rollout, d, now);
          },
          Released())
      .def(
          "fail",
          [](Batcher& b, const std::string& query, const std::string& role, int64_t rollout, int64_t invocation,
             double now) { b.fail(query, b.role_index(role), rollout, invocation, now); },
          Released())
      .def("ready", &Batcher::ready, Released())
      .def("wait_ready", &Batcher::wait_ready, Released())
      .def(
          "drop", [](Batcher& b, const std::string& query) { return b.drop(query); }, Released())
      .def("expire", &Batcher::expire, Released())
      .def(
          "plan",
          [](const Batcher& b, uint64_t step, std::vector<std::string> names, bool skip_zero, int64_t min_saved,
             bool hold_prefixes) {
            return mgrpo::make_plan(b, step, std::move(names), {skip_zero, min_saved, hold_prefixes});
          },
          "step"_a, "queries"_a, "skip_zero"_a, "min_saved"_a = 0, "hold_prefixes"_a = false, Released())
      .def("write", &write_packed)
      .def("write_padded", &write_padded)
      .def("save_state", &save_state)
      .def("load_state", &load_state)
      .def_property_readonly("n_queries", &Batcher::n_queries)
      .def_property_readonly("used_bytes", &Batcher::used_bytes)
      .def_property_readonly("counters", [](const Batcher& b) {
        const mgrpo::Counters c = b.counters();
        return py::dict("accepted"_a = c.accepted, "redelivered"_a = c.redelivered, "overlong"_a = c.overlong,
                        "truncated"_a = c.truncated, "failed"_a = c.failed, "expired"_a = c.expired);
      });
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const mgrpo::BatcherError& e) {
      const py::object error = py::module_::import("mgrpo.errors")
                                   .attr("trajectory_error")(e.what(), e.kind, e.query, e.rollout, e.trajectory);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
  });
}

void register_draw(py::module_& m) {
  m.def(
      "multiplicities",
      [](const std::vector<int>& counts, uint64_t seed, uint64_t step, const std::string& query,
         const std::string& role, int d_max, const std::string& mode) {
        const auto key = mgrpo::draw_key(seed, query, role);
        std::vector<std::vector<int32_t>> copies;
        for (size_t k = 0; k < counts.size(); ++k)
          mgrpo::multiplicities({key, step, uint32_t(k)}, counts[k], d_max, mgrpo::parse_mode(mode),
                                copies.emplace_back());
        return copies;
      },
      "counts"_a, "seed"_a, "step"_a, "query"_a, "role"_a, "d_max"_a, "mode"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mgrpo's C++ core";
  register_philox(m);
  register_draw(m);
  register_pack(m);
  register_plan(m);
  register_batcher(m);
  register_loss(m);
  register_patch(m);
  register_tree(m);
}
