// The int8 KV cache pages of the CUDA backend, byte by byte. Plain C++, no CUDA.
//
// A page holds kPageTokens tokens of one layer: [kv head][K tile | V tile], each tile 8320 bytes,
// so that a (page, head) is one 16640-byte bulk copy.
//   K tile: 64 rows (tokens) x 128 bytes, then 64 f16 scales. Bytes are q + 128 (offset binary);
//           the 16-byte chunks of odd rows are swapped in pairs (chunk c sits at c ^ (row & 1)),
//           which makes the fragment loads free of bank conflicts.
//   V tile: transposed: 128 rows (d) x 64 bytes (tokens), then 64 f16 scales. Bytes are q + 128.
// value = (byte - 128) * scale[token]; one scale per token, head and K|V: symmetric, dynamic.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef NIBBLE_HOST_DEVICE
#ifdef __CUDACC__
#define NIBBLE_HOST_DEVICE __host__ __device__
#else
#define NIBBLE_HOST_DEVICE
#endif
#endif

namespace nibble::kv_layout {

inline constexpr int kPageTokens = 64;
inline constexpr int kHeadDim = 128;
inline constexpr int kScalesOffset = kPageTokens * kHeadDim;
inline constexpr int kTileBytes = kScalesOffset + kPageTokens * 2;
inline constexpr int kPairBytes = 2 * kTileBytes;  // K and V of one head

NIBBLE_HOST_DEVICE inline size_t pair_offset(int64_t page, int num_kv_heads, int head) {
  return static_cast<size_t>((page * num_kv_heads + head) * kPairBytes);
}
NIBBLE_HOST_DEVICE inline int k_byte(int token, int d) {
  return token * kHeadDim + (((d >> 4) ^ (token & 1)) << 4) + (d & 15);
}
NIBBLE_HOST_DEVICE inline int v_byte(int token, int d) {
  return kTileBytes + d * kPageTokens + token;
}
NIBBLE_HOST_DEVICE inline int k_scale_byte(int token) { return kScalesOffset + 2 * token; }
NIBBLE_HOST_DEVICE inline int v_scale_byte(int token) {
  return kTileBytes + kScalesOffset + 2 * token;
}

}  // namespace nibble::kv_layout
