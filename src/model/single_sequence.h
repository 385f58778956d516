// One sequence through the decoder, without a scheduler: evaluation, golden tests, one-at-a-time
// generation as the yardstick for the engine. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <vector>

#include "model/decoder.h"
#include "model/kv_cache.h"

namespace nibble {

class SingleSequence {
 public:
  enum class Logits { kNone, kLast, kAll };

  /// `max_context` tokens at most; steps of at most `max_step_tokens`. Throws Error{kMemory}.
  SingleSequence(Backend& backend, const EnginePlan& plan, const ModelWeights& weights,
                 int max_context, int max_step_tokens);

  void reset() { length_ = 0; }
  int length() const { return length_; }

  /// Appends ids (split into steps as needed) and returns logits in host memory, valid until the
  /// next call: [1, vocab] for kLast, [ids.size(), vocab] for kAll (then ids.size() <=
  /// max_step_tokens), empty for kNone.
  std::span<const float> extend(std::span<const int32_t> ids, Logits which);

 private:
  void step(std::span<const int32_t> ids, int num_logit_rows);

  Backend& backend_;
  const EnginePlan plan_;
  int max_context_, max_step_tokens_;
  Decoder decoder_;
  KvCache kv_;
  std::vector<int32_t> step_;  // ids, positions, seq_starts, kv_lens, block table, logit rows
  Buffer device_step_;
  std::vector<float> logits_;
  int length_ = 0;
};

}  // namespace nibble
