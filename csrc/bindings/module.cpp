// Python module `bitsandbytes._C`: what a torch op cannot carry: build facts, tables, registries,
// and the choice of CPU instruction set.
// SPDX-License-Identifier: MIT
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "bindings/object_lists.h"
#include "bindings/step_plan.h"
#include "bitsandbytes/code/dynamic8.h"
#include "bitsandbytes/code/registry4.h"
#include "bitsandbytes/optim/registry.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
  return {{"version", BNB_VERSION},
          {"backend", BNB_BACKEND},
          {"gpu_architectures", BNB_GPU_ARCHITECTURES},
          {"torch", BNB_BUILD_TORCH},
          {"compiler", BNB_COMPILER}};
}

std::vector<float> code_table(const std::string& name) {
  static constexpr bnb::CodeTable kSigned = bnb::SignedDynamic8::make_levels();
  static constexpr bnb::CodeTable kUnsigned = bnb::UnsignedDynamic8::make_levels();
  const bnb::CodeTable* table = nullptr;
  if (name == "dynamic") table = &kSigned;
  if (name == "udynamic") table = &kUnsigned;
  if (table != nullptr) return {table->values, table->values + bnb::kCodeLevels};
  for (const bnb::Code4Info& code : bnb::kCodes4) {
    if (name == code.name) return {code.levels.values, code.levels.values + bnb::kCode4Levels};
  }
  throw py::value_error("code_table: name must be 'dynamic', 'udynamic', 'nf4' or 'fp4', got '" +
                        name + "'");
}

std::map<std::string, int> optimizers() {
  std::map<std::string, int> rules;
  for (const bnb::RuleInfo& rule : bnb::kRules) rules[rule.name] = rule.states;
  return rules;
}

void set_cpu_isa(const std::string& name) {
  if (bnb::cpu::set_isa(name)) return;
  std::string known;
  for (const std::string& isa : bnb::cpu::available_isas()) known += " '" + isa + "'";
  throw py::value_error("set_cpu_isa: name must be one of" + known + ", got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of bitsandbytes that is not a torch op.";
  m.def("build_info", &build_info, "What this build was made with and for.");
  m.def("code_table", &code_table, py::arg("name"), "The levels of a built-in code, 256 or 16.");
  m.def("optimizers", &optimizers, "Update rules with their number of states.");
  m.def(
      "cpu_isa", [] { return std::string(bnb::cpu::kernels().isa); },
      "Instruction set of the CPU kernels in use.");
  m.def("available_cpu_isas", &bnb::cpu::available_isas,
        "Instruction sets that this build and this processor share, widest first.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
        "Switches the CPU kernels to another instruction set. Meant for tests.");
  bnb::define_object_lists(m);
  bnb::define_step_plan(m);
}
