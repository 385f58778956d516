// One step as the ops want it: every array of StepBatch and SampleBatch packed into one contiguous
// piece of host memory, so that one upload carries it to the device (and later one broadcast to the
// other ranks). Sized for the largest step at start; building a step allocates nothing. Knows no
// device. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "engine/scheduler.h"
#include "ops/operands.h"

namespace nibble {

inline constexpr int kMaxEosIds = 64;  // Engine::create() refuses more

struct StepShape {
  int max_batch_size = 0;
  int max_num_tokens = 0;
  int max_logit_rows = 0;
  int max_seq_len = 0;
  int block_tokens = 0;
  int vocab_size = 0;
  int max_masks = 0;  // rows with a mask of their own
};

class StepBuffer {
 public:
  /// In memory of its own.
  explicit StepBuffer(const StepShape& shape);
  /// In `memory`: capacity_bytes(shape), 64-byte aligned, alive as long as this is.
  StepBuffer(const StepShape& shape, std::byte* memory);
  static size_t capacity_bytes(const StepShape& shape);

  void build(const StepPlan& plan);
  std::span<const std::byte> bytes() const { return {host_, used_bytes_}; }

  /// Views of the step where its bytes() have been copied to. The host_ arrays stay here.
  StepBatch step_batch(const void* base) const;
  SampleBatch sample_batch(const void* base, const uint64_t* allowed) const;
  /// For Backend::run(): equal for two steps whose views at `base` differ in device memory only; 0
  /// when a sequence brings more than one token, for then kernels are chosen by its lengths.
  uint64_t graph_key(const void* base) const;
  int num_rows() const { return step_.num_logit_rows; }
  int max_logprobs() const { return max_logprobs_; }  // over the step's rows
  /// Whether rows have a SampleRow::pending.
  bool counts_previous() const { return counts_previous_; }

 private:
  // Byte offsets of the arrays in this step.
  struct Layout {
    size_t token_ids, positions, seq_starts, kv_lens, block_tables, logit_rows, rows, history, bias,
        masks, end;
  };
  static Layout layout(int num_tokens, int num_seqs, int num_logit_rows, int num_blocks,
                       size_t num_history, size_t num_bias, size_t num_mask_words);
  /// Which ids the sequence's next one may be, its ends included. words: [mask_words_]
  void fill_mask(const Sequence& seq, uint64_t* words) const;
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(host_ + offset);
  }

  const StepShape shape_;
  const int mask_words_;  // of one mask
  int num_masks_ = 0;
  bool counts_previous_ = false;
  size_t used_bytes_ = 0;
  std::unique_ptr<std::byte[]> owned_;
  std::byte* host_;
  Layout layout_{};
  StepBatch step_;  // counts only
  int max_logprobs_ = 0;
};

}  // namespace nibble
