// The constant tables of the CPU kernels, one copy for all instruction sets.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/dynamic8.h"

namespace bnb::cpu {

extern const CodeTable kSignedLevels;
extern const CodeTable kUnsignedLevels;
extern const detail::BucketTable<SignedDynamic8::Layout> kSignedBuckets;
extern const detail::BucketTable<UnsignedDynamic8::Layout> kUnsignedBuckets;

}  // namespace bnb::cpu
