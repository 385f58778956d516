// x [tokens, k] bf16 -> e4m3 as linear_fp8.cu reads it (x_layout.h), or digits as linear_digits.cu
// does (digits_layout.h), with an RMSNorm before it where one comes before. Reads 2 and writes 1.03
// bytes a value, 2.06 of digits.
//
// Where 128 channels share a scale eight threads have them, 16 each, and need no others: 1/rms is
// left to the linear (LinearArgs::squares). With one scale a token, a block a token: the norm's sum
// of squares, then the largest magnitude, then the same chunks. Its channels stay in registers, as
// bf16, up to kMostPieces x kThreads x 16; the others are read again, from L2 or L1.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backends/cuda/digits_layout.h"
#include "backends/cuda/digits_store.cuh"
#include "backends/cuda/kernels.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/x_layout.h"
#include "backends/cuda/x_store.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 512, kGroupThreads = 256, kMostPieces = 4;

// 16 channels of a token.
struct Piece {
  uint4 halves[2];
};

// Channels first ... first + 15 of x; zeros past the end.
__device__ __forceinline__ Piece load_piece(const __nv_bfloat16* x, int first, int k) {
  Piece piece;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    piece.halves[h] = first + 8 * h < k ? *reinterpret_cast<const uint4*>(x + first + 8 * h)
                                        : make_uint4(0, 0, 0, 0);
  }
  return piece;
}

__device__ __forceinline__ void unpack(float (&v)[16], const Piece& piece) {
  unpack_bf16(v, piece.halves[0], piece.halves[1]);
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

// As values that are bf16.
__device__ __forceinline__ Piece pack(const float (&v)[16]) {
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) words[i] = ptx::pack_bf16(v[2 * i], v[2 * i + 1]);
  return {make_uint4(words[0], words[1], words[2], words[3]),
          make_uint4(words[4], words[5], words[6], words[7])};
}

// A thread has the pieces tid, tid + threads, ...; the first kPieces of them are kept.
template <bool kNorm, bool kPreScale, int kPieces>
__global__ void __launch_bounds__(kThreads) quantize_x_kernel(const QuantizeArgs args) {
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  __shared__ float squares_of_warp[kThreads / 32];
  __shared__ uint32_t most_of_warp[kThreads / 32];
  const cuda_x::Shape shape{args.tokens, args.k, true};
  const int token = static_cast<int>(blockIdx.x), row = token % cuda_x::kSlabTokens;
  const int pieces = static_cast<int>(shape.groups()) * 8, lane8 = threadIdx.x & 7;
  const auto* x = static_cast<const __nv_bfloat16*>(args.x) + token * args.x_stride;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool is_token = token < args.tokens;
  // The pieces that are read again.
  const int again = is_token ? tid + kPieces * threads : pieces;

  Piece kept[kPieces] = {};
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = tid + i * threads;
    if (is_token && piece < pieces) kept[i] = load_piece(x, piece * 16, args.k);
  }
  float inverse_rms = 1.0f;
  if constexpr (kNorm) {
    float sum = 0.0f;
    auto add = [&](const Piece& piece) {
      float v[16];
      unpack(v, piece);
#pragma unroll
      for (int i = 0; i < 16; ++i) sum = fmaf(v[i], v[i], sum);
    };
#pragma unroll
    for (int i = 0; i < kPieces; ++i) add(kept[i]);
    for (int piece = again; piece < pieces; piece += threads) {
      add(load_piece(x, piece * 16, args.k));
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (tid % 32 == 0) squares_of_warp[tid / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < threads / 32; ++i) total += squares_of_warp[i];
    inverse_rms = rsqrtf(total / static_cast<float>(args.k) + args.eps);
  }
  auto finish = [&](float(&v)[16], int piece) {
    if constexpr (kNorm) multiply_piece(v, inverse_rms, args.norm_weight, piece * 16, args.k);
    if constexpr (kPreScale) multiply_piece(v, 1.0f, args.pre_scale, piece * 16, args.k);
  };
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = tid + i * threads;
    float v[16];
    unpack(v, kept[i]);
    if (is_token && piece < pieces) finish(v, piece);
    most = max(most, absmax_bits(v));
    if constexpr (kNorm || kPreScale) kept[i] = pack(v);
  }
  for (int piece = again; piece < pieces; piece += threads) {
    float v[16];
    unpack(v, load_piece(x, piece * 16, args.k));
    finish(v, piece);
    most = max(most, absmax_bits(v));
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (tid % 32 == 0) most_of_warp[tid / 32] = most;
  __syncthreads();
  for (int i = 0; i < threads / 32; ++i) most = max(most, most_of_warp[i]);
  const AbsmaxScale by(most, kMaxE4m3);

  auto* out = static_cast<uint8_t*>(args.out);
  const int slab = token / cuda_x::kSlabTokens;
  auto store = [&](float(&v)[16], int piece) {  // by whole groups of eight threads
    if (!by.usable) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = 0.0f;
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
  };
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = tid + i * threads;
    if (piece >= pieces) break;
    float v[16];
    unpack(v, kept[i]);
    store(v, piece);
  }
  for (int piece = tid + kPieces * threads; piece < pieces; piece += threads) {
    float v[16] = {};
    if (is_token) {
      unpack(v, load_piece(x, piece * 16, args.k));
      finish(v, piece);
    }
    store(v, piece);
  }
  const int past = static_cast<int>(shape.groups()) + tid;
  if (past < shape.sum_blocks() * cuda_x::kSumGroups) store_sum(out, shape, token, past, 0.0f);
  if (tid == 0) reinterpret_cast<float*>(out + shape.scales_offset())[token] = by.scale;
}

template <int kPieces>
auto kernel_for(const QuantizeArgs& args) {
  return args.norm_weight == nullptr ? args.pre_scale == nullptr
                                           ? quantize_x_kernel<false, false, kPieces>
                                           : quantize_x_kernel<false, true, kPieces>
         : args.pre_scale == nullptr ? quantize_x_kernel<true, false, kPieces>
                                     : quantize_x_kernel<true, true, kPieces>;
}

// A scale per 128 channels. by[channel]: the norm's weight and the AWQ pre-scale, either or both.
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
    unpack(v, load_piece(x, first, args.k));
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

// The digits of linear_digits.cu: 16 threads have a group, 8 channels each.
__global__ void __launch_bounds__(kGroupThreads) split_digits_kernel(const QuantizeArgs args) {
  ptx::grid_launch_dependents();
  const cuda_digits::Shape shape{args.tokens, args.k};
  const int groups = static_cast<int>(shape.groups());
  const int pair = static_cast<int>(blockIdx.x * kGroupThreads + threadIdx.x) / 16;
  const int token = pair / groups, group = pair - token * groups, part = threadIdx.x & 15;
  const int first = group * 128 + part * 8;
  const bool exists = first < args.k, mine = token < args.tokens;
  float by[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  for (const float* vector : {args.norm_weight, args.pre_scale}) {
    if (vector == nullptr || !exists) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) by[i] *= vector[first + i];
  }
  ptx::grid_dependency_wait();
  uint4 packed = make_uint4(0, 0, 0, 0);
  if (mine && exists) {
    packed = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(args.x) +
                                             token * args.x_stride + first);
  }
  float v[8];
  unpack_eight(v, packed);
  if (args.norm_weight != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(v[i], v[i], squares);
#pragma unroll
    for (int offset = 4; offset; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    const int tile = first / kNormTileRows;
    if (mine && part % 8 == 0 && tile < norm_tiles(args.k)) {
      args.squares[tile * norm_stride(args.tokens) + token] = squares;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= by[i];
  unpack_eight(v, pack_eight(v));  // as the bf16 kernels round it
  store_digits(static_cast<uint8_t*>(args.out), shape, token, group, part, v, mine);
}

cudaLaunchConfig_t launch_config(unsigned blocks, unsigned threads, const QuantizeArgs& args,
                                 cudaLaunchAttribute& attribute, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  if (args.dependent) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return config;
}

}  // namespace

size_t digits_bytes(int tokens, int64_t k) {
  return static_cast<size_t>(cuda_digits::Shape{tokens, k}.bytes());
}

int split_digits(const QuantizeArgs& args, void* stream) {
  if (args.tokens < 1 || args.tokens > cuda_digits::kMaxTokens || args.k % 8 || args.x_stride % 8 ||
      (args.norm_weight != nullptr && args.squares == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const int64_t threads =
      int64_t{args.tokens} * cuda_digits::Shape{args.tokens, args.k}.groups() * 16;
  cudaLaunchAttribute attribute{};
  const auto config =
      launch_config(static_cast<unsigned>((threads + kGroupThreads - 1) / kGroupThreads),
                    kGroupThreads, args, attribute, stream);
  return cudaLaunchKernelEx(&config, split_digits_kernel, args);
}

size_t quantized_x_bytes(int tokens, int64_t k) {
  // Up to 64 tokens a scale per group takes more.
  return static_cast<size_t>(cuda_x::Shape{tokens, k}.bytes());
}

int quantize_x(const QuantizeArgs& args, void* stream) {
  if (args.tokens < 1 || args.k % 8 || args.x_stride % 8) return cudaErrorInvalidValue;
  const cuda_x::Shape shape{args.tokens, args.k, args.one_scale || args.tokens > kFp8GroupedTokens};
  const bool grouped = shape.grouped();
  if (grouped && args.norm_weight != nullptr && args.squares == nullptr) {
    return cudaErrorInvalidValue;
  }
  // Of one piece a thread as long as that is a block, and then of four.
  const int64_t pieces = shape.groups() * 8;
  const int kept = pieces <= kThreads ? 1 : kMostPieces;
  const int64_t threads =
      std::clamp<int64_t>(((pieces + kept - 1) / kept + 31) / 32 * 32, 64, kThreads);
  const int64_t blocks = grouped ? (shape.tokens * pieces + kGroupThreads - 1) / kGroupThreads
                                 : shape.slabs() * cuda_x::kSlabTokens;
  cudaLaunchAttribute attribute{};
  const auto config = launch_config(static_cast<unsigned>(blocks),
                                    grouped ? kGroupThreads : static_cast<unsigned>(threads), args,
                                    attribute, stream);
  if (grouped) return cudaLaunchKernelEx(&config, quantize_groups_kernel, args);
  auto* kernel = kept == 1 ? kernel_for<1>(args) : kernel_for<kMostPieces>(args);
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace nibble::cuda
