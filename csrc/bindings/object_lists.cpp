// Lists of Python objects, gone through natively: steps over thousands of parameters do so.
// SPDX-License-Identifier: MIT
#include "bindings/object_lists.h"

namespace py = pybind11;

namespace bnb {
namespace {

// Reads one attribute of many objects. What the attribute is gets looked up once for objects of the
// same type in a row, where an object itself has no say in it.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(name) {}

  // A new reference, or null with an exception.
  PyObject* of(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    if (reinterpret_cast<PyObject*>(type) != type_.ptr()) look_up(type);
    if (!getset_) return PyObject_GetAttr(object, name_.ptr());
    return Py_TYPE(getset_.ptr())->tp_descr_get(getset_.ptr(), object, type_.ptr());
  }

 private:
  void look_up(PyTypeObject* type) {
    type_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
    getset_ = py::object();
    if (type->tp_getattro != PyObject_GenericGetAttr) return;
    auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(type_.ptr(), name_.ptr()));
    if (!found) PyErr_Clear();
    // Such a descriptor goes before what an object holds under that name.
    if (found && Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type)) getset_ = std::move(found);
  }

  py::str name_;
  py::object type_;    // of the object before
  py::object getset_;  // its attribute, if that is one of C
};

py::list gradients(const py::list& params) {
  Attribute attribute("grad");
  py::list grads(params.size());
  // A property of a subclass may change the list: its length is asked for each time.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    const auto param = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params.ptr(), i));
    PyObject* grad = attribute.of(param.ptr());
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
