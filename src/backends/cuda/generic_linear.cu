// Dense linear: out[M, N] = x[M, K] W[N, K]^T (+ residual), bf16 operands, f32 sums.
//
// Layouts: all row-major. Bytes: N*K*2 of weights once per token tile (the tiles of one row block
// run side by side, so L2 serves all but the first); flops 2*M*N*K on mma.sync m16n8k16 with
// weights as operand A and tokens as its n, so that one token pads to 8 only.
//
// Work split: a CTA has 128 rows of W x kTokens tokens; a ring of kStages slabs of 64 k filled by
// cp.async, rows of 128 bytes with their 16-byte chunks swizzled (chunk ^ row % 8).
// An output is summed over k in one order whatever the tile, so a row's bits do not depend on M.
//
// Limits: K a multiple of 8; no split of K, so that few rows and small N leave SMs idle. Made for
// the logits and for models that are not quantized; 16-bit engines are not what nibble is for.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "backends/cuda/generic.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/variant.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128, kSlab = 64;
constexpr int kStages = kPortable ? 3 : 4;  // three of the largest are 96 KB, sm_86 has 99
constexpr int kWBytes = kRows * kSlab * 2;

struct Params {
  const __nv_bfloat16 *x, *w, *residual;
  void* out;
  int m, n, k;
};

// Byte of 16-byte chunk `chunk` of row `row` in a slab.
__device__ __forceinline__ int slab_byte(int row, int chunk) {
  return row * (kSlab * 2) + ((chunk ^ (row & 7)) << 4);
}

template <int kTokens, int kRowWarps, bool kF32>
__global__ void __launch_bounds__(kThreads) dense_kernel(const Params p) {
  constexpr int kTokenWarps = 8 / kRowWarps;
  constexpr int kRowTiles = kRows / kRowWarps / 16, kTokenTiles = kTokens / kTokenWarps / 8;
  constexpr int kStageBytes = kWBytes + kTokens * kSlab * 2;
  extern __shared__ __align__(128) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int first_row = blockIdx.y * kRows, first_token = blockIdx.x * kTokens;
  const int slabs = (p.k + kSlab - 1) / kSlab;

  auto load = [&](int slab) {
    if (slab < slabs) {
      const uint32_t stage = base + slab % kStages * kStageBytes;
      for (int i = tid; i < (kRows + kTokens) * (kSlab / 8); i += kThreads) {
        const int row = i / (kSlab / 8), chunk = i % (kSlab / 8), k = slab * kSlab + chunk * 8;
        const bool is_w = row < kRows;
        const int source = is_w ? first_row + row : first_token + row - kRows;
        const bool real = k < p.k && source < (is_w ? p.n : p.m);
        const __nv_bfloat16* from =
            (is_w ? p.w : p.x) + (real ? static_cast<int64_t>(source) * p.k + k : 0);
        const int at = is_w ? slab_byte(row, chunk) : kWBytes + slab_byte(row - kRows, chunk);
        ptx::copy_16(stage + at, from, real ? 16 : 0);
      }
    }
    ptx::copy_commit();
  };

  const int row_base = warp % kRowWarps * (kRowTiles * 16);
  const int token_base = warp / kRowWarps * (kTokenTiles * 8);
  float sums[kRowTiles][kTokenTiles][4] = {};
  for (int s = 0; s < kStages - 1; ++s) load(s);
  for (int slab = 0; slab < slabs; ++slab) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    load(slab + kStages - 1);
    const uint32_t w = base + slab % kStages * kStageBytes, x = w + kWBytes;
#pragma unroll
    for (int k32 = 0; k32 < kSlab / 32; ++k32) {
      uint32_t a[kRowTiles][2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int row = row_base + i * 16 + (lane & 15), chunk = k32 * 4 + step * 2 + (lane >> 4);
          ptx::ldmatrix_x4(a[i][step], w + slab_byte(row, chunk));
        }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = token_base + j * 8 + (lane & 7), chunk = k32 * 4 + (lane >> 3);
        uint32_t b[4];
        ptx::ldmatrix_x4(b, x + slab_byte(token, chunk));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_bf16(sums[i][j], a[i][0], b[0], b[1]);
          ptx::mma_bf16(sums[i][j], a[i][1], b[2], b[3]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + row_base + i * 16 + (lane >> 2) + 8 * (e >> 1);
        const int token = first_token + token_base + j * 8 + 2 * (lane & 3) + (e & 1);
        if (row >= p.n || token >= p.m) continue;
        const int64_t at = static_cast<int64_t>(token) * p.n + row;
        if constexpr (kF32) {
          static_cast<float*>(p.out)[at] = sums[i][j][e];
        } else {
          const float old = p.residual ? __bfloat162float(p.residual[at]) : 0.0f;
          static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(sums[i][j][e] + old);
        }
      }
}

template <int kTokens, int kRowWarps, bool kF32>
int launch(const Params& params, void* stream) {
  constexpr int kBytes = kStages * (kWBytes + kTokens * kSlab * 2);
  const auto kernel = dense_kernel<kTokens, kRowWarps, kF32>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>((params.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((params.n + kRows - 1) / kRows));
  kernel<<<grid, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

template <bool kF32>
int launch_tokens(const Params& params, void* stream) {
  if (params.m <= 8) return launch<8, 8, kF32>(params, stream);
  if (params.m <= 32) return launch<32, 8, kF32>(params, stream);
  return launch<128, 4, kF32>(params, stream);
}

}  // namespace

int generic_linear(const GenericLinearArgs& args, void* stream) {
  if (args.m < 1 || args.n < 1 || args.k < 8 || args.k % 8 || (args.residual && args.f32_out)) {
    return cudaErrorInvalidValue;
  }
  const Params params{.x = static_cast<const __nv_bfloat16*>(args.x),
                      .w = static_cast<const __nv_bfloat16*>(args.w),
                      .residual = static_cast<const __nv_bfloat16*>(args.residual),
                      .out = args.out,
                      .m = args.m,
                      .n = args.n,
                      .k = args.k};
  return args.f32_out ? launch_tokens<true>(params, stream) : launch_tokens<false>(params, stream);
}

}  // namespace nibble::cuda
