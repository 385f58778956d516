// The OpenAPI document against the server: every route and field on both sides, and every reply
// against its schema. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <regex>
#include <set>

#include "base/file.h"
#include "serve/server_fixture.h"

namespace nibble {
namespace {

using serve_test::get;
using serve_test::post;
using serve_test::Reply;
using serve_test::text_of;

/// The part of JSON Schema that the document uses. A property that the schema does not name is a
/// problem too: the document must be complete.
class Validator {
 public:
  explicit Validator(const json::value& document) : document_(document) {}

  std::vector<std::string> problems(const json::value& value, std::string_view schema) {
    problems_.clear();
    check(value, document_.at("components").at("schemas").at(schema), std::string(schema));
    return problems_;
  }

 private:
  void complain(const std::string& where, const std::string& what) {
    problems_.push_back(where + ": " + what);
  }

  static bool has_type(const json::value& value, std::string_view type) {
    if (type == "null") return value.is_null();
    if (type == "boolean") return value.is_bool();
    if (type == "string") return value.is_string();
    if (type == "array") return value.is_array();
    if (type == "object") return value.is_object();
    if (type == "integer") return value.is_int64() || value.is_uint64();
    return type == "number" && value.is_number();
  }

  bool fits(const json::value& value, const json::value& schema) {
    const auto saved = problems_;
    problems_.clear();
    check(value, schema, "");
    const bool good = problems_.empty();
    problems_ = saved;
    return good;
  }

  void collect_properties(const json::value& schema, std::set<std::string>& names) {
    const json::object& object = schema.as_object();
    if (const auto* ref = object.if_contains("$ref")) collect_properties(resolve(*ref), names);
    if (const auto* all = object.if_contains("allOf")) {
      for (const auto& each : all->as_array()) collect_properties(each, names);
    }
    if (const auto* properties = object.if_contains("properties")) {
      for (const auto& member : properties->as_object()) names.emplace(member.key());
    }
  }

  const json::value& resolve(const json::value& ref) {
    const std::string path = text_of(ref);
    return document_.at("components").at("schemas").at(path.substr(path.rfind('/') + 1));
  }

  void check(const json::value& value, const json::value& schema, const std::string& where,
             bool whole = true) {
    const json::object& object = schema.as_object();
    if (const auto* ref = object.if_contains("$ref"))
      return check(value, resolve(*ref), where, whole);
    if (const auto* all = object.if_contains("allOf")) {
      for (const auto& each : all->as_array()) check(value, each, where, false);
    }
    if (const auto* any = object.if_contains("anyOf")) {
      const auto& choices = any->as_array();
      if (std::none_of(choices.begin(), choices.end(),
                       [&](const auto& each) { return fits(value, each); })) {
        complain(where, dump_json(value).substr(0, 80) + " fits none of anyOf");
      }
      return;
    }
    if (const auto* type = object.if_contains("type")) {
      const bool good =
          type->is_string()
              ? has_type(value, text_of(*type))
              : std::any_of(type->as_array().begin(), type->as_array().end(),
                            [&](const auto& t) { return has_type(value, text_of(t)); });
      if (!good) return complain(where, dump_json(value).substr(0, 80) + " has the wrong type");
    }
    if (const auto* constant = object.if_contains("const"); constant && *constant != value) {
      complain(where, dump_json(value) + " is not " + dump_json(*constant));
    }
    if (const auto* options = object.if_contains("enum")) {
      const auto& list = options->as_array();
      if (std::find(list.begin(), list.end(), value) == list.end()) {
        complain(where, dump_json(value) + " is not in enum");
      }
    }
    if (const auto* items = object.if_contains("items"); items && value.is_array()) {
      for (const auto& item : value.as_array()) check(item, *items, where + "[]");
    }
    if (!value.is_object()) return;
    if (const auto* required = object.if_contains("required")) {
      for (const auto& name : required->as_array()) {
        if (!value.as_object().contains(text_of(name))) complain(where, "no " + text_of(name));
      }
    }
    const auto* properties = object.if_contains("properties");
    if (properties == nullptr) return;
    std::set<std::string> known;
    collect_properties(schema, known);
    for (const auto& member : value.as_object()) {
      const std::string name(member.key());
      if (const auto* property = properties->as_object().if_contains(name)) {
        check(member.value(), *property, where + "." + name);
      } else if (whole && !known.contains(name)) {
        complain(where, name + " is not in the document");
      }
    }
  }

  const json::value& document_;
  std::vector<std::string> problems_;
};

class OpenApi : public serve_test::ServerTest {
 protected:
  void SetUp() override {
    start();
    document_ = get(port(), "/openapi.json").json();
  }
  void expect_valid(const json::value& value, std::string_view schema) {
    EXPECT_EQ(Validator(document_).problems(value, schema), std::vector<std::string>{})
        << dump_json(value).substr(0, 600);
  }
  const json::object& properties(std::string_view schema) const {
    return document_.at("components").at("schemas").at(schema).at("properties").as_object();
  }
  json::value document_;
};

TEST_F(OpenApi, EveryPathIsServedAndEveryRouteIsInIt) {
  const json::object& paths = document_.at("paths").as_object();
  for (const auto& path : paths) {
    for (const auto& operation : path.value().as_object()) {
      std::string where(path.key());
      if (where.ends_with("{name}")) where = "/v1/models/nano";
      const Reply reply = operation.key() == "get" ? get(port(), where) : post(port(), where, "{}");
      EXPECT_EQ(reply.status, operation.key() == "get" ? 200 : 400) << where;
    }
  }
  const std::string source =
      read_file(fs::path(NIBBLE_SOURCE_DIR) / "src" / "serve" / "api_server.cpp");
  const std::regex route(R"re(\{"(/[a-z0-9/_]+)", "(GET|POST)",)re");
  int count = 0;
  for (std::sregex_iterator it(source.begin(), source.end(), route), end; it != end;
       ++it, ++count) {
    const std::string path = (*it)[1], method = (*it)[2] == "GET" ? "get" : "post";
    ASSERT_TRUE(paths.contains(path)) << path;
    EXPECT_TRUE(paths.at(path).as_object().contains(method)) << path;
  }
  EXPECT_EQ(count, 9);
}

TEST_F(OpenApi, EveryFieldIsReadAndEveryFieldReadIsInIt) {
  const struct {
    const char *path, *schema, *base;
  } kBodies[] = {
      {"/v1/chat/completions", "ChatCompletionRequest",
       R"("messages":[{"role":"user","content":"x"}])"},
      {"/v1/completions", "CompletionRequest", R"("prompt":"x")"},
      {"/tokenize", "TokenizeRequest", R"("prompt":"x")"},
      {"/tokenize", "TokenizeRequest", R"("messages":[{"role":"user","content":"x"}])"},
      {"/detokenize", "DetokenizeRequest", R"("tokens":[1])"},
  };
  std::set<std::string> documented;
  for (const auto& body : kBodies) {
    for (const auto& property : properties(body.schema)) {
      const std::string name(property.key());
      documented.insert(name);
      if (body.path == std::string_view("/tokenize")) {
        // With messages the fields of prompts are not looked at, and the other way round.
        const bool of_prompt = name == "prompt" || name == "add_special_tokens";
        const bool of_both = name == "model" || name == "return_token_strs" || name == "messages";
        const bool with_prompt = std::string_view(body.base).starts_with("\"prompt\"");
        if (!of_both && of_prompt != with_prompt) continue;
      }
      // Nothing else accepts an array of an object that holds an array.
      const std::string value = name == "documents" ? "5" : R"([{"wrong":[]}])";
      const std::string base = fmt::format("{{{},", body.base);
      const Reply reply = post(port(), body.path, base + "\"" + name + "\":" + value + "}");
      EXPECT_EQ(reply.status, 400) << body.path << " " << name;
      const std::string param = text_of(reply.json().at("error").at("param"));
      EXPECT_EQ(param.substr(0, param.find('[')), name) << reply.body;
    }
  }
  const std::string source =
      read_file(fs::path(NIBBLE_SOURCE_DIR) / "src" / "serve" / "api_request.cpp");
  const std::regex field(R"re((?:fields|inner)\.(?:read|find|integer)\("(\w+)")re");
  std::set<std::string> read;
  for (std::sregex_iterator it(source.begin(), source.end(), field), end; it != end; ++it) {
    read.insert((*it)[1]);
  }
  EXPECT_GT(read.size(), 35u);
  for (const std::string& name : read) {
    const bool nested = name == "include_usage" || name == "continuous_usage_stats";
    EXPECT_TRUE(nested || documented.contains(name)) << name;
  }
}

TEST_F(OpenApi, RepliesFitTheirSchemas) {
  const std::string scored = R"("max_tokens":4,"n":2,"logprobs":true,"top_logprobs":2)";
  expect_valid(chat(scored).json(), "ChatCompletion");
  expect_valid(chat(R"("max_tokens":1)").json(), "ChatCompletion");
  const std::string call =
      R"("max_tokens":5,"tools":[{"type":"function","function":{"name":"f"}}],)"
      R"("tool_choice":{"type":"function","function":{"name":"f"}})";
  expect_valid(chat(call).json(), "ChatCompletion");
  for (const std::string& event : chat(call + R"(,"stream":true)").events()) {
    if (event != "[DONE]") expect_valid(parse_json(event, "event"), "ChatCompletionChunk");
  }
  for (const char* stream :
       {R"(,"stream":true,"stream_options":{"include_usage":true})",
        R"(,"stream":true,"stream_options":{"continuous_usage_stats":true})"}) {
    for (const std::string& event : chat(scored + stream).events()) {
      if (event != "[DONE]") expect_valid(parse_json(event, "event"), "ChatCompletionChunk");
    }
    for (const std::string& event :
         complete(std::string(R"("prompt":["a","b"],"max_tokens":3,"logprobs":2)") + stream)
             .events()) {
      if (event != "[DONE]") expect_valid(parse_json(event, "event"), "Completion");
    }
  }
  expect_valid(complete(R"("prompt":"a b c","max_tokens":3,"logprobs":2,"echo":true)").json(),
               "Completion");
  expect_valid(get(port(), "/v1/models").json(), "ModelList");
  expect_valid(get(port(), "/v1/models/nano").json(), "Model");
  expect_valid(get(port(), "/health").json(), "Status");
  expect_valid(get(port(), "/version").json(), "Version");
  expect_valid(post(port(), "/tokenize", R"({"prompt":"a","return_token_strs":true})").json(),
               "Tokens");
  expect_valid(post(port(), "/detokenize", R"({"tokens":[100]})").json(), "Text");
  expect_valid(chat(R"("n":0)").json(), "Error");
  expect_valid(chat(R"("model":"x")").json(), "Error");
  expect_valid(get(port(), "/nowhere").json(), "Error");
}

TEST_F(OpenApi, TheValidatorFindsProblems) {  // or the tests above would say nothing
  Validator validator(document_);
  EXPECT_FALSE(validator.problems(json::object{{"id", "x"}}, "Model").empty());
  json::value model = get(port(), "/v1/models/nano").json();
  EXPECT_TRUE(validator.problems(model, "Model").empty());
  model.as_object()["extra"] = 1;
  EXPECT_FALSE(validator.problems(model, "Model").empty());
  model.as_object().erase("extra");
  model.as_object()["created"] = "today";
  EXPECT_FALSE(validator.problems(model, "Model").empty());
}

}  // namespace
}  // namespace nibble
