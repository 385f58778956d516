// Request bodies of the OpenAI API and of vLLM's extensions: JSON in, checked plain values out.
// Knows no HTTP, tokenizer or engine. Unknown fields are ignored; a known one that would change the
// answer and is not supported is an ApiError naming it. docs/http-api.md lists them all.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/json.h"
#include "nibble/request.h"
#include "text/chat_template.h"
#include "text/output_format.h"

namespace nibble {

struct StreamOptions {
  bool include_usage = false;           // one more chunk with usage at the end
  bool continuous_usage_stats = false;  // usage in every chunk
};

using Prompt = std::variant<std::string, std::vector<int32_t>>;  // text or token ids

/// Body of /v1/chat/completions or /v1/completions.
struct GenerationBody {
  bool is_chat = false;
  std::string model;  // empty: the only one
  ChatRequest chat;
  std::vector<Prompt> prompts;     // completions: at least one
  bool add_special_tokens = true;  // completions: BOS before a text prompt

  SamplingParams params;  // logprobs and n included; the constraint is made of:
  OutputFormat format;
  std::optional<int> max_tokens;
  std::vector<std::string> stop;
  bool include_stop = false;  // include_stop_str_in_output
  bool skip_special = true;   // skip_special_tokens
  bool echo = false;          // completions: the prompt comes first
  int priority = 0;
  std::string cache_salt;
  bool stream = false;
  StreamOptions stream_options;

  /// chat: may the answer call tools (they are in chat.tools), must it, and must it be this one?
  enum class ToolChoice { kNone, kAuto, kRequired, kNamed };
  ToolChoice tool_choice = ToolChoice::kNone;
  std::string tool_name;            // kNamed
  bool parallel_tool_calls = true;  // else one call ends the answer
  bool uses_tools() const { return tool_choice != ToolChoice::kNone; }
};

struct BodyLimits {
  int max_choices = 128;  // prompts x n of one request
};

/// `defaults`: sampling when the request does not say. Throw ApiError{400}.
GenerationBody parse_chat_body(std::string_view body, const SamplingParams& defaults,
                               const BodyLimits& limits);
GenerationBody parse_completion_body(std::string_view body, const SamplingParams& defaults,
                                     const BodyLimits& limits);

struct TokenizeBody {
  std::string model;
  bool is_chat = false;
  std::string prompt;
  ChatRequest chat;
  bool add_special_tokens = true;  // prompt only
  bool return_token_strs = false;
};
TokenizeBody parse_tokenize_body(std::string_view body);

struct DetokenizeBody {
  std::string model;
  std::vector<int32_t> tokens;
};
DetokenizeBody parse_detokenize_body(std::string_view body);

/// The sampling values of a generation_config.json; what it does not name keeps its default. Throws
/// Error{kInput} for a value of the wrong type.
SamplingParams sampling_defaults(const json::object& generation_config);

}  // namespace nibble
