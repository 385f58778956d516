// The size of a kCudaInt4 matrix, for code that checks it without the kernels:
// backends/cuda/layout.h describes the bytes. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace nibble {

/// Rows come in tiles of 128, k in groups of 128; a block of 64 rows x 128 k is 4096 bytes of
/// nibbles and 64 bf16 scales.
constexpr size_t cuda_int4_packed_bytes(int64_t out_features, int64_t in_features) {
  return static_cast<size_t>((out_features + 127) / 128 * ((in_features + 127) / 128) * 2 *
                             (4096 + 128));
}

}  // namespace nibble
