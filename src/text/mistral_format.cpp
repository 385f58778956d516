// SPDX-License-Identifier: Apache-2.0
#include "text/mistral_format.h"

#include <algorithm>
#include <optional>
#include <set>
#include <vector>

#include "base/error.h"

namespace nibble {
namespace {

enum class Role { kSystem, kUser, kAssistant, kTool };

const char* role_name(Role role) {
  switch (role) {
    case Role::kSystem: return "system";
    case Role::kUser: return "user";
    case Role::kAssistant: return "assistant";
    case Role::kTool: return "tool";
  }
  return "";
}

struct Chunk {
  std::string text;
  bool is_thinking = false;
  bool is_closed = true;
};

struct Call {
  std::string id, name, arguments;  // arguments: JSON text as given
};

struct Message {
  Role role = Role::kUser;
  std::vector<Chunk> chunks;
  bool is_list = false;  // content was a list of chunks
  std::vector<Call> calls;
  std::string call_id;
  bool has_call_id = false;

  bool has_content() const {
    return is_list ? !chunks.empty() : !chunks.empty() && !chunks[0].text.empty();
  }
  bool has_thinking() const {
    return std::any_of(chunks.begin(), chunks.end(), [](const Chunk& c) { return c.is_thinking; });
  }
};

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::kInput, message); }

std::string string_of(const json::value* value) {
  if (value == nullptr || value->is_null()) return {};
  if (value->is_string()) return std::string(value->get_string());
  return dump_json(*value);
}

bool is_function_name(std::string_view name) {
  return !name.empty() && name.size() <= 64 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return c < 0x80 && (isalnum(c) || c == '_' || c == '-');
         });
}

/// The last nine letters and digits, as vLLM and llama.cpp's templates take; zeros in front when
/// short.
std::string repair_call_id(std::string_view id) {
  std::string out;
  for (const char c : id) {
    if (static_cast<unsigned char>(c) < 0x80 && isalnum(static_cast<unsigned char>(c))) out += c;
  }
  if (out.size() > 9) out.erase(0, out.size() - 9);
  return std::string(9 - out.size(), '0') + out;
}

/// json.loads then json.dumps; text that is not JSON stays as it is, empty text is {}.
std::string normalize_json(const std::string& text) {
  if (text.empty()) return "{}";
  try {
    return dump_json(parse_json(text, "arguments"));
  } catch (const Error&) {
    return text;
  }
}

/// The JSON value a text stands for: itself when it parses, else a JSON string.
json::value parse_or_string(const std::string& text) {
  try {
    return parse_json(text, "content");
  } catch (const Error&) {
    return json::value(text);
  }
}

void read_chunk(const json::value& part, Message& message) {
  if (part.is_string()) {
    message.chunks.push_back({std::string(part.get_string())});
    return;
  }
  if (!part.is_object()) refuse("a content part must be an object with a \"type\"");
  const json::object& object = part.get_object();
  const std::string type = string_of(object.if_contains("type"));
  if (type == "text") {
    message.chunks.push_back({string_of(object.if_contains("text"))});
  } else if (type == "thinking") {
    Chunk chunk;
    chunk.is_thinking = true;
    if (const auto* inner = object.if_contains("thinking")) {
      if (inner->is_array()) {
        for (const auto& piece : inner->get_array()) {
          if (piece.is_object()) chunk.text += string_of(piece.get_object().if_contains("text"));
        }
      } else {
        chunk.text = string_of(inner);
      }
    }
    if (const auto* closed = object.if_contains("closed"))
      chunk.is_closed = !closed->is_bool() || closed->get_bool();
    message.chunks.push_back(std::move(chunk));
  } else {
    fail(ErrorKind::kUnsupported,
         "content part of type \"{}\": this model reads text only; send parts of type \"text\"",
         type);
  }
}

Message read_message(const json::value& value, RolePolicy policy) {
  if (!value.is_object()) refuse("a message must be an object with \"role\" and \"content\"");
  const json::object& object = value.get_object();
  const std::string role = string_of(object.if_contains("role"));
  Message message;
  if (role == "system" || role == "developer") {
    message.role = Role::kSystem;
  } else if (role == "user") {
    message.role = Role::kUser;
  } else if (role == "assistant") {
    message.role = Role::kAssistant;
  } else if (role == "tool" || role == "function") {
    message.role = Role::kTool;
  } else if (policy == RolePolicy::kStrict) {
    fail(ErrorKind::kInput, "unknown role \"{}\": use system, user, assistant or tool", role);
  }
  if (message.role == Role::kAssistant) {
    for (const char* key : {"reasoning_content", "reasoning"}) {
      const std::string reasoning = string_of(object.if_contains(key));
      if (reasoning.empty()) continue;
      Chunk thinking;
      thinking.text = reasoning;
      thinking.is_thinking = true;
      message.chunks.push_back(std::move(thinking));
      message.is_list = true;
      break;
    }
  }
  const auto* content = object.if_contains("content");
  if (content != nullptr && content->is_array()) {
    message.is_list = true;
    for (const auto& part : content->get_array()) read_chunk(part, message);
  } else if (const std::string text = string_of(content); !text.empty()) {
    message.chunks.push_back({text});
  }
  if (const auto* calls = object.if_contains("tool_calls"); calls != nullptr && calls->is_array()) {
    for (const auto& item : calls->get_array()) {
      if (!item.is_object()) refuse("a tool call must be an object");
      const auto* function = item.get_object().if_contains("function");
      if (function == nullptr || !function->is_object())
        refuse("a tool call needs a \"function\" object");
      Call call;
      call.id = string_of(item.get_object().if_contains("id"));
      call.name = string_of(function->get_object().if_contains("name"));
      call.arguments = string_of(function->get_object().if_contains("arguments"));
      message.calls.push_back(std::move(call));
    }
  }
  if (const auto* id = object.if_contains("tool_call_id"); id != nullptr && id->is_string()) {
    message.call_id = std::string(id->get_string());
    message.has_call_id = true;
  }
  return message;
}

// ---- mistral-common's validation

void check_last(const std::vector<Message>& messages, bool continue_final) {
  const Role last = messages.back().role;
  if (last == Role::kAssistant && !continue_final) {
    refuse(
        "Expected last role User or Tool (or Assistant with prefix or continue_final_message set "
        "to "
        "True) for serving but got assistant");
  }
  if (continue_final && last != Role::kAssistant) {
    refuse(
        fmt::format("Expected last role Assistant with prefix False for serving with "
                    "continue_final_message set to True but got {}",
                    role_name(last)));
  }
}

void check_order(const std::vector<Message>& messages) {
  for (size_t i = 1; i < messages.size(); ++i) {
    const Role before = messages[i - 1].role;
    const Role now = messages[i].role;
    const bool ok = before == Role::kAssistant ? now != Role::kSystem
                    : before == Role::kTool    ? now == Role::kAssistant || now == Role::kTool
                                               : now != Role::kTool;
    if (!ok)
      refuse(
          fmt::format("Unexpected role '{}' after role '{}'", role_name(now), role_name(before)));
  }
}

void check_calls(const std::vector<Message>& messages, bool by_id) {
  std::set<std::string> expected, observed;
  int64_t open = 0;
  for (size_t i = 1; i < messages.size(); ++i) {
    const Message& message = messages[i];
    if (message.role == Role::kTool) {
      --open;
      if (!by_id) continue;
      if (observed.contains(message.call_id)) {
        refuse(fmt::format("Duplicate tool call id {} in tool results", message.call_id));
      }
      if (!expected.contains(message.call_id)) {
        refuse(fmt::format("Unexpected tool call id {} in tool results", message.call_id));
      }
      observed.insert(message.call_id);
    } else if (message.role == Role::kAssistant) {
      if (by_id ? expected.size() != observed.size() : open != 0) {
        refuse("Not the same number of function calls and responses");
      }
      expected.clear();
      observed.clear();
      if (!message.calls.empty()) open = static_cast<int64_t>(message.calls.size());
      for (const Call& call : message.calls) {
        if (by_id && !expected.insert(call.id).second) {
          refuse(fmt::format("Duplicate tool call id {} in assistant message", call.id));
        }
      }
    }
  }
  if (by_id ? expected.size() != observed.size() : open != 0) {
    refuse("Not the same number of function calls and responses");
  }
}

void check_content(const Message& message, MistralVersion version) {
  if (message.role == Role::kAssistant) {
    if (version == MistralVersion::kV3 && message.has_content() == !message.calls.empty()) {
      refuse("Assistant message must have either content or tool_calls, but not both.");
    }
    for (const Call& call : message.calls) {
      if (!is_mistral_call_id(call.id)) {
        refuse(fmt::format("Tool call id was {} but must be a-z, A-Z, 0-9, with a length of 9.",
                           call.id));
      }
      if (!is_function_name(call.name)) {
        refuse(fmt::format(
            "Function name was {} but must be a-z, A-Z, 0-9, or contain underscores and "
            "dashes, with a maximum length of 64.",
            call.name));
      }
    }
  }
  if (message.role == Role::kTool) {
    if (!message.has_call_id) refuse("Tool call id has to be defined.");
    if (!is_mistral_call_id(message.call_id)) {
      refuse(fmt::format("Tool call id was {} but must be a-z, A-Z, 0-9, with a length of 9.",
                         message.call_id));
    }
  }
  if (message.has_thinking()) {
    if (version < MistralVersion::kV11) {
      refuse(fmt::format("Unexpected content chunk types in {} message: ['ThinkChunk']",
                         role_name(message.role)));
    }
    if (version < MistralVersion::kV13) refuse("Think not implemented for tokenizer < V13.");
    if (message.role == Role::kUser || message.role == Role::kTool) {
      refuse(fmt::format("Unexpected content chunk types in {} message: ['ThinkChunk']",
                         role_name(message.role)));
    }
  }
}

void validate(const std::vector<Message>& messages, MistralVersion version, bool continue_final) {
  if (messages.size() == 1 && messages[0].role != Role::kUser &&
      messages[0].role != Role::kSystem) {
    refuse("Conversation must start with a user message or system message");
  }
  if (messages.size() > 1) check_last(messages, continue_final);
  check_order(messages);
  check_calls(messages, version >= MistralVersion::kV13);
  for (const Message& message : messages) check_content(message, version);
}

// ---- normalisation

/// Appends a message's chunks: texts of one message and of merged messages are joined with a blank
/// line.
void merge_chunks(std::vector<Chunk>& into, const std::vector<Chunk>& chunks) {
  for (const Chunk& chunk : chunks) {
    if (!chunk.is_thinking && chunk.text.empty()) continue;
    if (!chunk.is_thinking && !into.empty() && !into.back().is_thinking) {
      into.back().text += "\n\n" + chunk.text;
    } else {
      into.push_back(chunk);
    }
  }
}

std::vector<Message> merge_roles(const std::vector<Message>& messages) {
  std::vector<Message> out;
  for (const Message& message : messages) {
    const bool merges = message.role == Role::kUser || message.role == Role::kAssistant;
    if (merges && !out.empty() && out.back().role == message.role) {
      Message& last = out.back();
      merge_chunks(last.chunks, message.chunks);
      last.calls.insert(last.calls.end(), message.calls.begin(), message.calls.end());
      last.is_list = last.is_list || message.is_list;
      continue;
    }
    Message copy = message;
    copy.chunks.clear();
    merge_chunks(copy.chunks, message.chunks);
    out.push_back(std::move(copy));
  }
  return out;
}

/// Results in the order of the calls before them (V11 and later).
void sort_results(std::vector<Message>& messages) {
  std::vector<std::string> call_ids;
  for (size_t i = 0; i < messages.size();) {
    if (messages[i].role != Role::kTool) {
      if (messages[i].role == Role::kAssistant) {
        for (const Call& call : messages[i].calls) call_ids.push_back(call.id);
      }
      ++i;
      continue;
    }
    size_t end = i;
    while (end < messages.size() && messages[end].role == Role::kTool) ++end;
    std::stable_sort(messages.begin() + static_cast<ptrdiff_t>(i),
                     messages.begin() + static_cast<ptrdiff_t>(end),
                     [&](const Message& a, const Message& b) {
                       return std::find(call_ids.begin(), call_ids.end(), a.call_id) <
                              std::find(call_ids.begin(), call_ids.end(), b.call_id);
                     });
    call_ids.clear();
    i = end;
  }
}

void repair(std::vector<Message>& messages, MistralVersion version) {
  for (Message& message : messages) {
    for (Call& call : message.calls) call.id = repair_call_id(call.id);
    if (message.role == Role::kTool) message.call_id = repair_call_id(message.call_id);
    if (version < MistralVersion::kV13 || message.role == Role::kUser ||
        message.role == Role::kTool) {
      std::erase_if(message.chunks, [](const Chunk& chunk) { return chunk.is_thinking; });
    }
  }
  // A reply without text and without calls says nothing; what is around it is merged.
  const bool last_is_open = !messages.empty() && messages.back().role == Role::kAssistant;
  Message last;
  if (last_is_open) {
    last = messages.back();
    messages.pop_back();
  }
  std::erase_if(messages, [](const Message& message) {
    return message.role == Role::kAssistant && message.calls.empty() &&
           std::all_of(message.chunks.begin(), message.chunks.end(),
                       [](const Chunk& chunk) { return chunk.text.empty(); });
  });
  if (last_is_open) messages.push_back(std::move(last));
}

json::array normalize_tools(const json::value& tools, RolePolicy policy) {
  json::array out;
  if (!tools.is_array()) return out;
  for (const auto& tool : tools.get_array()) {
    const auto* function = tool.is_object() ? tool.get_object().if_contains("function") : nullptr;
    if (function == nullptr || !function->is_object()) refuse("a tool needs a \"function\" object");
    const json::object& f = function->get_object();
    const std::string name = string_of(f.if_contains("name"));
    if (policy == RolePolicy::kStrict && !is_function_name(name)) {
      refuse(
          fmt::format("Function name was {} but must be a-z, A-Z, 0-9, or contain underscores and "
                      "dashes, with a maximum length of 64.",
                      name));
    }
    const auto* parameters = f.if_contains("parameters");
    json::object kept;
    kept["name"] = name;
    kept["description"] = string_of(f.if_contains("description"));
    kept["parameters"] =
        parameters != nullptr && !parameters->is_null() ? *parameters : json::value(json::object());
    out.push_back(json::object{{"type", "function"}, {"function", std::move(kept)}});
  }
  return out;
}

// ---- encoding

class Writer {
 public:
  Writer(MistralVersion version, std::string_view eos) : version_(version), eos_(eos) {}

  void control(std::string_view token) { append_segment(segments, token, true); }
  void data(std::string_view text) { append_segment(segments, text, false); }

  void chunks(const Message& message) {
    for (const Chunk& chunk : message.chunks) {
      if (!chunk.is_thinking) {
        data(chunk.text);
        continue;
      }
      control("[THINK]");
      data(chunk.text);
      if (chunk.is_closed) control("[/THINK]");
    }
  }

  void user(const Message& message, std::string_view system, const json::array* tools) {
    if (tools != nullptr) {
      control("[AVAILABLE_TOOLS]");
      data(dump_json(*tools));
      control("[/AVAILABLE_TOOLS]");
    }
    control("[INST]");
    if (!system.empty()) data(std::string(system) + "\n\n");
    chunks(message);
    control("[/INST]");
  }

  void system(const Message& message) {
    control("[SYSTEM_PROMPT]");
    chunks(message);
    control("[/SYSTEM_PROMPT]");
  }

  void assistant(Message message, bool is_open) {
    const bool only_text = message.chunks.size() == 1 && !message.chunks[0].is_thinking;
    if (only_text && !message.is_list) {
      std::string& text = message.chunks[0].text;
      text.erase(text.find_last_not_of(' ') + 1);
    }
    chunks(message);
    if (!message.calls.empty()) calls(message.calls);
    if (!is_open) control(eos_);
  }

  void calls(const std::vector<Call>& calls) {
    if (version_ < MistralVersion::kV11) {
      json::array list;
      for (const Call& call : calls) {
        list.push_back(json::object{{"name", call.name},
                                    {"arguments", parse_or_string(normalize_json(call.arguments))},
                                    {"id", call.id}});
      }
      control("[TOOL_CALLS]");
      data(dump_json(list));
      return;
    }
    for (const Call& call : calls) {
      control("[TOOL_CALLS]");
      data(call.name);
      if (version_ == MistralVersion::kV11) {
        control("[CALL_ID]");
        data(call.id);
      }
      control("[ARGS]");
      data(dump_json(parse_or_string(normalize_json(call.arguments))));
    }
  }

  void tool(const Message& message) {
    std::string text;
    for (const Chunk& chunk : message.chunks) text += chunk.text;
    control("[TOOL_RESULTS]");
    if (version_ == MistralVersion::kV3) {
      data(dump_json(json::object{{"content", parse_or_string(normalize_json(text))},
                                  {"call_id", message.call_id}}));
    } else if (version_ < MistralVersion::kV13) {
      data(message.call_id);
      control("[TOOL_CONTENT]");
      data(text);
    } else {
      data(text);
    }
    control("[/TOOL_RESULTS]");
  }

  RenderedSegments segments;

 private:
  MistralVersion version_;
  std::string_view eos_;
};

std::string joined_text(const Message& message) {
  std::string text;
  for (const Chunk& chunk : message.chunks) text += chunk.text;
  return text;
}

}  // namespace

bool is_mistral_call_id(std::string_view id) {
  return id.size() == 9 &&
         std::all_of(id.begin(), id.end(), [](unsigned char c) { return c < 0x80 && isalnum(c); });
}

MistralVersion choose_mistral_version(std::span<const std::string> special_tokens) {
  const auto has = [&](std::string_view token) {
    return std::find(special_tokens.begin(), special_tokens.end(), token) != special_tokens.end();
  };
  return has("[THINK]") && has("[ARGS]") ? MistralVersion::kV13 : MistralVersion::kV7;
}

RenderedSegments MistralChatFormat::render(const json::array& raw, const json::value& raw_tools,
                                           bool continue_final_message, RolePolicy policy) const {
  if (raw.empty()) refuse("Conversation must have at least one message");
  std::vector<Message> messages;
  for (const auto& message : raw) messages.push_back(read_message(message, policy));
  if (policy == RolePolicy::kStrict) {
    validate(messages, version_, continue_final_message);
  } else {
    repair(messages, version_);
    continue_final_message =
        continue_final_message && !messages.empty() && messages.back().role == Role::kAssistant;
  }
  const json::array tools = normalize_tools(raw_tools, policy);

  messages = merge_roles(messages);
  if (version_ >= MistralVersion::kV11) sort_results(messages);
  std::string system;  // V3 writes it into the last user turn
  if (version_ == MistralVersion::kV3) {
    for (const Message& message : messages) {
      if (message.role != Role::kSystem) continue;
      const std::string text = joined_text(message);
      if (!text.empty()) system += (system.empty() ? "" : "\n\n") + text;
    }
    std::erase_if(messages, [](const Message& message) { return message.role == Role::kSystem; });
    if (messages.empty() || messages[0].role != Role::kUser)
      messages.insert(messages.begin(), Message());
  }
  const auto is_user = [](const Message& message) { return message.role == Role::kUser; };
  const auto first_user =
      std::find_if(messages.begin(), messages.end(), is_user) - messages.begin();
  const auto last_user =
      messages.rend() - std::find_if(messages.rbegin(), messages.rend(), is_user) - 1;
  const auto tools_at = version_ >= MistralVersion::kV13 ? first_user : last_user;

  Writer writer(version_, eos_);
  writer.control(bos_);
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    const auto at = static_cast<ptrdiff_t>(i);
    const bool is_last = i + 1 == messages.size();
    switch (message.role) {
      case Role::kSystem: writer.system(message); break;
      case Role::kUser:
        writer.user(message, at == last_user ? system : std::string(),
                    at == tools_at && !tools.empty() ? &tools : nullptr);
        break;
      case Role::kAssistant:
        if (policy == RolePolicy::kStrict && message.chunks.empty() && message.calls.empty()) {
          refuse("Invalid assistant message: it has neither content nor tool calls");
        }
        writer.assistant(message, is_last && continue_final_message);
        break;
      case Role::kTool: writer.tool(message); break;
    }
  }
  return std::move(writer.segments);
}

}  // namespace nibble
