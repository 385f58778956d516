// The int4 weight layout of the CUDA backend: one copy of the bytes serves the mma.sync kernels
// (linear_small.cu) and the wgmma kernels (linear_wgmma.cu). Plain C++, no CUDA: the packer and the
// tests use it on machines without a GPU.
//
// Source: q [rows, K] two's complement int4 (-8..7), two per byte, low nibble = even k;
//         scale [rows, K/128] f32; w = q * scale.
// Padding: rows up to a multiple of 128, K up to a multiple of 128 (padded scales are 0).
//
// Bytes, outermost first:
//   tile  [rows/128]   128 consecutive rows
//   group [K/128]      128 consecutive k, one scale per row
//   half  [2]          64 of the 128 rows  -> one *block* of 64 rows x 128 k = 4224 bytes:
//     0    .. 4095  nibbles: [m16 4][k64 2][lane 32][k16 4] words of 32 bits
//     4096 .. 4223  scales:  [g 8][m16 4][hi 2] bf16; row = 16*m16 + g + 8*hi
//
// One word holds what lane (g = lane/4, t = lane%4) needs of a 16x16 tile as operand A of
// mma.m16n8k16 and (warp = m16) of wgmma.m64nNk16: with u = q + 8 (offset binary),
//   bits  0.. 3  row g,   k 2t      16..19  row g,   k 2t+1        (fragment register a0)
//   bits  4.. 7  row g+8, k 2t      20..23  row g+8, k 2t+1        (a1)
//   bits  8..11  row g,   k 2t+8    24..27  row g,   k 2t+9        (a2)
//   bits 12..15  row g+8, k 2t+8    28..31  row g+8, k 2t+9        (a3)
// so that `w & 0x000f000f`, `w & 0x00f000f0`, and the same of `w >> 8`, are a0..a3 as *subnormal*
// bf16 pairs: bits u and u << 4 read as bf16 are exactly u * 2^-133 and u * 2^-129 (the latter also
// when u >= 8 reaches the exponent's lowest bit: bf16 is linear up to 2^-125). One packed FMA then
// makes (u - 8) * scale, rounded once. See ptx/dequant.cuh.
//
// A lane's four k16 words are adjacent: one conflict-free 16-byte shared load per 16x64 tile, no
// swizzle, no ldmatrix. Every block is one cp.async.bulk; a CTA's share is one contiguous stream.
//
// `interleave_halves` is the row order of gate_up: source rows [gate; up], each F rows; packed rows
// 16*b + r hold gate row 8*b + r (r < 8) and up row 8*b + r - 8 (r >= 8): one thread holds both
// operands of SiLU(gate) * up.
//
// NOTE: scales are rounded to bf16 here. A quantizer that puts scales on the bf16 grid before it
// rounds the weights loses nothing by it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define NIBBLE_HOST_DEVICE __host__ __device__
#else
#define NIBBLE_HOST_DEVICE
#endif

namespace nibble::cuda_layout {

inline constexpr int64_t kTileRows = 128;
inline constexpr int64_t kBlockRows = 64;
inline constexpr int64_t kGroup = 128;  // k per scale, and per block
inline constexpr int64_t kBlockNibbleBytes = kBlockRows * kGroup / 2;
inline constexpr int64_t kBlockBytes = kBlockNibbleBytes + kBlockRows * 2;

struct Shape {
  int64_t rows, k;  // of the source
  NIBBLE_HOST_DEVICE int64_t num_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  NIBBLE_HOST_DEVICE int64_t num_groups() const { return (k + kGroup - 1) / kGroup; }
  NIBBLE_HOST_DEVICE int64_t packed_bytes() const {
    return num_tiles() * num_groups() * 2 * kBlockBytes;
  }
  NIBBLE_HOST_DEVICE size_t block_offset(int64_t tile, int64_t group, int64_t half) const {
    return static_cast<size_t>(((tile * num_groups() + group) * 2 + half) * kBlockBytes);
  }
};

inline uint16_t bf16_bits(float value) {  // round to nearest even; the scales are finite
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Packed row -> source row.
NIBBLE_HOST_DEVICE inline int64_t source_row(const Shape& shape, bool interleave_halves,
                                             int64_t packed_row) {
  if (!interleave_halves) return packed_row;
  const int64_t b = packed_row / 16, r = packed_row % 16;
  return r < 8 ? 8 * b + r : shape.rows / 2 + 8 * b + r - 8;
}

// Where (row within block, k within group) lives: byte of the word, and its bit.
struct NibblePlace {
  int word;   // index of the 32-bit word in the block
  int shift;  // bit of its nibble
};
NIBBLE_HOST_DEVICE inline NibblePlace nibble_place(int row, int k) {
  const int m16 = row / 16, g = row % 8, hi = (row / 8) % 2;
  const int k64 = k / 64, k16 = (k / 16) % 4, t = (k % 8) / 2, upper = (k / 8) % 2, odd = k % 2;
  const int lane = 4 * g + t;
  return {((m16 * 2 + k64) * 32 + lane) * 4 + k16, 16 * odd + 8 * upper + 4 * hi};
}
NIBBLE_HOST_DEVICE inline int scale_place(int row) {  // index of the bf16 in the block's scales
  return ((row % 8) * 4 + row / 16) * 2 + (row / 8) % 2;
}

// Packs the tiles [tile_begin, tile_end): callers split the work among threads by tile.
// nibbles [rows, k/2] (k even), scales [rows, ceil(k/128)], out: packed_bytes() of the whole
// matrix.
inline void pack_tiles(const Shape& shape, bool interleave_halves, const uint8_t* nibbles,
                       const float* scales, uint8_t* out, int64_t tile_begin, int64_t tile_end) {
  const int64_t groups = shape.num_groups();
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int half = 0; half < 2; ++half) {
        uint32_t words[kBlockNibbleBytes / 4] = {};
        uint16_t block_scales[kBlockRows] = {};
        for (int row = 0; row < kBlockRows; ++row) {
          const int64_t packed = tile * kTileRows + half * kBlockRows + row;
          const bool real = packed < shape.rows;
          const int64_t source = real ? source_row(shape, interleave_halves, packed) : 0;
          if (real) block_scales[scale_place(row)] = bf16_bits(scales[source * groups + group]);
          for (int kk = 0; kk < kGroup; ++kk) {
            const int64_t k = group * kGroup + kk;
            uint32_t u = 8;  // q = 0
            if (real && k < shape.k) {
              const uint8_t byte = nibbles[source * (shape.k / 2) + k / 2];
              u = ((k % 2 ? byte >> 4 : byte) & 15u) ^ 8u;
            }
            const NibblePlace place = nibble_place(row, kk);
            words[place.word] |= u << place.shift;
          }
        }
        uint8_t* block = out + shape.block_offset(tile, group, half);
        std::memcpy(block, words, sizeof words);
        std::memcpy(block + kBlockNibbleBytes, block_scales, sizeof block_scales);
      }
    }
  }
}

inline void pack(const Shape& shape, bool interleave_halves, const uint8_t* nibbles,
                 const float* scales, uint8_t* out) {
  pack_tiles(shape, interleave_halves, nibbles, scales, out, 0, shape.num_tiles());
}

// The inverse: nibbles [rows, k/2] and bf16 scale bits [rows, ceil(k/128)].
inline void unpack(const Shape& shape, bool interleave_halves, const uint8_t* packed,
                   uint8_t* nibbles, uint16_t* scale_bits) {
  const int64_t groups = shape.num_groups();
  std::memset(nibbles, 0, static_cast<size_t>(shape.rows * (shape.k / 2)));
  for (int64_t row = 0; row < shape.num_tiles() * kTileRows; ++row) {
    if (row >= shape.rows) break;
    const int64_t source = source_row(shape, interleave_halves, row);
    for (int64_t group = 0; group < groups; ++group) {
      const uint8_t* block =
          packed + shape.block_offset(row / kTileRows, group, (row % kTileRows) / kBlockRows);
      const int in_block = static_cast<int>(row % kBlockRows);
      std::memcpy(&scale_bits[source * groups + group],
                  block + kBlockNibbleBytes + 2 * scale_place(in_block), 2);
      for (int kk = 0; kk < kGroup && group * kGroup + kk < shape.k; ++kk) {
        const int64_t k = group * kGroup + kk;
        const NibblePlace place = nibble_place(in_block, kk);
        uint32_t word;
        std::memcpy(&word, block + 4 * place.word, 4);
        const uint32_t q = ((word >> place.shift) & 15u) ^ 8u;
        nibbles[source * (shape.k / 2) + k / 2] |= static_cast<uint8_t>(q << (k % 2 ? 4 : 0));
      }
    }
  }
}

}  // namespace nibble::cuda_layout
