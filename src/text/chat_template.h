// A model's chat template: found in its directory, or built in (Mistral V7-Tekken or V13). Turns a
// chat request into prompt segments. Knows roles and their repair; knows no tokens and no HTTP.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "text/jinja.h"
#include "text/mistral_format.h"

namespace nibble {

struct ChatRequest {
  json::array messages;
  json::value tools;      // array or null
  json::value documents;  // array or null
  bool add_generation_prompt = true;
  /// The prompt ends exactly after the last message's text. A last assistant message with
  /// "prefix": true asks for the same under tolerant roles.
  bool continue_final_message = false;
  json::object template_variables;  // chat_template_kwargs: data, they never become control tokens
  RolePolicy roles = RolePolicy::kTolerant;
};

class ChatTemplate {
 public:
  /// chat_template.jinja wins over tokenizer_config.json's "chat_template" (a string, or a list of
  /// named ones: "default", and "tool_use" when tools are given), then chat_template.json; without
  /// any of them the built-in format. `instead`, when not empty, is a template file that wins over
  /// all of them. Throws Error{kInput} for a template that does not compile, {kIo} for a file that
  /// cannot be read.
  static ChatTemplate load(const fs::path& model_dir, const fs::path& instead = {});
  static ChatTemplate from_source(std::string_view source, json::object special_tokens,
                                  std::span<const std::string> special_strings = {});
  static ChatTemplate built_in(MistralVersion version, std::string bos = "<s>",
                               std::string eos = "</s>");

  /// Throws Error{kInput} (the template's own message in strict mode, malformed messages),
  /// {kUnsupported} (images), {kLimit} (template limits). Tolerant: role order is never an error;
  /// the template is tried with the messages as they are, then with more and more of them repaired:
  ///   1 content lists become text, 2 neighbours of one role are merged (blank line between) and
  ///   empty replies dropped, 3 later system notes join the next user turn, 4 a chat that begins
  ///   with an assistant greeting gets an empty user turn before it (as mistral-common's V3 does),
  ///   5 the leading system text joins the first user turn, 6 tool calls and results become plain
  ///   text.
  RenderedSegments render(const ChatRequest& request,
                          const jinja::RenderOptions& options = {}) const;

  /// "chat_template.jinja", "tokenizer_config.json", "built-in v7-tekken", ...
  const std::string& origin() const { return origin_; }
  bool is_built_in() const { return templates_.empty(); }

 private:
  ChatTemplate() = default;
  const jinja::Template& pick(bool has_tools) const;
  RenderedSegments render_once(const ChatRequest& request, const json::array& messages,
                               bool add_generation_prompt,
                               const jinja::RenderOptions& options) const;
  RenderedSegments render_tolerant(const ChatRequest& request, json::array& used,
                                   bool add_generation_prompt,
                                   const jinja::RenderOptions& options) const;

  std::string origin_;
  std::vector<std::pair<std::string, jinja::Template>> templates_;  // name -> template
  MistralChatFormat format_{MistralVersion::kV7};
  json::object special_tokens_;  // bos_token, eos_token, ...
  bool has_think_token_ = false;
};

/// One line of `nibble render`: {"messages": [...], "tools": ..., other variables} in, a JSON
/// string or
/// {"error": type, "message": text} out. Roles are strict unless the line says "roles": "tolerant".
std::string render_json_line(const ChatTemplate& chat, std::string_view line);
/// The same for a bare template; every key is a variable.
std::string render_json_line(const jinja::Template& source, std::string_view line);

/// The repairs of render(), step by step; `level` as numbered there.
json::array normalize_messages(const json::array& messages, int level);
constexpr int kMaxNormalizeLevel = 6;

}  // namespace nibble
