// The small ops between the linears: embedding, RMSNorm (times the next linear's pre-scale), RoPE
// with quantization into the KV pages.
//
// Each is bound by launch latency at decode and by bandwidth at prefill; all take part in
// programmatic dependent launch. Activations bf16, arithmetic f32.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "backends/cuda/kernels.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, bool dependent, void* stream,
           const Parameters&... parameters) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

// One block per token; hidden is a multiple of 8.
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int* ids, const int* previous, const uint4* table, uint4* x, int chunks) {
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  int id = ids[blockIdx.x];
  if (id < 0) id = previous[-1 - id];  // drawn by the step before, not known to the host yet
  const uint4* from = table + static_cast<int64_t>(id) * chunks;
  uint4* to = x + static_cast<int64_t>(blockIdx.x) * chunks;
  for (int i = threadIdx.x; i < chunks; i += kThreads) to[i] = from[i];
}

struct NormParams {
  const uint4* x;
  const float4 *weight, *pre_scale;
  const int* rows;  // row of x for each output row, or null
  uint4* y;
  float eps;
  int chunks;  // hidden / 8
  int copies;  // of a row, next to each other
};

// One block per row. A thread keeps its first kKept chunks in registers; the rest is read again.
constexpr int kKept = 3;
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormParams p) {
  __shared__ float partial[kThreads / 32];
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  const int row = p.rows ? p.rows[blockIdx.x] : static_cast<int>(blockIdx.x);
  const uint4* x = p.x + static_cast<int64_t>(row) * p.chunks;
  uint4* y = p.y + static_cast<int64_t>(blockIdx.x) * p.chunks * p.copies;
  const int tid = threadIdx.x;
  uint4 kept[kKept];
  float sum = 0.0f;
  auto add = [&](const uint4& v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum = fmaf(low(words[j]), low(words[j]), sum);
      sum = fmaf(high(words[j]), high(words[j]), sum);
    }
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = tid + i * kThreads;
    kept[i] = at < p.chunks ? x[at] : make_uint4(0, 0, 0, 0);
    add(kept[i]);
  }
  for (int at = tid + kKept * kThreads; at < p.chunks; at += kThreads) add(x[at]);
#pragma unroll
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (tid % 32 == 0) partial[tid / 32] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
  const float inverse = rsqrtf(total / static_cast<float>(p.chunks * 8) + p.eps);
  auto write = [&](int at, const uint4& v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    uint32_t out[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float4 w = p.weight[at * 2 + h];
      if (p.pre_scale) {
        const float4 s = p.pre_scale[at * 2 + h];
        w = make_float4(w.x * s.x, w.y * s.y, w.z * s.z, w.w * s.w);
      }
      out[h * 2] =
          ptx::pack_bf16(low(words[h * 2]) * inverse * w.x, high(words[h * 2]) * inverse * w.y);
      out[h * 2 + 1] = ptx::pack_bf16(low(words[h * 2 + 1]) * inverse * w.z,
                                      high(words[h * 2 + 1]) * inverse * w.w);
    }
    for (int copy = 0; copy < p.copies; ++copy) {
      y[at + copy * p.chunks] = make_uint4(out[0], out[1], out[2], out[3]);
    }
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = tid + i * kThreads;
    if (at < p.chunks) write(at, kept[i]);
  }
  for (int at = tid + kKept * kThreads; at < p.chunks; at += kThreads) write(at, x[at]);
}

// One warp per (token, head of q, k or v): rotates q and k in place, quantizes k and v (from the
// unrounded rotation) into their page. Lane l has d 2l, 2l + 1 and their partners 64 on.
__global__ void __launch_bounds__(kThreads) rope_store_kernel(const RopeStoreArgs p) {
  using namespace kv_layout;
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  const int lane = threadIdx.x % 32;
  const int heads = 6 * p.kv_heads;  // 4 of q, one of k, one of v for each
  const int64_t item = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32;
  if (item >= int64_t{p.tokens} * heads) return;
  const int token = static_cast<int>(item / heads), head = static_cast<int>(item % heads);
  const bool is_v = head >= 5 * p.kv_heads, is_q = head < 4 * p.kv_heads;
  auto* at = static_cast<uint32_t*>(p.qkv) + (token * p.qkv_stride + head * kHeadDim) / 2 + lane;
  const uint32_t first = at[0], second = at[32];
  float x[4] = {low(first), high(first), low(second), high(second)};
  const int position = p.positions[token];
  if (!is_v) {
    const float2 c = reinterpret_cast<const float2*>(p.cos)[position * 32 + lane];
    const float2 s = reinterpret_cast<const float2*>(p.sin)[position * 32 + lane];
    const float a0 = x[0], a1 = x[1];
    x[0] = a0 * c.x - x[2] * s.x;
    x[1] = a1 * c.y - x[3] * s.y;
    x[2] = x[2] * c.x + a0 * s.x;
    x[3] = x[3] * c.y + a1 * s.y;
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
  float peak = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
  }
  __half scale = __float2half_rn(peak / 127.0f);
  if (!(__half2float(scale) > 0.0f)) scale = __float2half_rn(1.0f);  // all zero, or nearly
  const float inverse = 1.0f / __half2float(scale);
  uint32_t u[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u[i] = static_cast<uint32_t>(
        static_cast<int>(fminf(fmaxf(rintf(x[i] * inverse), -127.0f), 127.0f)) + 128);
  }
  const int page =
      p.page_table[static_cast<int64_t>(begin) * p.page_table_stride + position / kPageTokens];
  const int row = position % kPageTokens, kv_head = head % p.kv_heads;
  uint8_t* pair = static_cast<uint8_t*>(p.pages) + pair_offset(page, p.kv_heads, kv_head);
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

}  // namespace

int embed(const int* ids, const int* previous, const void* table, void* x, int tokens, int hidden,
          bool dependent, void* stream) {
  if (hidden % 8) return cudaErrorInvalidValue;
  return launch(embed_kernel, dim3(static_cast<unsigned>(tokens)), dependent, stream, ids, previous,
                static_cast<const uint4*>(table), static_cast<uint4*>(x), hidden / 8);
}

int rms_norm(const RmsNormArgs& args, void* stream) {
  if (args.hidden % 8) return cudaErrorInvalidValue;
  const NormParams params{.x = static_cast<const uint4*>(args.x),
                          .weight = reinterpret_cast<const float4*>(args.weight),
                          .pre_scale = reinterpret_cast<const float4*>(args.pre_scale),
                          .rows = args.row_index,
                          .y = static_cast<uint4*>(args.y),
                          .eps = args.eps,
                          .chunks = args.hidden / 8,
                          .copies = args.copies};
  return launch(norm_kernel, dim3(static_cast<unsigned>(args.rows)), args.dependent, stream,
                params);
}

int rope_store_kv(const RopeStoreArgs& args, void* stream) {
  if (args.qkv_stride % 2) return cudaErrorInvalidValue;
  const int64_t items = int64_t{args.tokens} * 6 * args.kv_heads;
  return launch(rope_store_kernel,
                dim3(static_cast<unsigned>((items * 32 + kThreads - 1) / kThreads)), args.dependent,
                stream, args);
}

}  // namespace nibble::cuda
