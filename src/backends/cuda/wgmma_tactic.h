// Which tiles of linear_wgmma.cu serve a shape, and how its CTAs share the work. Plain C++: the
// tests ask for every shape on machines without a GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backends/cuda/kernels.h"

namespace nibble::cuda {

// Tactics that add in an order that does not depend on M: the one whose waves of CTAs take least
// with tiles of so many tokens, and how long these take.
struct InOrderTactic {
  WgmmaTactic tactic;
  double cost;
};
inline InOrderTactic in_order_tactic(const LinearArgs& args, int tile) {
  const int64_t blocks = (args.rows + 127) / 128 * 2;
  const int64_t token_tiles = (args.tokens + tile - 1) / tile;
  constexpr struct {
    int row_blocks;
    double cost;  // of a tile, relative to one of 64 rows; measured for 16 to 128 tokens
  } kKinds[] = {{4, 2.75}, {2, 1.5}, {1, 1}};
  constexpr double kExchange = 1.15;  // what sharing k costs
  const int parts = wgmma_parts(args.k);
  WgmmaTactic best{};
  double least = 0;
  auto consider = [&](int row_blocks, int64_t turns, int split, double total) {
    if (best.split > 0 && total >= least) return;
    least = total;
    // Pairs of CTAs, which share x, where measured to be faster.
    const bool pairs = row_blocks == 4   ? split == 1 || turns > 1
                       : row_blocks == 2 ? tile <= 64
                                         : tile < 128;
    best = {row_blocks, pairs ? 2 : 1, split, row_blocks};
  };
  for (const auto& [row_blocks, cost] : kKinds) {
    const int64_t tiles = (blocks + row_blocks - 1) / row_blocks * token_tiles;
    for (const int split : {1, parts}) {
      const int64_t at_once = args.num_sms / split, turns = (tiles + at_once - 1) / at_once;
      if (split > 1 && (row_blocks == 1 || (turns > 1 && tile / 8 < split))) continue;  // none such
      const double each = split == 1 ? cost : cost * kExchange / split;
      consider(row_blocks, turns, split, each * static_cast<double>(turns));
    }
  }
  return {best, least};
}

/// Tokens of a tile: of args.rows, k, tokens, num_sms.
inline int wgmma_tile_tokens(const LinearArgs& args) {
  for (const int tile : {16, 32, 48, 64}) {
    if (args.tokens <= tile) return tile;
  }
  // The one whose waves take least. `cost`: of a tile, relative to one of 128 tokens; measured.
  constexpr struct {
    int tile;
    double cost;
  } kTiles[] = {{128, 1}, {112, 0.89}, {96, 0.77}, {80, 0.65}};
  int best = 0;
  double least = 0;
  for (const auto& [tile, cost] : kTiles) {
    const double total = cost * in_order_tactic(args, tile).cost;
    if (best && total >= least) continue;
    best = tile, least = total;
  }
  return best;
}

inline int linear_wgmma_box_rows(const LinearArgs& args) {  // of LinearArgs::x_map
  return wgmma_tile_tokens(args) / 2;
}

inline WgmmaTactic wgmma_tactic(const LinearArgs& args) {
  const int tokens = wgmma_tile_tokens(args);
  const int64_t tiles128 = (args.rows + 127) / 128;
  const auto slots = static_cast<int64_t>(args.num_sms);
  const bool long_k = args.k >= 16384;
  if (args.in_order || args.tokens > kMaxNormTokens) return in_order_tactic(args, tokens).tactic;
  if (tiles128 / 2 >= slots * 9 / 10) return {4, 2, 1};
  // Narrow: k shared by as many CTAs as there are SMs, where a long k pays for the exchange.
  const int row_blocks = long_k && tokens <= 32 ? 4 : 2;
  const int64_t tiles = (tiles128 * 2 + row_blocks - 1) / row_blocks;
  const auto split = static_cast<int>(std::max<int64_t>(1, slots / tiles));
  // Pairs of CTAs where measured to be faster (docs/kernels.md).
  return {row_blocks, long_k && (tokens == 48 || tokens == 64) ? 2 : 1, split};
}

/// Those that differ for this shape; all of them give the same sums up to their order.
inline std::vector<WgmmaTactic> wgmma_tactics(const LinearArgs& args) {
  const int tile = wgmma_tile_tokens(args);
  const int64_t tiles128 = (args.rows + 127) / 128;
  const int64_t token_tiles = (args.tokens + tile - 1) / tile;
  const auto groups = static_cast<int>((args.k + 127) / 128);
  std::vector<WgmmaTactic> all;
  for (const int row_blocks : {1, 2, 4}) {
    if (row_blocks == 4 && tiles128 % 2) continue;
    const int64_t row_tiles = tiles128 * 2 / row_blocks;
    for (const int cluster : {1, 2}) {
      if (row_tiles % cluster) continue;
      for (int split = 1; split <= std::min(kMaxSplit, groups); ++split) {
        const bool resident = row_tiles / cluster * token_tiles * split <= args.num_sms / cluster;
        if (split > 1 && !resident && split != wgmma_parts(args.k)) continue;
        if (row_blocks > 1) all.push_back({row_blocks, cluster, split});
        if (row_blocks == 1 && split > 1) continue;
        if (row_blocks < 4 && args.tokens > kMaxNormTokens) {
          all.push_back({row_blocks, cluster, split, row_blocks});
        }
      }
    }
  }
  return all;
}

/// The tactic as the shape allows it: tiles of 256 rows come in pairs of 128, and so do CTAs.
inline WgmmaTactic wgmma_fit(const LinearArgs& args, WgmmaTactic t) {
  const int64_t tiles128 = (args.rows + 127) / 128;
  if (tiles128 % 2 && t.row_blocks == 4) t.row_blocks = 2, t.warpgroups = args.in_order ? 2 : 4;
  if (tiles128 * 2 / t.row_blocks % 2) t.cluster = 1;
  return t;
}

struct WgmmaShares {
  int split;     // CTAs that share a tile's k; 0: the tactic cannot add in order
  int parts;     // of k that a CTA sums one by one
  int clusters;  // of the grid: split of them have a tile, and then every so many-th
};
/// `t` as wgmma_fit() leaves it.
inline WgmmaShares wgmma_shares(const LinearArgs& args, const WgmmaTactic& t) {
  const int tile = wgmma_tile_tokens(args), slots = args.num_sms / t.cluster;
  const auto groups = static_cast<int>((args.k + 127) / 128);
  const auto row_tiles = static_cast<int>((args.rows + 127) / 128 * 2 / t.row_blocks);
  const int tiles = row_tiles / t.cluster * ((args.tokens + tile - 1) / tile);
  int split = std::max(1, std::min({t.split, groups, kMaxSplit, slots}));
  // All that share a tile are resident at once. Several tiles one after another want every one of
  // them to own sums.
  if (tile / 8 * t.row_blocks / t.warpgroups < split) {
    while (split > 1 && tiles * split > slots) --split;
  }
  int parts = 1;
  if (args.in_order) {
    if (!t.in_order(args.k) || (split != 1 && split != wgmma_parts(args.k))) return {0, 0, 0};
    if (split == 1) parts = wgmma_parts(args.k);
  }
  const int at_once = slots / split, turns = (tiles + at_once - 1) / at_once;
  return {split, parts, (tiles + turns - 1) / turns * split};
}

}  // namespace nibble::cuda
