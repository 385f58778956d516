// SPDX-License-Identifier: Apache-2.0
#include "formats/widen.h"

#include <cstring>

#include "base/error.h"
#include "base/half.h"

namespace nibble {

void widen(const TensorView& view, float* out) {
  NIBBLE_CHECK(is_dense_dtype(view.dtype), "dtype {}", dtype_name(view.dtype));
  const size_t count = static_cast<size_t>(view.num_elements());
  NIBBLE_CHECK(view.bytes.size() == count * static_cast<size_t>(dtype_bits(view.dtype) / 8));
  const std::byte* in = view.bytes.data();
  if (view.dtype == DType::kF32) {
    if (count > 0) std::memcpy(out, in, count * sizeof(float));
    return;
  }
  if (view.dtype == DType::kBF16) {
    for (size_t i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, in + 2 * i, 2);
      out[i] = bf16_to_float(bits);
    }
    return;
  }
  for (size_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + 2 * i, 2);
    out[i] = f16_to_float(bits);
  }
}

std::vector<float> widen(const TensorView& view) {
  std::vector<float> out(static_cast<size_t>(view.num_elements()));
  widen(view, out.data());
  return out;
}

std::vector<std::byte> narrow(std::span<const float> values, DType dtype) {
  NIBBLE_CHECK(is_dense_dtype(dtype), "dtype {}", dtype_name(dtype));
  std::vector<std::byte> out(values.size() * static_cast<size_t>(dtype_bits(dtype) / 8));
  if (dtype == DType::kF32) {
    if (!values.empty()) std::memcpy(out.data(), values.data(), out.size());
    return out;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits =
        dtype == DType::kBF16 ? float_to_bf16(values[i]) : float_to_f16(values[i]);
    std::memcpy(out.data() + 2 * i, &bits, 2);
  }
  return out;
}

}  // namespace nibble
