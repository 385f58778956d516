// Operands of the seam: plain, non-owning structs with shapes in brackets. Letters: T tokens of the
// step, S sequences, R rows that want logits, H query heads, G kv heads, D head_dim, N out
// features, K in features. All pointers are device pointers of the backend unless a comment says
// host. Activations ("act") have the backend's own element type (Backend::act_bytes()); callers
// only carve buffers and pass them on. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/sample_operands.h"
#include "spec/engine_plan.h"

namespace nibble {

struct LinearOperand {
  WeightLayout layout = WeightLayout::kF32Rows;
  int out_features = 0;           // N
  int in_features = 0;            // K
  int group_size = 0;             // 0 for dense layouts
  const void* weight = nullptr;   // bytes by layout
  const float* scales = nullptr;  // kInt4Portable, kInt8Portable: [N, K/group]; null when the
                                  // layout holds them inline
  const float* pre_scale =
      nullptr;  // [K], multiplies the activation first; null when folded elsewhere
};

/// Whether sequences that have `used` blocks in all differ so much in length, and are so long, that
/// it matters who computes which.
inline bool is_uneven(int64_t used, int num_seqs, int max_blocks_per_seq) {
  return max_blocks_per_seq >= 32 && 4 * used <= int64_t{3} * num_seqs * max_blocks_per_seq;
}

/// One step's ragged batch. Rows of sequence s are [seq_starts[s], seq_starts[s+1]).
struct StepBatch {
  int num_tokens = 0;      // T
  int num_seqs = 0;        // S
  int num_logit_rows = 0;  // R
  // Sequences at the front that bring one token, drawn by a step before. The rows of the others
  // are of prompts, also where there is one row only.
  int num_decode_seqs = 0;
  int max_blocks_per_seq = 0;  // B
  bool is_uneven = false;      // is_uneven() of these; kernels may share work accordingly
  // [T]; -1 - r: the token that row r of the sampling op before this step drew (previous_tokens).
  // Only backends whose steps overlap (Backend::overlaps()) are given such.
  const int32_t* token_ids = nullptr;
  const int32_t* previous_tokens = nullptr;  // [R of the step before]
  const int32_t* positions = nullptr;        // [T] position of each token in its sequence
  const int32_t* seq_starts = nullptr;       // [S+1]
  const int32_t* kv_lens =
      nullptr;  // [S] tokens of the sequence in the cache once this step is stored
  const int32_t* block_tables =
      nullptr;  // [S, B] block ids; entries past the sequence's length are unused
  const int32_t* logit_rows = nullptr;  // [R] token rows whose logits are wanted
  // Host copies of the two arrays that a CPU-side work split needs.
  const int32_t* host_seq_starts = nullptr;  // [S+1]
  const int32_t* host_kv_lens = nullptr;     // [S]
};

/// The paged cache of one layer. Token t of a sequence lies in block table[t / block_tokens], row
/// t % block_tokens. The layout inside a block is the backend's own (Backend::kv_block_bytes()).
struct KvLayer {
  KvFormat format = KvFormat::kInt8Dynamic;
  int num_blocks = 0;
  int block_tokens = 0;
  int num_kv_heads = 0;            // G
  int head_dim = 0;                // D
  void* data = nullptr;            // num_blocks * kv_block_bytes
  float k_scale = 0, v_scale = 0;  // kInt8Static only
};

struct RopeTable {
  const float* cos = nullptr;  // [max_position, D/2]
  const float* sin = nullptr;  // [max_position, D/2]
  int max_position = 0;
};

}  // namespace nibble
