// K1: out[M, N] = x[M, K] W4[N, K]^T for M <= 16 tokens: a pure bandwidth problem.
//
// Layouts: W in layout.h's blocks (64 rows x 128 k, 4224 B, scales inline); x, out bf16 row-major.
// Bytes: N*K*0.515625 of weights once from device memory; x is re-read from L2 by every CTA:
//   2*M/(0.5156*R) of the weight bytes, R = rows a warp covers (64 or 128).
// Flops: 2*M*N*K, on mma.sync m16n8k16 with weights as operand A and tokens as N (pads M to 8).
//
// Work split: "units" of R rows x 128 k in memory order (row tile major). CTA c of one per SM takes
// the units [c*U/grid, (c+1)*U/grid): equal bytes for everyone, whatever the shape; where whole
// tiles come out even (qkv, o) the grid is chosen so that no tile is cut. Inside a CTA the 12 warps
// (8 left an H200 at 73 % of its read limit: two warps a scheduler wait too much) take units
// round-robin and each runs its own ring of bulk copies (own barriers, no producer warp, nobody
// waits for a neighbour); warps meet only where a row tile ends, to add their accumulators in
// shared memory in warp order. A tile cut by CTA borders belongs to the CTA that has its first k;
// the others hand over f32 sums (one store, polled by the owner: no fence, no atomic, one trip
// through L2), added in CTA order: run-to-run deterministic.
//
// x goes through cp.async, not the bulk copy engine: the engine serves in order, and an x request
// would wait behind the whole weight ring (measured: 2.7 us instead of 0.6).
//
// Weights do not depend on the kernel before, so the rings are filled before
// griddepcontrol.wait: under programmatic dependent launch up to 169 KB per SM of the next linear
// stream in while the tail of this one drains.
//
// Limits: N, K padded to 128 by the packer; K a multiple of 8; M <= 16; sm_90 (bulk copies). All
// CTAs of the grid must be resident at once (one per SM: they are) for the hand-over to end.
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

constexpr int kWarps = 12;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);

template <int kTokens, int kHalves>
struct Config {
  static constexpr int kRows = 64 * kHalves;
  static constexpr int kSlots = kTokens == 8 ? 3 : 2;  // blocks in a warp's ring
  // Units of x in a warp's ring. Two hide x's latency where a warp has few units; tall tiles have
  // no room for them.
  static constexpr int kXSlots = kTokens == 8 && kHalves == 1 ? 2 : 1;
  static constexpr int kXBytes = kTokens * 256;  // 128 k of every token
  static constexpr int kRedStride = kRows + 4;   // floats; conflict-free scatter
  static constexpr int kRedBytes = kWarps * 8 * kRedStride * 4;
  static constexpr int kRingOffset = kWarps * kXSlots * kXBytes;
  static constexpr int kRedOffset = kRingOffset + kWarps * kSlots * kBlockBytes;
  static constexpr int kBarOffset = kRedOffset + kRedBytes;
  static constexpr int kSmemBytes = kBarOffset + kWarps * kSlots * 8;
  static_assert(kSmemBytes <= 232448);
};

template <int kTokens, int kHalves, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 1) linear_small_kernel(const LinearParams p) {
  using C = Config<kTokens, kHalves>;
  constexpr int kNt = kTokens / 8;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int groups = p.groups;
  const int64_t units = static_cast<int64_t>(p.num_tiles) * groups;

  const int u_begin = static_cast<int>(blockIdx.x * units / gridDim.x);
  const int u_end = static_cast<int>((blockIdx.x + 1) * units / gridDim.x);

  const uint32_t x_ring = ptx::smem_address(smem) + warp * C::kXSlots * C::kXBytes;
  const uint32_t ring = ptx::smem_address(smem) + C::kRingOffset + warp * C::kSlots * kBlockBytes;
  const uint32_t bars = ptx::smem_address(smem) + C::kBarOffset + warp * C::kSlots * 8;
  float* red = reinterpret_cast<float*>(smem + C::kRedOffset);

  TRACE(0);
  ptx::grid_launch_dependents();

  // The warp's stream of blocks: units u_begin + warp, + 8, ..., kHalves blocks each.
  int load_unit = u_begin + warp;  // next unit to request (lane 0)
  int load_half = 0;
  uint64_t policy = 0;
  auto request_block = [&](int slot) {
    if (load_unit >= u_end) return;
    const int tile = load_unit / groups, group = load_unit - tile * groups;
    const int64_t block = kHalves == 2
                              ? (static_cast<int64_t>(tile) * groups + group) * 2 + load_half
                              : (static_cast<int64_t>(tile >> 1) * groups + group) * 2 + (tile & 1);
    ptx::mbarrier_expect(bars + slot * 8, kBlockBytes);
    ptx::bulk_load(ring + slot * kBlockBytes, p.weights + block * kBlockBytes, kBlockBytes,
                   bars + slot * 8, policy);
    if (++load_half == kHalves) {
      load_half = 0;
      load_unit += kWarps;
    }
  };
  // x of a unit: 16 chunks of 16 bytes per token; this lane copies one chunk of every second token.
  const int x_row = lane >> 4, x_chunk = lane & 15;
  const uint32_t x_to = x_ring + (x_chunk >> 3) * kTokens * 128 + x_row * 128;
  const uint32_t x_swizzle = ((x_chunk & 7) ^ x_row) << 4;
  const __nv_bfloat16* x_from = p.x + x_row * p.x_stride + x_chunk * 8;
  auto request_x = [&](int unit, int slot) {
    if (unit < u_end) {
      const int k = unit % groups * 128;
      const int bytes = k + x_chunk * 8 < p.k ? 16 : 0;  // past K: zeros
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        if (x_row + 2 * i < p.tokens) {
          ptx::copy_16(x_to + slot * C::kXBytes + i * 256 + (x_swizzle ^ ((2 * i & 7) << 4)),
                       x_from + 2 * i * p.x_stride + (bytes ? k : 0), bytes);
        }
      }
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
  // What the epilogue multiplies by comes from device memory once a step: into L2 meanwhile.
  {
    const float* scale = kEpilogue == Epilogue::kSiluMul    ? p.out_scale
                         : kEpilogue == Epilogue::kResidual ? p.next_weight
                                                            : nullptr;
    constexpr int kColumns = kEpilogue == Epilogue::kSiluMul ? C::kRows / 2 : C::kRows;
    const int first = u_begin / groups * kColumns;
    const int end = min(((u_end - 1) / groups + 1) * kColumns, p.out_stride);
    if (scale) {
      for (int i = first + tid * 32; i < end; i += kThreads * 32) ptx::prefetch_l2(scale + i);
    }
  }
  for (int i = lane; i < C::kXSlots * C::kXBytes / 16; i += 32) {  // tokens M.. stay 0
    ptx::store_zero_16(x_ring + i * 16);
  }
  __syncwarp();
  ptx::grid_dependency_wait();
  TRACE(2);
#pragma unroll
  for (int i = 0; i < C::kXSlots; ++i) request_x(u_begin + warp + i * kWarps, i);
  if (lane == 0) {
    for (int i = p.early_slots; i < C::kSlots; ++i) request_block(i);
  }
  // 1/rms of the token this warp will store; the sums come from the linear before.
  float factor = 1.0f;
  if (p.squares && warp < p.tokens) {
    const int tiles = (p.k + kNormTileRows - 1) / kNormTileRows;
    float sum = 0.0f;
    for (int i = lane; i < tiles; i += 32) sum += p.squares[warp * tiles + i];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    factor = rsqrtf(sum / static_cast<float>(p.k) + p.eps);
  }

  int slot = 0, slot_phase = 0, x_slot = 0;
  int u = u_begin + warp;
  float acc[kHalves * 4][kNt][4];

  for (int tile = u_begin / groups; tile * groups < u_end; ++tile) {
    const int tile_begin = tile * groups, tile_end = tile_begin + groups;
    const int stop = min(tile_end, u_end);
#pragma unroll
    for (int m = 0; m < kHalves * 4; ++m)
#pragma unroll
      for (int n = 0; n < kNt; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;

#pragma unroll 1
    for (; u < stop; u += kWarps) {
      // Operand B of all 8 k16 steps: registers, so that the slot is free again at once.
      uint32_t b[8][kNt][2];
      ptx::copy_wait<C::kXSlots - 1>();
      __syncwarp();
      if (u == u_begin) TRACE(3);
      {
        const uint32_t x = x_ring + x_slot * C::kXBytes;
        const int row = lane & 7;
#pragma unroll
        for (int k64 = 0; k64 < 2; ++k64)
#pragma unroll
          for (int n = 0; n < kNt; ++n)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              const int chunk = 4 * pair + (lane >> 3);
              uint32_t r[4];
              ptx::ldmatrix_x4(
                  r, x + k64 * kTokens * 128 + n * 1024 + row * 128 + ((chunk ^ row) << 4));
              b[k64 * 4 + pair * 2][n][0] = r[0];
              b[k64 * 4 + pair * 2][n][1] = r[1];
              b[k64 * 4 + pair * 2 + 1][n][0] = r[2];
              b[k64 * 4 + pair * 2 + 1][n][1] = r[3];
            }
      }
      __syncwarp();
      request_x(u + C::kXSlots * kWarps, x_slot);
      if (++x_slot == C::kXSlots) x_slot = 0;

#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t block = ring + slot * kBlockBytes;
        ptx::mbarrier_wait(bars + slot * 8, slot_phase);
        uint32_t scale_pairs[4];
        ptx::load_shared_16(scale_pairs, block + kNibbleBytes + (lane >> 2) * 16);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          uint32_t w[2][4];
          ptx::load_shared_16(w[0], block + ((m * 2 + 0) * 32 + lane) * 16);
          ptx::load_shared_16(w[1], block + ((m * 2 + 1) * 32 + lane) * 16);
          const ptx::RowScales scales = ptx::row_scales(scale_pairs[m]);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            uint32_t a[4];
            ptx::dequant(a, w[k / 4][k % 4], scales);
#pragma unroll
            for (int n = 0; n < kNt; ++n) {
              ptx::mma_bf16(acc[half * 4 + m][n], a, b[k][n][0], b[k][n][1]);
            }
          }
        }
        __syncwarp();
        if (lane == 0) request_block(slot);
        if (++slot == C::kSlots) {
          slot = 0;
          slot_phase ^= 1;
        }
      }
    }

    TRACE(4);
    // Add the warps' accumulators, eight tokens at a time; thread: one token, kPer rows.
    constexpr int kPer = C::kRows * 8 / 256;  // the first 8 warps add, one token each
    const int row = lane * kPer;
    const bool head = u_begin > tile_begin;  // an earlier CTA owns the tile
    const int others =
        head ? 0
             : static_cast<int>((static_cast<int64_t>(tile_end) * gridDim.x - 1) / units) -
                   static_cast<int>(blockIdx.x);
#pragma unroll
    for (int n = 0; n < kNt; ++n) {
      __syncthreads();  // red is free
      float* mine = red + warp * 8 * C::kRedStride;
#pragma unroll
      for (int m = 0; m < kHalves * 4; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mine[(2 * (lane & 3) + (i & 1)) * C::kRedStride + m * 16 + (lane >> 2) + 8 * (i >> 1)] =
              acc[m][n][i];
        }
      __syncthreads();
      if (warp >= 8) continue;
      float sum[kPer] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* from = red + (w * 8 + warp) * C::kRedStride + row;
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum[i] += from[i];
      }
      const int token = n * 8 + warp;
      float* piece = p.pieces + blockIdx.x * p.piece_stride + token * C::kRows + row;
      if (head) {
        hand_over(piece, sum);
      } else {
        for (int other = 1; other <= others; ++other) {
          take_over<kPer, 1>(piece + other * p.piece_stride, 0, sum);
        }
        store_rows<kEpilogue, kPer>(p, token, tile * C::kRows, row, sum, factor);
      }
    }
    TRACE(5);
  }
  TRACE(6);
  TRACE_SM();
}

template <int kTokens, int kHalves, Epilogue kEpilogue>
int launch(const LinearArgs& args, const LinearParams& params, int grid, void* stream) {
  return launch_linear(linear_small_kernel<kTokens, kHalves, kEpilogue>, args, grid, kThreads,
                       Config<kTokens, kHalves>::kSmemBytes, stream, 1, params);
}

template <int kTokens, int kHalves>
int launch_epilogue(const LinearArgs& args, int grid, void* stream) {
  LinearParams p = make_linear_params(args, 64 * kHalves);
  p.early_slots = args.early > 0 ? args.early : 16;
  switch (args.epilogue) {
    case Epilogue::kPlain: return launch<kTokens, kHalves, Epilogue::kPlain>(args, p, grid, stream);
    case Epilogue::kResidual:
      return launch<kTokens, kHalves, Epilogue::kResidual>(args, p, grid, stream);
    case Epilogue::kSiluMul:
      return launch<kTokens, kHalves, Epilogue::kSiluMul>(args, p, grid, stream);
    case Epilogue::kFloat: return launch<kTokens, kHalves, Epilogue::kFloat>(args, p, grid, stream);
  }
  return cudaErrorInvalidValue;
}

template <int kTokens>
int launch_tactic(const LinearArgs& args, SmallTactic tactic, void* stream) {
  const int tiles = make_linear_params(args, 64).num_tiles;
  switch (tactic) {
    case SmallTactic::kWhole64: {
      const int per_cta = (tiles + args.num_sms - 1) / args.num_sms;
      return launch_epilogue<kTokens, 1>(args, (tiles + per_cta - 1) / per_cta, stream);
    }
    case SmallTactic::kStream64: return launch_epilogue<kTokens, 1>(args, args.num_sms, stream);
    case SmallTactic::kStream128: return launch_epilogue<kTokens, 2>(args, args.num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int linear_small(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.tokens > 16 || args.k % 8) return cudaErrorInvalidValue;
  SmallTactic tactic = static_cast<SmallTactic>(args.tactic);
  if (args.tactic < 0) {
    // Wide matrices: taller units, x is read half as often. Others: equal bytes for every SM, which
    // costs a hand-over where a tile is cut; whole tiles where there is little to share, or where
    // the hand-over of 16 tokens costs more than the SMs left out.
    const cuda_layout::Shape shape{args.rows, args.k};
    const bool little = shape.num_tiles() * 2 * shape.num_groups() < 4 * args.num_sms;
    tactic = args.rows >= 32768                              ? SmallTactic::kStream128
             : little || (args.tokens > 8 && args.k <= 8192) ? SmallTactic::kWhole64
                                                             : SmallTactic::kStream64;
  }
  return args.tokens <= 8 ? launch_tactic<8>(args, tactic, stream)
                          : launch_tactic<16>(args, tactic, stream);
}

}  // namespace nibble::cuda
