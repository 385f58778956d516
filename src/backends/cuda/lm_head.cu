// Dense linear for the logits: out[R, N] f32 = x[R, K] W[N, K]^T, both bf16. Bytes: N*K*2 of
// weights once per 64 rows of x (one pass at decode); flops 2*R*N*K on mma.sync m16n8k16 with
// weights as operand A.
//
// One CTA an SM takes tiles of 128 weight rows; a producer warp fills a ring of stages, 64 k of the
// tile's weights (16 KB) and of x each, with the tensor copy engine; eight warps have 16 rows each.
// The ring is about 200 KB, and its first round of weights is requested before
// griddepcontrol.wait: they do not depend on the kernel before. (Loads straight to registers, the
// first version, reached 84 % of the read limit back to back, but 55 % as the one launch of a
// step.)
//
// Limits: K a multiple of 8; sm_90 (tensor maps).
// SPDX-License-Identifier: Apache-2.0
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "backends/cuda/kernels.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kConsumers = 8, kThreads = (kConsumers + 1) * 32;
constexpr int kRows = kConsumers * 16;  // of W in a tile
constexpr int kDepth = 64;              // k of a stage: 128 bytes, the swizzle's width
constexpr int kWeightBytes = kRows * kDepth * 2;

template <int kTiles>  // of 8 rows of x
struct Config {
  static constexpr int kXBytes = kTiles * 8 * kDepth * 2;
  static constexpr int kStageBytes = kWeightBytes + kXBytes;
  static constexpr int kStages = 212 * 1024 / kStageBytes;
  static constexpr int kBarOffset = kStages * kStageBytes;
  static constexpr int kSmemBytes = kBarOffset + kStages * 16;
};

struct Params {
  CUtensorMap w, x;
  float* out;
  int rows, n, k;
};

template <int kTiles>
__global__ void __launch_bounds__(kThreads, 1) dense_kernel(const __grid_constant__ Params p) {
  using C = Config<kTiles>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const uint32_t ring = ptx::smem_address(smem), full = ring + C::kBarOffset,
                 empty = full + C::kStages * 8;
  const int slabs = (p.k + kDepth - 1) / kDepth;
  const int x_tiles = (p.rows + kTiles * 8 - 1) / (kTiles * 8);
  const int items = (p.n + kRows - 1) / kRows * x_tiles;

  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, kConsumers);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  if (warp == kConsumers) {
    if (lane != 0) {
      ptx::grid_dependency_wait();
      return;
    }
    const auto load_w = [&](int stage, int item, int slab) {
      ptx::mbarrier_expect(full + stage * 8, C::kStageBytes);
      ptx::tensor_load_2d(ring + stage * C::kStageBytes, &p.w, slab * kDepth,
                          item / x_tiles * kRows, full + stage * 8);
    };
    const auto load_x = [&](int stage, int item, int slab) {
      ptx::tensor_load_2d(ring + stage * C::kStageBytes + kWeightBytes, &p.x, slab * kDepth,
                          item % x_tiles * kTiles * 8, full + stage * 8);
    };
    // The first round of stages (of the first tile): weights now, x when it is there.
    const int early = static_cast<int>(blockIdx.x) < items ? min(C::kStages, slabs) : 0;
    for (int i = 0; i < early; ++i) load_w(i, blockIdx.x, i);
    ptx::grid_dependency_wait();
    for (int i = 0; i < early; ++i) load_x(i, blockIdx.x, i);
    int at = 0, stage = 0, phase = 1;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      for (int slab = 0; slab < slabs; ++slab, ++at) {
        if (at >= early) {
          ptx::mbarrier_wait(empty + stage * 8, phase);
          load_w(stage, item, slab);
          load_x(stage, item, slab);
        }
        if (++stage == C::kStages) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  ptx::grid_dependency_wait();
  const int g = lane >> 2, t = lane & 3;
  int stage = 0, phase = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    float acc[kTiles][4] = {};
    for (int slab = 0; slab < slabs; ++slab) {
      ptx::mbarrier_wait(full + stage * 8, phase);
      const uint32_t w = ring + stage * C::kStageBytes, x = w + kWeightBytes;
      uint32_t a[4][4];
      {
        const int row = warp * 16 + (lane & 15);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          ptx::ldmatrix_x4(a[k], w + row * 128 + (((2 * k + (lane >> 4)) ^ (row & 7)) << 4));
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int row = lane & 7;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, x + (n * 8 + row) * 128 + (((4 * pair + (lane >> 3)) ^ row) << 4));
          ptx::mma_bf16(acc[n], a[2 * pair], b[0], b[1]);
          ptx::mma_bf16(acc[n], a[2 * pair + 1], b[2], b[3]);
        }
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty + stage * 8);
      if (++stage == C::kStages) stage = 0, phase ^= 1;
    }
    const int first_row = item % x_tiles * kTiles * 8;
    const int column = item / x_tiles * kRows + warp * 16 + g;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = first_row + n * 8 + 2 * t + (i & 1), c = column + 8 * (i >> 1);
        if (r < p.rows && c < p.n) p.out[static_cast<int64_t>(r) * p.n + c] = acc[n][i];
      }
  }
}

template <int kTiles>
int launch(const DenseArgs& args, void* stream) {
  Params params{.w = {}, .x = {}, .out = args.out, .rows = args.rows, .n = args.n, .k = args.k};
  TensorMap map;
  int status = make_tensor_map(&map, args.weight, args.n, args.k, int64_t{args.k} * 2, kRows);
  if (status != 0) return status;
  std::memcpy(&params.w, &map, sizeof map);
  status = make_tensor_map(&map, args.x, args.rows, args.k, int64_t{args.k} * 2, kTiles * 8);
  if (status != 0) return status;
  std::memcpy(&params.x, &map, sizeof map);
  const int items = (args.n + kRows - 1) / kRows * ((args.rows + kTiles * 8 - 1) / (kTiles * 8));
  LinearArgs common{};
  common.dependent = args.dependent;
  return launch_linear(dense_kernel<kTiles>, common, std::min(items, args.num_sms), kThreads,
                       Config<kTiles>::kSmemBytes, stream, 1, params);
}

}  // namespace

int dense_linear(const DenseArgs& args, void* stream) {
  if (args.k % 8 || args.rows < 1) return cudaErrorInvalidValue;
  return args.rows <= 8    ? launch<1>(args, stream)
         : args.rows <= 16 ? launch<2>(args, stream)
         : args.rows <= 32 ? launch<4>(args, stream)
                           : launch<8>(args, stream);
}

}  // namespace nibble::cuda
