// The sampling op on the device, a cluster of eight CTAs per row: bias and penalties, greedy or
// temperature with top_k, top_p and min_p, one Philox draw, log-probabilities. Semantics:
// ops/sample_operands.h and the reference backend.
//
// A CTA keeps an eighth of the row's logits in shared memory and walks only those; what the eight
// find they send each other (st.async: a barrier in the shared memory of whoever waits counts the
// bytes; a cluster barrier would cost a MEMBAR.ALL.GPU each time). No sort: the kept ids are a
// prefix of (logit descending, id ascending), so each filter is a threshold on the logit plus a
// last id among its equals, found by radix descent over the digits of order-preserving bits (counts
// for top_k, weights for top_p). Weights are integers, so that sums do not depend on the order of
// atomics: run-to-run deterministic. They are computed wherever they are needed: from logits at
// hand that is quicker than reading them from memory. The draw walks ids upwards, as the reference
// does.
//
// The portable variant knows no clusters: one CTA a row, its logits in the workspace (L2).
//
// Limits: vocab <= 8 * kMaxSlice on sm_90.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/kernels.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/variant.h"
#include "ops/sample_operands.h"

namespace nibble::cuda {
namespace {

constexpr int kCluster = kPortable ? 1 : 8, kThreads = kPortable ? 1024 : 512,
              kWarps = kThreads / 32;
constexpr int kMaxSlice = kPortable ? 1 << 22 : 48 << 10;  // ids of one CTA
// A weight is cut into pieces of which a 32-bit counter holds what its lane may add: every 32nd id.
constexpr int kPieceBits = kPortable ? 14 : 20, kPieces = kPortable ? 3 : 2;
static_assert((int64_t{2} << kPieceBits) * kMaxSlice / 32 <= int64_t{1} << 32);
constexpr int kDigitBits = kPortable ? 6 : 7, kDigits = 1 << kDigitBits;  // of a descent
constexpr uint64_t kOne = uint64_t{1} << 40;                              // the largest weight
static_assert(kOne >> (kPieces - 1) * kPieceBits < uint64_t{2} << kPieceBits);

// (order bits, ~id) of infinity and an id before the first: all lie behind it.
constexpr uint64_t kNoLimit = uint64_t{0xff800000u} << 32;

struct Params {
  SampleBatch batch;
  SampleResult result;
  const float* logits;
  int slice;        // ids of one CTA, a multiple of 32
  float* adjusted;  // [R, slice], portable only: what sm_90 keeps in shared memory
};

struct alignas(16) Shared {
  uint32_t copies[kPieces * kDigits * 32];  // [piece of a mass][bin][lane]: counters
  uint64_t slots[2][kCluster][kDigits];     // what the row's CTAs sent: [exchange % 2][rank]
  uint64_t warp_values[2][kWarps];
  uint64_t barriers[2];
  uint64_t target, above, at;
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

struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Max {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// Over `lanes` lanes in a row, a power of two; all of them get it.
template <typename Op>
__device__ __forceinline__ uint64_t reduce_lanes(uint64_t v, int lanes, Op op) {
  for (int offset = lanes / 2; offset; offset /= 2) {
    v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  return v;
}

// The sum of this lane's and all before.
__device__ __forceinline__ uint64_t sum_through(uint64_t v, int lane) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, v, offset);
    if (lane >= offset) v += other;
  }
  return v;
}

// exp((logit - best) / temperature) times 2^40, rounded down; to 2^-21 of itself.
struct Weight {
  float best, hi, lo;  // hi + lo = log2(e) / temperature
  float lowest;        // so much below the best or more: nothing

  __device__ Weight(float best_logit, float temperature) : best(best_logit) {
    const double scale = fmin(1.4426950408889634 / static_cast<double>(temperature), 1e30);
    hi = static_cast<float>(scale);
    lo = static_cast<float>(scale - static_cast<double>(hi));
    lowest = -42.0f / hi;
  }
  __device__ uint64_t operator()(float logit) const {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer
    const float below = fmaxf(logit - best, lowest), rounded = fmaf(below, hi, kRound);
    const float rest = fmaf(below, lo, fmaf(below, hi, kRound - rounded));
    const uint32_t bits = __float_as_uint(ptx::exp2_fast(rest)) + (__float_as_uint(rounded) << 23);
    const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    return (mantissa << (40 - 23)) >> (127 - (bits >> 23));
  }
};

// What a descent found: the order bits at which the target lies, the mass of all above and theirs.
struct Cut {
  uint32_t key;
  uint64_t target, above, at;
};

struct Four {
  float of[4];
};
struct Masses {
  uint64_t of[4];
};

// One CTA's part of a row.
struct Slice {
  Shared& s;
  float* x;  // logits of ids first ..., in shared memory on sm_90; -inf up to a multiple of 32
  int rank, first, count;
  int exchanges = 0;

  // each(i, x[i ... i + 3]) for all ids of this CTA. Rolled: code that is executed once or twice is
  // waited for.
  template <typename Each>
  __device__ void walk(Each each) const {
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < count; i += 4 * kThreads) each(i, four(i));
  }
  __device__ Four four(int i) const {
    const float4 v = *reinterpret_cast<const float4*>(x + i);
    return {v.x, v.y, v.z, v.w};
  }

  // An exchange: every CTA of the row sends as many values to every CTA, itself included; receive()
  // returns, to all threads, when all are there: [rank][index]. They stay until the next but one.
  // Between two exchanges a CTA meets at a __syncthreads, so that nobody reads what is overwritten.
  __device__ void send(int to, int index, uint64_t value) const {
    uint64_t* place = &s.slots[exchanges & 1][rank][index];
    if constexpr (kPortable) {
      *place = value;
    } else {
      const uint32_t barrier = ptx::smem_address(&s.barriers[exchanges & 1]);
      ptx::store_async(ptx::cluster_address(ptx::smem_address(place), to), value,
                       ptx::cluster_address(barrier, to));
    }
  }
  __device__ uint64_t (*receive(int values))[kDigits] {
    const int half = exchanges & 1, parity = exchanges >> 1 & 1;
    ++exchanges;
    if constexpr (kPortable) {
      __syncthreads();
    } else {
      const uint32_t barrier = ptx::smem_address(&s.barriers[half]);
      if (threadIdx.x == 0) {
        ptx::mbarrier_expect(barrier, kCluster * static_cast<uint32_t>(values * sizeof(uint64_t)));
      }
      ptx::mbarrier_wait(barrier, parity);
    }
    return s.slots[half];
  }

  // Over all threads of the row's CTAs, in an order that does not change.
  template <typename Op>
  __device__ uint64_t reduce(uint64_t v, Op op) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t* of_warps = s.warp_values[exchanges & 1];
    v = reduce_lanes(v, 32, op);
    if (lane == 0) of_warps[warp] = v;
    __syncthreads();
    if (warp == 0) {
      v = reduce_lanes(of_warps[lane % kWarps], kWarps, op);
      if (lane < kCluster) send(lane, 0, v);
    }
    const auto* of_ctas = receive(1);
    return reduce_lanes(of_ctas[lane % kCluster][0], kCluster, op);
  }

  // Of the warps' values, given by each of their lanes: the sum of those before this one in order
  // of ids, and of all.
  struct Sums {
    uint64_t before, all;
  };
  __device__ Sums scan(uint64_t v) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t* of_warps = s.warp_values[exchanges & 1];
    if (lane == 0) of_warps[warp] = v;
    __syncthreads();
    v = lane < kWarps ? of_warps[lane] : 0;
    const uint64_t before = reduce_lanes(lane < warp ? v : 0, 32, Sum());
    v = reduce_lanes(v, 32, Sum());
    if (warp == 0 && lane < kCluster) send(lane, 0, v);
    const auto* of_ctas = receive(1);
    v = lane < kCluster ? of_ctas[lane][0] : 0;
    return {reduce_lanes(lane < rank ? v : 0, 32, Sum()) + before, reduce_lanes(v, 32, Sum())};
  }

  // The largest logit of the row and its smallest id, as (order bits, ~id), among those that
  // is_among(i, x[i]) names.
  template <typename Among>
  __device__ uint64_t best(Among is_among) {
    float most = -INFINITY;
    walk([&](int i, Four logits) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        most = fmaxf(most, is_among(i + c, logits.of[c]) ? logits.of[c] : -INFINITY);
      }
    });
    // Only whoever has the warp's largest looks for its id.
    const uint32_t key = order_bits(most), of_warp = __reduce_max_sync(0xffffffffu, key);
    uint32_t id = INT32_MAX;
    if (key == of_warp) {
      walk([&](int i, Four logits) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (logits.of[c] == most && is_among(i + c, most)) {
            id = min(id, static_cast<uint32_t>(first + i + c));
          }
        }
      });
    }
    return reduce(uint64_t{of_warp} << 32 | ~__reduce_min_sync(0xffffffffu, id), Max());
  }

  // Behind `limit`, one of these, in that order.
  __device__ uint64_t best_behind(uint64_t limit) {
    const float limit_logit = from_order_bits(static_cast<uint32_t>(limit >> 32));
    const auto limit_id = static_cast<int>(~static_cast<uint32_t>(limit));
    return best([&](int i, float logit) {
      return (logit < limit_logit) | ((logit == limit_logit) & (first + i > limit_id));
    });
  }

  // The shortest prefix whose mass (measure(i, x[i ... i + 3]), summed) reaches target_of(mass of
  // all). 64-bit shared atomics are loops, and logits share few leading bits: hence the 32-bit
  // counters and their copies.
  template <typename Measure, typename Target>
  __device__ Cut descend(int pieces, Measure measure, Target target_of) {
    const int tid = threadIdx.x, lane = tid % 32;
    Cut cut{};
    int decided = 0;
#pragma unroll 1
    while (decided < 32) {
      const int bits = min(kDigitBits, 32 - decided), shift = 32 - decided - bits;
      // Logits with the digits decided so far; to the infinities, because NaNs lie behind them.
      const float low = from_order_bits(max(cut.key, order_bits(-INFINITY)));
      const float high =
          from_order_bits(min(cut.key | static_cast<uint32_t>((uint64_t{1} << (32 - decided)) - 1),
                              order_bits(INFINITY)));
      walk([&](int i, Four logits) {
        bool is_in[4], any = false;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          is_in[c] = (logits.of[c] >= low) & (logits.of[c] <= high);
          any |= is_in[c];
        }
        if (!any) return;
        Masses masses = measure(i, logits);
        uint32_t* bins[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint32_t digit = order_bits(logits.of[c]) >> shift & ((1u << bits) - 1);
          bins[c] = s.copies + digit * 32 + lane;
          if (!is_in[c]) masses.of[c] = 0;
        }
        // Zeros too: to add them is quicker than not to.
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          if (piece >= pieces) break;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const auto part = static_cast<uint32_t>(masses.of[c] >> (piece * kPieceBits));
            atomicAdd(bins[c] + piece * kDigits * 32,
                      piece + 1 < kPieces ? part & ((1u << kPieceBits) - 1) : part);
          }
        }
      });
      __syncthreads();
      {
        constexpr int kPer = kThreads / kDigits, kOf = 32 / kPer;  // threads a bin; copies a thread
        const int bin = tid / kPer;
        uint64_t sum = 0;
#pragma unroll
        for (int c = 0; c < kOf; ++c) {
          uint32_t* at = s.copies + bin * 32 + (tid % kPer * kOf + c + bin) % 32;
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            sum += uint64_t{at[piece * kDigits * 32]} << (piece * kPieceBits);
            at[piece * kDigits * 32] = 0;
          }
        }
        sum = reduce_lanes(sum, kPer, Sum());
        for (int to = tid % kPer; to < kCluster; to += kPer) send(to, bin, sum);
      }
      auto* of_ctas = receive(kDigits);
      uint64_t* bins = of_ctas[0];
      if (tid < kDigits) {
        uint64_t sum = 0;
#pragma unroll
        for (int r = 0; r < kCluster; ++r) sum += of_ctas[r][tid];
        bins[tid] = sum;
      }
      __syncthreads();
      if (tid < 32) {
        // From the top: a lane has kEach bins in a row.
        constexpr int kEach = kDigits / 32;
        const uint64_t* top = bins + kDigits - 1 - lane * kEach;
        uint64_t own = 0;
        for (int i = 0; i < kEach; ++i) own += top[-i];
        const uint64_t through = sum_through(own, lane);
        const uint64_t all = __shfl_sync(0xffffffffu, through, 31);
        const uint64_t target = decided == 0 ? target_of(all) : cut.target;
        const uint32_t reached = __ballot_sync(0xffffffffu, cut.above + through >= target);
        const int at = reached ? __ffs(static_cast<int>(reached)) - 1 : 31;
        if (lane == at) {
          uint64_t over = cut.above + through - own;  // the mass above this lane's bins
          int i = 0;
          for (; i + 1 < kEach && over + top[-i] < target; ++i) over += top[-i];
          s.digit = kDigits - 1 - lane * kEach - i;
          s.target = target;
          s.above = over;
          s.at = top[-i];
        }
      }
      __syncthreads();
      cut = {cut.key | static_cast<uint32_t>(s.digit) << shift, s.target, s.above, s.at};
      decided += bits;
    }
    return cut;
  }

  // A warp's ids, in order of ids.
  struct Piece {
    int begin, end, run;  // run: of a lane, where each has ids in a row, a multiple of four
  };
  __device__ Piece piece() const {
    const int run = max((count + 4 * kThreads - 1) / (4 * kThreads), 1) * 4;
    const int begin = min(count, static_cast<int>(threadIdx.x) / 32 * run * 32);
    return {begin, min(count, begin + run * 32), run};
  }

  // The id of the `ties`-th whose logit this is.
  __device__ int id_of_equal(float logit, uint64_t ties) {
    const int lane = threadIdx.x % 32;
    const auto [begin, end, run] = piece();
    uint64_t equals = 0;
    for (int i = begin + lane; i < end; i += 32) equals += x[i] == logit;
    equals = reduce_lanes(equals, 32, Sum());
    uint64_t passed = scan(equals).before, found = 0;  // id + 1
    if (passed < ties && ties <= passed + equals) {
      for (int i = begin; i < end && found == 0; i += 32) {
        const bool same = i + lane < end && x[i + lane] == logit;
        const uint32_t mask = __ballot_sync(0xffffffffu, same);
        const uint64_t rank_of_own = passed + __popc(mask & ((2u << lane) - 1));
        const uint32_t here = __ballot_sync(0xffffffffu, same && rank_of_own == ties);
        if (here) found = static_cast<uint64_t>(first + i + __ffs(static_cast<int>(here)));
        passed += __popc(mask);
      }
    }
    return static_cast<int>(reduce(found, Max())) - 1;
  }

  __device__ int draw(const SampleRow& row, int vocab) {
    const int lane = threadIdx.x % 32;
    const uint64_t top = best([](int, float) { return true; });
    const auto best_id = static_cast<int>(~static_cast<uint32_t>(top));
    const float best_logit = from_order_bits(static_cast<uint32_t>(top >> 32));
    if (best_id >= vocab) return 0;  // no logit is a number
    if (row.temperature <= 0 || best_logit == -INFINITY) return best_id;
    const Weight weight(best_logit, row.temperature);

    // Kept: all above `least`, and of its equals those up to the id `last`.
    float least = -INFINITY;
    int last = INT32_MAX;
    const auto is_kept = [&](int i, float logit) {
      return (logit > least) | ((logit == least) & (first + i <= last));
    };
    const auto weigh = [&](int i, Four logits) {
      Masses masses{};
      if (fmaxf(fmaxf(logits.of[0], logits.of[1]), fmaxf(logits.of[2], logits.of[3])) < least) {
        return masses;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint64_t own = weight(logits.of[c]);
        masses.of[c] = is_kept(i + c, logits.of[c]) ? own : 0;
      }
      return masses;
    };
    // top_k counts, top_p weighs what top_k kept.
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
      const bool weighs = filter == 1;
      if (weighs ? !(row.top_p < 1.0f) : row.top_k <= 0 || row.top_k >= vocab) continue;
      const Cut cut = descend(
          weighs ? kPieces : 1,
          [&](int i, Four logits) {
            Masses masses{1, 1, 1, 1};
            if (weighs) masses = weigh(i, logits);
            return masses;
          },
          [&](uint64_t all) {
            const double wanted = static_cast<double>(row.top_p) * static_cast<double>(all);
            return weighs ? max(static_cast<uint64_t>(ceil(wanted)), uint64_t{1})
                          : static_cast<uint64_t>(row.top_k);
          });
      const float found = from_order_bits(cut.key);
      if (found != least) last = INT32_MAX;
      least = found;
      // Equals all have the same mass, and the target lies within them.
      const uint64_t each = weighs ? weight(least) : 1, wanted = cut.target - cut.above;
      if (wanted + each <= cut.at) last = id_of_equal(least, (wanted + each - 1) / each);
    }

    const auto floor =
        static_cast<uint64_t>(ceil(static_cast<double>(row.min_p) * static_cast<double>(kOne)));
    // The mass of ids i ... i + 3.
    const auto draw_from = [&](int i) {
      Masses masses = weigh(i, four(i));
      if (floor > 0) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (masses.of[c] < floor && first + i + c != best_id) masses.of[c] = 0;
        }
      }
      return masses;
    };
    const auto [begin, end, run] = piece();
    // Of the lane's run, in which each lane begins elsewhere: in other banks.
    uint64_t own = 0;
#pragma unroll 1
    for (int k = 0, fours = run / 4, j = lane % fours; k < fours; ++k) {
      const int i = begin + lane * run + 4 * j;
      if (i < end) {
        const Masses masses = draw_from(i);
        own += masses.of[0] + masses.of[1] + (masses.of[2] + masses.of[3]);
      }
      j = j + 1 < fours ? j + 1 : 0;
    }
    const uint64_t sum = reduce_lanes(own, 32, Sum());
    const auto [before, total] = scan(sum);
    // target < cumulative, with target = u * total: u has 24 bits, the product may need 81.
    const auto u24 = static_cast<uint64_t>(uniform(row.seed, row.position) * 0x1p24f);
    const uint64_t target = __umul64hi(u24 << 40, total);
    uint64_t found = 0;  // id + 1
    if (before <= target && target < before + sum) {
      uint64_t through = before + sum_through(own, lane);
      const int at = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, target < through))) - 1;
      uint64_t passed = __shfl_sync(0xffffffffu, through - own, at);
      const int run_end = min(end, begin + (at + 1) * run);
      for (int i = begin + at * run; i < run_end && found == 0; i += 128) {
        const int own_i = i + 4 * lane;
        Masses masses{};
        if (own_i < run_end) masses = draw_from(own_i);
        // Sums through each of the four.
#pragma unroll
        for (int c = 1; c < 4; ++c) masses.of[c] += masses.of[c - 1];
        through = passed + sum_through(masses.of[3], lane);
        const uint64_t from = through - masses.of[3];
        const uint32_t past = __ballot_sync(0xffffffffu, target < through);
        if (past) {
          int id = first + own_i;
          for (int c = 0; c < 3; ++c) id += target >= from + masses.of[c];
          found = static_cast<uint64_t>(
                      __shfl_sync(0xffffffffu, id, __ffs(static_cast<int>(past)) - 1)) +
                  1;
        }
        passed = __shfl_sync(0xffffffffu, through, 31);
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
  float* x = kPortable ? p.adjusted + static_cast<int64_t>(r) * p.slice
                       : reinterpret_cast<float*>(smem + sizeof(Shared));
  const float* raw = p.logits + static_cast<int64_t>(r) * vocab + first;
  Slice slice{*reinterpret_cast<Shared*>(smem), x, rank, first, count};
  for (int i = threadIdx.x; i < kPieces * kDigits * 32; i += kThreads) slice.s.copies[i] = 0;
  if constexpr (!kPortable) {
    if (threadIdx.x < 2) {
      ptx::mbarrier_init(ptx::smem_address(&slice.s.barriers[threadIdx.x]), 1);
      ptx::mbarrier_init_fence();
    }
    ptx::cluster_sync();  // before a neighbour sends
  }
  ptx::grid_dependency_wait();
  const SampleRow row = p.batch.rows[r];
  const auto load = [&] {
    const int end = (count + 31) / 32 * 32;
#pragma unroll 16
    for (int i = threadIdx.x; i < end; i += kThreads) x[i] = i < count ? raw[i] : -INFINITY;
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
    uint64_t best = slice.best_behind(kNoLimit);
    const float peak = from_order_bits(static_cast<uint32_t>(best >> 32));
    const Weight weight(peak, 1.0f);
    uint64_t sum = 0;
    slice.walk([&](int, Four logits) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum += weight(logits.of[c]);
    });
    const double log_sum =
        static_cast<double>(peak) +
        log(static_cast<double>(slice.reduce(sum, Sum())) / static_cast<double>(kOne));
    const float* row_logits = raw - first;
    if (writes && p.result.logprobs) {
      p.result.logprobs[r] = static_cast<float>(static_cast<double>(row_logits[token]) - log_sum);
    }
    const int wanted = min(min(row.num_logprobs, p.batch.max_logprobs), vocab);
    for (int j = 0; j < p.batch.max_logprobs; ++j) {
      if (j > 0 && j < wanted) best = slice.best_behind(best);
      if (writes) {
        const int64_t at = static_cast<int64_t>(r) * p.batch.max_logprobs + j;
        const auto id = static_cast<int>(~static_cast<uint32_t>(best));
        const bool is_there = j < wanted && id < vocab;
        p.result.top_tokens[at] = is_there ? id : -1;
        p.result.top_logprobs[at] =
            is_there ? static_cast<float>(static_cast<double>(row_logits[id]) - log_sum)
                     : -INFINITY;
      }
    }
  }
}

}  // namespace

namespace {

// A multiple of 32, so that rows and the pieces of warps begin evenly.
int slice_of(int vocab) { return (vocab + kCluster * 32 - 1) / (kCluster * 32) * 32; }

}  // namespace

size_t sample_workspace_bytes(int rows, int vocab) {
  return kPortable
             ? sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(slice_of(vocab))
             : 0;
}

int sample(const SampleBatch& batch, const float* logits, const SampleResult& result,
           void* workspace, bool dependent, void* stream) {
  if (batch.num_rows < 1) return cudaSuccess;
  const int slice = slice_of(batch.vocab_size);
  if (slice > kMaxSlice) return cudaErrorInvalidValue;
  const Params params{.batch = batch,
                      .result = result,
                      .logits = logits,
                      .slice = slice,
                      .adjusted = static_cast<float*>(workspace)};
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
