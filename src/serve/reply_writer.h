// The JSON of answers: whole replies and stream chunks of chat and text completions, as OpenAI and
// vLLM spell them. Turns plain values into text; knows no HTTP, tokenizer or engine.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "serve/api_request.h"
#include "text/output_parser.h"

namespace nibble {

/// Usage of a whole reply: every choice's tokens, each prompt once.
struct ReplyUsage {
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
};

/// One token with its log-probability, as text.
struct ScoredToken {
  std::string_view bytes;        // raw, may be part of a character
  std::optional<float> logprob;  // none: the first token of an echoed prompt
  struct Alternative {
    std::string_view bytes;
    float logprob;
  };
  std::vector<Alternative> top;  // best first
};

/// The "logprobs" of one choice, collected until the next chunk takes them.
class LogprobList {
 public:
  explicit LogprobList(bool is_chat = true) : is_chat_(is_chat) {}
  /// `text_offset`: characters of the answer before this token (text completions only).
  void add(const ScoredToken& token, int64_t text_offset);
  bool empty() const { return count_ == 0; }
  /// The JSON object, and an empty list again.
  std::string take();

 private:
  bool is_chat_;
  int count_ = 0;
  std::string content_;                             // chat
  std::string tokens_, logprobs_, tops_, offsets_;  // completions
};

/// What ends a choice. `reason` is "stop", "length", "tool_calls" or "abort"; `stop_reason` is
/// JSON: the stop string, the stop token's id or null (a vLLM extension).
struct ChoiceEnd {
  std::string_view reason = "stop";
  std::string stop_reason = "null";
};

class ReplyWriter {
 public:
  ReplyWriter(bool is_chat, std::string id, std::string_view model, int64_t created,
              const StreamOptions& options);

  // Stream: each appends whole events ("data: {...}\n\n") to `out`. `usage` is of the reply so far
  // and only shown with continuous_usage_stats.
  void role_chunk(std::string& out, int index, const ReplyUsage& usage) const;  // chat only
  void delta_chunk(std::string& out, int index, const OutputDelta& delta, std::string_view logprobs,
                   const ReplyUsage& usage) const;
  void end_chunk(std::string& out, int index, const ChoiceEnd& end, std::string_view logprobs,
                 const ReplyUsage& usage) const;
  void usage_chunk(std::string& out, const ReplyUsage& usage) const;  // with include_usage
  static void done(std::string& out);
  static void error(std::string& out, std::string_view error_body);

  struct Choice {
    int index = 0;
    const OutputDelta* output = nullptr;  // all of it
    std::string logprobs = "null";
    ChoiceEnd end;
  };
  std::string whole(const std::vector<Choice>& choices, const ReplyUsage& usage) const;

  const std::string& id() const { return id_; }

 private:
  void finish_event(std::string& out, const ReplyUsage& usage) const;

  bool is_chat_;
  std::string id_;
  StreamOptions options_;
  std::string head_;        // `"id":...,"object":...,"created":...,"model":...`
  std::string chunk_head_;  // "data: {" + head + choices up to the index
};

}  // namespace nibble
