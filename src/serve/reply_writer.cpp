// SPDX-License-Identifier: Apache-2.0
#include "serve/reply_writer.h"

#include <fmt/format.h>

#include <cmath>
#include <iterator>

#include "base/json.h"
#include "text/utf8.h"

namespace nibble {
namespace {

void append_text(std::string& out, std::string_view bytes) {
  if (utf8::is_valid(bytes)) {
    append_json_string(out, bytes);
    return;
  }
  std::string text;
  utf8::append_lossy(text, bytes);
  append_json_string(out, text);
}

void append_bytes(std::string& out, std::string_view bytes) {
  out += '[';
  for (size_t i = 0; i < bytes.size(); ++i) {
    fmt::format_to(std::back_inserter(out), "{}{}", i ? "," : "",
                   static_cast<unsigned char>(bytes[i]));
  }
  out += ']';
}

/// JSON has no infinity; OpenAI and vLLM write -9999 for what cannot be drawn.
void append_logprob(std::string& out, float logprob) {
  if (!std::isfinite(logprob)) logprob = -9999.0f;
  fmt::format_to(std::back_inserter(out), "{}", logprob == 0 ? 0.0f : logprob);
}

void append_usage(std::string& out, const ReplyUsage& usage) {
  fmt::format_to(std::back_inserter(out),
                 R"({{"prompt_tokens":{},"completion_tokens":{},"total_tokens":{},)"
                 R"("prompt_tokens_details":{{"cached_tokens":{}}}}})",
                 usage.prompt_tokens, usage.completion_tokens,
                 usage.prompt_tokens + usage.completion_tokens, usage.cached_tokens);
}

/// The members of a message or, piece by piece, of a delta.
void append_message(std::string& out, const OutputDelta& output, bool is_delta) {
  std::string_view comma;
  const auto member = [&](std::string_view name, std::string_view text) {
    fmt::format_to(std::back_inserter(out), R"({}"{}":)", comma, name);
    append_json_string(out, text);
    comma = ",";
  };
  if (!output.content.empty()) {
    member("content", output.content);
  } else if (!is_delta) {
    // A message of calls or thoughts alone has no content; one that says nothing has an empty one.
    const bool none = !output.tool_calls.empty() || !output.reasoning.empty();
    out += none ? R"("content":null)" : R"("content":"")";
    comma = ",";
  }
  if (!output.reasoning.empty()) member("reasoning_content", output.reasoning);
  if (output.tool_calls.empty()) return;
  fmt::format_to(std::back_inserter(out), R"({}"tool_calls":[)", comma);
  for (size_t i = 0; i < output.tool_calls.size(); ++i) {
    const OutputDelta::ToolCall& call = output.tool_calls[i];
    out += i ? ",{" : "{";
    comma = "";
    if (is_delta) {
      fmt::format_to(std::back_inserter(out), R"("index":{})", call.index);
      comma = ",";
    }
    if (call.begins) {
      member("id", call.id);
      member("type", "function");
    }
    fmt::format_to(std::back_inserter(out), R"({}"function":{{)", comma);
    comma = "";
    if (call.begins) member("name", call.name);
    member("arguments", call.arguments);
    out += "}}";
  }
  out += ']';
}

}  // namespace

void LogprobList::add(const ScoredToken& token, int64_t text_offset) {
  const std::string_view comma = count_++ ? "," : "";
  if (is_chat_) {
    const auto entry = [&](std::string_view bytes, float logprob) {
      content_ += R"({"token":)";
      append_text(content_, bytes);
      content_ += R"(,"logprob":)";
      append_logprob(content_, logprob);
      content_ += R"(,"bytes":)";
      append_bytes(content_, bytes);
    };
    content_ += comma;
    entry(token.bytes, token.logprob.value_or(0));
    content_ += R"(,"top_logprobs":[)";
    bool first = true;
    for (const auto& top : token.top) {
      if (!first) content_ += ',';
      first = false;
      entry(top.bytes, top.logprob);
      content_ += '}';
    }
    content_ += "]}";
    return;
  }
  tokens_ += comma;
  append_text(tokens_, token.bytes);
  logprobs_ += comma;
  tops_ += comma;
  if (!token.logprob) {
    logprobs_ += "null";
    tops_ += "null";
  } else {
    append_logprob(logprobs_, *token.logprob);
    tops_ += '{';
    append_text(tops_, token.bytes);
    tops_ += ':';
    append_logprob(tops_, *token.logprob);
    for (const auto& top : token.top) {
      if (top.bytes == token.bytes) continue;
      tops_ += ',';
      append_text(tops_, top.bytes);
      tops_ += ':';
      append_logprob(tops_, top.logprob);
    }
    tops_ += '}';
  }
  fmt::format_to(std::back_inserter(offsets_), "{}{}", comma, text_offset);
}

std::string LogprobList::take() {
  std::string out;
  if (is_chat_) {
    out = R"({"content":[)" + content_ + R"(],"refusal":null})";
  } else {
    out = R"({"tokens":[)" + tokens_ + R"(],"token_logprobs":[)" + logprobs_ +
          R"(],"top_logprobs":[)" + tops_ + R"(],"text_offset":[)" + offsets_ + "]}";
  }
  for (std::string* part : {&content_, &tokens_, &logprobs_, &tops_, &offsets_}) part->clear();
  count_ = 0;
  return out;
}

ReplyWriter::ReplyWriter(bool is_chat, std::string id, std::string_view model, int64_t created,
                         const StreamOptions& options)
    : is_chat_(is_chat), id_(std::move(id)), options_(options) {
  const auto head = [&](std::string_view object) {
    std::string out = R"("id":)";
    append_json_string(out, id_);
    out += R"(,"object":)";
    append_json_string(out, object);
    fmt::format_to(std::back_inserter(out), R"(,"created":{},"model":)", created);
    append_json_string(out, model);
    return out;
  };
  head_ = head(is_chat ? "chat.completion" : "text_completion");
  chunk_head_ =
      "data: {" + head(is_chat ? "chat.completion.chunk" : "text_completion") + R"(,"choices":[)";
}

void ReplyWriter::finish_event(std::string& out, const ReplyUsage& usage) const {
  out += ']';
  if (options_.continuous_usage_stats) {
    out += R"(,"usage":)";
    append_usage(out, usage);
  } else if (options_.include_usage) {
    out += R"(,"usage":null)";
  }
  out += "}\n\n";
}

void ReplyWriter::role_chunk(std::string& out, int index, const ReplyUsage& usage) const {
  out += chunk_head_;
  fmt::format_to(std::back_inserter(out),
                 R"({{"index":{},"delta":{{"role":"assistant","content":""}},"logprobs":null,)"
                 R"("finish_reason":null}})",
                 index);
  finish_event(out, usage);
}

void ReplyWriter::delta_chunk(std::string& out, int index, const OutputDelta& delta,
                              std::string_view logprobs, const ReplyUsage& usage) const {
  out += chunk_head_;
  fmt::format_to(std::back_inserter(out), R"({{"index":{},)", index);
  if (is_chat_) {
    out += R"("delta":{)";
    append_message(out, delta, true);
    out += '}';
  } else {
    out += R"("text":)";
    append_json_string(out, delta.content);
  }
  fmt::format_to(std::back_inserter(out), R"(,"logprobs":{},"finish_reason":null}})", logprobs);
  finish_event(out, usage);
}

void ReplyWriter::end_chunk(std::string& out, int index, const ChoiceEnd& end,
                            std::string_view logprobs, const ReplyUsage& usage) const {
  out += chunk_head_;
  fmt::format_to(std::back_inserter(out),
                 R"({{"index":{},{},"logprobs":{},"finish_reason":"{}","stop_reason":{}}})", index,
                 is_chat_ ? R"("delta":{})" : R"("text":"")", logprobs, end.reason,
                 end.stop_reason);
  finish_event(out, usage);
}

void ReplyWriter::usage_chunk(std::string& out, const ReplyUsage& usage) const {
  out += chunk_head_;
  out += R"(],"usage":)";
  append_usage(out, usage);
  out += "}\n\n";
}

void ReplyWriter::done(std::string& out) { out += "data: [DONE]\n\n"; }

void ReplyWriter::error(std::string& out, std::string_view error_body) {
  fmt::format_to(std::back_inserter(out), "data: {}\n\n", error_body);
}

std::string ReplyWriter::whole(const std::vector<Choice>& choices, const ReplyUsage& usage) const {
  std::string out = "{" + head_ + R"(,"choices":[)";
  for (size_t i = 0; i < choices.size(); ++i) {
    const Choice& choice = choices[i];
    fmt::format_to(std::back_inserter(out), R"({}{{"index":{},)", i ? "," : "", choice.index);
    if (is_chat_) {
      out += R"("message":{"role":"assistant",)";
      append_message(out, *choice.output, false);
      out += R"(,"refusal":null})";
    } else {
      out += R"("text":)";
      append_json_string(out, choice.output->content);
    }
    fmt::format_to(std::back_inserter(out),
                   R"(,"logprobs":{},"finish_reason":"{}","stop_reason":{}}})", choice.logprobs,
                   choice.end.reason, choice.end.stop_reason);
  }
  out += R"(],"usage":)";
  append_usage(out, usage);
  out += '}';
  return out;
}

}  // namespace nibble
