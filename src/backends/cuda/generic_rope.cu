// RoPE, quantization and the append to the paged cache, for any number of heads and both page
// formats: q and k are rotated in place (half-split), k and v go to their page.
//
// Work split. Few tokens: one warp per (token, head of q, k or v); lane l has d 2l, 2l + 1 and
// their partners 64 on. Prompts: a block has eight tokens of a sequence that begin at a multiple of
// eight, a warp each, and heads: all of k and v, or sixteen of q. Bytes: qkv once in, q and k once
// out, and 130 (int8) or 256 (f16) bytes per token and K or V head. k is quantized from the
// unrounded rotation. Scales are f16: 2^-11 coarser than the specification's, and values are
// rounded against the scale as stored. V is stored transposed: in a prompt's int8 pages eight
// tokens at a time.
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
constexpr int kRun = kThreads / 32;  // tokens of a prompt's block
constexpr int kQHeads = 16;          // of a prompt's block, and
constexpr int kVHeads = 8;           // V heads that meet in shared memory

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

__device__ __forceinline__ void rotate(float (&x)[4], const float2& c, const float2& s) {
  const float a0 = x[0], a1 = x[1];
  x[0] = ptx::rope_first(a0, x[2], c.x, s.x);
  x[1] = ptx::rope_first(a1, x[3], c.y, s.y);
  x[2] = ptx::rope_second(a0, x[2], c.x, s.x);
  x[3] = ptx::rope_second(a1, x[3], c.y, s.y);
}

__device__ __forceinline__ void store_head(uint32_t* at, const float (&x)[4]) {
  at[0] = ptx::pack_bf16(x[0], x[1]);
  at[32] = ptx::pack_bf16(x[2], x[3]);
}

// Of lane l: d 2l, 2l + 1, 2l + 64, 2l + 65.
__device__ __forceinline__ int channel(int lane, int i) {
  return 2 * lane + (i & 1) + 64 * (i >> 1);
}

// x of one token's K or V head.
__device__ void store_int8(uint8_t* pair, int row, bool is_v, int lane, float fixed_scale,
                           const float (&x)[4]) {
  uint32_t u[4];
  const __half scale = quantize_head(x, fixed_scale, u);
  if (is_v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[v_byte(row, channel(lane, i))] = static_cast<uint8_t>(u[i]);
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

__device__ void store_f16(__half* pair, int row, bool is_v, int lane, const float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int d = channel(lane, i);
    const int at = is_v ? kPageTokens * kHeadDim + d * kPageTokens + row : row * kHeadDim + d;
    pair[at] = __float2half_rn(x[i]);
  }
}

// x of one token's K or V head, whatever the format.
__device__ __forceinline__ void store_kv(const GenericRopeArgs& p, int page, int kv_head, int row,
                                         bool is_v, int lane, const float (&x)[4]) {
  auto* pages = static_cast<uint8_t*>(p.pages);
  if (p.format == PageFormat::kInt8) {
    store_int8(pages + pair_offset(page, p.kv_heads, kv_head), row, is_v, lane,
               is_v ? p.v_scale : p.k_scale, x);
  } else {
    const int64_t pair = int64_t{page} * p.kv_heads + kv_head;
    store_f16(reinterpret_cast<__half*>(pages) + pair * (2 * kPageTokens * kHeadDim), row, is_v,
              lane, x);
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
  const bool is_v = head >= p.heads + p.kv_heads;
  uint32_t* at = static_cast<uint32_t*>(p.qkv) + item * (kHeadDim / 2) + lane;
  float x[4];
  load_head(at, x);
  const int position = p.positions[token];
  if (!is_v) {
    rotate(x, reinterpret_cast<const float2*>(p.cos)[int64_t{position} * 32 + lane],
           reinterpret_cast<const float2*>(p.sin)[int64_t{position} * 32 + lane]);
    store_head(at, x);
  }
  if (head < p.heads) return;
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
  store_kv(p, page, (head - p.heads) % p.kv_heads, position % kPageTokens, is_v, lane, x);
}

// Eight positions of a sequence, from a multiple of eight on; some may not be in the step.
struct Run {
  int sequence = -1;  // none: past the last run
  int first;       // token of the first position, before the sequence's own where that is < begin
  int begin, end;  // tokens of the sequence
  int position;    // the first
};

// The run of that number, sequence by sequence. By whole warps.
__device__ Run find_run(const GenericRopeArgs& p, int number, int lane) {
  for (int first = 0; first < p.sequences; first += 32) {
    const int s = min(first + lane, p.sequences - 1);
    const int begin = p.seq_starts[s], end = p.seq_starts[s + 1];
    const int position = begin < end ? p.positions[begin] : 0, before = position % kRun;
    const int runs =
        first + lane < p.sequences && begin < end ? (before + end - begin + kRun - 1) / kRun : 0;
    int sum = runs;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += other;
    }
    const uint32_t behind = __ballot_sync(0xffffffffu, number < sum);
    if (behind != 0) {
      const int owner = __ffs(static_cast<int>(behind)) - 1;
      const int skipped = (number - (sum - runs)) * kRun - before;
      Run run;
      run.sequence = first + owner;
      run.begin = __shfl_sync(0xffffffffu, begin, owner);
      run.end = __shfl_sync(0xffffffffu, end, owner);
      run.first = run.begin + __shfl_sync(0xffffffffu, skipped, owner);
      run.position = __shfl_sync(0xffffffffu, position + skipped, owner);
      return run;
    }
    number -= __shfl_sync(0xffffffffu, sum, 31);
  }
  return {};
}

// blockIdx.x: run; blockIdx.y: 0 k and v, others 16 heads of q.
__global__ void __launch_bounds__(kThreads) rope_store_prompt_kernel(const GenericRopeArgs p) {
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  __shared__ __align__(8) uint8_t v_bytes[kVHeads][kHeadDim][kRun];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (blockIdx.x == 0 && blockIdx.y == 0 && warp == 0) write_page_starts(p, lane);
  const Run run = find_run(p, static_cast<int>(blockIdx.x), lane);
  if (run.sequence < 0) return;
  const int token = run.first + warp, position = run.position + warp;
  const bool is_token = token >= run.begin && token < run.end;
  const bool is_whole = run.first >= run.begin && run.first + kRun <= run.end;
  uint32_t* at = static_cast<uint32_t*>(p.qkv) +
                 int64_t{token} * (p.heads + 2 * p.kv_heads) * (kHeadDim / 2) + lane;
  float2 c{}, s{};
  if (is_token) {
    c = reinterpret_cast<const float2*>(p.cos)[int64_t{position} * 32 + lane];
    s = reinterpret_cast<const float2*>(p.sin)[int64_t{position} * 32 + lane];
  }
  // Several heads' loads are under way at once.
  constexpr int kAtOnce = 4;
  auto for_heads = [&](int from, int to, auto&& body) {
    for (int head = from; head < to; head += kAtOnce) {
      float x[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (head + i < to) load_head(at + (head + i) * (kHeadDim / 2), x[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (head + i < to) body(head + i, x[i]);
      }
    }
  };
  if (blockIdx.y > 0) {
    const int from = static_cast<int>(blockIdx.y - 1) * kQHeads;
    if (!is_token) return;
    for_heads(from, min(from + kQHeads, p.heads), [&](int head, float(&x)[4]) {
      rotate(x, c, s);
      store_head(at + head * (kHeadDim / 2), x);
    });
    return;
  }
  const int page = p.page_table[static_cast<int64_t>(run.sequence) * p.page_table_stride +
                                run.position / kPageTokens];
  const int row = position % kPageTokens, first_v = p.heads + p.kv_heads;
  if (is_token) {
    for_heads(p.heads, first_v, [&](int head, float(&x)[4]) {
      rotate(x, c, s);
      store_head(at + head * (kHeadDim / 2), x);
      store_kv(p, page, head - p.heads, row, /*is_v=*/false, lane, x);
    });
  }
  if (p.format != PageFormat::kInt8 || !is_whole) {
    if (!is_token) return;
    for_heads(first_v, first_v + p.kv_heads, [&](int head, float(&x)[4]) {
      store_kv(p, page, head - first_v, row, /*is_v=*/true, lane, x);
    });
    return;
  }
  auto* pages = static_cast<uint8_t*>(p.pages);
  for (int first = 0; first < p.kv_heads; first += kVHeads) {
    const int count = min(kVHeads, p.kv_heads - first);
    for_heads(first_v + first, first_v + first + count, [&](int head, float(&x)[4]) {
      uint32_t u[4];
      const __half scale = quantize_head(x, p.v_scale, u);
      const int own = head - first_v - first;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v_bytes[own][channel(lane, i)][warp] = static_cast<uint8_t>(u[i]);
      }
      if (lane == 0) {
        *reinterpret_cast<__half*>(pages + pair_offset(page, p.kv_heads, first + own) +
                                   v_scale_byte(row)) = scale;
      }
    });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count * kHeadDim; i += kThreads) {
      const int own = i / kHeadDim, d = i % kHeadDim;
      *reinterpret_cast<uint2*>(pages + pair_offset(page, p.kv_heads, first + own) +
                                v_byte(row - warp, d)) =
          *reinterpret_cast<const uint2*>(v_bytes[own][d]);
    }
    __syncthreads();
  }
}

}  // namespace

size_t page_bytes(PageFormat format, int kv_heads) {
  return static_cast<size_t>(kv_heads) *
         (format == PageFormat::kInt8 ? kPairBytes : 2 * kPageTokens * kHeadDim * 2);
}

int generic_rope_store(const GenericRopeArgs& args, void* stream) {
  // A run has a place for eight tokens: not for steps of mostly one token a sequence.
  const bool is_prompt = args.tokens >= 64 && args.tokens >= 8 * args.sequences;
  const int64_t threads = int64_t{args.tokens} * (args.heads + 2 * args.kv_heads) * 32;
  cudaLaunchConfig_t config{};
  if (is_prompt) {  // a sequence of n tokens has at most n / 8 + 2 runs
    config.gridDim = dim3(static_cast<unsigned>(args.tokens / kRun + 2 * args.sequences),
                          1 + static_cast<unsigned>((args.heads + kQHeads - 1) / kQHeads));
  } else {
    config.gridDim = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  }
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = args.dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, is_prompt ? rope_store_prompt_kernel : rope_store_kernel,
                            args);
}

}  // namespace nibble::cuda
