// The table of kernels that one instruction set exports, and their arguments. Kernels are
// single-threaded and allocate nothing; cpu_backend.cpp splits the work. Every output row is
// computed in an order that depends on neither the number of rows in the call nor the range asked
// for: that is the seam's bitwise invariant. No std headers here or in isa_*.cpp: inline functions
// of std compiled with -mavx512* would be weak symbols that the linker may pick for the whole
// program (scripts/check_symbols). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ops/cpu_int4_layout.h"

namespace nibble::cpu {

constexpr int kKvTile = 32;     // keys scored at once; tiles start at multiples of it
constexpr int kKvSpan = 512;    // online softmax restarts here; spans are merged in order
constexpr int kMaxVector = 16;  // floats of the widest vector: rows of scratch are padded to it

static constexpr int padded(int n) { return (n + kMaxVector - 1) / kMaxVector * kMaxVector; }

/// y[r][n - 16 tile_begin] (+)= sum_k x[r][k] w[n][k] for n in the tiles [tile_begin, tile_end), n
/// < N.
struct Int4Gemm {
  const uint8_t* weight;  // kCpuInt4, tile 0
  int n, k, group;
  int tile_begin, tile_end;
  int rows;
  int act_group;           // int8: channels that share one scale; divides group
  const int8_t* xq;        // int8: [rows, K]
  const float* xscale;     // int8: [rows, K / act_group]
  const int32_t* xoffset;  // int8: [rows, K / act_group] -8 * sum of xq
  const float* x;          // f32: [rows, K]
  float* y;                // row stride ldy
  int64_t ldy;
  bool add;
};

enum class Dense : uint8_t { kF32, kBf16, kF16 };

/// y[r][n - n_begin] (+)= sum_k x[r][k] w[n][k] for n in [n_begin, n_end).
struct DenseGemm {
  Dense type;
  const void* weight;  // [N, K]
  int k;
  int n_begin, n_end;
  int rows;
  const float* x;  // [rows, K]
  float* y;
  int64_t ldy;
  bool add;
  float* scratch;  // kDenseScratch floats
};
constexpr int kDenseKBlock = 256, kDenseNBlock = 12, kDenseMBlock = 96;
constexpr int kDenseScratch =
    kDenseNBlock * kDenseKBlock + kDenseMBlock * kDenseNBlock * kMaxVector;

/// How one (block, kv head) of the paged cache is laid out. K is stored so that 4 channels of a
/// token lie together and tokens follow each other: lanes of a vector are keys, and scores need no
/// horizontal sums.
///   K: int8 [D4/4][tokens][4], f16/f32 [D][tokens]; float k_scale [tokens] (dynamic)
///   V: [tokens][D]; float v_scale [tokens] (dynamic). Every part starts on 64 bytes.
enum class Kv : uint8_t { kInt8Dynamic, kInt8Static, kF16, kF32 };
struct KvLayout {
  Kv type;
  int block_tokens, num_kv_heads, head_dim;
  size_t k_scale, v, v_scale, head_bytes, block_bytes;  // offsets of one head's parts; sizes
};

/// Stores one token's K and V of one kv head at row `row` of the head's area `head`.
struct KvStore {
  const KvLayout* layout;
  uint8_t* head;
  int row;
  const float* k;          // [D] rotated
  const float* v;          // [D]
  float k_scale, v_scale;  // static only
};

/// Attention of `num_queries` consecutive tokens of one sequence, for the `heads` query heads of
/// one kv head, over the spans [span_begin, span_end). Results are unnormalised: running max, sum
/// and weighted values.
struct Attend {
  const KvLayout* layout;
  const uint8_t* kv;           // the layer's cache
  const int32_t* block_table;  // of the sequence
  int kv_head;
  float k_scale, v_scale;  // static only
  int kv_len;
  int span_begin, span_end;
  const float* q;  // query i, head h: q + i q_stride + h D
  int64_t q_stride;
  const int32_t* positions;  // [num_queries]
  int num_queries, heads;
  float softmax_scale;
  float* max;      // [num_queries * heads]
  float* sum;      // [num_queries * heads]
  float* acc;      // [num_queries * heads, padded(D)]
  float* scratch;  // attend_scratch(D, rows) floats
};
static constexpr size_t attend_scratch(int head_dim, int rows) {
  return size_t{2} * kKvTile * padded(head_dim) + 2 * kKvTile + 4 * kKvTile +
         static_cast<size_t>(rows) * (padded(head_dim) + 2 * kMaxVector);
}

struct Kernels {
  const char* name;
  /// One row to int8 by groups: q = round_half_even(x * pre_scale * 127 / amax).
  void (*quantize_row)(const float* x, const float* pre_scale, int k, int act_group, int8_t* q,
                       float* scale, int32_t* offset);
  void (*int4_int8)(const Int4Gemm& g);
  void (*int4_f32)(const Int4Gemm& g);
  void (*dense)(const DenseGemm& g);
  void (*widen)(Dense type, const void* x, int n, float* y);
  void (*multiply)(const float* x, const float* scale, int n, float* y);
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* y);
  void (*silu_multiply)(const float* gate, const float* up, const float* out_scale, int n,
                        float* y);
  void (*rope)(float* head, const float* cos, const float* sin, int half);
  void (*kv_store)(const KvStore& s);
  void (*attend)(const Attend& a);
  /// Folds span (max2, sum2, acc2) into (max, sum, acc); dim floats of acc.
  void (*attend_merge)(float* max, float* sum, float* acc, float max2, float sum2,
                       const float* acc2, int dim);
  /// y = acc / sum (* out_scale).
  void (*attend_finish)(float sum, const float* acc, const float* out_scale, int dim, float* y);
  float (*max)(const float* x, int n);
  /// Sum of exp(scale * (x - max)); when y is not null stores each term.
  float (*exp_sum)(const float* x, float max, float scale, int n, float* y);
  /// Sum over 64-byte aligned memory, for the read bandwidth test.
  uint64_t (*read)(const void* data, size_t bytes);
};

extern const Kernels kKernelsGeneric;
extern const Kernels kKernelsAvx2;     // AVX2, FMA, F16C
extern const Kernels kKernelsAvxVnni;  // the same and AVX-VNNI
extern const Kernels kKernelsAvx512;   // AVX-512 F, BW, VL, DQ, VNNI

}  // namespace nibble::cpu
