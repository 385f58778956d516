// K7: out[M, N] = x[M, K] W4[N, K]^T for M <= 16 tokens, in integers: weights are operand A of
// wgmma.m64nNk32 u8 x s8 as they are stored, x is two digits of 8 bits (digits_layout.h).
//
// Layouts: W in layout.h's blocks; x in digits_layout.h's slabs, which quantize_x.cu or the kernel
// before writes; out bf16 row-major. Bytes: N*K*0.515625 of weights once from device memory; x from
// L2, 2*M*K once per row tile. Operations: 4*M*N*K at the rate of 8 bits, that is, bf16's 2*M*N*K.
//
// Why integers: below 64 tokens unpacking does not overlap with the tensor cores (docs/kernels.md),
// and here is hardly any. A byte of a weight word is 16 * u' + u, u of row g and u' of row g + 8,
// same k: masked in place they are operand A, u and 16 * u'; the factor 16 leaves with the scales.
// Sums of a group are exact: |256 * high + low| < 128 * 240 * 32768 < 2^30. Only the products with
// the scales and their sum over the groups are rounded, in f32.
//
// Work split: a unit is one group of k of a row tile, a stage of the ring. A CTA per SM takes an
// equal share of the units in memory order (row tile major), whole tiles, or an equal part of one
// tile (launch() says when): 16 consumer warps and a producer. A
// tile is 256 rows, a block for each of four warpgroups, or 128, and then two warpgroups take a
// block's stages in turn. Where a tile ends their sums meet in shared memory, and a thread has 8
// adjacent rows of a token (16 with SiLU). A tile cut by CTA borders belongs to the CTA that
// has its first k; the others hand over f32 sums (linear_common.cuh), added in CTA order:
// deterministic.
//
// Limits: K a multiple of 8, rows a multiple of 8 (16 with SiLU); sm_90a. All CTAs must be resident
// at once (one per SM: they are).
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "backends/cuda/digits_layout.h"
#include "backends/cuda/digits_store.cuh"
#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/ptx/wgmma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kConsumerWarps = 16, kConsumers = kConsumerWarps * 32;
constexpr int kIdleWarps = 3;  // beside the producer: they work out 1/rms
constexpr int kThreads = kConsumers + (1 + kIdleWarps) * 32;
constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kNibbleBytes = static_cast<int>(cuda_layout::kBlockNibbleBytes);
constexpr int kSmemLimit = 232448;
static_assert(kDigitTokens == cuda_digits::kMaxTokens);

template <int kTokens, int kRowBlocks>
struct Config {
  static constexpr int kRows = 64 * kRowBlocks;  // of a tile
  static constexpr int kWays = 4 / kRowBlocks;   // warpgroups that share a row block
  static constexpr int kColumns = 2 * kTokens;   // wgmma's N
  static constexpr int kFactorsOffset = kColumns * 128;
  static constexpr int kSlabBytes = kFactorsOffset + kTokens * cuda_digits::kFactorBytes;
  static constexpr int kWOffset = kSlabBytes;
  static constexpr int kWBytes = kRowBlocks * kBlockBytes;
  static constexpr int kStageBytes = (kWOffset + kWBytes + 1023) / 1024 * 1024;
  static constexpr int kOutStride = kRows + 4;  // floats; conflict-free scatter
  static constexpr int kOutBytes = kWays * kTokens * kOutStride * 4;
  static constexpr int kNormBytes = kIdleWarps * kTokens * 4;
  static constexpr int kFit = (kSmemLimit - kOutBytes - kNormBytes - 256) / kStageBytes;
  // About what memory needs in flight. More makes x and other CTAs' sums wait behind weights.
  static constexpr int kWanted = kRowBlocks == 4 ? 6 : 8;
  static constexpr int kStages = (kFit < kWanted ? kFit : kWanted) / kWays * kWays;
  static constexpr int kOutOffset = kStages * kStageBytes;
  static constexpr int kNormOffset = kOutOffset + kOutBytes;
  static constexpr int kBarOffset = kNormOffset + kNormBytes;  // full, empty, norms
  static constexpr int kSmemBytes = kBarOffset + (2 * kStages + 1) * 8;
  static_assert(kSmemBytes <= kSmemLimit && kStages >= 4 && kBarOffset % 8 == 0);
};

// Adds what the `others` CTAs behind this one left, in their order; two CTAs' loads are in flight
// together. Empties the places.
template <int kPer>
__device__ __forceinline__ void take_over_others(float* mine, int64_t cta_stride, int others,
                                                 float (&sum)[kPer]) {
  constexpr int kVectors = kPer / 4;
  const float empty = __uint_as_float(kEmpty);
  const float empties[4] = {empty, empty, empty, empty};
  for (int first = 1; first <= others; first += 2) {
    uint32_t v[2][kVectors][4] = {};
    bool ready;
    do {
      ready = true;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          if (first + i <= others) ready &= peek(mine + (first + i) * cta_stride + j * 4, v[i][j]);
        }
    } while (!ready);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (first + i > others) continue;
        hand_over(mine + (first + i) * cta_stride + j * 4, empties);
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[j * 4 + n] += __uint_as_float(v[i][j][n]);
      }
  }
}

template <int kTokens, int kRowBlocks>
__global__ void __launch_bounds__(kThreads, 1) linear_digits_kernel(const LinearParams p) {
  using C = Config<kTokens, kRowBlocks>;
  using Multiply = ptx::Wgmma<C::kColumns>;
  constexpr int kOctets = kTokens / 8;
  extern __shared__ __align__(1024) uint8_t smem[];
  const uint32_t base = ptx::smem_address(smem);
  const uint32_t full = base + C::kBarOffset, empty = full + C::kStages * 8;
  const uint32_t norms_done = empty + C::kStages * 8, norms = base + C::kNormOffset;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  const int cta = static_cast<int>(blockIdx.x);
  const int groups = p.groups;
  int u_begin, u_end, first_tile;
  if (p.split > 0) {  // CTAs that share a tile
    first_tile = over_split(p, cta);
    const int part = cta - first_tile * p.split;
    u_begin = first_tile * groups + first_unit(p, part);
    u_end = first_tile * groups + first_unit(p, part + 1);
  } else {
    u_begin = first_unit(p, cta), u_end = first_unit(p, cta + 1);
    first_tile = u_begin / groups;
  }

  TRACE(0);
  ptx::grid_launch_dependents();
  // The producer's: its next unit. A tile starts at stage 0.
  struct Cursor {
    int unit, tile, group, stage;
  };
  const Cursor start{u_begin, first_tile, u_begin - first_tile * groups, 0};
  auto advance = [&](Cursor& c) {
    ++c.unit;
    if (++c.stage == C::kStages) c.stage = 0;
    if (++c.group == groups) c.group = c.stage = 0, ++c.tile;
  };
  const int64_t tile128_bytes = static_cast<int64_t>(groups) * 2 * kBlockBytes;
  auto load_w = [&](const Cursor& c) {
    const uint32_t to = base + c.stage * C::kStageBytes + C::kWOffset, bar = full + c.stage * 8;
    const uint8_t* from =
        p.weights + c.tile * (kRowBlocks / 2) * tile128_bytes + c.group * (2 * kBlockBytes);
    ptx::mbarrier_expect(bar, C::kWBytes + C::kSlabBytes);
#pragma unroll
    for (int b = 0; b < kRowBlocks / 2; ++b) {
      ptx::bulk_load(to + b * 2 * kBlockBytes, from + b * tile128_bytes, 2 * kBlockBytes, bar,
                     ptx::policy_evict_first());
    }
  };
  // Weights do not depend on the kernel before: a ring of them is under way first, even before the
  // CTA's warps meet.
  const int early = min(min(C::kStages, u_end - u_begin), groups - start.group);
  if (tid == kConsumers) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, kConsumerWarps / C::kWays);
    }
    ptx::mbarrier_init(norms_done, 32);
    ptx::mbarrier_init_fence();
    Cursor c = start;
    for (int i = 0; i < early; ++i, advance(c)) load_w(c);
  }
  __syncthreads();

  if (warp == kConsumerWarps) {
    if (lane == 0) {
      const auto* x = reinterpret_cast<const uint8_t*>(p.x);
      auto load_x = [&](const Cursor& c) {
        ptx::bulk_load(base + c.stage * C::kStageBytes, x + c.group * C::kSlabBytes, C::kSlabBytes,
                       full + c.stage * 8, ptx::policy_evict_normal());
      };
      ptx::grid_dependency_wait();
      Cursor c = start;
      for (int i = 0; i < early; ++i, advance(c)) load_x(c);
      uint32_t parities = ~0u << early;  // of the empty barriers, one bit a stage
      for (; c.unit < u_end; advance(c)) {
        ptx::mbarrier_wait(empty + c.stage * 8, parities >> c.stage & 1);
        parities ^= 1u << c.stage;
        load_w(c);
        load_x(c);
      }
    }
    return;
  }
  if (warp > kConsumerWarps) {
    const int idle = warp - kConsumerWarps - 1;
    prefetch_epilogue(p, static_cast<Epilogue>(p.epilogue), first_tile * C::kRows,
                      ((u_end - 1) / groups + 1) * C::kRows, idle * 32 + lane, kIdleWarps * 32);
    ptx::grid_dependency_wait();
    add_up_squares<kTokens, kIdleWarps>(p, norms, idle, lane, 1.0f);
    if (idle == 0) ptx::mbarrier_arrive(norms_done);
    return;
  }

  const int wg = warp >> 2, m16 = warp & 3, g8 = lane >> 2, t4 = lane & 3;
  const int row_block = wg % kRowBlocks, way = wg / kRowBlocks;
  // Of this warpgroup's first stage: its barriers, x, this thread's weight words, row scales and
  // factors. The others are kStep further.
  constexpr int kOwn = C::kStages / C::kWays, kStep = C::kWays * C::kStageBytes;
  const uint32_t my_full = full + way * 8, my_empty = empty + way * 8;
  const uint32_t my_stage = base + way * C::kStageBytes;
  const uint32_t x_at = ptx::descriptor_address(my_stage);
  const uint32_t block_at = my_stage + C::kWOffset + row_block * kBlockBytes;
  const uint32_t words_at = block_at + m16 * 1024 + lane * 16;
  const uint32_t scales_at = block_at + kNibbleBytes + g8 * 16 + m16 * 4;
  const uint32_t factors_at = my_stage + C::kFactorsOffset + t4 * 16;
  uint32_t a[4][4];  // operand A of a group's k32 steps
  // Of rows g8 and g8 + 8 of the block, tokens 8 * octet + 2 * t4 and the next.
  float sums[kOctets][4];
  uint32_t parities = 0;  // of the full barriers, one bit a stage
  auto arrived = [&](int s) {
    return ptx::mbarrier_test(my_full + s * C::kWays * 8, parities >> s & 1);
  };
  auto fetch = [&](uint32_t(&words)[2][4], int s, bool is_there) {
    if (!is_there) ptx::mbarrier_wait(my_full + s * C::kWays * 8, parities >> s & 1);
    parities ^= 1u << s;
    ptx::load_shared_16(words[0], words_at + s * kStep);
    ptx::load_shared_16(words[1], words_at + s * kStep + 512);
  };

  TRACE(1);
  ptx::grid_dependency_wait();
  TRACE(2);
  for (int tile = first_tile; tile * groups < u_end; ++tile) {
    const int tile_begin = tile * groups, tile_end = tile_begin + groups;
    const int units = min(tile_end, u_end) - max(tile_begin, u_begin);
    int left = (units - way + C::kWays - 1) / C::kWays;  // of this warpgroup
#pragma unroll
    for (int o = 0; o < kOctets; ++o)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[o][i] = 0.0f;
    if (left > 0) {
      uint32_t words[2][4];
      fetch(words, 0, false);
      if (tile == first_tile) TRACE(3);
      ptx::mask_digits(a, words);
      // The stages are unrolled: every address below is a register plus a constant.
#pragma unroll 1
      do {
#pragma unroll
        for (int s = 0; s < kOwn; ++s) {
          int digits[C::kColumns / 2];
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const uint64_t x = ptx::descriptor_k_major(x_at + (s * kStep >> 4) + k * 2);
            if (k == 0) {
              Multiply::rs_u8_first(digits, a[k], x);
            } else {
              Multiply::rs_u8(digits, a[k], x);
            }
          }
          ptx::wgmma_commit();
          const uint32_t pair = ptx::load_shared_4(scales_at + s * kStep);
          float factors[kOctets][4];
#pragma unroll
          for (int o = 0; o < kOctets; ++o) {
            ptx::load_shared_f32x4(factors[o], factors_at + s * kStep + o * 64);
          }
          --left;
          const int next = s + 1 < kOwn ? s + 1 : 0;
          const bool is_there = left > 0 && arrived(next);
          if (is_there) fetch(words, next, true);
          ptx::wgmma_wait<0>();
          __syncwarp();  // lane 0 speaks for what all have read
          if (lane == 0) ptx::mbarrier_arrive(my_empty + s * C::kWays * 8);
#pragma unroll
          for (int o = 0; o < kOctets; ++o) {
            ptx::add_digits(sums[o], reinterpret_cast<const int(&)[8]>(digits[o * 8]), pair,
                            factors[o]);
          }
          if (left == 0) break;
          if (!is_there) fetch(words, next, false);
          ptx::mask_digits(a, words);
        }
      } while (left > 0);
    }

    TRACE(4);
    // [way][token][row] in shared memory; then a thread has adjacent rows of one token.
    ptx::named_barrier(1, kConsumers);  // what was there has been read
    const uint32_t out = base + C::kOutOffset;
    {
      const uint32_t to =
          out + ((way * kTokens + 2 * t4) * C::kOutStride + row_block * 64 + m16 * 16 + g8) * 4;
#pragma unroll
      for (int o = 0; o < kOctets; ++o)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::store_shared_f32(to + ((8 * o + (i & 1)) * C::kOutStride + 8 * (i >> 1)) * 4,
                                sums[o][i]);
        }
    }
    ptx::named_barrier(1, kConsumers);
    const bool head = u_begin > tile_begin;  // an earlier CTA owns the tile
    const int others = head || tile_end <= u_end ? 0
                       : p.split > 0             ? p.split - 1
                                                 : cta_of(p, tile_end - 1) - cta;
    // This thread's kPer rows of a token, the ways' and the other CTAs' sums together; false where
    // they were handed over.
    auto gather = [&](int token, int row, auto& v) {
      constexpr int kPer = sizeof v / 4;
#pragma unroll
      for (int i = 0; i < kPer; ++i) v[i] = 0.0f;
#pragma unroll
      for (int w = 0; w < C::kWays; ++w)
#pragma unroll
        for (int i = 0; i < kPer; i += 4) {
          float four[4];
          ptx::load_shared_f32x4(four, out + ((w * kTokens + token) * C::kOutStride + row + i) * 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) v[i + j] += four[j];
        }
      float* piece = p.pieces + cta * p.piece_stride + token * C::kRows + row;
      if (head) {
        if (token < p.tokens) {
#pragma unroll
          for (int i = 0; i < kPer; i += 4) {
            hand_over(piece + i, reinterpret_cast<const float(&)[4]>(v[i]));
          }
        }
        return false;
      }
      if (token < p.tokens) take_over_others<kPer>(piece, p.piece_stride, others, v);
      ptx::mbarrier_wait(norms_done, 0);
      const float factor = __uint_as_float(ptx::load_shared_4(norms + token * 4));
#pragma unroll
      for (int i = 0; i < kPer; ++i) v[i] *= factor;
      return true;
    };
    if (p.epilogue == static_cast<int>(Epilogue::kSiluMul)) {
      constexpr int kLanes = C::kRows / 16;  // of a token
      if (tid < kTokens * kLanes) {
        const int token = tid / kLanes, part = tid % kLanes;
        const int column = tile * (C::kRows / 2) + part * 8;
        const bool exists = column < p.out_stride, mine = exists && token < p.tokens;
        float by[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
        if (p.out_scale && exists) load_eight(by, p.out_scale + column);
        float v[16], result[8];
        if (gather(token, part * 16, v)) {
#pragma unroll
          for (int i = 0; i < 8; ++i) result[i] = silu_times(v[i], v[8 + i]) * by[i];
          uint4 packed = pack_eight(result);
          if (mine) {
            *reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(token) * p.out_stride + column) =
                packed;
          }
          if constexpr (kLanes == 16) {
            if (p.rounded) {
              if (!exists) packed = make_uint4(0, 0, 0, 0);
              unpack_eight(result, packed);
              store_digits(p.rounded, cuda_digits::Shape{p.tokens, p.out_stride}, token, tile, part,
                           result, token < p.tokens);
            }
          }
        }
      }
    } else {
      constexpr int kLanes = C::kRows / 8;
      if (tid < kTokens * kLanes) {
        const int token = tid / kLanes, part = tid % kLanes;
        const int row = tile * C::kRows + part * 8;
        const bool exists = row < p.out_stride, mine = exists && token < p.tokens;
        const int64_t to = static_cast<int64_t>(token) * p.out_stride + row;
        const bool residual = p.epilogue == static_cast<int>(Epilogue::kResidual);
        uint4 old = make_uint4(0, 0, 0, 0);
        if (residual && mine) old = *reinterpret_cast<const uint4*>(p.residual + to);
        float weight[8] = {};
        if (p.next && exists) load_eight(weight, p.next_weight + row);
        float v[8];
        if (gather(token, part * 8, v)) {
          if (p.epilogue == static_cast<int>(Epilogue::kFloat)) {
            if (mine) {
              auto* floats = reinterpret_cast<float4*>(reinterpret_cast<float*>(p.out) + to);
              floats[0] = make_float4(v[0], v[1], v[2], v[3]);
              floats[1] = make_float4(v[4], v[5], v[6], v[7]);
            }
          } else {
            float before[8];
            unpack_eight(before, old);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] += before[i];
            const uint4 packed = exists ? pack_eight(v) : make_uint4(0, 0, 0, 0);
            if (mine) *reinterpret_cast<uint4*>(p.out + to) = packed;
            if (p.next) {
              unpack_eight(v, packed);
              float squares = 0.0f;
#pragma unroll
              for (int i = 0; i < 8; ++i) {
                squares = fmaf(v[i], v[i], squares);
                v[i] *= weight[i];
              }
              unpack_eight(v, pack_eight(v));  // as the bf16 kernels round the norm's input
#pragma unroll
              for (int offset = 4; offset; offset /= 2) {
                squares += __shfl_xor_sync(0xffffffffu, squares, offset);
              }
              if (mine && part % 8 == 0) {
                p.next_squares[row / kNormTileRows * norm_stride(p.tokens) + token] = squares;
              }
              store_digits(reinterpret_cast<uint8_t*>(p.next),
                           cuda_digits::Shape{p.tokens, p.out_stride}, token,
                           tile * (kRowBlocks / 2) + part / 16, part % 16, v, token < p.tokens);
            }
          }
        }
      }
    }
    TRACE(5);
  }
  TRACE(6);
  TRACE_SM();
}

template <int kTokens, int kRowBlocks>
int launch(const LinearArgs& args, void* stream) {
  using C = Config<kTokens, kRowBlocks>;
  LinearParams p = make_linear_params(args, C::kRows);
  p.epilogue = static_cast<int>(args.epilogue);
  const int units = p.num_tiles * p.groups;
  // Where whole tiles keep nearly all SMs busy, none is cut: a cut one costs its CTAs an exchange
  // and one end of a tile more (gate_up at 16 tokens 64.6 us, whole 59.8).
  const int per_cta = (p.num_tiles + args.num_sms - 1) / args.num_sms;
  const int whole = p.num_tiles % per_cta == 0 ? p.num_tiles / per_cta : 0;
  const int split = std::min(args.num_sms / p.num_tiles, p.groups);
  int grid = std::min(args.num_sms, units);
  if (whole * 10 >= args.num_sms * 9) {
    grid = whole;
    set_shares(p, units, grid);
  } else if (split > 1 && p.groups <= 64) {
    // A short k: its tiles are cut into equal parts. A CTA with ends of two tiles would spend on
    // the second what three stages take, and it has five or so.
    grid = p.num_tiles * split;
    set_split(p, split);
  } else {
    set_shares(p, units, grid);
  }
  return launch_linear(linear_digits_kernel<kTokens, kRowBlocks>, args, grid, kThreads,
                       C::kSmemBytes, stream, 1, p);
}

}  // namespace

int digits_tactic(const LinearArgs& args) {
  return (args.rows + 127) / 128 % 2 == 0 && args.epilogue == Epilogue::kSiluMul ? 4 : 2;
}

bool linear_digits_rounds(const LinearArgs& args) {
  return args.epilogue != Epilogue::kSiluMul || digits_tactic(args) == 4;
}

int linear_digits(const LinearArgs& args, void* stream) {
  if (args.tokens < 1 || args.tokens > cuda_digits::kMaxTokens || args.k % 8 || args.rows % 8) {
    return cudaErrorInvalidValue;
  }
  int row_blocks = args.tactic < 0 ? digits_tactic(args) : args.tactic;
  if ((args.rows + 127) / 128 % 2) row_blocks = 2;
  if (args.rounded && row_blocks != 4) return cudaErrorInvalidValue;  // linear_digits_rounds()
  if (args.tokens <= 8) {  // only to compare: linear_small is faster there (docs/kernels.md)
    return row_blocks == 4 ? launch<8, 4>(args, stream) : launch<8, 2>(args, stream);
  }
  return row_blocks == 4 ? launch<16, 4>(args, stream) : launch<16, 2>(args, stream);
}

}  // namespace nibble::cuda
