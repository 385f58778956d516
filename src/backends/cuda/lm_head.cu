// Dense linear for the logits: out[R, N] f32 = x[R, K] W[N, K]^T, both bf16. Bytes: N*K*2 of
// weights once per 64 rows of x (one pass at decode); flops 2*R*N*K on mma.sync m16n8k16 with
// weights as operand A.
//
// A CTA has 128 weight rows, 16 per warp. A lane reads 16 bytes (8 k) of rows g and g + 8 straight
// from device memory into its operand registers: the k order inside a chunk of 32 is free, so lane
// t takes k 8t .. 8t+7, which serve two k16 steps, and x is read with the same order. kAhead chunks
// are in flight per warp; x comes through shared memory, 256 k at a time.
//
// Limits: K a multiple of 8.
// SPDX-License-Identifier: Apache-2.0
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

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kSlab = 256;                 // k of x in shared memory
constexpr int kRowBytes = kSlab * 2 + 64;  // padded: two rows of a 16-byte phase differ in banks
constexpr int kAhead = 4;

struct Params {
  const __nv_bfloat16 *x, *w;
  float* out;
  int rows, n, k;
};

template <int kTiles>  // of 8 rows of x
__global__ void __launch_bounds__(kThreads) dense_kernel(const Params p) {
  extern __shared__ __align__(128) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int first_row = blockIdx.y * kTiles * 8;
  const int row = blockIdx.x * kWarps * 16 + warp * 16 + g;
  const __nv_bfloat16* w0 = p.w + static_cast<int64_t>(min(row, p.n - 1)) * p.k + t * 8;
  const __nv_bfloat16* w1 = p.w + static_cast<int64_t>(min(row + 8, p.n - 1)) * p.k + t * 8;
  auto load_w = [&](uint4(&v)[2], int k) {
    const bool real = k + t * 8 < p.k;
    v[0] = real ? __ldcs(reinterpret_cast<const uint4*>(w0 + k)) : make_uint4(0, 0, 0, 0);
    v[1] = real ? __ldcs(reinterpret_cast<const uint4*>(w1 + k)) : make_uint4(0, 0, 0, 0);
  };
  auto load_x = [&](int slab, int buffer) {
    for (int i = tid; i < kTiles * 8 * (kSlab / 8); i += kThreads) {
      const int r = i / (kSlab / 8), chunk = i % (kSlab / 8), k = slab * kSlab + chunk * 8;
      const bool real = first_row + r < p.rows && k < p.k;
      ptx::copy_16(base + buffer * kTiles * 8 * kRowBytes + r * kRowBytes + chunk * 16,
                   p.x + (real ? static_cast<int64_t>(first_row + r) * p.k + k : 0), real ? 16 : 0);
    }
    ptx::copy_commit();
  };

  ptx::grid_launch_dependents();
  uint4 ahead[kAhead][2];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_w(ahead[i], i * 32);  // not written by the kernel before
  ptx::grid_dependency_wait();
  load_x(0, 0);
  float acc[kTiles][4] = {};
  const int slabs = (p.k + kSlab - 1) / kSlab;
  for (int slab = 0; slab < slabs; ++slab) {
    if (slab + 1 < slabs) {
      load_x(slab + 1, (slab + 1) & 1);
      ptx::copy_wait<1>();
    } else {
      ptx::copy_wait<0>();
    }
    __syncthreads();
    const uint32_t x = base + (slab & 1) * kTiles * 8 * kRowBytes + g * kRowBytes + t * 16;
#pragma unroll
    for (int c = 0; c < kSlab / 32; ++c) {
      uint4(&v)[2] = ahead[c % kAhead];
      const uint32_t a[2][4] = {{v[0].x, v[1].x, v[0].y, v[1].y}, {v[0].z, v[1].z, v[0].w, v[1].w}};
      load_w(v, slab * kSlab + (c + kAhead) * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint32_t b[4];
        ptx::load_shared_16(b, x + n * 8 * kRowBytes + c * 64);
        ptx::mma_bf16(acc[n], a[0], b[0], b[1]);
        ptx::mma_bf16(acc[n], a[1], b[2], b[3]);
      }
    }
    __syncthreads();  // the buffer is free
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first_row + n * 8 + 2 * t + (i & 1), column = row + 8 * (i >> 1);
      if (r < p.rows && column < p.n) p.out[static_cast<int64_t>(r) * p.n + column] = acc[n][i];
    }
}

template <int kTiles>
int launch(const DenseArgs& args, void* stream) {
  const Params params{.x = static_cast<const __nv_bfloat16*>(args.x),
                      .w = static_cast<const __nv_bfloat16*>(args.weight),
                      .out = args.out,
                      .rows = args.rows,
                      .n = args.n,
                      .k = args.k};
  constexpr int kSmem = 2 * kTiles * 8 * kRowBytes;
  cudaError_t status = cudaFuncSetAttribute(dense_kernel<kTiles>,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((args.n + kWarps * 16 - 1) / (kWarps * 16)),
                        static_cast<unsigned>((args.rows + kTiles * 8 - 1) / (kTiles * 8)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSmem;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = args.dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, dense_kernel<kTiles>, params);
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
