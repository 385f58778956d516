// The int4 kernels that tune_linears() chooses from, and their names in engines: one encoder, one
// decoder. Plain C++. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backends/cuda/kernels.h"

namespace nibble::cuda {

inline constexpr int kMaxEarly = 2;
inline constexpr int kMinWgmmaRows = 9;  // its tiles of tokens begin at 16: never faster below

/// A kernel with its variant, as the launchers take it.
struct LinearKernel {
  bool small = false;  // linear_small, else linear_wgmma
  int tactic = 0;      // SmallTactic or WgmmaTactic::encode()
  int early = 0;       // LinearArgs::early; 0 with wgmma

  /// "small 64 rows whole early 1": tiles of 64 rows of W, each one CTA's ("shared": equal bytes
  /// per CTA, cut tiles are handed over); 1: how much is prefetched early. "wgmma 256 rows cluster
  /// 2 split 1": tiles of 256 rows of W, clusters of 2 CTAs, the k of a tile shared by 1 CTA.
  /// "wgmma 128 rows cluster 1 split 3 warpgroups 2": a CTA has two instead of four.
  std::string name() const {
    if (small) {
      const auto kind = static_cast<SmallTactic>(tactic);
      return fmt::format("small {} rows {} early {}", kind == SmallTactic::kStream128 ? 128 : 64,
                         kind == SmallTactic::kWhole64 ? "whole" : "shared", early);
    }
    const WgmmaTactic t = WgmmaTactic::decode(tactic);
    const std::string few = t.warpgroups < 4 ? fmt::format(" warpgroups {}", t.warpgroups) : "";
    return fmt::format("wgmma {} rows cluster {} split {}{}", 64 * t.row_blocks, t.cluster, t.split,
                       few);
  }
  /// Whether it is made for this many rows of activations.
  bool takes(int rows) const {
    if (small) return rows <= kMaxSmallTokens;
    // Fewer warpgroups fuse no norms.
    return rows >= kMinWgmmaRows &&
           (rows > kMaxNormTokens || WgmmaTactic::decode(tactic).warpgroups == 4);
  }
  bool in_order(int64_t k) const { return !small && WgmmaTactic::decode(tactic).in_order(k); }
  bool operator==(const LinearKernel&) const = default;
};

inline std::vector<LinearKernel> all_linear_kernels() {
  std::vector<LinearKernel> all;
  for (const SmallTactic tactic :
       {SmallTactic::kWhole64, SmallTactic::kStream64, SmallTactic::kStream128}) {
    for (int early = 1; early <= kMaxEarly; ++early) {
      all.push_back({.small = true, .tactic = static_cast<int>(tactic), .early = early});
    }
  }
  for (const auto& [row_blocks, warpgroups] : {std::pair{1, 1}, {2, 2}, {2, 4}, {4, 4}}) {
    for (const int cluster : {1, 2}) {
      for (int split = 1; split <= (row_blocks == 1 ? 1 : kMaxSplit); ++split) {
        all.push_back({.tactic = WgmmaTactic{row_blocks, cluster, split, warpgroups}.encode()});
      }
    }
  }
  return all;
}

/// The kernel of that name; nothing where there is none.
inline std::optional<LinearKernel> linear_kernel_of(std::string_view name) {
  for (const LinearKernel& kernel : all_linear_kernels()) {
    if (kernel.name() == name) return kernel;
  }
  return std::nullopt;
}

}  // namespace nibble::cuda
