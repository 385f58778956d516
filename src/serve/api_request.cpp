// SPDX-License-Identifier: Apache-2.0
#include "serve/api_request.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "serve/api_error.h"

namespace nibble {
namespace {

constexpr size_t kMaxStops = 64;
constexpr size_t kMaxStopBytes = 1024;
constexpr int kMaxDepth = 64;  // of the JSON

std::string shown(const json::value& value) {
  std::string text = dump_json(value);
  if (text.size() > 80) {
    size_t end = 77;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
    text = text.substr(0, end) + "...";
  }
  return text;
}

[[noreturn]] void wrong(std::string_view name, const json::value& value, std::string_view wanted) {
  throw ApiError::bad_request(name,
                              fmt::format("{} is {}, but must be {}", name, shown(value), wanted));
}

/// Typed access to the members of a body. null counts as absent, as in OpenAI's own API.
class Fields {
 public:
  explicit Fields(const json::object& object) : object_(object) {}

  const json::value* find(std::string_view name) const {
    const auto* value = object_.if_contains(name);
    return value == nullptr || value->is_null() ? nullptr : value;
  }

  void read(std::string_view name, bool& out) const {
    const auto* value = find(name);
    if (value == nullptr) return;
    if (!value->is_bool()) wrong(name, *value, "true or false");
    out = value->get_bool();
  }

  void read(std::string_view name, std::string& out) const {
    const auto* value = find(name);
    if (value == nullptr) return;
    if (!value->is_string()) wrong(name, *value, "a string");
    out = value->get_string();
  }

  void read(std::string_view name, float& out) const {
    const auto* value = find(name);
    if (value == nullptr) return;
    const auto number = number_of(*value);
    if (!number || !std::isfinite(*number) ||
        std::abs(*number) > double{std::numeric_limits<float>::max()}) {
      wrong(name, *value, "a number");
    }
    out = static_cast<float>(*number);
  }

  /// An integer in [low, high]; 3.0 counts as one.
  std::optional<int64_t> integer(std::string_view name, int64_t low, int64_t high) const {
    const auto* value = find(name);
    if (value == nullptr) return std::nullopt;
    const auto number = integer_of(*value);
    if (!number || *number < low || *number > high) {
      wrong(name, *value, fmt::format("an integer from {} to {}", low, high));
    }
    return number;
  }

  void read(std::string_view name, int& out, int low, int high) const {
    if (const auto number = integer(name, low, high)) out = static_cast<int>(*number);
  }

  static std::optional<double> number_of(const json::value& value) {
    if (value.is_int64()) return static_cast<double>(value.get_int64());
    if (value.is_uint64()) return static_cast<double>(value.get_uint64());
    if (value.is_double()) return value.get_double();
    return std::nullopt;
  }

  static std::optional<int64_t> integer_of(const json::value& value) {
    if (value.is_int64()) return value.get_int64();
    if (value.is_double()) {
      const double number = value.get_double();
      if (std::abs(number) < 9e15 && number == std::floor(number)) {
        return static_cast<int64_t>(number);
      }
    }
    return std::nullopt;
  }

 private:
  const json::object& object_;
};

json::object parse_object(std::string_view body) {
  try {
    json::value value = parse_json(body, "the request body", kMaxDepth);
    if (!value.is_object()) {
      throw ApiError::bad_request(
          "", fmt::format("the request body is {}, but must be a JSON object", shown(value)));
    }
    return std::move(value.get_object());
  } catch (const Error& error) {
    throw ApiError::bad_request("", error.what());
  }
}

std::vector<int32_t> token_ids(std::string_view name, const json::array& array) {
  std::vector<int32_t> ids;
  ids.reserve(array.size());
  for (const auto& item : array) {
    const auto id = Fields::integer_of(item);
    if (!id || *id < 0 || *id > std::numeric_limits<int32_t>::max()) {
      wrong(fmt::format("{}[{}]", name, ids.size()), item, "a token id");
    }
    ids.push_back(static_cast<int32_t>(*id));
  }
  return ids;
}

void read_stop(const Fields& fields, std::vector<std::string>& stop) {
  const auto* value = fields.find("stop");
  if (value == nullptr) return;
  const auto add = [&](const json::value& item) {
    if (!item.is_string()) wrong("stop", *value, "a string or an array of strings");
    if (item.get_string().empty()) return;  // front-ends send empty boxes
    if (item.get_string().size() > kMaxStopBytes) {
      throw ApiError::bad_request(
          "stop", fmt::format("stop has a string of {} bytes, but at most {} are supported",
                              item.get_string().size(), kMaxStopBytes));
    }
    stop.emplace_back(item.get_string());
  };
  if (value->is_array()) {
    for (const auto& item : value->get_array()) add(item);
  } else {
    add(*value);
  }
  if (stop.size() > kMaxStops) {
    throw ApiError::bad_request("stop", fmt::format("stop has {} strings, but at most {} are "
                                                    "supported",
                                                    stop.size(), kMaxStops));
  }
}

void read_logit_bias(const Fields& fields, SamplingParams& params) {
  const auto* value = fields.find("logit_bias");
  if (value == nullptr) return;
  if (!value->is_object()) wrong("logit_bias", *value, "an object {\"token id\": bias}");
  for (const auto& member : value->get_object()) {
    const std::string_view key(member.key().data(), member.key().size());
    int32_t id = -1;
    const auto [end, ec] = std::from_chars(key.data(), key.data() + key.size(), id);
    const auto bias = Fields::number_of(member.value());
    if (ec != std::errc() || end != key.data() + key.size() || id < 0 || !bias ||
        !(std::abs(*bias) <= 100)) {
      throw ApiError::bad_request(
          "logit_bias",
          fmt::format("logit_bias has \"{}\": {}, but must map token ids to numbers from -100 to "
                      "100",
                      key.substr(0, 40), shown(member.value())));
    }
    // OpenAI's -100 "should result in a ban"; here it does.
    params.logit_bias.emplace_back(
        id, *bias <= -100 ? -std::numeric_limits<float>::infinity() : static_cast<float>(*bias));
  }
}

void read_sampling(const Fields& fields, SamplingParams& params) {
  fields.read("temperature", params.temperature);
  fields.read("top_p", params.top_p);
  fields.read("min_p", params.min_p);
  if (const auto k = fields.integer("top_k", -1, std::numeric_limits<int>::max())) {
    params.top_k = *k < 0 ? 0 : static_cast<int>(*k);  // vLLM's -1: off
  }
  fields.read("repetition_penalty", params.repetition_penalty);
  fields.read("presence_penalty", params.presence_penalty);
  fields.read("frequency_penalty", params.frequency_penalty);
  if (const auto* seed = fields.find("seed")) {
    if (seed->is_uint64()) {
      params.seed = seed->get_uint64();
    } else if (const auto number = Fields::integer_of(*seed)) {
      if (*number != -1) params.seed = static_cast<uint64_t>(*number);  // -1: SillyTavern's "any"
    } else {
      wrong("seed", *seed, "an integer");
    }
  }
  read_logit_bias(fields, params);
  if (const auto* ids = fields.find("stop_token_ids")) {
    if (!ids->is_array()) wrong("stop_token_ids", *ids, "an array of token ids");
    params.stop_token_ids = token_ids("stop_token_ids", ids->get_array());
  }
  fields.read("ignore_eos", params.ignore_eos);
  fields.read("min_tokens", params.min_tokens, 0, std::numeric_limits<int>::max());
  fields.read("n", params.n, 1, kMaxChoices);
}

/// Known to other servers, would change the answer, not done here.
void refuse_unsupported(const Fields& fields) {
  for (const std::string_view name :
       {"functions", "guided_grammar", "guided_whitespace_pattern", "prompt_logprobs", "audio",
        "web_search_options", "prediction"}) {
    if (fields.find(name) != nullptr) {
      throw ApiError::unsupported(
          name, fmt::format("{} is not supported by nibble; leave it out of the request", name));
    }
  }
  bool beams = false;
  fields.read("use_beam_search", beams);
  if (beams) {
    throw ApiError::unsupported("use_beam_search",
                                "use_beam_search is true, but nibble only samples; leave it out");
  }
}

// Structured output
// ----------------------------------------------------------------------------------------------

OutputFormat schema_format(std::string_view field, const json::value& schema) {
  OutputFormat format{.kind = OutputFormat::Kind::kJsonSchema, .field = std::string(field)};
  if (schema.is_string()) {  // vLLM takes the schema as text, too
    try {
      format.schema = parse_json(schema.get_string(), field, kMaxDepth);
    } catch (const Error& error) {
      throw ApiError::bad_request(field, error.what());
    }
  } else {
    format.schema = schema;
  }
  if (!format.schema.is_object() && !format.schema.is_bool()) {
    wrong(field, schema, "a JSON schema");
  }
  return format;
}

OutputFormat choice_format(std::string_view field, const json::value& choices) {
  constexpr std::string_view kWanted = "a non-empty array of strings";
  OutputFormat format{.kind = OutputFormat::Kind::kChoice, .field = std::string(field)};
  if (!choices.is_array() || choices.get_array().empty()) wrong(field, choices, kWanted);
  for (const auto& choice : choices.get_array()) {
    if (!choice.is_string()) wrong(field, choices, kWanted);
    format.choices.emplace_back(choice.get_string());
  }
  return format;
}

OutputFormat regex_format(std::string_view field, const json::value& regex) {
  if (!regex.is_string()) wrong(field, regex, "a regular expression as a string");
  return {.kind = OutputFormat::Kind::kRegex,
          .field = std::string(field),
          .regex = std::string(regex.get_string())};
}

OutputFormat response_format(const json::value& value) {
  constexpr std::string_view kField = "response_format";
  constexpr std::string_view kWanted =
      "{\"type\": \"text\"}, {\"type\": \"json_object\"} or {\"type\": \"json_schema\", "
      "\"json_schema\": {\"name\": ..., \"schema\": {...}}}";
  if (!value.is_object()) wrong(kField, value, kWanted);
  const Fields parts(value.get_object());
  const auto* type = parts.find("type");
  if (type == nullptr || !type->is_string()) wrong(kField, value, kWanted);
  const std::string_view word = type->get_string();
  if (word == "text") return {};
  if (word == "json_object") {
    // A schema beside it: llama.cpp's spelling.
    if (const auto* schema = parts.find("schema")) return schema_format(kField, *schema);
    return {.kind = OutputFormat::Kind::kJsonObject, .field = std::string(kField)};
  }
  if (word != "json_schema") {
    throw ApiError::unsupported(
        kField, fmt::format("response_format is {}, but must be {}", shown(value), kWanted));
  }
  const auto* named = parts.find("json_schema");
  if (named == nullptr || !named->is_object()) wrong(kField, value, kWanted);
  const auto* schema = Fields(named->get_object()).find("schema");
  if (schema == nullptr) wrong(kField, value, kWanted);
  return schema_format(kField, *schema);
}

OutputFormat structured_outputs(const json::value& value) {
  constexpr std::string_view kField = "structured_outputs";
  constexpr std::string_view kWanted = "an object with one of json, json_object, choice and regex";
  if (!value.is_object()) wrong(kField, value, kWanted);
  OutputFormat format;
  for (const auto& member : value.get_object()) {
    const std::string_view name = member.key();
    const json::value& given = member.value();
    if (given.is_null() || given == json::value(false)) continue;
    if (name == "disable_fallback") continue;  // there is no other implementation to fall back to
    if (format) wrong(kField, value, kWanted);
    if (name == "json") {
      format = schema_format(kField, given);
    } else if (name == "json_object" && given == json::value(true)) {
      format = {.kind = OutputFormat::Kind::kJsonObject, .field = std::string(kField)};
    } else if (name == "choice") {
      format = choice_format(kField, given);
    } else if (name == "regex") {
      format = regex_format(kField, given);
    } else {
      throw ApiError::unsupported(
          kField, fmt::format("structured_outputs has \"{}\", but must be {}", name, kWanted));
    }
  }
  if (!format) wrong(kField, value, kWanted);
  return format;
}

void read_format(const Fields& fields, OutputFormat& format) {
  const auto take = [&](OutputFormat next) {
    if (!next) return;
    if (format) {
      throw ApiError::bad_request(
          next.field, fmt::format("{} and {} are both given; the answer can follow only "
                                  "one of them",
                                  format.field, next.field));
    }
    format = std::move(next);
  };
  if (const auto* value = fields.find("response_format")) take(response_format(*value));
  if (const auto* value = fields.find("structured_outputs")) take(structured_outputs(*value));
  if (const auto* value = fields.find("guided_json")) take(schema_format("guided_json", *value));
  if (const auto* value = fields.find("guided_choice")) {
    take(choice_format("guided_choice", *value));
  }
  if (const auto* value = fields.find("guided_regex")) take(regex_format("guided_regex", *value));
  std::string ignored;  // which of vLLM's implementations
  fields.read("guided_decoding_backend", ignored);
}

/// What both generation endpoints share.
void read_common(const Fields& fields, GenerationBody& body) {
  refuse_unsupported(fields);
  read_format(fields, body.format);
  fields.read("model", body.model);
  read_sampling(fields, body.params);
  read_stop(fields, body.stop);
  fields.read("include_stop_str_in_output", body.include_stop);
  fields.read("skip_special_tokens", body.skip_special);
  fields.read("priority", body.priority, -1'000'000, 1'000'000);
  fields.read("cache_salt", body.cache_salt);
  fields.read("stream", body.stream);
  if (const auto* options = fields.find("stream_options")) {
    if (!options->is_object()) wrong("stream_options", *options, "an object");
    if (!body.stream) {
      throw ApiError::bad_request("stream_options",
                                  "stream_options is given, but stream is not true; set "
                                  "\"stream\": true or leave it out");
    }
    const Fields inner(options->get_object());
    inner.read("include_usage", body.stream_options.include_usage);
    inner.read("continuous_usage_stats", body.stream_options.continuous_usage_stats);
  }
}

void check_choices(size_t num_prompts, int n, const BodyLimits& limits) {
  const size_t choices = num_prompts * static_cast<size_t>(n);
  if (choices > static_cast<size_t>(limits.max_choices)) {
    throw ApiError::bad_request(
        n > 1 ? "n" : "prompt",
        fmt::format("the request asks for {} choices ({} prompts, n = {}), but at most {} are "
                    "allowed (--max-choices); split it",
                    choices, num_prompts, n, limits.max_choices));
  }
}

void read_chat(const Fields& fields, ChatRequest& chat) {
  const auto* messages = fields.find("messages");
  if (messages == nullptr) {
    throw ApiError::bad_request("messages",
                                "messages is missing; send [{\"role\": \"user\", \"content\": "
                                "\"...\"}]");
  }
  if (!messages->is_array() || messages->get_array().empty()) {
    wrong("messages", *messages, "a non-empty array of objects with \"role\" and \"content\"");
  }
  chat.messages = messages->get_array();
  size_t idx = 0;
  for (const auto& message : chat.messages) {
    const std::string name = fmt::format("messages[{}]", idx++);
    if (!message.is_object()) wrong(name, message, "an object with \"role\" and \"content\"");
    const auto* role = message.get_object().if_contains("role");
    if (role == nullptr || !role->is_string()) {
      wrong(name + ".role", role == nullptr ? json::value(nullptr) : *role,
            "a string: system, user, assistant or tool");
    }
    const auto* content = message.get_object().if_contains("content");
    if (content != nullptr && !content->is_null() && !content->is_string() &&
        !content->is_array()) {
      wrong(name + ".content", *content, "a string or an array of content parts");
    }
  }
  fields.read("add_generation_prompt", chat.add_generation_prompt);
  fields.read("continue_final_message", chat.continue_final_message);
  if (chat.continue_final_message && chat.add_generation_prompt) {
    // vLLM insists on both being spelled out; whoever only asks to continue means the same.
    if (fields.find("add_generation_prompt") != nullptr) {
      throw ApiError::bad_request("continue_final_message",
                                  "continue_final_message and add_generation_prompt are both true, "
                                  "but exclude each other; set add_generation_prompt to false");
    }
    chat.add_generation_prompt = false;
  }
  if (const auto* variables = fields.find("chat_template_kwargs")) {
    if (!variables->is_object()) wrong("chat_template_kwargs", *variables, "an object");
    chat.template_variables = variables->get_object();
  }
  if (const auto* documents = fields.find("documents")) {
    if (!documents->is_array()) wrong("documents", *documents, "an array");
    chat.documents = *documents;
  }
}

std::string tool_name(const json::value& tool) {
  const auto* function = tool.is_object() ? tool.get_object().if_contains("function") : nullptr;
  if (function == nullptr || !function->is_object()) return {};
  const auto* name = function->get_object().if_contains("name");
  return name != nullptr && name->is_string() ? std::string(name->get_string()) : std::string();
}

void check_tools(const json::array& tools) {
  for (size_t i = 0; i < tools.size(); ++i) {
    if (tool_name(tools[i]).empty()) {
      wrong(fmt::format("tools[{}]", i), tools[i],
            "{\"type\": \"function\", \"function\": {\"name\": ..., \"parameters\": ...}}");
    }
  }
}

/// tools, tool_choice, parallel_tool_calls.
void read_tools(const Fields& fields, GenerationBody& body) {
  using Choice = GenerationBody::ToolChoice;
  fields.read("parallel_tool_calls", body.parallel_tool_calls);
  const auto* tools = fields.find("tools");
  if (tools != nullptr && !tools->is_array()) wrong("tools", *tools, "an array of functions");
  const bool given = tools != nullptr && !tools->get_array().empty();
  const auto* choice = fields.find("tool_choice");
  body.tool_choice = given ? Choice::kAuto : Choice::kNone;
  if (choice != nullptr) {
    const std::string_view word =
        choice->is_string() ? std::string_view(choice->get_string()) : std::string_view();
    body.tool_name = tool_name(*choice);
    if (word == "none") {
      body.tool_choice = Choice::kNone;
    } else if (word == "required") {
      body.tool_choice = Choice::kRequired;
    } else if (!body.tool_name.empty()) {
      body.tool_choice = Choice::kNamed;
    } else if (word != "auto") {
      wrong("tool_choice", *choice,
            "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": "
            "...}}");
    }
    if (body.uses_tools() && !given) {
      if (word == "auto") {
        body.tool_choice = Choice::kNone;
        return;
      }
      throw ApiError::bad_request("tool_choice",
                                  "tool_choice asks for a tool, but tools is missing; list them "
                                  "there");
    }
  }
  if (!body.uses_tools()) return;  // what is not to be called is not told to the model
  if (body.format && body.tool_choice != Choice::kAuto) {
    throw ApiError::bad_request(
        "tool_choice",
        fmt::format("tool_choice asks for a tool and {} for another answer; use one of them",
                    body.format.field));
  }
  check_tools(tools->get_array());
  const auto is_named = [&](const json::value& tool) { return tool_name(tool) == body.tool_name; };
  if (body.tool_choice == Choice::kNamed &&
      std::none_of(tools->get_array().begin(), tools->get_array().end(), is_named)) {
    throw ApiError::bad_request(
        "tool_choice",
        fmt::format("tool_choice names \"{}\", which is not among tools", body.tool_name));
  }
  body.chat.tools = *tools;
}

void read_prompts(const Fields& fields, std::vector<Prompt>& prompts) {
  const auto* value = fields.find("prompt");
  if (value == nullptr) {
    throw ApiError::bad_request("prompt", "prompt is missing; send a string or token ids");
  }
  constexpr std::string_view kWanted =
      "a string, an array of strings, an array of token ids or an array of such arrays";
  if (value->is_string()) {
    prompts.emplace_back(std::string(value->get_string()));
    return;
  }
  if (!value->is_array() || value->get_array().empty()) wrong("prompt", *value, kWanted);
  const json::array& array = value->get_array();
  if (array.front().is_number()) {
    prompts.emplace_back(token_ids("prompt", array));
    return;
  }
  for (const auto& item : array) {
    if (item.is_string()) {
      prompts.emplace_back(std::string(item.get_string()));
    } else if (item.is_array()) {
      prompts.emplace_back(token_ids(fmt::format("prompt[{}]", prompts.size()), item.get_array()));
    } else {
      wrong("prompt", *value, kWanted);
    }
  }
}

}  // namespace

GenerationBody parse_chat_body(std::string_view text, const SamplingParams& defaults,
                               const BodyLimits& limits) {
  const json::object object = parse_object(text);
  const Fields fields(object);
  GenerationBody body{.is_chat = true, .params = defaults};
  read_common(fields, body);
  read_chat(fields, body.chat);
  read_tools(fields, body);
  check_choices(1, body.params.n, limits);
  const int most = std::numeric_limits<int>::max();
  for (const std::string_view name : {"max_tokens", "max_completion_tokens"}) {  // the newer wins
    if (const auto max = fields.integer(name, 1, most)) body.max_tokens = static_cast<int>(*max);
  }
  bool logprobs = false;
  fields.read("logprobs", logprobs);
  if (const auto top = fields.integer("top_logprobs", 0, kMaxTopLogprobs)) {
    if (!logprobs && *top > 0) {
      throw ApiError::bad_request("top_logprobs",
                                  "top_logprobs is given, but logprobs is not true; set "
                                  "\"logprobs\": true");
    }
    body.params.logprobs = logprobs ? static_cast<int>(*top) : -1;
  } else if (logprobs) {
    body.params.logprobs = 0;
  }
  return body;
}

GenerationBody parse_completion_body(std::string_view text, const SamplingParams& defaults,
                                     const BodyLimits& limits) {
  const json::object object = parse_object(text);
  const Fields fields(object);
  GenerationBody body{.params = defaults};
  read_common(fields, body);
  read_prompts(fields, body.prompts);
  check_choices(body.prompts.size(), body.params.n, limits);
  fields.read("add_special_tokens", body.add_special_tokens);
  fields.read("echo", body.echo);
  body.max_tokens = 16;  // OpenAI's default for this endpoint
  if (const auto max = fields.integer("max_tokens", 0, std::numeric_limits<int>::max())) {
    body.max_tokens = static_cast<int>(*max);
  }
  if (*body.max_tokens == 0 && !body.echo) {
    throw ApiError::bad_request("max_tokens",
                                "max_tokens is 0, which only \"echo\": true can do anything with; "
                                "ask for at least 1");
  }
  fields.read("logprobs", body.params.logprobs, 0, kMaxTopLogprobs);
  if (body.echo) body.params.prompt_logprobs = body.params.logprobs;
  if (const auto best_of = fields.integer("best_of", 1, kMaxChoices);
      best_of && *best_of != body.params.n) {
    throw ApiError::unsupported(
        "best_of", fmt::format("best_of is {} and n is {}, but nibble returns every choice it "
                               "makes; leave best_of out",
                               *best_of, body.params.n));
  }
  std::string suffix;
  fields.read("suffix", suffix);
  if (!suffix.empty()) {
    throw ApiError::unsupported("suffix",
                                "suffix is given, but this model does not fill in text "
                                "before a suffix; leave it out");
  }
  return body;
}

TokenizeBody parse_tokenize_body(std::string_view text) {
  const json::object object = parse_object(text);
  const Fields fields(object);
  TokenizeBody body;
  fields.read("model", body.model);
  fields.read("return_token_strs", body.return_token_strs);
  if (fields.find("messages") != nullptr) {
    body.is_chat = true;
    read_chat(fields, body.chat);
    if (const auto* tools = fields.find("tools")) {
      if (!tools->is_array()) wrong("tools", *tools, "an array of functions");
      check_tools(tools->get_array());
      body.chat.tools = *tools;
    }
    return body;
  }
  if (fields.find("prompt") == nullptr) {
    throw ApiError::bad_request("prompt",
                                "prompt is missing; send {\"prompt\": \"text\"} or "
                                "{\"messages\": [...]}");
  }
  fields.read("prompt", body.prompt);
  fields.read("add_special_tokens", body.add_special_tokens);
  return body;
}

DetokenizeBody parse_detokenize_body(std::string_view text) {
  const json::object object = parse_object(text);
  const Fields fields(object);
  DetokenizeBody body;
  fields.read("model", body.model);
  const auto* tokens = fields.find("tokens");
  if (tokens == nullptr) {
    throw ApiError::bad_request("tokens", "tokens is missing; send {\"tokens\": [1, 2, 3]}");
  }
  if (!tokens->is_array()) wrong("tokens", *tokens, "an array of token ids");
  body.tokens = token_ids("tokens", tokens->get_array());
  return body;
}

SamplingParams sampling_defaults(const json::object& config) {
  SamplingParams params;
  const Fields fields(config);
  try {
    fields.read("temperature", params.temperature);
    fields.read("top_p", params.top_p);
    fields.read("min_p", params.min_p);
    fields.read("top_k", params.top_k, -1, std::numeric_limits<int>::max());
    fields.read("repetition_penalty", params.repetition_penalty);
  } catch (const ApiError& error) {
    fail(ErrorKind::kInput, "generation_config.json: {}", error.what());
  }
  params.top_k = std::max(params.top_k, 0);
  return params;
}

}  // namespace nibble
