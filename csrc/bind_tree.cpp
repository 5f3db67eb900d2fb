// The prefix tree of right-padded rows for Python.
#include <pybind11/pybind11.h>

#include "bind_arrays.hpp"
#include "check.hpp"
#include "prefix_tree.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Ids = py::array_t<int64_t, py::array::c_style>;

py::dict tree_of(const Ids& ids, const Ids& lengths, int64_t min_saved) {
  MGRPO_CHECK(ids.ndim() == 2, "ids have ", ids.ndim(), " dimensions, expected 2");
  MGRPO_CHECK(lengths.ndim() == 1 && lengths.shape(0) == ids.shape(0), "lengths have ", lengths.size(),
              " values, expected one for each of the ", ids.shape(0), " rows of ids");
  const int64_t rows = ids.shape(0), width = ids.shape(1);
  std::vector<const int64_t*> tokens;
  std::vector<int32_t> sizes;
  tokens.reserve(size_t(rows));
  sizes.reserve(size_t(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t length = lengths.data()[r];
    MGRPO_CHECK(length >= 1 && length <= width, "row ", r, " has length ", length, ", which is outside [1, ", width,
                "]");
    tokens.push_back(ids.data() + r * width);
    sizes.push_back(int32_t(length));
  }
  mgrpo::PrefixTree tree;
  {
    const py::gil_scoped_release released;
    tree = mgrpo::prefix_tree<int64_t>({tokens, sizes}, min_saved);
  }
  return py::dict("row"_a = to_numpy(tree.row), "begin"_a = to_numpy(tree.begin), "end"_a = to_numpy(tree.end),
                  "parent"_a = to_numpy(tree.parent), "stop"_a = to_numpy(tree.stop), "leaf"_a = to_numpy(tree.leaf),
                  "lengths"_a = to_numpy(sizes));
}

}  // namespace

void register_tree(py::module_& m) {
  m.def("prefix_tree", &tree_of, py::arg("ids").noconvert(), py::arg("lengths").noconvert(), "min_saved"_a);
}
