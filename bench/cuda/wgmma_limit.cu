// The tensor limits of the card at hand: wgmma and nothing else, as the kernels have it. Operand A
// in registers, random B in shared memory, eight independent chains of 64 x 64 sums or four of 64 x
// 128 an SM (the better one counts), a good 0.2 s of it so that the power limit has its say.
//   bf16: m64nNk16, f32 sums, random values (linear_wgmma.cu)
//   f16:  m64n128k16, f32 sums, random values (attention_prefill.cu)
//   e4m3: m64nNk32, f16 sums, A int4 codes (linear_fp8.cu)
// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/wgmma.cuh"
#include "common.cuh"

namespace nibble::bench {
namespace {

constexpr int kSteps = 16, kRounds = 1200;

// Two values of 16 bits or four of 8: magnitudes near 1 (e4m3: 2^-3 ... 1), random signs; nothing
// overflows, no NaN.
template <WgmmaKind kKind>
__device__ uint32_t random_values(uint64_t seed) {
  const uint32_t bits = mix(seed);
  if constexpr (kKind == WgmmaKind::kBf16) {
    return (bits & 0x80ff80ffu) | 0x3f003f00u;
  } else if constexpr (kKind == WgmmaKind::kF16) {
    return (bits & 0x87ff87ffu) | 0x38003800u;
  } else {
    return (bits & 0xbfbfbfbfu) | 0x20202020u;
  }
}

template <int kTokens>
constexpr int kWarpgroups = 256 / kTokens;  // two chains each

template <WgmmaKind kKind, int kTokens>
__global__ void __launch_bounds__(kWarpgroups<kTokens> * 128, 1)
    wgmma_kernel(int rounds, float* sink) {
  constexpr bool kPairs = kKind == WgmmaKind::kE4m3;  // sums are pairs of f16
  using Sum = std::conditional_t<kPairs, uint32_t, float>;
  constexpr int kSums = kPairs ? kTokens / 4 : kTokens / 2;
  __shared__ __align__(1024) uint32_t x[kTokens * 32];
  for (int i = threadIdx.x; i < kTokens * 32; i += blockDim.x) {
    x[i] = random_values<kKind>(i + 10000 * blockIdx.x);
  }
  __syncthreads();
  ptx::fence_proxy_async();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    const uint64_t seed = threadIdx.x * 4 + i;
    a[i] = kPairs ? mix(seed) & 0x0f0f0f0fu : random_values<kKind>(seed);
  }
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));
  Sum sum[2][kSums] = {};
  const uint32_t x_at = ptx::descriptor_address(ptx::smem_address(x));
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint64_t b = ptx::descriptor_k_major(x_at + k / 2 % 4 * 2);
      if constexpr (kKind == WgmmaKind::kBf16) {
        ptx::Wgmma<kTokens>::rs_bf16(sum[k % 2], a, b);
      } else if constexpr (kKind == WgmmaKind::kF16) {
        ptx::wgmma_rs_f16_n128(sum[k % 2], a, b);
      } else {
        ptx::Wgmma<kTokens>::rs_e4m3(sum[k % 2], a, b);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  Sum all = 0;
  for (int i = 0; i < kSums; ++i) all += sum[0][i] + sum[1][i];
  if (all == static_cast<Sum>(123456789)) *sink = 1.0f;
}

template <WgmmaKind kKind, int kTokens>
double measure(cudaStream_t stream, int num_sms, float* sink) {
  constexpr int kGroups = kWarpgroups<kTokens>;
  const Timing t = time_graph(stream, 4, [&] {
    for (int i = 0; i < 4; ++i) {
      wgmma_kernel<kKind, kTokens><<<num_sms, kGroups * 128, 0, stream>>>(kRounds, sink);
      BENCH_CHECK(cudaGetLastError());
    }
  });
  constexpr double kDepth = kKind == WgmmaKind::kE4m3 ? 32 : 16;
  return 2.0 * 64 * kTokens * kDepth * kSteps * kRounds * kGroups * num_sms / t.median_us * 1e-6;
}

}  // namespace

double wgmma_tflops(WgmmaKind kind, cudaStream_t stream) {
  static double measured[3] = {};
  double& tflops = measured[static_cast<int>(kind)];
  if (tflops > 0) return tflops;
  int sms;
  BENCH_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  auto* sink = device_alloc<float>(1);
  switch (kind) {
    case WgmmaKind::kBf16:
      tflops = std::max(measure<WgmmaKind::kBf16, 64>(stream, sms, sink),
                        measure<WgmmaKind::kBf16, 128>(stream, sms, sink));
      break;
    case WgmmaKind::kF16: tflops = measure<WgmmaKind::kF16, 128>(stream, sms, sink); break;
    case WgmmaKind::kE4m3:
      tflops = std::max(measure<WgmmaKind::kE4m3, 64>(stream, sms, sink),
                        measure<WgmmaKind::kE4m3, 128>(stream, sms, sink));
      break;
  }
  BENCH_CHECK(cudaFree(sink));
  std::printf("%s wgmma limit of this run: %.0f TFLOPS\n", wgmma_name(kind), tflops);
  return tflops;
}

}  // namespace nibble::bench
