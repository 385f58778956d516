// Launchers of the CUDA kernels, free of CUDA types (a stream is a void*). Pointers are device
// pointers unless said otherwise. Every launcher returns 0 or a cudaError_t value.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/sample_operands.h"

namespace nibble::cuda {

// Opaque copy of a CUtensorMap.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// A row-major 2-D tensor of 2-byte elements [rows, columns] read in boxes [box_rows, 64] with the
// 128-byte swizzle. row_stride_bytes is a multiple of 16. Rows and columns past the end read as 0.
int make_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t columns,
                    int64_t row_stride_bytes, int box_rows);

enum class Epilogue : int { kPlain, kResidual, kSiluMul, kFloat };

// out = x W^T (+ residual) or SiLU(gate) * up * out_scale, W in the layout of layout.h. kFloat:
// x W^T, not rounded.
struct LinearArgs {
  const void* weights;  // packed
  int64_t rows, k;      // of W; rows counts gate and up together
  int tokens;           // M
  const void* x;        // bf16 [tokens, k], rows x_stride elements apart, 16-byte aligned
  int64_t x_stride;
  const TensorMap* x_map;  // host pointer, for linear_wgmma: x with the box_rows it asks for
  void* out;               // bf16 [tokens, rows] ([tokens, rows/2] for kSiluMul); f32 for kFloat
  const void* residual;    // bf16 [tokens, rows] for kResidual
  const float* out_scale;  // [rows/2] for kSiluMul, or null: AWQ pre-scale of the next linear
  Epilogue epilogue;
  // RMSNorm without a kernel of its own, for linear_fuses_norm() sizes. The linear that writes the
  // residual stream (kResidual) also writes it times the norm's weight, and of each 64 rows of W
  // the sum of the squares it wrote; the linear that takes `next` as its x multiplies by 1/rms.
  // [tokens, rows] as the next linear takes it, or null: bf16, of linear_fp8 e4m3 (x_layout.h), of
  // linear_digits digits (digits_layout.h).
  void* next;
  const float* next_weight;  // [rows]
  float* next_squares;       // [ceil(rows / kNormTileRows), tokens up to a multiple of 8]
  const float* squares;      // of x, or null: x is plain
  float eps;
  void* rounded;  // linear_fp8, linear_digits, kSiluMul: `out` once more, like `next`; or null
  float largest_scale;  // of the weights, or more: for linear_fp8
  void* workspace;      // linear_workspace_bytes(), every byte 0xff once
  int num_sms;
  bool dependent;  // programmatic dependent launch on the kernel before it in the stream
  // linear_wgmma, linear_fp8: a token's bits do not depend on how many there are. Norms are not
  // fused; linear_fp8 does not share k and takes x with one scale a token.
  bool in_order;
  int tactic;   // -1: chosen by shape
  int early;    // 0, or a cap on what is prefetched before the dependency (tuning)
  void* trace;  // clock stamps of a NIBBLE_TRACE build, or null
};

size_t linear_workspace_bytes(int num_sms);
inline constexpr int kNormTileRows = 64, kMaxNormTokens = 64, kMaxNormRows = 32768;
inline bool linear_fuses_norm(int tokens, int64_t hidden) {
  return tokens <= kMaxNormTokens && hidden <= kMaxNormRows;
}

// linear_small.cu: up to kMaxSmallTokens tokens.
enum class SmallTactic : int {
  kWhole64 = 0,  // 64-row tiles, each CTA whole tiles
  kStream64,     // 64-row tiles, equal bytes per CTA, cut tiles handed over
  kStream128,    // the same, 128-row tiles
};
inline constexpr int kMaxSmallTokens = 8;
int linear_small(const LinearArgs& args, void* stream);

// linear_wgmma.cu: any M, made for 9 and more. A tactic as one printable number: row blocks of 64
// per CTA (2 or 4), CTAs per cluster (1 or 2), CTAs that share a tile's k (1 .. kMaxSplit). With
// fewer than four warpgroups each has a block of its own (1, which shares no k, or 2): their number
// in front.
inline constexpr int kMaxSplit = 8;  // linear_fp8.cu too
struct WgmmaTactic {
  int row_blocks, cluster, split;
  int warpgroups = 4;
  int encode() const { return warpgroups % 4 * 1000 + row_blocks * 100 + cluster * 10 + split; }
  static WgmmaTactic decode(int tactic) {
    return {tactic / 100 % 10, tactic / 10 % 10, tactic % 10, tactic >= 1000 ? tactic / 1000 : 4};
  }
  /// Whether it can add a token's products in an order that does not depend on M.
  bool in_order(int64_t k) const;
};
// Parts of k whose sums are then added in their order, where that may not depend on M.
inline int wgmma_parts(int64_t k) { return k >= 16384 ? 3 : 1; }
inline bool WgmmaTactic::in_order(int64_t k) const {
  return row_blocks == warpgroups && (split == 1 || split == wgmma_parts(k));
}
int linear_wgmma(const LinearArgs& args, void* stream);  // wgmma_tactic.h: which, and x_map's boxes

// quantize_x.cu: x as linear_fp8 takes it (x_layout.h): a scale per token and 128 channels up to
// kFp8GroupedTokens tokens, above that, or where it is asked for, one per token.
inline constexpr int kFp8GroupedTokens = 64;
struct QuantizeArgs {
  const void* x;  // bf16 [tokens, k], rows x_stride elements apart, 16-byte aligned
  int64_t x_stride;
  // [k] or null: RMSNorm of x before all else. With a scale per token its result is rounded to
  // bf16; with more scales 1/rms is left to the linear, which needs `squares`.
  const float* norm_weight;
  float eps;               // the norm's
  const float* pre_scale;  // [k] or null: AWQ pre-scale, multiplied in before
  void* out;               // quantized_x_bytes(), 16-byte aligned
  float* squares;          // as LinearArgs::next_squares; written for a norm left to the linear
  int tokens, k;
  bool one_scale;  // per token, whatever their number; quantize_x only
  bool dependent;
};
size_t quantized_x_bytes(int tokens, int64_t k);  // of either kind
int quantize_x(const QuantizeArgs& args, void* stream);

// linear_fp8.cu: any M, made for 33 and more. x is what quantize_x wrote, or the same from another
// kernel; x_stride and x_map are not used. Norms are fused up to kFp8GroupedTokens tokens: `next`
// and `rounded` are e4m3 for the next linear, where linear_fp8_rounds(). A tactic as K2's: row
// blocks of 64 per CTA (2, or 4 up to 64 tokens), CTAs per cluster (1 or 2; 1 with 4 row blocks),
// CTAs that share a tile's k (1 .. 8).
inline constexpr int kFp8MinTokens = 33;  // fewer are faster in bf16 (docs/kernels.md)
WgmmaTactic fp8_tactic(const LinearArgs& args);
// largest_scale.cu: *out, on the host: the largest magnitude among the scales of packed weights.
// Waits for the stream. `scratch`: 4 bytes on the device.
int largest_scale(const void* weights, int64_t rows, int64_t k, void* scratch, float* out,
                  void* stream);
// Whether `next` (kResidual) or `rounded` (kSiluMul) can be had: a CTA has whole groups of 128.
bool linear_fp8_rounds(const LinearArgs& args);
int linear_fp8(const LinearArgs& args, void* stream);

// linear_digits.cu: up to kDigitTokens tokens. x, `next` and `rounded` as split_digits() writes x;
// x_stride and x_map are not used. The tactic: row blocks of 64 per tile, 2 or 4.
inline constexpr int kMinDigitTokens = kMaxSmallTokens + 1, kDigitTokens = 16;
size_t digits_bytes(int tokens, int64_t k);
// x to digits (digits_layout.h). 1/rms is left to the linear, as above.
int split_digits(const QuantizeArgs& args, void* stream);
int digits_tactic(const LinearArgs& args);
// Whether `next` (kResidual) or `rounded` (kSiluMul) can be had: a CTA has whole groups of 128.
bool linear_digits_rounds(const LinearArgs& args);
int linear_digits(const LinearArgs& args, void* stream);

// By shape, from what was measured on an H200 (docs/kernels.md); x_map has linear_wgmma_box_rows.
int linear(const LinearArgs& args, void* stream);

// random.cu, for measuring: packed int4 weights of `blocks` blocks (layout.h), q uniform in -8..7
// and scales about 1/64; bf16 values uniform in -1..1.
int fill_random_int4(void* blocks, int64_t num_blocks, uint64_t seed, void* stream);
int fill_random_bf16(void* values, int64_t count, uint64_t seed, void* stream);

// portable/linear.cu: any M, sm_80 and newer. A tactic as one printable number: tokens of a tile
// (8, 16, 32, 64), then two digits of parts of k, then 1 where every part has its own CTA.
struct PortableTactic {
  int tokens, parts;
  bool split;
  int encode() const { return tokens * 1000 + parts * 10 + (split ? 1 : 0); }
  static PortableTactic decode(int tactic) {
    return {tactic / 1000, tactic / 10 % 100, tactic % 10 == 1};
  }
};
PortableTactic portable_tactic(const LinearArgs& args);
size_t portable_linear_workspace_bytes(int num_sms);  // every byte 0xff once
int portable_linear(const LinearArgs& args, void* stream);

// attention_decode.cu: one new token per sequence over its paged int8 KV (kv_layout.h), head_dim
// 128, 4 query heads per KV head. The new token's own K and V are in the cache already.
struct DecodeAttentionArgs {
  const void* q;          // bf16, after RoPE: [sequences, 4 * kv_heads, 128]
  int64_t q_stride;       // elements between sequences
  const void* pages;      // kv_layout.h
  const int* page_table;  // [sequences, page_table_stride]
  int page_table_stride;
  const int* lengths;      // [sequences], tokens in the cache, >= 1
  const int* page_starts;  // [sequences + 1], prefix sums of ceil(length / 64)
  void* out;               // bf16 [sequences, 4 * kv_heads, 128]
  int64_t out_stride;
  int sequences, kv_heads;
  float softmax_scale;     // 1 / sqrt(128)
  const float* out_scale;  // [4 * kv_heads * 128] or null: AWQ pre-scale of the next linear
  void* workspace;         // decode_attention_workspace_bytes(), every byte 0xff once
  int num_sms;
  bool dependent;
  int tactic;  // 0: 4 warps x 3 pages, 1: 6 x 2, 2: 3 x 4
};
size_t decode_attention_workspace_bytes(int num_sms);
int decode_attention(const DecodeAttentionArgs& args, void* stream);

// attention_step.cu: the same for a step of one token a sequence, its RoPE and append to the cache
// included.
struct StepAttentionArgs {
  const void* qkv;         // bf16 [sequences, 6 * kv_heads, 128], not rotated yet; left as it is
  int64_t qkv_stride;      // elements between sequences
  const float *cos, *sin;  // [positions, 64]
  void* pages;             // kv_layout.h
  const int* page_table;   // [sequences, page_table_stride]
  int page_table_stride;
  const int* lengths;  // [sequences], the new token included
  void* out;           // bf16 [sequences, 4 * kv_heads, 128]
  int64_t out_stride;
  int sequences, kv_heads;
  float k_scale, v_scale;  // 0: dynamic, per token and head; else static
  float softmax_scale;     // 1 / sqrt(128)
  const float* out_scale;  // as above
  // `out` once more for the next linear, or null: digits (digits_layout.h) of up to kDigitTokens
  // sequences, else e4m3 (x_layout.h).
  void* rounded;
  bool uneven;  // lengths differ much: StepBatch::is_uneven
  int split;    // CTAs of a (sequence, head): 1, 2, 4, 8; 0: as attention_split.h has it
  int num_sms;
  bool dependent;
};
// Whether `rounded` can be had: a head's outputs are one CTA's.
bool step_attention_rounds(int sequences, int kv_heads, int num_sms);
int step_attention(const StepAttentionArgs& args, void* stream);

// attention_prefill.cu: the last `count` tokens of one sequence over its paged KV, causal.
struct PrefillAttentionArgs {
  const void* q;     // bf16, after RoPE: [count, 4 * kv_heads, 128]
  int64_t q_stride;  // elements between tokens
  const void* pages;
  const int* page_table;  // of this sequence
  int count, length;      // query tokens; tokens in the cache, these included
  void* out;              // bf16 [count, 4 * kv_heads, 128]
  int64_t out_stride;
  const float* out_scale;  // [4 * kv_heads * 128] or null: AWQ pre-scale of the next linear
  int kv_heads;
  float softmax_scale;
  void* workspace;  // prefill_attention_workspace_bytes()
  bool dependent;
};
size_t prefill_attention_workspace_bytes(int max_length, int kv_heads);
int prefill_attention(const PrefillAttentionArgs& args, void* stream);

// elementwise.cu. Activations are bf16.
// ids below 0: -1 - index into `previous`.
int embed(const int* ids, const int* previous, const void* table /*bf16 [vocab, hidden]*/, void* x,
          int tokens, int hidden, bool dependent, void* stream);

struct RmsNormArgs {
  const void* x;
  const float* weight;     // [hidden]
  const float* pre_scale;  // [hidden] or null: AWQ pre-scale of the linear that follows
  const int* row_index;    // [rows] rows of x to take, or null: all in order
  void* y;                 // [rows, copies * hidden]: every row `copies` times in a row
  float eps;
  int rows, hidden, copies;
  bool dependent;
};
int rms_norm(const RmsNormArgs& args, void* stream);

// lm_head.cu: out[rows, n] f32 = x[rows, k] weight[n, k]^T, bf16.
struct DenseArgs {
  const void *x, *weight;
  float* out;
  int rows, n, k;
  int num_sms;
  bool dependent;
};
int dense_linear(const DenseArgs& args, void* stream);

// sample.cu: the sampling op; every pointer of batch and result is a device pointer.
size_t sample_workspace_bytes(int rows, int vocab);
int sample(const SampleBatch& batch, const float* logits, const SampleResult& result,
           void* workspace, bool dependent, void* stream);

}  // namespace nibble::cuda
