// K1: out[M, N] = x[M, K] W4[N, K]^T for M <= 8 tokens: a pure bandwidth problem.
//
// Layouts: W in layout.h's blocks (64 rows x 128 k, 4224 B, scales inline); x, out bf16 row-major.
// Bytes: N*K*0.515625 of weights once from device memory; x is re-read from L2 by every CTA:
//   2*M/(0.5156*R) of the weight bytes, R = rows a warp covers (64 or 128).
// Flops: 2*M*N*K, on mma.sync m16n8k16 with the weights' codes as operand A (mask_pairs()) and
// tokens as N (M padded to 8); scales multiply the sums of a group, once for 128 k.
//
// Work split: "units" of R rows x 128 k in memory order (row tile major). CTA c of one per SM takes
// its share of them, equal bytes for everyone, whatever the shape; where whole tiles come out even
// (qkv, o) the grid is chosen so that no tile is cut. Inside a CTA teams of warps take units round-
// robin: one warp has a block of 64 rows, so a team is one warp or two, which then share x. Every
// warp runs its own ring of bulk copies (own barriers, no producer warp); warps meet only where a
// row tile ends, to add their accumulators in shared memory in warp order. A tile cut by CTA
// borders belongs to the CTA that has its first k; the others hand over f32 sums (one store, polled
// by the owner: no fence, no atomic, one trip through L2), added in CTA order: run-to-run
// deterministic.
//
// Warps are many (16) because a warp alone waits: for its own chain of unpacking and
// mma.sync, 350 instructions a block. With weights that lie in L2 that chain, not the reading, is
// the limit (docs/kernels.md).
//
// x goes through cp.async, not the bulk copy engine: the engine serves in order, and an x request
// would wait behind the whole weight ring (measured: 2.7 us instead of 0.6).
//
// Weights do not depend on the kernel before, so half the rings are filled before
// griddepcontrol.wait: under programmatic dependent launch 68 KB per SM of the next linear stream
// in while the tail of this one drains. The whole ring would be in x's way.
//
// Limits: N, K padded to 128 by the packer; K a multiple of 8; M <= 8; |x| < 2^63; sm_90 (bulk
// copies). All CTAs of the grid must be resident at once (one per SM: they are) for the hand-over
// to end.
//
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);

constexpr int kTokens = kMaxSmallTokens;  // mma.sync's N

template <int kHalves>
struct Config {
  static constexpr int kRows = 64 * kHalves;
  static constexpr int kWarps = 16, kThreads = kWarps * 32;
  static constexpr int kTeams = kWarps / kHalves;  // of warps that have one unit
  static constexpr int kSlots = 2;                 // blocks in a warp's ring
  static_assert(kTeams >= 8, "a team stores one of eight tokens");
  // 128 k of every token. A team of two warps has two such slots; a single warp one, which holds
  // two units of half as many tokens.
  static constexpr int kXBytes = kTokens * 256;
  static constexpr int kRedStride = 64 + 4;  // floats; conflict-free scatter
  static constexpr int kRedBytes = kWarps * 8 * kRedStride * 4;
  static constexpr int kRingOffset = kWarps * kXBytes;
  static constexpr int kRedOffset = kRingOffset + kWarps * kSlots * kBlockBytes;
  static constexpr int kFactorOffset = kRedOffset + kRedBytes;
  static constexpr int kBarOffset = kFactorOffset + kTokens * 4;
  static constexpr int kSmemBytes = kBarOffset + kWarps * kSlots * 8;
  static_assert(kSmemBytes <= 232448);
};

// A place in a warp's stream of units.
struct Cursor {
  int tile, group;
  __device__ __forceinline__ void advance(int units, int groups) {
    for (group += units; group >= groups; group -= groups) ++tile;
  }
};

template <int kHalves, Epilogue kEpilogue>
__global__ void __launch_bounds__(Config<kHalves>::kThreads, 1)
    linear_small_kernel(const LinearParams p) {
  using C = Config<kHalves>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int half = warp % kHalves, team = warp / kHalves;
  const int groups = p.groups;
  const int cta = static_cast<int>(blockIdx.x);
  const int u_begin = first_unit(p, cta), u_end = first_unit(p, cta + 1);

  const uint32_t x_ring = ptx::smem_address(smem) + team * kHalves * C::kXBytes;
  const uint32_t ring = ptx::smem_address(smem) + C::kRingOffset + warp * C::kSlots * kBlockBytes;
  const uint32_t bars = ptx::smem_address(smem) + C::kBarOffset + warp * C::kSlots * 8;
  float* red = reinterpret_cast<float*>(smem + C::kRedOffset);
  float* factors = reinterpret_cast<float*>(smem + C::kFactorOffset);

  TRACE(0);
  ptx::grid_launch_dependents();

  // The warp's blocks: its half of the units u_begin + team, + kTeams, ...
  const int first = u_begin + team, first_tile = u_begin / groups;
  Cursor load{first_tile, u_begin - first_tile * groups};  // the next one to request (lane 0)
  load.advance(team, groups);
  int load_unit = first;
  uint64_t policy = 0;
  auto request_block = [&](int slot) {
    if (load_unit >= u_end) return;
    const int64_t block =
        kHalves == 2
            ? static_cast<int64_t>(load_unit) * 2 + half
            : (static_cast<int64_t>(load.tile >> 1) * groups + load.group) * 2 + (load.tile & 1);
    ptx::mbarrier_expect(bars + slot * 8, kBlockBytes);
    ptx::bulk_load(ring + slot * kBlockBytes, p.weights + block * kBlockBytes, kBlockBytes,
                   bars + slot * 8, policy);
    load_unit += C::kTeams;
    if constexpr (kHalves == 1) load.advance(C::kTeams, groups);
  };
  // x of a unit: 16 chunks of 16 bytes per token; this lane copies one chunk of every kStep'th
  // token.
  const bool two = kHalves == 2 || p.tokens <= kTokens / 2;        // slots
  const int x_rows = kHalves == 1 && two ? kTokens / 2 : kTokens;  // of a slot
  constexpr int kStep = 2 * kHalves;
  const int x_row = half * 2 + (lane >> 4), x_chunk = lane & 15;
  const uint32_t x_to = x_ring + (x_chunk >> 3) * x_rows * 128 + x_row * 128;
  const uint32_t x_swizzle = ((x_chunk & 7) ^ x_row) << 4;
  const __nv_bfloat16* x_from = p.x + x_row * p.x_stride + x_chunk * 8;
  Cursor x_next = load;
  int x_unit = first;
  auto request_x = [&](int slot) {
    if (x_unit < u_end) {
      const int k = x_next.group * 128;
      const int bytes = k + x_chunk * 8 < p.k ? 16 : 0;  // past K: zeros
#pragma unroll
      for (int i = 0; i < kTokens; i += kStep) {
        if (x_row + i < p.tokens) {
          ptx::copy_16(x_to + slot * x_rows * 256 + i * 128 + (x_swizzle ^ ((i & 7) << 4)),
                       x_from + i * p.x_stride + (bytes ? k : 0), bytes);
        }
      }
      x_unit += C::kTeams;
      x_next.advance(C::kTeams, groups);
    }
    ptx::copy_commit();
  };
  if (lane == 0) {
    for (int i = 0; i < C::kSlots; ++i) ptx::mbarrier_init(bars + i * 8, 1);
    ptx::mbarrier_init_fence();
    policy = ptx::policy_evict_first();
    for (int i = 0; i < C::kSlots && i < p.early_slots; ++i) request_block(i);
  }
  TRACE(1);
  prefetch_epilogue(p, kEpilogue, first_tile * C::kRows, ((u_end - 1) / groups + 1) * C::kRows, tid,
                    C::kThreads);
  __syncwarp();
  ptx::grid_dependency_wait();
  TRACE(2);
  request_x(0);
  if (kHalves == 1 && two) request_x(1);
  if (lane == 0) {
    for (int i = p.early_slots; i < C::kSlots; ++i) request_block(i);
  }
  // 1/rms of the tokens; the sums come from the linear before.
  for (int token = warp; token < p.tokens; token += C::kWarps) {
    float factor = 1.0f;
    if (p.squares) {
      float sum = 0.0f;
      for (int i = lane; i < norm_tiles(p.k); i += 32)
        sum += p.squares[i * norm_stride(p.tokens) + token];
#pragma unroll
      for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      factor = norm_factor(p, sum);
    }
    if (lane == 0) factors[token] = factor * (ptx::kPairsUndo / ptx::kDequantUndo);
  }

  // Where a lane's row of x lies for ldmatrix. Past the last token the last one again: what comes
  // of it is not stored.
  const int x_row_of_lane = min(lane & 7, p.tokens - 1);
  const uint32_t x_at = x_row_of_lane * 128 + (((lane >> 3) ^ (x_row_of_lane & 7)) << 4);
  int slot = 0, slot_phase = 0, x_slot = 0;
  int u = first;
  float acc[4][4];

  for (int tile = first_tile; tile * groups < u_end; ++tile) {
    const int tile_begin = tile * groups, tile_end = tile_begin + groups;
    const int stop = min(tile_end, u_end);
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][i] = 0.0f;

#pragma unroll 1
    for (; u < stop; u += C::kTeams) {
      // Operand B of all 8 k16 steps: registers, so that the slot is free again at once.
      uint32_t b[8][2];
      if constexpr (kHalves == 2) {
        // Both warps' copies are there, and both have read the other slot.
        ptx::copy_wait<0>();
        ptx::named_barrier(1 + team, 64);
        request_x(x_slot ^ 1);
      } else {
        if (two) {
          ptx::copy_wait<1>();
        } else {
          ptx::copy_wait<0>();
        }
        __syncwarp();
      }
      if (u == u_begin) TRACE(3);
      const uint32_t x = x_ring + x_slot * x_rows * 256;
#pragma unroll
      for (int k64 = 0; k64 < 2; ++k64)
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          uint32_t r[4];
          ptx::ldmatrix_x4(r, x + k64 * x_rows * 128 + (x_at ^ (pair << 6)));
          b[k64 * 4 + pair * 2][0] = r[0];
          b[k64 * 4 + pair * 2][1] = r[1];
          b[k64 * 4 + pair * 2 + 1][0] = r[2];
          b[k64 * 4 + pair * 2 + 1][1] = r[3];
        }
      if constexpr (kHalves == 1) {
        __syncwarp();
        request_x(x_slot);
      }
      if (two) x_slot ^= 1;

      // What the codes' offset of 8 takes off, while the weights arrive.
      float offset[4] = {};
      uint32_t a[4];
      ptx::offset_pairs(a);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        b[k][0] = ptx::bf16x2_mul(b[k][0], ptx::kPairsX);
        b[k][1] = ptx::bf16x2_mul(b[k][1], ptx::kPairsX);
        ptx::mma_bf16(offset, a, b[k][0], b[k][1]);
      }

      const uint32_t block = ring + slot * kBlockBytes;
      ptx::mbarrier_wait(bars + slot * 8, slot_phase);
      uint32_t scale_pairs[4];
      ptx::load_shared_16(scale_pairs, block + kNibbleBytes + (lane >> 2) * 16);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t w[2][4];
        ptx::load_shared_16(w[0], block + ((m * 2 + 0) * 32 + lane) * 16);
        ptx::load_shared_16(w[1], block + ((m * 2 + 1) * 32 + lane) * 16);
        float sums[4] = {offset[0], offset[1], offset[2], offset[3]};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          ptx::mask_pairs(a, w[k / 4][k % 4]);
          ptx::mma_bf16(sums, a, b[k][0], b[k][1]);
        }
        ptx::add_pairs(acc[m], sums, scale_pairs[m]);
      }
      __syncwarp();
      if (lane == 0) request_block(slot);
      if (++slot == C::kSlots) {
        slot = 0;
        slot_phase ^= 1;
      }
    }

    TRACE(4);
    // Add the warps' accumulators; a warp: 64 rows of one token.
    constexpr int kPer = 2;
    const bool head = u_begin > tile_begin;  // an earlier CTA owns the tile
    const int others = head || tile_end <= u_end ? 0 : cta_of(p, tile_end - 1) - cta;
    __syncthreads();  // red is free
    float* mine = red + warp * 8 * C::kRedStride;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mine[(2 * (lane & 3) + (i & 1)) * C::kRedStride + m * 16 + (lane >> 2) + 8 * (i >> 1)] =
            acc[m][i];
      }
    __syncthreads();
    const int token = team;
    if (team < 8 && token < p.tokens) {  // of 16 teams eight store
      float sum[kPer] = {};
#pragma unroll
      for (int t = 0; t < C::kTeams; ++t) {
        const float2 v = *reinterpret_cast<const float2*>(
            red + ((t * kHalves + half) * 8 + token) * C::kRedStride + lane * kPer);
        sum[0] += v.x, sum[1] += v.y;
      }
      const int row = half * 64 + lane * kPer;
      float* piece = p.pieces + blockIdx.x * p.piece_stride + token * C::kRows + row;
      if (head) {
        hand_over(piece, sum);
      } else {
        for (int other = 1; other <= others; ++other) {
          take_over<kPer, 1>(piece + other * p.piece_stride, 0, sum);
        }
        store_rows<kEpilogue, kPer>(p, token, tile * C::kRows + half * 64, lane * kPer, sum,
                                    factors[token]);
      }
    }
    TRACE(5);
  }
  TRACE(6);
  TRACE_SM();
}

template <int kHalves, Epilogue kEpilogue>
int launch(const LinearArgs& args, const LinearParams& params, int grid, void* stream) {
  return launch_linear(linear_small_kernel<kHalves, kEpilogue>, args, grid,
                       Config<kHalves>::kThreads, Config<kHalves>::kSmemBytes, stream, 1, params);
}

template <int kHalves>
int launch_epilogue(const LinearArgs& args, int grid, void* stream) {
  LinearParams p = make_linear_params(args, 64 * kHalves);
  p.early_slots = args.early > 0 ? args.early : 16;
  set_shares(p, p.num_tiles * p.groups, grid);
  switch (args.epilogue) {
    case Epilogue::kPlain: return launch<kHalves, Epilogue::kPlain>(args, p, grid, stream);
    case Epilogue::kResidual: return launch<kHalves, Epilogue::kResidual>(args, p, grid, stream);
    case Epilogue::kSiluMul: return launch<kHalves, Epilogue::kSiluMul>(args, p, grid, stream);
    case Epilogue::kFloat: return launch<kHalves, Epilogue::kFloat>(args, p, grid, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int linear_small(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.tokens > kTokens || args.k % 8) return cudaErrorInvalidValue;
  SmallTactic tactic = static_cast<SmallTactic>(args.tactic);
  const cuda_layout::Shape shape{args.rows, args.k};
  if (args.tactic < 0) {
    // Wide matrices and long k: taller units, x is read half as often. Others: whole tiles, unless
    // most SMs would be without; sharing them costs a hand-over where a tile is cut.
    const bool little = shape.num_tiles() * 2 * shape.num_groups() < 4 * args.num_sms;
    const bool fills = shape.num_tiles() * 4 >= args.num_sms;
    const bool large = args.rows >= 32768 || args.k >= 16384;
    tactic = large             ? SmallTactic::kStream128
             : little || fills ? SmallTactic::kWhole64
                               : SmallTactic::kStream64;
  }
  switch (tactic) {
    case SmallTactic::kWhole64: {
      const auto tiles = static_cast<int>(shape.num_tiles() * 2);
      const int per_cta = (tiles + args.num_sms - 1) / args.num_sms;
      return launch_epilogue<1>(args, (tiles + per_cta - 1) / per_cta, stream);
    }
    case SmallTactic::kStream64: return launch_epilogue<1>(args, args.num_sms, stream);
    case SmallTactic::kStream128: return launch_epilogue<2>(args, args.num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
