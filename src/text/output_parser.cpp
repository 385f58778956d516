// SPDX-License-Identifier: Apache-2.0
#include "text/output_parser.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/error.h"
#include "base/hash.h"
#include "text/mistral_format.h"

namespace nibble {
namespace {

constexpr size_t kCallIdLength = 9;
constexpr std::string_view kAlphanumeric =
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
constexpr int kMaxArgumentsDepth = 64;

std::string spell_call_id(uint64_t hash) {
  std::string id(kCallIdLength, '0');
  for (char& c : id) {
    c = kAlphanumeric[hash % kAlphanumeric.size()];
    hash /= kAlphanumeric.size();
  }
  return id;
}

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

std::string string_member(const json::object& object, std::string_view key) {
  const auto* value = object.if_contains(key);
  return value != nullptr && value->is_string() ? std::string(value->get_string()) : std::string();
}

}  // namespace

OutputParser::OutputParser(const Tokenizer& tokenizer, OutputParserOptions options)
    : tokenizer_(tokenizer),
      options_(std::move(options)),
      content_(tokenizer, options_.content),
      other_(tokenizer) {
  if (options_.reasoning) {
    think_ = tokenizer.token_id("[THINK]");
    end_think_ = tokenizer.token_id("[/THINK]");
  }
  if (options_.tool_calls) {
    tool_calls_ = tokenizer.token_id("[TOOL_CALLS]");
    call_id_ = tokenizer.token_id("[CALL_ID]");
    args_ = tokenizer.token_id("[ARGS]");
  }
}

void OutputParser::begin_reasoning() { state_ = State::kReasoning; }

void OutputParser::push(int32_t id, OutputDelta& out) {
  if (stopped()) return;
  const bool in_call = state_ == State::kCallStart || state_ == State::kName ||
                       state_ == State::kCallId || state_ == State::kArguments;
  if (id == tool_calls_) return leave(State::kCallStart, out);
  if (id == think_ && state_ == State::kContent) return leave(State::kReasoning, out);
  if (id == end_think_ && state_ == State::kReasoning) return leave(State::kContent, out);
  if (in_call && (id == call_id_ || id == args_)) {
    return leave(id == args_ ? State::kArguments : State::kCallId, out);
  }
  if (state_ == State::kContent) {
    content_.push(id, out.content);
    return;
  }
  take_text(other_.push(id), out);
}

void OutputParser::take_text(std::string&& text, OutputDelta& out) {
  if (text.empty()) return;
  switch (state_) {
    case State::kContent: out.content += text; return;
    case State::kReasoning: out.reasoning += text; return;
    case State::kArguments:
      if (out.tool_calls.empty() || out.tool_calls.back().index != num_calls_ - 1) {
        out.tool_calls.push_back({.index = num_calls_ - 1});
      }
      out.tool_calls.back().arguments += text;
      return;
    case State::kCallStart: {
      held_ += text;
      const std::string_view begin = trimmed(held_);
      if (!begin.empty()) {
        state_ = begin.front() == '[' || begin.front() == '{' ? State::kList : State::kName;
      }
      return;
    }
    case State::kName:
    case State::kCallId:
    case State::kList: held_ += text; return;
  }
}

/// Ends what the current state holds and goes to `next`.
void OutputParser::leave(State next, OutputDelta& out) {
  if (state_ == State::kContent) {
    content_.flush(out.content);
    content_ = Detokenizer(tokenizer_, options_.content);
  } else {
    take_text(other_.flush(), out);
    other_ = Detokenizer(tokenizer_);
  }
  switch (state_) {
    case State::kContent:
    case State::kReasoning: break;
    case State::kArguments:
      has_enough_ = options_.max_tool_calls > 0 && num_calls_ >= options_.max_tool_calls;
      if (has_enough_) return;
      break;
    case State::kCallStart:
    case State::kName:
      if (next == State::kCallId) {
        name_ = std::exchange(held_, {});
      } else if (next == State::kArguments) {
        begin_call("", trimmed(held_), out);
      } else {
        out.content += held_;  // no call after all
      }
      break;
    case State::kCallId:
      if (next == State::kArguments) {
        begin_call(trimmed(held_), trimmed(name_), out);
      } else {
        out.content += name_ + held_;
      }
      break;
    case State::kList: add_list(out); break;
  }
  held_.clear();
  state_ = next;
}

void OutputParser::begin_call(std::string_view id, std::string_view name, OutputDelta& out) {
  OutputDelta::ToolCall& call = out.tool_calls.emplace_back();
  call.index = num_calls_++;
  call.begins = true;
  call.name = name;
  if (is_mistral_call_id(id)) {
    call.id = id;
  } else {
    const std::array key{options_.seed, static_cast<uint64_t>(call.index)};
    call.id = spell_call_id(xxh3_64(std::as_bytes(std::span(key))));
  }
}

void OutputParser::add_list(OutputDelta& out) {
  json::value list;
  try {
    list = parse_json(trimmed(held_), "tool calls", kMaxArgumentsDepth);
  } catch (const Error&) {
    out.content += held_;
    return;
  }
  if (list.is_object()) list = json::array{list};
  const auto is_call = [](const json::value& item) {
    return item.is_object() && !string_member(item.get_object(), "name").empty();
  };
  if (!std::all_of(list.get_array().begin(), list.get_array().end(), is_call)) {
    out.content += held_;
    return;
  }
  for (const auto& item : list.get_array()) {
    if (options_.max_tool_calls > 0 && num_calls_ >= options_.max_tool_calls) break;
    const json::object& object = item.get_object();
    begin_call(string_member(object, "id"), string_member(object, "name"), out);
    const auto* arguments = object.if_contains("arguments");
    out.tool_calls.back().arguments = arguments == nullptr     ? "{}"
                                      : arguments->is_string() ? string_member(object, "arguments")
                                                               : dump_json(*arguments);
  }
}

void OutputParser::flush(OutputDelta& out) {
  if (stopped()) return;
  leave(State::kContent, out);
}

bool can_call_tools(const Tokenizer& tokenizer) {
  return tokenizer.token_id("[TOOL_CALLS]").has_value();
}

std::vector<int32_t> forced_tool_call(const Tokenizer& tokenizer, std::string_view name) {
  std::vector<int32_t> ids;
  if (const auto id = tokenizer.token_id("[TOOL_CALLS]")) ids.push_back(*id);
  if (name.empty()) return ids;
  const auto args = tokenizer.token_id("[ARGS]");
  std::string text(name);
  if (!args) {
    text = R"([{"name": )";
    append_json_string(text, name);
    text += R"(, "arguments": )";
  }
  const std::vector<int32_t> name_ids = tokenizer.encode(text);
  ids.insert(ids.end(), name_ids.begin(), name_ids.end());
  if (args) ids.push_back(*args);
  return ids;
}

bool ends_in_reasoning(const Tokenizer& tokenizer, std::span<const int32_t> prompt) {
  const auto begin = tokenizer.token_id("[THINK]");
  const auto end = tokenizer.token_id("[/THINK]");
  const auto turn = tokenizer.token_id("[/INST]");
  if (!begin) return false;
  for (auto id = prompt.rbegin(); id != prompt.rend(); ++id) {
    if (*id == *begin) return true;
    if (*id == end || *id == turn) return false;
  }
  return false;
}

std::string mistral_call_id(std::string_view id) {
  if (is_mistral_call_id(id)) return std::string(id);
  return spell_call_id(xxh3_64(std::as_bytes(std::span(id))));
}

void normalize_tool_calls(json::array& messages, bool parse_arguments) {
  const auto normalize_id = [](json::object& object, std::string_view key) {
    if (const std::string id = string_member(object, key); !id.empty()) {
      object[key] = mistral_call_id(id);
    }
  };
  for (auto& message : messages) {
    if (!message.is_object()) continue;
    normalize_id(message.get_object(), "tool_call_id");
    auto* calls = message.get_object().if_contains("tool_calls");
    if (calls == nullptr || !calls->is_array()) continue;
    for (auto& call : calls->get_array()) {
      if (!call.is_object()) continue;
      normalize_id(call.get_object(), "id");
      auto* function = call.get_object().if_contains("function");
      if (!parse_arguments || function == nullptr || !function->is_object()) continue;
      const std::string arguments = string_member(function->get_object(), "arguments");
      if (arguments.empty()) continue;
      try {
        json::value parsed = parse_json(arguments, "arguments", kMaxArgumentsDepth);
        if (parsed.is_object()) function->get_object()["arguments"] = std::move(parsed);
      } catch (const Error&) {
        continue;  // stays text: the template decides
      }
    }
  }
}

}  // namespace nibble
