// Lists of Python objects, gone through natively.
// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

namespace bnb {

// Adds functions over lists to the module.
void define_object_lists(pybind11::module_& m);

}  // namespace bnb
