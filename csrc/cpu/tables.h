// The constant tables of the CPU kernels, one copy for all instruction sets.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/dynamic8.h"

namespace bnb::cpu {

extern const CodeTable kSignedLevels;
extern const CodeTable kUnsignedLevels;
extern const SignedDynamic8::Buckets kSignedBuckets;
extern const SignedDynamic8::Buckets kSignKeepingBuckets;
extern const UnsignedDynamic8::Buckets kUnsignedBuckets;
extern const BinTables kSignedBins;
extern const BinTables kUnsignedBins;

}  // namespace bnb::cpu
