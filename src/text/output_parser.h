// What a model says, taken apart while it is generated: content, reasoning ([THINK]...[/THINK]) and
// tool calls ([TOOL_CALLS]...), by Mistral's control tokens, never by text that merely looks like
// them. Also the way back: tool calls of a chat's history as templates want them.
//
// Tool calls in any of Mistral's spellings (mistral-common, tokens/tokenizers/instruct.py):
//   to v7   [TOOL_CALLS][{"name": ..., "arguments": {...}, "id": "..."}, ...]
//   v11     [TOOL_CALLS]name[CALL_ID]id[ARGS]{json}   once per call
//   v13     [TOOL_CALLS]name[ARGS]{json}              once per call
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace nibble {

/// What push() added. Several pieces of one call, joined in order, are its arguments.
struct OutputDelta {
  struct ToolCall {
    int index = 0;         // of the answer's calls
    bool begins = false;   // id and name come with the first piece only
    std::string id, name;  // id: nine letters or digits
    std::string arguments;
  };
  std::string content, reasoning;
  std::vector<ToolCall> tool_calls;
  bool empty() const { return content.empty() && reasoning.empty() && tool_calls.empty(); }
};

struct OutputParserOptions {
  DetokenizerOptions content;  // stop strings look at content only
  bool reasoning = false;      // else what is thought is content
  bool tool_calls = false;     // else calls are content
  int max_tool_calls = 0;      // later calls are dropped; 0: any number
  uint64_t seed = 0;           // of the ids that calls get
};

/// State of one answer. Not thread-safe.
class OutputParser {
 public:
  /// Throws as Detokenizer does.
  OutputParser(const Tokenizer& tokenizer, OutputParserOptions options);

  void push(int32_t id, OutputDelta& out);
  /// End of generation: what was held back. Text that turns out to be no call becomes content.
  void flush(OutputDelta& out);

  /// Nothing that follows counts: a stop string, or the last call that was asked for, is complete.
  bool stopped() const { return content_.stopped() || has_enough_; }
  std::optional<size_t> stop_idx() const { return content_.stop_idx(); }
  int num_tool_calls() const { return num_calls_; }

  /// Begins inside of [THINK], as when a prompt ends there.
  void begin_reasoning();

 private:
  enum class State { kContent, kReasoning, kCallStart, kName, kCallId, kArguments, kList };
  void leave(State next, OutputDelta& out);
  void take_text(std::string&& text, OutputDelta& out);
  void begin_call(std::string_view id, std::string_view name, OutputDelta& out);
  void add_list(OutputDelta& out);

  Tokenizer tokenizer_;
  OutputParserOptions options_;
  std::optional<int32_t> think_, end_think_, tool_calls_, call_id_, args_;
  Detokenizer content_, other_;
  State state_ = State::kContent;
  std::string held_;  // of a call: name or list so far
  std::string name_;  // v11: while its id is read
  int num_calls_ = 0;
  bool has_enough_ = false;
};

/// Does this tokenizer know [TOOL_CALLS]?
bool can_call_tools(const Tokenizer& tokenizer);
/// The tokens that make a model's answer a tool call: [TOOL_CALLS], and with a `name` everything up
/// to the arguments. An answer that begins with them is what OutputParser reads.
std::vector<int32_t> forced_tool_call(const Tokenizer& tokenizer, std::string_view name);
/// Is the end of this prompt inside of [THINK]?
bool ends_in_reasoning(const Tokenizer& tokenizer, std::span<const int32_t> prompt);

/// Tool call ids as Mistral's templates demand them: nine letters or digits stay, others become
/// nine that depend on them only. `parse_arguments`: arguments that are JSON text become objects,
/// as Jinja templates expect.
void normalize_tool_calls(json::array& messages, bool parse_arguments);
std::string mistral_call_id(std::string_view id);

}  // namespace nibble
