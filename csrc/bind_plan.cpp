// A plan's attributes for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_arrays.hpp"
#include "plan.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

// One column of the plan's rows as an array.
template <typename T, typename Get>
py::array_t<T> row_column(const mgrpo::Plan& plan, Get get) {
  py::array_t<T> column(py::ssize_t(plan.rows.size()));
  T* to = column.mutable_data();
  for (const mgrpo::PlanRow& row : plan.rows) *to++ = T(get(row));
  return column;
}

py::dict plan_rows(const mgrpo::Plan& plan) {
  using Row = mgrpo::PlanRow;
  return py::dict("group"_a = row_column<int32_t>(plan, [](const Row& r) { return r.group; }),
                  "rollout"_a = row_column<int32_t>(plan, [](const Row& r) { return r.rollout; }),
                  "invocation"_a = row_column<int32_t>(plan, [](const Row& r) { return r.invocation; }),
                  "segment"_a = row_column<int32_t>(plan, [](const Row& r) { return r.segment; }),
                  "multiplicity"_a = row_column<int32_t>(plan, [](const Row& r) { return r.multiplicity; }),
                  "length"_a = row_column<int32_t>(plan, [](const Row& r) { return r.length; }),
                  "active"_a = row_column<int32_t>(plan, [](const Row& r) { return r.active; }),
                  "policy_version"_a = row_column<int32_t>(plan, [](const Row& r) { return r.policy_version; }),
                  "weight"_a = row_column<double>(plan, [](const Row& r) { return r.weight; }),
                  "advantage"_a = row_column<float>(plan, [](const Row& r) { return r.advantage; }),
                  "has_gradient"_a = row_column<bool>(plan, [](const Row& r) { return r.has_gradient; }),
                  "traj_id"_a = row_column<int64_t>(plan, [](const Row& r) { return r.id; }));
}

}  // namespace

void register_plan(py::module_& m) {
  using mgrpo::Plan;
  py::class_<Plan>(m, "Plan")
      .def_readonly("step", &Plan::step)
      .def_readonly("dp", &Plan::dp)
      .def_readonly("capacity", &Plan::capacity)
      .def_readonly("max_segments", &Plan::max_segments)
      .def_readonly("tokens", &Plan::tokens)
      .def_readonly("queries", &Plan::queries)
      .def_property_readonly("n_mb", [](const Plan& p) { return p.packing.n_mb; })
      .def_property_readonly("n_padded", [](const Plan& p) { return p.padded().n_mb; })
      .def_property_readonly("lockstep", [](const Plan& p) { return p.packing.lockstep; })
      .def_property_readonly("efficiency", [](const Plan& p) { return p.packing.efficiency; })
      .def_property_readonly("rank_cost", [](const Plan& p) { return to_numpy(p.packing.rank_cost); })
      .def_property_readonly("bin_offsets", [](const Plan& p) { return to_numpy(p.packing.offsets); })
      .def_property_readonly("bin_items", [](const Plan& p) { return to_numpy(p.packing.items); })
      .def_property_readonly("padded_offsets", [](const Plan& p) { return to_numpy(p.padded().offsets); })
      .def_property_readonly("padded_items", [](const Plan& p) { return to_numpy(p.padded().items); })
      .def_property_readonly("padded_width", [](const Plan& p) { return to_numpy(p.padded().width); })
      .def_readonly("shared_tokens", &Plan::shared_tokens)
      .def_property_readonly("row_shared", [](const Plan& p) { return to_numpy(p.row_shared); })
      .def_property_readonly("padded_prefix", [](const Plan& p) { return to_numpy(p.padded().prefix); })
      .def_property_readonly("padded_prefix_id", [](const Plan& p) { return to_numpy(p.padded().prefix_id); })
      .def_property_readonly("item_row", [](const Plan& p) { return to_numpy(p.item_row); })
      .def_property_readonly("item_weight", [](const Plan& p) { return to_numpy(p.item_weight); })
      .def_property_readonly("group_query", [](const Plan& p) { return to_numpy(p.group_query); })
      .def_property_readonly("group_role", [](const Plan& p) { return to_numpy(p.group_role); })
      .def_property_readonly("group_rollouts", [](const Plan& p) { return to_numpy(p.group_rollouts); })
      .def_property_readonly("rows", &plan_rows)
      .def_property_readonly(
          "slots", [](const Plan& p) { return to_numpy(p.slots, {py::ssize_t(p.group_query.size()), p.k, p.depth}); });
}
