// What the power limit leaves (docs/performance.md): seconds of one thing, so that the card is at
// the clocks it can hold. `nvidia-smi --query-gpu=clocks.sm,power.draw --format=csv -lms 100`
// beside it tells the watts.
//   power: wgmma by itself, m64n64 (two digits: m64n128), four warpgroups an SM; operand A in
//          registers as a kernel would have it, eight of them in turn, operand B 64 rows of
//          normally distributed x; TFLOPS of the last tenth of a second and the clocks meanwhile
//   sms:   every SM reads an equal share of memory by bulk copies, 12 in flight; how long each took
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>

#include <algorithm>
#include <numeric>

#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/wgmma.cuh"
#include "common.cuh"

namespace nibble::bench {
namespace {

constexpr int kTokens = 64, kWarpgroups = 4, kSteps = 8, kRounds = 4000;
enum class Operands : int {
  kWeights,    // bf16: codes times a scale a row and group
  kCodes,      // bf16: codes -8 ... 7
  kSubnormal,  // bf16: codes 0 ... 15 as a word's masked nibbles are, x times 2^64
  kZeros,      // bf16: weights, and x is zero
  kDigits,     // codes 0 ... 15 in 8 bits, two digits of x (linear_digits.cu)
  kE4m3,       // codes 0 ... 15 read as e4m3, f16 sums (linear_fp8.cu)
};

__device__ float normal(uint64_t seed) {
  return sqrtf(-2.0f * logf(uniform(2 * seed) + 1e-7f)) * cospif(2.0f * uniform(2 * seed + 1));
}
// 0 ... 15, as a normal distribution leaves them.
__device__ uint32_t code(uint64_t seed) {
  return static_cast<uint32_t>(fminf(fmaxf(rintf(normal(seed) * 2.7f) + 8.0f, 0.0f), 15.0f));
}
__device__ uint32_t bf16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16(x)); }
__device__ uint32_t e4m3_bits(float x) {  // near enough: what it costs to multiply is meant
  const int exponent = min(max(static_cast<int>(floorf(log2f(fabsf(x) + 1e-9f))) + 7, 1), 15);
  const float mantissa = fabsf(x) * exp2f(static_cast<float>(7 - exponent)) - 1.0f;
  const auto bits = static_cast<uint32_t>(fminf(fmaxf(mantissa * 8.0f, 0.0f), 6.0f));
  return (x < 0 ? 0x80u : 0u) | static_cast<uint32_t>(exponent) << 3 | bits;
}

template <Operands kKind>
__global__ void __launch_bounds__(kWarpgroups * 128, 1)
    power_kernel(int rounds, float* sink, unsigned long long* clocks) {
  constexpr bool k8Bits = kKind == Operands::kDigits || kKind == Operands::kE4m3;
  constexpr int kColumns = kKind == Operands::kDigits ? 2 * kTokens : kTokens;
  constexpr int kWords = kColumns * (k8Bits ? 32 : 64);
  __shared__ __align__(1024) uint32_t x[kWords];
  for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
    const uint64_t seed = 4 * (i + 100000ull * blockIdx.x);
    uint32_t word = 0;
    if constexpr (k8Bits) {
      for (int b = 0; b < 4; ++b) {
        const float value = normal(seed + b);
        uint32_t byte = 0;
        if constexpr (kKind == Operands::kE4m3) {
          byte = e4m3_bits(value * 100.0f);
        } else {
          const int q = static_cast<int>(rintf(fminf(fmaxf(value / 4.5f, -1.0f), 1.0f) * 32512.0f));
          const int high = (q + 128) >> 8, low = q - high * 256;
          byte = static_cast<uint8_t>(i / 32 % 2 ? low : high);
        }
        word |= byte << (8 * b);
      }
    } else if constexpr (kKind != Operands::kZeros) {
      const float by = kKind == Operands::kSubnormal ? 0x1p64f : 1.0f;
      word = bf16_bits(normal(seed) * by) | bf16_bits(normal(seed + 1) * by) << 16;
    }
    x[i] = word;
  }
  __syncthreads();
  ptx::fence_proxy_async();
  uint32_t a[kSteps][4];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint64_t seed = (threadIdx.x * 64ull + k * 4 + i) * 8;
      if constexpr (k8Bits) {
        a[k][i] = code(seed) | code(seed + 1) << 8 | code(seed + 2) << 16 | code(seed + 3) << 24;
        if (kKind == Operands::kDigits && i % 2) a[k][i] <<= 4;  // rows g + 8
      } else if constexpr (kKind == Operands::kSubnormal) {
        a[k][i] = code(seed) | code(seed + 1) << 16;
      } else {
        const float scale = kKind == Operands::kCodes
                                ? 1.0f
                                : 0.003f * (0.5f + uniform(threadIdx.x / 4 * 2 + i % 2 + 999983));
        a[k][i] = bf16_bits((static_cast<float>(code(seed)) - 8.0f) * scale) |
                  bf16_bits((static_cast<float>(code(seed + 1)) - 8.0f) * scale) << 16;
      }
    }
    asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3]));
  }
  const uint32_t x_at = ptx::descriptor_address(ptx::smem_address(x));
  unsigned long long began;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(began));
  const long long clock = clock64();
  using Multiply = ptx::Wgmma<kColumns>;
  using Sum = std::conditional_t<kKind == Operands::kDigits, int,
                                 std::conditional_t<kKind == Operands::kE4m3, uint32_t, float>>;
  constexpr int kSums = kKind == Operands::kE4m3 ? kColumns / 4 : kColumns / 2;
  Sum sum[kSums] = {};
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint64_t b = ptx::descriptor_k_major(
          x_at + (k8Bits ? k % 4 * 2 : (k / 4 * kColumns * 128 >> 4) + k % 4 * 2));
      if constexpr (kKind == Operands::kDigits) {
        Multiply::rs_u8(sum, a[k], b);
      } else if constexpr (kKind == Operands::kE4m3) {
        Multiply::rs_e4m3(sum, a[k], b);
      } else {
        Multiply::rs_bf16(sum, a[k], b);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    unsigned long long ended;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ended));
    clocks[0] = static_cast<unsigned long long>(clock64() - clock);
    clocks[1] = ended - began;
  }
  Sum all = 0;
  for (const Sum s : sum) all += s;
  if (all == static_cast<Sum>(123456789)) *sink = 1.0f;
}

template <Operands kKind>
void power_row(const char* name, cudaStream_t stream) {
  int sms;
  BENCH_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  auto* sink = device_alloc<float>(1);
  auto* clocks = device_alloc<unsigned long long>(2);
  float us = 0;
  for (float spent = 0; spent < 1.2e6f; spent += us * 20 * 21) {
    us = time_graph(stream, 20, [&] {
           for (int i = 0; i < 20; ++i) {
             power_kernel<kKind><<<sms, kWarpgroups * 128, 0, stream>>>(kRounds, sink, clocks);
             BENCH_CHECK(cudaGetLastError());
           }
         }).median_us;
  }
  unsigned long long counted[2];
  BENCH_CHECK(cudaMemcpy(counted, clocks, sizeof counted, cudaMemcpyDeviceToHost));
  constexpr double kDepth = kKind == Operands::kDigits || kKind == Operands::kE4m3 ? 32 : 16;
  std::printf("power: %-36s %6.0f TFLOPS at %.2f GHz\n", name,
              2.0 * 64 * kTokens * kDepth * kSteps * kRounds * kWarpgroups * sms / us * 1e-6,
              static_cast<double>(counted[0]) / static_cast<double>(counted[1]));
  BENCH_CHECK(cudaFree(sink));
  BENCH_CHECK(cudaFree(clocks));
}

constexpr int kPieceBytes = 16896, kInFlight = 12, kPieces = 80;
// times: [SMs] clocks, by SM.
__global__ void __launch_bounds__(32, 1) stream_kernel(const uint8_t* from, long long* times) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ __align__(8) uint64_t bars[kInFlight];
  if (threadIdx.x != 0) return;
  const uint32_t to = ptx::smem_address(ring), bar = ptx::smem_address(bars);
  for (int i = 0; i < kInFlight; ++i) ptx::mbarrier_init(bar + i * 8, 1);
  ptx::mbarrier_init_fence();
  const uint8_t* mine = from + int64_t{blockIdx.x} * kPieces * kPieceBytes;
  const long long began = clock64();
  auto request = [&](int piece) {
    const int slot = piece % kInFlight;
    ptx::mbarrier_expect(bar + slot * 8, kPieceBytes);
    ptx::bulk_load(to + slot * kPieceBytes, mine + int64_t{piece} * kPieceBytes, kPieceBytes,
                   bar + slot * 8, ptx::policy_evict_first());
  };
  for (int i = 0; i < kInFlight; ++i) request(i);
  for (int i = 0; i < kPieces; ++i) {
    ptx::mbarrier_wait(bar + i % kInFlight * 8, i / kInFlight & 1);
    if (i + kInFlight < kPieces) request(i + kInFlight);
  }
  uint32_t sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  times[sm] += clock64() - began;
}

}  // namespace

void bench_power(cudaStream_t stream) {
  power_row<Operands::kWeights>("bf16, codes times scales", stream);
  power_row<Operands::kCodes>("bf16, codes", stream);
  power_row<Operands::kSubnormal>("bf16, codes as masked nibbles", stream);
  power_row<Operands::kDigits>("8 bits, two digits of x", stream);
  power_row<Operands::kE4m3>("e4m3, f16 sums", stream);
  power_row<Operands::kZeros>("bf16, codes times scales, x zero", stream);
  power_row<Operands::kWeights>("bf16, codes times scales, again", stream);
}

void bench_sms(cudaStream_t stream) {
  int sms;
  BENCH_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  constexpr int kRuns = 10;  // each over memory of its own, so that none comes from L2
  const size_t bytes = size_t{kPieceBytes} * kPieces * static_cast<size_t>(sms);
  auto* data = device_alloc<uint8_t>(bytes * kRuns);
  auto* times = device_alloc<long long>(static_cast<size_t>(sms));
  BENCH_CHECK(cudaMemsetAsync(data, 1, bytes * kRuns, stream));
  BENCH_CHECK(cudaMemsetAsync(times, 0, static_cast<size_t>(sms) * sizeof(long long), stream));
  BENCH_CHECK(cudaFuncSetAttribute(stream_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kPieceBytes * kInFlight));
  for (int run = 0; run < kRuns; ++run) {
    stream_kernel<<<sms, 32, kPieceBytes * kInFlight, stream>>>(data + run * bytes, times);
    BENCH_CHECK(cudaGetLastError());
  }
  BENCH_CHECK(cudaStreamSynchronize(stream));
  std::vector<long long> clocks(static_cast<size_t>(sms));
  BENCH_CHECK(
      cudaMemcpy(clocks.data(), times, clocks.size() * sizeof(long long), cudaMemcpyDeviceToHost));
  const double mean = std::accumulate(clocks.begin(), clocks.end(), 0.0) / sms;
  std::sort(clocks.begin(), clocks.end());
  std::printf("sms: an equal share of memory takes them, of the mean time: so many");
  for (int i = 0; i < sms; ++i) {
    const auto of = [&](int sm) {
      return static_cast<int>(static_cast<double>(clocks[static_cast<size_t>(sm)]) / mean * 100);
    };
    if (i + 1 == sms || of(i) != of(i + 1)) std::printf("  %d to %.2f", i + 1, of(i) * 0.01);
  }
  std::printf("\n");
  BENCH_CHECK(cudaFree(data));
  BENCH_CHECK(cudaFree(times));
}

}  // namespace nibble::bench
