// K5: a decode step's RoPE, append and attention in one launch. Where K3 (attention_decode.cu)
// shares all pages of a batch evenly, this kernel gives a (sequence, KV head) to one CTA, or to a
// cluster where there are few. Shapes and layouts are K3's; q, k and v come as the qkv linear left
// them.
//
// A cluster of CTAs shares the pages of one (sequence, head) evenly; in a CTA four warps share a
// page, 16 tokens each, and two pages are in work at a time. Pages are requested before
// griddepcontrol.wait: what an earlier step stored cannot change. The last CTA of a cluster has the
// page of the new token: its k and v are rotated, quantized and written to the page in memory, and
// over the copy of the page that was on its way meanwhile. Every warp keeps (max, sum, O) of its
// tokens; they meet in shared memory, then each CTA sends the slices of its sums to their owners'
// shared memory, and an owner adds them in rank order: deterministic, and one cluster barrier.
//
// The fragments are K3's with 16 tokens instead of 64: column 2t + e of score tile j is token
// 4t + 2j + e, so that the scores' accumulators are operand A of P V.
//
// Limits: head_dim 128, 4 heads per KV head, length >= 1; sm_90.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "backends/cuda/kernels.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/kv_quant.cuh"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/rope.cuh"

namespace nibble::cuda {
namespace {

using namespace kv_layout;

constexpr int kWarps = 8, kThreads = (kWarps + 2) * 32;  // two more for the new token's k and v
constexpr int kGroup = 4;                                // query heads per KV head
constexpr int kOutputs = kGroup * kHeadDim;
constexpr int kPart = 2 * kGroup + kOutputs;  // floats: (max, sum) of each head, then O

struct NewToken {  // as the page wants it
  uint8_t bytes[2][kHeadDim];
  __half scales[2];
};

template <int kStages>
struct alignas(128) Shared {
  uint8_t ring[kStages][kPairBytes];
  float parts[kWarps][kPart];
  float inbox[kPart * 2];  // [source][2 kGroup + slice], at most 8 (2 kGroup + kOutputs / 8)
  alignas(16) float angles[2][kHeadDim / 2];  // cos, sin of the new token
  NewToken token;
  int table[kThreads];  // the page table's first entries
  uint64_t bars[kStages];
};

using ptx::high_bf16;
using ptx::low_bf16;
__device__ __forceinline__ uint32_t half2_bits(__half2 h) {
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ __forceinline__ float2 half2_floats(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ void load_shared_8(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}

// kStages: pages in flight.
template <int kCluster, int kStages>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const StepAttentionArgs p) {
  extern __shared__ __align__(128) uint8_t smem[];
  auto& shared = *reinterpret_cast<Shared<kStages>*>(smem);
  const int tid = threadIdx.x, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int rank = blockIdx.x % kCluster, item = blockIdx.x / kCluster;
  const int sequence = item / p.kv_heads, head = item % p.kv_heads;
  const uint32_t ring = ptx::smem_address(shared.ring), bars = ptx::smem_address(shared.bars);

  ptx::grid_launch_dependents();
  // Length and table in one trip to L2, pages and angles in the next: every trip is 0.6 us here.
  const int* table = p.page_table + static_cast<int64_t>(sequence) * p.page_table_stride;
  if (tid < p.page_table_stride) shared.table[tid] = table[tid];
  const int length = p.lengths[sequence], position = length - 1;
  const int pages = (length + kPageTokens - 1) / kPageTokens;
  const int begin = rank * pages / kCluster, count = (rank + 1) * pages / kCluster - begin;
  auto page_offset = [&](int i) {
    i += begin;
    return pair_offset(i < kThreads ? shared.table[i] : table[i], p.kv_heads, head);
  };
  auto request = [&](int i) {
    const int stage = i % kStages;
    ptx::mbarrier_expect(bars + stage * 8, kPairBytes);
    ptx::bulk_load(ring + stage * kPairBytes, static_cast<const uint8_t*>(p.pages) + page_offset(i),
                   kPairBytes, bars + stage * 8, ptx::policy_evict_first());
  };
  if (tid < kStages) {
    ptx::mbarrier_init(bars + tid * 8, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (tid < min(kStages, count)) request(tid);
  if (tid >= 64 && tid < 192) {
    const int at = tid - 64;
    (&shared.angles[0][0])[at] = (at < 64 ? p.cos : p.sin)[int64_t{position} * 64 + at % 64];
  }
  // Thread: outputs 2 tid and 2 tid + 1 of the slice this CTA writes in the end.
  constexpr int kSlice = kOutputs / kCluster;
  const int output = rank * kSlice + 2 * tid;
  float2 out_scale = make_float2(1.0f, 1.0f);
  if (p.out_scale && 2 * tid < kSlice) {
    out_scale = *reinterpret_cast<const float2*>(p.out_scale + head * kOutputs + output);
  }
  __syncthreads();
  if constexpr (kCluster > 1) ptx::cluster_sync();  // its inboxes exist from here on
  ptx::grid_dependency_wait();

  const auto* qkv = static_cast<const __nv_bfloat16*>(p.qkv) + sequence * p.qkv_stride;
  if (rank == kCluster - 1 && warp >= kWarps) {
    // The new token's k, and its v. Lane l has d 2l, 2l + 1 and their partners 64 on.
    const bool is_v = warp > kWarps;
    const auto* from =
        reinterpret_cast<const uint32_t*>(qkv + ((is_v ? 5 : 4) * p.kv_heads + head) * kHeadDim) +
        lane;
    const uint32_t first = from[0], second = from[32];
    float x[4] = {low_bf16(first), high_bf16(first), low_bf16(second), high_bf16(second)};
    if (!is_v) {
      const float2 c = reinterpret_cast<const float2*>(shared.angles[0])[lane];
      const float2 s = reinterpret_cast<const float2*>(shared.angles[1])[lane];
      const float a0 = x[0], a1 = x[1];
      x[0] = ptx::rope_first(a0, x[2], c.x, s.x);
      x[1] = ptx::rope_first(a1, x[3], c.y, s.y);
      x[2] = ptx::rope_second(a0, x[2], c.x, s.x);
      x[3] = ptx::rope_second(a1, x[3], c.y, s.y);
    }
    uint32_t u[4];
    const __half scale = quantize_head(x, is_v ? p.v_scale : p.k_scale, u);
    const int row = position % kPageTokens;
    uint8_t* pair = static_cast<uint8_t*>(p.pages) + page_offset(count - 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = 2 * lane + (i & 1) + 64 * (i >> 1);
      shared.token.bytes[is_v][d] = static_cast<uint8_t>(u[i]);
      if (is_v) pair[v_byte(row, d)] = static_cast<uint8_t>(u[i]);
    }
    if (!is_v) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<uint16_t*>(pair + k_byte(row, 2 * lane + 64 * i)) =
            static_cast<uint16_t>(u[2 * i] | u[2 * i + 1] << 8);
      }
    }
    if (lane == 0) {
      shared.token.scales[is_v] = scale;
      *reinterpret_cast<__half*>(pair + (is_v ? v_scale_byte(row) : k_scale_byte(row))) = scale;
    }
  }

  // q, rotated and rounded to bf16 as rope_store_kv leaves it, then f16.
  uint32_t q[8][2];
  if (warp < kWarps) {
    const bool real = g < kGroup;
    const auto* from =
        reinterpret_cast<const uint4*>(qkv + (head * kGroup + (real ? g : 0)) * kHeadDim + t * 32);
    uint32_t words[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = from[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, words[i], 2);  // 64 on or back
      const float2 c = *reinterpret_cast<const float2*>(&shared.angles[0][32 * (t & 1) + 2 * i]);
      const float2 s = *reinterpret_cast<const float2*>(&shared.angles[1][32 * (t & 1) + 2 * i]);
      const bool second = t >= 2;
      const float a0 = second ? ptx::rope_second(low_bf16(other), low_bf16(words[i]), c.x, s.x)
                              : ptx::rope_first(low_bf16(words[i]), low_bf16(other), c.x, s.x);
      const float a1 = second ? ptx::rope_second(high_bf16(other), high_bf16(words[i]), c.y, s.y)
                              : ptx::rope_first(high_bf16(words[i]), high_bf16(other), c.y, s.y);
      const uint32_t rounded = ptx::pack_bf16(a0, a1);
      q[i / 2][i % 2] =
          real ? half2_bits(__floats2half2_rn(low_bf16(rounded), high_bf16(rounded))) : 0;
    }
  }
  __syncthreads();  // the new token's bytes

  const float scale_log2 = p.softmax_scale * 1.44269504f;
  const int slot = warp >> 2, quarter = warp & 3;  // of the two pages in work; of the page
  float o[16][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
  float m = -1e30f, l = 0.0f;  // of row g, in log2 units; l is this lane's part

#pragma unroll 1
  for (int i = slot; warp < kWarps && i < count; i += 2) {
    const int stage = i % kStages, first_token = (begin + i) * kPageTokens + 16 * quarter;
    const uint32_t k_tile = ring + stage * kPairBytes, v_tile = k_tile + kTileBytes;
    ptx::mbarrier_wait(bars + stage * 8, i / kStages & 1);
    if (position >= first_token && position < first_token + 16) {  // this warp alone reads it
      uint8_t* pair = shared.ring[stage];
      const int row = position % kPageTokens;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int d = lane + 32 * j;
        pair[k_byte(row, d)] = shared.token.bytes[0][d];
        pair[v_byte(row, d)] = shared.token.bytes[1][d];
      }
      if (lane < 2) {
        *reinterpret_cast<__half*>(pair + (lane ? v_scale_byte(row) : k_scale_byte(row))) =
            shared.token.scales[lane];
      }
      __syncwarp();
    }
    if (first_token < length) {
      float s[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 16 * quarter + 4 * (g >> 1) + 2 * j + (g & 1);
        const uint32_t from = k_tile + row * kHeadDim + t * 32;
        uint32_t w[2][4];
        ptx::load_shared_16(w[0], from + ((g & 1) << 4));
        ptx::load_shared_16(w[1], from + ((1 ^ (g & 1)) << 4));
        s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          uint32_t b0, b1;
          ptx::bytes_to_half(w[k / 4][k % 4], b0, b1);
          const uint32_t a[4] = {q[k][0], 0, q[k][1], 0};
          ptx::mma_f16(s[j], a, b0, b1);
        }
      }
      const int valid = length - first_token - 4 * t;  // tokens of this lane that exist
      uint32_t k_scales[2], v_scales[2];
      load_shared_8(k_scales, k_tile + k_scale_byte(16 * quarter + 4 * t));
      load_shared_8(v_scales, k_tile + v_scale_byte(16 * quarter + 4 * t));
      float peak = -1e30f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 f = half2_floats(k_scales[j]);
        s[j][0] = 2 * j < valid ? s[j][0] * (f.x * scale_log2) : -1e30f;
        s[j][1] = 2 * j + 1 < valid ? s[j][1] * (f.y * scale_log2) : -1e30f;
        peak = fmaxf(peak, fmaxf(s[j][0], s[j][1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      const float m_new = fmaxf(m, peak), factor = ptx::exp2_fast(m - m_new);
      m = m_new;
      l *= factor;
#pragma unroll
      for (int n = 0; n < 16; ++n) o[n][0] *= factor, o[n][1] *= factor;
      uint32_t prob[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 f = half2_floats(v_scales[j]);
        const float p0 = ptx::exp2_fast(s[j][0] - m), p1 = ptx::exp2_fast(s[j][1] - m);
        l += p0 + p1;  // 0 for tokens that do not exist
        // Times 2^8, so that small probabilities stay normal in f16.
        const float v0 = 2 * j < valid ? p0 * (f.x * 256.0f) : 0.0f;
        const float v1 = 2 * j + 1 < valid ? p1 * (f.y * 256.0f) : 0.0f;
        prob[j] = half2_bits(__floats2half2_rn(v0, v1));
      }
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const uint32_t w =
            ptx::load_shared_4(v_tile + (n * 8 + g) * kPageTokens + 16 * quarter + 4 * t);
        uint32_t b0, b1;
        ptx::bytes_to_half(w, b0, b1);
        const uint32_t a[4] = {prob[0], 0, prob[1], 0};
        ptx::mma_f16(o[n], a, b0, b1);
      }
    }
    if (i + kStages < count) {
      ptx::named_barrier(1 + slot, 128);  // the page's four warps are done with it
      if (quarter == 0 && lane == 0) request(i + kStages);
    }
  }

  // This CTA's sums.
  l += __shfl_xor_sync(0xffffffffu, l, 1);
  l += __shfl_xor_sync(0xffffffffu, l, 2);
  if (g < kGroup && warp < kWarps) {
    float* part = shared.parts[warp];
    if (t == 0) part[2 * g] = m, part[2 * g + 1] = l;
    float2* to = reinterpret_cast<float2*>(part + 2 * kGroup + g * kHeadDim) + t;
#pragma unroll
    for (int n = 0; n < 16; ++n) to[n * 4] = make_float2(o[n][0], o[n][1]);
  }
  __syncthreads();
  // Thread: outputs 2 tid and 2 tid + 1, of head tid / 64. The last two warps have none.
  const bool has_outputs = 2 * tid < kOutputs;
  const int of_head = has_outputs ? tid >> 6 : 0;
  float peak = -1e30f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, shared.parts[w][2 * of_head]);
  float total = 0.0f, sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float factor = ptx::exp2_fast(shared.parts[w][2 * of_head] - peak);
    const float2 v =
        *reinterpret_cast<const float2*>(shared.parts[w] + 2 * kGroup + 2 * tid % kOutputs);
    total = fmaf(shared.parts[w][2 * of_head + 1], factor, total);
    sum0 = fmaf(v.x, factor, sum0);
    sum1 = fmaf(v.y, factor, sum1);
  }
  if constexpr (kCluster > 1) {
    // To the owner of the slice: outputs [rank * kSlice, (rank + 1) * kSlice).
    constexpr int kEntry = 2 * kGroup + kSlice;
    static_assert(kCluster * kEntry <= 2 * kPart);
    if (has_outputs) {
      const int owner = 2 * tid / kSlice;
      const uint32_t mine = ptx::smem_address(shared.inbox) + rank * kEntry * 4;
      const uint32_t theirs = ptx::cluster_address(mine, owner);
      ptx::store_cluster_f32x2(theirs + (2 * kGroup + 2 * tid % kSlice) * 4, sum0, sum1);
      if (2 * tid % kSlice == 0 || tid % 64 == 0) {
        ptx::store_cluster_f32x2(theirs + 2 * of_head * 4, peak, total);
      }
    }
    ptx::cluster_sync();
    if (2 * tid >= kSlice) return;
    const int out_head = output / kHeadDim;
    peak = -1e30f;
#pragma unroll
    for (int r = 0; r < kCluster; ++r) {
      peak = fmaxf(peak, shared.inbox[r * kEntry + 2 * out_head]);
    }
    total = sum0 = sum1 = 0.0f;
#pragma unroll
    for (int r = 0; r < kCluster; ++r) {
      const float* entry = shared.inbox + r * kEntry;
      const float factor = ptx::exp2_fast(entry[2 * out_head] - peak);
      const float2 v = *reinterpret_cast<const float2*>(entry + 2 * kGroup + 2 * tid);
      total = fmaf(entry[2 * out_head + 1], factor, total);
      sum0 = fmaf(v.x, factor, sum0);
      sum1 = fmaf(v.y, factor, sum1);
    }
  }
  if (!has_outputs) return;
  const float norm = 1.0f / (256.0f * total);
  const float v0 = sum0 * norm * out_scale.x, v1 = sum1 * norm * out_scale.y;
  *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) + sequence * p.out_stride +
                                     head * kOutputs + output) = __floats2bfloat162_rn(v0, v1);
}

template <int kCluster, int kStages>
int launch(const StepAttentionArgs& args, void* stream) {
  LinearArgs common{};
  common.dependent = args.dependent;
  return launch_linear(step_kernel<kCluster, kStages>, common,
                       args.sequences * args.kv_heads * kCluster, kThreads, sizeof(Shared<kStages>),
                       stream, kCluster, args);
}

}  // namespace

int step_attention(const StepAttentionArgs& args, void* stream) {
  const int items = args.sequences * args.kv_heads;
  // At most one CTA an SM, as far as there are pages to share.
  if (items * 8 <= args.num_sms) return launch<8, 6>(args, stream);
  if (items * 4 <= args.num_sms) return launch<4, 6>(args, stream);
  if (items * 2 <= args.num_sms) return launch<2, 6>(args, stream);
  return launch<1, 4>(args, stream);  // two CTAs an SM
}

}  // namespace nibble::cuda
