// The e4m3 limit of the card at hand: wgmma.m64n64k32 with f16 sums, as linear_fp8.cu has them,
// and nothing else; operand A (int4 codes) in registers, random B in shared memory, four warpgroups
// an SM, 3 ms a launch so that the power limit has its say. SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/wgmma.cuh"
#include "common.cuh"

namespace nibble::bench {
namespace {

constexpr int kWarpgroups = 4, kSteps = 16, kTokens = 64;

__global__ void __launch_bounds__(kWarpgroups * 128, 1) fp8_kernel(int rounds, float* sink) {
  __shared__ __align__(1024) uint32_t x[kTokens * 32];
  for (int i = threadIdx.x; i < kTokens * 32; i += blockDim.x) {
    // Exponents 4 .. 7 of 15: nothing overflows, no NaN.
    x[i] = (mix(i + 1000 * blockIdx.x) & 0xbfbfbfbfu) | 0x20202020u;
  }
  __syncthreads();
  ptx::fence_proxy_async();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = mix(threadIdx.x * 4 + i) & 0x0f0f0f0fu;
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));
  uint32_t sum[2][kTokens / 4] = {};  // pairs of f16
  const uint32_t x_at = ptx::descriptor_address(ptx::smem_address(x));
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      ptx::Wgmma<kTokens>::rs_e4m3(sum[k % 2], a, ptx::descriptor_k_major(x_at + k / 2 % 4 * 2));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  uint32_t all = 0;
  for (int i = 0; i < kTokens / 4; ++i) all += sum[0][i] + sum[1][i];
  if (all == 123456789u) *sink = 1.0f;
}

}  // namespace

double measure_fp8_tflops(cudaStream_t stream, int num_sms) {
  constexpr int kRounds = 1200;
  auto* sink = device_alloc<float>(1);
  const Timing t = time_graph(stream, 4, [&] {
    for (int i = 0; i < 4; ++i) {
      fp8_kernel<<<num_sms, kWarpgroups * 128, 0, stream>>>(kRounds, sink);
      BENCH_CHECK(cudaGetLastError());
    }
  });
  BENCH_CHECK(cudaFree(sink));
  const double flops = 2.0 * 64 * kTokens * 32 * kSteps * kRounds * kWarpgroups * num_sms;
  std::printf("e4m3 wgmma limit of this run: %.0f TFLOPS\n", flops / t.median_us * 1e-6);
  return flops / t.median_us * 1e-6;
}

}  // namespace nibble::bench
