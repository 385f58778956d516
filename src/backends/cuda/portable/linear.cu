// The portable int4 linear: out[M, N] = x[M, K] W4[N, K]^T (+ residual, or SiLU(gate) * up) for any
// M on anything from sm_80: cp.async, ldmatrix and mma.sync m16n8k16, nothing newer.
//
// Layouts: W in layout.h's blocks, the same bytes as for the sm_90 kernels; x, out bf16 row-major.
// Every index is a function of linear_index.h, which a CPU test walks.
// Bytes: N*K*0.515625 of weights once per kTokens tokens (neighbours in launch order, so L2 serves
// all but the first) and 2*K of x per token and row tile, from L2. Flops: 2*M*N*K, weights as
// operand A, tokens as its n, so that one token pads to 8 only.
//
// Work split: a CTA of 8 warps has 128 rows x kTokens (8, 16, 32, 64) tokens; a ring of stages, one
// slab of 128 k each (8448 bytes of weights and the tokens' x), is filled by cp.async. Weights are
// dequantized in registers; warps that share rows dequantize them each. Narrow matrices: the slabs
// are cut into `parts`, one CTA each; whoever of a tile finishes last adds the parts' sums in order
// (a counter, no waiting, so CTAs need not be resident together). Where tokens alone fill the
// device, one CTA walks all parts and adds them in the same order.
//
// So a token's sums are made in one order whatever M is: its bits do not depend on its batch.
//
// Limits: K a multiple of 8 (padded to 128 by the packer), rows a multiple of 8 (16 with SiLU), x
// 16-byte aligned; 99 KB of shared memory. No RMSNorm fusion (LinearArgs::next, squares).
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/portable/linear_index.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

using namespace portable;

struct Params {
  const uint8_t* weights;
  const __nv_bfloat16* x;
  __nv_bfloat16* out;
  const __nv_bfloat16* residual;  // or null
  const float* out_scale;         // or null
  int* counters;
  float* pieces;
  int64_t x_stride;
  int row_tiles, token_tiles, groups, parts;
  int tokens, k, columns;  // columns of out
  bool split, silu, f32;   // f32: out is float*
};

// kSerial: this CTA adds all parts.
template <typename S, bool kSerial>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const Params p) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const TileAt at = tile_at(static_cast<int>(blockIdx.x), p.row_tiles, p.token_tiles);
  const int first_token = at.token_tile * S::kTokens;
  int part = p.split ? static_cast<int>(blockIdx.y) : 0;
  const int begin = part_begin(p.groups, p.parts, part);
  const int end = p.split ? part_begin(p.groups, p.parts, part + 1) : p.groups;
  const uint32_t ring = ptx::smem_address(smem);
  const uint8_t* weights =
      p.weights + (static_cast<int64_t>(at.row_tile) * p.groups) * kWeightBytes + tid * 16;

  auto load = [&](int group, int slot) {
    if (group < end) {
      const uint32_t stage = ring + slot * S::kStageBytes;
      const uint8_t* from = weights + static_cast<int64_t>(group) * kWeightBytes;
#pragma unroll
      for (int i = 0; i < (kWeightBytes / 16 + kThreads - 1) / kThreads; ++i) {
        if (tid + i * kThreads < kWeightBytes / 16) {
          ptx::copy_16(stage + (tid + i * kThreads) * 16, from + i * kThreads * 16, 16);
        }
      }
#pragma unroll
      for (int i = 0; i < (S::kXChunks + kThreads - 1) / kThreads; ++i) {
        const int item = tid + i * kThreads;
        if (S::kXChunks % kThreads == 0 || item < S::kXChunks) {
          const int token = item / (kSlab / 8), chunk = item % (kSlab / 8);
          const int k = group * kSlab + chunk * 8;
          const bool real = first_token + token < p.tokens && k < p.k;  // else zeros
          ptx::copy_16(stage + x_byte<S>(token, chunk),
                       p.x + (real ? (first_token + token) * p.x_stride + k : 0), real ? 16 : 0);
        }
      }
    }
    ptx::copy_commit();
  };

  const int row_tile = first_row_tile<S>(warp), token_tile = first_token_tile<S>(warp);
  float acc[S::kRowTiles][S::kTokenTiles][4] = {};
  float sum[S::kRowTiles][S::kTokenTiles][4] = {};  // of the parts that are done, for kSerial
  const auto add_part = [&] {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < S::kTokenTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[i][j][e] += acc[i][j][e];
          acc[i][j][e] = 0.0f;
        }
  };

  for (int s = 0; s < S::kStages - 1; ++s) load(begin + s, s);
  int slot = 0, next_slot = S::kStages - 1;
  int part_end = kSerial ? part_begin(p.groups, p.parts, 1) : 0;
  for (int group = begin; group < end; ++group) {
    if (kSerial && group == part_end) {
      add_part();
      part_end = part_begin(p.groups, p.parts, ++part + 1);
    }
    ptx::copy_wait<S::kStages - 2>();
    __syncthreads();  // this slab is there for all; all are done with the one before
    load(group + S::kStages - 1, next_slot);
    if (++next_slot == S::kStages) next_slot = 0;
    const uint32_t stage = ring + slot * S::kStageBytes;
    if (++slot == S::kStages) slot = 0;

    ptx::RowScales scales[S::kRowTiles];
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      scales[i] = ptx::row_scales(ptx::load_shared_4(stage + scale_byte(row_tile + i, lane)));
    }
#pragma unroll
    for (int k64 = 0; k64 < 2; ++k64) {
      uint32_t words[S::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        ptx::load_shared_16(words[i], stage + words_byte(row_tile + i, k64, lane));
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t a[S::kRowTiles][2][4];
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) {
          ptx::dequant(a[i][0], words[i][2 * pair], scales[i]);
          ptx::dequant(a[i][1], words[i][2 * pair + 1], scales[i]);
        }
#pragma unroll
        for (int j = 0; j < S::kTokenTiles; ++j) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, stage + operand_b_byte<S>(token_tile + j, k64, pair, lane));
#pragma unroll
          for (int i = 0; i < S::kRowTiles; ++i) {
            ptx::mma_bf16(acc[i][j], a[i][0], b[0], b[1]);
            ptx::mma_bf16(acc[i][j], a[i][1], b[2], b[3]);
          }
        }
      }
    }
  }
  if constexpr (kSerial) add_part();

  if (!kSerial && p.split) {
    const int tile = static_cast<int>(blockIdx.x);
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < S::kTokenTiles; ++j) {
        const int vector = i * S::kTokenTiles + j;
        __stcg(
            reinterpret_cast<float4*>(p.pieces + piece_place<S>(tile, p.parts, part, vector, tid)),
            make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]));
      }
    __threadfence();
    __syncthreads();
    // The counter began at -1. No static shared memory: two CTAs just fit into 100 KB.
    if (!__syncthreads_or(tid == 0 && atomicAdd(p.counters + tile, 1) == p.parts - 2)) return;
    if (tid == 0) p.counters[tile] = -1;
    __threadfence();
    // All parts again, this CTA's too, in their order; up to 8 loads in flight.
    constexpr int kBatch = S::kVectors >= 8 ? 1 : 8 / S::kVectors;
    for (int first = 0; first < p.parts; first += kBatch) {
      float4 v[kBatch][S::kVectors];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int n = 0; n < S::kVectors; ++n) {
          v[b][n] = make_float4(0, 0, 0, 0);
          if (first + b < p.parts) {
            v[b][n] = __ldcg(reinterpret_cast<const float4*>(
                p.pieces + piece_place<S>(tile, p.parts, first + b, n, tid)));
          }
        }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b >= p.parts) break;
#pragma unroll
        for (int n = 0; n < S::kVectors; ++n) {
          float(&s)[4] = sum[n / S::kTokenTiles][n % S::kTokenTiles];
          s[0] += v[b][n].x;
          s[1] += v[b][n].y;
          s[2] += v[b][n].z;
          s[3] += v[b][n].w;
        }
      }
    }
  } else if constexpr (!kSerial) {
    add_part();
  }

  // Through shared memory, so that a warp stores consecutive columns of a token.
  __syncthreads();  // nobody reads the ring any more
  float* staged = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < S::kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = (token_tile + j) * 8 + sum_token(lane, e), tile = row_tile + i;
        const float v = sum[i][j][e] * ptx::kDequantUndo;
        if (!p.silu) {
          staged[sum_place<S>(token, tile * 16 + sum_row(lane, e))] = v;
        } else if (e < 2) {  // gate; e + 2 is the same column's up
          staged[sum_place<S>(token, tile * 8 + sum_row(lane, e))] =
              v / (1.0f + __expf(-v)) * (sum[i][j][e + 2] * ptx::kDequantUndo);
        }
      }
  __syncthreads();
  const int width = p.silu ? kTileRows / 2 : kTileRows;
  for (int i = tid; i < S::kTokens * width / 2; i += kThreads) {
    const int place = i / (width / 2), within = i % (width / 2) * 2;
    const int token = first_token + place, column = at.row_tile * width + within;
    if (token >= p.tokens || column >= p.columns) continue;
    const float2 s = *reinterpret_cast<const float2*>(staged + sum_place<S>(place, within));
    float v[2] = {s.x, s.y};
    const int64_t to = static_cast<int64_t>(token) * p.columns + column;
    if (p.f32) {
      *reinterpret_cast<float2*>(reinterpret_cast<float*>(p.out) + to) = s;
      continue;
    }
    if (p.residual) {
      const __nv_bfloat162 r = *reinterpret_cast<const __nv_bfloat162*>(p.residual + to);
      v[0] += __low2float(r);
      v[1] += __high2float(r);
    }
    if (p.out_scale) {
      v[0] *= p.out_scale[column];
      v[1] *= p.out_scale[column + 1];
    }
    *reinterpret_cast<uint32_t*>(p.out + to) = ptx::pack_bf16(v[0], v[1]);
  }
}

template <typename S, bool kSerial>
int launch(const Params& params, void* stream) {
  const auto kernel = linear_kernel<S, kSerial>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSmemBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(params.row_tiles * params.token_tiles),
                  static_cast<unsigned>(params.split ? params.parts : 1));
  kernel<<<grid, kThreads, S::kSmemBytes, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace

size_t portable_linear_workspace_bytes(int num_sms) {
  return static_cast<size_t>(workspace_bytes(num_sms));
}

PortableTactic portable_tactic(const LinearArgs& args) {
  const cuda_layout::Shape shape{args.rows, args.k};
  const int row_tiles = static_cast<int>(shape.num_tiles());
  PortableTactic t{};
  t.tokens = args.tokens <= 8 ? 8 : args.tokens <= 16 ? 16 : args.tokens <= 32 ? 32 : kMaxTokens;
  t.parts = choose_parts(row_tiles, static_cast<int>(shape.num_groups()), args.num_sms);
  t.split = choose_split(row_tiles, (args.tokens + t.tokens - 1) / t.tokens, t.parts, args.num_sms);
  return t;
}

int portable_linear(const LinearArgs& args, void* stream) {
  const cuda_layout::Shape shape{args.rows, args.k};
  const bool silu = args.epilogue == Epilogue::kSiluMul;
  const PortableTactic tactic =
      args.tactic < 0 ? portable_tactic(args) : PortableTactic::decode(args.tactic);
  if (args.tokens < 1 || args.k % 8 || args.rows % (silu ? 16 : 8) || args.x_stride % 8 ||
      args.next || args.squares || tactic.parts < 1 || tactic.parts > kMaxParts ||
      tactic.parts > shape.num_groups()) {
    return cudaErrorInvalidValue;
  }
  Params p{};
  p.weights = static_cast<const uint8_t*>(args.weights);
  p.x = static_cast<const __nv_bfloat16*>(args.x);
  p.out = static_cast<__nv_bfloat16*>(args.out);
  if (args.epilogue == Epilogue::kResidual) {
    p.residual = static_cast<const __nv_bfloat16*>(args.residual);
  }
  p.out_scale = silu ? args.out_scale : nullptr;
  p.counters = static_cast<int*>(args.workspace);
  p.pieces = reinterpret_cast<float*>(static_cast<uint8_t*>(args.workspace) +
                                      counters_bytes(args.num_sms));
  p.x_stride = args.x_stride;
  p.row_tiles = static_cast<int>(shape.num_tiles());
  p.token_tiles = (args.tokens + tactic.tokens - 1) / tactic.tokens;
  p.groups = static_cast<int>(shape.num_groups());
  p.parts = tactic.parts;
  p.tokens = args.tokens;
  p.k = static_cast<int>(args.k);
  p.columns = static_cast<int>(silu ? args.rows / 2 : args.rows);
  p.split = tactic.split && choose_split(p.row_tiles, p.token_tiles, p.parts, args.num_sms);
  p.silu = silu;
  p.f32 = args.epilogue == Epilogue::kFloat;
  if (p.parts > 1 && !p.split) {  // only ever with many tokens
    return tactic.tokens == kMaxTokens ? launch<Tile64, true>(p, stream) : cudaErrorInvalidValue;
  }
  switch (tactic.tokens) {
    case 8: return launch<Tile8, false>(p, stream);
    case 16: return launch<Tile16, false>(p, stream);
    case 32: return launch<Tile32, false>(p, stream);
    case 64: return launch<Tile64, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
