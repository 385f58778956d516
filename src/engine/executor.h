// Runs one step; makes no decisions. The engine thread calls it; nobody else touches it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>

#include "engine/scheduler.h"
#include "engine/step_buffer.h"
#include "model/decoder.h"
#include "model/kv_cache.h"

namespace nibble {

/// Host arrays, valid until the next step is collected.
struct StepResult {
  std::span<const int32_t> tokens;  // [R]
  std::span<const float> logprobs;  // [R], only where asked for
  int max_logprobs = 0;
  std::span<const int32_t> top_tokens;  // [R, max_logprobs], -1 past a row's own number
  std::span<const float> top_logprobs;  // [R, max_logprobs]
  int64_t forward_us = 0;               // inside the decoder and the sampling op
};

/// A step is launch(), then collect(). Where overlaps() says so, the next launch() may come before
/// the collect(): its plan then takes tokens that are pending from the step in flight.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual void launch(const StepPlan& plan) = 0;
  /// Waits for the oldest step that was launched.
  virtual const StepResult& collect() = 0;
  virtual bool overlaps() const { return false; }
};

/// The model on one backend. All memory is allocated here, at construction.
class ModelExecutor final : public Executor {
 public:
  /// backend and weights must outlive it. allowed: bit per vocabulary id that may be drawn; empty:
  /// all.
  ModelExecutor(Backend& backend, const EnginePlan& plan, const ModelWeights& weights,
                int num_kv_blocks, int max_logit_rows, std::span<const uint64_t> allowed);
  ~ModelExecutor() override;

  void launch(const StepPlan& plan) override;
  const StepResult& collect() override;
  bool overlaps() const override { return backend_.overlaps(); }

 private:
  // What a step in flight keeps on the host, one for each of two.
  struct Flight {
    HostBuffer input, output;
    std::unique_ptr<StepBuffer> step;
    int mark = 0;
    std::chrono::steady_clock::time_point start;
  };

  void copy_blocks(std::span<const BlockCopy> copies);

  Backend& backend_;
  Decoder decoder_;
  KvCache kv_cache_;
  size_t kv_block_bytes_;  // of one layer
  Buffer device_step_, device_result_, device_allowed_, previous_tokens_;
  Flight flights_[2];
  uint64_t num_launched_ = 0, num_collected_ = 0;
  std::chrono::steady_clock::time_point last_end_;
  StepResult result_;
};

}  // namespace nibble
