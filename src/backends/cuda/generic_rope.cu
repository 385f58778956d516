// RoPE, quantization and the append to the paged cache, for any number of heads and both page
// formats: q and k are rotated in place (half-split), k and v go to their page.
//
// Work split: one warp per (token, head of q, k or v); lane l has d 2l, 2l + 1 and their partners
// 64 on. Bytes: qkv once in, q and k once out, and 130 (int8) or 256 (f16) bytes per token and K or
// V head. k is quantized from the unrounded rotation. Scales are f16: 2^-11 coarser than the
// specification's, and values are rounded against the scale as stored. V is stored transposed. In
// int8, where eight tokens of a prompt begin at a multiple of eight, the first one's warp stores
// all eight, eight bytes at a time instead of one.
//
// Block 0 also leaves the pages' prefix sums that attention_decode.cu wants.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/generic.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/kv_quant.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/rope.cuh"

namespace nibble::cuda {
namespace {

using namespace kv_layout;

constexpr int kThreads = 256;
constexpr int kRun = 8;  // tokens whose V one warp stores

using ptx::high_bf16;
using ptx::low_bf16;

__device__ void write_page_starts(const GenericRopeArgs& p, int lane) {
  int total = 0;
  for (int first = 0; first < p.sequences; first += 32) {
    const int s = first + lane;
    int sum = s < p.sequences ? (p.kv_lens[s] + kPageTokens - 1) / kPageTokens : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += before;
    }
    if (s < p.sequences) p.page_starts[s + 1] = total + sum;
    total += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) p.page_starts[0] = 0;
}

__device__ __forceinline__ void load_head(const uint32_t* at, float (&x)[4]) {
  const uint32_t first = at[0], second = at[32];
  x[0] = low_bf16(first), x[1] = high_bf16(first), x[2] = low_bf16(second),
  x[3] = high_bf16(second);
}

// x: d 2l, 2l + 1, 2l + 64, 2l + 65 of one token's K or V head.
__device__ void store_int8(uint8_t* pair, int row, bool is_v, int lane, float fixed_scale,
                           const float (&x)[4]) {
  uint32_t u[4];
  const __half scale = quantize_head(x, fixed_scale, u);
  if (is_v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pair[v_byte(row, 2 * lane + (i & 1) + 64 * (i >> 1))] = static_cast<uint8_t>(u[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint16_t*>(pair + k_byte(row, 2 * lane + 64 * i)) =
          static_cast<uint16_t>(u[2 * i] | u[2 * i + 1] << 8);
    }
  }
  if (lane == 0) {
    *reinterpret_cast<__half*>(pair + (is_v ? v_scale_byte(row) : k_scale_byte(row))) = scale;
  }
}

// The same for V of kRun tokens from `row`, a multiple of kRun, on; `stride` words from token to
// token.
__device__ void store_int8_v_run(uint8_t* pair, int row, int lane, float fixed_scale,
                                 const uint32_t* at, int64_t stride) {
  uint32_t words[4][kRun / 4] = {};
  __half own_scale{};
#pragma unroll
  for (int t = 0; t < kRun; ++t) {
    float x[4];
    uint32_t u[4];
    load_head(at + t * stride, x);
    const __half scale = quantize_head(x, fixed_scale, u);
    if (lane == t) own_scale = scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i][t / 4] |= u[i] << t % 4 * 8;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint2*>(pair + v_byte(row, 2 * lane + (i & 1) + 64 * (i >> 1))) =
        make_uint2(words[i][0], words[i][1]);
  }
  if (lane < kRun) *reinterpret_cast<__half*>(pair + v_scale_byte(row + lane)) = own_scale;
}

__device__ void store_f16(__half* pair, int row, bool is_v, int lane, const float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int d = 2 * lane + (i & 1) + 64 * (i >> 1);
    const int at = is_v ? kPageTokens * kHeadDim + d * kPageTokens + row : row * kHeadDim + d;
    pair[at] = __float2half_rn(x[i]);
  }
}

__global__ void __launch_bounds__(kThreads) rope_store_kernel(const GenericRopeArgs p) {
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  const int lane = threadIdx.x % 32;
  if (blockIdx.x == 0 && threadIdx.x < 32) write_page_starts(p, lane);
  const int heads = p.heads + 2 * p.kv_heads;
  const int64_t item = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32;
  if (item >= int64_t{p.tokens} * heads) return;
  const int token = static_cast<int>(item / heads), head = static_cast<int>(item % heads);
  const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
  uint32_t* at = static_cast<uint32_t*>(p.qkv) + item * (kHeadDim / 2) + lane;
  float x[4];
  load_head(at, x);
  const int position = p.positions[token];
  if (!is_v) {
    const float2 c = reinterpret_cast<const float2*>(p.cos)[int64_t{position} * 32 + lane];
    const float2 s = reinterpret_cast<const float2*>(p.sin)[int64_t{position} * 32 + lane];
    const float a0 = x[0], a1 = x[1];
    x[0] = ptx::rope_first(a0, x[2], c.x, s.x);
    x[1] = ptx::rope_first(a1, x[3], c.y, s.y);
    x[2] = ptx::rope_second(a0, x[2], c.x, s.x);
    x[3] = ptx::rope_second(a1, x[3], c.y, s.y);
    at[0] = ptx::pack_bf16(x[0], x[1]);
    at[32] = ptx::pack_bf16(x[2], x[3]);
    if (is_q) return;
  }
  // The token's sequence: the last one that starts at or before it.
  int begin = 0, end = p.sequences - 1;
  while (begin < end) {
    const int middle = (begin + end + 1) / 2;
    if (p.seq_starts[middle] <= token)
      begin = middle;
    else
      end = middle - 1;
  }
  const int page =
      p.page_table[static_cast<int64_t>(begin) * p.page_table_stride + position / kPageTokens];
  const int kv_head = (head - p.heads) % p.kv_heads, row = position % kPageTokens;
  auto* pages = static_cast<uint8_t*>(p.pages);
  if (p.format == PageFormat::kInt8) {
    // Positions of a sequence are consecutive, so these eight tokens lie in one page.
    const int leader = token - row % kRun;
    if (is_v && leader >= p.seq_starts[begin] && leader + kRun <= p.seq_starts[begin + 1]) {
      if (token == leader) {
        store_int8_v_run(pages + pair_offset(page, p.kv_heads, kv_head), row, lane, p.v_scale, at,
                         int64_t{heads} * (kHeadDim / 2));
      }
      return;
    }
    store_int8(pages + pair_offset(page, p.kv_heads, kv_head), row, is_v, lane,
               is_v ? p.v_scale : p.k_scale, x);
  } else {
    const int64_t pair = int64_t{page} * p.kv_heads + kv_head;
    store_f16(reinterpret_cast<__half*>(pages) + pair * (2 * kPageTokens * kHeadDim), row, is_v,
              lane, x);
  }
}

}  // namespace

size_t page_bytes(PageFormat format, int kv_heads) {
  return static_cast<size_t>(kv_heads) *
         (format == PageFormat::kInt8 ? kPairBytes : 2 * kPageTokens * kHeadDim * 2);
}

int generic_rope_store(const GenericRopeArgs& args, void* stream) {
  const int64_t threads = int64_t{args.tokens} * (args.heads + 2 * args.kv_heads) * 32;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = args.dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, rope_store_kernel, args);
}

}  // namespace nibble::cuda
