// What linear_fp8.cu multiplies by: x as e4m3, scaled, in the order its wgmma wants. Up to 64
// tokens a token has a scale per 128 channels, unless one scale is asked for; above one scale.
// Plain C++, no CUDA: the tests walk it on machines without a GPU.
//
// Slabs of 64 tokens x 128 channels, outermost first: [tokens / 64][k / 128], each 8192 bytes of
// e4m3 and, if grouped, the 64 scales of the group, f32, in the order of factor_byte(). A
// slab is 64 rows of 128 bytes: byte 16c + 2i + h of a row is channel 16c + 8h + i (i < 8, h < 2),
// the order of k in a weight word (ptx/dequant.cuh); 16-byte chunk c lies at chunk c ^ (row % 8):
// wgmma's 128-byte swizzle. Then the sums, [tokens / 64][k / 1024], each 2048 bytes of bf16: [high,
// low][64 rows][8 groups], high + low = -2^-6 * (sum of the row's 128 values of the group), to 16
// bits; times the scale where a group has its own. Groups past the last: 0. Then, with one scale a
// token, these, f32.
//
// The sums take off what the offset of the weights adds: a code u = q + 8 reads as u * 2^-9, so
// that sum of u * x is 2^-9 * (sum of q * x) + 2^-6 * (sum of x). Multiplied by the weights'
// scales, which are bf16, they are one bf16 k16 step for eight groups.
//
// scale = absmax / 448 of the group or the token, x = e4m3(value * (448 / absmax)) to nearest even.
// e4m3 has 15 octaves of full precision, so that with one scale a token channels 2^14 below the
// largest lose nothing but this: the largest value of a group is exact where the group has its own,
// and outliers are most of the error. An absmax below 2^-100 gives 0; one that is infinite or NaN
// makes the scale NaN, and so what the token gives. Channels past the last k are 0. Rows past the
// last token are 0 with a scale per token, and anything with one per group: no other row sees them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/cuda/layout.h"

namespace nibble::cuda_x {

inline constexpr int kSlabTokens = 64;
inline constexpr int kSlabBytes = kSlabTokens * 128;
inline constexpr int kSumGroups = 8;                                // of a block of sums
inline constexpr int kSumPartBytes = kSlabTokens * kSumGroups * 2;  // high or low
inline constexpr int kSumBytes = 2 * kSumPartBytes;
inline constexpr float kSumUnit = -0x1p-6f;
inline constexpr int kFactorBytes = kSlabTokens * 4;  // scales of a group

struct Shape {
  int64_t tokens, k;
  bool one_scale = tokens > kSlabTokens;  // per token; never false above
  NIBBLE_HOST_DEVICE int64_t slabs() const { return (tokens + kSlabTokens - 1) / kSlabTokens; }
  NIBBLE_HOST_DEVICE int64_t groups() const { return (k + 127) / 128; }
  /// Whether every group has scales.
  NIBBLE_HOST_DEVICE bool grouped() const { return !one_scale; }
  NIBBLE_HOST_DEVICE int64_t slab_offset(int64_t slab, int64_t group) const {
    return (slab * groups() + group) * (grouped() ? kSlabBytes + kFactorBytes : kSlabBytes);
  }
  NIBBLE_HOST_DEVICE int64_t factors_offset(int64_t group) const {  // if grouped()
    return slab_offset(0, group) + kSlabBytes;
  }
  NIBBLE_HOST_DEVICE int64_t sum_blocks() const { return (groups() + kSumGroups - 1) / kSumGroups; }
  NIBBLE_HOST_DEVICE int64_t sums_offset(int64_t slab, int64_t group) const {
    return slab_offset(slabs(), 0) + (slab * sum_blocks() + group / kSumGroups) * kSumBytes;
  }
  NIBBLE_HOST_DEVICE int64_t scales_offset() const { return sums_offset(slabs(), 0); }
  NIBBLE_HOST_DEVICE int64_t bytes() const {
    return scales_offset() + (grouped() ? 0 : slabs() * kSlabTokens * 4);
  }
};
/// Where the 16 bytes of channels 16 * chunk ... of a row lie in the slab.
NIBBLE_HOST_DEVICE inline int chunk_byte(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}
/// Channel of the group that byte `i` of chunk `chunk` holds.
NIBBLE_HOST_DEVICE inline int channel_of(int chunk, int i) {
  return chunk * 16 + (i & 1) * 8 + (i >> 1);
}
/// Where a row's sum of a group lies in the block of sums; part 0 is high, 1 low.
NIBBLE_HOST_DEVICE inline int sum_byte(int part, int row, int64_t group) {
  return part * kSumPartBytes + row * kSumGroups * 2 + static_cast<int>(group % kSumGroups) * 2;
}

/// Where a row's scale lies among those of its group: [rows / 16][pair of rows in an eight][eight
/// of the 16][2], so that a thread of wgmma has its 16 in four 16-byte loads, and the four threads
/// of a quad side by side.
NIBBLE_HOST_DEVICE inline int factor_byte(int row) {
  return ((row / 16 * 4 + row / 2 % 4) * 4 + row / 8 % 2 * 2 + row % 2) * 4;
}
NIBBLE_HOST_DEVICE inline int factor_row(int byte) {  // the row whose factor_byte() it is
  return byte / 64 * 16 + byte / 8 % 2 * 8 + byte / 16 % 4 * 2 + byte / 4 % 2;
}
/// Where linear_fp8.cu keeps a row's scale as f16: [pair of rows in an eight][eight][2].
NIBBLE_HOST_DEVICE inline int pair_byte(int row) {
  return row / 2 % 4 * 32 + row / 8 * 4 + row % 2 * 2;
}

}  // namespace nibble::cuda_x
