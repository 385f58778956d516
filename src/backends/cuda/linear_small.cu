// K1: out[M, N] = x[M, K] W4[N, K]^T for M <= 16 tokens: a pure bandwidth problem.
//
// Layouts: W in layout.h's blocks (64 rows x 128 k, 4224 B, scales inline); x, out bf16 row-major.
// Bytes: N*K*0.515625 of weights once from device memory; x is re-read from L2 by every CTA:
//   2*M/(0.5156*R) of the weight bytes, R = rows a warp covers (64 or 128).
// Flops: 2*M*N*K, on mma.sync m16n8k16 with weights as operand A and tokens as N (pads M to 8).
//
// Work split: "units" of R rows x 128 k in memory order (row tile major). CTA c of one per SM takes
// the units [c*U/grid, (c+1)*U/grid): equal bytes for everyone, whatever the shape. Inside a CTA
// the 8 warps take units round-robin and each runs its own ring of bulk copies (own barriers, no
// producer warp, nobody waits for a neighbour); warps meet only where a row tile ends, to add their
// accumulators in shared memory in warp order. A tile cut by CTA borders goes through an f32
// partial in L2; the CTA that arrives last adds the pieces in CTA order, so results do not depend on
// who that is: run-to-run deterministic.
//
// Weights do not depend on the kernel before, so the rings are filled before
// griddepcontrol.wait: under programmatic dependent launch up to 169 KB per SM of the next linear
// stream in while the tail of this one drains.
//
// Limits: N, K padded to 128 by the packer; M <= 16; sm_90 (bulk copies).
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);

template <int kTokens, int kHalves>
struct Config {
  static constexpr int kRows = 64 * kHalves;
  static constexpr int kSlots = kTokens == 8 ? 5 : 4;  // blocks in a warp's ring
  static constexpr int kXBytes = kTokens * 256;        // 128 k of every token
  static constexpr int kRedStride = kRows + 4;         // floats; conflict-free scatter
  static constexpr int kRedBytes = kWarps * 8 * kRedStride * 4;
  static constexpr int kRingOffset = kWarps * kXBytes;
  static constexpr int kRedOffset = kRingOffset + kWarps * kSlots * kBlockBytes;
  static constexpr int kBarOffset = kRedOffset + kRedBytes;
  static constexpr int kSmemBytes = kBarOffset + kWarps * (kSlots + 1) * 8 + 16;
};

template <int kTokens, int kHalves, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 1)
    linear_small_kernel(const __grid_constant__ CUtensorMap x_map, const LinearParams p) {
  using C = Config<kTokens, kHalves>;
  constexpr int kNt = kTokens / 8;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int groups = p.groups;
  const int64_t units = static_cast<int64_t>(p.num_tiles) * groups;
  const int u_begin = static_cast<int>(blockIdx.x * units / gridDim.x);
  const int u_end = static_cast<int>((blockIdx.x + 1) * units / gridDim.x);

  const uint32_t x_slot = ptx::smem_address(smem) + warp * C::kXBytes;
  const uint32_t ring = ptx::smem_address(smem) + C::kRingOffset + warp * C::kSlots * kBlockBytes;
  const uint32_t bars = ptx::smem_address(smem) + C::kBarOffset + warp * (C::kSlots + 1) * 8;
  const uint32_t x_bar = bars + C::kSlots * 8;
  float* red = reinterpret_cast<float*>(smem + C::kRedOffset);
  int* last_flag = reinterpret_cast<int*>(smem + C::kBarOffset + kWarps * (C::kSlots + 1) * 8);

  ptx::grid_launch_dependents();

  // The warp's stream of blocks: units u_begin + warp, + 8, ..., kHalves blocks each.
  int load_unit = u_begin + warp;  // next unit to request (lane 0)
  int load_half = 0;
  uint64_t policy = 0;
  auto request_block = [&](int slot) {
    if (load_unit >= u_end) return;
    int64_t block;
    if constexpr (kHalves == 2) {
      block = static_cast<int64_t>(load_unit) * 2 + load_half;
    } else {
      const int tile = load_unit / groups, group = load_unit - tile * groups;
      block = (static_cast<int64_t>(tile >> 1) * groups + group) * 2 + (tile & 1);
    }
    ptx::mbarrier_expect(bars + slot * 8, kBlockBytes);
    ptx::bulk_load(ring + slot * kBlockBytes, p.weights + block * kBlockBytes, kBlockBytes,
                   bars + slot * 8, policy);
    if (++load_half == kHalves) {
      load_half = 0;
      load_unit += kWarps;
    }
  };
  auto request_x = [&](int unit) {
    const int k = (unit % groups) * 128;
    ptx::mbarrier_expect(x_bar, C::kXBytes);
    ptx::tensor_load_2d(x_slot, &x_map, k, 0, x_bar);
    ptx::tensor_load_2d(x_slot + kTokens * 128, &x_map, k + 64, 0, x_bar);
  };
  if (lane == 0) {
    ptx::prefetch_tensor_map(&x_map);
    for (int i = 0; i <= C::kSlots; ++i) ptx::mbarrier_init(bars + i * 8, 1);
    ptx::mbarrier_init_fence();
    policy = ptx::policy_evict_first();
    for (int i = 0; i < C::kSlots; ++i) request_block(i);
  }
  ptx::grid_dependency_wait();
  if (lane == 0 && u_begin + warp < u_end) request_x(u_begin + warp);
  __syncwarp();

  int slot = 0, slot_phase = 0, x_phase = 0;
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
      ptx::mbarrier_wait(x_bar, x_phase);
      x_phase ^= 1;
      {
        const int row = lane & 7;
#pragma unroll
        for (int k64 = 0; k64 < 2; ++k64)
#pragma unroll
          for (int n = 0; n < kNt; ++n)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              const int chunk = 4 * pair + (lane >> 3);
              uint32_t r[4];
              ptx::ldmatrix_x4(r, x_slot + k64 * kTokens * 128 + n * 1024 + row * 128 +
                                      ((chunk ^ row) << 4));
              b[k64 * 4 + pair * 2][n][0] = r[0];
              b[k64 * 4 + pair * 2][n][1] = r[1];
              b[k64 * 4 + pair * 2 + 1][n][0] = r[2];
              b[k64 * 4 + pair * 2 + 1][n][1] = r[3];
            }
      }
      __syncwarp();
      if (lane == 0 && u + kWarps < u_end) request_x(u + kWarps);

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

    // Add the warps' accumulators, eight tokens at a time; thread: one token, kPer rows.
    constexpr int kPer = C::kRows * 8 / kThreads;
    const bool whole = u_begin <= tile_begin && tile_end <= u_end;
    const int row = lane * kPer;
    float* partial = p.partials + (static_cast<int64_t>(blockIdx.x) * 2 +
                                   (u_begin > tile_begin ? 0 : 1)) * p.partial_stride;
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
      float sum[kPer] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* from = red + (w * 8 + warp) * C::kRedStride + row;
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum[i] += from[i];
      }
      const int token = n * 8 + warp;
      if (whole) {
        store_rows<kEpilogue, kPer>(p, token, tile * C::kRows, row, sum);
      } else {
        float* to = partial + token * C::kRows + row;
#pragma unroll
        for (int i = 0; i < kPer; ++i) to[i] = sum[i];
      }
    }
    if (whole) continue;

    // Border tile: the last CTA to arrive adds all pieces in CTA order.
    const int64_t first = ((static_cast<int64_t>(tile_begin) + 1) * gridDim.x - 1) / units;
    const int64_t last = (static_cast<int64_t>(tile_end) * gridDim.x - 1) / units;
    if (!arrive_last(&p.counters[tile], static_cast<int>(last - first), last_flag)) continue;
#pragma unroll
    for (int n = 0; n < kNt; ++n) {
      const int token = n * 8 + warp;
      float sum[kPer] = {};
      for (int64_t c = first; c <= last; ++c) {
        const bool head = c * units / gridDim.x > tile_begin;
        const float* from =
            p.partials + (c * 2 + (head ? 0 : 1)) * p.partial_stride + token * C::kRows + row;
        if constexpr (kPer == 4) {
          const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
          sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        } else {
          const float2 v = __ldcg(reinterpret_cast<const float2*>(from));
          sum[0] += v.x, sum[1] += v.y;
        }
      }
      store_rows<kEpilogue, kPer>(p, token, tile * C::kRows, row, sum);
    }
  }
}

template <int kTokens, int kHalves, Epilogue kEpilogue>
int launch(const LinearArgs& args, const LinearParams& params, void* stream) {
  using C = Config<kTokens, kHalves>;
  auto* kernel = linear_small_kernel<kTokens, kHalves, kEpilogue>;
  return launch_linear(kernel, args, params, args.num_sms, kThreads, C::kSmemBytes, stream);
}

template <int kTokens, int kHalves>
int launch_epilogue(const LinearArgs& args, void* stream) {
  const LinearParams params = make_linear_params(args, 64 * kHalves);
  switch (args.epilogue) {
    case Epilogue::kPlain: return launch<kTokens, kHalves, Epilogue::kPlain>(args, params, stream);
    case Epilogue::kResidual:
      return launch<kTokens, kHalves, Epilogue::kResidual>(args, params, stream);
    case Epilogue::kSiluMul:
      return launch<kTokens, kHalves, Epilogue::kSiluMul>(args, params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int linear_small_box_rows(int tokens) { return tokens <= 8 ? 8 : 16; }

// Tactics: 1 = 64-row tiles, 2 = 128-row tiles.
int linear_small(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.tokens > 16) return cudaErrorInvalidValue;
  const int halves = args.tactic > 0 ? args.tactic : 2;
  if (args.tokens <= 8) {
    return halves == 1 ? launch_epilogue<8, 1>(args, stream) : launch_epilogue<8, 2>(args, stream);
  }
  return halves == 1 ? launch_epilogue<16, 1>(args, stream) : launch_epilogue<16, 2>(args, stream);
}

}  // namespace nibble::cuda
