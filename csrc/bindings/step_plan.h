// Optimizer steps by a plan: reads parameters and gradients of Python without a torch op.
// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

namespace bnb {

// Adds the class StepPlan to the module.
void define_step_plan(pybind11::module_& m);

}  // namespace bnb
