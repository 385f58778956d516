// What a caller asks of the engine and what it hears back. Plain values; text (detokenizing, stop
// strings) is the consumer's business: it works on the tokens it is sent and ends a choice with
// Engine::cancel(). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/constraint.h"

namespace nibble {

using RequestId = uint64_t;

/// How tokens are drawn. The defaults are neutral: plain sampling at temperature 1. Order of
/// effects and edge rules: ops/operands.h, SampleRow.
struct SamplingParams {
  float temperature = 1.0f;                           // 0: greedy
  int top_k = 0;                                      // 0: off
  float top_p = 1.0f;                                 // 1: off
  float min_p = 0.0f;                                 // 0: off
  float repetition_penalty = 1.0f;                    // over prompt and output
  float presence_penalty = 0.0f;                      // over output
  float frequency_penalty = 0.0f;                     // over output
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id, added; -infinity bans
  std::optional<uint64_t> seed;                       // none: the engine picks one
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;   // end-of-sequence ids are tokens like any other
  int min_tokens = 0;        // no stop id or end-of-sequence id is drawn before
  int logprobs = -1;         // -1: none; k: the drawn token's and the k best, k <= kMaxTopLogprobs
  int prompt_logprobs = -1;  // the same for the prompt's tokens (echo); turns prefix reuse off
  int n = 1;                 // choices; they share one prefill
  /// Structured output: only ids that fit are drawn, and an end-of-sequence id only where the
  /// answer may end. Where it must end, one is drawn whatever ignore_eos and min_tokens say. Null:
  /// none.
  std::shared_ptr<const TokenConstraint> constraint;
};

inline constexpr int kMaxTopLogprobs = 20;
inline constexpr int kMaxLogitBias = 1024;
inline constexpr int kMaxStopTokenIds = 128;
inline constexpr int kMaxChoices = 128;

enum class FinishReason : uint8_t {
  kEos,        // an end-of-sequence id was drawn; it is the last of the tokens
  kStopToken,  // one of stop_token_ids was drawn; it is the last of the tokens
  kLength,     // max_tokens
  kCancelled,  // cancel(), or the sink threw
  kError,      // TokenEvent::error says why
};
inline constexpr int kNumFinishReasons = 5;
const char* finish_reason_name(FinishReason reason);  // "eos", "stop_token", "length", ...

struct TokenLogprob {
  int32_t token = -1;
  float logprob = 0;
};

struct TokenLogprobs {
  int32_t token = -1;
  float logprob = 0;                       // log softmax of the model's raw logits
  std::span<const TokenLogprob> top = {};  // best first
};

struct Usage {
  int prompt_tokens = 0;
  int cached_tokens =
      0;  // prompt tokens whose K/V were reused (choice 0's; its siblings' do not count)
  int completion_tokens = 0;  // this choice's
  // Microseconds: submit to first step, first step to first token, first token to this event.
  int64_t queue_us = 0, prefill_us = 0, decode_us = 0;
};

/// One choice's news after a step. Spans live until the sink returns.
struct TokenEvent {
  RequestId request_id = 0;
  int index = 0;                                 // choice, 0 .. n-1
  std::span<const int32_t> tokens = {};          // newly drawn
  std::span<const TokenLogprobs> logprobs = {};  // of `tokens`; empty when not asked for
  int prompt_position = 0;                       // prompt_logprobs[i] is of this position + i
  std::span<const TokenLogprobs> prompt_logprobs = {};  // position 0 has none
  std::optional<FinishReason> finish_reason;            // set in the choice's last event
  int32_t stop_token = -1;                              // kEos, kStopToken: which
  std::string_view error = {};                          // kError
  Usage usage;
  bool last = false;  // the request's last event: the sink goes away
};

/// Called on the engine thread, in order, and must be cheap (push into a queue). When it throws,
/// its request is cancelled. It may call Engine::cancel(), never submit(), drain() or stop().
using TokenSink = std::function<void(const TokenEvent&)>;

struct Request {
  std::vector<int32_t> prompt_tokens;
  SamplingParams params;
  std::optional<int>
      max_tokens;    // none: as many as the engine allows; 0: the prompt only (prompt_logprobs)
  int priority = 0;  // lower is served first (as in vLLM); arrival decides among equals
  std::string cache_salt;    // prefixes are shared only among requests with the same salt
  bool reuse_prefix = true;  // false: compute the whole prompt
  TokenSink sink;
};

}  // namespace nibble
