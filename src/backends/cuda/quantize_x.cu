// x [tokens, k] bf16 -> e4m3 as linear_fp8.cu reads it (x_layout.h), with an RMSNorm before it
// where one comes before. Reads 2 and writes 1.03 bytes a value.
//
// Up to 64 tokens eight threads have the 128 channels that share a scale, 16 each, and need no
// others: 1/rms is left to the linear (LinearArgs::squares). Above, a block a token: the norm's sum
// of squares, then the largest magnitude, then the same chunks; k above 8192 is read again, from
// L2 or L1.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "backends/cuda/kernels.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/x_layout.h"
#include "backends/cuda/x_store.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 512, kGroupThreads = 256;

// Channels first ... first + 15 of x; zeros past the end.
__device__ __forceinline__ void load_piece(float (&v)[16], const __nv_bfloat16* x, int first,
                                           int k) {
  uint4 halves[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    halves[h] = first + 8 * h < k ? *reinterpret_cast<const uint4*>(x + first + 8 * h)
                                  : make_uint4(0, 0, 0, 0);
  }
  unpack_bf16(v, halves[0], halves[1]);
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
  uint32_t most = 0;
  if (begin < pieces) finish(kept, begin);
  most = max(most, absmax_bits(kept));
  for (int piece = begin + kThreads; piece < pieces; piece += kThreads) {
    float v[16];
    load_piece(v, x, piece * 16, args.k);
    finish(v, piece);
    most = max(most, absmax_bits(v));
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (tid % 32 == 0) most_of_warp[tid / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) most = max(most, most_of_warp[i]);
  const E4m3Scale by(most);

  auto* out = static_cast<uint8_t*>(args.out);
  const int slab = token / cuda_x::kSlabTokens;
  for (int piece = tid; piece < pieces; piece += kThreads) {  // whole groups of threads
    float v[16] = {};
    if (by.usable && piece == tid) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = kept[i];
    } else if (by.usable) {
      load_piece(v, x, piece * 16, args.k);
      finish(v, piece);
    }
    float sum = 0.0f;
    const uint4 packed = round_chunk(v, by.inverse, sum);
#pragma unroll
    for (int offset = 4; offset; offset /= 2) {
      sum += __shfl_xor_sync(0xffu << (threadIdx.x & 24), sum, offset);
    }
    *reinterpret_cast<uint4*>(out + shape.slab_offset(slab, piece / 8) +
                              cuda_x::chunk_byte(row, lane8)) = packed;
    if (lane8 == 0) store_sum(out, shape, token, piece / 8, sum);
  }
  const int groups = static_cast<int>(shape.groups());
  const int past = groups + tid;
  if (past < shape.sum_blocks() * cuda_x::kSumGroups) store_sum(out, shape, token, past, 0.0f);
  if (tid == 0) reinterpret_cast<float*>(out + shape.scales_offset())[token] = by.scale;
}

// Up to 64 tokens. by[channel]: the norm's weight and the AWQ pre-scale, either or both.
__global__ void __launch_bounds__(kGroupThreads) quantize_groups_kernel(const QuantizeArgs args) {
  ptx::grid_launch_dependents();
  const cuda_x::Shape shape{args.tokens, args.k};
  const int groups = static_cast<int>(shape.groups());
  const int pair = static_cast<int>(blockIdx.x * kGroupThreads + threadIdx.x) / 8;
  const int token = pair / groups, group = pair - token * groups, chunk = threadIdx.x & 7;
  const int first = group * 128 + chunk * 16;
  const bool mine = token < args.tokens;
  float by[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) by[i] = 1.0f;
  for (const float* vector : {args.norm_weight, args.pre_scale}) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      if (vector == nullptr || first + i >= args.k) continue;
      const float4 four = *reinterpret_cast<const float4*>(vector + first + i);
      by[i] *= four.x, by[i + 1] *= four.y, by[i + 2] *= four.z, by[i + 3] *= four.w;
    }
  }
  ptx::grid_dependency_wait();
  float v[16] = {};
  if (mine) {
    const auto* x = static_cast<const __nv_bfloat16*>(args.x) + token * args.x_stride;
    load_piece(v, x, first, args.k);
  }
  if (args.norm_weight != nullptr) {
    static_assert(kNormTileRows == 4 * 16);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) squares = fmaf(v[i], v[i], squares);
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    const int tile = first / kNormTileRows;
    if (mine && chunk % 4 == 0 && tile < norm_tiles(args.k)) {
      args.squares[tile * norm_stride(args.tokens) + token] = squares;
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] *= by[i];
  store_group(static_cast<uint8_t*>(args.out), shape, token, group, chunk, v, mine);
}

}  // namespace

size_t quantized_x_bytes(int tokens, int64_t k) {
  return static_cast<size_t>(cuda_x::Shape{tokens, k}.bytes());
}

int quantize_x(const QuantizeArgs& args, void* stream) {
  if (args.tokens < 1 || args.k % 8 || args.x_stride % 8) return cudaErrorInvalidValue;
  const cuda_x::Shape shape{args.tokens, args.k};
  const bool grouped = shape.grouped();
  if (grouped && args.norm_weight != nullptr && args.squares == nullptr) {
    return cudaErrorInvalidValue;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(
      grouped ? (shape.tokens * shape.groups() * 8 + kGroupThreads - 1) / kGroupThreads
              : shape.slabs() * cuda_x::kSlabTokens));
  config.blockDim = dim3(grouped ? kGroupThreads : kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (args.dependent) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  if (grouped) return cudaLaunchKernelEx(&config, quantize_groups_kernel, args);
  auto* kernel = args.norm_weight == nullptr ? args.pre_scale == nullptr
                                                   ? quantize_x_kernel<false, false>
                                                   : quantize_x_kernel<false, true>
                 : args.pre_scale == nullptr ? quantize_x_kernel<true, false>
                                             : quantize_x_kernel<true, true>;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace nibble::cuda
