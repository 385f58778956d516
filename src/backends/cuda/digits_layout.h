// What linear_digits.cu multiplies by: x of up to 16 tokens as integers of 16 bits with a scale per
// token and 128 channels, each as two digits of 8 bits. Plain C++, no CUDA: the tests walk it on
// machines without a GPU.
//
// value = scale * q, |q| <= 32512 = 127 * 256, q = 256 * high + low, both in -128 .. 127. The
// step is absmax / 32512 of the group: a hundredth of bf16's at the largest value. Values below
// about absmax / 256 have fewer bits than bf16 gives them, by what is little beside the rounding to
// bf16 that the largest has had.
//
// A slab of 128 channels: [2 * tile tokens] rows of 128 bytes, then a factor for each token; tile
// tokens are 8 or 16. Slabs of a matrix follow each other. Rows are wgmma's N: row_of() puts a
// token's digits side by side and tokens where a thread finds the two that its sums of the other
// kernels have. Byte 16c + 2i + h of a row is channel 16c + 8h + i (i < 8, h < 2), the order of k
// in a weight word (ptx/dequant.cuh); 16-byte chunk c lies at chunk c ^ (row % 8): wgmma's 128-byte
// swizzle. A factor is two f32: the scale, and -8 * scale * (sum of the 128 q), which takes off
// what the weights' offset adds.
//
// An absmax below 2^-100 gives 0; one that is infinite or NaN makes the factor NaN, and so what the
// token gives. Channels past the last k are 0. Rows past the last token: anything, no other row
// sees them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/cuda/layout.h"

namespace nibble::cuda_digits {

inline constexpr int kMaxTokens = 16;
inline constexpr int kLargest = 127 * 256;
inline constexpr int kFactorBytes = 8;  // of a token

struct Shape {
  int64_t tokens, k;
  NIBBLE_HOST_DEVICE int64_t groups() const { return (k + 127) / 128; }
  NIBBLE_HOST_DEVICE int tile_tokens() const { return tokens <= 8 ? 8 : kMaxTokens; }
  NIBBLE_HOST_DEVICE int factors_offset() const { return tile_tokens() * 2 * 128; }
  NIBBLE_HOST_DEVICE int slab_bytes() const {
    return factors_offset() + tile_tokens() * kFactorBytes;
  }
  NIBBLE_HOST_DEVICE int64_t slab_offset(int64_t group) const { return group * slab_bytes(); }
  NIBBLE_HOST_DEVICE int64_t bytes() const { return slab_offset(groups()); }
};
/// The row of a token's high (0) or low (1) digits.
NIBBLE_HOST_DEVICE inline int row_of(int token, int digit) {
  return (token / 8 * 2 + token % 2) * 8 + token % 8 / 2 * 2 + digit;
}
/// Where the 16 bytes of channels 16 * chunk ... of a row lie in the slab.
NIBBLE_HOST_DEVICE inline int chunk_byte(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

}  // namespace nibble::cuda_digits
