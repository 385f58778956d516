// Dense tensors to floats and between the three dense dtypes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "spec/dtype.h"

namespace nibble {

inline bool is_dense_dtype(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF32;
}

/// Exact. `out` has view.num_elements() floats; the view's bytes may be unaligned. Dense dtypes
/// only.
void widen(const TensorView& view, float* out);
std::vector<float> widen(const TensorView& view);

/// Rounds to nearest even into `dtype` (a dense one).
std::vector<std::byte> narrow(std::span<const float> values, DType dtype);

}  // namespace nibble
