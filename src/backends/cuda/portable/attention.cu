// Causal attention over the paged cache for the portable target: any number of query heads per KV
// head, both page formats, any mixture of prompt chunks and decode rows. cp.async is not needed:
// the next page travels in registers while this one is multiplied.
//
// Work split: a CTA of 8 warps has 128 rows, a row being one (query token, head) of one KV head;
// the tiles of a sequence come longest context first. Per page of 64 tokens the bytes become f16 in
// shared memory (int8 exactly; K's scale goes onto the scores, V's into the probabilities, times
// 2^8 so that small ones stay normal), then S = Q K^T and O += P V on mma.sync m16n8k16 with an
// online softmax per page.
// A context is cut into parts of 512 tokens. Each is summed from nothing, and the parts are merged
// in order: by the CTA that walks them all (prompt chunks; the merged sums wait in shared memory),
// or, in a step of one token a sequence, by whoever of a sequence's parts finishes last (a counter,
// no waiting; a CTA has one part). Bytes: the context's pages once per tile and KV head. Flops:
// 4 * 128 per (row, visible token).
//
// A row sees its pages in order, in parts that begin at fixed positions, and pages or parts past
// its position change nothing: its bits depend on neither tiles, chunks, the way it was split nor
// batch-mates.
// Limits: heads per KV head <= 128, in the split form <= 16; 99 KB of shared memory, 1 CTA an SM.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backends/cuda/generic.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

using namespace kv_layout;

constexpr int kWarps = 8, kThreads = kWarps * 32, kRows = kWarps * 16, kSplitRows = 16;
constexpr int kPartPages = kPortableAttentionPartPages;
constexpr int kPieceVectors = kHeadDim / 8 + 1;  // of 4 floats a lane: O; maxima and sums
constexpr int kPieceFloats = kPieceVectors * 32 * 4;
constexpr float kMasked = -1e30f;
constexpr float kValueScale = 256.0f;

struct Params {
  GenericAttentionArgs a;
  int* counters;  // [tile, KV head], -1 between calls; split only
  float* pieces;  // [tile, KV head, part][vector][lane][4]
  int parts;      // of the grid
};

struct Shared {
  __half k[kPageTokens * kHeadDim];  // rows of 256 bytes, chunk c at c ^ row % 8
  __half v[kHeadDim * kPageTokens];  // transposed: rows of 128 bytes, chunk c at c ^ row % 8
  float k_scale[kPageTokens], v_scale[kPageTokens];
  int sequence, tile;
  // What follows is there unless split: O of the parts that are done, [vector][thread].
  alignas(16) float4 merged[kHeadDim / 8 * kThreads];
};
constexpr int kSplitBytes = static_cast<int>(offsetof(Shared, merged));
static_assert(sizeof(Shared) <= 99 * 1024);

// Half index of 16-byte chunk `chunk` of row `row`; a row has kChunks of them.
template <int kChunks>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row & 7))) * 8;
}

// Two bf16 -> two f16; exact for magnitudes from 2^-14 to 65504.
__device__ __forceinline__ uint32_t to_half(uint32_t pair) {
  return ptx::pack_f16(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// A page on its way: each thread's 16-byte chunks of K and of V, and one scale.
template <PageFormat kFormat>
struct PageRegisters {
  static constexpr bool kInt8 = kFormat == PageFormat::kInt8;
  static constexpr int kChunks = kPageTokens * kHeadDim * (kInt8 ? 1 : 2) / 16 / kThreads;
  uint4 k[kChunks], v[kChunks];
  __half scale;

  __device__ void fetch(const void* pages, int64_t pair, int tid) {
    if constexpr (kInt8) {
      const uint8_t* from = static_cast<const uint8_t*>(pages) + pair * kPairBytes;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int c = tid + i * kThreads;
        k[i] = *reinterpret_cast<const uint4*>(from + k_byte(c >> 3, (c & 7) * 16));
        v[i] = *reinterpret_cast<const uint4*>(from + v_byte((c & 3) * 16, c >> 2));
      }
      if (tid < 2 * kPageTokens) {
        scale = *reinterpret_cast<const __half*>(
            from + (tid < kPageTokens ? k_scale_byte(tid) : v_scale_byte(tid - kPageTokens)));
      }
    } else {
      const __half* from = static_cast<const __half*>(pages) + pair * (2 * kPageTokens * kHeadDim);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int c = tid + i * kThreads;
        k[i] = *reinterpret_cast<const uint4*>(from + c * 8);
        v[i] = *reinterpret_cast<const uint4*>(from + kPageTokens * kHeadDim + c * 8);
      }
    }
  }

  // 16 bytes of a page -> 16 halves in two chunks.
  __device__ static void expand(const uint4& bytes, __half* first, __half* second) {
    uint32_t w[8];
    ptx::bytes_to_half(bytes.x, w[0], w[1]);
    ptx::bytes_to_half(bytes.y, w[2], w[3]);
    ptx::bytes_to_half(bytes.z, w[4], w[5]);
    ptx::bytes_to_half(bytes.w, w[6], w[7]);
    *reinterpret_cast<uint4*>(first) = make_uint4(w[0], w[1], w[2], w[3]);
    *reinterpret_cast<uint4*>(second) = make_uint4(w[4], w[5], w[6], w[7]);
  }

  // `valid` tokens of the page exist; the others' V and scales may hold anything and become 0.
  __device__ void store(Shared& s, int valid, int tid) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int c = tid + i * kThreads;
      if constexpr (kInt8) {
        const int token = c >> 3, d = c >> 2;
        expand(k[i], s.k + chunk_at<16>(token, 2 * (c & 7)),
               s.k + chunk_at<16>(token, 2 * (c & 7) + 1));
        expand(v[i], s.v + chunk_at<8>(d, 2 * (c & 3)), s.v + chunk_at<8>(d, 2 * (c & 3) + 1));
      } else {
        *reinterpret_cast<uint4*>(s.k + chunk_at<16>(c >> 4, c & 15)) = k[i];
        uint32_t w[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = (c & 7) * 8 + 2 * j;
          if (token >= valid) {
            w[j] = 0;
          } else if (token + 1 >= valid) {
            w[j] &= 0xffffu;
          }
        }
        *reinterpret_cast<uint4*>(s.v + chunk_at<8>(c >> 3, c & 7)) =
            make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
    if (tid < 2 * kPageTokens) {
      const int token = tid & (kPageTokens - 1);
      float* to = tid < kPageTokens ? s.k_scale : s.v_scale;
      if constexpr (kInt8) {
        to[token] = token < valid ? __half2float(scale) : 0.0f;
      } else {
        to[token] = 1.0f;
      }
    }
  }
};

// The sums of a part, or of the parts up to one: a thread's rows g and g + 8.
struct RowSums {
  float peak[2], total[2];  // in units of log2; of this lane's columns
};

// What the sums so far and a part's are multiplied by.
struct Factors {
  float so_far[2], part[2];
};
// Updates `sums` and says how to add O. A row that does not see the part keeps its sums.
__device__ __forceinline__ Factors merge_rows(RowSums& sums, const RowSums& part, int part_first,
                                              const int (&position)[2]) {
  Factors f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool seen = part_first <= position[r];
    const float peak = seen ? fmaxf(sums.peak[r], part.peak[r]) : sums.peak[r];
    f.so_far[r] = ptx::exp2_fast(sums.peak[r] - peak);
    f.part[r] = seen ? ptx::exp2_fast(part.peak[r] - peak) : 0.0f;
    sums.peak[r] = peak;
    if (seen) sums.total[r] = fmaf(part.total[r], f.part[r], sums.total[r] * f.so_far[r]);
  }
  return f;
}
__device__ __forceinline__ void merge_vector(float (&sums)[4], const float (&part)[4],
                                             const Factors& f, int part_first,
                                             const int (&position)[2]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (part_first > position[e >> 1]) continue;
    sums[e] = fmaf(part[e], f.part[e >> 1], __fmul_rn(sums[e], f.so_far[e >> 1]));
  }
}

__device__ __forceinline__ void to_array(float (&to)[4], const float4& v) {
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// O / sum of one fragment of 8 columns: columns 8n + 2t and the next.
__device__ __forceinline__ void write_vector(const GenericAttentionArgs& p, int token, int head,
                                             int column, float v0, float v1, float norm) {
  v0 *= norm;
  v1 *= norm;
  if (p.out_scale) {
    v0 *= p.out_scale[head * kHeadDim + column];
    v1 *= p.out_scale[head * kHeadDim + column + 1];
  }
  auto* to = static_cast<__nv_bfloat16*>(p.out) +
             (static_cast<int64_t>(token) * p.heads + head) * kHeadDim + column;
  *reinterpret_cast<uint32_t*>(to) = ptx::pack_bf16(v0, v1);
}
__device__ __forceinline__ float norm_of(float total) {
  total += __shfl_xor_sync(0xffffffffu, total, 1);
  total += __shfl_xor_sync(0xffffffffu, total, 2);
  return 1.0f / (kValueScale * total);
}

// kSplit: every sequence has one token; grid (sequences, KV heads, parts). Else grid (tiles, KV
// heads).
template <PageFormat kFormat, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const Params params) {
  extern __shared__ __align__(128) uint8_t smem[];
  Shared& s = *reinterpret_cast<Shared*>(smem);
  const GenericAttentionArgs& p = params.a;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int group = p.heads / p.kv_heads, kv_head = blockIdx.y;
  const int queries = kSplit ? 1 : kRows / group;
  int sequence = blockIdx.x, tile_in_sequence = 0;
  if constexpr (!kSplit) {
    if (tid == 0) {
      int tile = blockIdx.x, found = 0;
      for (; found < p.sequences; ++found) {
        const int count = p.seq_starts[found + 1] - p.seq_starts[found];
        const int tiles = (count + queries - 1) / queries;
        if (tile < tiles) {
          tile = tiles - 1 - tile;
          break;
        }
        tile -= tiles;
      }
      s.sequence = found;
      s.tile = tile;
    }
    __syncthreads();
    sequence = s.sequence;
    tile_in_sequence = s.tile;
    if (sequence >= p.sequences) return;
  }
  const int first_token = p.seq_starts[sequence] + tile_in_sequence * queries;
  const int count = min(queries, p.seq_starts[sequence + 1] - first_token);
  const int length = p.kv_lens[sequence];
  const int pages = p.positions[first_token + count - 1] / kPageTokens + 1;
  const int num_parts = (pages + kPartPages - 1) / kPartPages;
  const int first_part = kSplit ? static_cast<int>(blockIdx.z) : 0;
  if (kSplit && first_part >= num_parts) return;
  const int end_part = kSplit ? first_part + 1 : num_parts;
  const int end_page = min(pages, end_part * kPartPages);

  // This thread's two rows: g and g + 8 of the warp's 16.
  int token[2], head[2], position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + g + 8 * r, query = row / group;
    token[r] = query < count ? first_token + query : -1;
    head[r] = kv_head * group + row % group;
    position[r] = token[r] >= 0 ? p.positions[token[r]] : -1;
  }
  // The last position of the warp's rows: pages past it need not be multiplied.
  int warp_last = max(position[0], position[1]);
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    warp_last = max(warp_last, __shfl_xor_sync(0xffffffffu, warp_last, offset));
  }
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

  const float scale_log2 = 0.08838834764831845f * 1.4426950408889634f;  // 1 / sqrt(128), log2 e
  const int* table = p.page_table + static_cast<int64_t>(sequence) * p.page_table_stride;
  PageRegisters<kFormat> next;
  next.fetch(p.pages, int64_t{table[first_part * kPartPages]} * p.kv_heads + kv_head, tid);
  float o[16][4];
  RowSums part, all;
  for (int part_index = first_part; part_index < end_part; ++part_index) {
#pragma unroll
    for (int n = 0; n < 16; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) part.peak[r] = kMasked, part.total[r] = 0.0f;

    const int part_end = min(end_page, (part_index + 1) * kPartPages);
    for (int page = part_index * kPartPages; page < part_end; ++page) {
      __syncthreads();  // the page before has been read
      next.store(s, min(kPageTokens, length - page * kPageTokens), tid);
      if (page + 1 < end_page) {
        next.fetch(p.pages, int64_t{table[page + 1]} * p.kv_heads + kv_head, tid);
      }
      __syncthreads();
      if (page * kPageTokens > warp_last) continue;

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
        const float new_peak = fmaxf(part.peak[r], highest[r]);
        factor[r] = ptx::exp2_fast(part.peak[r] - new_peak);
        part.peak[r] = new_peak;
        part.total[r] *= factor[r];
      }
#pragma unroll
      for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][e] *= factor[e >> 1];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float weight = ptx::exp2_fast(score[j][e] - part.peak[e >> 1]);
          part.total[e >> 1] += weight;
          score[j][e] = weight * (s.v_scale[j * 8 + 2 * t + (e & 1)] * kValueScale);
        }
#pragma unroll
      for (int k32 = 0; k32 < 2; ++k32) {
        uint32_t a[2][4];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int j = k32 * 4 + step * 2;
          a[step][0] = ptx::pack_f16(score[j][0], score[j][1]);
          a[step][1] = ptx::pack_f16(score[j][2], score[j][3]);
          a[step][2] = ptx::pack_f16(score[j + 1][0], score[j + 1][1]);
          a[step][3] = ptx::pack_f16(score[j + 1][2], score[j + 1][3]);
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

    if constexpr (!kSplit) {  // merge into what waits in shared memory; the last in registers
      const int part_first = part_index * kPartPages * kPageTokens;
      if (part_index == 0) {
        all = part;
      } else {
        const Factors f = merge_rows(all, part, part_first, position);
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          float sums[4];
          to_array(sums, s.merged[n * kThreads + tid]);
          merge_vector(sums, o[n], f, part_first, position);
#pragma unroll
          for (int e = 0; e < 4; ++e) o[n][e] = sums[e];
        }
      }
      if (part_index + 1 < end_part) {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          s.merged[n * kThreads + tid] = make_float4(o[n][0], o[n][1], o[n][2], o[n][3]);
        }
      }
    }
  }

  if (kSplit && num_parts > 1) {
    // Rows are warp 0's; afterwards every warp merges and writes two of the 16 vectors.
    const int pair = static_cast<int>(blockIdx.x) * p.kv_heads + kv_head;
    float* pieces = params.pieces + static_cast<int64_t>(pair) * params.parts * kPieceFloats;
    if (warp == 0) {
      auto* mine = reinterpret_cast<float4*>(pieces + first_part * kPieceFloats) + lane;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        __stcg(mine + n * 32, make_float4(o[n][0], o[n][1], o[n][2], o[n][3]));
      }
      __stcg(mine + 16 * 32, make_float4(part.peak[0], part.peak[1], part.total[0], part.total[1]));
    }
    __threadfence();
    __syncthreads();
    if (!__syncthreads_or(tid == 0 && atomicAdd(params.counters + pair, 1) == num_parts - 2)) {
      return;
    }
    if (tid == 0) params.counters[pair] = -1;
    __threadfence();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = g + 8 * r;
      token[r] = row < group ? first_token : -1;
      head[r] = kv_head * group + row;
      position[r] = row < group ? p.positions[first_token] : -1;
    }
    float sums[2][4];
    for (int i = 0; i < num_parts; ++i) {
      const auto* from = reinterpret_cast<const float4*>(pieces + i * kPieceFloats) + lane;
      float v[2][4], rows[4];
      to_array(v[0], __ldcg(from + (2 * warp) * 32));
      to_array(v[1], __ldcg(from + (2 * warp + 1) * 32));
      to_array(rows, __ldcg(from + 16 * 32));
      const RowSums piece{{rows[0], rows[1]}, {rows[2], rows[3]}};
      if (i == 0) {
        all = piece;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[n][e] = v[n][e];
      } else {
        const int part_first = i * kPartPages * kPageTokens;
        const Factors f = merge_rows(all, piece, part_first, position);
        merge_vector(sums[0], v[0], f, part_first, position);
        merge_vector(sums[1], v[1], f, part_first, position);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float norm = norm_of(all.total[r]);
      if (token[r] < 0) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        write_vector(p, token[r], head[r], (2 * warp + n) * 8 + 2 * t, sums[n][2 * r],
                     sums[n][2 * r + 1], norm);
      }
    }
    return;
  }

  if (kSplit) all = part;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float norm = norm_of(all.total[r]);
    if (token[r] < 0) continue;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      write_vector(p, token[r], head[r], n * 8 + 2 * t, o[n][2 * r], o[n][2 * r + 1], norm);
    }
  }
}

template <PageFormat kFormat, bool kSplit>
int launch(const Params& params, const dim3& grid, void* stream) {
  const auto kernel = attention_kernel<kFormat, kSplit>;
  constexpr int kBytes = kSplit ? kSplitBytes : static_cast<int>(sizeof(Shared));
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace

int portable_attention_queries(int heads, int kv_heads) { return kRows / (heads / kv_heads); }

bool portable_attention_splits(int heads, int kv_heads, int sequences, int page_table_stride,
                               int num_sms) {
  const int64_t parts = (page_table_stride + kPartPages - 1) / kPartPages;
  return heads / kv_heads <= kSplitRows && parts > 1 &&
         int64_t{sequences} * kv_heads * parts <= kPortableAttentionMaxPieces * num_sms;
}

size_t portable_attention_workspace_bytes(int num_sms) {
  const auto pieces = static_cast<size_t>(kPortableAttentionMaxPieces * num_sms);
  return pieces * (sizeof(int) + kPieceFloats * sizeof(float));
}

int portable_attention(const GenericAttentionArgs& args, void* split_workspace, int num_sms,
                       void* stream) {
  if (args.heads % args.kv_heads || args.heads / args.kv_heads > kRows || args.tiles < 1) {
    return cudaErrorInvalidValue;
  }
  Params params{};
  params.a = args;
  dim3 grid(static_cast<unsigned>(args.tiles), static_cast<unsigned>(args.kv_heads));
  if (split_workspace == nullptr) {
    return args.format == PageFormat::kInt8 ? launch<PageFormat::kInt8, false>(params, grid, stream)
                                            : launch<PageFormat::kF16, false>(params, grid, stream);
  }
  if (!portable_attention_splits(args.heads, args.kv_heads, args.sequences, args.page_table_stride,
                                 num_sms) ||
      args.tiles != args.sequences) {
    return cudaErrorInvalidValue;
  }
  params.counters = static_cast<int*>(split_workspace);
  params.pieces = reinterpret_cast<float*>(params.counters + kPortableAttentionMaxPieces * num_sms);
  params.parts = (args.page_table_stride + kPartPages - 1) / kPartPages;
  grid.z = static_cast<unsigned>(params.parts);
  return args.format == PageFormat::kInt8 ? launch<PageFormat::kInt8, true>(params, grid, stream)
                                          : launch<PageFormat::kF16, true>(params, grid, stream);
}

}  // namespace nibble::cuda
