// Whether unpacking int4 weights overlaps with the tensor cores: clocks for 256 rows x 128 k whose
// weights and x lie in shared memory, with the instructions of linear_wgmma.cu (K2: 16 warps, two
// wgmma together, the operand in two buffers), of linear_digits.cu (K7: 16 warps, a group's
// integers are scaled and added up; alone: only multiplied) and of mma.sync as linear_small.cu (K1)
// had it while it made weights of the codes (a block of 64 rows a warp, here two warps a
// scheduler). No barriers, no reading of memory: what a kernel takes beyond it is its own. "Alone"
// is without weights: x (mma.sync: and scales) is still read. Addresses move by `step` (0) every
// round, or ptxas would load and unpack once.
//
// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/layout.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/wgmma.cuh"
#include "common.cuh"

namespace nibble::bench {
namespace {

constexpr int kRounds = 2000;
constexpr uint32_t kBlockBytes = cuda_layout::kBlockBytes;
constexpr uint32_t kNibbleBytes = cuda_layout::kBlockNibbleBytes;

// bf16 values of magnitudes near 2^-7; as weights any bits will do.
__device__ void fill_shared(uint8_t* smem, int bytes) {
  for (int i = static_cast<int>(threadIdx.x) * 4; i < bytes; i += static_cast<int>(blockDim.x) * 4)
    *reinterpret_cast<uint32_t*>(smem + i) = (mix(i) & 0x80ff80ffu) | 0x3c003c00u;
  __syncthreads();
  ptx::fence_proxy_async();
}

template <int kTokens, bool kUnpack>
__global__ void __launch_bounds__(512, 1)
    wgmma_loop(uint32_t step, float* sink, long long* clocks) {
  extern __shared__ __align__(1024) uint8_t smem[];
  constexpr uint32_t kXBytes = kTokens * 256;
  fill_shared(smem, kXBytes + 4 * kBlockBytes);
  const uint32_t base = ptx::smem_address(smem), lane = threadIdx.x & 31;
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), m16 = warp & 3;
  uint32_t block = base + kXBytes + (warp >> 2) * kBlockBytes;
  uint32_t x = ptx::descriptor_address(base);
  uint32_t a[2][2][4] = {}, raw[4];
  ptx::RowScales scales;
  float acc[kTokens / 2] = {};
  auto fetch = [&](int k64) {
    ptx::load_shared_16(raw, block + m16 * 1024 + lane * 16 + k64 * 512);
  };
  auto fetch_scales = [&] {
    scales = ptx::row_scales(ptx::load_shared_4(block + kNibbleBytes + (lane >> 2) * 16 + m16 * 4));
  };
  fetch_scales();
  fetch(0);
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    block += step;
    x += step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int k16 = i * 2 + k;
        ptx::Wgmma<kTokens>::rs_bf16(
            acc, a[i & 1][k],
            ptx::descriptor_k_major(x + (k16 / 4 * kTokens * 128 >> 4) + k16 % 4 * 2));
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if constexpr (kUnpack) {
#pragma unroll
        for (int k = 0; k < 2; ++k) ptx::dequant(a[~i & 1][k], raw[2 * (~i & 1) + k], scales);
        if (i == 0) fetch(1);
        if (i == 2) {
          fetch_scales();
          fetch(0);
        }
      }
    }
  }
  ptx::wgmma_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) *clocks = clock64() - start;
  float sum = 0;
  for (const float v : acc) sum += v;
  if (sum == 123.456f) *sink = sum;
}

template <int kTokens, bool kAddUp>
__global__ void __launch_bounds__(512, 1)
    digits_loop(uint32_t step, float* sink, long long* clocks) {
  extern __shared__ __align__(1024) uint8_t smem[];
  constexpr uint32_t kXBytes = kTokens * 256, kFactorBytes = 1024;
  using Multiply = ptx::Wgmma<2 * kTokens>;
  fill_shared(smem, kXBytes + kFactorBytes + 4 * kBlockBytes);
  const uint32_t base = ptx::smem_address(smem), lane = threadIdx.x & 31;
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), m16 = warp & 3;
  uint32_t block = base + kXBytes + kFactorBytes + (warp >> 2) * kBlockBytes;
  uint32_t x = ptx::descriptor_address(base), factors_at = base + kXBytes + (lane & 3) * 16;
  uint32_t a[2][4][4];
  int digits[kTokens] = {};
  float sums[kTokens / 2] = {};
  auto fetch = [&](uint32_t(&operand)[4][4]) {
    uint32_t words[2][4];
    ptx::load_shared_16(words[0], block + m16 * 1024 + lane * 16);
    ptx::load_shared_16(words[1], block + m16 * 1024 + lane * 16 + 512);
    ptx::mask_digits(operand, words);
  };
  fetch(a[0]);
  __syncthreads();
  const long long start = clock64();
#pragma unroll 2
  for (int round = 0; round < kRounds; ++round) {
    block += step;
    x += step;
    factors_at += step;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (kAddUp && k == 0) {
        Multiply::rs_u8_first(digits, a[round & 1][k], ptx::descriptor_k_major(x));
      } else {
        Multiply::rs_u8(digits, a[round & 1][k], ptx::descriptor_k_major(x + k * 2));
      }
    }
    ptx::wgmma_commit();
    fetch(a[~round & 1]);
    const uint32_t pair = ptx::load_shared_4(block + kNibbleBytes + (lane >> 2) * 16 + m16 * 4);
    float factors[kTokens / 8][4];
#pragma unroll
    for (int o = 0; o < kTokens / 8; ++o) {
      ptx::load_shared_f32x4(factors[o], factors_at + o * 64);
    }
    ptx::wgmma_wait<0>();
    if constexpr (kAddUp) {
#pragma unroll
      for (int o = 0; o < kTokens / 8; ++o) {
        ptx::add_digits(*reinterpret_cast<float(*)[4]>(&sums[o * 4]),
                        *reinterpret_cast<const int(*)[8]>(&digits[o * 8]), pair, factors[o]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *clocks = clock64() - start;
  float sum = 0;
  for (const float v : sums) sum += v;
  for (const int v : digits) sum += static_cast<float>(v);
  if (sum == 123.456f) *sink = sum;
}

template <int kOctets, bool kUnpack>
__global__ void __launch_bounds__(256, 1) mma_loop(uint32_t step, float* sink, long long* clocks) {
  extern __shared__ __align__(1024) uint8_t smem[];
  constexpr uint32_t kXBytes = kOctets * 2048;
  fill_shared(smem, kXBytes + 8 * kBlockBytes);
  const uint32_t base = ptx::smem_address(smem), lane = threadIdx.x & 31;
  uint32_t block = base + kXBytes + (threadIdx.x >> 5) * kBlockBytes, x = base;
  float acc[4][kOctets][4] = {};
  uint32_t fixed[4] = {0x3c003c00u + lane, 0x3c013c00u, 0x3c023c00u, 0x3c033c00u};
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    block += step;
    x += step;
    uint32_t pairs[4];
    ptx::load_shared_16(pairs, block + kNibbleBytes + (lane >> 2) * 16);
    ptx::RowScales scales[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) scales[m] = ptx::row_scales(pairs[m]);
#pragma unroll
    for (int k64 = 0; k64 < 2; ++k64) {
      uint32_t w[4][4];
#pragma unroll
      for (int m = 0; m < 4 && kUnpack; ++m) {
        ptx::load_shared_16(w[m], block + ((m * 2 + k64) * 32 + lane) * 16);
      }
#pragma unroll
      for (int k32 = 0; k32 < 2; ++k32) {
        uint32_t b[kOctets][4];
#pragma unroll
        for (int n = 0; n < kOctets; ++n) {
          const uint32_t row = n * 8 + (lane & 7);
          const uint32_t at = row * 128 + (((lane >> 3) ^ (row & 7)) << 4);
          ptx::ldmatrix_x4(b[n], x + k64 * kOctets * 1024 + (at ^ (k32 << 6)));
        }
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            uint32_t a[4] = {fixed[0], fixed[1], fixed[2], fixed[3]};
            if constexpr (kUnpack) ptx::dequant(a, w[m][k32 * 2 + k], scales[m]);
#pragma unroll
            for (int n = 0; n < kOctets; ++n) {
              ptx::mma_bf16(acc[m][n], a, b[n][k * 2], b[n][k * 2 + 1]);
            }
          }
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *clocks = clock64() - start;
  float sum = 0;
  for (int m = 0; m < 4; ++m)
    for (int n = 0; n < kOctets; ++n)
      for (int i = 0; i < 4; ++i) sum += acc[m][n][i];
  if (sum == 123.456f) *sink = sum;
}

// Clocks of a round of one CTA; the fastest of three.
double measure(void (*kernel)(uint32_t, float*, long long*), int threads, int smem_bytes,
               cudaStream_t stream) {
  auto* sink = device_alloc<float>(1);
  auto* clocks = device_alloc<long long>(1);
  BENCH_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  long long best = 0;
  for (int i = 0; i < 3; ++i) {
    kernel<<<1, threads, smem_bytes, stream>>>(0, sink, clocks);
    long long got = 0;
    BENCH_CHECK(cudaMemcpyAsync(&got, clocks, sizeof got, cudaMemcpyDeviceToHost, stream));
    BENCH_CHECK(cudaStreamSynchronize(stream));
    best = i == 0 ? got : std::min(best, got);
  }
  BENCH_CHECK(cudaFree(sink));
  BENCH_CHECK(cudaFree(clocks));
  return static_cast<double>(best) / kRounds;
}

template <int kTokens>
void bench_wgmma(cudaStream_t stream) {
  constexpr int kSmem = kTokens * 256 + 4 * kBlockBytes;
  std::printf(
      "unpack: wgmma, %2d tokens: %6.0f clocks a group of 256 rows alone, %6.0f unpacking too\n",
      kTokens, measure(wgmma_loop<kTokens, false>, 512, kSmem, stream),
      measure(wgmma_loop<kTokens, true>, 512, kSmem, stream));
}
template <int kTokens>
void bench_digits(cudaStream_t stream) {
  constexpr int kSmem = kTokens * 256 + 1024 + 4 * kBlockBytes;
  std::printf(
      "unpack: digits, %2d tokens: %6.0f clocks a group of 256 rows alone, %6.0f adding up too\n",
      kTokens, measure(digits_loop<kTokens, false>, 512, kSmem, stream),
      measure(digits_loop<kTokens, true>, 512, kSmem, stream));
}
template <int kOctets>
void bench_mma(cudaStream_t stream) {  // a round is eight blocks: 512 rows
  constexpr int kSmem = kOctets * 2048 + 8 * kBlockBytes;
  std::printf(
      "unpack: mma.sync, %2d tokens: %3.0f clocks a group of 256 rows alone, %3.0f unpacking too\n",
      kOctets * 8, measure(mma_loop<kOctets, false>, 256, kSmem, stream) / 2,
      measure(mma_loop<kOctets, true>, 256, kSmem, stream) / 2);
}

}  // namespace

void bench_unpack(cudaStream_t stream) {
  bench_wgmma<16>(stream);
  bench_wgmma<32>(stream);
  bench_wgmma<64>(stream);
  bench_digits<8>(stream);
  bench_digits<16>(stream);
  bench_mma<1>(stream);
  bench_mma<2>(stream);
  bench_mma<4>(stream);
}

}  // namespace nibble::bench
