// Causal attention over the paged cache for any number of query heads per KV head, both page
// formats and any mixture of prompt chunks and decode rows: y[t, h] = softmax(q[t, h] K^T) V over
// positions 0 .. position(t), head_dim 128.
//
// Work split: a CTA of 4 warps has 64 rows, a row being one (query token, head) of one KV head, so
// that all heads that share K and V read them once; the tiles of a sequence come longest context
// first. Per page of 64 tokens: the bytes become f16 in shared memory (int8 exactly; K's scale goes
// onto the scores, V's into the probabilities, times 2^8 so that small ones stay normal), then S =
// Q K^T and O += P V on mma.sync m16n8k16, the accumulator of S being operand A of P V, with an
// online softmax per page.
// Flops: 4 * 128 per (row, visible token). Bytes: the context's pages once per tile and KV head.
//
// A row sees its pages in order and a page past its position changes nothing (maximum kept,
// factor 1, probabilities 0), so its bits depend on neither tiles, chunks nor batch-mates.
// Limits: heads per KV head <= 64; one CTA walks a whole context, so few decode rows leave SMs
// idle: attention_decode.cu and attention_prefill.cu are for speed.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/generic.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

using namespace kv_layout;

constexpr int kThreads = 128, kRows = 64;
constexpr float kMasked = -1e30f;
constexpr float kValueScale = 256.0f;

struct Shared {
  __half k[kPageTokens * kHeadDim];  // rows of 256 bytes, chunk c at c ^ row % 8
  __half v[kHeadDim * kPageTokens];  // transposed: rows of 128 bytes, chunk c at c ^ row % 8
  float k_scale[kPageTokens], v_scale[kPageTokens];
  int sequence, tile;
};

// Half index of 16-byte chunk `chunk` of row `row`; a row has kChunks of them.
template <int kChunks>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row & 7))) * 8;
}

__device__ __forceinline__ void store_chunk(__half* to, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// 16 bytes of a page -> 16 halves in two chunks.
__device__ __forceinline__ void expand(const uint4& bytes, uint32_t (&first)[4],
                                       uint32_t (&second)[4]) {
  ptx::bytes_to_half(bytes.x, first[0], first[1]);
  ptx::bytes_to_half(bytes.y, first[2], first[3]);
  ptx::bytes_to_half(bytes.z, second[0], second[1]);
  ptx::bytes_to_half(bytes.w, second[2], second[3]);
}

// `valid` tokens of the page exist; the others' V and scales may hold anything and become 0.
__device__ void load_int8(Shared& s, const uint8_t* pair, int valid, int tid) {
  for (int i = tid; i < kPageTokens * kHeadDim / 16; i += kThreads) {
    uint32_t first[4], second[4];
    const int token = i >> 3, c = i & 7;
    expand(*reinterpret_cast<const uint4*>(pair + k_byte(token, c * 16)), first, second);
    store_chunk(s.k + chunk_at<16>(token, 2 * c), first);
    store_chunk(s.k + chunk_at<16>(token, 2 * c + 1), second);
    const int d = i >> 2, group = i & 3;
    expand(*reinterpret_cast<const uint4*>(pair + v_byte(group * 16, d)), first, second);
    store_chunk(s.v + chunk_at<8>(d, 2 * group), first);
    store_chunk(s.v + chunk_at<8>(d, 2 * group + 1), second);
  }
  if (tid < kPageTokens) {
    const bool real = tid < valid;
    s.k_scale[tid] =
        real ? __half2float(*reinterpret_cast<const __half*>(pair + k_scale_byte(tid))) : 0.0f;
    s.v_scale[tid] =
        real ? __half2float(*reinterpret_cast<const __half*>(pair + v_scale_byte(tid))) : 0.0f;
  }
}

__device__ void load_f16(Shared& s, const __half* pair, int valid, int tid) {
  const __half* v = pair + kPageTokens * kHeadDim;
  for (int i = tid; i < kPageTokens * kHeadDim / 8; i += kThreads) {
    const int token = i >> 4, c = i & 15;
    *reinterpret_cast<uint4*>(s.k + chunk_at<16>(token, c)) =
        *reinterpret_cast<const uint4*>(pair + token * kHeadDim + c * 8);
    const int d = i >> 3, group = i & 7;
    const uint4 packed = *reinterpret_cast<const uint4*>(v + d * kPageTokens + group * 8);
    uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token0 = group * 8 + 2 * j;
      if (token0 >= valid)
        words[j] = 0;
      else if (token0 + 1 >= valid)
        words[j] &= 0xffffu;
    }
    store_chunk(s.v + chunk_at<8>(d, group), words);
  }
  if (tid < kPageTokens) s.k_scale[tid] = s.v_scale[tid] = 1.0f;
}

__device__ __forceinline__ uint32_t half2_bits(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&h);
}
// Two bf16 -> two f16; exact for magnitudes from 2^-14 to 65504.
__device__ __forceinline__ uint32_t to_half(uint32_t pair) {
  return half2_bits(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__global__ void __launch_bounds__(kThreads) attention_kernel(const GenericAttentionArgs p) {
  __shared__ __align__(128) Shared s;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int group = p.heads / p.kv_heads, kv_head = blockIdx.y;
  const int queries = kRows / group;
  if (tid == 0) {
    int tile = blockIdx.x, sequence = 0;
    for (; sequence < p.sequences; ++sequence) {
      const int count = p.seq_starts[sequence + 1] - p.seq_starts[sequence];
      const int tiles = (count + queries - 1) / queries;
      if (tile < tiles) {
        tile = tiles - 1 - tile;
        break;
      }
      tile -= tiles;
    }
    s.sequence = sequence;
    s.tile = tile;
  }
  __syncthreads();
  const int sequence = s.sequence;
  if (sequence >= p.sequences) return;
  const int first_token = p.seq_starts[sequence] + s.tile * queries;
  const int count = min(queries, p.seq_starts[sequence + 1] - first_token);
  const int length = p.kv_lens[sequence];

  // This thread's two rows: g and g + 8 of the warp's 16.
  int token[2], head[2], position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + g + 8 * r, query = row / group;
    token[r] = query < count ? first_token + query : -1;
    head[r] = kv_head * group + row % group;
    position[r] = token[r] >= 0 ? p.positions[token[r]] : -1;
  }
  const int last_position = p.positions[first_token + count - 1];
  uint32_t q[8][4];
#pragma unroll
  for (int k16 = 0; k16 < 8; ++k16)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i & 1, d = k16 * 16 + 2 * t + 8 * (i >> 1);
      q[k16][i] = 0;
      if (token[r] >= 0) {
        const auto* from =
            static_cast<const __nv_bfloat16*>(p.q) + token[r] * p.q_stride + head[r] * kHeadDim + d;
        q[k16][i] = to_half(*reinterpret_cast<const uint32_t*>(from));
      }
    }

  float o[16][4] = {};
  float peak[2] = {kMasked, kMasked}, total[2] = {0.0f, 0.0f};
  const float scale_log2 = 0.08838834764831845f * 1.4426950408889634f;  // 1 / sqrt(128), log2 e
  const int pages = last_position / kPageTokens + 1;
  for (int page = 0; page < pages; ++page) {
    const int id = p.page_table[static_cast<int64_t>(sequence) * p.page_table_stride + page];
    const int valid = min(kPageTokens, length - page * kPageTokens);
    if (page > 0) __syncthreads();
    if (p.format == PageFormat::kInt8) {
      load_int8(s, static_cast<const uint8_t*>(p.pages) + pair_offset(id, p.kv_heads, kv_head),
                valid, tid);
    } else {
      const int64_t pair = static_cast<int64_t>(id) * p.kv_heads + kv_head;
      load_f16(s, static_cast<const __half*>(p.pages) + pair * (2 * kPageTokens * kHeadDim), valid,
               tid);
    }
    __syncthreads();

    float score[8][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0.0f;
#pragma unroll
      for (int k32 = 0; k32 < 4; ++k32) {
        uint32_t b[4];
        ptx::ldmatrix_x4(
            b, ptx::smem_address(s.k + chunk_at<16>(j * 8 + (lane & 7), k32 * 4 + (lane >> 3))));
        ptx::mma_f16(score[j], q[2 * k32], b[0], b[1]);
        ptx::mma_f16(score[j], q[2 * k32 + 1], b[2], b[3]);
      }
    }
    float highest[2] = {kMasked, kMasked};
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = j * 8 + 2 * t + (e & 1);
        const bool seen = page * kPageTokens + column <= position[e >> 1];
        score[j][e] = seen ? score[j][e] * (s.k_scale[column] * scale_log2) : kMasked;
        highest[e >> 1] = fmaxf(highest[e >> 1], score[j][e]);
      }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
      const float new_peak = fmaxf(peak[r], highest[r]);
      factor[r] = ptx::exp2_fast(peak[r] - new_peak);
      peak[r] = new_peak;
      total[r] *= factor[r];
    }
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] *= factor[e >> 1];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = ptx::exp2_fast(score[j][e] - peak[e >> 1]);
        total[e >> 1] += weight;
        score[j][e] = weight * (s.v_scale[j * 8 + 2 * t + (e & 1)] * kValueScale);
      }
#pragma unroll
    for (int k32 = 0; k32 < 2; ++k32) {
      uint32_t a[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int j = k32 * 4 + step * 2;
        a[step][0] = half2_bits(score[j][0], score[j][1]);
        a[step][1] = half2_bits(score[j][2], score[j][3]);
        a[step][2] = half2_bits(score[j + 1][0], score[j + 1][1]);
        a[step][3] = half2_bits(score[j + 1][2], score[j + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(
            b, ptx::smem_address(s.v + chunk_at<8>(n * 8 + (lane & 7), k32 * 4 + (lane >> 3))));
        ptx::mma_f16(o[n], a[0], b[0], b[1]);
        ptx::mma_f16(o[n], a[1], b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    if (token[r] < 0) continue;
    const float norm = 1.0f / (kValueScale * total[r]);
    auto* to = static_cast<__nv_bfloat16*>(p.out) +
               (static_cast<int64_t>(token[r]) * p.heads + head[r]) * kHeadDim + 2 * t;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      float v[2] = {o[n][2 * r] * norm, o[n][2 * r + 1] * norm};
      if (p.out_scale) {
        v[0] *= p.out_scale[head[r] * kHeadDim + n * 8 + 2 * t];
        v[1] *= p.out_scale[head[r] * kHeadDim + n * 8 + 2 * t + 1];
      }
      *reinterpret_cast<uint32_t*>(to + n * 8) = ptx::pack_bf16(v[0], v[1]);
    }
  }
}

}  // namespace

int generic_attention_queries(int heads, int kv_heads) { return kRows / (heads / kv_heads); }

int generic_attention(const GenericAttentionArgs& args, void* stream) {
  if (args.heads % args.kv_heads || args.heads / args.kv_heads > kRows || args.tiles < 1) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(static_cast<unsigned>(args.tiles), static_cast<unsigned>(args.kv_heads));
  attention_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace nibble::cuda
