// The kernel tables that the files beside this one compile, each for its instruction set.
// SPDX-License-Identifier: MIT
#pragma once

#include "cpu/dispatch.h"

namespace bnb::cpu {

namespace baseline {
const Kernels* kernel_table();
}
namespace avx2 {
const Kernels* kernel_table();
}
namespace avx512 {
const Kernels* kernel_table();
}
namespace avx512_bf16 {
const Kernels* kernel_table();
}

}  // namespace bnb::cpu
