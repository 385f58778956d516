// The engine as a library: requests in from any thread, tokens out through each request's sink.
// Owners and invariants: docs/engine-contract.md. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "nibble/request.h"

namespace nibble {

struct EngineParts;  // engine/engine_parts.h; build/ makes one from an engine directory

struct EngineStats {
  // Gauges.
  int num_running = 0;  // sequences holding KV blocks
  int num_waiting = 0;  // sequences waiting, preempted ones included
  int num_queued =
      0;  // requests accepted and not yet started, and reserved slots (what max_queue bounds)
  int kv_blocks_total = 0;
  int kv_blocks_used = 0;    // held by running sequences
  int kv_blocks_cached = 0;  // unheld, content kept for reuse
  // Counters.
  uint64_t requests = 0;                               // accepted
  std::array<uint64_t, kNumFinishReasons> finished{};  // choices, by FinishReason
  uint64_t prompt_tokens = 0;  // of started sequences (siblings of n > 1 not counted)
  uint64_t prefix_query_tokens = 0, prefix_hit_tokens = 0;
  uint64_t generated_tokens = 0;
  uint64_t preemptions = 0;
  uint64_t steps = 0;
  uint64_t step_tokens = 0;  // rows computed
  /// Steps by their rows: up to each of kStepSizes, and above the last.
  static constexpr std::array<int, 13> kStepSizes{1,   8,    16,   32,   64,   128,  256,
                                                  512, 1024, 2048, 4096, 8192, 16384};
  std::array<uint64_t, kStepSizes.size() + 1> steps_by_size{};
  uint64_t step_us = 0;  // whole steps: plan, run, commit, sinks
  uint64_t wait_us = 0;  // of these, waiting in Executor::collect: step_us - wait_us is what the
                         // engine's thread does itself, also while a device computes
  uint64_t forward_us =
      0;  // inside the decoder and the sampling op: step_us - forward_us is overhead
};

enum class SubmitStatus : uint8_t {
  kAccepted,
  kQueueFull,
  kDraining,
  kFailed /* see Engine::failure() */
};

struct Submitted {
  SubmitStatus status = SubmitStatus::kAccepted;
  RequestId id = 0;
  explicit operator bool() const { return status == SubmitStatus::kAccepted; }
};

class Engine;

/// A place in the queue, taken before the work of making a request (templating, tokenizing). Gives
/// itself back. Must not outlive the engine.
class QueueSlot {
 public:
  QueueSlot() = default;
  QueueSlot(QueueSlot&& other) noexcept : engine_(std::exchange(other.engine_, nullptr)) {}
  QueueSlot& operator=(QueueSlot&& other) noexcept {
    std::swap(engine_, other.engine_);
    return *this;
  }
  ~QueueSlot();
  explicit operator bool() const { return engine_ != nullptr; }

 private:
  friend class Engine;
  explicit QueueSlot(Engine* engine) : engine_(engine) {}
  Engine* engine_ = nullptr;
};

/// Thread-safe. One engine thread owns every sequence, block and the backend.
class Engine {
 public:
  /// Allocates everything and starts the engine thread.
  static std::unique_ptr<Engine> create(EngineParts parts);
  virtual ~Engine() = default;  // stop()

  /// Throws Error{kLimit} when prompt or max_tokens exceed the engine's limits (named in the
  /// message), Error{kInput} for parameters out of range and Error{kUnsupported} for a constraint
  /// where there are none; nothing was queued then.
  [[nodiscard]] virtual Submitted submit(Request request) = 0;
  /// submit() with a slot taken before; never kQueueFull.
  [[nodiscard]] virtual Submitted submit(Request request, QueueSlot slot) = 0;
  /// Empty when the queue is full.
  [[nodiscard]] virtual QueueSlot reserve_slot() = 0;

  /// Ends a request, or one of its choices, within two steps; its last event says kCancelled.
  /// Unknown and finished ids are ignored.
  virtual void cancel(RequestId id) = 0;
  virtual void cancel(RequestId id, int index) = 0;

  virtual EngineStats stats() const = 0;
  virtual bool healthy() const = 0;
  virtual std::string failure() const = 0;  // why the engine is not healthy; empty when it is

  virtual int max_input_len() const = 0;   // prompt tokens
  virtual int max_output_len() const = 0;  // generated tokens
  virtual int max_seq_len() const = 0;     // both together

  /// Takes no more requests and waits for those it has; cancels what is left at the deadline. True
  /// when nothing had to be cancelled.
  virtual bool drain(std::chrono::milliseconds deadline) = 0;
  /// Cancels everything and joins the engine thread.
  virtual void stop() = 0;

 protected:
  QueueSlot make_slot() { return QueueSlot(this); }
  static void keep_slot(QueueSlot& slot) { slot.engine_ = nullptr; }

 private:
  friend class QueueSlot;
  virtual void return_slot() = 0;
};

}  // namespace nibble
