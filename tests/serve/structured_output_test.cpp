// Structured output over real sockets and a real engine: whatever the model would like to say, what
// comes out fits. The nano model at a high temperature knows nothing of JSON, so that the grammar
// does all the work. SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>
#include <thread>

#include "serve/server_fixture.h"

namespace nibble {
namespace {

using serve_test::Reply;
using serve_test::streamed_text;
using serve_test::text_of;
using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr const char* kSchema =
    R"({"type":"object","properties":{"name":{"type":"string","maxLength":20},)"
    R"("age":{"type":"integer","minimum":0,"maximum":150},)"
    R"("tags":{"type":"array","items":{"enum":["red","green","blue"]},"maxItems":3},)"
    R"("mood":{"anyOf":[{"type":"null"},{"const":"good"}]}},)"
    R"("required":["name","age","tags"],"additionalProperties":false})";

std::string schema_format(const std::string& schema = kSchema) {
  return R"("response_format":{"type":"json_schema","json_schema":{"name":"person","strict":true,"schema":)" +
         schema + "}}";
}

void expect_person(const std::string& text) {
  const json::value value = parse_json(text, "answer");
  ASSERT_TRUE(value.is_object()) << text;
  const json::object& person = value.get_object();
  EXPECT_LE(person.size(), 4u);
  EXPECT_TRUE(person.at("name").is_string()) << text;
  EXPECT_GE(person.at("age").as_int64(), 0);
  EXPECT_LE(person.at("age").as_int64(), 150);
  EXPECT_LE(person.at("tags").as_array().size(), 3u);
  for (const auto& tag : person.at("tags").as_array()) {
    EXPECT_THAT(text_of(tag), AnyOf("red", "green", "blue"));
  }
  if (const auto* mood = person.if_contains("mood")) {
    EXPECT_TRUE(mood->is_null() || *mood == json::value("good")) << text;
  }
}

class StructuredOutput : public serve_test::ServerTest {
 protected:
  static const json::value choice_of(const json::value& value, size_t i = 0) {
    return value.at("choices").at(i);
  }
  static std::string content_of(const json::value& choice) {
    return text_of(choice.at("message").at("content"));
  }
  static std::string error_of(const Reply& reply) {
    return text_of(reply.json().at("error").at("message"));
  }
  static std::string code_of(const Reply& reply) {
    return text_of(reply.json().at("error").at("code"));
  }
};

TEST_F(StructuredOutput, ASchemaHoldsWhateverTheSeed) {
  start();
  const std::string format = schema_format();
  for (int seed = 0; seed < 6; ++seed) {
    const std::string fields =
        fmt::format(R"("temperature":1.5,"seed":{},"n":3,"max_tokens":390,)", seed) + format;
    const Reply reply = chat(fields);
    ASSERT_EQ(reply.status, 200) << reply.body;
    const json::value value = reply.json();
    std::vector<std::string> texts;
    for (size_t i = 0; i < 3; ++i) {
      const json::value choice = choice_of(value, i);
      EXPECT_EQ(text_of(choice.at("finish_reason")), "stop") << reply.body;
      texts.push_back(content_of(choice));
      ASSERT_NO_FATAL_FAILURE(expect_person(texts.back()));
    }
    if (seed > 0) continue;
    const auto events = chat(fields + R"(,"stream":true)").events();
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(streamed_text(events, i), texts[static_cast<size_t>(i)]);
    }
  }
  EXPECT_TRUE(eventually([&] { return is_empty(); }));
}

TEST_F(StructuredOutput, EverySpellingOfARequest) {
  start();
  const auto ask = [&](const std::string& fields) {
    const Reply reply = chat(R"("temperature":1.5,"seed":3,"max_tokens":390,)" + fields);
    EXPECT_EQ(reply.status, 200) << reply.body;
    const json::value choice = choice_of(reply.json());
    EXPECT_EQ(text_of(choice.at("finish_reason")), "stop") << reply.body;
    return content_of(choice);
  };
  const std::string answer = ask(schema_format());
  EXPECT_EQ(ask(R"("guided_json":)" + std::string(kSchema)), answer);
  EXPECT_EQ(ask(R"("structured_outputs":{"json":)" + std::string(kSchema) + "}"), answer);
  EXPECT_THAT(ask(R"("guided_choice":["yes","no","maybe not"])"), AnyOf("yes", "no", "maybe not"));
  EXPECT_THAT(ask(R"("structured_outputs":{"choice":["a"]})"), "a");
  const std::regex date("[12]\\d{3}-(0[1-9]|1[0-2])");
  EXPECT_TRUE(std::regex_match(ask(R"x("guided_regex":"[12]\\d{3}-(0[1-9]|1[0-2])")x"), date));
  EXPECT_TRUE(std::regex_match(
      ask(R"x("structured_outputs":{"regex":"[12]\\d{3}-(0[1-9]|1[0-2])"})x"), date));
  const Reply completed =
      complete(R"("prompt":"The sea is","max_tokens":50,"guided_choice":["wet"])");
  EXPECT_EQ(text_of(choice_of(completed.json()).at("text")), "wet");
}

TEST_F(StructuredOutput, AnyJsonObjectIsOneOrWasCut) {
  start();
  int num_whole = 0;
  for (int seed = 0; seed < 8; ++seed) {
    const Reply reply = chat(fmt::format(
        R"("temperature":1.5,"seed":{},"max_tokens":300,"response_format":{{"type":"json_object"}})",
        seed));
    ASSERT_EQ(reply.status, 200) << reply.body;
    const json::value choice = choice_of(reply.json());
    const std::string text = content_of(choice);
    EXPECT_TRUE(text.starts_with('{')) << text;
    if (text_of(choice.at("finish_reason")) == "length") continue;
    ++num_whole;
    EXPECT_TRUE(parse_json(text, "answer").is_object()) << text;
  }
  EXPECT_GT(num_whole, 0);
}

TEST_F(StructuredOutput, WorksWithTheOtherFields) {
  start();
  const std::string choice = R"("guided_choice":["red green blue"],"max_tokens":100)";
  const auto ask = [&](const std::string& more) {
    const Reply reply = chat(choice + "," + more);
    EXPECT_EQ(reply.status, 200) << reply.body;
    return choice_of(reply.json());
  };
  // The end is an end whatever these say.
  for (const char* more : {R"("ignore_eos":true)", R"("min_tokens":60)"}) {
    EXPECT_EQ(content_of(ask(more)), "red green blue") << more;
    EXPECT_EQ(text_of(ask(more).at("finish_reason")), "stop") << more;
  }
  const json::value cut = ask(R"("stop":[" blue"])");
  EXPECT_EQ(content_of(cut), "red green");
  EXPECT_EQ(text_of(cut.at("stop_reason")), " blue");
  const json::value scored = ask(R"("logprobs":true,"top_logprobs":2)");
  // The model's own: hardly its best idea.
  EXPECT_LT(scored.at("logprobs").at("content").at(0).at("logprob").as_double(), -1.0);
  const std::string tool = R"("tools":[{"type":"function","function":{"name":"f"}}])";
  EXPECT_EQ(content_of(ask(tool)), "red green blue");
  EXPECT_EQ(
      content_of(ask(R"("repetition_penalty":1.5,"frequency_penalty":2,"top_k":1,"min_p":0.5)")),
      "red green blue");
  // One token at a time, cut by max_tokens.
  const Reply reply = chat(R"("guided_choice":["red green blue"],"max_tokens":1)");
  EXPECT_EQ(text_of(choice_of(reply.json()).at("finish_reason")), "length");
}

TEST_F(StructuredOutput, RequestsShareTheServer) {
  start();
  std::vector<std::thread> clients;
  for (int i = 0; i < 6; ++i) {
    clients.emplace_back([this, i] {
      const std::string seed = fmt::format(R"("temperature":1.3,"seed":{},"max_tokens":390,)", i);
      if (i % 3 == 2) {  // beside them plain ones, which answer as they would alone
        const std::string fields = R"("temperature":0,"max_tokens":30)";
        EXPECT_EQ(content_of(choice_of(chat(fields).json())),
                  content_of(choice_of(chat(fields).json())));
        return;
      }
      const json::value choice = choice_of(chat(seed + schema_format()).json());
      expect_person(content_of(choice));
      // Alone and in company: the same answer.
      EXPECT_EQ(content_of(choice_of(chat(seed + schema_format()).json())), content_of(choice));
    });
  }
  for (std::thread& client : clients) client.join();
}

TEST_F(StructuredOutput, WhatCannotBeHonouredIsA400ThatNamesIt) {
  start();
  Reply reply = chat(schema_format(R"({"type":"object","properties":{"a":{"not":{}}}})"));
  EXPECT_EQ(reply.status, 400);
  EXPECT_EQ(code_of(reply), "unsupported_value");
  EXPECT_EQ(text_of(reply.json().at("error").at("param")), "response_format");
  EXPECT_THAT(error_of(reply), HasSubstr("/properties/a: the keyword \"not\""));
  reply = chat(R"x("guided_regex":"a(?=b)")x");
  EXPECT_EQ(reply.status, 400);
  EXPECT_THAT(error_of(reply), HasSubstr("guided_regex has a look-ahead"));
  reply = chat(
      R"("guided_json":{"type":"array","minItems":90000,"items":{"type":"array","minItems":90000}})");
  EXPECT_EQ(reply.status, 400);
  EXPECT_EQ(code_of(reply), "limit_exceeded");
  reply = chat(R"("guided_json":{"enum":[]})");
  EXPECT_EQ(reply.status, 400);
  // Every id that fits is banned: the request ends, the server does not.
  std::string bans;
  for (int id = 0; id < 1000; ++id) bans += fmt::format(R"("{}":-100,)", id);
  const json::value tokens =
      serve_test::post(port(), "/tokenize", R"({"prompt":"1","add_special_tokens":false})").json();
  bans += fmt::format(R"("{}":-100)", tokens.at("tokens").at(0).as_int64());
  reply = chat(R"("guided_choice":["1"],"logit_bias":{)" + bans + "}");
  EXPECT_EQ(reply.status, 400) << reply.body;
  EXPECT_THAT(error_of(reply), HasSubstr("no token"));
  EXPECT_EQ(chat(R"("max_tokens":3)").status, 200);
}

}  // namespace
}  // namespace nibble
