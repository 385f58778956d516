// What linear_fp8.cu multiplies by: x as e4m3 with one scale per token and 128 channels, in the
// order its wgmma wants. Plain C++, no CUDA: the tests walk it on machines without a GPU.
//
// Slabs of 64 tokens x 128 channels, outermost first: [tokens / 64][k / 128], each 8704 bytes:
//   0    .. 8191  e4m3: 64 rows of 128 bytes. Byte 16c + 2i + h of a row is channel 16c + 8h + i (i
//   < 8,
//                 h < 2), the order of k in a weight word (ptx/dequant.cuh); 16-byte chunk c lies
//                 at chunk c ^ (row % 8): wgmma's 128-byte swizzle.
//   8192 .. 8703  f32 [row / 8][row / 2 % 4][4]: of rows 2t and 2t + 1 the factors, then the
//   addends.
// With a = sum over the group of u * 2^-9 * x, as the tensor cores sum it (u = q + 8), a * factor +
// addend is the group's sum of q * x: factor = scale * 2^9, addend = -8 * scale * sum of x.
// Rows past the last token and channels past the last k are 0.
//
// scale = absmax / 448, x = e4m3(value * (448 / absmax)) to nearest even; a group whose absmax is
// below 2^-100 is 0; with an infinity or NaN in it, factor and addend are NaN, and so is what the
// token gives.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/cuda/layout.h"

namespace nibble::cuda_x {

inline constexpr int kSlabTokens = 64;
inline constexpr int kSlabXBytes = kSlabTokens * 128;
inline constexpr int kSlabBytes = kSlabXBytes + kSlabTokens * 8;

NIBBLE_HOST_DEVICE inline int64_t slab_offset(int64_t slab, int64_t group, int64_t groups) {
  return (slab * groups + group) * kSlabBytes;
}
/// Where the 16 bytes of channels 16 * chunk ... of a row lie in the slab.
NIBBLE_HOST_DEVICE inline int chunk_byte(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}
/// Channel of the group that byte `i` of chunk `chunk` holds.
NIBBLE_HOST_DEVICE inline int channel_of(int chunk, int i) {
  return chunk * 16 + (i & 1) * 8 + (i >> 1);
}
/// Where a row's factor lies in the slab; its addend is 8 bytes further.
NIBBLE_HOST_DEVICE inline int factor_byte(int row) {
  return kSlabXBytes + (((row >> 3) * 4 + (row >> 1 & 3)) * 4 + (row & 1)) * 4;
}

inline size_t packed_bytes(int64_t tokens, int64_t k) {
  return static_cast<size_t>((tokens + kSlabTokens - 1) / kSlabTokens * ((k + 127) / 128) *
                             kSlabBytes);
}

}  // namespace nibble::cuda_x
