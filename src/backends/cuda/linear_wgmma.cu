// K2: out[M, N] = x[M, K] W4[N, K]^T for M from 9 to a few hundred tokens: bandwidth and tensor
// cores at once. Weights are dequantized in registers and enter wgmma as operand A; tokens are its
// N.
//
// Layouts: W in layout.h's blocks; x bf16 row-major through a tensor map (boxes of kTokens x 64,
// 128- byte swizzle); out bf16 row-major. Bytes: N*K*0.515625 of weights once per token tile; x
// from L2: 2*kTokens/(0.5156*kRows) of that. Flops: 2*M*N*K with M padded to the token tile (16,
// 32, 64, 128).
//
// Work split: a CTA is one producer warp and two consumer warpgroups, each with kBlocks 64-row
// blocks of the CTA's row tile (128 or 256 rows) and all tokens of the token tile: weights enter
// shared memory once, x is shared by the whole row tile. A stage is 128 k. A consumer issues the 8
// wgmma of one block, dequantizes the next block into its other register buffer while they run, and
// waits: the accumulators are never touched in flight and no group crosses the loop edge (ptxas
// serialises otherwise, C7514); the other warpgroup fills the gaps.
// Wide matrices: whole tiles per CTA. Narrow ones: S CTAs share a tile's k and reduce-scatter it:
// each owns some of the tokens (in sixteens), sends the others' sums away and adds what it gets in
// CTA order, in the tagged f32 pairs of linear_common.cuh. (Measured: one owner that adds whole
// pieces costs 4 us a piece at 64 tokens.) Deterministic either way. Token tiles are the fastest
// index of tiles, so their weights come from L2 the second time.
//
// Limits: K a multiple of 8, rows a multiple of 8; sm_90a. All CTAs resident at once.
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

namespace nibble::cuda {
namespace {

constexpr int kThreads = 3 * 128;  // consumers are warpgroups 0 and 1, the producer is in 2
constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);
constexpr int kSmemLimit = 232448;
constexpr int kMaxSplit = 8;

template <int kTokens, int kBlocks>
struct Config {
  static constexpr int kRows = 128 * kBlocks;  // of a CTA
  static constexpr int kXBytes = kTokens * 256;
  static constexpr int kWBytes = 2 * kBlocks * kBlockBytes;
  static constexpr int kStageTokens = kTokens < 64 ? kTokens : 64;  // of the output staging
  static constexpr int kStageStride = 72;                           // bf16, 64 rows + padding
  static constexpr int kOutBytes = 2 * kStageTokens * kStageStride * 2;
  static constexpr int kFit = (kSmemLimit - kOutBytes - 256) / (kXBytes + kWBytes);
  static constexpr int kStages = kFit < 10 ? kFit : 10;
  static constexpr int kWOffset = kStages * kXBytes;
  static constexpr int kOutOffset = kWOffset + kStages * kWBytes;
  static constexpr int kBarOffset = kOutOffset + kOutBytes;
  static constexpr int kSmemBytes = kBarOffset + 2 * kStages * 8;
  static_assert(kSmemBytes <= kSmemLimit && kStages >= 3);
};

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <int kTokens, int kBlocks, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ CUtensorMap x_map, const LinearParams p) {
  using C = Config<kTokens, kBlocks>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  const uint32_t full = base + C::kBarOffset, empty = full + C::kStages * 8;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int groups = p.groups, token_tiles = p.token_tiles;
  // Contiguous units of (tile, group): whole tiles, or one of p.split parts of a tile's groups.
  const int split = p.split, rank = split > 1 ? blockIdx.x % split : 0;
  int u_begin, u_end;
  if (split > 1) {
    const int first = blockIdx.x / split * groups;
    u_begin = first + rank * groups / split;
    u_end = first + (rank + 1) * groups / split;
  } else {
    const int tiles = p.num_tiles * token_tiles;
    u_begin = static_cast<int>(static_cast<int64_t>(blockIdx.x) * tiles / gridDim.x) * groups;
    u_end = static_cast<int>(static_cast<int64_t>(blockIdx.x + 1) * tiles / gridDim.x) * groups;
  }

  ptx::grid_launch_dependents();
  if (tid == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, 8);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  if (warp >= 8) {
    ptx::registers_shrink<24>();
    if (warp == 8 && lane == 0) {
      const uint64_t policy = ptx::policy_evict_first();
      auto load_w = [&](int u, int stage) {
        const int tile = u / groups, group = u - tile * groups;
        const int row_tile = tile / token_tiles * kBlocks;  // in units of 128 rows
        ptx::mbarrier_expect(full + stage * 8, C::kWBytes + C::kXBytes);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          ptx::bulk_load(
              base + C::kWOffset + stage * C::kWBytes + b * 2 * kBlockBytes,
              p.weights + (static_cast<int64_t>(row_tile + b) * groups + group) * 2 * kBlockBytes,
              2 * kBlockBytes, full + stage * 8, policy);
        }
      };
      auto load_x = [&](int u, int stage) {
        const int tile = u / groups, k = (u - tile * groups) * 128;
        const int token = tile % token_tiles * kTokens;
        const uint32_t to = base + stage * C::kXBytes;
        ptx::tensor_load_2d(to, &x_map, k, token, full + stage * 8);
        ptx::tensor_load_2d(to + kTokens * 128, &x_map, k + 64, token, full + stage * 8);
      };
      ptx::prefetch_tensor_map(&x_map);
      const int early = min(C::kStages, u_end - u_begin);
      for (int i = 0; i < early; ++i) load_w(u_begin + i, i);
      ptx::grid_dependency_wait();
      for (int i = 0; i < early; ++i) load_x(u_begin + i, i);
      int stage = 0, phase = 0;
      for (int u = u_begin + early; u < u_end; ++u) {
        ptx::mbarrier_wait(empty + stage * 8, phase);
        load_w(u, stage);
        load_x(u, stage);
        if (++stage == C::kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
    return;
  }

  ptx::registers_grow<240>();
  const int group_id = warp >> 2, m16 = warp & 3, g = lane >> 2, t = lane & 3;
  const int consumer = tid;  // 0 .. 255
  // A step is one block's k, or half of it where registers are short or there is only one block: an
  // even number of steps per stage, so that the two buffers alternate and a buffer is never
  // rewritten before its wgmma have retired. NOTE: a loop-carried "next" buffer copied into the
  // current one after the wait is not safe: the compiler takes the current one for dead once the
  // wgmma are issued and merges the two (seen: wrong, unrepeatable results). Kept apart by force it
  // was slower.
  constexpr int kParts = kBlocks == 1 || kTokens >= 128 ? 2 : 1;
  constexpr int kSteps = kBlocks * kParts, kStepK = 8 / kParts;
  static_assert(kSteps % 2 == 0);
  uint32_t a[2][kStepK][4];
  float acc[kBlocks][kTokens / 2];
  int stage = 0, phase = 0;

  // Dequantizes this warp's 16 rows of step `step` in stage `s`.
  auto prepare = [&](uint32_t(&to)[kStepK][4], int s, int step) {
    const uint32_t block =
        base + C::kWOffset + s * C::kWBytes + (group_id * kBlocks + step / kParts) * kBlockBytes;
    const ptx::RowScales scales =
        ptx::row_scales(ptx::load_shared_4(block + kNibbleBytes + g * 16 + m16 * 4));
#pragma unroll
    for (int i = 0; i < kStepK / 4; ++i) {
      uint32_t w[4];
      ptx::load_shared_16(w, block + ((m16 * 2 + step % kParts + i) * 32 + lane) * 16);
#pragma unroll
      for (int k = 0; k < 4; ++k) ptx::dequant(to[i * 4 + k], w[k], scales);
    }
  };
  auto multiply = [&](float(&d)[kTokens / 2], uint32_t(&from)[kStepK][4], int s, int step) {
    const uint64_t b =
        ptx::descriptor_k_major(base + s * C::kXBytes) + step % kParts * (kTokens * 128 >> 4);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepK; ++k) {
      ptx::Wgmma<kTokens>::rs_bf16(d, from[k], b + (k / 4) * (kTokens * 128 >> 4) + (k % 4) * 2);
    }
    ptx::wgmma_commit();
  };

  ptx::grid_dependency_wait();
  if (u_begin < u_end) {
    ptx::mbarrier_wait(full, 0);
    prepare(a[0], 0, 0);
  }
  for (int tile = u_begin / groups; tile * groups < u_end; ++tile) {
    const int tile_begin = tile * groups, tile_end = tile_begin + groups;
    const int begin = max(tile_begin, u_begin), stop = min(tile_end, u_end);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[b][i] = 0.0f;

#pragma unroll 1
    for (int u = begin; u < stop; ++u) {
      const int next_stage = stage + 1 == C::kStages ? 0 : stage + 1;
      const int next_phase = phase ^ (next_stage == 0);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {  // a[step % 2] is ready
        multiply(acc[step / kParts], a[step % 2], stage, step);
        if (step + 1 < kSteps) {
          prepare(a[(step + 1) % 2], stage, step + 1);
        } else if (u + 1 < u_end) {
          ptx::mbarrier_wait(full + next_stage * 8, next_phase);
          prepare(a[0], next_stage, 0);
        }
        ptx::wgmma_wait<0>();
      }
      if (lane == 0) ptx::mbarrier_arrive(empty + stage * 8);
      stage = next_stage;
      phase = next_phase;
    }

    // Shared tiles: sixteens of tokens [own, own_end) are this CTA's.
    constexpr int kSixteens = kTokens / 16;
    const int own = rank * kSixteens / split, own_end = (rank + 1) * kSixteens / split;
    if (split > 1) {
      // pieces: [CTA that owns][CTA that sends, of the same tile][sixteen][block][pair 4][thread]
      auto place = [&](int owner, int sender, int sixteen, int b) {
        const int cta = blockIdx.x - rank + owner;
        return p.pieces + cta * p.piece_stride + consumer +
               (((sender * (kSixteens / split + 1) + sixteen - owner * kSixteens / split) *
                     kBlocks +
                 b) *
                4) *
                   256;
      };
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        if (i >= own && i < own_end) continue;
        const int owner = ((i + 1) * split - 1) / kSixteens;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float pair[2] = {acc[b][i * 8 + 2 * j], acc[b][i * 8 + 2 * j + 1]};
            hand_over<2>(place(owner, rank, i, b) + j * 256, pair);
          }
      }
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        if (i < own || i >= own_end) continue;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          float(&part)[8] = reinterpret_cast<float(&)[8]>(acc[b][i * 8]);
          // Senders in order, two at a time: their loads are in flight together.
          for (int n = 0; n + 1 < split; n += 2) {
            const int first = n + (n >= rank), second = n + 1 + (n + 1 >= rank);
            take_over_two(place(rank, first, i, b),
                          n + 2 < split ? place(rank, second, i, b) : nullptr, 256, part);
          }
        }
      }
    }

    // Epilogue: transposed through shared memory to [token][row], then 16-byte stores.
    const int tile_row = tile / token_tiles * C::kRows, tile_token = tile % token_tiles * kTokens;
    const uint32_t out_smem = base + C::kOutOffset + group_id * (C::kOutBytes / 2);
    constexpr bool kSilu = kEpilogue == Epilogue::kSiluMul;
    constexpr int kColumns = kSilu ? 32 : 64;    // of one block's output
    constexpr int kStride = (kColumns + 8) * 2;  // bytes
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int block_row = tile_row + (group_id * kBlocks + b) * 64;
      const int column0 = kSilu ? block_row / 2 : block_row;
      float scale = ptx::kDequantUndo;
      if (kSilu && p.out_scale && column0 + m16 * 8 + g < p.out_stride) {
        scale *= p.out_scale[column0 + m16 * 8 + g];
      }
#pragma unroll
      for (int pass = 0; pass < kTokens / C::kStageTokens; ++pass) {
        ptx::named_barrier(1 + group_id, 128);
#pragma unroll
        for (int j = 0; j < C::kStageTokens / 8; j += 2) {  // two groups of 8 tokens
          const int sixteen = (pass * C::kStageTokens / 8 + j) / 2;
          if (sixteen < own || sixteen >= own_end) continue;
          const int lane_token = j * 8 + (lane >> 4) * 8 + (lane & 7);
          float* d = &acc[b][(pass * C::kStageTokens / 8 + j) * 4];
          if constexpr (kSilu) {
            uint32_t v[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float s[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const float gate = d[h * 4 + i] * ptx::kDequantUndo;
                s[i] = gate / (1.0f + __expf(-gate)) * d[h * 4 + 2 + i] * scale;
              }
              v[h] = pack_bf16(s[0], s[1]);
            }
            const int row_token = j * 8 + (lane & 15);
            ptx::stmatrix_x2_trans(out_smem + row_token * kStride + m16 * 16, v[0], v[1]);
          } else {
            float s[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              s[i] = d[i] * ptx::kDequantUndo;
              if constexpr (kEpilogue == Epilogue::kResidual) {
                const int token =
                    tile_token + pass * C::kStageTokens + (j + (i >> 2)) * 8 + 2 * t + (i & 1);
                const int row = block_row + m16 * 16 + g + 8 * ((i >> 1) & 1);
                if (token < p.tokens && row < p.rows) {
                  s[i] += __bfloat162float(
                      p.residual[static_cast<int64_t>(token) * p.out_stride + row]);
                }
              }
            }
            ptx::stmatrix_x4_trans(
                out_smem + lane_token * kStride + m16 * 32 + ((lane >> 3) & 1) * 16,
                pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]),
                pack_bf16(s[6], s[7]));
          }
        }
        ptx::named_barrier(1 + group_id, 128);
        constexpr int kChunks = kColumns / 8;
        for (int i = tid & 127; i < C::kStageTokens * kChunks; i += 128) {
          const int in = i / kChunks, column = column0 + i % kChunks * 8;
          const int token = tile_token + pass * C::kStageTokens + in;
          const int sixteen = (pass * C::kStageTokens + in) / 16;
          if (token < p.tokens && column < p.out_stride && sixteen >= own && sixteen < own_end) {
            uint32_t v[4];
            ptx::load_shared_16(v, out_smem + in * kStride + i % kChunks * 16);
            *reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(token) * p.out_stride + column) =
                make_uint4(v[0], v[1], v[2], v[3]);
          }
        }
      }
    }
  }
}

template <int kTokens, int kBlocks, Epilogue kEpilogue>
int launch(const LinearArgs& args, const LinearParams& params, int grid, void* stream) {
  CUtensorMap map;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  std::memcpy(&map, args.x_map, sizeof map);
  return launch_linear(linear_wgmma_kernel<kTokens, kBlocks, kEpilogue>, args, grid, kThreads,
                       Config<kTokens, kBlocks>::kSmemBytes, stream, map, params);
}

template <int kTokens, int kBlocks>
int launch_epilogue(const LinearArgs& args, int split, void* stream) {
  LinearParams p = make_linear_params(args, 128 * kBlocks);
  p.token_tiles = (args.tokens + kTokens - 1) / kTokens;
  const int tiles = p.num_tiles * p.token_tiles;
  p.split = std::min({split, p.groups, kMaxSplit});
  while (p.split > 1 && tiles * p.split > args.num_sms) --p.split;  // all resident at once
  int grid = tiles * p.split;
  if (p.split == 1) {
    const int per_cta = (tiles + args.num_sms - 1) / args.num_sms;
    grid = (tiles + per_cta - 1) / per_cta;
  }
  switch (args.epilogue) {
    case Epilogue::kPlain: return launch<kTokens, kBlocks, Epilogue::kPlain>(args, p, grid, stream);
    case Epilogue::kResidual:
      return launch<kTokens, kBlocks, Epilogue::kResidual>(args, p, grid, stream);
    case Epilogue::kSiluMul:
      return launch<kTokens, kBlocks, Epilogue::kSiluMul>(args, p, grid, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int linear_wgmma_box_rows(int tokens) {
  return tokens <= 16 ? 16 : tokens <= 32 ? 32 : tokens <= 64 ? 64 : 128;
}

int linear_wgmma(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.k % 8 || args.rows % 16) return cudaErrorInvalidValue;
  const int box = linear_wgmma_box_rows(args.tokens);
  const int64_t tiles128 = (args.rows + 127) / 128;
  const int64_t token_tiles = (args.tokens + box - 1) / box;
  int blocks = args.tactic / 16, split = args.tactic % 16;
  if (args.tactic < 0) {
    // Wide: whole 256-row tiles. Narrow: 128-row tiles, k shared by as many CTAs as there are SMs.
    blocks = tiles128 / 2 * token_tiles >= args.num_sms * 9 / 10 ? 2 : 1;
    split = blocks == 2
                ? 1
                : static_cast<int>(std::max<int64_t>(1, args.num_sms / (tiles128 * token_tiles)));
  }
  if (tiles128 % 2) blocks = 1;  // 256-row tiles come in pairs of 128
  auto go = [&](auto tokens_tag) {
    constexpr int kTokens = decltype(tokens_tag)::value;
    return blocks == 2 ? launch_epilogue<kTokens, 2>(args, split, stream)
                       : launch_epilogue<kTokens, 1>(args, split, stream);
  };
  switch (box) {
    case 16: return go(std::integral_constant<int, 16>{});
    case 32: return go(std::integral_constant<int, 32>{});
    case 64: return go(std::integral_constant<int, 64>{});
    default: return go(std::integral_constant<int, 128>{});
  }
}

}  // namespace nibble::cuda
