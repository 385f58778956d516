// K5: a decode step's RoPE, append and attention in one launch. Where K3 (attention_decode.cu)
// shares all pages of a batch evenly, this kernel gives a (sequence, KV head) to one CTA, or to a
// cluster where there are few or they are long and uneven (attention_split.h). Shapes and layouts
// are K3's; q, k and v come as the qkv linear left them.
//
// A cluster of CTAs shares the pages of one (sequence, head) evenly; in a CTA four warps share a
// page, 16 tokens each, and eight warps have two pages in work at a time. Pages are requested
// before griddepcontrol.wait: what an earlier step stored cannot change. The last CTA of a cluster
// has the page of the new token: its k and v are rotated, quantized and written to the page in
// memory, and over the copy of the page that was on its way meanwhile. Every warp keeps (max, sum,
// O) of its tokens; they meet in shared memory, then each CTA sends the slices of its sums to their
// owners' shared memory (st.async: the owner's barrier counts the bytes), and an owner adds them in
// rank order: deterministic.
//
// Scores are q K^T as in K3, with 16 tokens instead of 64: column 2t + e of score tile j is token
// 4t + 2j + e. O is V^T P^T, whose operand B the scores' accumulators are: half the registers and
// half the instructions of P V, where 12 of the 16 rows of a product would be no head.
//
// Limits: head_dim 128, 4 heads per KV head, length >= 1; sm_90.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "backends/cuda/attention_split.h"
#include "backends/cuda/digits_layout.h"
#include "backends/cuda/digits_store.cuh"
#include "backends/cuda/kernels.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/kv_quant.cuh"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/rope.cuh"
#include "backends/cuda/x_store.cuh"

namespace nibble::cuda {
namespace {

using namespace kv_layout;

constexpr int kGroup = 4;  // query heads per KV head
constexpr int kOutputs = kGroup * kHeadDim;
constexpr int kPart = 2 * kGroup + kOutputs;  // floats: (max, sum) of each head, then O

struct NewToken {  // as the page wants it
  uint8_t bytes[2][kHeadDim];
  __half scales[2];
};

// How a CTA is made: warps that multiply, four a page; pages in flight; CTAs an SM. The last two
// warps make the new token's k and v, and are two more where there is room.
template <int kMultiply, int kPages, int kCtas>
struct Config {
  static constexpr int kWarps = kMultiply, kStages = kPages, kCtasPerSm = kCtas;
  static constexpr int kSlots = kWarps / 4;  // pages in work at a time
  // Or those who wait for a stage have not all waited for what it held before, and parities lie.
  static_assert(kStages % kSlots == 0, "a stage must always be the same warps' to read");
  static constexpr int kThreads = (kWarps + (kWarps == 8 ? 2 : 0)) * 32;
};

template <int kCluster, typename C>
struct alignas(128) Shared {
  union {
    uint8_t ring[C::kStages][kPairBytes];
    float parts[C::kWarps][kPart];  // when all pages have been read
  };
  // [source][2 kGroup + slice], at most 8 (2 kGroup + kOutputs / 8)
  float inbox[kCluster > 1 ? kPart * 2 : 1];
  alignas(16) float angles[2][kHeadDim / 2];  // cos, sin of the new token
  NewToken token;
  int table[C::kThreads];  // the page table's first entries
  uint64_t bars[C::kStages], inbox_bar;
};

using ptx::high_bf16;
using ptx::low_bf16;
__device__ __forceinline__ void load_shared_8(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}

template <int kCluster, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kCtasPerSm)
    step_kernel(const StepAttentionArgs p) {
  constexpr int kWarps = C::kWarps, kThreads = C::kThreads, kStages = C::kStages;
  constexpr int kTokenWarps = kThreads / 32 - 2;  // the first of the two with the new token
  constexpr int kSlice = kOutputs / kCluster;     // outputs that this CTA writes in the end
  extern __shared__ __align__(128) uint8_t smem[];
  auto& shared = *reinterpret_cast<Shared<kCluster, C>*>(smem);
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
  // What the inbox waits for: from each CTA its sums of the slice, and (max, sum) of each head in
  // it.
  constexpr int kHeadsOfSlice = kSlice > kHeadDim ? kSlice / kHeadDim : 1;
  const uint32_t inbox_bar = ptx::smem_address(&shared.inbox_bar);
  if (tid < kStages) {
    ptx::mbarrier_init(bars + tid * 8, 1);
    ptx::mbarrier_init_fence();
  }
  if (kCluster > 1 && tid == kStages) {
    ptx::mbarrier_init(inbox_bar, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_expect(inbox_bar, kCluster * (4 * kSlice + 8 * kHeadsOfSlice));
  }
  __syncthreads();
  if (tid < min(kStages, count)) request(tid);
  if (const int at = tid - (kThreads - 128); at >= 0) {
    (&shared.angles[0][0])[at] = (at < 64 ? p.cos : p.sin)[int64_t{position} * 64 + at % 64];
  }
  // Thread: outputs 2 tid and 2 tid + 1 of the slice this CTA writes in the end; with few threads
  // also those kStride further on.
  constexpr int kStride = 2 * kThreads;
  constexpr int kPairs = kSlice > kStride ? kSlice / kStride : 1;
  float2 out_scale[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int of_slice = 2 * tid + i * kStride;
    out_scale[i] = p.out_scale && of_slice < kSlice
                       ? *reinterpret_cast<const float2*>(p.out_scale + head * kOutputs +
                                                          rank * kSlice + of_slice)
                       : make_float2(1.0f, 1.0f);
  }
  __syncthreads();
  if constexpr (kCluster > 1) ptx::cluster_sync();  // its inboxes exist from here on
  ptx::grid_dependency_wait();

  const auto* qkv = static_cast<const __nv_bfloat16*>(p.qkv) + sequence * p.qkv_stride;
  if (rank == kCluster - 1 && warp >= kTokenWarps) {
    // The new token's k, and its v. Lane l has d 2l, 2l + 1 and their partners 64 on.
    const bool is_v = warp > kTokenWarps;
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
      q[i / 2][i % 2] = real ? ptx::pack_f16(low_bf16(rounded), high_bf16(rounded)) : 0;
    }
  }
  __syncthreads();  // the new token's bytes

  const float scale_log2 = p.softmax_scale * 1.44269504f;
  const int slot = warp >> 2, quarter = warp & 3;  // of them; of the page
  float o[8][4];  // d 16 n + g and 8 more, heads 2t and 2t + 1 (t < 2)
#pragma unroll
  for (int n = 0; n < 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
  float m = -1e30f, l = 0.0f;  // of row g, in log2 units; l is this lane's part

#pragma unroll 1
  for (int i = slot; warp < kWarps && i < count; i += C::kSlots) {
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
        const float2 f = ptx::unpack_f16(k_scales[j]);
        s[j][0] = 2 * j < valid ? s[j][0] * (f.x * scale_log2) : -1e30f;
        s[j][1] = 2 * j + 1 < valid ? s[j][1] * (f.y * scale_log2) : -1e30f;
        peak = fmaxf(peak, fmaxf(s[j][0], s[j][1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      const float m_new = fmaxf(m, peak), factor = ptx::exp2_fast(m - m_new);
      m = m_new;
      l *= factor;
      const float factors[2] = {__shfl_sync(0xffffffffu, factor, 8 * t),
                                __shfl_sync(0xffffffffu, factor, 8 * t + 4)};
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= factors[i & 1];
      uint32_t prob[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 f = ptx::unpack_f16(v_scales[j]);
        const float p0 = ptx::exp2_fast(s[j][0] - m), p1 = ptx::exp2_fast(s[j][1] - m);
        l += p0 + p1;  // 0 for tokens that do not exist
        // Times 2^8, so that small probabilities stay normal in f16.
        const float v0 = 2 * j < valid ? p0 * (f.x * 256.0f) : 0.0f;
        const float v1 = 2 * j + 1 < valid ? p1 * (f.y * 256.0f) : 0.0f;
        prob[j] = ptx::pack_f16(v0, v1);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const uint32_t from = v_tile + (n * 16 + g) * kPageTokens + 16 * quarter + 4 * t;
        uint32_t a[4];
        ptx::bytes_to_half(ptx::load_shared_4(from), a[0], a[2]);
        ptx::bytes_to_half(ptx::load_shared_4(from + 8 * kPageTokens), a[1], a[3]);
        ptx::mma_f16(o[n], a, prob[0], prob[1]);
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
  __syncthreads();  // the pages have been read
  if (warp < kWarps) {
    float* part = shared.parts[warp];
    if (g < kGroup && t == 0) part[2 * g] = m, part[2 * g + 1] = l;
    if (t < kGroup / 2) {
      float* to = part + 2 * kGroup + 2 * t * kHeadDim + g;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[n * 16 + (i & 1) * kHeadDim + (i >> 1) * 8] = o[n][i];
    }
  }
  __syncthreads();
  // The CTA's (max, sum, O) of outputs `at` and at + 1, or of all ranks' entries: the same sums.
  struct Sums {
    float peak, total, first, second;
  };
  auto add_up = [](const float* entry, int stride, auto count, int of_head, int at) {
    Sums s{-1e30f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      s.peak = fmaxf(s.peak, entry[i * stride + 2 * of_head]);
    }
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      const float* from = entry + i * stride;
      const float factor = ptx::exp2_fast(from[2 * of_head] - s.peak);
      const float2 v = *reinterpret_cast<const float2*>(from + 2 * kGroup + at);
      s.total = fmaf(from[2 * of_head + 1], factor, s.total);
      s.first = fmaf(v.x, factor, s.first);
      s.second = fmaf(v.y, factor, s.second);
    }
    return s;
  };
  auto store = [&](int of_slice, const Sums& s, float2 scale) {
    const float norm = 1.0f / (256.0f * s.total);
    const __nv_bfloat162 pair =
        __floats2bfloat162_rn(s.first * norm * scale.x, s.second * norm * scale.y);
    *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) +
                                       sequence * p.out_stride + head * kOutputs + rank * kSlice +
                                       of_slice) = pair;
    return pair;
  };
  // The slice once more as the next linear reads it. A head is one CTA's, or no scale could be had.
  static_assert(sizeof shared.parts <= (kStages - 1) * kPairBytes);
  auto* outputs = reinterpret_cast<__nv_bfloat162*>(shared.ring[kStages - 1]);  // behind the parts
  auto round_slice = [&] {
    __syncthreads();
    auto* rounded = static_cast<uint8_t*>(p.rounded);
    const int64_t features = int64_t{kGroup} * p.kv_heads * kHeadDim;
    const int first_head = head * kGroup + rank * (kSlice / kHeadDim);
    const auto* from = reinterpret_cast<const uint4*>(outputs);
    if (p.sequences <= kDigitTokens) {
      if (tid >= kSlice / 8) return;  // 8 channels a thread
      float v[8];
      unpack_eight(v, from[tid]);
      store_digits(rounded, cuda_digits::Shape{p.sequences, features}, sequence,
                   first_head + tid / 16, tid & 15, v, true);
    } else {
      if (tid >= kSlice / 16) return;  // 16 channels a thread
      float v[16];
      unpack_bf16(v, from[tid * 2], from[tid * 2 + 1]);
      store_group(rounded, cuda_x::Shape{p.sequences, features}, sequence, first_head + tid / 8,
                  tid & 7, v, true);
    }
  };
  using Warps = std::integral_constant<int, kWarps>;
  if constexpr (kCluster == 1) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int at = 2 * tid + i * kStride;
      if (at < kOutputs) {
        outputs[at / 2] =
            store(at, add_up(shared.parts[0], kPart, Warps{}, at / kHeadDim, at), out_scale[i]);
      }
    }
    if (p.rounded) round_slice();
  } else {
    // To the owner of the slice: outputs [rank * kSlice, (rank + 1) * kSlice).
    constexpr int kEntry = 2 * kGroup + kSlice;
    static_assert(kCluster * kEntry <= 2 * kPart && kStride >= kSlice);
#pragma unroll
    for (int at = 2 * tid; at < kOutputs; at += kStride) {
      const Sums s = add_up(shared.parts[0], kPart, Warps{}, at / kHeadDim, at);
      const uint32_t mine = ptx::smem_address(shared.inbox) + rank * kEntry * 4;
      const uint32_t theirs = ptx::cluster_address(mine, at / kSlice);
      const uint32_t bar = ptx::cluster_address(inbox_bar, at / kSlice);
      ptx::store_async(theirs + (2 * kGroup + at % kSlice) * 4, ptx::pair_bits(s.first, s.second),
                       bar);
      if (at % kSlice == 0 || at % kHeadDim == 0) {
        ptx::store_async(theirs + 2 * (at / kHeadDim) * 4, ptx::pair_bits(s.peak, s.total), bar);
      }
    }
    ptx::mbarrier_wait(inbox_bar, 0);
    if (const int at = 2 * tid; at < kSlice) {
      using Ranks = std::integral_constant<int, kCluster>;
      outputs[tid] =
          store(at, add_up(shared.inbox, kEntry, Ranks{}, (rank * kSlice + at) / kHeadDim, at),
                out_scale[0]);
    }
    if constexpr (kSlice >= kHeadDim) {
      if (p.rounded) round_slice();
    }
  }
}

template <int kCluster, typename C>
int launch(const StepAttentionArgs& args, void* stream) {
  LinearArgs common{};
  common.dependent = args.dependent;
  return launch_linear(step_kernel<kCluster, C>, common, args.sequences * args.kv_heads * kCluster,
                       C::kThreads, sizeof(Shared<kCluster, C>), stream, kCluster, args);
}

}  // namespace

bool step_attention_rounds(int sequences, int kv_heads, int num_sms) {
  return sequences <= cuda_x::kSlabTokens && sequences * kv_heads * 2 > num_sms;
}

int step_attention(const StepAttentionArgs& args, void* stream) {
  if (args.rounded && !step_attention_rounds(args.sequences, args.kv_heads, args.num_sms)) {
    return cudaErrorInvalidValue;
  }
  // A CTA has an SM, as far as there are pages to share. NOTE: its shared memory keeps a second one
  // away: with room for two, 128 CTAs met on fewer SMs (16 x 5600 tokens 65.5 -> 70.6 us).
  using Alone = Config<8, 8, 1>;
  using Four = Config<4, 3, 4>;
  const int items = args.sequences * args.kv_heads;
  const int split = args.split
                        ? args.split
                        : step_attention_split(args.sequences, args.kv_heads,
                                               args.page_table_stride, args.uneven, args.num_sms);
  if (items * split <= args.num_sms) {
    switch (split) {
      case 1: return launch<1, Alone>(args, stream);
      case 2: return launch<2, Alone>(args, stream);
      case 4: return launch<4, Alone>(args, stream);
      case 8: return launch<8, Alone>(args, stream);
    }
  }
  switch (split) {
    case 1:
      return items <= 2 * args.num_sms ? launch<1, Config<8, 4, 2>>(args, stream)
                                       : launch<1, Four>(args, stream);
    case 2: return launch<2, Four>(args, stream);
    case 4: return launch<4, Four>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
