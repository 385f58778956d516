// K3: decode attention over paged int8 KV: out[b, h] = softmax(q[b, h] K[b, h/4]^T) V[b, h/4], one
// query token per sequence, head_dim 128, 4 query heads per KV head, ragged lengths.
//
// Layout: pages of kv_layout.h; q, out bf16.
// Bytes: 260 per token and KV head (128 + 2 for each of K and V), read once. Flops: 4 * 128 * 4
// heads per token and KV head: tiny, but on CUDA cores int8 conversion and FMA would not keep up,
// so both products run on mma.sync m16n8k16 with the query heads as rows (4 of 16 used).
//
// Work split: the (sequence, KV head, page) list is one line, sequence-major; warp w of all
// resident warps takes [w*P/W, (w+1)*P/W): equal bytes for everyone whatever the lengths. A warp
// streams its pages through its own ring (one 16640-byte bulk copy per page and head) and never
// waits for a neighbour. A (sequence, head) cut by a border belongs to the warp with its first
// page; the others hand over (max, sum, O) in the f32 exchange of linear_common.cuh, merged in
// warp order: run-to-run deterministic for a given batch. NOTE: where the cuts fall depends on the
// whole batch.
//
// No transposes anywhere: the token order inside a page is free, so column g of score tile j is
// token 16*(g/2) + 2*j + g%2: the accumulator layout of the scores then equals operand A of P V
// when a thread reads 16 consecutive tokens of a V^T row. Likewise d inside K: thread t owns d
// 32t..32t+31. int8 -> f16 is one PRMT (1024 + u) and one HADD2 (-1152) per two values, exact. V's
// scale goes into P (times 2^8, so that small probabilities stay normal in f16).
//
// Limits: head_dim 128, 4 heads per KV head, length >= 1; sm_90 (bulk copies).
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "backends/cuda/kernels.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

using namespace kv_layout;

constexpr int kMaxWarps = 6;
constexpr int kMinPages = 6;
constexpr int kPiece = 17 * 16 * 2;  // floats of a warp: (m, l) and 16 pairs of O, for 16 lanes

struct DecodeParams {
  const __nv_bfloat16* q;
  const uint8_t* pages;
  const int* page_table;
  const int* lengths;
  const int* page_starts;
  __nv_bfloat16* out;
  float* pieces;
  int64_t q_stride, out_stride;
  int page_table_stride, sequences, kv_heads;
  float scale_log2;
  const float* out_scale;
};

template <int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 1) decode_kernel(const DecodeParams p) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const uint32_t ring = ptx::smem_address(smem) + warp * kStages * kPairBytes;
  const uint32_t bars =
      ptx::smem_address(smem) + kWarps * kStages * kPairBytes + warp * kStages * 8;

  ptx::grid_launch_dependents();
  if (lane == 0) {
    for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(bars + i * 8, 1);
    ptx::mbarrier_init_fence();
  }
  __syncwarp();
  ptx::grid_dependency_wait();

  const int64_t total = static_cast<int64_t>(p.page_starts[p.sequences]) * p.kv_heads;
  // Short work: at least kMinPages a warp, or the merges cost more than the pages.
  const int num_warps = static_cast<int>(
      max(int64_t{1}, min(static_cast<int64_t>(gridDim.x) * kWarps, total / kMinPages)));
  // Few warps: one per SM first. Many: neighbours in the list are neighbours in a CTA.
  const int me = num_warps < static_cast<int>(gridDim.x) * kWarps ? warp * gridDim.x + blockIdx.x
                                                                  : blockIdx.x * kWarps + warp;
  if (me >= num_warps) return;
  const int begin = static_cast<int>(me * total / num_warps);
  const int end = static_cast<int>((me + 1) * total / num_warps);
  if (begin >= end) return;

  // The sequence whose pages hold list position `at`: page_starts[s] * heads <= at.
  int low = 0, high = p.sequences - 1;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (p.page_starts[mid] * p.kv_heads <= begin)
      low = mid;
    else
      high = mid - 1;
  }

  // Request cursor: position, and the part of the page table this warp holds (one entry a lane).
  const uint64_t policy = ptx::policy_evict_first();
  int ask = begin, ask_sequence = low, ask_head, ask_page, ask_pages, table_base = -1, entry = 0;
  ask_pages = p.page_starts[low + 1] - p.page_starts[low];
  {
    const int in = begin - p.page_starts[low] * p.kv_heads;
    ask_head = in / ask_pages;
    ask_page = in - ask_head * ask_pages;
  }
  auto request = [&](int stage) {
    if (ask >= end) return;
    if (table_base < 0 || ask_page < table_base || ask_page >= table_base + 32) {
      table_base = ask_page;
      const int page = min(ask_page + lane, ask_pages - 1);
      entry = p.page_table[static_cast<int64_t>(ask_sequence) * p.page_table_stride + page];
    }
    const int page = __shfl_sync(0xffffffffu, entry, ask_page - table_base);
    if (lane == 0) {
      ptx::mbarrier_expect(bars + stage * 8, kPairBytes);
      ptx::bulk_load(ring + stage * kPairBytes, p.pages + pair_offset(page, p.kv_heads, ask_head),
                     kPairBytes, bars + stage * 8, policy);
    }
    ++ask;
    if (++ask_page == ask_pages) {
      ask_page = 0;
      if (++ask_head == p.kv_heads) {
        ask_head = 0;
        table_base = -1;
        if (++ask_sequence < p.sequences) {
          ask_pages = p.page_starts[ask_sequence + 1] - p.page_starts[ask_sequence];
        }
      }
    }
  };

  int sequence = ask_sequence, head = ask_head, page = ask_page, pages = ask_pages;
  for (int i = 0; i < kStages; ++i) request(i);

  int stage = 0, phase = 0, at = begin;
  while (at < end) {
    // One (sequence, head), or this warp's part of it.
    const int part_begin = at, part_end = min(end, at + pages - page);
    const bool head_part = page != 0;  // an earlier warp owns it
    const int length = p.lengths[sequence];
    uint32_t q[8][2];
    {
      const bool real = g < 4;
      const __nv_bfloat16* from =
          p.q + sequence * p.q_stride + (head * 4 + (real ? g : 0)) * kHeadDim + t * 32;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + i * 8);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t pair = ptx::pack_f16(ptx::low_bf16(words[j]), ptx::high_bf16(words[j]));
          q[i * 2 + j / 2][j % 2] = real ? pair : 0;
        }
      }
    }
    float o[16][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    float m = -1e30f, l = 0.0f;  // of row g, in log2 units; l is this lane's part

#pragma unroll 1
    for (; at < part_end; ++at, ++page) {
      const uint32_t k_tile = ring + stage * kPairBytes, v_tile = k_tile + kTileBytes;
      ptx::mbarrier_wait(bars + stage * 8, phase);

      float s[8][4];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = 16 * (g >> 1) + 2 * j + (g & 1);
        const uint32_t from = k_tile + row * kHeadDim + t * 32;
        uint32_t w[2][4];
        ptx::load_shared_16(w[0], from + ((g & 1) << 4));
        ptx::load_shared_16(w[1], from + ((1 ^ (g & 1)) << 4));
        s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          uint32_t b0, b1;
          ptx::bytes_to_half(w[i / 4][i % 4], b0, b1);
          const uint32_t a[4] = {q[i][0], 0, q[i][1], 0};
          ptx::mma_f16(s[j], a, b0, b1);
        }
      }

      // Scores of tokens 16t .. 16t+15 (s[j][e] is token 16t + 2j + e), row g.
      uint32_t scales[8];
      {
        uint32_t r[4];
        ptx::load_shared_16(r, k_tile + kScalesOffset + t * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i] = r[i];
        ptx::load_shared_16(r, k_tile + kScalesOffset + t * 32 + 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[4 + i] = r[i];
      }
      const int valid = length - page * kPageTokens - 16 * t;  // tokens of this lane that exist
      float peak = -1e30f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = ptx::unpack_f16(scales[j]);
        s[j][0] = 2 * j < valid ? s[j][0] * (f.x * p.scale_log2) : -1e30f;
        s[j][1] = 2 * j + 1 < valid ? s[j][1] * (f.y * p.scale_log2) : -1e30f;
        peak = fmaxf(peak, fmaxf(s[j][0], s[j][1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      if (__any_sync(0xffffffffu, peak > m)) {
        const float m_new = fmaxf(m, peak), factor = ptx::exp2_fast(m - m_new);
        m = m_new;
        l *= factor;
#pragma unroll
        for (int i = 0; i < 16; ++i) o[i][0] *= factor, o[i][1] *= factor;
      }
      {
        uint32_t r[4];
        ptx::load_shared_16(r, v_tile + kScalesOffset + t * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i] = r[i];
        ptx::load_shared_16(r, v_tile + kScalesOffset + t * 32 + 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[4 + i] = r[i];
      }
      uint32_t prob[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = ptx::unpack_f16(scales[j]);
        const float p0 = ptx::exp2_fast(s[j][0] - m), p1 = ptx::exp2_fast(s[j][1] - m);
        l += p0 + p1;  // 0 for tokens that do not exist
        const float v0 = 2 * j < valid ? p0 * (f.x * 256.0f) : 0.0f;
        const float v1 = 2 * j + 1 < valid ? p1 * (f.y * 256.0f) : 0.0f;
        prob[j] = ptx::pack_f16(v0, v1);
      }
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        uint32_t w[4];
        ptx::load_shared_16(w, v_tile + (n * 8 + g) * kPageTokens + t * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b0, b1;
          ptx::bytes_to_half(w[i], b0, b1);
          const uint32_t a[4] = {prob[2 * i], 0, prob[2 * i + 1], 0};
          ptx::mma_f16(o[n], a, b0, b1);
        }
      }
      __syncwarp();
      request(stage);
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
    l += __shfl_xor_sync(0xffffffffu, l, 1);
    l += __shfl_xor_sync(0xffffffffu, l, 2);

    float* piece = p.pieces + static_cast<int64_t>(me) * kPiece + (lane & 15) * 2;
    if (head_part) {
      if (lane < 16) {
        const float ml[2] = {m, l};
        hand_over(piece, ml);
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          const float pair[2] = {o[n][0], o[n][1]};
          hand_over(piece + (n + 1) * 32, pair);
        }
      }
    } else {
      // Merge what later warps have of this (sequence, head): lanes 0-15 add every second one to
      // this warp's part, lanes 16-31 the ones between; then the halves meet.
      const int whole_end = part_begin + pages;
      const int others_end =
          static_cast<int>((static_cast<int64_t>(whole_end) * num_warps - 1) / total) +
          1;  // first warp past the end
      if (others_end > me + 1) {
        if (lane >= 16) {
          m = -1e30f, l = 0.0f;
#pragma unroll
          for (int n = 0; n < 16; ++n) o[n][0] = o[n][1] = 0.0f;
        }
        for (int other = me + 1 + (lane >> 4); other < others_end; other += 2) {
          float add[34] = {};
          take_over<2, 17>(piece + static_cast<int64_t>(other - me) * kPiece, 32, add);
          const float m_new = fmaxf(m, add[0]);
          const float mine = ptx::exp2_fast(m - m_new), theirs = ptx::exp2_fast(add[0] - m_new);
          m = m_new;
          l = l * mine + add[1] * theirs;
#pragma unroll
          for (int n = 0; n < 16; ++n) {
            o[n][0] = o[n][0] * mine + add[2 * n + 2] * theirs;
            o[n][1] = o[n][1] * mine + add[2 * n + 3] * theirs;
          }
        }
        __syncwarp();
        const float m_other = __shfl_xor_sync(0xffffffffu, m, 16);
        const float l_other = __shfl_xor_sync(0xffffffffu, l, 16);
        const float m_new = fmaxf(m, m_other);
        const float mine = ptx::exp2_fast(m - m_new), theirs = ptx::exp2_fast(m_other - m_new);
        l = l * mine + l_other * theirs;
#pragma unroll
        for (int n = 0; n < 16; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float add = __shfl_xor_sync(0xffffffffu, o[n][e], 16);
            o[n][e] = o[n][e] * mine + add * theirs;
          }
      }
      if (g < 4) {
        const float norm = 1.0f / (256.0f * l);
        __nv_bfloat16* to = p.out + sequence * p.out_stride + (head * 4 + g) * kHeadDim + 2 * t;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          float v0 = o[n][0] * norm, v1 = o[n][1] * norm;
          if (p.out_scale) {
            const float2 scale = *reinterpret_cast<const float2*>(
                p.out_scale + (head * 4 + g) * kHeadDim + n * 8 + 2 * t);
            v0 *= scale.x, v1 *= scale.y;
          }
          *reinterpret_cast<__nv_bfloat162*>(to + n * 8) = __floats2bfloat162_rn(v0, v1);
        }
      }
    }
    __syncwarp();
    if (page == pages) {
      page = 0;
      if (++head == p.kv_heads) {
        head = 0;
        if (++sequence < p.sequences) {
          pages = p.page_starts[sequence + 1] - p.page_starts[sequence];
        }
      }
    }
  }
}

template <int kWarps, int kStages>
int launch(const DecodeAttentionArgs& args, const DecodeParams& params, void* stream) {
  LinearArgs common{};
  common.dependent = args.dependent;
  return launch_linear(decode_kernel<kWarps, kStages>, common, args.num_sms, kWarps * 32,
                       kWarps * kStages * (kPairBytes + 8), stream, 1, params);
}

}  // namespace

size_t decode_attention_workspace_bytes(int num_sms) {
  return static_cast<size_t>(num_sms) * kMaxWarps * kPiece * sizeof(float);
}

int decode_attention(const DecodeAttentionArgs& args, void* stream) {
  const DecodeParams params{.q = static_cast<const __nv_bfloat16*>(args.q),
                            .pages = static_cast<const uint8_t*>(args.pages),
                            .page_table = args.page_table,
                            .lengths = args.lengths,
                            .page_starts = args.page_starts,
                            .out = static_cast<__nv_bfloat16*>(args.out),
                            .pieces = static_cast<float*>(args.workspace),
                            .q_stride = args.q_stride,
                            .out_stride = args.out_stride,
                            .page_table_stride = args.page_table_stride,
                            .sequences = args.sequences,
                            .kv_heads = args.kv_heads,
                            .scale_log2 = args.softmax_scale * 1.44269504f,
                            .out_scale = args.out_scale};
  switch (args.tactic) {
    case 1: return launch<6, 2>(args, params, stream);
    case 2: return launch<3, 4>(args, params, stream);
    default: return launch<4, 3>(args, params, stream);
  }
}

}  // namespace nibble::cuda
