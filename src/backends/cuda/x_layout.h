// What linear_fp8.cu multiplies by: x as e4m3 with one scale per token, in the order its wgmma
// wants. Plain C++, no CUDA: the tests walk it on machines without a GPU.
//
// Slabs of 64 tokens x 128 channels, outermost first: [tokens / 64][k / 128], each 9216 bytes:
//   0    .. 8191  e4m3: 64 rows of 128 bytes. Byte 16c + 2i + h of a row is channel 16c + 8h + i (i
//   < 8,
//                 h < 2), the order of k in a weight word (ptx/dequant.cuh); 16-byte chunk c lies
//                 at chunk c ^ (row % 8): wgmma's 128-byte swizzle.
//   8192 .. 9215  e4m3: 64 rows of 16 bytes, eight *digits* and eight zeros: 32 * (digits 0 .. 3) +
//                 (digits 4 .. 7) = -(sum of the row's 128 values).
// Then f32 [tokens]: the scales.
//
// The digits take off what the offset of the weights adds (u = q + 8): multiplied by the constants
// 32 * 8 and 8 in one more k step, they make the sum of u * x that of q * x. So nothing is left to
// do per token and group but to multiply by the weights' scale.
//
// scale = absmax / 448 of the token, x = e4m3(value * (448 / absmax)) to nearest even: e4m3 has 15
// octaves of full precision, so that channels 2^14 below the largest lose nothing by a scale per
// token instead of per group. A token whose absmax is below 2^-100 is 0; with an infinity or NaN in
// it the scale is NaN, and so is what the token gives. Rows past the last token and channels past
// the last k are 0. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/cuda/layout.h"

namespace nibble::cuda_x {

inline constexpr int kSlabTokens = 64;
inline constexpr int kSlabXBytes = kSlabTokens * 128;
inline constexpr int kSlabBytes = kSlabXBytes + kSlabTokens * 16;
inline constexpr float kDigitBase = 32.0f;  // 4 * 448 * 32 = 128 * 448: no sum is too large

struct Shape {
  int64_t tokens, k;
  NIBBLE_HOST_DEVICE int64_t slabs() const { return (tokens + kSlabTokens - 1) / kSlabTokens; }
  NIBBLE_HOST_DEVICE int64_t groups() const { return (k + 127) / 128; }
  NIBBLE_HOST_DEVICE int64_t slab_offset(int64_t slab, int64_t group) const {
    return (slab * groups() + group) * kSlabBytes;
  }
  NIBBLE_HOST_DEVICE int64_t scales_offset() const { return slab_offset(slabs(), 0); }
  NIBBLE_HOST_DEVICE int64_t bytes() const { return scales_offset() + slabs() * kSlabTokens * 4; }
};
/// Where the 16 bytes of channels 16 * chunk ... of a row lie in the slab.
NIBBLE_HOST_DEVICE inline int chunk_byte(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}
/// Channel of the group that byte `i` of chunk `chunk` holds.
NIBBLE_HOST_DEVICE inline int channel_of(int chunk, int i) {
  return chunk * 16 + (i & 1) * 8 + (i >> 1);
}
NIBBLE_HOST_DEVICE inline int digits_byte(int row) { return kSlabXBytes + row * 16; }

}  // namespace nibble::cuda_x
