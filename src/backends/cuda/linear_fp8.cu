// K6: out[M, N] = x[M, K] W4[N, K]^T with x in e4m3, for M from 33 up. Weights are operand A of
// wgmma.m64nNk32 e4m3, unpacked in registers as the offset integers they are (ptx/dequant.cuh);
// tokens are its N.
//
// Layouts: W in layout.h's blocks; x in x_layout.h's slabs, which quantize_x.cu or the kernel
// before writes, by plain bulk copies (the swizzle is in the slab); out bf16 row-major, and where
// the next linear takes it e4m3 besides. Bytes: N*K*0.515625 of weights once from device memory;
// M*K*1.03 of x from L2 once per row tile. Flops: 2*M*N*K at the e4m3 rate, and 1/32 more for the
// bf16 k step that takes off the weights' offset every eight groups (x_layout.h says how).
//
// The weights' scales are per 128 k, so each group is summed by itself (temp), in f16: it takes
// half the registers of f32 and half the instructions to add up (docs/kernels.md).
// No group can overflow: 128 * 15 * 2^-9 * 448 is 1680. Times their scales, relative to powers of
// two so that f16 holds them, eight groups are added up in f16 and then added to f32 sums:
//   ungrouped x   one HFMA2 two values; the token's scale comes in the epilogue
//   64 tokens     one HMUL2 more, for the token's scale of the group. A warp of its own makes them
//                 f16 (prepare_scales()).
// For tiles of 128 tokens the latter costs 22 % (docs/kernels.md), so there a token has one scale.
//
// Work split: two consumer warpgroups and a producer warp. A warpgroup has kBlocks blocks of 64
// rows; while one multiplies the other adds up. A cluster of two CTAs shares x by multicast.
// Splitting k and its exchange are K2's (linear_wgmma.cu): narrow matrices share a tile's k among S
// CTAs, which reduce-scatter it by eights of tokens in a fixed order. Deterministic.
//
// Limits: K a multiple of 8, rows a multiple of 8 (16 with SiLU); sm_90a. All CTAs of a split grid
// must be resident at once.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "backends/cuda/fp8_epilogue.cuh"
#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/wgmma.cuh"
#include "backends/cuda/x_layout.h"

namespace nibble::cuda {
namespace {

constexpr int kConsumerWarps = 8;
// The producer has a warpgroup to itself for the sake of setmaxnreg; its other warps prepare the
// scales of 64 tokens and add up squares.
constexpr int kIdleWarps = 3, kSquaresWarps = 2;
constexpr int kThreads = (kConsumerWarps + 1 + kIdleWarps) * 32;
constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);
constexpr int kSmemLimit = 232448;
constexpr uint32_t kRaised = 0x80008000u;  // in a pair of scales: see prepare_scales()
constexpr float kCodeUndo = 512.0f;        // codes read as u * 2^-9

// kBlocks: row blocks of 64 of a warpgroup.
template <int kTokens, int kBlocks>
struct Config {
  static_assert(kBlocks * kTokens <= 128, "registers for the sums");
  static constexpr bool kGrouped = kTokens == kFp8GroupedTokens;
  static constexpr int kRows = 128 * kBlocks;  // of a CTA
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kSumBytes = kTokens * cuda_x::kSumGroups * 2 * 2;
  // In a stage: x, the scales of its group, the sums (for the last of eight groups), the weights.
  static constexpr int kFactorsOffset = kXBytes;
  static constexpr int kFactorBytes = kGrouped ? cuda_x::kFactorBytes : 0;
  static constexpr int kSlabBytes = cuda_x::kSlabBytes + kFactorBytes;
  static constexpr int kSumsOffset = kFactorsOffset + kFactorBytes;
  static constexpr int kWOffset = kSumsOffset + kSumBytes;
  static constexpr int kWBytes = 2 * kBlocks * kBlockBytes;
  // What prepare_scales() makes of the scales: f16 [4][16], so that a thread of wgmma has those of
  // its 16 tokens side by side, negative if any unit was raised; what the sums so far are then
  // multiplied by, in the same order; the tokens' units, f32 in the order of factor_byte().
  static constexpr int kScalesOffset = (kWOffset + kWBytes + 15) / 16 * 16;
  static constexpr int kRescaleOffset = kScalesOffset + kTokens * 2;
  static constexpr int kUnitsOffset = kRescaleOffset + kTokens * 2;
  static constexpr int kStageEnd = kGrouped ? kUnitsOffset + kTokens * 4 : kScalesOffset;
  static constexpr int kStageBytes = (kStageEnd + 1023) / 1024 * 1024;
  static constexpr int kOutStride = 68;  // floats: 64 rows and padding against conflicts
  static constexpr int kPassTokens = kBlocks == 1 ? 32 : 16;          // that are stored together
  static constexpr int kScratch = kPassTokens * kOutStride * 4 + 32;  // of a warpgroup; other banks
  // By what the epilogue multiplies each token, and as many for each other warp that adds up.
  static constexpr int kNormBytes = kGrouped ? kSquaresWarps * kTokens * 4 : 0;
  static constexpr int kFit = (kSmemLimit - 2 * kScratch - kNormBytes - 256) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kScratchOffset = kStages * kStageBytes;
  static constexpr int kBarOffset = kScratchOffset + 2 * kScratch;
  static constexpr int kNormBarOffset = kBarOffset + 3 * kStages * 8;
  static constexpr int kNormOffset = kNormBarOffset + 8;
  static constexpr int kSmemBytes = kNormOffset + kNormBytes;
  static_assert(kSmemBytes <= kSmemLimit && kStages >= 3);
};

// What a CTA does: tiles from `first` on, and of their groups [begin, end). A tile of a cluster is
// as many adjacent row tiles as it has CTAs.
struct Work {
  int first, step, tiles, begin, end;
};
template <int kCluster, bool kSplit>
__device__ __forceinline__ Work my_work(const LinearParams& p) {
  int cta;
  // NOTE: read where it is used; as one value for producer and consumers ptxas spilled it.
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
  const int cluster = cta / kCluster, tiles = p.num_tiles / kCluster * p.token_tiles;
  if constexpr (!kSplit) {
    return {cluster, static_cast<int>(gridDim.x) / kCluster, tiles, 0, p.groups};
  }
  const int tile = over_split(p, cluster), part = cluster - tile * p.split;
  return {tile, tiles, tiles, first_unit(p, part), first_unit(p, part + 1)};
}

// Whether the sums of eight groups come with group g, the last of them that a CTA has.
__device__ __forceinline__ bool brings_sums(const Work& work, int g) {
  return g % cuda_x::kSumGroups == cuda_x::kSumGroups - 1 || g == work.end - 1;
}

// Tile t of a cluster, as its CTA `peer` has it: producer and epilogue must mean the same one.
template <int kCluster>
__device__ __forceinline__ Tile my_tile(const LinearParams& p, int t, int peer) {
  Tile tile = find_tile(t, p.num_tiles / kCluster, p.token_tiles, kPatchRows / kCluster);
  tile.row = tile.row * kCluster + peer;
  return tile;
}

// Makes f16 of the scales of x, of each group of the CTA's tiles as it arrives. A token's scales
// are relative to its unit, a power of two above all of the tile so far: when one exceeds it the
// unit is raised, to four times more than needs be, and the sums so far are to be multiplied by the
// quotient. So a token's sums do not depend on other tokens. By one warp, two tokens a lane.
template <typename C>
__device__ __forceinline__ void prepare_scales(const Work& work, uint32_t base, uint32_t full,
                                               uint32_t ready, int lane) {
  const int to = cuda_x::pair_byte(cuda_x::factor_row(lane * 8));
  int stage = 0;
  uint32_t parity = 0;
  for (int t = work.first; t < work.tiles; t += work.step) {
    uint32_t units[2] = {1, 1};  // 2^(unit - 126)
    for (int g = work.begin; g < work.end; ++g) {
      const uint32_t at = base + stage * C::kStageBytes;
      ptx::mbarrier_wait(full + stage * 8, parity);
      const float2 loaded = ptx::load_shared_f32x2(at + C::kFactorsOffset + lane * 8);
      float scales[2] = {loaded.x, loaded.y}, quotients[2];
      bool raise = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t exponent = __float_as_uint(scales[i]) >> 23, before = units[i];
        if (exponent > before && exponent < 255) {  // a NaN stays one, a scale has no sign
          units[i] = min(exponent + 2, 252u);
          raise = true;
        }
        scales[i] *= __uint_as_float((253 - units[i]) << 23);
        quotients[i] = __uint_as_float(127 + before > units[i] ? 127 + before - units[i] << 23 : 0);
      }
      raise = __any_sync(0xffffffffu, raise && g > work.begin);
      const uint32_t pair = ptx::pack_f16(scales[0], scales[1]);  // past the last token: anything
      ptx::store_shared_4(at + C::kScalesOffset + to, raise ? pair | kRaised : pair & ~kRaised);
      if (raise) {
        ptx::store_shared_4(at + C::kRescaleOffset + to, ptx::pack_f16(quotients[0], quotients[1]));
      }
      if (brings_sums(work, g)) {
        ptx::store_shared_f32x2(
            at + C::kUnitsOffset + lane * 8,
            make_float2(__uint_as_float(units[0] + 1 << 23), __uint_as_float(units[1] + 1 << 23)));
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(ready + stage * 8);
      if (++stage == C::kStages) stage = 0, parity ^= 1;
    }
  }
}

template <int kTokens, int kBlocks, int kCluster, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1) linear_fp8_kernel(const LinearParams p) {
  using C = Config<kTokens, kBlocks>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  const uint32_t full = base + C::kBarOffset, empty = full + C::kStages * 8;
  const uint32_t ready = empty + C::kStages * 8;  // the scales of x
  const uint32_t norms_done = base + C::kNormBarOffset, norms = base + C::kNormOffset;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int peer = kCluster > 1 ? static_cast<int>(blockIdx.x) % kCluster : 0;
  TRACE(0);
  ptx::grid_launch_dependents();
  if (tid < C::kStages) {
    ptx::mbarrier_init(full + tid * 8, 1);
    ptx::mbarrier_init(empty + tid * 8, kConsumerWarps * kCluster);
    if constexpr (C::kGrouped) {
      ptx::mbarrier_init(ready + tid * 8, 1);
      if (tid == 0) ptx::mbarrier_init(norms_done, 32);
    }
    ptx::mbarrier_init_fence();
  }
  if constexpr (kCluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (warp >= kConsumerWarps) {
    ptx::registers_shrink<56>();
    if (warp == kConsumerWarps && lane == 0) {
      const Work work = my_work<kCluster, kSplit>(p);
      const auto tile128_bytes = static_cast<uint32_t>(p.groups) * 2 * kBlockBytes;
      const int slabs = (p.tokens + cuda_x::kSlabTokens - 1) / cuda_x::kSlabTokens;
      const uint64_t once =
          p.token_tiles == 1 ? ptx::policy_evict_first() : ptx::policy_evict_normal();
      const uint64_t again = ptx::policy_evict_normal();
      const cuda_x::Shape shape{p.tokens, p.k, !C::kGrouped};
      // The tile's weights of its next group; its x of the next group and how far the second 64
      // tokens' x are; its first 64 tokens.
      const uint8_t *w, *x;
      const auto* all_x = reinterpret_cast<const uint8_t*>(p.x);
      int slab = 0;
      bool second = false;
      auto begin_tile = [&](int t) {
        const Tile tile = my_tile<kCluster>(p, t, peer);
        w = p.weights + static_cast<int64_t>(tile.row) * kBlocks * tile128_bytes +
            work.begin * (2 * kBlockBytes);
        slab = tile.token * kTokens / cuda_x::kSlabTokens;
        x = all_x + shape.slab_offset(slab, work.begin);
        // A tile may reach past the last slab: then that one is loaded again, and nobody stores it.
        second = slab + 1 < slabs;
      };
      auto load_w = [&](int stage, int g) {
        ptx::mbarrier_expect(full + stage * 8, C::kXBytes + C::kWBytes + C::kFactorBytes +
                                                   (brings_sums(work, g) ? C::kSumBytes : 0));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          ptx::bulk_load(base + stage * C::kStageBytes + C::kWOffset + b * 2 * kBlockBytes,
                         w + b * tile128_bytes, 2 * kBlockBytes, full + stage * 8, once);
        }
        w += 2 * kBlockBytes;
      };
      auto load_x = [&](int stage, int g) {
        const uint32_t to = base + stage * C::kStageBytes, bar = full + stage * 8;
        // What is loaded together: a slab's tokens, or in a cluster a CTA's share of them.
        constexpr int kShare = kTokens / kCluster;
        constexpr int kPart = kShare < cuda_x::kSlabTokens ? kShare : cuda_x::kSlabTokens;
        auto load = [&](uint32_t at, const uint8_t* from, uint32_t bytes) {
          if constexpr (kCluster > 1) {
            ptx::bulk_load_multicast(at, from, bytes, bar, (1 << kCluster) - 1);
          } else {
            ptx::bulk_load(at, from, bytes, bar, again);
          }
        };
        auto load_part = [&](int part) {
          const int next = part * kPart >= cuda_x::kSlabTokens && second ? 1 : 0;
          const int row = part * kPart % cuda_x::kSlabTokens;
          // With one CTA a group's scales, which lie behind it, come in the same copy.
          constexpr bool kOneCopy = C::kGrouped && kCluster == 1;
          load(to + part * kPart * 128, x + next * (p.groups * C::kSlabBytes) + row * 128,
               kPart * 128 + (kOneCopy ? C::kFactorBytes : 0));
          if constexpr (C::kGrouped && !kOneCopy) {
            constexpr int kBytes = C::kFactorBytes / kCluster;
            load(to + C::kFactorsOffset + part * kBytes, x + cuda_x::kSlabBytes + part * kBytes,
                 kBytes);
          }
          if (brings_sums(work, g)) {
            const uint8_t* sums = all_x + shape.sums_offset(slab + next, g) + row * 16;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              load(to + C::kSumsOffset + (half * kTokens + part * kPart) * 16,
                   sums + half * cuda_x::kSumPartBytes, kPart * 16);
            }
          }
        };
        if constexpr (kCluster > 1) {  // this CTA's share, for both
          static_assert(kPart == kShare);
          load_part(peer);
        } else {
#pragma unroll
          for (int part = 0; part < kTokens / kPart; ++part) load_part(part);
        }
        x += C::kSlabBytes;
      };
      // Weights do not depend on the kernel before: half a ring of them is under way first, as in
      // K2.
      begin_tile(work.first);
      const int early = min((C::kStages + 1) / 2, work.end - work.begin);
      for (int i = 0; i < early; ++i) load_w(i, work.begin + i);
      ptx::grid_dependency_wait();
      for (int i = 0; i < early; ++i) load_x(i, work.begin + i);
      int stage = early, g = work.begin + early;
      uint32_t parity = 1;
      for (int t = work.first;;) {
        for (; g < work.end; ++g) {
          ptx::mbarrier_wait(empty + stage * 8, parity);
          load_w(stage, g);
          load_x(stage, g);
          if (++stage == C::kStages) stage = 0, parity ^= 1;
        }
        t += work.step;
        if (t >= work.tiles) break;
        begin_tile(t);
        g = work.begin;
      }
    } else if (C::kGrouped && warp == kConsumerWarps + 1) {
      const Work work = my_work<kCluster, kSplit>(p);
      ptx::grid_dependency_wait();
      prepare_scales<C>(work, base, full, ready, lane);
    } else if (C::kGrouped && warp > kConsumerWarps) {  // one token tile
      const Work work = my_work<kCluster, kSplit>(p);
      const int mine = warp - (kConsumerWarps + 1 + kIdleWarps - kSquaresWarps);
      for (int t = work.first; t < work.tiles; t += work.step) {
        const int row = my_tile<kCluster>(p, t, peer).row * C::kRows;
        prefetch_epilogue(p, static_cast<Epilogue>(p.epilogue), row, row + C::kRows,
                          mine * 32 + lane, kSquaresWarps * 32);
      }
      ptx::grid_dependency_wait();
      add_up_squares<kTokens, kSquaresWarps>(p, norms, mine, lane, kCodeUndo);
      if (mine == 0) ptx::mbarrier_arrive(norms_done);
    }
    __syncwarp();
    if constexpr (kCluster > 1) ptx::cluster_sync();
    return;
  }

  ptx::registers_grow<224>();
  const int wg = warp >> 2, m16 = warp & 3, g8 = lane >> 2;
  float sums[kBlocks][kTokens / 2];
  uint32_t eights[kBlocks][kTokens / 4];  // sums of up to eight groups, pairs of tokens
  uint32_t raw[kBlocks][2][4], next_scales[kBlocks];
  // Of a stage: this thread's weight words and row scales.
  const uint32_t first_block = C::kWOffset + wg * kBlocks * kBlockBytes;
  const uint32_t words_at = first_block + m16 * 1024 + lane * 16;
  const uint32_t row_scales_at = first_block + kNibbleBytes + g8 * 16 + m16 * 4;
  int stage = 0;
  uint32_t parity = 0;
  // With one block nothing else hides the products of both scales, of rows and of tokens: they are
  // made while it multiplies, from scales fetched before.
  constexpr bool kAhead = C::kGrouped && kBlocks == 1;
  [[maybe_unused]] uint32_t of_tokens[C::kGrouped ? kTokens / 8 : 1];  // of this thread's, in pairs
  [[maybe_unused]] auto load_of_tokens = [&](uint32_t(&to)[kTokens / 8], uint32_t from) {
#pragma unroll
    for (int i = 0; i < kTokens / 8; i += 4) {
      ptx::load_shared_16(reinterpret_cast<uint32_t(&)[4]>(to[i]),
                          from + (lane & 3) * (kTokens / 2) + i * 4);
    }
  };
  auto fetch = [&](uint32_t stage_at) {
    ptx::mbarrier_wait((C::kGrouped ? ready : full) + stage * 8, parity);
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      ptx::load_shared_16(raw[i / 2][i % 2],
                          stage_at + words_at + i / 2 * kBlockBytes + i % 2 * 512);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      next_scales[b] = ptx::load_shared_4(stage_at + row_scales_at + b * kBlockBytes);
    }
    if constexpr (kAhead) load_of_tokens(of_tokens, stage_at + C::kScalesOffset);
  };

  const Work work = my_work<kCluster, kSplit>(p);
  TRACE(1);
  // The weights' unit, 2^(exponent - 128): in such units their largest scale is from 2 to 4.
  const uint32_t exponent = max(__float_as_uint(p.largest_scale) >> 23, 2u);
  const uint32_t to_unit = (255 - exponent << 7) * 0x10001u;  // a pair of bf16
  const float unit = __uint_as_float(exponent - 1 << 23);
  ptx::grid_dependency_wait();
  TRACE(2);
  for (int t = work.first; t < work.tiles; t += work.step) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[b][i] = 0.0f, eights[b][i / 2] = 0;
    uint32_t stage_at = base + stage * C::kStageBytes, scales_of_eight[kBlocks][2] = {};
    fetch(stage_at);
    TRACE(3);
    // Group g; if it brings the sums, the offset of it and those before comes off, and the next
    // group's operands are fetched unless it is the last.
    auto add_group = [&](int g, auto brings_tag, bool more) {
      constexpr bool brings = decltype(brings_tag)::value;
      using Multiply = ptx::Wgmma<kTokens>;
      uint32_t temp[kBlocks][kTokens / 4];
      uint32_t a[kBlocks][4][4], row_scales[kBlocks], eight[kBlocks][4];  // a: four k32 steps
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        row_scales[b] = next_scales[b];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          ptx::dequant_e4m3(a[b][k], raw[b][k / 2][k % 2 * 2], raw[b][k / 2][k % 2 * 2 + 1]);
        }
        ptx::collect_scales(scales_of_eight[b], row_scales[b], g, lane);
        if constexpr (brings) ptx::scales_operand(eight[b], scales_of_eight[b], g, lane);
      }
      ptx::wgmma_fence();
      const uint32_t x_at = ptx::descriptor_address(stage_at);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        Multiply::rs_e4m3_first(temp[b], a[b][0], ptx::descriptor_k_major(x_at));
#pragma unroll
        for (int k = 1; k < 4; ++k) {
          Multiply::rs_e4m3(temp[b], a[b][k], ptx::descriptor_k_major(x_at + k * 2));
        }
        if constexpr (brings) {
          Multiply::rs_bf16(sums[b], eight[b],
                            ptx::descriptor_16_bytes(x_at + (C::kSumsOffset >> 4), kTokens));
        }
        ptx::wgmma_commit();
      }
      // By what temp is multiplied: of rows g8 and g8 + 8, and with a scale per group of each
      // token.
      uint32_t of_rows[kBlocks][2];
      [[maybe_unused]] uint32_t ahead[kAhead ? kTokens / 4 : 1];
      [[maybe_unused]] float units[C::kGrouped && brings ? kTokens / 4 : 1];  // of this thread's
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t pair = ptx::bf16x2_mul(row_scales[b], to_unit);
        of_rows[b][0] = ptx::pack_f16(ptx::low_bf16(pair), ptx::low_bf16(pair));
        of_rows[b][1] = ptx::pack_f16(ptx::high_bf16(pair), ptx::high_bf16(pair));
      }
      if constexpr (C::kGrouped) {
        if constexpr (!kAhead) load_of_tokens(of_tokens, stage_at + C::kScalesOffset);
        if (of_tokens[0] & kRaised) {
          uint32_t quotients[kTokens / 8];
          load_of_tokens(quotients, stage_at + C::kRescaleOffset);
#pragma unroll
          for (int i = 0; i < kTokens / 8; ++i) of_tokens[i] &= ~kRaised;
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < kTokens / 4; ++i) {
              eights[b][i] = ptx::f16x2_mul(eights[b][i], quotients[i / 2]);
            }
        }
        if constexpr (kAhead) {
#pragma unroll
          for (int i = 0; i < kTokens / 4; ++i) {
            ahead[i] = ptx::f16x2_mul(of_rows[0][i & 1], of_tokens[i / 2]);
            asm volatile("" : "+r"(ahead[i]));
          }
        }
        if constexpr (brings) {
#pragma unroll
          for (int i = 0; i < kTokens / 4; i += 4) {
            ptx::load_shared_f32x4(reinterpret_cast<float(&)[4]>(units[i]),
                                   stage_at + C::kUnitsOffset + (lane & 3) * 16 + i * 16);
          }
        }
      }
      const uint32_t done = empty + stage * 8;
      if (++stage == C::kStages) stage = 0, parity ^= 1;
      stage_at = base + stage * C::kStageBytes;
      if (more) fetch(stage_at);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (b + 1 < kBlocks) {
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
          __syncwarp();  // lane 0 speaks for what all have read
          if (lane == 0) {
            ptx::mbarrier_arrive(done);
            if constexpr (kCluster == 2) {
              ptx::mbarrier_arrive_remote(done, static_cast<uint32_t>(peer ^ 1));
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kTokens / 4; ++i) {
          uint32_t by = of_rows[b][i & 1];
          if constexpr (kAhead) {
            by = ahead[i];
          } else if constexpr (C::kGrouped) {
            by = ptx::f16x2_mul(by, of_tokens[i / 2]);
          }
          eights[b][i] = ptx::f16x2_fma(temp[b][i], by, eights[b][i]);
          if constexpr (brings) {
            const float2 eight = ptx::unpack_f16(eights[b][i]);
            auto unit_of = [&](int j) { return C::kGrouped ? units[i / 2 * 2 + j] * unit : unit; };
            sums[b][2 * i] = fmaf(eight.x, unit_of(0), sums[b][2 * i]);
            sums[b][2 * i + 1] = fmaf(eight.y, unit_of(1), sums[b][2 * i + 1]);
            eights[b][i] = 0;
          }
        }
        if constexpr (brings) scales_of_eight[b][0] = scales_of_eight[b][1] = 0;
      }
    };
    for (int g = work.begin; g < work.end;) {
      const int last = min(g | (cuda_x::kSumGroups - 1), work.end - 1);
#pragma unroll 1
      for (; g < last; ++g) add_group(g, std::false_type{}, true);
      ++g;
      add_group(last, std::true_type{}, g < work.end);
    }

    TRACE(4);
    // NOTE: opaque copies, or the compiler computes the addresses of exchange and epilogue before
    // the main loop and has no registers left for it.
    constexpr int kOctets = kTokens / 8;
    int cta = static_cast<int>(blockIdx.x), parts = kSplit ? p.split : 1, id = tid;
    asm volatile("" : "+r"(cta), "+r"(parts), "+r"(id));
    const int part = kSplit ? cta / kCluster % parts : 0;
    const int group4 = id >> 7, group_id = id & 127;  // consumer warpgroup, thread of it
    const uint32_t scratch = base + C::kScratchOffset + group4 * C::kScratch;
    const int own = kSplit ? part * kOctets / parts : 0;
    const int own_end = kSplit ? (part + 1) * kOctets / parts : kOctets;
    // Four sums: rows g8 and g8 + 8 of the block, tokens 8 * octet + 2 * t4 and the next.
    auto vector = [&](int block, int octet) -> float(&)[4] {
      return *reinterpret_cast<float(*)[4]>(&sums[block][octet * 4]);
    };
    if constexpr (kSplit) {
      // pieces: [CTA that owns][CTA that sends][eight of the owner][block][thread][4]
      const int share = (kOctets + parts - 1) / parts;
      auto place = [&](int owner, int sender, int octet, int block) {
        return p.pieces + (cta + (owner - part) * kCluster) * p.piece_stride +
               ((sender * share + octet - owner * kOctets / parts) * kBlocks + block) * 1024 +
               id * 4;
      };
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if (i >= own && i < own_end) continue;
        const int owner = ((i + 1) * parts - 1) / kOctets;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) hand_over(place(owner, part, i, b), vector(b, i));
      }
#pragma unroll
      for (int i = 0; i < kOctets; i += 2) {  // two round trips at a time
        if (i + 2 <= own || i >= own_end) continue;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          take_over_two(place(part, 0, i, b), kBlocks * 1024, share * kBlocks * 1024, part, parts,
                        i >= own, i + 1 < own_end, vector(b, i), vector(b, i + 1));
        }
      }
    }

    TRACE(5);
    // Epilogue: K2's, with longer passes. With one block a warpgroup both warpgroups store one tile
    // together, 16 rows of a token a thread: the next linear's group.
    constexpr bool kTogether = kBlocks == 1, kRoundsSilu = C::kGrouped && kBlocks == 2;
    constexpr int kPassOctets = C::kPassTokens / 8;
    const Tile at = my_tile<kCluster>(p, kSplit ? cta / kCluster / parts : t, cta % kCluster);
    const bool silu = p.epilogue == static_cast<int>(Epilogue::kSiluMul);
    const bool residual = p.epilogue == static_cast<int>(Epilogue::kResidual);
    if constexpr (C::kGrouped) ptx::mbarrier_wait(norms_done, 0);
    const auto* x_scales =
        reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(p.x) +
                                       cuda_x::Shape{p.tokens, p.k, !C::kGrouped}.scales_offset());
    auto factor = [&](int token) {
      if constexpr (C::kGrouped) {
        return __uint_as_float(ptx::load_shared_4(norms + token * 4));
      } else {
        return token < p.tokens ? x_scales[token] * kCodeUndo : 0.0f;
      }
    };
    auto first_token = [&](int octet) { return at.token * kTokens + 8 * octet; };
    auto factors_of = [&](int octet) {  // tokens 2 t4 and the next
      const int token = first_token(octet) + 2 * (id & 3);
      return make_float2(factor(token), factor(token + 1));
    };
    if (kRoundsSilu && silu && p.rounded) {
      if constexpr (kRoundsSilu) {
        store_silu_rounded<kOctets, kConsumerWarps>(
            p, base + C::kScratchOffset, id, at.row, own, own_end,
            [&](int block, int octet) -> const float(&)[4] { return vector(block, octet); },
            factors_of);
      }
    } else {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const int block_row = at.row * C::kRows + (group4 * kBlocks + b) * 64;
        if (silu) {
          store_silu<kOctets, kOctets>(
              p, scratch, 1 + group4, id, block_row / 2, own, own_end,
              [&](int octet) -> const float(&)[4] { return vector(b, octet); }, factors_of,
              first_token);
          continue;
        }
        // A thread has two times eight adjacent rows of a token, or with two blocks eight of one.
        constexpr int kPieces = kTogether ? 2 : 1;
        const int in = (kTogether ? id : group_id) >> 3, chunk = id & 7;
        const int column = kTogether ? at.row * C::kRows + chunk * 16 : block_row + chunk * 8;
        const uint32_t to_shared =
            scratch + ((id & 3) * 2 * C::kOutStride + (group_id >> 5) * 16 + (id >> 2 & 7)) * 4;
        const uint32_t from = kTogether ? base + C::kScratchOffset + (chunk >> 2) * C::kScratch +
                                              (in * C::kOutStride + (chunk & 3) * 16) * 4
                                        : scratch + (in * C::kOutStride + chunk * 8) * 4;
        auto meet = [&] {
          if constexpr (kTogether) {
            ptx::named_barrier(1, kConsumerWarps * 32);
          } else {
            ptx::named_barrier(1 + group4, 128);
          }
        };
        // What a thread reads from global memory for a pass, and where its results go (or -1);
        // requested a pass ahead.
        struct Ahead {
          int64_t to[kPieces];
          uint4 residual[kPieces];
          float scale;
        };
        auto request = [&](int pass) {
          Ahead a;
          const int octet = kPassOctets * pass + (in >> 3), token = first_token(octet) + (in & 7);
          const bool mine = octet >= own && octet < own_end && token < p.tokens;
#pragma unroll
          for (int i = 0; i < kPieces; ++i) {
            const int64_t to = static_cast<int64_t>(token) * p.out_stride + column + 8 * i;
            a.to[i] = mine && column + 8 * i < p.out_stride ? to : -1;
            a.residual[i] = residual && a.to[i] >= 0
                                ? *reinterpret_cast<const uint4*>(p.residual + a.to[i])
                                : make_uint4(0, 0, 0, 0);
          }
          a.scale = octet < kOctets ? factor(token) : 0.0f;
          return a;
        };
        Ahead ahead = request(own / kPassOctets);
        NextGroup next;
        if constexpr (C::kGrouped && kTogether) next = NextGroup(p, column);
#pragma unroll
        for (int pass = 0; pass < kOctets / kPassOctets; ++pass) {
          if (kPassOctets * (pass + 1) <= own || kPassOctets * pass >= own_end) continue;
          const Ahead now = ahead;
          ahead = request(pass + 1);
          meet();
#pragma unroll
          for (int e = 0; e < kPassOctets; ++e) {
            const float(&four)[4] = vector(b, kPassOctets * pass + e);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int token = e * 8 + (j & 1), row = 8 * (j >> 1);
              ptx::store_shared_f32(to_shared + (token * C::kOutStride + row) * 4, four[j]);
            }
          }
          meet();
          uint4 stored[kPieces];
#pragma unroll
          for (int i = 0; i < kPieces; ++i) {
            stored[i] = now.to[i] < 0
                            ? make_uint4(0, 0, 0, 0)
                            : store_part(p, now.to[i], from + i * 32, now.residual[i], now.scale);
          }
          if constexpr (C::kGrouped && kTogether) {
            const int octet = kPassOctets * pass + (in >> 3);
            if (p.next) {
              next.store(p, 8 * octet + (in & 7), at.row, chunk, stored[0], stored[1],
                         octet >= own && octet < own_end);
            }
          }
        }
      }
    }
    if constexpr (kSplit) break;  // one tile
  }
  TRACE(6);
  TRACE_SM();
  __syncwarp();
  if constexpr (kCluster > 1) ptx::cluster_sync();  // nobody leaves while a peer may write here
}

template <int kTokens, int kBlocks, int kCluster>
int launch(const LinearArgs& args, int split, void* stream) {
  using C = Config<kTokens, kBlocks>;
  LinearParams p = make_linear_params(args, C::kRows);
  p.token_tiles = (args.tokens + kTokens - 1) / kTokens;
  p.epilogue = static_cast<int>(args.epilogue);
  const int tiles = p.num_tiles / kCluster * p.token_tiles, slots = args.num_sms / kCluster;
  split = std::max(1, std::min({split, p.groups, kMaxSplit}));
  while (split > 1 && tiles * split > slots) --split;  // all resident at once
  set_split(p, split);
  int clusters = tiles * p.split;
  if (p.split == 1) {
    const int per_cluster = (tiles + slots - 1) / slots;
    clusters = (tiles + per_cluster - 1) / per_cluster;
  }
  auto* kernel = p.split > 1 ? linear_fp8_kernel<kTokens, kBlocks, kCluster, true>
                             : linear_fp8_kernel<kTokens, kBlocks, kCluster, false>;
  return launch_linear(kernel, args, clusters * kCluster, kThreads, C::kSmemBytes, stream, kCluster,
                       p);
}

// Tiles of 64 are of grouped x.
int tile_tokens(const LinearArgs& args) {
  return args.tokens <= kFp8GroupedTokens && !args.in_order ? kFp8GroupedTokens : 128;
}

bool has_even_tiles(const LinearArgs& args) { return (args.rows + 127) / 128 % 2 == 0; }

WgmmaTactic tactic_of(const LinearArgs& args) {
  return args.tactic < 0 ? fp8_tactic(args) : WgmmaTactic::decode(args.tactic);
}

}  // namespace

WgmmaTactic fp8_tactic(const LinearArgs& args) {
  const int tokens = tile_tokens(args);
  const int64_t tiles128 = (args.rows + 127) / 128, slots = args.num_sms;
  const int64_t token_tiles = (args.tokens + tokens - 1) / tokens;
  if (tokens > 64) {
    // Narrow: k shared by as many CTAs as there are SMs. Otherwise pairs of CTAs share x.
    const int64_t tiles = tiles128 * token_tiles;
    if (tiles * 2 > slots || args.in_order) return {2, 2, 1};
    return {2, 1, static_cast<int>(std::clamp<int64_t>(slots / tiles, 1, kMaxSplit))};
  }
  if (tiles128 > slots) return {4, 1, 1};
  return {2, 1, static_cast<int>(std::clamp<int64_t>(slots / tiles128, 1, kMaxSplit))};
}

bool linear_fp8_rounds(const LinearArgs& args) {
  const bool two_blocks = tactic_of(args).row_blocks == 4 && has_even_tiles(args);
  return tile_tokens(args) == kFp8GroupedTokens &&
         two_blocks == (args.epilogue == Epilogue::kSiluMul);
}

int linear_fp8(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.k % 8 || args.rows % 8) return cudaErrorInvalidValue;
  const bool fuses = args.next || args.rounded || args.squares;
  if (fuses && tile_tokens(args) != kFp8GroupedTokens) return cudaErrorInvalidValue;
  if ((args.next || args.rounded) && !linear_fp8_rounds(args)) return cudaErrorInvalidValue;
  const WgmmaTactic t = tactic_of(args);
  const bool even = has_even_tiles(args);  // 256 rows: two tiles of 128, or two CTAs
  const bool pairs = t.cluster == 2 && even;
  if (tile_tokens(args) == 128) {
    const int split = args.in_order ? 1 : t.split;
    return pairs ? launch<128, 1, 2>(args, split, stream) : launch<128, 1, 1>(args, split, stream);
  }
  if (t.row_blocks == 4 && even) return launch<64, 2, 1>(args, t.split, stream);
  return pairs ? launch<64, 1, 2>(args, t.split, stream) : launch<64, 1, 1>(args, t.split, stream);
}

}  // namespace nibble::cuda
