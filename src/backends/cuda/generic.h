// Launchers of the kernels that take any shape: what the fast kernels of kernels.h do not cover
// (unquantized linears, other query groups than 4, the f16 and the static int8 cache) and the glue
// between them. head_dim is 128 and a page has 64 tokens here too. Free of CUDA types; every
// launcher returns 0 or a cudaError_t value.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace nibble::cuda {

// generic_linear.cu: out[m, n] = x[m, k] w[n, k]^T (+ residual), bf16 in, bf16 or f32 out.
struct GenericLinearArgs {
  const void* x;         // bf16 [m, k], 16-byte aligned
  const void* w;         // bf16 [n, k], 16-byte aligned
  void* out;             // [m, n]
  const void* residual;  // bf16 [m, n], may be out; null: none. Only with bf16 out
  int m, n, k;           // k a multiple of 8
  bool f32_out;
};
int generic_linear(const GenericLinearArgs& args, void* stream);

// The cache's two page formats. kInt8: kv_layout.h, static scales stored with every token like
// dynamic ones. kF16: [kv head][K 64 tokens x 128 | V transposed, 128 x 64 tokens], f16.
enum class PageFormat : int { kInt8, kF16 };
size_t page_bytes(PageFormat format, int kv_heads);

// generic_rope.cu: rotates q and k in place, stores k and v.
struct GenericRopeArgs {
  void* qkv;               // bf16 [tokens, (heads + 2 kv_heads) 128]
  const int* positions;    // [tokens]
  const int* seq_starts;   // [sequences + 1]
  const int* kv_lens;      // [sequences]
  const int* page_table;   // [sequences, page_table_stride]
  const float *cos, *sin;  // [positions, 64]
  void* pages;             // format's
  int* page_starts;        // [sequences + 1] written: prefix sums of ceil(kv_len / 64)
  PageFormat format;
  float k_scale, v_scale;  // kInt8: 0: dynamic, per token and head; else static
  int tokens, sequences, page_table_stride, heads, kv_heads;
  bool dependent;  // programmatic dependent launch, as in kernels.h
};
int generic_rope_store(const GenericRopeArgs& args, void* stream);

// portable/attention.cu: causal attention of every token over its sequence's pages. Both targets
// have it; on cuda:portable it is all there is.
struct GenericAttentionArgs {
  const void* q;     // bf16 [tokens, q_stride]
  int64_t q_stride;  // elements
  const void* pages;
  const int* positions;    // [tokens]
  const int* seq_starts;   // [sequences + 1]
  const int* kv_lens;      // [sequences]
  const int* page_table;   // [sequences, page_table_stride]
  const float* out_scale;  // [heads 128] or null
  void* out;               // bf16 [tokens, heads 128]
  PageFormat format;
  int tokens, sequences, page_table_stride, heads, kv_heads;
  int tiles;  // sum over sequences of ceil(count / portable_attention_queries())
};
// A context is summed in parts of kPortableAttentionPartPages pages. With a workspace (every byte
// 0xff once), for sequences of one token each as long as portable_attention_splits(), every part
// has its own CTA.
inline constexpr int kPortableAttentionPartPages = 8;
inline constexpr int kPortableAttentionMaxPieces = 8;     // parts in flight, an SM
int portable_attention_queries(int heads, int kv_heads);  // query tokens of one tile, not split
bool portable_attention_splits(int heads, int kv_heads, int sequences, int page_table_stride,
                               int num_sms);
size_t portable_attention_workspace_bytes(int num_sms);
int portable_attention(const GenericAttentionArgs& args, void* split_workspace, int num_sms,
                       void* stream);

// generic_small.cu. bf16 activations, f32 vectors.
int scale_columns(const void* x, const float* scale, void* y, int64_t rows, int columns,
                  void* stream);  // y = x * scale, y may be x
int silu_multiply(const void* gate, const void* up, const float* scale, void* y, int64_t rows,
                  int columns, void* stream);  // y = silu(gate) * up * scale (null: 1)
// Sums `bytes` (a multiple of 16) into *sink: what the device's memory gives to a plain reader.
int read_all(const void* from, size_t bytes, float* sink, int num_sms, void* stream);

}  // namespace nibble::cuda
