// The Python face of weight patches: buffers of bytes in, arrays of bytes out; the lengths are checked here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "check.hpp"
#include "weight_patch.hpp"

namespace py = pybind11;

namespace {

struct Bytes {
  py::buffer_info info;

  Bytes(const char* name, const py::buffer& buffer, bool writable = false) : info(buffer.request(writable)) {
    MGRPO_CHECK(info.itemsize == 1 && info.ndim == 1 && (info.size < 2 || info.strides[0] == 1), name,
                ": expected contiguous bytes");
  }
  uint8_t* data() const { return static_cast<uint8_t*>(info.ptr); }
  size_t size() const { return size_t(info.size); }
};

size_t elements_of(const char* name, size_t bytes, size_t itemsize) {
  MGRPO_CHECK(itemsize != 0 && bytes % itemsize == 0, name, ": ", bytes, " bytes are no multiple of ", itemsize);
  return bytes / itemsize;
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(py::ssize_t(values.size()), values.data());
}

py::object xor_sparse(const py::buffer& before, const py::buffer& after, size_t itemsize, size_t limit) {
  const Bytes old("before", before), now("after", after);
  MGRPO_CHECK(old.size() == now.size(), "before has ", old.size(), " bytes, after ", now.size());
  const size_t n = elements_of("before", old.size(), itemsize);
  std::optional<mgrpo::SparseXor> found;
  {
    py::gil_scoped_release released;
    found = mgrpo::xor_sparse(old.data(), now.data(), n, itemsize, limit);
  }
  if (!found) return py::none();
  return py::make_tuple(to_array(found->gaps), to_array(found->values));
}

py::array_t<uint8_t> xor_dense(const py::buffer& before, const py::buffer& after, size_t itemsize) {
  const Bytes old("before", before), now("after", after);
  MGRPO_CHECK(old.size() == now.size(), "before has ", old.size(), " bytes, after ", now.size());
  const size_t n = elements_of("before", old.size(), itemsize);
  py::array_t<uint8_t> out(py::ssize_t(old.size()));
  uint8_t* planes = out.mutable_data();
  py::gil_scoped_release released;
  mgrpo::xor_dense(old.data(), now.data(), n, itemsize, planes);
  return out;
}

void apply_sparse(const py::buffer& data, size_t itemsize, const py::buffer& gaps, const py::buffer& values) {
  const Bytes out("data", data, true), jumps("gaps", gaps), changes("values", values);
  const size_t n = elements_of("data", out.size(), itemsize);
  py::gil_scoped_release released;
  mgrpo::apply_sparse(out.data(), n, itemsize, jumps.data(), jumps.size(), changes.data(), changes.size());
}

void apply_dense(const py::buffer& data, size_t itemsize, const py::buffer& planes) {
  const Bytes out("data", data, true), changes("planes", planes);
  MGRPO_CHECK(out.size() == changes.size(), "data has ", out.size(), " bytes, planes ", changes.size());
  const size_t n = elements_of("data", out.size(), itemsize);
  py::gil_scoped_release released;
  mgrpo::apply_dense(out.data(), n, itemsize, changes.data());
}

py::array_t<int64_t> sparse_indices(const py::buffer& gaps, size_t n) {
  const Bytes jumps("gaps", gaps);
  std::vector<int64_t> found;
  {
    py::gil_scoped_release released;
    found = mgrpo::sparse_indices(jumps.data(), jumps.size(), n);
  }
  return to_array(found);
}

}  // namespace

void register_patch(py::module_& m) {
  m.def("xor_sparse", &xor_sparse, py::arg("before"), py::arg("after"), py::arg("itemsize"), py::arg("limit"));
  m.def("xor_dense", &xor_dense, py::arg("before"), py::arg("after"), py::arg("itemsize"));
  m.def("apply_sparse", &apply_sparse, py::arg("data"), py::arg("itemsize"), py::arg("gaps"), py::arg("values"));
  m.def("apply_dense", &apply_dense, py::arg("data"), py::arg("itemsize"), py::arg("planes"));
  m.def("sparse_indices", &sparse_indices, py::arg("gaps"), py::arg("n"));
}
