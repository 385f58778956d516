// Runs one step; makes no decisions. The engine thread calls it; nobody else touches it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/scheduler.h"
#include "engine/step_buffer.h"
#include "model/decoder.h"
#include "model/kv_cache.h"

namespace nibble {

/// Host arrays, valid until the next run().
struct StepResult {
  std::span<const int32_t> tokens;  // [R]
  std::span<const float> logprobs;  // [R], only where asked for
  int max_logprobs = 0;
  std::span<const int32_t> top_tokens;  // [R, max_logprobs], -1 past a row's own number
  std::span<const float> top_logprobs;  // [R, max_logprobs]
  int64_t forward_us = 0;               // inside the decoder and the sampling op
};

class Executor {
 public:
  virtual ~Executor() = default;
  virtual const StepResult& run(const StepPlan& plan) = 0;
};

/// The model on one backend. All memory is allocated here, at construction.
class ModelExecutor final : public Executor {
 public:
  /// backend and weights must outlive it. allowed: bit per vocabulary id that may be drawn; empty:
  /// all.
  ModelExecutor(Backend& backend, const EnginePlan& plan, const ModelWeights& weights,
                int num_kv_blocks, int max_logit_rows, std::span<const uint64_t> allowed);

  const StepResult& run(const StepPlan& plan) override;

 private:
  void copy_blocks(std::span<const BlockCopy> copies);

  Backend& backend_;
  Decoder decoder_;
  KvCache kv_cache_;
  size_t kv_block_bytes_;  // of one layer
  StepBuffer step_;
  Buffer device_step_, device_result_, device_allowed_;
  std::vector<int32_t> host_result_;
  StepResult result_;
};

}  // namespace nibble
