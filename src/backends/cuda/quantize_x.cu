// x [tokens, k] bf16 -> e4m3 with a scale per token, laid out for linear_fp8.cu (x_layout.h). Reads
// 2 (4, the second time from L2 or L1) and writes 1.13 bytes a value. A block a token: first the
// largest magnitude, then eight threads a group of 128 channels, 16 channels each: two 16-byte
// loads, one 16-byte store. SPDX-License-Identifier: Apache-2.0
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

__device__ __forceinline__ float e4m3_value(uint32_t byte) {
  const uint32_t halves = ptx::e4m3x2_to_half2(byte);
  return __low2float(reinterpret_cast<const __half2&>(halves));
}

// Channels first ... first + 15 of x, times the pre-scale; zeros past the end.
template <bool kPreScale>
__device__ __forceinline__ void load_piece(float (&v)[16], const QuantizeArgs& args,
                                           const __nv_bfloat16* x, int first) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool real = first + 8 * h < args.k;
    const uint4 bits = real ? *reinterpret_cast<const uint4*>(x + first + 8 * h) : uint4{};
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[8 * h + 2 * i] = __uint_as_float(words[i] << 16);
      v[8 * h + 2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    if constexpr (kPreScale) {
      // Rounded to bf16 as scale_columns() does: one function whichever kernel runs.
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scale = real ? args.pre_scale[first + 8 * h + i] : 0.0f;
        v[8 * h + i] = __bfloat162float(__float2bfloat16_rn(v[8 * h + i] * scale));
      }
    }
  }
}

template <bool kPreScale>
__global__ void __launch_bounds__(kThreads) quantize_x_kernel(const QuantizeArgs args) {
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  __shared__ uint32_t most_of_warp[kThreads / 32];
  const cuda_x::Shape shape{args.tokens, args.k};
  const int token = static_cast<int>(blockIdx.x), row = token % cuda_x::kSlabTokens;
  const int pieces = static_cast<int>(shape.groups()) * 8, lane8 = threadIdx.x & 7;
  const auto* x = static_cast<const __nv_bfloat16*>(args.x) + token * args.x_stride;
  const bool real = token < args.tokens;
  // Magnitudes compare as integers, and so a NaN is more than everything.
  uint32_t most = 0;
  for (int piece = real ? static_cast<int>(threadIdx.x) : pieces; piece < pieces;
       piece += kThreads) {
    float v[16];
    load_piece<kPreScale>(v, args, x, piece * 16);
#pragma unroll
    for (int i = 0; i < 16; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (threadIdx.x % 32 == 0) most_of_warp[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) most = max(most, most_of_warp[i]);
  const float absmax = __uint_as_float(most);
  const bool usable = absmax >= kLeast && most < 0x7f800000u;
  const float inverse = usable ? __fdiv_rn(kMaxE4m3, absmax) : 0.0f;

  auto* out = static_cast<uint8_t*>(args.out);
  for (int piece = threadIdx.x; piece < pieces; piece += kThreads) {  // whole groups of threads
    float v[16] = {};
    if (usable) load_piece<kPreScale>(v, args, x, piece * 16);
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
    uint8_t* slab = out + shape.slab_offset(token / cuda_x::kSlabTokens, piece / 8);
    *reinterpret_cast<uint4*>(slab + cuda_x::chunk_byte(row, lane8)) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
    if (lane8 == 0) {
      uint32_t digits[2] = {};
      float rest = -sum;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float unit = i < 4 ? cuda_x::kDigitBase : 1.0f;
        const uint32_t byte = ptx::e4m3x2(rest / unit, 0.0f);
        digits[i / 4] |= byte << (8 * (i % 4));
        rest -= e4m3_value(byte) * unit;
      }
      *reinterpret_cast<uint4*>(slab + cuda_x::digits_byte(row)) =
          make_uint4(digits[0], digits[1], 0, 0);
    }
  }
  if (threadIdx.x == 0) {
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
  return cudaLaunchKernelEx(
      &config, args.pre_scale != nullptr ? quantize_x_kernel<true> : quantize_x_kernel<false>,
      args);
}

}  // namespace nibble::cuda
