// Element types as safetensors names them, and a non-owning typed view of a tensor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace nibble {

enum class DType : uint8_t {
  kBool,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E4M3FNUZ,
  kF8E5M2FNUZ,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
};

const char* dtype_name(DType dtype);                          // "BF16"
std::optional<DType> dtype_from_name(std::string_view name);  // safetensors spelling
int dtype_bits(DType dtype);                                  // 4, 6, 8, 16, 32 or 64

/// Row-major, little-endian, possibly unaligned. Does not own its bytes.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;

  int64_t num_elements() const;
};

}  // namespace nibble
