// The sampling op on the device, one CTA per row: bias and penalties, greedy or temperature with
// top_k, top_p and min_p, one Philox draw, log-probabilities. Semantics: ops/sample_operands.h and
// the reference backend.
//
// No sort: the kept ids are a prefix of (logit descending, id ascending), so each filter is a
// threshold on the logit's order-preserving bits plus a count among its equals, found by radix
// descent over four 8-bit digits (of counts for top_k, of weights for top_p). Weights are 2^40
// times exp((logit - best) / temperature) as integers, so that sums do not depend on the order of
// atomics: run-to-run deterministic. The draw walks ids upwards, as the reference does.
// Bytes: about 4 + 8 + 8 passes over 4 to 8 bytes per id, all in L2.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/kernels.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "ops/sample_operands.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kCopyWords = 3 * 256 * 32;
constexpr double kOne = 1099511627776.0;  // 2^40

struct Params {
  SampleBatch batch;
  SampleResult result;
  const float* logits;
  float* adjusted;    // [R, vocab]
  uint64_t* weights;  // [R, vocab]
};

struct Shared {
  uint64_t bins[256];
  uint64_t warp_sums[kWarps];
  double warp_doubles[kWarps];
  uint64_t best[kWarps];
  uint64_t pick;
  uint64_t above;
  int digit;
};

__device__ __forceinline__ uint32_t order_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 counts as 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order_bits(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Philox4x32-10 of ops/sample_rng.h; the first word's upper 24 bits.
__device__ float uniform(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0,
           c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<float>(c0 >> 8) * 0x1p-24f;
}

__device__ uint64_t block_sum(uint64_t v, Shared& s) {
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.warp_sums[threadIdx.x / 32] = v;
  __syncthreads();
  uint64_t total = 0;
  for (int w = 0; w < kWarps; ++w) total += s.warp_sums[w];
  return total;
}
__device__ double block_sum(double v, Shared& s) {
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.warp_doubles[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += s.warp_doubles[w];
  return total;
}
// Of (order bits, id): the largest bits, then the smallest id, among those below `limit`.
__device__ uint64_t block_best(const float* x, int count, uint64_t limit, Shared& s) {
  uint64_t best = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t item =
        uint64_t{order_bits(x[i])} << 32 | (0xffffffffu - static_cast<uint32_t>(i));
    if (item < limit && item > best) best = item;
  }
  for (int offset = 16; offset; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, offset);
    best = other > best ? other : best;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) best = s.best[w] > best ? s.best[w] : best;
  return best;
}
// Exclusive sum over the threads in order.
__device__ uint64_t block_before(uint64_t v, Shared& s) {
  uint64_t sum = v;
  const int lane = threadIdx.x % 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) s.warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  uint64_t before = sum - v;
  for (int w = 0; w < static_cast<int>(threadIdx.x) / 32; ++w) before += s.warp_sums[w];
  return before;
}

// A prefix of (logit descending, id ascending): all keys above `key`, and the first `ties` equal.
struct Prefix {
  uint32_t key;
  uint64_t ties;
};

// The shortest prefix whose mass (measure(i), summed) reaches `target`, over ids with key >= floor.
// Returns the key, and in `above` the mass of the keys above it. Bins are 32-bit counters of 14
// bits of the mass each, one copy a lane: 64-bit shared atomics are loops, and logits share few
// leading bits (measured: 2 ms instead of what the passes cost).
template <typename Measure>
__device__ uint32_t descend(const float* x, int count, uint64_t target, Shared& s, uint64_t& above,
                            Measure measure) {
  extern __shared__ uint32_t copies[];  // [piece 3][bin 256][lane 32]
  const int tid = threadIdx.x, lane = tid % 32;
  uint32_t prefix = 0;
  above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = tid; i < kCopyWords; i += kThreads) copies[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = tid; i < count; i += kThreads) {
      const uint32_t key = order_bits(x[i]);
      if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) {
        const uint64_t mass = measure(i, key);
        uint32_t* bin = copies + (key >> shift & 255) * 32 + lane;
        const auto low = static_cast<uint32_t>(mass) & 0x3fffu;
        const auto middle = static_cast<uint32_t>(mass >> 14) & 0x3fffu;
        const auto high = static_cast<uint32_t>(mass >> 28);
        if (low) atomicAdd(bin, low);
        if (middle) atomicAdd(bin + 8192, middle);
        if (high) atomicAdd(bin + 16384, high);
      }
    }
    __syncthreads();
    if (tid < 256) {
      uint64_t sum = 0;
      for (int c = 0; c < 32; ++c) {
        const uint32_t* at = copies + tid * 32 + (c + tid) % 32;
        sum += at[0] + (static_cast<uint64_t>(at[8192]) << 14) +
               (static_cast<uint64_t>(at[16384]) << 28);
      }
      s.bins[tid] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t sum = above;
      int digit = 255;
      for (; digit > 0; --digit) {
        if (sum + s.bins[digit] >= target) break;
        sum += s.bins[digit];
      }
      s.digit = digit;
      s.above = sum;
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(s.digit) << shift;
    above = s.above;
  }
  return prefix;
}

__device__ int draw(const SampleRow& row, const Params& p, float* x, uint64_t* weights, Shared& s) {
  const int vocab = p.batch.vocab_size;
  const uint64_t best = block_best(x, vocab, ~uint64_t{0}, s);
  const auto best_id = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
  const float best_logit = from_order_bits(static_cast<uint32_t>(best >> 32));
  if (row.temperature <= 0 || best_logit == -INFINITY) return best_id;

  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    weights[i] =
        static_cast<uint64_t>(exp((static_cast<double>(x[i]) - static_cast<double>(best_logit)) /
                                  static_cast<double>(row.temperature)) *
                              kOne);
  }
  __syncthreads();
  Prefix kept{0, ~uint64_t{0}};  // everything
  if (row.top_k > 0 && row.top_k < vocab) {
    uint64_t above;
    kept.key = descend(x, vocab, static_cast<uint64_t>(row.top_k), s, above,
                       [](int, uint32_t) { return uint64_t{1}; });
    kept.ties = static_cast<uint64_t>(row.top_k) - above;
  }
  if (row.top_p < 1.0f) {
    // The total over what top_k kept: equals of its key all weigh the same.
    uint64_t sum = 0, tie = 0;
    for (int i = threadIdx.x; i < vocab; i += kThreads) {
      const uint32_t key = order_bits(x[i]);
      if (key > kept.key) sum += weights[i];
      if (key == kept.key) tie += weights[i];
    }
    sum = block_sum(sum, s);
    tie = block_sum(tie, s);
    const double tie_weight =
        exp((static_cast<double>(from_order_bits(kept.key)) - static_cast<double>(best_logit)) /
            static_cast<double>(row.temperature)) *
        kOne;
    if (kept.ties != ~uint64_t{0}) tie = kept.ties * static_cast<uint64_t>(tie_weight);
    const double wanted = static_cast<double>(row.top_p) * static_cast<double>(sum + tie);
    uint64_t target = static_cast<uint64_t>(ceil(wanted));
    if (target == 0) target = 1;
    const uint32_t floor_key = kept.key;
    uint64_t above;
    const uint32_t key = descend(x, vocab, target, s, above, [&](int i, uint32_t k) {
      return k >= floor_key ? weights[i] : uint64_t{0};
    });
    const uint64_t each = static_cast<uint64_t>(
        exp((static_cast<double>(from_order_bits(key)) - static_cast<double>(best_logit)) /
            static_cast<double>(row.temperature)) *
        kOne);
    uint64_t ties = each ? (target - above + each - 1) / each : 1;
    if (ties == 0) ties = 1;
    if (key > kept.key || (key == kept.key && ties < kept.ties)) kept = {key, ties};
  }

  // Ids upwards: each thread has a contiguous piece.
  const int piece = (vocab + kThreads - 1) / kThreads;
  const int begin = min(vocab, static_cast<int>(threadIdx.x) * piece);
  const int end = min(vocab, begin + piece);
  uint64_t equals = 0;
  for (int i = begin; i < end; ++i) equals += order_bits(x[i]) == kept.key;
  const uint64_t equals_before = block_before(equals, s);
  const double floor_weight = static_cast<double>(row.min_p) * kOne;
  auto mass = [&](int i, uint64_t& rank) -> uint64_t {
    const uint32_t key = order_bits(x[i]);
    if (key < kept.key || (key == kept.key && rank++ >= kept.ties)) return 0;
    if (row.min_p > 0 && i != best_id && static_cast<double>(weights[i]) < floor_weight) return 0;
    return weights[i];
  };
  uint64_t sum = 0, rank = equals_before;
  for (int i = begin; i < end; ++i) sum += mass(i, rank);
  const uint64_t before = block_before(sum, s), total = block_sum(sum, s);
  // target < cumulative, with target = u * total: u has 24 bits, the product may need 81.
  const auto u24 = static_cast<uint64_t>(uniform(row.seed, row.position) * 0x1p24f);
  const uint64_t target = __umul64hi(u24 << 40, total);
  if (threadIdx.x == 0) s.pick = ~uint64_t{0};
  __syncthreads();
  if (before <= target && target < before + sum) {
    uint64_t cumulative = before;
    rank = equals_before;
    for (int i = begin; i < end; ++i) {
      cumulative += mass(i, rank);
      if (target < cumulative) {
        s.pick = static_cast<uint64_t>(i);
        break;
      }
    }
  }
  __syncthreads();
  return s.pick == ~uint64_t{0} ? best_id : static_cast<int>(s.pick);
}

__global__ void __launch_bounds__(kThreads) sample_kernel(const Params p) {
  __shared__ Shared s;
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  const int r = blockIdx.x, vocab = p.batch.vocab_size;
  const SampleRow row = p.batch.rows[r];
  const float* raw = p.logits + static_cast<int64_t>(r) * vocab;
  float* x = p.adjusted + static_cast<int64_t>(r) * vocab;
  int token = row.forced_token;
  if (token < 0) {
    for (int i = threadIdx.x; i < vocab; i += kThreads) x[i] = raw[i];
    __syncthreads();
    for (int i = row.history_begin + static_cast<int>(threadIdx.x); i < row.history_end;
         i += kThreads) {
      const TokenCount seen = p.batch.history[i];
      float logit = x[seen.token];
      logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
      if (seen.output_count > 0) {
        logit -=
            row.presence_penalty + row.frequency_penalty * static_cast<float>(seen.output_count);
      }
      x[seen.token] = logit;
    }
    __syncthreads();
    for (int i = row.bias_begin + static_cast<int>(threadIdx.x); i < row.bias_end; i += kThreads) {
      x[p.batch.bias[i].token] += p.batch.bias[i].bias;
    }
    __syncthreads();
    if (p.batch.allowed) {
      for (int i = threadIdx.x; i < vocab; i += kThreads) {
        if ((p.batch.allowed[i / 64] >> (i % 64) & 1) == 0) x[i] = -INFINITY;
      }
      __syncthreads();
    }
    token = draw(row, p, x, p.weights + static_cast<int64_t>(r) * vocab, s);
  }
  if (threadIdx.x == 0) p.result.tokens[r] = token;
  if (row.num_logprobs < 0) return;

  uint64_t best = block_best(raw, vocab, ~uint64_t{0}, s);
  const float peak = from_order_bits(static_cast<uint32_t>(best >> 32));
  double sum = 0;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    sum += exp(static_cast<double>(raw[i]) - static_cast<double>(peak));
  }
  const double log_sum = static_cast<double>(peak) + log(block_sum(sum, s));
  if (threadIdx.x == 0 && p.result.logprobs) {
    p.result.logprobs[r] = static_cast<float>(static_cast<double>(raw[token]) - log_sum);
  }
  const int wanted = min(min(row.num_logprobs, p.batch.max_logprobs), vocab);
  for (int j = 0; j < p.batch.max_logprobs; ++j) {
    if (j > 0 && j < wanted) best = block_best(raw, vocab, best, s);
    if (threadIdx.x == 0) {
      const int64_t at = static_cast<int64_t>(r) * p.batch.max_logprobs + j;
      const auto id = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
      p.result.top_tokens[at] = j < wanted ? id : -1;
      p.result.top_logprobs[at] =
          j < wanted ? static_cast<float>(static_cast<double>(raw[id]) - log_sum) : -INFINITY;
    }
  }
}

}  // namespace

size_t sample_workspace_bytes(int rows, int vocab) {
  return static_cast<size_t>(rows) * static_cast<size_t>(vocab) *
         (sizeof(float) + sizeof(uint64_t));
}

int sample(const SampleBatch& batch, const float* logits, const SampleResult& result,
           void* workspace, bool dependent, void* stream) {
  if (batch.num_rows < 1) return cudaSuccess;
  auto* weights = static_cast<uint64_t*>(workspace);
  const Params params{.batch = batch,
                      .result = result,
                      .logits = logits,
                      .adjusted = reinterpret_cast<float*>(
                          weights + static_cast<int64_t>(batch.num_rows) * batch.vocab_size),
                      .weights = weights};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(batch.num_rows));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kCopyWords * sizeof(uint32_t);
  const cudaError_t status =
      cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(config.dynamicSmemBytes));
  if (status != cudaSuccess) return status;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, sample_kernel, params);
}

}  // namespace nibble::cuda
