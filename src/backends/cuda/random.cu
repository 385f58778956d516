// Random data to measure kernels with: zeros would draw less power and run faster than they do.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"

namespace nibble::cuda {
namespace {

constexpr int kBlocks = 1024, kThreads = 256;

// splitmix64
__device__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

__global__ void int4_kernel(uint32_t* out, int64_t words, uint64_t seed) {
  constexpr int kBlockWords = cuda_layout::kBlockBytes / 4;
  constexpr int kNibbleWords = cuda_layout::kBlockNibbleBytes / 4;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < words;
       i += int64_t{kBlocks} * kThreads) {
    const auto random = static_cast<uint32_t>(mix(seed + static_cast<uint64_t>(i)));
    // Scales: sign 0, exponent of 1/64, random mantissas.
    out[i] = i % kBlockWords < kNibbleWords ? random : (random & 0x007f007fu) | 0x3c803c80u;
  }
}

__global__ void bf16_kernel(__nv_bfloat16* out, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count;
       i += int64_t{kBlocks} * kThreads) {
    const auto random = static_cast<int32_t>(mix(seed + static_cast<uint64_t>(i)));
    out[i] = __float2bfloat16(static_cast<float>(random) * 0x1p-31f);
  }
}

}  // namespace

int fill_random_int4(void* blocks, int64_t num_blocks, uint64_t seed, void* stream) {
  int4_kernel<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<uint32_t*>(blocks), num_blocks * (cuda_layout::kBlockBytes / 4), seed);
  return cudaGetLastError();
}

int fill_random_bf16(void* values, int64_t count, uint64_t seed, void* stream) {
  bf16_kernel<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<__nv_bfloat16*>(values), count, seed);
  return cudaGetLastError();
}

}  // namespace nibble::cuda
