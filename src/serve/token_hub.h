// From the engine thread to the I/O thread: sinks append what a step produced to one buffer, and
// the I/O thread is woken once for all that has gathered, never once per token.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "nibble/request.h"

namespace nibble {

class TokenHub : public std::enable_shared_from_this<TokenHub> {
 public:
  struct Range {
    uint32_t begin = 0, count = 0;
  };
  struct ScoredRow {
    int32_t token = -1;
    float logprob = 0;
    Range top;  // in Batch::top
  };
  struct Event {
    uint64_t reply = 0;  // as given to sink()
    int part = 0;
    int index = 0;         // choice of the part
    Range tokens, scores;  // in Batch::tokens, Batch::scores
    int prompt_position = 0;
    Range prompt_scores;  // in Batch::scores
    std::optional<FinishReason> finish_reason;
    int32_t stop_token = -1;
    std::string error;
    Usage usage;
    std::chrono::steady_clock::time_point at;
  };
  struct Batch {
    std::vector<Event> events;
    std::vector<int32_t> tokens;
    std::vector<ScoredRow> scores;
    std::vector<TokenLogprob> top;
    void clear();
  };

  /// `wake` is called on the engine thread when the first event of a batch arrives; it must get
  /// take() called soon.
  explicit TokenHub(std::function<void()> wake) : wake_(std::move(wake)) {}

  /// A sink for part `part` of reply `reply`; keeps the hub alive.
  TokenSink sink(uint64_t reply, int part);
  /// Swaps `batch`, emptied, with what has gathered.
  void take(Batch& batch);

 private:
  void push(uint64_t reply, int part, const TokenEvent& event);

  const std::function<void()> wake_;
  std::mutex mutex_;
  bool woken_ = false;
  Batch gathered_;
};

}  // namespace nibble
