// K6: out[M, N] = x[M, K] W4[N, K]^T with x in e4m3, for M from 33 up. Weights are operand A of
// wgmma.m64nNk32 e4m3, unpacked in registers as the integers they are (ptx/dequant.cuh); tokens are
// its N.
//
// Layouts: W in layout.h's blocks; x in x_layout.h's slabs, which quantize_x.cu writes, by plain
// bulk copies (the swizzle is in the slab); out bf16 row-major. Bytes: N*K*0.515625 of weights once
// from device memory; M*K*1.0625 of x from L2 once per 256 rows. Flops: 2*M*N*K at the e4m3 rate.
//
// Both scales are per 128 k, so each group is summed by itself (temp) and then promoted:
// sum += weight scale * (temp * factor + addend), two FFMA a value; the addend takes off what the
// offset of the weights added. For 64 rows x 64 tokens x 128 k a warp issues 64 FFMA, 24 to unpack,
// 8 loads of scales and about 30 others; the tensor cores need 128 clocks for it. So promotion must
// overlap: a unit is 64 rows x kUnit tokens x 128 k, and while one unit is multiplied into one of
// two temps the unit before is promoted from the other. Two consumer warpgroups of 240 registers:
// 2 row blocks x 128 tokens of sums are 128 of them, the temps 64, operand A 16.
// Unpacked weights serve all units of their row block (two at 128 tokens).
//
// Work split, k split and its exchange are K2's (linear_wgmma.cu): tiles of 256 or 128 rows x
// kTokens; narrow matrices share a tile's k among S CTAs, which reduce-scatter it by eights of
// tokens in a fixed order. Deterministic.
//
// NOTE: nothing is in flight at the edge of the loop over stages: ptxas serialises accumulators
// that take turns across it (docs/kernels.md).
// Limits: K a multiple of 8, rows a multiple of 8 (16 with SiLU); sm_90a. All CTAs of a split grid
// must be resident at once.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/wgmma.cuh"
#include "backends/cuda/x_layout.h"

namespace nibble::cuda {
namespace {

constexpr int kConsumerWarps = 8;
// The producer has a warpgroup to itself for the sake of setmaxnreg; one of its warps works.
constexpr int kThreads = (kConsumerWarps + 4) * 32;
constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);
constexpr int kSmemLimit = 232448;
constexpr int kMaxSplit = 8;

// kBlocks: row blocks of 64 of a warpgroup.
template <int kTokens, int kBlocks>
struct Config {
  static_assert(kBlocks * kTokens <= 128, "registers for the sums");
  static constexpr int kRows = 128 * kBlocks;  // of a CTA
  // Tokens of a unit; one row block has two units, so that the temps can take turns.
  static constexpr int kUnit = std::min(64, kBlocks == 2 ? kTokens : kTokens / 2);
  static constexpr int kHalves = kTokens / kUnit;
  static constexpr int kUnits = kBlocks * kHalves;  // of a stage, of a warpgroup
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kScaleBytes = kTokens * 8;
  static constexpr int kScaleOffset = kXBytes;  // in a stage
  static constexpr int kWOffset = kScaleOffset + kScaleBytes;
  static constexpr int kCopied = kWOffset + 2 * kBlocks * kBlockBytes;
  static constexpr int kStageBytes = (kCopied + 1023) / 1024 * 1024;
  static constexpr int kOutStride = 68;  // floats: 64 rows and padding against conflicts
  static constexpr int kScratch = 16 * kOutStride * 4;  // of a warpgroup: 16 tokens
  static constexpr int kFit = (kSmemLimit - 2 * kScratch - 256) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kScratchOffset = kStages * kStageBytes;
  static constexpr int kBarOffset = kScratchOffset + 2 * kScratch;
  static constexpr int kSmemBytes = kBarOffset + 2 * kStages * 8;
  static constexpr int kUnroll = 1;  // stages of a loop body, so that its edge is met seldom
  static_assert(kUnits == 2, "the temps take turns within a stage");
  static_assert(kSmemBytes <= kSmemLimit && kStages >= 3);
};

// A thread's factors and addends of a unit: two tokens of every eight.
template <int kUnit>
struct XScales {
  float s[kUnit / 8][4];
  __device__ __forceinline__ void load(uint32_t at) {
#pragma unroll
    for (int j = 0; j < kUnit / 8; ++j) ptx::load_shared_f32x4(s[j], at + j * 64);
  }
};

// sum += (row's scale) * (temp * factor + addend).
template <int kUnit>
__device__ __forceinline__ void promote(float (&sum)[kUnit / 2], const float (&temp)[kUnit / 2],
                                        const XScales<kUnit>& x, uint32_t row_scales) {
  const float low = __uint_as_float(row_scales << 16);
  const float high = __uint_as_float(row_scales & 0xffff0000u);
#pragma unroll
  for (int j = 0; j < kUnit / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float exact = fmaf(temp[j * 4 + e], x.s[j][e & 1], x.s[j][2 + (e & 1)]);
      sum[j * 4 + e] = fmaf(exact, e < 2 ? low : high, sum[j * 4 + e]);
    }
}

// What a CTA does: tiles from `first` on, and of their groups [begin, end). A tile of a cluster is as
// many adjacent row tiles as it has CTAs.
struct Work {
  int first, step, tiles, begin, end;
};
template <int kCluster, bool kSplit>
__device__ __forceinline__ Work my_work(const LinearParams& p) {
  static_assert(kCluster == 1 || !kSplit);
  int cta;
  // NOTE: read where it is used; as one value for producer and consumers ptxas spilled it.
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
  const int tiles = p.num_tiles / kCluster * p.token_tiles;
  if constexpr (!kSplit) {
    return {cta / kCluster, static_cast<int>(gridDim.x) / kCluster, tiles, 0, p.groups};
  }
  const int rank = cta % p.split;
  return {cta / p.split, tiles, tiles, rank * p.groups / p.split, (rank + 1) * p.groups / p.split};
}

template <int kTokens, int kBlocks, int kCluster, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1) linear_fp8_kernel(const LinearParams p) {
  using C = Config<kTokens, kBlocks>;
  constexpr int kUnit = C::kUnit;
  extern __shared__ __align__(1024) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  const uint32_t full = base + C::kBarOffset, empty = full + C::kStages * 8;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int peer = kCluster > 1 ? static_cast<int>(blockIdx.x) % kCluster : 0;
  ptx::grid_launch_dependents();
  if (tid == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, kConsumerWarps * kCluster);
    }
    ptx::mbarrier_init_fence();
  }
  if constexpr (kCluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (warp >= kConsumerWarps) {
    ptx::registers_shrink<40>();
    if (warp == kConsumerWarps && lane == 0) {
      const Work work = my_work<kCluster, kSplit>(p);
      const auto tile128_bytes = static_cast<uint32_t>(p.groups) * 2 * kBlockBytes;
      const int slabs = (p.tokens + cuda_x::kSlabTokens - 1) / cuda_x::kSlabTokens;
      const uint64_t once =
          p.token_tiles == 1 ? ptx::policy_evict_first() : ptx::policy_evict_normal();
      const uint64_t again = ptx::policy_evict_normal();
      // Of the tile's next group: its weights, its x and how far the second 64 tokens' x are.
      const uint8_t *w, *x;
      uint32_t next_slab = 0;
      auto begin_tile = [&](int t) {
        const Tile tile = find_tile(t, p.num_tiles / kCluster, p.token_tiles, kPatchRows / kCluster);
        w = p.weights + static_cast<int64_t>(tile.row * kCluster + peer) * kBlocks * tile128_bytes +
            work.begin * (2 * kBlockBytes);
        // Tiles of 32 tokens are for M <= 32: one token tile, the front of the only slab.
        const int slab = tile.token * kTokens / cuda_x::kSlabTokens;
        x = reinterpret_cast<const uint8_t*>(p.x) + cuda_x::slab_offset(slab, work.begin, p.groups);
        // A tile may reach past the last slab: then that one is loaded again, and nobody stores it.
        next_slab = slab + 1 < slabs ? p.groups * cuda_x::kSlabBytes : 0;
      };
      auto load_w = [&](int stage) {
        ptx::mbarrier_expect(full + stage * 8, C::kCopied);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          ptx::bulk_load(base + stage * C::kStageBytes + C::kWOffset + b * 2 * kBlockBytes,
                         w + b * tile128_bytes, 2 * kBlockBytes, full + stage * 8, once);
        }
        w += 2 * kBlockBytes;
      };
      auto load_x = [&](int stage) {
        const uint32_t to = base + stage * C::kStageBytes, bar = full + stage * 8;
        if constexpr (kCluster > 1) {  // this CTA's slab, for both
          static_assert(kTokens == kCluster * cuda_x::kSlabTokens);
          const uint8_t* from = x + peer * next_slab;
          ptx::bulk_load_multicast(to + peer * cuda_x::kSlabXBytes, from, cuda_x::kSlabXBytes, bar,
                                   (1 << kCluster) - 1);
          ptx::bulk_load_multicast(to + C::kScaleOffset + peer * cuda_x::kSlabTokens * 8,
                                   from + cuda_x::kSlabXBytes, cuda_x::kSlabTokens * 8, bar,
                                   (1 << kCluster) - 1);
        } else {
          constexpr int kPart = kTokens < cuda_x::kSlabTokens ? kTokens : cuda_x::kSlabTokens;
#pragma unroll
          for (int part = 0; part < kTokens / kPart; ++part) {
            const uint8_t* from = x + (part ? next_slab : 0);
            ptx::bulk_load(to + part * kPart * 128, from, kPart * 128, bar, again);
            ptx::bulk_load(to + C::kScaleOffset + part * kPart * 8, from + cuda_x::kSlabXBytes,
                           kPart * 8, bar, again);
          }
        }
        x += cuda_x::kSlabBytes;
      };
      // Weights do not depend on the kernel before: the ring's worth of them is under way first.
      begin_tile(work.first);
      const int early = min(C::kStages, work.end - work.begin);
      for (int i = 0; i < early; ++i) load_w(i);
      ptx::grid_dependency_wait();
      for (int i = 0; i < early; ++i) load_x(i);
      int stage = early % C::kStages, left = work.end - work.begin - early;
      uint32_t parity = early == C::kStages ? 0 : 1;
      for (int t = work.first;;) {
        for (; left > 0; --left) {
          ptx::mbarrier_wait(empty + stage * 8, parity);
          load_w(stage);
          load_x(stage);
          if (++stage == C::kStages) stage = 0, parity ^= 1;
        }
        t += work.step;
        if (t >= work.tiles) break;
        begin_tile(t);
        left = work.end - work.begin;
      }
    }
    __syncwarp();
    if constexpr (kCluster > 1) ptx::cluster_sync();
    return;
  }

  ptx::registers_grow<232>();
  const int wg = warp >> 2, m16 = warp & 3, g8 = lane >> 2, t4 = lane & 3;
  float sums[C::kUnits][kUnit / 2];
  uint32_t a[2][2][4], raw[4];  // a: of 64 k, two k32 steps each
  // Of the current stage: this thread's weight words and scales, its x scales, x.
  const uint32_t first_block = C::kWOffset + wg * kBlocks * kBlockBytes;
  const uint32_t words_at = first_block + m16 * 1024 + lane * 16;
  const uint32_t row_scales_at = first_block + kNibbleBytes + g8 * 16 + m16 * 4;
  int stage = 0;
  uint32_t parity = 0;
  auto fetch = [&](uint32_t stage_at, int block, int k64) {
    ptx::load_shared_16(raw, stage_at + words_at + block * kBlockBytes + k64 * 512);
  };
  auto unpack = [&](int k64) {
    ptx::dequant_e4m3(a[k64][0], raw[0], raw[1]);
    ptx::dequant_e4m3(a[k64][1], raw[2], raw[3]);
  };
  auto multiply = [&](float(&temp)[kUnit / 2], int unit, int k64, uint32_t stage_at) {
    const uint32_t x_at =
        ptx::descriptor_address(stage_at) + unit % C::kHalves * (kUnit * 128 >> 4) + k64 * 4;
    ptx::wgmma_fence();
    if (k64 == 0) {
      ptx::Wgmma<kUnit>::rs_e4m3_first(temp, a[0][0], ptx::descriptor_k_major(x_at));
    } else {
      ptx::Wgmma<kUnit>::rs_e4m3(temp, a[1][0], ptx::descriptor_k_major(x_at));
    }
    ptx::Wgmma<kUnit>::rs_e4m3(temp, a[k64][1], ptx::descriptor_k_major(x_at + 2));
    ptx::wgmma_commit();
  };
  auto release = [&](uint32_t bar) {
    if (lane == 0) {
      ptx::mbarrier_arrive(bar);
      if constexpr (kCluster == 2) {
        ptx::mbarrier_arrive_remote(bar, static_cast<uint32_t>(peer ^ 1));
      }
    }
  };
  auto x_scales_of = [&](int unit, uint32_t stage_at) {
    return stage_at + C::kScaleOffset + unit % C::kHalves * kUnit * 8 + t4 * 16;
  };

  const Work work = my_work<kCluster, kSplit>(p);
  ptx::grid_dependency_wait();
  for (int t = work.first; t < work.tiles; t += work.step) {
#pragma unroll
    for (int u = 0; u < C::kUnits; ++u)
#pragma unroll
      for (int i = 0; i < kUnit / 2; ++i) sums[u][i] = 0.0f;
    int left = work.end - work.begin;
    uint32_t stage_at = base + stage * C::kStageBytes;
    ptx::mbarrier_wait(full + stage * 8, parity);
    fetch(stage_at, 0, 0);
    // One pass over kCount stages.
    auto pass = [&](auto count_tag) {
      constexpr int kCount = decltype(count_tag)::value;
      float temp[C::kUnits][kUnit / 2];
      XScales<kUnit> x_scales;
      uint32_t scales = 0, done = 0;  // row scales; empty barrier of the stage before
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
#pragma unroll
        for (int u = 0; u < C::kUnits; ++u) {
          const bool first = s == 0 && u == 0;  // nothing is in flight
          const uint32_t scales_before = scales;
          if (u % C::kHalves == 0) {
            const int block = u / C::kHalves;
            if (!first) ptx::wgmma_wait<1>();  // a[0] is free
            unpack(0);
            fetch(stage_at, block, 1);
            multiply(temp[u], u, 0, stage_at);
            if (!first) ptx::wgmma_wait<1>();  // the unit before is complete, a[1] free
            unpack(1);
            multiply(temp[u], u, 1, stage_at);
            scales = ptx::load_shared_4(stage_at + row_scales_at + block * kBlockBytes);
            if (block + 1 < kBlocks) fetch(stage_at, block + 1, 0);
          } else {
            multiply(temp[u], u, 0, stage_at);
            multiply(temp[u], u, 1, stage_at);
            ptx::wgmma_wait<2>();  // the unit before is complete
          }
          const int before = 1 - u;
          if (!first) {
            promote<kUnit>(sums[before], temp[before], x_scales, scales_before);
            if (u == 0) release(done);
          }
          x_scales.load(x_scales_of(u, stage_at));  // they arrive while the unit is multiplied
        }
        done = empty + stage * 8;
        if (++stage == C::kStages) stage = 0, parity ^= 1;
        stage_at = base + stage * C::kStageBytes;
        if (s + 1 < kCount || left > kCount) {
          ptx::mbarrier_wait(full + stage * 8, parity);
          fetch(stage_at, 0, 0);
        }
      }
      ptx::wgmma_wait<0>();
      promote<kUnit>(sums[1], temp[1], x_scales, scales);
      release(done);
      left -= kCount;
    };
    if constexpr (C::kUnroll > 1) {
#pragma unroll 1
      while (left >= C::kUnroll) pass(std::integral_constant<int, C::kUnroll>{});
    }
#pragma unroll 1
    while (left > 0) pass(std::integral_constant<int, 1>{});

    // NOTE: opaque copies, or the compiler computes the addresses of exchange and epilogue before
    // the main loop and has no registers left for it.
    constexpr int kOctets = kTokens / 8;
    int cta = static_cast<int>(blockIdx.x), parts = kSplit ? p.split : 1, id = tid;
    asm volatile("" : "+r"(cta), "+r"(parts), "+r"(id));
    const int part = kSplit ? cta % parts : 0;
    const int group4 = id >> 7, group_id = id & 127;  // consumer warpgroup, thread of it
    const uint32_t scratch = base + C::kScratchOffset + group4 * C::kScratch;
    const int own = kSplit ? part * kOctets / parts : 0;
    const int own_end = kSplit ? (part + 1) * kOctets / parts : kOctets;
    // Four sums: rows g8 and g8 + 8 of the block, tokens 8 * octet + 2 * t4 and the next.
    auto vector = [&](int block, int octet) -> float(&)[4] {
      float* first = &sums[block * C::kHalves + octet / (kUnit / 8)][octet % (kUnit / 8) * 4];
      return *reinterpret_cast<float(*)[4]>(first);
    };
    if constexpr (kSplit) {
      // pieces: [CTA that owns][CTA that sends][eight of the owner][block][thread][4]
      const int share = (kOctets + parts - 1) / parts;
      auto place = [&](int owner, int sender, int octet, int block) {
        return p.pieces + (cta + owner - part) * p.piece_stride +
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
      for (int i = 0; i < kOctets; ++i) {
        if (i < own || i >= own_end) continue;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          take_over_senders(place(part, 0, i, b), share * kBlocks * 1024, part, parts,
                            vector(b, i));
        }
      }
    }

    // Epilogue: K2's, a row block after the other. [token][row] in shared memory, 16 tokens at a
    // time; then a thread has 8 adjacent rows of one token (gate_up: 4 gates and their ups).
    const Tile at = find_tile(kSplit ? cta / parts : t, p.num_tiles, p.token_tiles, kPatchRows);
    const bool silu = p.epilogue == static_cast<int>(Epilogue::kSiluMul);
    const bool residual = p.epilogue == static_cast<int>(Epilogue::kResidual);
    const int in = group_id >> 3, chunk = id & 7;
    const uint32_t to_shared =
        scratch + ((id & 3) * 2 * C::kOutStride + (group_id >> 5) * 16 + (id >> 2 & 7)) * 4;
    const uint32_t from =
        scratch +
        (in * C::kOutStride + (silu ? (chunk >> 1) * 16 + (chunk & 1) * 4 : chunk * 8)) * 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int block_row =
          (at.row * kCluster + cta % kCluster) * C::kRows + (group4 * kBlocks + b) * 64;
      const int column = silu ? block_row / 2 + chunk * 4 : block_row + chunk * 8;
      // Where this thread's part of a pass goes, or -1.
      auto locate = [&](int pass) -> int64_t {
        const int octet = 2 * pass + (in >> 3), token = at.token * kTokens + 8 * octet + (in & 7);
        const bool mine =
            octet >= own && octet < own_end && token < p.tokens && column < p.out_stride;
        return mine ? static_cast<int64_t>(token) * p.out_stride + column : -1;
      };
      // What it reads from global memory is requested a pass ahead.
      auto request = [&](int pass) {
        const int64_t to = locate(pass);
        return residual && to >= 0 ? *reinterpret_cast<const uint4*>(p.residual + to)
                                   : make_uint4(0, 0, 0, 0);
      };
      float4 out_scale = make_float4(1, 1, 1, 1);
      if (silu && p.out_scale && column < p.out_stride) {
        out_scale = *reinterpret_cast<const float4*>(p.out_scale + column);
      }
      uint4 ahead = request(own / 2);
#pragma unroll
      for (int pass = 0; pass < kOctets / 2; ++pass) {
        if (2 * pass + 1 < own || 2 * pass >= own_end) continue;
        const uint4 old = ahead;
        ahead = request(pass + 1);
        ptx::named_barrier(1 + group4, 128);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float(&four)[4] = vector(b, 2 * pass + e);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int token = e * 8 + (j & 1), row = 8 * (j >> 1);
            ptx::store_shared_f32(to_shared + (token * C::kOutStride + row) * 4, four[j]);
          }
        }
        ptx::named_barrier(1 + group4, 128);
        const int64_t to = locate(pass);
        if (to < 0) continue;
        store_part(p, to, silu, from, old, out_scale);
      }
    }
    if constexpr (kSplit) break;  // one tile
  }
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
  p.split = kCluster > 1 ? 1 : std::max(1, std::min({split, p.groups, kMaxSplit}));
  while (p.split > 1 && tiles * p.split > slots) --p.split;  // all resident at once
  int clusters = tiles * p.split;
  if (p.split == 1) {
    const int per_cluster = (tiles + slots - 1) / slots;
    clusters = (tiles + per_cluster - 1) / per_cluster;
  }
  auto* kernel = linear_fp8_kernel<kTokens, kBlocks, kCluster, false>;
  if constexpr (kCluster == 1) {
    if (p.split > 1) kernel = linear_fp8_kernel<kTokens, kBlocks, kCluster, true>;
  }
  return launch_linear(kernel, args, clusters * kCluster, kThreads, C::kSmemBytes, stream,
                       kCluster, p);
}

int tile_tokens(int tokens) { return tokens <= 32 ? 32 : tokens <= 64 ? 64 : 128; }

}  // namespace

WgmmaTactic fp8_tactic(const LinearArgs& args) {
  const int tokens = tile_tokens(args.tokens);
  const int64_t tiles128 = (args.rows + 127) / 128, slots = args.num_sms;
  const int64_t token_tiles = (args.tokens + tokens - 1) / tokens;
  if (tokens > 64) {
    // Narrow: k shared by as many CTAs as there are SMs.
    const int64_t tiles = tiles128 * token_tiles;
    if (tiles * 2 > slots) return {2, 2, 1};
    return {2, 1, static_cast<int>(std::clamp<int64_t>(slots / tiles, 1, kMaxSplit))};
  }
  if (tiles128 > slots) return {4, 1, 1};
  return {2, 1, static_cast<int>(std::clamp<int64_t>(slots / tiles128, 1, kMaxSplit))};
}

int linear_fp8(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.k % 8 || args.rows % 8) return cudaErrorInvalidValue;
  const WgmmaTactic t = args.tactic < 0 ? fp8_tactic(args) : WgmmaTactic::decode(args.tactic);
  const bool even = (args.rows + 127) / 128 % 2 == 0;  // 256 rows: two tiles of 128, or two CTAs
  switch (tile_tokens(args.tokens)) {
    case 32:
      return t.row_blocks == 4 && even ? launch<32, 2, 1>(args, t.split, stream)
                                       : launch<64, 1, 1>(args, t.split, stream);
    case 64:
      return t.row_blocks == 4 && even ? launch<64, 2, 1>(args, t.split, stream)
                                       : launch<64, 1, 1>(args, t.split, stream);
    default:
      return t.cluster == 2 && even ? launch<128, 1, 2>(args, t.split, stream)
                                    : launch<128, 1, 1>(args, t.split, stream);
  }
}

}  // namespace nibble::cuda
