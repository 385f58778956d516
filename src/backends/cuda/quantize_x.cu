// x [tokens, k] bf16 -> e4m3 with a scale per token, laid out for linear_fp8.cu (x_layout.h); with
// an RMSNorm before it, where one comes before. Reads 2 (of k above 8192 again, from L2 or L1) and
// writes 1.03 bytes a value. A block a token: the norm's sum of squares, then the largest
// magnitude, then eight threads a group of 128 channels, 16 channels each: two 16-byte loads, one
// 16-byte store. SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "backends/cuda/kernels.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/x_layout.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 512;
constexpr float kMaxE4m3 = 448.0f, kLeast = 0x1p-100f;

// Channels first ... first + 15 of x; zeros past the end.
__device__ __forceinline__ void load_piece(float (&v)[16], const __nv_bfloat16* x, int first,
                                           int k) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 bits = first + 8 * h < k ? *reinterpret_cast<const uint4*>(x + first + 8 * h)
                                         : make_uint4(0, 0, 0, 0);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[8 * h + 2 * i] = __uint_as_float(words[i] << 16);
      v[8 * h + 2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

// v times `factor` and a vector over the channels, rounded to bf16 as the kernel is that does only
// this (norm_kernel, scale_columns()): one function whichever kernel runs.
__device__ __forceinline__ void multiply_piece(float (&v)[16], float factor, const float* by,
                                               int first, int k) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (first + 8 * h >= k) continue;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 w = *reinterpret_cast<const float4*>(by + first + 8 * h + i);
      const float four[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& value = v[8 * h + i + j];
        value = __bfloat162float(__float2bfloat16_rn(value * factor * four[j]));
      }
    }
  }
}

template <bool kNorm, bool kPreScale>
__global__ void __launch_bounds__(kThreads) quantize_x_kernel(const QuantizeArgs args) {
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  __shared__ float squares_of_warp[kThreads / 32];
  __shared__ uint32_t most_of_warp[kThreads / 32];
  const cuda_x::Shape shape{args.tokens, args.k};
  const int token = static_cast<int>(blockIdx.x), row = token % cuda_x::kSlabTokens;
  const int pieces = static_cast<int>(shape.groups()) * 8, lane8 = threadIdx.x & 7;
  const auto* x = static_cast<const __nv_bfloat16*>(args.x) + token * args.x_stride;
  const int tid = static_cast<int>(threadIdx.x), begin = token < args.tokens ? tid : pieces;

  // The thread's first piece stays in registers.
  float kept[16] = {};
  if (begin < pieces) load_piece(kept, x, begin * 16, args.k);
  float inverse_rms = 1.0f;
  if constexpr (kNorm) {
    float sum = 0.0f;
    auto add = [&](const float(&v)[16]) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sum = fmaf(v[i], v[i], sum);
    };
    add(kept);
    for (int piece = begin + kThreads; piece < pieces; piece += kThreads) {
      float v[16];
      load_piece(v, x, piece * 16, args.k);
      add(v);
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (tid % 32 == 0) squares_of_warp[tid / 32] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) total += squares_of_warp[i];
    inverse_rms = rsqrtf(total / static_cast<float>(args.k) + args.eps);
  }
  auto finish = [&](float(&v)[16], int piece) {
    if constexpr (kNorm) multiply_piece(v, inverse_rms, args.norm_weight, piece * 16, args.k);
    if constexpr (kPreScale) multiply_piece(v, 1.0f, args.pre_scale, piece * 16, args.k);
  };
  // Magnitudes compare as integers, and so a NaN is more than everything.
  uint32_t most = 0;
  auto compare = [&](const float(&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  };
  if (begin < pieces) finish(kept, begin);
  compare(kept);
  for (int piece = begin + kThreads; piece < pieces; piece += kThreads) {
    float v[16];
    load_piece(v, x, piece * 16, args.k);
    finish(v, piece);
    compare(v);
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (tid % 32 == 0) most_of_warp[tid / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) most = max(most, most_of_warp[i]);
  const float absmax = __uint_as_float(most);
  const bool usable = absmax >= kLeast && most < 0x7f800000u;
  const float inverse = usable ? __fdiv_rn(kMaxE4m3, absmax) : 0.0f;

  auto* out = static_cast<uint8_t*>(args.out);
  const int slab = token / cuda_x::kSlabTokens;
  auto store_sum = [&](int group, float sum) {
    uint8_t* block = out + shape.sums_offset(slab, group);
    const __nv_bfloat16 high = __float2bfloat16_rn(sum * cuda_x::kSumUnit);
    const __nv_bfloat16 low = __float2bfloat16_rn(sum * cuda_x::kSumUnit - __bfloat162float(high));
    *reinterpret_cast<__nv_bfloat16*>(block + cuda_x::sum_byte(0, row, group)) = high;
    *reinterpret_cast<__nv_bfloat16*>(block + cuda_x::sum_byte(1, row, group)) = low;
  };
  for (int piece = tid; piece < pieces; piece += kThreads) {  // whole groups of threads
    float v[16] = {};
    if (usable && piece == tid) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = kept[i];
    } else if (usable) {
      load_piece(v, x, piece * 16, args.k);
      finish(v, piece);
    }
    uint32_t packed[4];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // bytes 4i ...: channels 2i, 8 + 2i, 2i + 1, 9 + 2i
      const uint32_t low = ptx::e4m3x2(v[2 * i] * inverse, v[8 + 2 * i] * inverse);
      const uint32_t high = ptx::e4m3x2(v[2 * i + 1] * inverse, v[9 + 2 * i] * inverse);
      packed[i] = low | high << 16;
#pragma unroll
      for (const uint32_t pair : {low, high}) {
        const uint32_t halves = ptx::e4m3x2_to_half2(pair);
        const float2 exact = __half22float2(reinterpret_cast<const __half2&>(halves));
        sum += exact.x + exact.y;
      }
    }
#pragma unroll
    for (int offset = 4; offset; offset /= 2) {
      sum += __shfl_xor_sync(0xffu << (threadIdx.x & 24), sum, offset);
    }
    *reinterpret_cast<uint4*>(out + shape.slab_offset(slab, piece / 8) +
                              cuda_x::chunk_byte(row, lane8)) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
    if (lane8 == 0) store_sum(piece / 8, sum);
  }
  const int groups = static_cast<int>(shape.groups());
  const int past = groups + tid;
  if (past < shape.sum_blocks() * cuda_x::kSumGroups) store_sum(past, 0.0f);
  if (tid == 0) {
    float scale = usable ? __fdiv_rn(absmax, kMaxE4m3) : 0.0f;
    if (most >= 0x7f800000u) scale = __uint_as_float(0x7fffffffu);
    reinterpret_cast<float*>(out + shape.scales_offset())[token] = scale;
  }
}

}  // namespace

size_t quantized_x_bytes(int tokens, int64_t k) {
  return static_cast<size_t>(cuda_x::Shape{tokens, k}.bytes());
}

int quantize_x(const QuantizeArgs& args, void* stream) {
  if (args.tokens < 1 || args.k % 8 || args.x_stride % 8) return cudaErrorInvalidValue;
  const cuda_x::Shape shape{args.tokens, args.k};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.slabs() * cuda_x::kSlabTokens));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (args.dependent) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  auto* kernel = args.norm_weight == nullptr ? args.pre_scale == nullptr
                                                   ? quantize_x_kernel<false, false>
                                                   : quantize_x_kernel<false, true>
                 : args.pre_scale == nullptr ? quantize_x_kernel<true, false>
                                             : quantize_x_kernel<true, true>;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace nibble::cuda
