// Where everything lies in the portable int4 linear (portable/linear.cu), as plain functions: the
// kernel calls them with its threads, tests/cuda/portable_linear_test.cpp with loops, so that every
// index is checked on machines without a GPU. Fragment layouts are PTX's for mma.m16n8k16 and
// ldmatrix.x4. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backends/cuda/layout.h"

namespace nibble::cuda::portable {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr int kTileRows = static_cast<int>(cuda_layout::kTileRows);
inline constexpr int kSlab = static_cast<int>(cuda_layout::kGroup);  // k of a stage
inline constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
inline constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);
inline constexpr int kWeightBytes = 2 * kBlockBytes;  // 128 rows x 128 k, as they lie in memory
inline constexpr int kMaxSmemBytes = 99 * 1024;       // of a CTA on sm_86, sm_89, sm_120

// A CTA's tile: 128 rows of W x kTokens tokens. Its 8 warps are kRowWarps x kTokenWarps; a warp has
// kRowTiles x kTokenTiles fragments of 16 rows x 8 tokens.
template <int kTokens_, int kRowWarps_, int kStages_>
struct TileShape {
  static constexpr int kTokens = kTokens_, kRowWarps = kRowWarps_, kStages = kStages_;
  static constexpr int kTokenWarps = kWarps / kRowWarps;
  static constexpr int kRowTiles = kTileRows / 16 / kRowWarps;
  static constexpr int kTokenTiles = kTokens / 8 / kTokenWarps;
  static constexpr int kVectors = kRowTiles * kTokenTiles;  // fragments of a thread, 4 sums each
  static constexpr int kXChunks = kTokens * (kSlab / 8);    // 16 bytes each, of a stage
  static constexpr int kStageBytes = kWeightBytes + kTokens * kSlab * 2;
  static constexpr int kSumStride = kTileRows + 4;  // floats; conflict-free scatter
  static constexpr int kSmemBytes = kStages * kStageBytes;
  static constexpr int kPieceFloats = kTokens * kTileRows;
  static_assert(kRowTiles * kRowWarps * 16 == kTileRows);
  static_assert(kTokenTiles * kTokenWarps * 8 == kTokens);
  static_assert(kSmemBytes <= kMaxSmemBytes && kTokens * kSumStride * 4 <= kSmemBytes);
};
using Tile8 = TileShape<8, 8, 4>;
using Tile16 = TileShape<16, 8, 4>;
using Tile32 = TileShape<32, 4, 3>;
using Tile64 = TileShape<64, 4, 3>;
inline constexpr int kMaxTokens = 64;

// Stage: [weights kWeightBytes][x: k64 2, token kTokens, chunk 8 of 16 bytes, chunk at c ^ token %
// 8]. `chunk` 0 .. 15 is the 8 k from 8 * chunk of the slab.
template <typename S>
NIBBLE_HOST_DEVICE constexpr int x_byte(int token, int chunk) {
  return kWeightBytes + (chunk >> 3) * S::kTokens * 128 + token * 128 +
         (((chunk & 7) ^ (token & 7)) << 4);
}

// The first of a warp's 16-row tiles (0 .. 7 of the CTA's rows) and 8-token tiles.
template <typename S>
NIBBLE_HOST_DEVICE constexpr int first_row_tile(int warp) {
  return warp % S::kRowWarps * S::kRowTiles;
}
template <typename S>
NIBBLE_HOST_DEVICE constexpr int first_token_tile(int warp) {
  return warp / S::kRowWarps * S::kTokenTiles;
}

// Byte in the stage of a lane's four words (k16 0 .. 3 of the k64) of a 16-row tile, and of its
// scale pair (rows g, g + 8).
NIBBLE_HOST_DEVICE constexpr int words_byte(int row_tile, int k64, int lane) {
  return (row_tile >> 2) * kBlockBytes + (((row_tile & 3) * 2 + k64) * 32 + lane) * 16;
}
NIBBLE_HOST_DEVICE constexpr int scale_byte(int row_tile, int lane) {
  return (row_tile >> 2) * kBlockBytes + kNibbleBytes + (lane >> 2) * 16 + (row_tile & 3) * 4;
}

// The row address lane `lane` gives to the ldmatrix.x4 that loads operand B of one 8-token tile for
// two k16 steps (2 * pair, 2 * pair + 1 of the k64): registers b0, b1 of the first, b0, b1 of the
// second.
template <typename S>
NIBBLE_HOST_DEVICE constexpr int operand_b_byte(int token_tile, int k64, int pair, int lane) {
  return x_byte<S>(token_tile * 8 + (lane & 7), k64 * 8 + pair * 4 + (lane >> 3));
}

// Element e (0 .. 3) of an accumulator fragment: its row in the 16-row tile and its token in the
// 8-token tile.
NIBBLE_HOST_DEVICE constexpr int sum_row(int lane, int e) { return (lane >> 2) + 8 * (e >> 1); }
NIBBLE_HOST_DEVICE constexpr int sum_token(int lane, int e) { return 2 * (lane & 3) + (e & 1); }

// Where (token, row of the tile) waits for the epilogue's stores, in floats. With SiLU the rows are
// columns of the output: gate row g and up row g + 8 of a 16-row tile are its column 8 * tile + g.
template <typename S>
NIBBLE_HOST_DEVICE constexpr int sum_place(int token, int row) {
  return token * S::kSumStride + row;
}

// Tiles in launch order: up to kTokenRun token tiles of one row tile side by side, so that L2
// serves their weights; then the next row tile with the same tokens.
inline constexpr int kTokenRun = 16;
struct TileAt {
  int row_tile, token_tile;
};
NIBBLE_HOST_DEVICE constexpr TileAt tile_at(int index, int row_tiles, int token_tiles) {
  const int run = index / (kTokenRun * row_tiles), rest = index - run * kTokenRun * row_tiles;
  const int left = token_tiles - run * kTokenRun, width = left < kTokenRun ? left : kTokenRun;
  return {rest / width, run * kTokenRun + rest % width};
}

// k is cut into `parts` runs of groups, summed by themselves and added in order, whoever does it:
// one CTA each (split) or one CTA for all of them. How many parts depends on W and the device only,
// so that a token's bits do not depend on how many tokens there are.
NIBBLE_HOST_DEVICE constexpr int part_begin(int groups, int parts, int part) {
  return static_cast<int>(static_cast<int64_t>(groups) * part / parts);
}
inline constexpr int kMaxParts = 16, kMinGroups = 4;
constexpr int choose_parts(int row_tiles, int groups, int num_sms) {
  int parts = 2 * num_sms / row_tiles;  // two CTAs an SM
  parts = parts < groups / kMinGroups ? parts : groups / kMinGroups;
  parts = parts < kMaxParts ? parts : kMaxParts;
  return parts > 1 ? parts : 1;
}
// Whether the parts get CTAs of their own: as long as the sums they pass on have room.
constexpr int max_split_ctas(int num_sms) { return 4 * num_sms; }
constexpr bool choose_split(int row_tiles, int token_tiles, int parts, int num_sms) {
  return parts > 1 &&
         static_cast<int64_t>(row_tiles) * token_tiles * parts <= max_split_ctas(num_sms);
}

// Workspace: [counters, one int a tile, -1 between calls][pieces: (tile, part)][vector][thread][4].
constexpr int64_t counters_bytes(int num_sms) { return int64_t{max_split_ctas(num_sms)} * 4; }
constexpr int64_t workspace_bytes(int num_sms) {
  return counters_bytes(num_sms) + int64_t{max_split_ctas(num_sms)} * kMaxTokens * kTileRows * 4;
}
template <typename S>
NIBBLE_HOST_DEVICE constexpr int64_t piece_place(int tile, int parts, int part, int vector,
                                                 int thread) {
  return (static_cast<int64_t>(tile) * parts + part) * S::kPieceFloats +
         (vector * kThreads + thread) * 4;
}

}  // namespace nibble::cuda::portable
