// The sampling op on the device, a cluster of eight CTAs per row: bias and penalties, greedy or
// temperature with top_k, top_p and min_p, one Philox draw, log-probabilities. Semantics:
// ops/sample_operands.h and the reference backend.
//
// A CTA keeps an eighth of the row's logits in shared memory and walks only those; what the eight
// find meets in distributed shared memory, one cluster barrier a reduction. No sort: the kept ids
// are a prefix of (logit descending, id ascending), so each filter is a threshold on the logit's
// order-preserving bits plus a count among its equals, found by radix descent over digits (of
// counts for top_k, of weights for top_p). Weights are 2^40 times exp((logit - best) / temperature)
// as integers, so that sums do not depend on the order of atomics: run-to-run deterministic. The
// draw walks ids upwards, as the reference does.
//
// The portable variant knows no clusters: one CTA a row, its logits in the workspace (L2).
//
// Limits: vocab <= 8 * kMaxSlice on sm_90.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/kernels.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/variant.h"
#include "ops/sample_operands.h"

namespace nibble::cuda {
namespace {

constexpr int kCluster = kPortable ? 1 : 8, kThreads = kPortable ? 1024 : 512,
              kWarps = kThreads / 32;
constexpr int kMaxSlice = kPortable ? 1 << 22 : 48 << 10;  // ids of one CTA
// Digits of a descent: wide for counts, narrow for weights, which need three counters a bin.
constexpr int kCountBits = 8, kWeightBits = 6;
constexpr int kBins = 1 << kCountBits, kCopyWords = kBins * 32;
static_assert(3 * (1 << kWeightBits) <= kBins);
constexpr double kOne = 1099511627776.0;  // 2^40

struct Params {
  SampleBatch batch;
  SampleResult result;
  const float* logits;
  uint64_t* weights;  // [R, vocab]
  int slice;          // ids of one CTA
  float* adjusted;    // [R, vocab], portable only: what sm_90 keeps in shared memory
};

struct Shared {
  uint32_t copies[kCopyWords];  // [14 bits of a mass each][bin][lane]: counters, one copy a lane
  uint64_t sent[2][kBins];      // read by the neighbours: every second exchange uses one half
  uint64_t warp_values[kWarps];
  uint64_t total;
  uint64_t bins[kBins];
  uint64_t above;
  int digit;
  int pick;
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

struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct SumOfDoubles {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const {
    return __double_as_longlong(__longlong_as_double(a) + __longlong_as_double(b));
  }
};
struct Max {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// All threads of the row's CTAs.
__device__ __forceinline__ void row_sync() {
  if constexpr (kPortable) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
}

// A prefix of (logit descending, id ascending): all keys above `key`, and the first `ties` equal.
struct Prefix {
  uint32_t key;
  uint64_t ties;
};

// One CTA's part of a row.
struct Slice {
  Shared& s;
  float* x;           // logits of ids first ..., in shared memory on sm_90
  uint64_t* weights;  // device memory, of the same ids
  int rank, first, count;
  int exchanges = 0;

  __device__ const uint64_t* of_rank(const uint64_t* place, int other) const {
    if constexpr (kPortable) {
      return place;
    } else {
      uint64_t generic;
      asm("mapa.u64 %0, %1, %2;" : "=l"(generic) : "l"(place), "r"(other));
      return reinterpret_cast<const uint64_t*>(generic);
    }
  }

  // Over all threads of the cluster, in an order that does not change.
  template <typename Op>
  __device__ uint64_t reduce(uint64_t v, Op op) {
    const int tid = threadIdx.x;
    uint64_t* sent = s.sent[exchanges++ & 1];
    for (int offset = 16; offset; offset /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
    if (tid % 32 == 0) s.warp_values[tid / 32] = v;
    __syncthreads();
    if (tid == 0) {
      uint64_t total = s.warp_values[0];
      for (int w = 1; w < kWarps; ++w) total = op(total, s.warp_values[w]);
      *sent = total;
    }
    row_sync();
    if (tid < 32) {
      v = *of_rank(sent, tid % kCluster);
      for (int offset = kCluster / 2; offset; offset /= 2) {
        v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
      }
      if (tid == 0) s.total = v;
    }
    __syncthreads();
    return s.total;
  }

  // Sum over the warps before this one, in order of ids; `v` is the whole warp's.
  __device__ uint64_t before(uint64_t v) {
    const int tid = threadIdx.x;
    uint64_t* sent = s.sent[exchanges++ & 1];
    if (tid % 32 == 0) s.warp_values[tid / 32] = v;
    __syncthreads();
    uint64_t in_cta = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < tid / 32) in_cta += s.warp_values[w];
      all += s.warp_values[w];
    }
    if (tid == 0) *sent = all;
    row_sync();
    if (tid < 32) {
      v = tid < rank ? *of_rank(sent, tid) : 0;
      for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
      if (tid == 0) s.total = v;
    }
    __syncthreads();
    return s.total + in_cta;
  }

  // Of (order bits, id): the largest bits, then the smallest id, among those below `limit`.
  __device__ uint64_t best(uint64_t limit) {
    uint64_t found = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t item =
          uint64_t{order_bits(x[i])} << 32 | (0xffffffffu - static_cast<uint32_t>(first + i));
      if (item < limit && item > found) found = item;
    }
    return reduce(found, Max());
  }

  // The shortest prefix whose mass (measure(i, key), summed) reaches `target`: returns its key, and
  // in `above` the mass of the keys above it. 64-bit shared atomics are loops, and logits share few
  // leading bits: hence the 32-bit counters.
  template <int kBits, typename Measure>
  __device__ uint32_t descend(uint64_t target, uint64_t& above, Measure measure) {
    constexpr int kDigits = 1 << kBits, kPieces = kBits == kCountBits ? 1 : 3;
    const int tid = threadIdx.x, lane = tid % 32;
    uint32_t prefix = 0;
    above = 0;
    int decided = 0;
    while (decided < 32) {
      const int bits = min(kBits, 32 - decided), shift = 32 - decided - bits;
      for (int i = tid; i < kPieces * kDigits * 32; i += kThreads) s.copies[i] = 0;
      __syncthreads();
      for (int i = tid; i < count; i += kThreads) {
        const uint32_t key = order_bits(x[i]);
        if (decided > 0 && key >> (32 - decided) != prefix >> (32 - decided)) continue;
        const uint64_t mass = measure(i, key);
        uint32_t* bin = s.copies + (key >> shift & ((1u << bits) - 1)) * 32 + lane;
        if constexpr (kPieces == 1) {
          if (mass) atomicAdd(bin, 1u);
          continue;
        }
        const auto low = static_cast<uint32_t>(mass) & 0x3fffu;
        const auto middle = static_cast<uint32_t>(mass >> 14) & 0x3fffu;
        const auto high = static_cast<uint32_t>(mass >> 28);
        if (low) atomicAdd(bin, low);
        if (middle) atomicAdd(bin + kDigits * 32, middle);
        if (high) atomicAdd(bin + 2 * kDigits * 32, high);
      }
      __syncthreads();
      uint64_t* sent = s.sent[exchanges++ & 1];
      {
        constexpr int kPer = kThreads / kDigits, kOf = 32 / kPer;  // threads a bin; copies a thread
        const int bin = tid / kPer;
        uint64_t sum = 0;
        for (int c = 0; c < kOf; ++c) {
          const uint32_t* at = s.copies + bin * 32 + (tid % kPer * kOf + c + bin) % 32;
          for (int piece = 0; piece < kPieces; ++piece) {
            sum += uint64_t{at[piece * kDigits * 32]} << (14 * piece);
          }
        }
        for (int offset = kPer / 2; offset; offset /= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if (tid % kPer == 0) sent[bin] = sum;
      }
      row_sync();
      if (tid < kDigits) {
        uint64_t sum = 0;
#pragma unroll
        for (int r = 0; r < kCluster; ++r) sum += of_rank(sent, r)[tid];
        s.bins[tid] = sum;
      }
      __syncthreads();
      if (tid < 32) {
        // From the top: a lane has kEach bins in a row.
        constexpr int kEach = kDigits / 32;
        const uint64_t* top = s.bins + kDigits - 1 - lane * kEach;
        uint64_t own = 0;
        for (int i = 0; i < kEach; ++i) own += top[-i];
        uint64_t through = own;
        for (int offset = 1; offset < 32; offset *= 2) {
          const uint64_t other = __shfl_up_sync(0xffffffffu, through, offset);
          if (lane >= offset) through += other;
        }
        const uint32_t reached = __ballot_sync(0xffffffffu, above + through >= target);
        const int at = reached ? __ffs(static_cast<int>(reached)) - 1 : 31;
        if (lane == at) {
          uint64_t over = above + through - own;  // the mass above this lane's bins
          int i = 0;
          for (; i + 1 < kEach && over + top[-i] < target; ++i) over += top[-i];
          s.digit = kDigits - 1 - lane * kEach - i;
          s.above = over;
        }
      }
      __syncthreads();
      prefix |= static_cast<uint32_t>(s.digit) << shift;
      above = s.above;
      decided += bits;
    }
    return prefix;
  }

  __device__ uint64_t weight_of(float logit, float best_logit, float temperature) const {
    return static_cast<uint64_t>(
        exp((static_cast<double>(logit) - static_cast<double>(best_logit)) /
            static_cast<double>(temperature)) *
        kOne);
  }

  __device__ int draw(const SampleRow& row, int vocab) {
    const int tid = threadIdx.x, lane = tid % 32;
    const uint64_t top = best(~uint64_t{0});
    const auto best_id = static_cast<int>(0xffffffffu - static_cast<uint32_t>(top));
    const float best_logit = from_order_bits(static_cast<uint32_t>(top >> 32));
    if (row.temperature <= 0 || best_logit == -INFINITY) return best_id;

    Prefix kept{0, ~uint64_t{0}};  // everything
    if (row.top_k > 0 && row.top_k < vocab) {
      uint64_t above;
      kept.key = descend<kCountBits>(static_cast<uint64_t>(row.top_k), above,
                                     [](int, uint32_t) { return uint64_t{1}; });
      kept.ties = static_cast<uint64_t>(row.top_k) - above;
    }
    // Weights of what is left; exp of a double is what costs here. Below 2^-40 all are 0.
    for (int i = tid; i < count; i += kThreads) {
      weights[i] = order_bits(x[i]) < kept.key ? 0 : weight_of(x[i], best_logit, row.temperature);
    }
    __syncthreads();
    if (row.top_p < 1.0f) {
      // The total over what top_k kept: equals of its key all weigh the same.
      uint64_t sum = 0, tie = 0;
      for (int i = tid; i < count; i += kThreads) {
        const uint32_t key = order_bits(x[i]);
        if (key > kept.key) sum += weights[i];
        if (key == kept.key) tie += weights[i];
      }
      sum = reduce(sum, Sum());
      if (kept.ties != ~uint64_t{0}) {
        tie = kept.ties * weight_of(from_order_bits(kept.key), best_logit, row.temperature);
      } else {
        tie = reduce(tie, Sum());
      }
      const double wanted = static_cast<double>(row.top_p) * static_cast<double>(sum + tie);
      uint64_t target = static_cast<uint64_t>(ceil(wanted));
      if (target == 0) target = 1;
      uint64_t above;
      const uint32_t floor_key = kept.key;
      const uint32_t key = descend<kWeightBits>(target, above, [&](int i, uint32_t key) {
        return key < floor_key ? uint64_t{0} : weights[i];  // known without a look at memory
      });
      const uint64_t each = weight_of(from_order_bits(key), best_logit, row.temperature);
      uint64_t ties = each ? (target - above + each - 1) / each : 1;
      if (ties == 0) ties = 1;
      if (key > kept.key || (key == kept.key && ties < kept.ties)) kept = {key, ties};
    }

    // Ids upwards: a warp has a contiguous piece.
    const int piece = (count + kThreads - 1) / kThreads * 32;
    const int begin = min(count, tid / 32 * piece), end = min(count, begin + piece);
    int equals = 0;
    for (int i = begin + lane; i < end; i += 32) equals += order_bits(x[i]) == kept.key;
    for (int offset = 16; offset; offset /= 2) {
      equals += __shfl_xor_sync(0xffffffffu, equals, offset);
    }
    const uint64_t equals_before =
        kept.ties == ~uint64_t{0} ? 0 : before(static_cast<uint64_t>(equals));
    const double floor_weight = static_cast<double>(row.min_p) * kOne;
    // The mass of id first + i; the whole warp calls it, with i in steps of 32.
    const auto mass = [&](int i, uint64_t& rank_of_equal) -> uint64_t {
      const bool real = i < end;
      const uint32_t key = real ? order_bits(x[i]) : 0;
      const uint32_t same = __ballot_sync(0xffffffffu, real && key == kept.key);
      const uint64_t mine = rank_of_equal + __popc(same & ((1u << lane) - 1));
      rank_of_equal += __popc(same);
      if (!real || key < kept.key || (key == kept.key && mine >= kept.ties)) return 0;
      const uint64_t weight = weights[i];
      if (row.min_p > 0 && first + i != best_id && static_cast<double>(weight) < floor_weight) {
        return 0;
      }
      return weight;
    };
    uint64_t sum = 0, equal = equals_before;
    for (int i = begin; i < end; i += 32) sum += mass(i + lane, equal);
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const uint64_t under = before(sum);
    const uint64_t total = reduce(lane == 0 ? sum : 0, Sum());
    // target < cumulative, with target = u * total: u has 24 bits, the product may need 81.
    const auto u24 = static_cast<uint64_t>(uniform(row.seed, row.position) * 0x1p24f);
    const uint64_t target = __umul64hi(u24 << 40, total);
    uint64_t found = 0;  // id + 1
    if (under <= target && target < under + sum) {
      uint64_t cumulative = under;
      equal = equals_before;
      for (int i = begin; i < end; i += 32) {
        uint64_t through = mass(i + lane, equal);
        for (int offset = 1; offset < 32; offset *= 2) {
          const uint64_t other = __shfl_up_sync(0xffffffffu, through, offset);
          if (lane >= offset) through += other;
        }
        const uint32_t past = __ballot_sync(0xffffffffu, target < cumulative + through);
        if (past) {
          found = static_cast<uint64_t>(first + i + __ffs(static_cast<int>(past)));
          break;
        }
        cumulative += __shfl_sync(0xffffffffu, through, 31);
      }
    }
    const uint64_t id = reduce(found, Max());
    return id == 0 ? best_id : static_cast<int>(id) - 1;
  }
};

__global__ void __launch_bounds__(kThreads) sample_kernel(const Params p) {
  extern __shared__ __align__(16) uint8_t smem[];
  ptx::grid_launch_dependents();
  const int r = blockIdx.x / kCluster, vocab = p.batch.vocab_size, rank = blockIdx.x % kCluster;
  const int first = min(vocab, rank * p.slice), count = min(vocab, first + p.slice) - first;
  float* x = kPortable ? p.adjusted + static_cast<int64_t>(r) * vocab
                       : reinterpret_cast<float*>(smem + sizeof(Shared));
  const float* raw = p.logits + static_cast<int64_t>(r) * vocab + first;
  Slice slice{*reinterpret_cast<Shared*>(smem),
              x,
              p.weights + static_cast<int64_t>(r) * vocab + first,
              rank,
              first,
              count};
  ptx::grid_dependency_wait();
  const SampleRow row = p.batch.rows[r];
  const auto load = [&] {
    for (int i = threadIdx.x; i < count; i += kThreads) x[i] = raw[i];
    __syncthreads();
  };
  int token = row.forced_token;
  if (token < 0) {
    load();
    const auto penalize = [&](int id, int output_count) {
      const int at = id - first;
      if (at < 0 || at >= count) return;
      float logit = x[at];
      logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
      if (output_count > 0) {
        logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(output_count);
      }
      x[at] = logit;
    };
    const int pending = row.pending >= 0 ? p.batch.previous_tokens[row.pending] : -1;
    bool is_known = pending < 0;
    for (int i = row.history_begin + static_cast<int>(threadIdx.x); i < row.history_end;
         i += kThreads) {
      const TokenCount seen = p.batch.history[i];
      const bool again = seen.token == pending;
      penalize(seen.token, seen.output_count + (again ? 1 : 0));
      is_known = is_known || again;
    }
    // Of all threads: each CTA of the row has seen the whole history.
    if (!__syncthreads_or(is_known)) {
      if (threadIdx.x == 0) penalize(pending, 1);
      __syncthreads();
    }
    for (int i = row.bias_begin + static_cast<int>(threadIdx.x); i < row.bias_end; i += kThreads) {
      const int at = p.batch.bias[i].token - first;
      if (at >= 0 && at < count) x[at] += p.batch.bias[i].bias;
    }
    __syncthreads();
    const auto keep_only = [&](const uint64_t* mask) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        if ((mask[(first + i) / 64] >> ((first + i) % 64) & 1) == 0) x[i] = -INFINITY;
      }
      __syncthreads();
    };
    if (p.batch.allowed) keep_only(p.batch.allowed);
    if (row.mask >= 0) keep_only(p.batch.masks + int64_t{row.mask} * p.batch.mask_words);
    token = slice.draw(row, vocab);
  }
  const bool writes = rank == 0 && threadIdx.x == 0;
  if (writes) p.result.tokens[r] = token;
  if (row.num_logprobs >= 0) {
    __syncthreads();
    load();  // unadjusted
    uint64_t best = slice.best(~uint64_t{0});
    const float peak = from_order_bits(static_cast<uint32_t>(best >> 32));
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      sum += exp(static_cast<double>(x[i]) - static_cast<double>(peak));
    }
    const double log_sum =
        static_cast<double>(peak) + log(__longlong_as_double(static_cast<int64_t>(
                                        slice.reduce(__double_as_longlong(sum), SumOfDoubles()))));
    const float* row_logits = raw - first;
    if (writes && p.result.logprobs) {
      p.result.logprobs[r] = static_cast<float>(static_cast<double>(row_logits[token]) - log_sum);
    }
    const int wanted = min(min(row.num_logprobs, p.batch.max_logprobs), vocab);
    for (int j = 0; j < p.batch.max_logprobs; ++j) {
      if (j > 0 && j < wanted) best = slice.best(best);
      if (writes) {
        const int64_t at = static_cast<int64_t>(r) * p.batch.max_logprobs + j;
        const auto id = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
        p.result.top_tokens[at] = j < wanted ? id : -1;
        p.result.top_logprobs[at] =
            j < wanted ? static_cast<float>(static_cast<double>(row_logits[id]) - log_sum)
                       : -INFINITY;
      }
    }
  }
  row_sync();  // nobody leaves while a neighbour may read its shared memory
}

}  // namespace

size_t sample_workspace_bytes(int rows, int vocab) {
  return static_cast<size_t>(rows) * static_cast<size_t>(vocab) *
         (sizeof(uint64_t) + (kPortable ? sizeof(float) : 0));
}

int sample(const SampleBatch& batch, const float* logits, const SampleResult& result,
           void* workspace, bool dependent, void* stream) {
  if (batch.num_rows < 1) return cudaSuccess;
  // A multiple of 32 ids, so that a warp's pieces begin evenly.
  const int slice = (batch.vocab_size + kCluster * 32 - 1) / (kCluster * 32) * 32;
  if (slice > kMaxSlice) return cudaErrorInvalidValue;
  const Params params{.batch = batch,
                      .result = result,
                      .logits = logits,
                      .weights = static_cast<uint64_t*>(workspace),
                      .slice = slice,
                      .adjusted = reinterpret_cast<float*>(static_cast<uint64_t*>(workspace) +
                                                           static_cast<int64_t>(batch.num_rows) *
                                                               batch.vocab_size)};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(batch.num_rows * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes =
      sizeof(Shared) + (kPortable ? 0 : static_cast<size_t>(slice) * sizeof(float));
  const cudaError_t status =
      cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(config.dynamicSmemBytes));
  if (status != cudaSuccess) return status;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = kPortable ? 0 : dependent ? 2 : 1;
  return cudaLaunchKernelEx(&config, sample_kernel, params);
}

}  // namespace nibble::cuda
