// Types that every kernel interface shares: element type, stream.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace bnb {

// Element type of a tensor behind an untyped pointer.
enum class DType : int { kFloat32, kFloat16, kBFloat16, kCount };

inline constexpr int kDTypeCount = static_cast<int>(DType::kCount);

namespace gpu {

// A cudaStream_t or hipStream_t, so that callers need no vendor header.
struct Stream {
  void* handle;
};

}  // namespace gpu
}  // namespace bnb
