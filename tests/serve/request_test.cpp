// Request bodies, answer JSON, metrics text, keys and log lines: plain values in, plain values out.
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <regex>

#include "base/error.h"
#include "serve/access_log.h"
#include "serve/api_error.h"
#include "serve/api_keys.h"
#include "serve/api_request.h"
#include "serve/metrics.h"
#include "serve/reply_writer.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;

const std::string kHi = R"("messages":[{"role":"user","content":"hi"}])";

GenerationBody chat(const std::string& more, const SamplingParams& defaults = {},
                    const BodyLimits& limits = {}) {
  return parse_chat_body("{" + kHi + (more.empty() ? "" : "," + more) + "}", defaults, limits);
}
GenerationBody completion(const std::string& fields) {
  return parse_completion_body("{" + fields + "}", {}, {});
}

/// The error of a chat body with these fields: "param: message".
std::string chat_error(const std::string& more) {
  try {
    chat(more);
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status, 400);
    EXPECT_EQ(error.type, "invalid_request_error");
    return error.param + ": " + error.what();
  }
  return "accepted";
}
std::string raw_error(const std::string& body, bool is_chat = true) {
  try {
    is_chat ? parse_chat_body(body, {}, {}) : parse_completion_body(body, {}, {});
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status, 400);
    return error.param + ": " + error.what();
  }
  return "accepted";
}

TEST(ChatBody, ReadsEveryField) {
  const GenerationBody body = chat(
      R"("model":"m","temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.05,"repetition_penalty":1.1,
         "presence_penalty":0.25,"frequency_penalty":-0.5,"seed":7,"n":2,"max_tokens":9,
         "stop":["a","b"],"stop_token_ids":[5],"logit_bias":{"3":1.5,"4":-100},"ignore_eos":true,
         "min_tokens":2,"logprobs":true,"top_logprobs":4,"stream":true,"priority":-3,
         "stream_options":{"include_usage":true,"continuous_usage_stats":true},"cache_salt":"s",
         "include_stop_str_in_output":true,"skip_special_tokens":false)");
  EXPECT_EQ(body.model, "m");
  EXPECT_FLOAT_EQ(body.params.temperature, 0.5f);
  EXPECT_FLOAT_EQ(body.params.top_p, 0.9f);
  EXPECT_EQ(body.params.top_k, 40);
  EXPECT_FLOAT_EQ(body.params.min_p, 0.05f);
  EXPECT_FLOAT_EQ(body.params.repetition_penalty, 1.1f);
  EXPECT_FLOAT_EQ(body.params.presence_penalty, 0.25f);
  EXPECT_FLOAT_EQ(body.params.frequency_penalty, -0.5f);
  EXPECT_EQ(body.params.seed, 7u);
  EXPECT_EQ(body.params.n, 2);
  EXPECT_EQ(body.max_tokens, 9);
  EXPECT_EQ(body.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(body.params.stop_token_ids, std::vector<int32_t>{5});
  ASSERT_EQ(body.params.logit_bias.size(), 2u);
  EXPECT_EQ(body.params.logit_bias[0], (std::pair<int32_t, float>{3, 1.5f}));
  EXPECT_TRUE(std::isinf(body.params.logit_bias[1].second));
  EXPECT_TRUE(body.params.ignore_eos);
  EXPECT_EQ(body.params.min_tokens, 2);
  EXPECT_EQ(body.params.logprobs, 4);
  EXPECT_TRUE(body.stream && body.stream_options.include_usage &&
              body.stream_options.continuous_usage_stats);
  EXPECT_EQ(body.priority, -3);
  EXPECT_EQ(body.cache_salt, "s");
  EXPECT_TRUE(body.include_stop);
  EXPECT_FALSE(body.skip_special);
}

TEST(ChatBody, NullMeansAbsentAndUnknownFieldsAreIgnored) {
  SamplingParams defaults;
  defaults.temperature = 0.3f;
  const GenerationBody body = chat(
      R"("temperature":null,"max_tokens":null,"stop":null,"seed":null,"n":null,"stream":null,
         "stream_options":null,"tools":null,"response_format":null,"logit_bias":null,"user":"u",
         "dry_multiplier":0.8,"metadata":{"a":[1,2]},"service_tier":"auto","reasoning_effort":"low")",
      defaults);
  EXPECT_FLOAT_EQ(body.params.temperature, 0.3f);
  EXPECT_EQ(body.params.n, 1);
  EXPECT_FALSE(body.max_tokens);
  EXPECT_TRUE(body.stop.empty());
  EXPECT_FALSE(body.params.seed);
  EXPECT_FALSE(body.stream);
  EXPECT_EQ(body.params.logprobs, -1);
}

TEST(ChatBody, SpellingsOfOtherClients) {
  EXPECT_EQ(chat(R"("stop":"x")").stop, std::vector<std::string>{"x"});
  EXPECT_TRUE(chat(R"("stop":["",""])").stop.empty());
  EXPECT_EQ(chat(R"("top_k":-1)").params.top_k, 0);
  EXPECT_FALSE(chat(R"("seed":-1)").params.seed);
  EXPECT_EQ(chat(R"("seed":18446744073709551615)").params.seed, ~uint64_t{0});
  EXPECT_EQ(chat(R"("max_tokens":32.0)").max_tokens, 32);
  EXPECT_EQ(chat(R"("max_tokens":5,"max_completion_tokens":8)").max_tokens, 8);
  EXPECT_EQ(chat(R"("logprobs":true)").params.logprobs, 0);
  EXPECT_EQ(chat(R"("logprobs":false,"top_logprobs":0)").params.logprobs, -1);
  EXPECT_EQ(chat(R"("tools":[])").params.n, 1);
  EXPECT_EQ(chat(R"("tools":[{"type":"function"}],"tool_choice":"none")").params.n, 1);
  EXPECT_EQ(chat(R"("response_format":{"type":"text"})").params.n, 1);
}

TEST(ChatBody, ContinueFinalMessage) {
  const GenerationBody body = chat(R"("continue_final_message":true)");
  EXPECT_TRUE(body.chat.continue_final_message);
  EXPECT_FALSE(body.chat.add_generation_prompt);
  EXPECT_TRUE(chat("").chat.add_generation_prompt);
  EXPECT_FALSE(chat(R"("add_generation_prompt":false)").chat.add_generation_prompt);
  EXPECT_NE(chat_error(R"("continue_final_message":true,"add_generation_prompt":true)")
                .find("exclude each other"),
            std::string::npos);
}

TEST(ChatBody, WrongTypesNameFieldValueAndWish) {
  EXPECT_EQ(chat_error(R"("temperature":"hot")"),
            "temperature: temperature is \"hot\", but must be a number");
  EXPECT_EQ(chat_error(R"("stream":1)"), "stream: stream is 1, but must be true or false");
  EXPECT_EQ(chat_error(R"("n":0)"), "n: n is 0, but must be an integer from 1 to 128");
  EXPECT_EQ(chat_error(R"("n":1.5)"), "n: n is 1.5, but must be an integer from 1 to 128");
  EXPECT_EQ(chat_error(R"("max_tokens":0)"),
            "max_tokens: max_tokens is 0, but must be an integer from 1 to 2147483647");
  EXPECT_EQ(chat_error(R"("model":[])"), "model: model is [], but must be a string");
  EXPECT_EQ(chat_error(R"("stop":[1])"),
            "stop: stop is [1], but must be a string or an array of strings");
  EXPECT_EQ(chat_error(R"("stop_token_ids":[1,-2])").substr(0, 17), "stop_token_ids[1]");
  for (const char* fields :
       {R"("logit_bias":{"x":1})", R"("logit_bias":{"1":101})", R"("logit_bias":[])",
        R"("seed":0.5)", R"("temperature":1e300)", R"("stream_options":{"include_usage":true})",
        R"("top_logprobs":3)", R"("logprobs":true,"top_logprobs":21)",
        R"("chat_template_kwargs":1)"}) {
    EXPECT_NE(chat_error(fields), "accepted") << fields;
  }
}

TEST(ChatBody, WhatWouldChangeTheAnswerAndIsNotSupportedIsRefused) {
  for (const char* fields :
       {R"("response_format":{"type":"structural_tag"})", R"("response_format":"json")",
        R"("guided_grammar":"root ::= a")", R"("structured_outputs":{})", R"("functions":[])",
        R"("use_beam_search":true)", R"("prompt_logprobs":1)", R"("audio":{})"}) {
    EXPECT_NE(chat_error(fields), "accepted") << fields;
  }
}

TEST(ChatBody, OutputFormats) {
  using Kind = OutputFormat::Kind;
  EXPECT_FALSE(chat("").format);
  EXPECT_FALSE(chat(R"("response_format":{"type":"text"})").format);
  EXPECT_EQ(chat(R"("response_format":{"type":"json_object"})").format.kind, Kind::kJsonObject);
  const json::value schema = {{"type", "object"}};
  for (
      const char* fields :
      {R"("response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,"schema":{"type":"object"}}})",
       R"("response_format":{"type":"json_object","schema":{"type":"object"}})",
       R"("guided_json":{"type":"object"})", R"("guided_json":"{\"type\":\"object\"}")",
       R"("structured_outputs":{"json":{"type":"object"},"regex":null,"disable_fallback":true})",
       R"("response_format":{"type":"text"},"guided_json":{"type":"object"},"guided_decoding_backend":"xgrammar")"}) {
    const OutputFormat format = chat(fields).format;
    EXPECT_EQ(format.kind, Kind::kJsonSchema) << fields;
    EXPECT_EQ(format.schema, schema) << fields;
  }
  const std::vector<std::string> yes_no = {"yes", "no"};
  EXPECT_EQ(chat(R"("guided_choice":["yes","no"])").format.choices, yes_no);
  EXPECT_EQ(chat(R"("structured_outputs":{"choice":["yes","no"]})").format.choices, yes_no);
  EXPECT_EQ(chat(R"("guided_regex":"a+")").format.regex, "a+");
  EXPECT_EQ(chat(R"("structured_outputs":{"regex":"a+"})").format.regex, "a+");
  EXPECT_EQ(chat(R"("structured_outputs":{"json_object":true})").format.kind, Kind::kJsonObject);
  EXPECT_EQ(completion(R"("prompt":"x","guided_regex":"a+")").format.field, "guided_regex");

  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}}],)";
  const std::string object = R"("response_format":{"type":"json_object"})";
  EXPECT_TRUE(chat(tools + object).format);
  EXPECT_TRUE(chat(tools + object + R"(,"tool_choice":"none")").format);
  EXPECT_THAT(chat_error(tools + object + R"(,"tool_choice":"required")"),
              HasSubstr("tool_choice"));

  for (const auto& [fields, word] : std::vector<std::pair<std::string, std::string>>{
           {R"("response_format":{"type":"json_schema"})", "json_schema"},
           {R"("response_format":{"type":"json_schema","json_schema":{"name":"n"}})", "schema"},
           {R"("response_format":{})", "response_format"},
           {R"("guided_json":5)", "guided_json is 5"},
           {R"("guided_json":"{")", "guided_json"},
           {R"("guided_choice":[])", "non-empty"},
           {R"("guided_choice":["a",1])", "strings"},
           {R"("guided_regex":{})", "guided_regex"},
           {R"("structured_outputs":{"grammar":"x"})", "grammar"},
           {R"("structured_outputs":{"json":{},"regex":"a"})", "one of"},
           {R"("guided_regex":"a","guided_choice":["b"])", "both given"},
           {object + R"(,"guided_regex":"a")", "both given"}}) {
    EXPECT_THAT(chat_error(fields), HasSubstr(word)) << fields;
  }
}

TEST(ChatBody, Tools) {
  using Choice = GenerationBody::ToolChoice;
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}}])";
  const auto choice = [&](const std::string& more) { return chat(tools + more).tool_choice; };
  EXPECT_EQ(choice(""), Choice::kAuto);
  EXPECT_EQ(choice(R"(,"tool_choice":"auto")"), Choice::kAuto);
  EXPECT_EQ(choice(R"(,"tool_choice":"none")"), Choice::kNone);
  EXPECT_EQ(choice(R"(,"tool_choice":"required")"), Choice::kRequired);
  const GenerationBody named =
      chat(tools + R"(,"tool_choice":{"type":"function","function":{"name":"f"}})");
  EXPECT_EQ(named.tool_choice, Choice::kNamed);
  EXPECT_EQ(named.tool_name, "f");
  EXPECT_EQ(named.chat.tools.get_array().size(), 1u);
  EXPECT_TRUE(named.parallel_tool_calls);
  EXPECT_TRUE(chat(tools + R"(,"tool_choice":"none")").chat.tools.is_null());
  EXPECT_FALSE(chat(tools + R"(,"parallel_tool_calls":false)").parallel_tool_calls);
  EXPECT_EQ(chat(R"("tool_choice":"auto")").tool_choice, Choice::kNone);
  for (const char* fields :
       {R"("tools":{})", R"("tools":[{}])", R"("tools":[{"function":{"name":5}}])",
        R"("tool_choice":"required")",
        R"("tools":[{"function":{"name":"f"}}],"tool_choice":"maybe")",
        R"("tools":[{"function":{"name":"f"}}],"tool_choice":{"function":{"name":"g"}})"}) {
    EXPECT_NE(chat_error(fields), "accepted") << fields;
  }
}

TEST(ChatBody, MessagesMustBeMessages) {
  EXPECT_EQ(raw_error("{}").substr(0, 29), "messages: messages is missing");
  for (const char* messages :
       {"[]", "{}", "[1]", R"([{"content":"x"}])", R"([{"role":5,"content":"x"}])",
        R"([{"role":"user","content":{"text":"x"}}])", R"([{"role":"user","content":3}])"}) {
    EXPECT_NE(raw_error(fmt::format(R"({{"messages":{}}})", messages)), "accepted") << messages;
  }
  EXPECT_EQ(raw_error(R"({"messages":[{"role":"user"}]})"), "accepted");
}

TEST(ChatBody, ChoicesAreLimited) {
  EXPECT_EQ(chat(R"("n":4)", {}, {.max_choices = 4}).params.n, 4);
  EXPECT_THROW(chat(R"("n":5)", {}, {.max_choices = 4}), ApiError);
  EXPECT_THROW(parse_completion_body(R"({"prompt":["a","b","c"],"n":2})", {}, {.max_choices = 5}),
               ApiError);
}

TEST(Body, MalformedJson) {
  std::string deep(100'000, '[');
  for (const std::string& body :
       {std::string(), std::string("{"), std::string("nonsense"), std::string("[1]"),
        std::string("{} {}"), std::string("{\"messages\":\"\xff\xfe\"}"), deep,
        "{\"a\":" + deep + "}", std::string("{\"a\":\"\\ud800\"}"), std::string(1, '\0')}) {
    EXPECT_NE(raw_error(body), "accepted") << body.substr(0, 20);
    EXPECT_NE(raw_error(body, false), "accepted") << body.substr(0, 20);
    EXPECT_THROW(parse_tokenize_body(body), ApiError);
    EXPECT_THROW(parse_detokenize_body(body), ApiError);
  }
}

TEST(CompletionBody, PromptForms) {
  EXPECT_EQ(std::get<std::string>(completion(R"("prompt":"a")").prompts.at(0)), "a");
  EXPECT_EQ(completion(R"("prompt":["a","b"])").prompts.size(), 2u);
  EXPECT_EQ(std::get<std::vector<int32_t>>(completion(R"("prompt":[1,2])").prompts.at(0)),
            (std::vector<int32_t>{1, 2}));
  const auto lists = completion(R"("prompt":[[1],[2,3]])").prompts;
  ASSERT_EQ(lists.size(), 2u);
  EXPECT_EQ(std::get<std::vector<int32_t>>(lists[1]), (std::vector<int32_t>{2, 3}));
  for (const char* prompt : {"null", "[]", "5", "{}", R"([1,"a"])", "[true]", "[-1]", "[1.5]",
                             "[99999999999]", "[[1],[\"x\"]]"}) {
    EXPECT_NE(raw_error(fmt::format(R"({{"prompt":{}}})", prompt), false), "accepted") << prompt;
  }
}

TEST(CompletionBody, OwnRules) {
  EXPECT_EQ(completion(R"("prompt":"a")").max_tokens, 16);
  EXPECT_EQ(completion(R"("prompt":"a","max_tokens":0,"echo":true)").max_tokens, 0);
  EXPECT_NE(raw_error(R"({"prompt":"a","max_tokens":0})", false), "accepted");
  const GenerationBody scored = completion(R"("prompt":"a","logprobs":3,"echo":true)");
  EXPECT_EQ(scored.params.logprobs, 3);
  EXPECT_EQ(scored.params.prompt_logprobs, 3);
  EXPECT_EQ(completion(R"("prompt":"a","logprobs":3)").params.prompt_logprobs, -1);
  EXPECT_EQ(completion(R"("prompt":"a","best_of":2,"n":2)").params.n, 2);
  EXPECT_NE(raw_error(R"({"prompt":"a","best_of":3,"n":2})", false), "accepted");
  EXPECT_NE(raw_error(R"({"prompt":"a","suffix":"b"})", false), "accepted");
  EXPECT_EQ(raw_error(R"({"prompt":"a","suffix":""})", false), "accepted");
}

TEST(SamplingDefaults, ComeFromGenerationConfig) {
  const auto params = sampling_defaults(
      parse_json(R"({"temperature":0.15,"top_p":0.9,"top_k":-1,"eos_token_id":2})", "t")
          .get_object());
  EXPECT_FLOAT_EQ(params.temperature, 0.15f);
  EXPECT_FLOAT_EQ(params.top_p, 0.9f);
  EXPECT_EQ(params.top_k, 0);
  EXPECT_THROW(sampling_defaults(parse_json(R"({"top_p":"x"})", "t").get_object()), Error);
}

// ---- Answers ------------------------------------------------------------------------------

TEST(ReplyWriter, ChatStreamToTheLetter) {
  StreamOptions options{.include_usage = true};
  const ReplyWriter writer(true, "chatcmpl-1", "m\"x", 1700000000, options);
  std::string out;
  const ReplyUsage usage{.prompt_tokens = 7, .cached_tokens = 6, .completion_tokens = 2};
  writer.role_chunk(out, 0, usage);
  writer.delta_chunk(out, 0, {.content = "a\nb"}, "null", usage);
  writer.end_chunk(out, 0, {"stop", "\"END\""}, "null", usage);
  writer.usage_chunk(out, usage);
  ReplyWriter::done(out);
  const std::string head =
      R"(data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m\"x","choices":[)";
  EXPECT_EQ(
      out,
      head +
          R"({"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null})"
          "\n\n" +
          head +
          R"({"index":0,"delta":{"content":"a\nb"},"logprobs":null,"finish_reason":null}],"usage":null})"
          "\n\n" +
          head +
          R"({"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":"END"}],"usage":null})"
          "\n\n" +
          head +
          R"(],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,"prompt_tokens_details":{"cached_tokens":6}}})"
          "\n\n" +
          "data: [DONE]\n\n");
}

TEST(ReplyWriter, ContinuousUsageAndNoUsage) {
  std::string with, without;
  ReplyWriter(false, "cmpl-1", "m", 1, {.continuous_usage_stats = true})
      .delta_chunk(with, 3, {.content = "t"}, "null", {.prompt_tokens = 1, .completion_tokens = 1});
  ReplyWriter(false, "cmpl-1", "m", 1, {}).delta_chunk(without, 3, {.content = "t"}, "null", {});
  EXPECT_NE(with.find(R"("usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2,)"),
            std::string::npos);
  EXPECT_EQ(without.find("usage"), std::string::npos);
  EXPECT_NE(without.find(R"({"index":3,"text":"t","logprobs":null,"finish_reason":null})"),
            std::string::npos);
}

TEST(ReplyWriter, WholeRepliesParse) {
  const ReplyWriter chat(true, "chatcmpl-1", "m", 1, {});
  const OutputDelta output{.content = "x\"y"};
  const json::value value =
      parse_json(chat.whole({{.index = 0, .output = &output, .end = {"length"}}}, {}), "t");
  const auto& choice = value.at("choices").at(0);
  EXPECT_EQ(value.at("object").as_string(), "chat.completion");
  EXPECT_EQ(choice.at("message").at("role").as_string(), "assistant");
  EXPECT_EQ(choice.at("message").at("content").as_string(), "x\"y");
  EXPECT_TRUE(choice.at("message").at("refusal").is_null());
  EXPECT_TRUE(choice.at("logprobs").is_null());
  EXPECT_EQ(choice.at("finish_reason").as_string(), "length");
  EXPECT_TRUE(choice.at("stop_reason").is_null());
}

TEST(ReplyWriter, ToolCallsToTheLetter) {
  const ReplyWriter writer(true, "chatcmpl-1", "m", 1, {});
  std::string out;
  writer.delta_chunk(
      out, 0,
      {.tool_calls =
           {{.index = 0, .begins = true, .id = "abcdefghi", .name = "f", .arguments = ""}}},
      "null", {});
  EXPECT_NE(out.find(R"("delta":{"tool_calls":[{"index":0,"id":"abcdefghi","type":"function",)"
                     R"("function":{"name":"f","arguments":""}}]},)"),
            std::string::npos)
      << out;
  out.clear();
  writer.delta_chunk(out, 0, {.tool_calls = {{.index = 1, .arguments = "{\"a\""}}}, "null", {});
  EXPECT_NE(out.find(R"("delta":{"tool_calls":[{"index":1,"function":{"arguments":"{\"a\""}}]},)"),
            std::string::npos)
      << out;
  const OutputDelta output{
      .reasoning = "hm",
      .tool_calls = {
          {.index = 0, .begins = true, .id = "abcdefghi", .name = "f", .arguments = "{}"}}};
  EXPECT_NE(writer.whole({{.output = &output, .end = {"tool_calls"}}}, {})
                .find(R"("message":{"role":"assistant","content":null,"reasoning_content":"hm",)"
                      R"("tool_calls":[{"id":"abcdefghi","type":"function","function":{"name":"f",)"
                      R"("arguments":"{}"}}],"refusal":null},"logprobs":null,)"
                      R"("finish_reason":"tool_calls")"),
            std::string::npos);
}

TEST(LogprobList, ChatKeepsBytesOfHalfCharacters) {
  LogprobList list(true);
  const std::string half = "\xe2\x82";
  list.add({.bytes = half, .logprob = -0.5f, .top = {{half, -0.5f}, {"b", -INFINITY}}}, 0);
  const json::value value = parse_json(list.take(), "t");
  const auto& entry = value.at("content").at(0);
  EXPECT_EQ(entry.at("token").as_string(), "\xef\xbf\xbd");
  EXPECT_EQ(entry.at("bytes"), json::value({0xe2, 0x82}));
  EXPECT_EQ(entry.at("top_logprobs").at(1).at("logprob"), -9999);
  EXPECT_TRUE(list.empty());
}

TEST(LogprobList, CompletionsHaveParallelArrays) {
  LogprobList list(false);
  list.add({.bytes = "<s>"}, 0);
  list.add({.bytes = "a", .logprob = -1.0f, .top = {{"b", -0.5f}, {"a", -1.0f}}}, 0);
  const json::value value = parse_json(list.take(), "t");
  EXPECT_EQ(value.at("tokens"), json::value({"<s>", "a"}));
  EXPECT_TRUE(value.at("token_logprobs").at(0).is_null());
  EXPECT_TRUE(value.at("top_logprobs").at(0).is_null());
  EXPECT_EQ(value.at("top_logprobs").at(1).as_object().size(), 2u);
  EXPECT_EQ(value.at("text_offset"), json::value({0, 0}));
}

TEST(ApiError, IsNestedAndAlwaysUtf8) {
  ApiError error = ApiError::bad_request("temperature", "bad \xff value");
  EXPECT_EQ(error.body(),
            "{\"error\":{\"message\":\"bad \xef\xbf\xbd value\",\"type\":\"invalid_request_error\","
            "\"param\":\"temperature\",\"code\":null}}");
  const HttpResponse busy = ApiError::queue_full("busy").response();
  EXPECT_EQ(busy.status, 429);
  ASSERT_EQ(busy.headers.size(), 1u);
  EXPECT_EQ(busy.headers[0].name, "Retry-After");
  EXPECT_EQ(ApiError::from(Error(ErrorKind::kLimit, "maximum context length is 5 tokens")).code,
            "context_length_exceeded");
  EXPECT_EQ(ApiError::from(Error(ErrorKind::kInternal, "x")).status, 500);
}

// ---- Metrics, keys, log ---------------------------------------------------------------------

TEST(Metrics, HistogramsAreCumulative) {
  static constexpr double kBounds[] = {0.01, 0.1, 1};
  Histogram histogram(kBounds);
  for (const double value : {0.005, 0.01, 0.05, 2.0}) histogram.observe(value);
  std::string out;
  histogram.append(out, "h", "a=\"b\"");
  EXPECT_EQ(out,
            "h_bucket{a=\"b\",le=\"0.01\"} 2\nh_bucket{a=\"b\",le=\"0.1\"} 3\n"
            "h_bucket{a=\"b\",le=\"1\"} 3\nh_bucket{a=\"b\",le=\"+Inf\"} 4\n"
            "h_sum{a=\"b\"} 2.065\nh_count{a=\"b\"} 4\n");
}

TEST(Metrics, EscapesLabelsAndDeclaresEveryFamilyOnce) {
  Metrics metrics;
  const std::string text = metrics.render({.model_name = "a\"b\\c\nd"});
  EXPECT_NE(text.find(R"(model_name="a\"b\\c\nd")"), std::string::npos);
  std::map<std::string, int> types;
  std::string family;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find('\n', at);
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    if (line.starts_with("# TYPE ")) {
      family = line.substr(7, line.find(' ', 7) - 7);
      EXPECT_EQ(++types[family], 1) << family;
    } else if (!line.starts_with("#")) {
      EXPECT_TRUE(line.starts_with(family)) << line;
    }
  }
  for (const char* name :
       {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc", "vllm:gpu_prefix_cache_hits_total",
        "vllm:gpu_prefix_cache_hit_rate", "vllm:request_success_total",
        "vllm:iteration_tokens_total", "vllm:num_requests_waiting_by_reason",
        "vllm:request_max_num_generation_tokens", "vllm:request_prefill_kv_computed_tokens",
        "vllm:time_to_first_token_seconds", "vllm:time_per_output_token_seconds"}) {
    EXPECT_EQ(types.count(name), 1u) << name;
  }
  EXPECT_NE(text.find("inter_token_latency_seconds_bucket{model_name=\"a\\\"b\\\\c\\nd\","
                      "engine=\"0\",le=\"0.001\"}"),
            std::string::npos);
}

TEST(Metrics, TheDashboardAsksOnlyForWhatExists) {
  const std::string text = "\n" + Metrics().render({.model_name = "m"});
  const std::string dashboard =
      read_file(fs::path(NIBBLE_SOURCE_DIR) / "deploy" / "grafana-dashboard.json");
  const json::value board = parse_json(dashboard, "dashboard");
  int asked = 0;
  for (const auto& panel : board.at("panels").as_array()) {
    for (const auto& target : panel.at("targets").as_array()) {
      const std::string expr(target.at("expr").as_string());
      const std::regex name(R"((vllm|nibble):[a-z0-9_]+)");
      for (std::sregex_iterator it(expr.begin(), expr.end(), name), end; it != end; ++it, ++asked) {
        std::string family = it->str();
        if (family.ends_with("_bucket")) family.resize(family.size() - 7);
        EXPECT_NE(text.find("\n# TYPE " + family + " "), text.npos) << family;
      }
    }
  }
  EXPECT_GT(asked, 30);
}

class KeyFile {
 public:
  explicit KeyFile(std::string_view text) {
    char name[] = "/tmp/nibble-keys-XXXXXX";
    const int fd = ::mkstemp(name);
    path = name;
    std::ofstream(path) << text;
    ::close(fd);
  }
  ~KeyFile() { fs::remove(path); }
  fs::path path;
};

TEST(ApiKeys, ReadsAFileAndComparesWholeKeys) {
  const KeyFile file("# people\nalpha\n\n  \nbeta-2 \r\n");
  const ApiKeys keys = ApiKeys::load(file.path);
  EXPECT_TRUE(keys.accepts("alpha"));
  EXPECT_TRUE(keys.accepts("beta-2"));
  for (const char* wrong : {"", "alph", "alpha ", "ALPHA", "# people", "beta"}) {
    EXPECT_FALSE(keys.accepts(wrong)) << wrong;
  }
  EXPECT_THROW(ApiKeys::load(KeyFile("# nothing\n").path), Error);
  EXPECT_THROW(ApiKeys::load(KeyFile("two words\n").path), Error);
  EXPECT_THROW(ApiKeys::load("/nonexistent"), Error);
}

TEST(AccessLog, LinesAreJsonWithoutWhatWasSaid) {
  AccessRecord record{.request_id = "r",
                      .remote = "::1",
                      .method = "POST",
                      .path = "/v1/\xff",
                      .status = 200,
                      .complete = true,
                      .ms = 12.34};
  const json::value plain = parse_json(record.to_json(), "line");
  EXPECT_EQ(plain.at("ms").as_double(), 12.3);
  EXPECT_FALSE(plain.as_object().contains("prompt_tokens"));
  record.is_generation = true;
  record.finish = "stop";
  EXPECT_EQ(parse_json(record.to_json(), "line").at("finish").as_string(), "stop");
  const KeyFile file("");
  {
    const auto log = AccessLog::open(file.path);
    for (int i = 0; i < 100; ++i) log->write(std::to_string(i));
  }
  std::ifstream in(file.path);
  std::string line;
  int count = 0;
  while (std::getline(in, line)) EXPECT_EQ(line, std::to_string(count++));
  EXPECT_EQ(count, 100);
  {
    const auto log = AccessLog::open(file.path);
    log->write("before");
    fs::rename(file.path, file.path.string() + ".1");
    log->reopen();
    log->write("after");
  }
  const std::string rotated = read_file(file.path.string() + ".1"), fresh = read_file(file.path);
  fs::remove(file.path.string() + ".1");
  EXPECT_TRUE(fresh.ends_with("after\n")) << fresh;
  EXPECT_EQ((rotated + fresh).substr((rotated + fresh).find("99\n")), "99\nbefore\nafter\n");
  EXPECT_THROW(AccessLog::open("/nonexistent/dir/log"), Error);
}

}  // namespace
}  // namespace nibble
