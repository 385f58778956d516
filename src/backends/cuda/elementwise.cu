// Embedding and RMSNorm (times the next linear's pre-scale): bound by launch latency at decode and
// by bandwidth at prefill. Activations bf16, arithmetic f32. SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "backends/cuda/kernels.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;

using ptx::high_bf16;
using ptx::low_bf16;

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
      sum = fmaf(low_bf16(words[j]), low_bf16(words[j]), sum);
      sum = fmaf(high_bf16(words[j]), high_bf16(words[j]), sum);
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
      out[h * 2] = ptx::pack_bf16(low_bf16(words[h * 2]) * inverse * w.x,
                                  high_bf16(words[h * 2]) * inverse * w.y);
      out[h * 2 + 1] = ptx::pack_bf16(low_bf16(words[h * 2 + 1]) * inverse * w.z,
                                      high_bf16(words[h * 2 + 1]) * inverse * w.w);
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

}  // namespace nibble::cuda
