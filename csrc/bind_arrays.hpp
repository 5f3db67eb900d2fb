// What several bind files make of the core's vectors.
#pragma once

#include <pybind11/numpy.h>

#include <vector>

template <typename T>
pybind11::array_t<T> to_numpy(const std::vector<T>& values, std::vector<pybind11::ssize_t> shape = {}) {
  if (shape.empty()) shape = {pybind11::ssize_t(values.size())};
  return pybind11::array_t<T>(shape, values.data());
}
