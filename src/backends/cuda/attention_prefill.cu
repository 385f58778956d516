// K4: attention of a prompt chunk over its paged int8 KV: causal softmax(q K^T) V for `count` query
// tokens at positions length - count .. length - 1 of one sequence, head_dim 128, 4 query heads per
// KV head. The chunk's own K and V are in the cache already, so that a row's result is the same
// bits however the prompt was cut and whatever part of it came from the prefix cache.
//
// Two kernels. `expand` reads the pages once (260 bytes per token and KV head) and writes f16
// scratch: K [kv head][token][128], V^T [kv head][128][token], padded with zeros to 128
// tokens; 11.5 MB in and 22.6 MB out for 5.5k tokens, mostly L2. `prefill_kernel` then is a plain
// f16 flash attention: a CTA has 128 queries of one head, two consumer warpgroups of 64 rows and
// one producer warp that brings K and V^T tiles of 128 tokens by tensor maps, two of each in
// flight. Both products are wgmma m64n128k16: S = Q K^T with Q in shared memory, O += P V with P in
// registers (the accumulator layout of S is the operand layout of P). A warpgroup issues S of tile
// j + 1 before O of tile j, so that the softmax of one tile runs under the second product of the
// one before. Flops: 4 * 128 per (query, visible token, head). Order: the longest query tiles
// first, the heads of a KV head side by side.
//
// Limits: head_dim 128, 4 heads per KV head; sm_90a.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "backends/cuda/kernels.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/wgmma.cuh"

namespace nibble::cuda {
namespace {

using namespace kv_layout;

constexpr int kTile = 128;  // queries of a CTA, and tokens of a KV tile
constexpr int kThreads = 3 * 128;
constexpr int kTileBytesF16 = kTile * kHeadDim * 2;
constexpr int kStages = 2;
constexpr int kKOffset = kTileBytesF16, kVOffset = kKOffset + kStages * kTileBytesF16;
constexpr int kBarOffset = kVOffset + kStages * kTileBytesF16;
constexpr int kSmemBytes = kBarOffset + 4 * kStages * 8;

struct ExpandParams {
  const uint8_t* pages;
  const int* page_table;
  __half *k, *v;
  int kv_heads, length, padded;
};

// One block per (page of the sequence, KV head).
__global__ void __launch_bounds__(256) expand(const ExpandParams p) {
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  const int page = blockIdx.x, head = blockIdx.y, tid = threadIdx.x;
  const bool real = page * kPageTokens < p.length;
  const uint8_t* pair = p.pages + pair_offset(real ? p.page_table[page] : 0, p.kv_heads, head);
#pragma unroll
  for (int is_v = 0; is_v < 2; ++is_v) {
#pragma unroll
    for (int i = tid; i < kPageTokens * kHeadDim / 16; i += 256) {  // 16 bytes each
      // K: row = token, 8 chunks; V: row = d, 4 chunks of 16 tokens.
      const int row = is_v ? i >> 2 : i >> 3, chunk = is_v ? i & 3 : i & 7;
      uint32_t out[8] = {};
      if (real) {
        const uint8_t* tile = pair + is_v * kTileBytes;
        const uint4 bytes = *reinterpret_cast<const uint4*>(
            tile +
            (is_v ? row * kPageTokens + chunk * 16 : row * kHeadDim + ((chunk ^ (row & 1)) << 4)));
        const __half* scales = reinterpret_cast<const __half*>(tile + kScalesOffset);
        const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
        const int valid = p.length - page * kPageTokens;  // tokens past it hold anything
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t pairs[2];
          ptx::bytes_to_half(words[w], pairs[0], pairs[1]);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int token = is_v ? chunk * 16 + w * 4 + h * 2 : row;
            __half2 s;
            if (is_v) {
              s = __halves2half2(token < valid ? scales[token] : __half(0.0f),
                                 token + 1 < valid ? scales[token + 1] : __half(0.0f));
            } else {
              s = __half2half2(token < valid ? scales[token] : __half(0.0f));
            }
            const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&pairs[h]), s);
            out[w * 2 + h] = *reinterpret_cast<const uint32_t*>(&product);
          }
        }
      }
      __half* to =
          is_v ? p.v + (static_cast<int64_t>(head) * kHeadDim + row) * p.padded +
                     page * kPageTokens + chunk * 16
               : p.k +
                     (static_cast<int64_t>(head) * p.padded + page * kPageTokens + row) * kHeadDim +
                     chunk * 16;
      reinterpret_cast<uint4*>(to)[0] = make_uint4(out[0], out[1], out[2], out[3]);
      reinterpret_cast<uint4*>(to)[1] = make_uint4(out[4], out[5], out[6], out[7]);
    }
  }
}

struct PrefillParams {
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  const float* out_scale;  // [heads * 128] or null
  int64_t q_stride, out_stride;
  int count, start, padded, heads, q_tiles;
  float scale_log2;
};

__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const PrefillParams p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  const uint32_t k_full = base + kBarOffset, v_full = k_full + kStages * 8,
                 k_empty = v_full + kStages * 8, v_empty = k_empty + kStages * 8;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int head = blockIdx.x % p.heads, q_tile = p.q_tiles - 1 - blockIdx.x / p.heads;
  const int last = min(p.count, (q_tile + 1) * kTile) - 1;
  const int tiles = (p.start + last) / kTile + 1;

  ptx::grid_launch_dependents();
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(k_full + i * 8, 1);
      ptx::mbarrier_init(v_full + i * 8, 1);
      ptx::mbarrier_init(k_empty + i * 8, 8);
      ptx::mbarrier_init(v_empty + i * 8, 8);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  ptx::grid_dependency_wait();

  if (warp >= 8) {
    ptx::registers_shrink<24>();
    if (warp == 8 && lane == 0) {
      const int kv_head = head >> 2;
      for (int j = 0; j < tiles; ++j) {
        const int stage = j % kStages, parity = (j / kStages & 1) ^ 1;
        ptx::mbarrier_wait(k_empty + stage * 8, parity);
        ptx::mbarrier_expect(k_full + stage * 8, kTileBytesF16);
        const uint32_t k_to = base + kKOffset + stage * kTileBytesF16;
        const int row = kv_head * p.padded + j * kTile;
        ptx::tensor_load_2d(k_to, &k_map, 0, row, k_full + stage * 8);
        ptx::tensor_load_2d(k_to + kTileBytesF16 / 2, &k_map, 64, row, k_full + stage * 8);
        ptx::mbarrier_wait(v_empty + stage * 8, parity);
        ptx::mbarrier_expect(v_full + stage * 8, kTileBytesF16);
        const uint32_t v_to = base + kVOffset + stage * kTileBytesF16;
        ptx::tensor_load_2d(v_to, &v_map, j * kTile, kv_head * kHeadDim, v_full + stage * 8);
        ptx::tensor_load_2d(v_to + kTileBytesF16 / 2, &v_map, j * kTile + 64, kv_head * kHeadDim,
                            v_full + stage * 8);
      }
    }
    return;
  }
  ptx::registers_grow<240>();
  const int wg = warp >> 2, g = lane >> 2, t = lane & 3;

  // Q: bf16 -> f16 (exact in f16's normal range), two swizzled halves of 64 d.
  for (int i = tid; i < kTile * 16; i += 256) {
    const int row = i >> 4, chunk = i & 15, token = q_tile * kTile + row;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (token < p.count) {
      v = *reinterpret_cast<const uint4*>(p.q + token * p.q_stride + head * kHeadDim + chunk * 8);
    }
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] =
          ptx::pack_f16(__uint_as_float(words[w] << 16), __uint_as_float(words[w] & 0xffff0000u));
    }
    ptx::store_shared_16(
        base + (chunk >> 3) * (kTileBytesF16 / 2) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4),
        reinterpret_cast<const float(&)[4]>(words));
  }
  ptx::fence_proxy_async();
  ptx::named_barrier(1, 256);

  const uint32_t q_at = ptx::descriptor_address(base + wg * 64 * 128);
  const uint32_t k_at = ptx::descriptor_address(base + kKOffset);
  const uint32_t v_at = ptx::descriptor_address(base + kVOffset);
  constexpr uint32_t kHalf = kTileBytesF16 / 2 >> 4;
  float s[64], o[64];
  uint32_t prob[8][4];
#pragma unroll
  for (int i = 0; i < 64; ++i) o[i] = 0.0f;
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f};
  const int first_row = p.start + q_tile * kTile + wg * 64;  // position of the warpgroup's row 0
  const int position = first_row + (warp & 3) * 16 + g;      // of this thread's first row

  auto scores = [&](int stage) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint64_t a = ptx::descriptor_k_major(q_at + (k / 4) * kHalf + (k % 4) * 2);
      const uint64_t b =
          ptx::descriptor_k_major(k_at + stage * 2 * kHalf + (k / 4) * kHalf + (k % 4) * 2);
      if (k == 0) {
        ptx::wgmma_ss_f16_n128<0>(s, a, b);
      } else {
        ptx::wgmma_ss_f16_n128<1>(s, a, b);
      }
    }
    ptx::wgmma_commit();
  };
  auto values = [&](int stage) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      ptx::wgmma_rs_f16_n128(
          o, prob[k],
          ptx::descriptor_k_major(v_at + stage * 2 * kHalf + (k / 4) * kHalf + (k % 4) * 2));
    }
    ptx::wgmma_commit();
  };
  // s -> exp2(s * scale - m) in place; factor: what o and l shrink by.
  auto softmax = [&](int j, float(&factor)[2]) {
    if ((j + 1) * kTile - 1 > first_row) {  // touches the diagonal
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int token = j * kTile + (i >> 2) * 8 + 2 * t + (i & 1);
        if (token > position + 8 * ((i >> 1) & 1)) s[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float peak = m[r];
#pragma unroll
      for (int i = 0; i < 32; ++i) peak = fmaxf(peak, s[(i >> 1) * 4 + 2 * r + (i & 1)]);
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      factor[r] = ptx::exp2_fast((m[r] - peak) * p.scale_log2);
      m[r] = peak;
      const float shift = peak * p.scale_log2;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        float& x = s[(i >> 1) * 4 + 2 * r + (i & 1)];
        x = ptx::exp2_fast(fmaf(x, p.scale_log2, -shift));
        sum += x;
      }
      l[r] = l[r] * factor[r] + sum;
    }
  };
  auto take_probabilities = [&] {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        prob[k][i] = ptx::pack_f16(s[k * 8 + 2 * i], s[k * 8 + 2 * i + 1]);
  };

  float factor[2];
  ptx::mbarrier_wait(k_full, 0);
  scores(0);
  ptx::wgmma_wait<0>();
  if (lane == 0) ptx::mbarrier_arrive(k_empty);
  softmax(0, factor);
  take_probabilities();
#pragma unroll 1
  for (int j = 1; j < tiles; ++j) {
    const int stage = j % kStages, before = stage ^ 1;
    ptx::mbarrier_wait(k_full + stage * 8, j / kStages & 1);
    scores(stage);
    ptx::mbarrier_wait(v_full + before * 8, (j - 1) / kStages & 1);
    values(before);
    ptx::wgmma_wait<1>();
    if (lane == 0) ptx::mbarrier_arrive(k_empty + stage * 8);
    softmax(j, factor);
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(v_empty + before * 8);
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] *= factor[(i >> 1) & 1];
    take_probabilities();
  }
  ptx::mbarrier_wait(v_full + ((tiles - 1) % kStages) * 8, (tiles - 1) / kStages & 1);
  values((tiles - 1) % kStages);
  ptx::wgmma_wait<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
    const float norm = 1.0f / l[r];
    const int token = position + 8 * r - p.start;
    if (token >= p.count) continue;
    __nv_bfloat16* to = p.out + token * p.out_stride + head * kHeadDim + 2 * t;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float v0 = o[i * 4 + 2 * r] * norm, v1 = o[i * 4 + 2 * r + 1] * norm;
      if (p.out_scale) {
        const float2 scale =
            *reinterpret_cast<const float2*>(p.out_scale + head * kHeadDim + i * 8 + 2 * t);
        v0 *= scale.x, v1 *= scale.y;
      }
      *reinterpret_cast<uint32_t*>(to + i * 8) = ptx::pack_bf16(v0, v1);
    }
  }
}

int64_t padded_tokens(int length) { return (length + kTile - 1) / kTile * kTile; }

}  // namespace

size_t prefill_attention_workspace_bytes(int max_length, int kv_heads) {
  return static_cast<size_t>(padded_tokens(max_length)) * static_cast<size_t>(kv_heads) * kHeadDim *
         2 * sizeof(__half);
}

int prefill_attention(const PrefillAttentionArgs& args, void* stream) {
  if (args.count < 1 || args.length < args.count) return cudaErrorInvalidValue;
  const int64_t padded = padded_tokens(args.length);
  auto* k = static_cast<__half*>(args.workspace);
  __half* v = k + padded * args.kv_heads * kHeadDim;
  LinearArgs common{};
  common.dependent = args.dependent;
  const ExpandParams expand_params{.pages = static_cast<const uint8_t*>(args.pages),
                                   .page_table = args.page_table,
                                   .k = k,
                                   .v = v,
                                   .kv_heads = args.kv_heads,
                                   .length = args.length,
                                   .padded = static_cast<int>(padded)};
  expand<<<dim3(static_cast<unsigned>(padded / kPageTokens), static_cast<unsigned>(args.kv_heads)),
           256, 0, static_cast<cudaStream_t>(stream)>>>(expand_params);
  cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  TensorMap k_map, v_map;
  int result = make_tensor_map(&k_map, k, padded * args.kv_heads, kHeadDim, kHeadDim * 2, kTile);
  if (result != 0) return result;
  result = make_tensor_map(&v_map, v, int64_t{args.kv_heads} * kHeadDim, padded, padded * 2, kTile);
  if (result != 0) return result;
  CUtensorMap maps[2];
  std::memcpy(&maps[0], &k_map, sizeof k_map);
  std::memcpy(&maps[1], &v_map, sizeof v_map);
  const int q_tiles = (args.count + kTile - 1) / kTile, heads = args.kv_heads * 4;
  const PrefillParams params{.q = static_cast<const __nv_bfloat16*>(args.q),
                             .out = static_cast<__nv_bfloat16*>(args.out),
                             .out_scale = args.out_scale,
                             .q_stride = args.q_stride,
                             .out_stride = args.out_stride,
                             .count = args.count,
                             .start = args.length - args.count,
                             .padded = static_cast<int>(padded),
                             .heads = heads,
                             .q_tiles = q_tiles,
                             .scale_log2 = args.softmax_scale * 1.44269504f};
  common.dependent = true;
  return launch_linear(prefill_kernel, common, q_tiles * heads, kThreads, kSmemBytes, stream, 1,
                       maps[0], maps[1], params);
}

}  // namespace nibble::cuda
