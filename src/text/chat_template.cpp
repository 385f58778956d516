// SPDX-License-Identifier: Apache-2.0
#include "text/chat_template.h"

#include <algorithm>

#include "base/error.h"
#include "text/jinja_unicode.h"

namespace nibble {
namespace {

std::string text_of(const json::object& message, std::string_view key) {
  const auto* value = message.if_contains(key);
  if (value == nullptr || value->is_null()) return {};
  return value->is_string() ? std::string(value->get_string()) : dump_json(*value);
}

std::string role_of(const json::object& message) { return text_of(message, "role"); }

bool has_calls(const json::object& message) {
  const auto* calls = message.if_contains("tool_calls");
  return calls != nullptr && calls->is_array() && !calls->get_array().empty();
}

void check_messages(const json::array& messages) {
  for (const auto& message : messages) {
    if (!message.is_object()) {
      fail(ErrorKind::kInput, "a message must be an object with \"role\" and \"content\", not {}",
           dump_json(message).substr(0, 60));
    }
  }
}

/// Text parts joined by a blank line; reasoning parts are left out; other parts are refused.
std::string flatten_content(const json::value& content) {
  if (content.is_null()) return {};
  if (content.is_string()) return std::string(content.get_string());
  if (!content.is_array()) return dump_json(content);
  std::string out;
  for (const auto& part : content.get_array()) {
    std::string text;
    if (part.is_string()) {
      text = std::string(part.get_string());
    } else if (part.is_object()) {
      const std::string type = text_of(part.get_object(), "type");
      if (type == "thinking") continue;
      if (type != "text") {
        fail(ErrorKind::kUnsupported,
             "content part of type \"{}\": this model reads text only; send parts of type \"text\"",
             type);
      }
      text = text_of(part.get_object(), "text");
    }
    if (!text.empty()) out += (out.empty() ? "" : "\n\n") + text;
  }
  return out;
}

void append_text(json::object& message, const std::string& text, bool in_front = false) {
  const std::string old = flatten_content(message["content"]);
  const std::string& first = in_front ? text : old;
  const std::string& second = in_front ? old : text;
  message["content"] = first.empty() || second.empty() ? first + second : first + "\n\n" + second;
}

json::array flatten_all(const json::array& messages) {
  json::array out = messages;
  for (auto& message : out) {
    json::object& object = message.get_object();
    const std::string role = role_of(object);
    if (role == "developer") object["role"] = "system";
    if (role == "function") object["role"] = "tool";
    const auto* content = object.if_contains("content");
    object["content"] = content != nullptr ? flatten_content(*content) : std::string();
  }
  return out;
}

json::array merge_neighbours(const json::array& messages) {
  json::array out;
  for (size_t i = 0; i < messages.size(); ++i) {
    const json::object& message = messages[i].get_object();
    const std::string role = role_of(message);
    const bool is_last = i + 1 == messages.size();
    if (role == "assistant" && !is_last && !has_calls(message) &&
        text_of(message, "content").empty()) {
      continue;  // an empty reply
    }
    const bool merges = role == "user" || role == "assistant" || role == "system";
    if (merges && !out.empty() && role_of(out.back().get_object()) == role &&
        !has_calls(out.back().get_object())) {
      append_text(out.back().get_object(), text_of(message, "content"));
      if (has_calls(message)) out.back().get_object()["tool_calls"] = message.at("tool_calls");
      continue;
    }
    out.push_back(message);
  }
  return out;
}

json::object make_message(std::string_view role, std::string_view content) {
  return json::object{{"role", json::string(role)}, {"content", json::string(content)}};
}

/// System notes after the beginning go to the front of the next user turn; without one, they become
/// one.
json::array fold_late_system(const json::array& messages) {
  json::array out;
  std::string pending;
  for (size_t i = 0; i < messages.size(); ++i) {
    const json::object& message = messages[i].get_object();
    const std::string role = role_of(message);
    if (role == "system" && i > 0) {
      const std::string note = text_of(message, "content");
      if (!note.empty()) pending += (pending.empty() ? "" : "\n\n") + note;
      continue;
    }
    if (!pending.empty() && role == "user") {
      out.push_back(message);
      append_text(out.back().get_object(), pending, true);
      pending.clear();
      continue;
    }
    if (!pending.empty() && role == "assistant") {  // the note stands between two turns of others
      out.push_back(make_message("user", pending));
      pending.clear();
    }
    out.push_back(message);
  }
  if (!pending.empty()) out.push_back(make_message("user", pending));
  return merge_neighbours(out);
}

json::array open_with_user(const json::array& messages) {
  json::array out = messages;
  size_t at = 0;
  while (at < out.size() && role_of(out[at].get_object()) == "system") ++at;
  if (at == out.size() || role_of(out[at].get_object()) != "user") {
    out.insert(out.begin() + static_cast<ptrdiff_t>(at), make_message("user", ""));
  }
  return out;
}

json::array fold_leading_system(const json::array& messages) {
  json::array out;
  std::string system;
  for (const auto& value : messages) {
    const json::object& message = value.get_object();
    const std::string role = role_of(message);
    if (role == "system") {
      const std::string note = text_of(message, "content");
      if (!note.empty()) system += (system.empty() ? "" : "\n\n") + note;
      continue;
    }
    out.push_back(message);
    if (role == "user" && !system.empty()) {
      append_text(out.back().get_object(), system, true);
      system.clear();
    }
  }
  return out;
}

/// Plain user and assistant turns, strictly alternating: what every chat template accepts.
json::array plain_turns(const json::array& messages) {
  json::array out;
  for (const auto& value : messages) {
    const json::object& message = value.get_object();
    const bool is_assistant = role_of(message) == "assistant";
    std::string text = text_of(message, "content");
    if (is_assistant && has_calls(message)) {
      text += (text.empty() ? "" : "\n\n") + dump_json(message.at("tool_calls"));
    }
    out.push_back(make_message(is_assistant ? "assistant" : "user", text));
  }
  return open_with_user(merge_neighbours(out));
}

std::string last_text(const json::array& messages) {
  if (messages.empty()) return {};
  const auto* content = messages.back().get_object().if_contains("content");
  if (content == nullptr) return {};
  if (content->is_array()) {
    for (auto it = content->get_array().rbegin(); it != content->get_array().rend(); ++it) {
      if (it->is_object() && it->get_object().contains("text"))
        return text_of(it->get_object(), "text");
    }
    return {};
  }
  return content->is_string() ? std::string(content->get_string()) : std::string();
}

RenderedSegments cut_at(const RenderedSegments& segments, size_t end) {
  RenderedSegments out;
  for (const RenderedSegment& segment : segments) {
    const size_t take = std::min(end, segment.text.size());
    append_segment(out, std::string_view(segment.text).substr(0, take), segment.is_template);
    end -= take;
  }
  return out;
}

/// As Hugging Face cuts: after the last place where the final message's text stands.
RenderedSegments cut_after_final(const RenderedSegments& segments, const std::string& final_text,
                                 size_t& text_begin) {
  size_t begin = 0, end = 0;
  jinja::trim_range(final_text, true, true, nullptr, begin, end);
  const std::string core = final_text.substr(begin, end - begin);
  const std::string rendered = join_segments(segments);
  const size_t at = core.empty() ? std::string::npos : rendered.rfind(core);
  if (at == std::string::npos) {
    fail(ErrorKind::kInput,
         "continue_final_message: the chat template does not write the final message as it is, so "
         "the prompt cannot end after it");
  }
  text_begin = at;
  const std::string with_tail = final_text.substr(begin);  // lstrip()
  const bool keeps_tail = rendered.compare(at, with_tail.size(), with_tail) == 0;
  return cut_at(segments, at + (keeps_tail ? with_tail.size() : core.size()));
}

/// A reply prefilled with [THINK] asks the model to think: there it is the control token.
RenderedSegments promote_think(const RenderedSegments& segments, size_t begin) {
  constexpr std::string_view kThink = "[THINK]";
  RenderedSegments out;
  size_t offset = 0;
  for (const RenderedSegment& segment : segments) {
    const std::string_view text = segment.text;
    if (begin >= offset && begin < offset + text.size() &&
        text.substr(begin - offset, kThink.size()) == kThink) {
      append_segment(out, text.substr(0, begin - offset), segment.is_template);
      append_segment(out, kThink, true);
      append_segment(out, text.substr(begin - offset + kThink.size()), segment.is_template);
    } else {
      append_segment(out, text, segment.is_template);
    }
    offset += text.size();
  }
  return out;
}

json::object read_special_tokens(const json::object& config) {
  json::object out;
  for (const auto& member : config) {
    const std::string_view key = member.key();
    if (!key.ends_with("_token") || key.starts_with("add_")) continue;
    if (member.value().is_string()) out[key] = member.value();
    if (member.value().is_object() && member.value().get_object().contains("content")) {
      out[key] = member.value().get_object().at("content");
    }
  }
  return out;
}

void collect_special_strings(const json::value& tokens, std::vector<std::string>& out) {
  const auto add = [&](const json::value& token) {
    if (token.is_object() && token.get_object().contains("content")) {
      out.push_back(text_of(token.get_object(), "content"));
    }
  };
  if (tokens.is_object()) {
    for (const auto& member : tokens.get_object()) add(member.value());
  } else if (tokens.is_array()) {
    for (const auto& token : tokens.get_array()) add(token);
  }
}

/// The "added_tokens" array of tokenizer.json, without parsing the 17 MB around it: it is found by
/// its key and read up to its closing bracket.
void read_added_tokens(const fs::path& path, std::vector<std::string>& out) {
  const std::string text = read_file(path);
  const size_t key = text.find("\"added_tokens\"");
  if (key == text.npos) return;
  const size_t begin = text.find('[', key);
  if (begin == text.npos) return;
  bool in_string = false;
  int depth = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '[') ++depth;
    if (c == ']' && --depth == 0) {
      collect_special_strings(
          parse_json(std::string_view(text).substr(begin, i + 1 - begin), path.string()), out);
      return;
    }
  }
}

json::object read_object(const fs::path& path) {
  json::value value = parse_json(read_file(path), path.string());
  if (!value.is_object()) fail(ErrorKind::kInput, "{}: expected a JSON object", path.string());
  return value.get_object();
}

jinja::Template compile_from(std::string_view source, const std::string& where) {
  try {
    return jinja::Template::compile(source);
  } catch (const jinja::TemplateError& error) {
    throw jinja::TemplateError(error.kind(), error.type(), where + ": " + error.message(),
                               error.line());
  }
}

}  // namespace

json::array normalize_messages(const json::array& messages, int level) {
  json::array out = messages;
  if (level >= 1) out = flatten_all(out);
  if (level >= 2) out = merge_neighbours(out);
  if (level >= 3) out = fold_late_system(out);
  if (level >= 4) out = open_with_user(out);
  if (level >= 5) out = fold_leading_system(out);
  if (level >= 6) out = plain_turns(out);
  return out;
}

ChatTemplate ChatTemplate::load(const fs::path& model_dir, const fs::path& instead) {
  ChatTemplate out;
  json::object config;
  std::vector<std::string> special_strings;
  if (fs::exists(model_dir / "special_tokens_map.json")) {
    out.special_tokens_ = read_special_tokens(read_object(model_dir / "special_tokens_map.json"));
  }
  if (fs::exists(model_dir / "tokenizer_config.json")) {
    config = read_object(model_dir / "tokenizer_config.json");
    for (const auto& member : read_special_tokens(config)) {
      out.special_tokens_[member.key()] = member.value();
    }
    if (const auto* tokens = config.if_contains("added_tokens_decoder")) {
      collect_special_strings(*tokens, special_strings);
    }
  }
  if (special_strings.empty() && fs::exists(model_dir / "tokenizer.json")) {
    read_added_tokens(model_dir / "tokenizer.json", special_strings);
  }
  out.has_think_token_ =
      std::find(special_strings.begin(), special_strings.end(), "[THINK]") != special_strings.end();

  const auto* in_config = config.if_contains("chat_template");
  if (!instead.empty()) {
    out.origin_ = instead.string();
    out.templates_.emplace_back("default", compile_from(read_file(instead), instead.string()));
  } else if (const fs::path file = model_dir / "chat_template.jinja"; fs::exists(file)) {
    out.origin_ = "chat_template.jinja";
    out.templates_.emplace_back("default", compile_from(read_file(file), file.string()));
  } else if (in_config != nullptr && in_config->is_string()) {
    out.origin_ = "tokenizer_config.json";
    out.templates_.emplace_back("default",
                                compile_from(in_config->get_string(), "tokenizer_config.json"));
  } else if (in_config != nullptr && in_config->is_array()) {
    out.origin_ = "tokenizer_config.json";
    for (const auto& named : in_config->get_array()) {
      if (!named.is_object()) continue;
      const std::string name = text_of(named.get_object(), "name");
      out.templates_.emplace_back(name,
                                  compile_from(text_of(named.get_object(), "template"),
                                               "tokenizer_config.json, template \"" + name + "\""));
    }
  } else if (const fs::path old = model_dir / "chat_template.json"; fs::exists(old)) {
    out.origin_ = "chat_template.json";
    out.templates_.emplace_back(
        "default", compile_from(text_of(read_object(old), "chat_template"), old.string()));
  }
  if (out.templates_.empty()) {
    const auto token = [&](std::string_view key, std::string_view fallback) {
      const auto* value = out.special_tokens_.if_contains(key);
      return value != nullptr && value->is_string() ? std::string(value->get_string())
                                                    : std::string(fallback);
    };
    const bool has_think = out.has_think_token_;
    out = built_in(choose_mistral_version(special_strings), token("bos_token", "<s>"),
                   token("eos_token", "</s>"));
    out.has_think_token_ = has_think;
  }
  return out;
}

ChatTemplate ChatTemplate::from_source(std::string_view source, json::object special_tokens,
                                       std::span<const std::string> special_strings) {
  ChatTemplate out;
  out.origin_ = "template";
  out.templates_.emplace_back("default", jinja::Template::compile(source));
  out.special_tokens_ = std::move(special_tokens);
  out.has_think_token_ =
      std::find(special_strings.begin(), special_strings.end(), "[THINK]") != special_strings.end();
  return out;
}

ChatTemplate ChatTemplate::built_in(MistralVersion version, std::string bos, std::string eos) {
  ChatTemplate out;
  out.origin_ = fmt::format("built-in v{}{}", static_cast<int>(version),
                            version == MistralVersion::kV7 ? "-tekken" : "");
  out.format_ = MistralChatFormat(version, std::move(bos), std::move(eos));
  out.has_think_token_ = version >= MistralVersion::kV13;
  return out;
}

const jinja::Template& ChatTemplate::pick(bool has_tools) const {
  const auto find = [&](std::string_view name) {
    return std::find_if(templates_.begin(), templates_.end(),
                        [&](const auto& entry) { return entry.first == name; });
  };
  if (has_tools) {
    if (const auto it = find("tool_use"); it != templates_.end()) return it->second;
  }
  if (const auto it = find("default"); it != templates_.end()) return it->second;
  if (templates_.size() == 1) return templates_[0].second;
  std::string names;
  for (const auto& entry : templates_) names += (names.empty() ? "" : ", ") + entry.first;
  fail(ErrorKind::kInput, "the model has chat templates named {} but none named \"default\"",
       names);
}

RenderedSegments ChatTemplate::render_once(const ChatRequest& request, const json::array& messages,
                                           bool add_generation_prompt,
                                           const jinja::RenderOptions& options) const {
  json::object variables = request.template_variables;
  variables["messages"] = messages;
  variables["tools"] = request.tools;
  variables["documents"] = request.documents;
  variables["add_generation_prompt"] = add_generation_prompt;
  const bool has_tools = request.tools.is_array() && !request.tools.get_array().empty();
  return pick(has_tools).render(variables, special_tokens_, options);
}

RenderedSegments ChatTemplate::render_tolerant(const ChatRequest& request, json::array& used,
                                               bool add_generation_prompt,
                                               const jinja::RenderOptions& options) const {
  std::optional<jinja::TemplateError> first_error;
  json::array previous;
  for (int level = 0; level <= kMaxNormalizeLevel; ++level) {
    json::array messages = normalize_messages(request.messages, level);
    if (level > 0 && messages == previous) continue;
    try {
      RenderedSegments segments = render_once(request, messages, add_generation_prompt, options);
      used = std::move(messages);
      return segments;
    } catch (const jinja::TemplateError& error) {
      if (error.kind() != ErrorKind::kInput) throw;
      if (!first_error) first_error = error;
    }
    previous = std::move(messages);
  }
  throw *first_error;
}

RenderedSegments ChatTemplate::render(const ChatRequest& request,
                                      const jinja::RenderOptions& options) const {
  check_messages(request.messages);
  ChatRequest work = request;
  const bool tolerant = work.roles == RolePolicy::kTolerant;
  if (tolerant && work.messages.empty()) {
    fail(ErrorKind::kInput, "\"messages\" is empty: a chat needs at least one message");
  }
  bool last_is_assistant =
      !work.messages.empty() && role_of(work.messages.back().get_object()) == "assistant";
  if (tolerant && last_is_assistant) {
    const auto* prefix = work.messages.back().get_object().if_contains("prefix");
    if (prefix != nullptr && prefix->is_bool() && prefix->get_bool())
      work.continue_final_message = true;
  }
  if (work.continue_final_message && tolerant && !last_is_assistant) {
    work.continue_final_message = false;  // nothing of the model's to continue: answer instead
    work.add_generation_prompt = true;
  }
  if (is_built_in()) {
    RenderedSegments segments =
        format_.render(work.messages, work.tools, work.continue_final_message, work.roles);
    const std::string text = work.continue_final_message ? last_text(work.messages) : std::string();
    if (has_think_token_ && text.starts_with("[THINK]")) {
      const size_t at =
          join_segments(segments).rfind(text.substr(0, text.find_last_not_of(' ') + 1));
      if (at != std::string::npos) segments = promote_think(segments, at);
    }
    return segments;
  }
  if (work.continue_final_message && tolerant && last_text(work.messages).empty()) {
    // An empty prefill is the same as asking for a reply.
    work.messages.pop_back();
    work.continue_final_message = false;
    work.add_generation_prompt = true;
    if (work.messages.empty()) work.messages.push_back(make_message("user", ""));
  }
  const bool add_prompt = work.add_generation_prompt && !work.continue_final_message;
  json::array used = work.messages;
  RenderedSegments segments = tolerant ? render_tolerant(work, used, add_prompt, options)
                                       : render_once(work, work.messages, add_prompt, options);
  if (!work.continue_final_message) return segments;
  const std::string final_text = last_text(used);
  size_t begin = 0;
  segments = cut_after_final(segments, final_text, begin);
  if (has_think_token_ && std::string_view(final_text).starts_with("[THINK]")) {
    segments = promote_think(segments, begin);
  }
  return segments;
}

// ---- `nibble render`

namespace {

template <typename Fn>
std::string answer(Fn&& fn) {
  try {
    return dump_json(json::value(json::string(fn())));
  } catch (const jinja::TemplateError& error) {
    return dump_json(json::object{{"error", error.type()}, {"message", error.message()}});
  } catch (const Error& error) {
    return dump_json(
        json::object{{"error", error_kind_name(error.kind())}, {"message", error.what()}});
  }
}

json::object parse_line(std::string_view line) {
  json::value value = parse_json(line, "line");
  if (!value.is_object()) fail(ErrorKind::kInput, "a line must be a JSON object with \"messages\"");
  return std::move(value.get_object());
}

bool take_flag(json::object& variables, std::string_view key, bool fallback) {
  const auto* value = variables.if_contains(key);
  const bool flag = value != nullptr && value->is_bool() ? value->get_bool() : fallback;
  variables.erase(key);
  return flag;
}

}  // namespace

std::string render_json_line(const ChatTemplate& chat, std::string_view line) {
  return answer([&] {
    json::object variables = parse_line(line);
    ChatRequest request;
    const auto* messages = variables.if_contains("messages");
    if (messages == nullptr || !messages->is_array()) {
      fail(ErrorKind::kInput, "\"messages\" must be an array of messages");
    }
    request.messages = messages->get_array();
    if (const auto* tools = variables.if_contains("tools")) request.tools = *tools;
    if (const auto* documents = variables.if_contains("documents")) request.documents = *documents;
    const auto* roles = variables.if_contains("roles");
    request.roles = roles != nullptr && roles->is_string() && roles->get_string() == "tolerant"
                        ? RolePolicy::kTolerant
                        : RolePolicy::kStrict;
    for (const char* key : {"messages", "tools", "documents", "roles"}) variables.erase(key);
    request.add_generation_prompt = take_flag(variables, "add_generation_prompt", false);
    request.continue_final_message = take_flag(variables, "continue_final_message", false);
    request.template_variables = std::move(variables);
    return join_segments(chat.render(request));
  });
}

std::string render_json_line(const jinja::Template& source, std::string_view line) {
  return answer([&] { return source.render_text(parse_line(line)); });
}

}  // namespace nibble
