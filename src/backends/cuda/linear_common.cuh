// What the linear kernels share: parameters, the epilogue, the last-arriver test, the launch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "backends/cuda/ptx/dequant.cuh"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {

struct LinearParams {
  const uint8_t* weights;
  int num_tiles;           // row tiles, as the kernel cuts them
  int groups;              // K / 128
  int token_tiles, split;  // linear_wgmma
  int split_inverse;       // 2^16 / split, rounded up
  int parts;               // linear_wgmma: of k that a CTA sums one by one
  bool in_order;           // as in LinearArgs
  int epilogue;            // linear_wgmma: an Epilogue
  int early_slots;         // linear_small: ring slots requested before the dependency is met
  int units, units_left;   // of a CTA (linear_small) or groups of a part; so many have one more
  int tokens, rows, k, x_stride, out_stride;
  const __nv_bfloat16* x;
  __nv_bfloat16* out;  // float* for kFloat
  const __nv_bfloat16* residual;
  const float* out_scale;
  __nv_bfloat16* next;  // as in LinearArgs
  const float* next_weight;
  float* next_squares;
  const float* squares;
  float eps;
  uint8_t* rounded;
  float largest_scale;
  float* pieces;  // [CTAs][piece_stride], all kEmpty between calls
  int64_t piece_stride;
  float* stash;      // [CTAs][kStashFloats]
  long long* trace;  // [CTAs][8] clock stamps of a NIBBLE_TRACE build, or null
};

// Clock stamps of a -DNIBBLE_TRACE build, by the CTA's first thread: 0 start, 1 weights requested,
// 2 dependency met, 3 first x there, 4 last main loop done, 5 sums of other CTAs added, 6 end.
#ifdef NIBBLE_TRACE
#define TRACE(i)                                                                \
  do {                                                                          \
    if (threadIdx.x == 0 && p.trace) p.trace[blockIdx.x * 8 + (i)] = clock64(); \
  } while (0)
#define TRACE_SM()                                                     \
  do {                                                                 \
    uint32_t sm;                                                       \
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));                    \
    if (threadIdx.x == 0 && p.trace) p.trace[blockIdx.x * 8 + 7] = sm; \
  } while (0)
#else
#define TRACE(i) \
  do {           \
  } while (0)
#define TRACE_SM() TRACE(7)
#endif

// Sums a CTA gets, for each of two tiles that take turns: at most 8 senders x its share of a tile
// of 256 rows x 128 tokens, rounded up to eights of tokens.
inline constexpr int64_t kPieceFloats = 3 * 32768;
inline constexpr int64_t kStashFloats = 256 * 128;  // sums of a tile

inline LinearParams make_linear_params(const LinearArgs& args, int tile_rows) {
  LinearParams p{};
  p.weights = static_cast<const uint8_t*>(args.weights);
  const cuda_layout::Shape shape{args.rows, args.k};
  p.num_tiles = static_cast<int>(shape.num_tiles() * cuda_layout::kTileRows / tile_rows);
  p.groups = static_cast<int>(shape.num_groups());
  p.tokens = args.tokens;
  p.rows = static_cast<int>(args.rows);
  p.k = static_cast<int>(args.k);
  p.x = static_cast<const __nv_bfloat16*>(args.x);
  p.x_stride = static_cast<int>(args.x_stride);
  p.out_stride = static_cast<int>(args.epilogue == Epilogue::kSiluMul ? args.rows / 2 : args.rows);
  p.out = static_cast<__nv_bfloat16*>(args.out);
  p.residual = static_cast<const __nv_bfloat16*>(args.residual);
  p.out_scale = args.out_scale;
  p.next = static_cast<__nv_bfloat16*>(args.next);
  p.next_weight = args.next_weight;
  p.next_squares = args.next_squares;
  p.squares = args.squares;
  p.eps = args.eps;
  p.rounded = static_cast<uint8_t*>(args.rounded);
  p.largest_scale = args.largest_scale;
  p.pieces = static_cast<float*>(args.workspace);
  p.piece_stride = kPieceFloats;
  p.stash = p.pieces + args.num_sms * kPieceFloats;
  p.parts = 1;
  p.in_order = args.in_order;
  p.trace = static_cast<long long*>(args.trace);
  return p;
}

template <typename... Parameters>
int launch_linear(void (*kernel)(Parameters...), const LinearArgs& args, int grid, int threads,
                  int smem_bytes, void* stream, int cluster, const Parameters&... parameters) {
  // NOTE: once per kernel would do; the call is cheap and captures fine in a graph.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (args.dependent) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

// Eight adjacent values of a thread.
__device__ __forceinline__ uint4 pack_eight(const float (&v)[8]) {
  return make_uint4(ptx::pack_bf16(v[0], v[1]), ptx::pack_bf16(v[2], v[3]),
                    ptx::pack_bf16(v[4], v[5]), ptx::pack_bf16(v[6], v[7]));
}
__device__ __forceinline__ void unpack_eight(float (&v)[8], const uint4& x) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = ptx::low_bf16(words[i]), v[2 * i + 1] = ptx::high_bf16(words[i]);
  }
}
__device__ __forceinline__ void load_eight(float (&v)[8], const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// The sums of squares of a norm: [tile of kNormTileRows][token], tokens rounded up.
__device__ __forceinline__ int norm_stride(int tokens) { return (tokens + 7) / 8 * 8; }
__device__ __forceinline__ int norm_tiles(int rows) {
  return (rows + kNormTileRows - 1) / kNormTileRows;
}
__device__ __forceinline__ float norm_factor(const LinearParams& p, float squares) {
  return rsqrtf(squares / static_cast<float>(p.k) + p.eps);
}

// By what the results of up to 64 tokens are multiplied, to `factors` in shared memory (f32
// [kTokens], and as many for each other warp): 1/rms where the linear before left squares, times
// `undo`. By kWarps warps, of which this is `warp`; the first has the result. Named barrier 7.
template <int kTokens, int kWarps>
__device__ __forceinline__ void add_up_squares(const LinearParams& p, uint32_t factors, int warp,
                                               int lane, float undo) {
  // A lane has two tokens and its warp's part of their sums of squares.
  const uint32_t to = factors + warp * kTokens * 4 + lane * 8;
  const int stride = norm_stride(p.tokens);
  if (p.squares && 2 * lane < stride && 2 * lane < kTokens) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int i = warp; i < norm_tiles(p.k); i += kWarps) {
      const float2 v = *reinterpret_cast<const float2*>(p.squares + i * stride + 2 * lane);
      sum.x += v.x, sum.y += v.y;
    }
    ptx::store_shared_f32x2(to, sum);
  }
  ptx::named_barrier(7, kWarps * 32);
  if (warp == 0 && 2 * lane < kTokens) {
    float2 by = make_float2(1.0f, 1.0f);
    if (p.squares) {
      by = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const float2 v = ptx::load_shared_f32x2(to + i * kTokens * 4);
        by.x += v.x, by.y += v.y;
      }
      by = make_float2(norm_factor(p, by.x), norm_factor(p, by.y));
    }
    ptx::store_shared_f32x2(to, make_float2(by.x * undo, by.y * undo));
  }
}

// Undo the dequantizer's 2^-13, apply the epilogue and store kPer consecutive packed rows
// (tile_row + row ...) of one token, times `factor`. Called by whole warps: lane l holds rows kPer
// * l ...
template <Epilogue kEpilogue, int kPer>
__device__ __forceinline__ void store_rows(const LinearParams& p, int token, int tile_row, int row,
                                           float (&value)[kPer], float factor = 1.0f) {
  factor *= ptx::kDequantUndo;
#pragma unroll
  for (int i = 0; i < kPer; ++i) value[i] *= factor;
  if constexpr (kEpilogue == Epilogue::kSiluMul) {
    // Packed rows 16b..16b+7 are gate 8b.., 16b+8.. are up 8b..: the partner is 8/kPer lanes on.
    float up[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) up[i] = __shfl_down_sync(0xffffffffu, value[i], 8 / kPer);
    if ((row & 8) || token >= p.tokens) return;
    const int column = (tile_row + row) / 16 * 8 + (row & 7);
    if (column >= p.out_stride) return;
    __nv_bfloat16* to = p.out + static_cast<int64_t>(token) * p.out_stride + column;
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      float v[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        v[j] = value[i + j] / (1.0f + __expf(-value[i + j])) * up[i + j];
        if (p.out_scale) v[j] *= p.out_scale[column + i + j];
      }
      *reinterpret_cast<__nv_bfloat162*>(to + i) = __floats2bfloat162_rn(v[0], v[1]);
    }
  } else if constexpr (kEpilogue == Epilogue::kFloat) {
    if (token >= p.tokens || tile_row + row >= p.rows) return;
    float* to = reinterpret_cast<float*>(p.out) + static_cast<int64_t>(token) * p.out_stride +
                tile_row + row;
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      *reinterpret_cast<float2*>(to + i) = make_float2(value[i], value[i + 1]);
    }
  } else {
    if (token >= p.tokens) return;
    const int64_t at = static_cast<int64_t>(token) * p.out_stride + tile_row + row;
    float squares = 0.0f;
    if (tile_row + row < p.rows) {
#pragma unroll
      for (int i = 0; i < kPer; i += 2) {
        float v0 = value[i], v1 = value[i + 1];
        if constexpr (kEpilogue == Epilogue::kResidual) {
          const __nv_bfloat162 r = *reinterpret_cast<const __nv_bfloat162*>(p.residual + at + i);
          v0 += __low2float(r);
          v1 += __high2float(r);
        }
        const __nv_bfloat162 rounded = __floats2bfloat162_rn(v0, v1);
        *reinterpret_cast<__nv_bfloat162*>(p.out + at + i) = rounded;
        if constexpr (kEpilogue == Epilogue::kResidual) {
          if (p.next) {
            v0 = __low2float(rounded), v1 = __high2float(rounded);
            squares = fmaf(v0, v0, fmaf(v1, v1, squares));
            const float* weight = p.next_weight + tile_row + row + i;
            *reinterpret_cast<__nv_bfloat162*>(p.next + at + i) =
                __floats2bfloat162_rn(v0 * weight[0], v1 * weight[1]);
          }
        }
      }
    }
    if constexpr (kEpilogue == Epilogue::kResidual) {
      if (p.next) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2) {
          squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        }
        if (row == 0) {
          p.next_squares[tile_row / kNormTileRows * norm_stride(p.tokens) + token] = squares;
        }
      }
    }
  }
}

// The end of the wgmma kernels' epilogue for a thread: eight adjacent rows of one token from shared
// memory at `from`, times factor, to p.out + to. Returns the bf16 it wrote.
__device__ __forceinline__ uint4 store_part(const LinearParams& p, int64_t to, uint32_t from,
                                            const uint4& residual, float factor = 1.0f) {
  float v[4], w[4];
  ptx::load_shared_f32x4(v, from);
  ptx::load_shared_f32x4(w, from + 16);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] *= factor, w[j] *= factor;
  if (p.epilogue == static_cast<int>(Epilogue::kFloat)) {
    float4* out = reinterpret_cast<float4*>(reinterpret_cast<float*>(p.out) + to);
    out[0] = make_float4(v[0], v[1], v[2], v[3]);
    out[1] = make_float4(w[0], w[1], w[2], w[3]);
    return make_uint4(0, 0, 0, 0);
  }
  const uint4 sum = make_uint4(
      ptx::pack_bf16(v[0] + ptx::low_bf16(residual.x), v[1] + ptx::high_bf16(residual.x)),
      ptx::pack_bf16(v[2] + ptx::low_bf16(residual.y), v[3] + ptx::high_bf16(residual.y)),
      ptx::pack_bf16(w[0] + ptx::low_bf16(residual.z), w[1] + ptx::high_bf16(residual.z)),
      ptx::pack_bf16(w[2] + ptx::low_bf16(residual.w), w[3] + ptx::high_bf16(residual.w)));
  *reinterpret_cast<uint4*>(p.out + to) = sum;
  return sum;
}

// What the next norm gets of the residual stream (LinearArgs::next) from a thread with eight
// adjacent rows, `column` and on; eight neighbouring lanes have the 64 rows of one token.
class NextNorm {
 public:
  NextNorm() = default;
  __device__ __forceinline__ NextNorm(const LinearParams& p, int column) {
    if (p.next && column < p.out_stride) {
      a_ = *reinterpret_cast<const float4*>(p.next_weight + column);
      b_ = *reinterpret_cast<const float4*>(p.next_weight + column + 4);
    }
  }
  // By whole warps. x: what was written to p.out + to; 0 where to is -1.
  __device__ __forceinline__ void store(const LinearParams& p, int64_t to, int column,
                                        const uint4& x) const {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      squares = fmaf(ptx::low_bf16(words[i]), ptx::low_bf16(words[i]), squares);
      squares = fmaf(ptx::high_bf16(words[i]), ptx::high_bf16(words[i]), squares);
    }
#pragma unroll
    for (int offset = 4; offset; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    if (to < 0) return;
    *reinterpret_cast<uint4*>(p.next + to) =
        make_uint4(ptx::pack_bf16(ptx::low_bf16(x.x) * a_.x, ptx::high_bf16(x.x) * a_.y),
                   ptx::pack_bf16(ptx::low_bf16(x.y) * a_.z, ptx::high_bf16(x.y) * a_.w),
                   ptx::pack_bf16(ptx::low_bf16(x.z) * b_.x, ptx::high_bf16(x.z) * b_.y),
                   ptx::pack_bf16(ptx::low_bf16(x.w) * b_.z, ptx::high_bf16(x.w) * b_.w));
    if (column % kNormTileRows == 0) {
      const auto token = static_cast<int>(to / p.out_stride);
      p.next_squares[column / kNormTileRows * norm_stride(p.tokens) + token] = squares;
    }
  }

 private:
  float4 a_ = {}, b_ = {};
};

// What the epilogue of packed rows [begin, end) multiplies by comes from device memory once a step:
// into L2 ahead of it, by `threads` threads.
__device__ __forceinline__ void prefetch_epilogue(const LinearParams& p, Epilogue epilogue,
                                                  int begin, int end, int thread, int threads) {
  const bool silu = epilogue == Epilogue::kSiluMul;
  const float* scale = silu                              ? p.out_scale
                       : epilogue == Epilogue::kResidual ? p.next_weight
                                                         : nullptr;
  if (!scale) return;
  if (silu) begin /= 2, end /= 2;
  for (int i = begin + thread * 32; i < min(end, p.out_stride); i += threads * 32) {
    ptx::prefetch_l2(scale + i);
  }
}

__device__ __forceinline__ float silu_times(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// The epilogue of a warpgroup for SiLU(gate) * up: its block of 64 packed rows (32 columns of out,
// from `first_column` on) times kOctets eights of tokens, of which [own, own_end) are its to store.
// A thread has gate and up of one column in the same sums, so what goes through shared memory is
// the rounded result, kPassOctets at a time: `staging` holds 512 bytes each, 64 a token, 16-byte
// chunks swizzled. four(i): the sums of eight i, as wgmma leaves them; factor(i): what the tokens 2
// t4 and the next of it are multiplied by; first_token(i): its first token. `barrier`: a named one
// of this warpgroup, whose thread `id` & 127 this is.
template <int kOctets, int kPassOctets, typename Four, typename Factor, typename FirstToken>
__device__ __forceinline__ void store_silu(const LinearParams& p, uint32_t staging, int barrier,
                                           int id, int first_column, int own, int own_end,
                                           Four four, Factor factor, FirstToken first_token) {
  static_assert(kOctets % kPassOctets == 0);
  const int thread = id & 127, lane = id & 31, m16 = thread >> 5;
  const int own_column = first_column + 8 * m16 + (lane >> 2);
  const float scale = p.out_scale && own_column < p.out_stride ? p.out_scale[own_column] : 1.0f;
  auto at = [&](int token, int chunk) {  // of the pass
    return staging + token * 64 + ((chunk ^ (token >> 1 & 3)) << 4);
  };
#pragma unroll
  for (int first = 0; first < kOctets; first += kPassOctets) {
    if (first + kPassOctets <= own || first >= own_end) continue;
    uint32_t packed[kPassOctets];
#pragma unroll
    for (int i = 0; i < kPassOctets; ++i) {
      const float(&v)[4] = four(first + i);
      const float2 f = factor(first + i);
      packed[i] = ptx::pack_bf16(silu_times(v[0] * f.x, v[2] * f.x) * scale,
                                 silu_times(v[1] * f.y, v[3] * f.y) * scale);
    }
    ptx::named_barrier(barrier, 128);  // the pass before has been read
    if constexpr (kPassOctets % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kPassOctets; i += 4) {
        ptx::store_matrix_transposed_x4(at(8 * i + lane, m16), packed[i], packed[i + 1],
                                        packed[i + 2], packed[i + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPassOctets; ++i) {
        ptx::store_matrix_transposed(at(8 * i + (lane & 7), m16), packed[i]);
      }
    }
    ptx::named_barrier(barrier, 128);
#pragma unroll
    for (int i = 0; i < (kPassOctets + 3) / 4; ++i) {
      const int token = i * 32 + (thread >> 2), chunk = thread & 3, octet = first + token / 8;
      const int row = first_token(octet) + (token & 7), column = first_column + chunk * 8;
      if (octet < own || octet >= own_end || row >= p.tokens || column >= p.out_stride ||
          octet >= first + kPassOctets) {
        continue;
      }
      uint32_t bits[4];
      ptx::load_shared_16(bits, at(token, chunk));
      *reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(row) * p.out_stride + column) =
          make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  }
}

// Dividing costs a kernel's first request for weights 150 clocks, so the host does it where it can.
inline void set_shares(LinearParams& p, int units, int parts) {
  p.units = units / parts;
  p.units_left = units % parts;
}
inline void set_split(LinearParams& p, int split) {
  p.split = split;
  p.split_inverse = (65536 + split - 1) / split;
  set_shares(p, p.groups, split);
}
// x / split, x below 2^12.
__device__ __forceinline__ int over_split(const LinearParams& p, int x) {
  return x * p.split_inverse >> 16;
}
__device__ __forceinline__ int first_unit(const LinearParams& p, int part) {
  return part * p.units + min(part, p.units_left);
}
// Whose a unit is: the first units_left parts have one more than the others.
__device__ __forceinline__ int cta_of(const LinearParams& p, int unit) {
  const int rest = unit - p.units_left * (p.units + 1);
  return rest < 0 ? unit / (p.units + 1) : p.units_left + rest / p.units;
}

// Tile t of a list for wgmma kernels: row tiles of a patch are the fastest index, then its token
// tiles, so that the tiles in flight share both operands in L2.
inline constexpr int kPatchRows = 12;  // row tiles of a patch
struct Tile {
  int row, token;
};
__device__ __forceinline__ Tile find_tile(int t, int row_tiles, int token_tiles, int patch) {
  if (token_tiles == 1) return {t, 0};
  const int base = t / (patch * token_tiles) * patch;
  const int in = t - base * token_tiles, width = min(patch, row_tiles - base);
  return {base + in % width, in / width};
}

// One-way exchange of f32 sums between CTAs of one grid. An empty place holds a bit pattern that no
// arithmetic gives (its NaN is 0x7fffffff), so whoever sees another one sees the value: no fence,
// no flag, no bytes but the sums. The reader empties the place; the next kernel that uses it is
// ordered after this one.
inline constexpr uint32_t kEmpty = 0xffffffffu;

__device__ __forceinline__ void hand_over(float* piece, const float (&v)[2]) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(piece), "f"(v[0]), "f"(v[1])
               : "memory");
}
__device__ __forceinline__ void hand_over(float* piece, const float (&v)[4]) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(piece), "f"(v[0]),
               "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}
__device__ __forceinline__ bool peek(const float* piece, uint32_t (&v)[2]) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1])
               : "l"(piece)
               : "memory");
  return v[0] != kEmpty && v[1] != kEmpty;
}
__device__ __forceinline__ bool peek(const float* piece, uint32_t (&v)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(piece)
               : "memory");
  return v[0] != kEmpty && v[1] != kEmpty && v[2] != kEmpty && v[3] != kEmpty;
}

// Adds kCount vectors of kPer floats, `stride` floats apart: all loads in flight at once, again
// until the last is there; then empties the places.
template <int kPer, int kCount, int kSums>
__device__ __forceinline__ void take_over(float* piece, int stride, float (&sum)[kSums]) {
  static_assert(kPer * kCount <= kSums);
  const float empty = __uint_as_float(kEmpty);
  const float empties[4] = {empty, empty, empty, empty};
  uint32_t v[kCount][kPer];
  bool ready;
  do {
    ready = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) ready &= peek(piece + i * stride, v[i]);
  } while (!ready);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    hand_over(piece + i * stride, reinterpret_cast<const float(&)[kPer]>(empties));
#pragma unroll
    for (int j = 0; j < kPer; ++j) sum[i * kPer + j] += __uint_as_float(v[i][j]);
  }
}

// Four floats from each of the `split` senders, in their order, the loads of four in flight
// together: added to sum, but for what `rank` would send, or where that has been sent too (all),
// in place of it.
__device__ __forceinline__ void take_over_senders(float* first, int sender_stride, int rank,
                                                  int split, bool all, float (&sum)[4]) {
  const float empty = __uint_as_float(kEmpty);
  const float empties[4] = {empty, empty, empty, empty};
  const int senders = all ? split : split - 1;
  if (all) rank = split;
  for (int n = 0; n < senders; n += 4) {
    // NOTE: initialised, though never used unread: otherwise they live from the kernel's start, and
    // ptxas keeps 16 registers for them through the main loop.
    uint32_t v[4][4] = {};
    bool ready;
    do {
      ready = true;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (n + s < senders) {
          const int sender = n + s + (n + s >= rank);
          ready &= peek(first + sender * sender_stride, v[s]);
        }
      }
    } while (!ready);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (n + s < senders) {
        const int sender = n + s + (n + s >= rank);
        hand_over(first + sender * sender_stride, empties);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float got = __uint_as_float(v[s][j]);
          sum[j] = all && n + s == 0 ? got : sum[j] + got;
        }
      }
    }
  }
}

// Adds four floats from each CTA but `rank` of the `split` senders, in their order, to each of two
// vectors whose places are `step` floats apart, where `take` says so of each: half
// as many round trips to L2 one after the other.
__device__ __forceinline__ void take_over_two(float* first, int step, int sender_stride, int rank,
                                              int split, bool take_a, bool take_b, float (&a)[4],
                                              float (&b)[4]) {
  const float empty = __uint_as_float(kEmpty);
  const float empties[4] = {empty, empty, empty, empty};
  for (int n = 0; n + 1 < split; n += 2) {
    uint32_t v[2][2][4] = {};  // NOTE: initialised, as above
    bool ready;
    do {
      ready = true;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (n + s + 1 < split) {
          const float* from = first + (n + s + (n + s >= rank)) * sender_stride;
          if (take_a) ready &= peek(from, v[s][0]);
          if (take_b) ready &= peek(from + step, v[s][1]);
        }
      }
    } while (!ready);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (n + s + 1 < split) {
        float* from = first + (n + s + (n + s >= rank)) * sender_stride;
        if (take_a) hand_over(from, empties);
        if (take_b) hand_over(from + step, empties);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (take_a) a[j] += __uint_as_float(v[s][0][j]);
          if (take_b) b[j] += __uint_as_float(v[s][1][j]);
        }
      }
    }
  }
}

}  // namespace nibble::cuda
