// K2: out[M, N] = x[M, K] W4[N, K]^T for M from 9 up: bandwidth and tensor cores at once. Weights
// are dequantized in registers and enter wgmma as operand A; tokens are its N.
//
// Layouts: W in layout.h's blocks; x bf16 row-major through a tensor map (boxes of kTokens/2 x 64,
// 128-byte swizzle); out bf16 row-major. Bytes: N*K*0.515625 of weights once from device memory;
// x from L2, 2*kTokens/(0.5156*rows that share it) of that: the L2-to-SM traffic of x is what
// binds narrow tiles, so tiles are tall and two CTAs of a cluster may share every x box
// (multicast). Flops: 2*M*N*K with M padded to whole token tiles (wgmma_tactic.h).
//
// Work split: a CTA is 16 consumer warps (four warpgroups) and one producer warp. A tile has
// kRowBlocks = 4 blocks of 64 rows, one per warpgroup; or 2, and then two warpgroups take a block's
// stages in turn and add up at the end of the tile (each gets every second eight of tokens). Or a
// CTA has one or two warpgroups, a block each.
//
// Where a block is one warpgroup's alone a token has the same bits whatever the tile
// (LinearArgs::in_order): its products are added in k order, or if k is long in three parts
// (wgmma_parts()), whose sums are added in theirs, whether three CTAs have them or one has all and
// keeps the sums so far in L2.
//
// A warpgroup's rhythm: issue the two wgmma of 32 k, wait for the two before, dequantize the next
// 32 k into the operand buffer that this frees. So a warpgroup always has work queued: when each
// waited for all of its own, the four of them fell into step and the tensor cores idled while all
// dequantized (measured: 20 %).
//
// Wide matrices: whole tiles per CTA, in an order that keeps the tiles in flight in a compact patch
// (12 row tiles x all their token tiles) so that L2 serves both operands. Narrow ones: S CTAs share
// a tile's k and reduce-scatter it: each owns some of the tokens (in eights), sends the others'
// sums away in the f32 exchange of linear_common.cuh and adds what it gets in CTA order.
// Deterministic either way.
//
// Limits: K a multiple of 8, rows a multiple of 8 (16 with SiLU); sm_90a. All CTAs of a grid must
// be resident at once where they share k.
//
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/wgmma.cuh"
#include "backends/cuda/wgmma_tactic.h"

namespace nibble::cuda {
namespace {

constexpr int kWarpgroups = 4;  // of consumers, where there are not fewer
// The producer has a warpgroup to itself for the sake of setmaxnreg; its other three warps work out
// what the epilogue multiplies by.
constexpr int kIdleWarps = 3;
constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);
constexpr int kSmemLimit = 232448;

// kWays: warpgroups that share a row block.
template <int kTokens, int kRowBlocks, int kWays>
struct Config {
  static constexpr int kGroups = kRowBlocks * kWays;  // consumer warpgroups
  static constexpr int kConsumerWarps = 4 * kGroups;
  static constexpr int kThreads = (kConsumerWarps + 4) * 32;
  static constexpr int kRows = 64 * kRowBlocks;  // of a CTA
  static constexpr int kXBytes = kTokens * 256;
  static constexpr int kWBytes = kRowBlocks * kBlockBytes;
  static constexpr int kOctets = kTokens / 8 / kWays;  // of tokens, of a warpgroup
  static constexpr int kSiluOctets = kOctets < 8        ? kOctets
                                     : kOctets % 8 == 0 ? 8
                                     : kOctets % 4 == 0 ? 4
                                                        : kOctets / 2;
  static constexpr int kOutStride = 68;  // floats: 64 rows and padding against conflicts
  static constexpr int kStagingBytes = 16 * kOutStride * 4;  // per warpgroup: 16 tokens
  static constexpr int kExchangeBytes = kWays == 1 ? 0 : kOctets * 4 * 128 * 4;
  static constexpr int kScratch = kStagingBytes > kExchangeBytes ? kStagingBytes : kExchangeBytes;
  // Behind the barriers: by what the epilogue multiplies each token, 1/rms of a norm included; as
  // many again for each warp that adds up squares.
  static constexpr bool kNorms = kTokens <= kMaxNormTokens && kGroups == kWarpgroups;
  static constexpr int kFactorBytes = kNorms ? kIdleWarps * kTokens * 4 : 0;
  static constexpr int kFit =
      (kSmemLimit - kGroups * kScratch - kFactorBytes - 256) / (kXBytes + kWBytes);
  static constexpr int kStages = (kFit < 8 ? kFit : 8) / kWays * kWays;
  static constexpr int kWOffset = kStages * kXBytes;
  static constexpr int kScratchOffset = kWOffset + kStages * kWBytes;
  static constexpr int kBarOffset = kScratchOffset + kGroups * kScratch;
  static constexpr int kFactorBarOffset = kBarOffset + 2 * kStages * 8;
  static constexpr int kFactorOffset = kFactorBarOffset + 8;
  static constexpr int kSmemBytes = kFactorOffset + kFactorBytes;
  static_assert(kSmemBytes <= kSmemLimit && kStages >= 3);
};

template <int kTokens, int kRowBlocks, int kWays, int kCluster, bool kSplit>
__global__ void __launch_bounds__(Config<kTokens, kRowBlocks, kWays>::kThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ CUtensorMap x_map, const LinearParams p) {
  using C = Config<kTokens, kRowBlocks, kWays>;
  constexpr int kConsumerWarps = C::kConsumerWarps;
  extern __shared__ __align__(1024) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  constexpr bool kNorms = C::kNorms;
  const uint32_t full = base + C::kBarOffset, empty = full + C::kStages * 8;
  const uint32_t factors_done = base + C::kFactorBarOffset, factors = base + C::kFactorOffset;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int peer = kCluster == 2 ? static_cast<int>(blockIdx.x & 1) : 0;
  const int cluster = blockIdx.x / kCluster, num_clusters = gridDim.x / kCluster;
  // A cluster works on kCluster adjacent row tiles at a time; with split > 1 on one part of one.
  const int row_tiles = p.num_tiles / kCluster;
  const int split = kSplit ? p.split : 1;
  const int first_tile = kSplit ? over_split(p, cluster) : cluster;
  const int rank = kSplit ? cluster - first_tile * split : 0;
  const int tile_step = kSplit ? over_split(p, num_clusters) : num_clusters;
  const int num_tiles = row_tiles * p.token_tiles;
  // k of this CTA, or of the first of the parts that it sums one by one.
  constexpr bool kParts = !kSplit && kWays == 1;
  const int g_begin = kSplit ? first_unit(p, rank) : 0;
  const int g_end = kSplit ? first_unit(p, rank + 1) : kParts ? first_unit(p, 1) : p.groups;

  TRACE(0);
  ptx::grid_launch_dependents();
  if (tid == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, kConsumerWarps / kWays * kCluster);
    }
    ptx::mbarrier_init(factors_done, 32);
    ptx::mbarrier_init_fence();
  }
  if constexpr (kCluster == 2) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (warp >= kConsumerWarps) {
    if constexpr (C::kGroups == kWarpgroups) ptx::registers_shrink<32>();
    if (warp == kConsumerWarps && lane == 0) {
      const int64_t tile128_bytes = static_cast<int64_t>(p.groups) * 2 * kBlockBytes;
      const uint64_t policy =
          p.token_tiles == 1 ? ptx::policy_evict_first() : ptx::policy_evict_normal();
      // from: the first block of the tile's group; x and y: coordinates of the x box.
      auto load_w = [&](const uint8_t* from, int stage) {
        ptx::mbarrier_expect(full + stage * 8, C::kWBytes + C::kXBytes);
        constexpr int kPiece = C::kWBytes < 2 * kBlockBytes ? C::kWBytes : 2 * kBlockBytes;
#pragma unroll
        for (int b = 0; b < C::kWBytes / kPiece; ++b) {
          ptx::bulk_load(base + C::kWOffset + stage * C::kWBytes + b * kPiece,
                         from + b * tile128_bytes, kPiece, full + stage * 8, policy);
        }
      };
      auto load_x = [&](int x, int y, int stage) {
        const uint32_t to = base + stage * C::kXBytes;
        if constexpr (kCluster == 2) {  // this CTA's half of the tokens, for both
          const uint32_t half = to + peer * (kTokens / 2) * 128;
          y += peer * (kTokens / 2);
          ptx::tensor_load_2d_multicast(half, &x_map, x, y, full + stage * 8, 3);
          ptx::tensor_load_2d_multicast(half + kTokens * 128, &x_map, x + 64, y, full + stage * 8,
                                        3);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ptx::tensor_load_2d(to + (i >> 1) * kTokens * 128 + (i & 1) * (kTokens / 2) * 128,
                                &x_map, x + (i >> 1) * 64, y + (i & 1) * (kTokens / 2),
                                full + stage * 8);
          }
        }
      };
      auto weights_of = [&](const Tile& tile) {
        const int block = (tile.row * kCluster + peer) * kRowBlocks;
        return p.weights + block / 2 * tile128_bytes + block % 2 * kBlockBytes +
               g_begin * (2 * kBlockBytes);
      };
      ptx::prefetch_tensor_map(&x_map);
      // Weights do not depend on the kernel before: half a ring of them is under way first. A whole
      // ring would be in x's way.
      const Tile tile = find_tile(first_tile, row_tiles, p.token_tiles, kPatchRows / kCluster);
      const uint8_t* from = weights_of(tile);
      int x = g_begin * 128, y = tile.token * kTokens, stage = 0;
      const int early = min(C::kStages / 2, g_end - g_begin);
      for (; stage < early; ++stage, from += 2 * kBlockBytes) load_w(from, stage);
      ptx::grid_dependency_wait();
      for (stage = 0; stage < early; ++stage, x += 128) load_x(x, y, stage);
      // A tile and each part of k start at stage 0, so barriers have parities of their own.
      uint32_t parities = ~0u << early;
      for (int t = first_tile;;) {
        for (int part = 0, end = g_end;;) {
          for (; x < end * 128; x += 128, from += 2 * kBlockBytes) {
            ptx::mbarrier_wait(empty + stage * 8, parities >> stage & 1);
            parities ^= 1u << stage;
            load_w(from, stage);
            load_x(x, y, stage);
            if (++stage == C::kStages) stage = 0;
          }
          if (!kParts || ++part == p.parts) break;
          end = first_unit(p, part + 1);
          stage = 0;
        }
        t += tile_step;
        if (t >= num_tiles) break;
        const Tile at = find_tile(t, row_tiles, p.token_tiles, kPatchRows / kCluster);
        from = weights_of(at);
        x = g_begin * 128;
        y = at.token * kTokens;
        stage = 0;
      }
    } else if (kNorms && warp > kConsumerWarps) {  // one token tile, so tile t has the rows of t
      const int idle = warp - kConsumerWarps - 1;
      for (int t = first_tile; t < num_tiles; t += tile_step) {
        const int row = (t * kCluster + peer) * C::kRows;
        prefetch_epilogue(p, static_cast<Epilogue>(p.epilogue), row, row + C::kRows,
                          idle * 32 + lane, kIdleWarps * 32);
      }
      ptx::grid_dependency_wait();
      add_up_squares<kTokens, kIdleWarps>(p, factors, idle, lane, ptx::kDequantUndo);
      if (idle == 0) ptx::mbarrier_arrive(factors_done);
    }
    __syncwarp();
    if constexpr (kCluster == 2) ptx::cluster_sync();
    return;
  }

  if constexpr (C::kGroups == kWarpgroups) ptx::registers_grow<112>();
  const int wg = warp >> 2, m16 = warp & 3, g8 = lane >> 2, t4 = lane & 3;
  const int row_block = wg % kRowBlocks, way = wg / kRowBlocks;
  const uint32_t scratch = base + C::kScratchOffset + wg * C::kScratch;
  // This warpgroup's stages are way, way + kWays, ... A group is kSteps wgmma of 16 k from one of
  // the two operand buffers; two or four a stage, so the buffers alternate statically.
  constexpr int kSteps =
      C::kGroups < kWarpgroups || (kTokens <= kMaxNormTokens && kRowBlocks == 4 && kSplit) ? 4 : 2;
  uint32_t a[2][kSteps][4], raw[4];
  ptx::RowScales scales;
  float acc[kTokens / 2];
  uint32_t parities = 0;  // of the full barriers, one bit a stage
  const uint32_t weights_at = base + C::kWOffset + way * C::kWBytes + row_block * kBlockBytes;
  const uint32_t nibbles_at = weights_at + m16 * 1024 + lane * 16;
  const uint32_t scales_at = weights_at + kNibbleBytes + g8 * 16 + m16 * 4;
  const uint32_t x_at = ptx::descriptor_address(base) + way * (C::kXBytes >> 4);
  const uint32_t my_full = full + way * 8, my_empty = empty + way * 8;
  int stages = (g_end - g_begin + kWays - 1 - way) / kWays;  // of this warpgroup
  auto arrived = [&](int s) {
    ptx::mbarrier_wait(my_full + s * 8, parities >> s & 1);
    parities ^= 1u << s;
  };
  auto fetch = [&](int s, int k64) {
    ptx::load_shared_16(raw, nibbles_at + s * C::kWBytes + k64 * 512);
  };
  auto fetch_scales = [&](int s) {
    scales = ptx::row_scales(ptx::load_shared_4(scales_at + s * C::kWBytes));
  };
  auto release = [&](int s) {
    __syncwarp();  // lane 0 speaks for what all have read
    if (lane == 0) {
      ptx::mbarrier_arrive(my_empty + s * 8);
      if constexpr (kCluster == 2) {
        ptx::mbarrier_arrive_remote(my_empty + s * 8, static_cast<uint32_t>(peer ^ 1));
      }
    }
  };

  TRACE(1);
  ptx::grid_dependency_wait();
  TRACE(2);
  [[maybe_unused]] int64_t buffer = 0;  // of the exchange
  for (int t = first_tile, part_of_k = 0; t < num_tiles;) {
    if constexpr (kParts) stages = first_unit(p, part_of_k + 1) - first_unit(p, part_of_k);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
    int left = stages;
    if (left > 0) {
      arrived(0);
      TRACE(3);
      fetch_scales(0);
      fetch(0, 0);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) ptx::dequant(a[0][k], raw[k], scales);
      if constexpr (kSteps == 4) fetch(0, 1);

      // The stages are unrolled: every address below is a register plus a constant. (With the stage
      // in a register, a third of the loop's instructions were address arithmetic.)
      bool first = true;
#pragma unroll 1
      do {
#pragma unroll
        for (int s = 0; s < C::kStages; s += kWays) {
          constexpr int kLast = C::kStages - kWays;
          const int next = s == kLast ? 0 : s + kWays;
          const int previous = s == 0 ? kLast : s - kWays;
#pragma unroll
          for (int i = 0; i < 8 / kSteps; ++i) {
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
              const int k16 = i * kSteps + k;
              ptx::Wgmma<kTokens>::rs_bf16(
                  acc, a[i & 1][k],
                  ptx::descriptor_k_major(x_at + ((s * C::kXBytes + k16 / 4 * kTokens * 128) >> 4) +
                                          k16 % 4 * 2));
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<1>();  // the group before: its operand buffer and its stage are free
            if (i == 0 && (s > 0 || !first)) release(previous);
            uint32_t(&next_a)[kSteps][4] = a[~i & 1];
            // After the last group of the tile what follows is unused.
            if constexpr (kSteps == 4) {
#pragma unroll
              for (int k = 0; k < 4; ++k) ptx::dequant(next_a[k], raw[k], scales);
              if (left > 1) {
                if (i == 0) {
                  arrived(next);
                  fetch_scales(next);
                }
                fetch(next, i);
              }
            } else {
              const int half = ~i & 1;  // of raw
#pragma unroll
              for (int k = 0; k < 2; ++k) ptx::dequant(next_a[k], raw[2 * half + k], scales);
              if (i == 0) {
                fetch(s, 1);
              } else if (i == 2 && left > 1) {
                arrived(next);
                fetch_scales(next);
                fetch(next, 0);
              }
            }
          }
          if (--left == 0) break;
        }
        first = false;
      } while (left > 0);
      ptx::wgmma_wait<0>();
      release((stages - 1) * kWays % C::kStages);
    }

    if constexpr (kParts) {
      // The sums of the parts before wait in L2, each thread's own; four loads in flight together.
      if (p.parts > 1) {
        float4* stash = reinterpret_cast<float4*>(p.stash + blockIdx.x * kStashFloats) + tid;
        asm volatile("" : "+l"(stash));  // NOTE: or its addresses live through the main loop
        constexpr int kBatch = kTokens / 8 % 4 == 0 ? 4 : 2;
#pragma unroll
        for (int first = 0; first < kTokens / 8; first += kBatch) {
          float4 before[kBatch] = {};
          if (part_of_k > 0) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) before[i] = stash[(first + i) * kConsumerWarps * 32];
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            float* four = &acc[4 * (first + i)];
            if (part_of_k > 0) {
              four[0] = before[i].x + four[0], four[1] = before[i].y + four[1];
              four[2] = before[i].z + four[2], four[3] = before[i].w + four[3];
            }
            if (part_of_k + 1 < p.parts) {
              stash[(first + i) * kConsumerWarps * 32] =
                  make_float4(four[0], four[1], four[2], four[3]);
            }
          }
        }
        if (++part_of_k < p.parts) continue;
        part_of_k = 0;
      }
    }

    TRACE(4);
    // sums[i]: this warpgroup's eights of tokens; eight i is tokens 8i or, of two ways,
    // 8 (2i + way).
    float sums[C::kOctets][4];
    if constexpr (kWays == 1) {
#pragma unroll
      for (int i = 0; i < C::kOctets; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = acc[i * 4 + j];
    } else {
      const uint32_t mine = scratch + (tid & 127) * 16;
      const uint32_t other = way ? mine - 2 * C::kScratch : mine + 2 * C::kScratch;
#pragma unroll
      for (int i = 0; i < C::kOctets; ++i) {
        float send[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          send[j] = way ? acc[i * 8 + j] : acc[i * 8 + 4 + j];
          sums[i][j] = way ? acc[i * 8 + 4 + j] : acc[i * 8 + j];
        }
        ptx::store_shared_16(mine + i * 2048, send);
      }
      ptx::named_barrier(5 + row_block, 256);
#pragma unroll
      for (int i = 0; i < C::kOctets; ++i) {
        uint32_t got[4];
        ptx::load_shared_16(got, other + i * 2048);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += __uint_as_float(got[j]);
      }
      ptx::named_barrier(5 + row_block, 256);  // scratch is free for the staging below
    }

    // NOTE: opaque copies, or the compiler computes the exchange's addresses before the main loop
    // and has no registers left for it.
    int part = rank, parts = split;
    if constexpr (kSplit) asm volatile("" : "+r"(part), "+r"(parts));
    const int own = part * C::kOctets / parts, own_end = (part + 1) * C::kOctets / parts;
    if constexpr (kSplit) {
      // pieces: [CTA that owns][CTA that sends][eight of the owner][thread][4]
      const int share = (C::kOctets + parts - 1) / parts;
      // Tiles take turns with two buffers: who sends those of one has all of the one before, whose
      // senders have emptied what they got of the one before that.
      auto place = [&](int owner, int sender, int octet) {
        return p.pieces + (blockIdx.x + (owner - part) * kCluster) * p.piece_stride + buffer +
               (sender * share + octet - owner * C::kOctets / parts) * 2048 + tid * 4;
      };
#pragma unroll
      for (int i = 0; i < C::kOctets; ++i) {
        if (i >= own && i < own_end && !p.in_order) continue;
        hand_over(place(((i + 1) * parts - 1) / C::kOctets, part, i), sums[i]);
      }
#pragma unroll
      for (int i = 0; i < C::kOctets; ++i) {
        if (i < own || i >= own_end) continue;
        take_over_senders(place(part, 0, i), share * 2048, part, parts, p.in_order, sums[i]);
      }
      if (t + tile_step < num_tiles) __threadfence();
      buffer ^= kPieceFloats / 2;
    }

    TRACE(5);
    const Tile at = find_tile(t, row_tiles, p.token_tiles, kPatchRows / kCluster);
    const int block_row = (at.row * kCluster + peer) * C::kRows + row_block * 64;
    auto first_token = [&](int octet) {
      return at.token * kTokens + 8 * (kWays == 1 ? octet : 2 * octet + way);
    };
    if constexpr (kNorms) ptx::mbarrier_wait(factors_done, 0);
    auto factor = [&](int octet) {  // of the tokens 2 t4 and the next of an eight
      if constexpr (!kNorms) return make_float2(ptx::kDequantUndo, ptx::kDequantUndo);
      return ptx::load_shared_f32x2(factors + (first_token(octet) + 2 * t4) * 4);
    };
    if (p.epilogue == static_cast<int>(Epilogue::kSiluMul)) {
      store_silu<C::kOctets, C::kSiluOctets>(
          p, scratch, 1 + wg, tid, block_row / 2, own, own_end,
          [&](int octet) -> const float(&)[4] { return sums[octet]; }, factor, first_token);
    } else {
      // [token][row] in shared memory, 16 tokens at a time; then a thread has 8 adjacent rows of
      // one token. The residual is requested a pass ahead: the latency of one load a pass was 13 %
      // of gate_up at 128 tokens.
      const bool residual = p.epilogue == static_cast<int>(Epilogue::kResidual);
      const int in = (tid & 127) >> 3, chunk = tid & 7, column = block_row + chunk * 8;
      const uint32_t from = scratch + (in * C::kOutStride + chunk * 8) * 4;
      // Where this thread's part of a pass goes, or -1.
      auto locate = [&](int pass) -> int64_t {
        const int octet = 2 * pass + (in >> 3), token = first_token(octet) + (in & 7);
        const bool mine =
            octet >= own && octet < own_end && token < p.tokens && column < p.out_stride;
        return mine ? static_cast<int64_t>(token) * p.out_stride + column : -1;
      };
      auto request = [&](int pass) {
        const int64_t to = locate(pass);
        return residual && to >= 0 ? *reinterpret_cast<const uint4*>(p.residual + to)
                                   : make_uint4(0, 0, 0, 0);
      };
      uint4 ahead = request(own / 2);
      NextNorm next;
      if constexpr (kNorms) next = NextNorm(p, column);
#pragma unroll
      for (int pass = 0; pass < (C::kOctets + 1) / 2; ++pass) {
        if (2 * pass + 1 < own || 2 * pass >= own_end) continue;
        const uint4 old = ahead;
        ahead = request(pass + 1);
        ptx::named_barrier(1 + wg, 128);
#pragma unroll
        for (int e = 0; e < 2 && 2 * pass + e < C::kOctets; ++e) {
          const float2 by = factor(2 * pass + e);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int token = e * 8 + 2 * t4 + (j & 1), row = m16 * 16 + g8 + 8 * (j >> 1);
            ptx::store_shared_f32(scratch + (token * C::kOutStride + row) * 4,
                                  sums[2 * pass + e][j] * (j & 1 ? by.y : by.x));
          }
        }
        ptx::named_barrier(1 + wg, 128);
        const int64_t to = locate(pass);
        uint4 stored = make_uint4(0, 0, 0, 0);
        if (to >= 0) stored = store_part(p, to, from, old);
        if constexpr (kNorms) {
          if (p.next) next.store(p, to, column, stored);
        }
      }
    }
    if constexpr (kWays == 2) ptx::named_barrier(5 + row_block, 256);  // before next exchange
    t += tile_step;
  }
  TRACE(6);
  TRACE_SM();
  __syncwarp();
  if constexpr (kCluster == 2) ptx::cluster_sync();  // nobody leaves while a peer may write here
}

template <int kTokens, int kRowBlocks, int kCluster, int kWays>
int launch(const LinearArgs& args, const WgmmaShares& shares, void* stream) {
  using C = Config<kTokens, kRowBlocks, kWays>;
  LinearParams p = make_linear_params(args, C::kRows);
  p.token_tiles = (args.tokens + kTokens - 1) / kTokens;
  p.epilogue = static_cast<int>(args.epilogue);
  set_split(p, shares.split);
  p.parts = shares.parts;
  if (p.parts > 1) set_shares(p, p.groups, p.parts);
  CUtensorMap map;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  std::memcpy(&map, args.x_map, sizeof map);
  auto* kernel = linear_wgmma_kernel<kTokens, kRowBlocks, kWays, kCluster, false>;
  if constexpr (kRowBlocks > 1) {
    if (p.split > 1) kernel = linear_wgmma_kernel<kTokens, kRowBlocks, kWays, kCluster, true>;
  }
  return launch_linear(kernel, args, shares.clusters * kCluster, C::kThreads, C::kSmemBytes, stream,
                       kCluster, map, p);
}

template <typename Launch>
int for_tile(int tile, Launch&& launch) {
  switch (tile) {
    case 16: return launch(std::integral_constant<int, 16>{});
    case 32: return launch(std::integral_constant<int, 32>{});
    case 48: return launch(std::integral_constant<int, 48>{});
    case 64: return launch(std::integral_constant<int, 64>{});
    case 80: return launch(std::integral_constant<int, 80>{});
    case 96: return launch(std::integral_constant<int, 96>{});
    case 112: return launch(std::integral_constant<int, 112>{});
    default: return launch(std::integral_constant<int, 128>{});
  }
}

}  // namespace

int linear_wgmma(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.k % 8 || args.rows % 8) return cudaErrorInvalidValue;
  const WgmmaTactic t =
      wgmma_fit(args, args.tactic < 0 ? wgmma_tactic(args) : WgmmaTactic::decode(args.tactic));
  if (t.warpgroups < 4 && (args.squares || args.next)) return cudaErrorInvalidValue;
  if (t.warpgroups == 1 && t.split > 1) return cudaErrorInvalidValue;
  const WgmmaShares shares = wgmma_shares(args, t);
  if (shares.split == 0) return cudaErrorInvalidValue;
  const bool pairs = t.cluster == 2;
  return for_tile(wgmma_tile_tokens(args), [&](auto tokens_tag) {
    constexpr int kTokens = decltype(tokens_tag)::value;
    if (t.row_blocks == 4) {
      return pairs ? launch<kTokens, 4, 2, 1>(args, shares, stream)
                   : launch<kTokens, 4, 1, 1>(args, shares, stream);
    }
    if (t.warpgroups == 4) {
      return pairs ? launch<kTokens, 2, 2, 2>(args, shares, stream)
                   : launch<kTokens, 2, 1, 2>(args, shares, stream);
    }
    if (t.row_blocks == 2) {
      return pairs ? launch<kTokens, 2, 2, 1>(args, shares, stream)
                   : launch<kTokens, 2, 1, 1>(args, shares, stream);
    }
    return pairs ? launch<kTokens, 1, 2, 1>(args, shares, stream)
                 : launch<kTokens, 1, 1, 1>(args, shares, stream);
  });
}

}  // namespace nibble::cuda
