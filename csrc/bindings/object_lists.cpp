// Lists of Python objects, gone through natively: steps over thousands of parameters do so.
// SPDX-License-Identifier: MIT
#include "bindings/object_lists.h"

namespace py = pybind11;

namespace bnb {
namespace {

py::list gradients(const py::list& params) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  py::list grads(params.size());
  // A property of a subclass may change the list: its length is asked for each time.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    const auto param = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params.ptr(), i));
    PyObject* grad = PyObject_GetAttr(param.ptr(), name);
    if (grad == nullptr) throw py::error_already_set();
    if (i < PyList_GET_SIZE(grads.ptr())) {
      PyList_SetItem(grads.ptr(), i, grad);
    } else {
      grads.append(py::reinterpret_steal<py::object>(grad));
    }
  }
  return grads;
}

bool all_are(const py::list& a, const py::list& b) {
  const Py_ssize_t count = PyList_GET_SIZE(a.ptr());
  if (PyList_GET_SIZE(b.ptr()) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  }
  return true;
}

bool holds_none(const py::list& objects) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects.ptr()); ++i) {
    if (PyList_GET_ITEM(objects.ptr(), i) == Py_None) return true;
  }
  return false;
}

}  // namespace

void define_object_lists(py::module_& m) {
  m.def("gradients", &gradients, py::arg("params"), "The attribute `grad` of each.");
  m.def("all_are", &all_are, py::arg("a"), py::arg("b"),
        "Whether two lists hold the same objects.");
  m.def("holds_none", &holds_none, py::arg("objects"), "Whether one of them is None.");
}

}  // namespace bnb
