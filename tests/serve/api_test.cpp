// The API as clients see it, over real sockets and a real engine: what is answered and in which
// form. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <set>
#include <thread>

#include "serve/server_fixture.h"

namespace nibble {
namespace {

using serve_test::Client;
using serve_test::get;
using serve_test::post;
using serve_test::Reply;
using serve_test::streamed_text;
using serve_test::text_of;
using namespace std::chrono_literals;

class Api : public serve_test::ServerTest {
 protected:
  static const json::value& first_choice(const json::value& value) {
    return value.at("choices").at(0);
  }
  static std::string content_of(const Reply& reply) {
    return text_of(reply.json().at("choices").at(0).at("message").at("content"));
  }
  static const json::value error_of(const Reply& reply) { return reply.json().at("error"); }
};

TEST_F(Api, AnswersAChat) {
  start();
  const Reply reply = chat(R"("temperature":0,"max_tokens":12)");
  ASSERT_EQ(reply.status, 200) << reply.body;
  EXPECT_EQ(reply.headers.at("content-type"), "application/json");
  EXPECT_FALSE(reply.headers.at("x-request-id").empty());
  const json::value value = reply.json();
  EXPECT_TRUE(text_of(value.at("id")).starts_with("chatcmpl-"));
  EXPECT_EQ(text_of(value.at("object")), "chat.completion");
  EXPECT_EQ(text_of(value.at("model")), "nano");
  const auto& choice = first_choice(value);
  EXPECT_EQ(text_of(choice.at("finish_reason")), "length");
  EXPECT_FALSE(content_of(reply).empty());
  EXPECT_EQ(value.at("usage").at("completion_tokens"), 12);
  EXPECT_EQ(value.at("usage").at("prompt_tokens").as_int64() + 12,
            value.at("usage").at("total_tokens").as_int64());
  // The same again comes from the prefix cache, all but the last token, and says the same.
  const Reply again = chat(R"("temperature":0,"max_tokens":12)");
  EXPECT_EQ(content_of(again), content_of(reply));
  EXPECT_EQ(again.json().at("usage").at("prompt_tokens_details").at("cached_tokens").as_int64(),
            value.at("usage").at("prompt_tokens").as_int64() - 1);
}

TEST_F(Api, StreamsWhatItWouldHaveSaidWhole) {
  start();
  const std::string fields = R"("temperature":0.9,"seed":5,"max_tokens":40)";
  const std::string whole = content_of(chat(fields));
  const Reply reply = chat(fields + R"(,"stream":true,"stream_options":{"include_usage":true})");
  EXPECT_EQ(reply.headers.at("content-type"), "text/event-stream; charset=utf-8");
  EXPECT_EQ(reply.headers.at("cache-control"), "no-cache");
  EXPECT_EQ(reply.headers.at("x-accel-buffering"), "no");
  const auto events = reply.events();
  ASSERT_GE(events.size(), 5u);
  EXPECT_EQ(events.back(), "[DONE]");
  std::set<std::string> ids;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    const json::value value = parse_json(events[i], "event");
    ids.insert(text_of(value.at("id")));
    EXPECT_EQ(text_of(value.at("object")), "chat.completion.chunk");
    const bool is_usage = i + 2 == events.size();
    EXPECT_EQ(value.at("usage").is_null(), !is_usage);
    EXPECT_EQ(value.at("choices").as_array().empty(), is_usage);
    if (is_usage) continue;
    const auto& choice = first_choice(value);
    const bool is_end = i + 3 == events.size();
    EXPECT_EQ(choice.at("finish_reason").is_null(), !is_end);
    if (i == 0) {
      EXPECT_EQ(choice.at("delta"), (json::value{{"role", "assistant"}, {"content", ""}}));
    }
    if (is_end) {
      EXPECT_TRUE(choice.at("delta").as_object().empty());
    }
    if (i > 0 && !is_end) {
      EXPECT_FALSE(text_of(choice.at("delta").at("content")).empty());
    }
  }
  EXPECT_EQ(ids.size(), 1u);
  EXPECT_EQ(streamed_text(events), whole);
}

TEST_F(Api, SeveralChoicesShareOnePrefill) {
  start();
  const std::string fields = R"("n":3,"seed":1,"temperature":1.2,"max_tokens":10)";
  const json::value value = chat(fields).json();
  ASSERT_EQ(value.at("choices").as_array().size(), 3u);
  std::set<std::string> texts;
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(value.at("choices").at(i).at("index"), i);
    texts.insert(text_of(value.at("choices").at(i).at("message").at("content")));
  }
  EXPECT_GE(texts.size(), 2u);
  EXPECT_EQ(value.at("usage").at("completion_tokens"), 30);
  EXPECT_EQ(stats().prompt_tokens, value.at("usage").at("prompt_tokens").to_number<uint64_t>());
  const auto events = chat(fields + R"(,"stream":true)").events();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(streamed_text(events, i),
              text_of(value.at("choices").at(i).at("message").at("content")));
  }
}

TEST_F(Api, StopStringsEndTheTextAndTheWork) {
  start();
  const std::string whole = content_of(chat(R"("temperature":0,"max_tokens":40)"));
  ASSERT_GT(whole.size(), 20u);
  const std::string stop = whole.substr(11, 4);
  const size_t at = whole.find(stop);
  std::string quoted;
  append_json_string(quoted, stop);
  const std::string fields =
      R"("temperature":0,"max_tokens":300,"ignore_eos":true,"stop":[)" + quoted + "]";
  const uint64_t tokens_before = stats().generated_tokens;
  const Reply reply = chat(fields);
  EXPECT_EQ(content_of(reply), whole.substr(0, at));
  ASSERT_TRUE(eventually([&] { return is_empty(); }));
  EXPECT_LT(stats().generated_tokens - tokens_before, 150u);  // of 300: the engine was told
  const json::value value = reply.json();
  EXPECT_EQ(text_of(first_choice(value).at("finish_reason")), "stop");
  EXPECT_EQ(text_of(first_choice(value).at("stop_reason")), stop);
  EXPECT_LT(value.at("usage").at("completion_tokens").as_int64(), 40);
  EXPECT_EQ(streamed_text(chat(fields + R"(,"stream":true)").events()), whole.substr(0, at));
  EXPECT_EQ(content_of(chat(fields + R"(,"include_stop_str_in_output":true)")),
            whole.substr(0, at) + stop);
}

TEST_F(Api, StopTokensAndMinTokens) {
  start();
  const json::value scored =
      chat(R"("temperature":0,"max_tokens":8,"logprobs":true,"top_logprobs":1)").json();
  const std::string third =
      text_of(first_choice(scored).at("logprobs").at("content").at(2).at("token"));
  const json::value ids =
      post(port(), "/tokenize", R"({"prompt":"x)" + third + R"(","add_special_tokens":false})")
          .json();
  const int64_t id = ids.at("tokens").at(ids.at("tokens").as_array().size() - 1).as_int64();
  const json::value value =
      chat(fmt::format(R"("temperature":0,"max_tokens":8,"stop_token_ids":[{}])", id)).json();
  EXPECT_EQ(text_of(first_choice(value).at("finish_reason")), "stop");
  EXPECT_EQ(first_choice(value).at("stop_reason"), id);
  EXPECT_EQ(value.at("usage").at("completion_tokens"), 3);
  const json::value longer =
      chat(
          fmt::format(R"("temperature":0,"max_tokens":8,"min_tokens":8,"stop_token_ids":[{}])", id))
          .json();
  EXPECT_EQ(longer.at("usage").at("completion_tokens"), 8);
}

TEST_F(Api, LogprobsOfAChat) {
  start();
  const std::string fields = R"("temperature":0,"max_tokens":10,"logprobs":true,"top_logprobs":3)";
  const json::value value = chat(fields).json();
  const auto& content = first_choice(value).at("logprobs").at("content").as_array();
  ASSERT_EQ(content.size(), 10u);
  std::string joined;
  for (const auto& entry : content) {
    joined += text_of(entry.at("token"));
    EXPECT_EQ(entry.at("top_logprobs").as_array().size(), 3u);
    // Greedy: the drawn token is the best one.
    EXPECT_EQ(entry.at("top_logprobs").at(0).at("logprob"), entry.at("logprob"));
    EXPECT_LE(entry.at("logprob").to_number<double>(), 0.0);
  }
  EXPECT_EQ(joined, text_of(first_choice(value).at("message").at("content")));
  size_t streamed = 0;
  for (const std::string& event : chat(fields + R"(,"stream":true)").events()) {
    if (event == "[DONE]") continue;
    const json::value chunk = parse_json(event, "event");
    const auto& logprobs = first_choice(chunk).at("logprobs");
    if (logprobs.is_object()) streamed += logprobs.at("content").as_array().size();
  }
  EXPECT_EQ(streamed, 10u);
}

TEST_F(Api, ContinuesTheFinalMessage) {
  start();
  const std::string messages =
      R"({"messages":[{"role":"user","content":"What is water?"},{"role":"assistant","content":"Water is"}])";
  const auto ids = [&](const std::string& fields) {
    return post(port(), "/tokenize", messages + fields + "}").json().at("tokens").as_array();
  };
  const auto continued = ids(R"(,"continue_final_message":true)");
  const auto closed = ids(R"(,"add_generation_prompt":false)");
  EXPECT_EQ(closed.size(), continued.size() + 1);  // the end-of-sequence token
  const Reply reply =
      post(port(), "/v1/chat/completions",
           messages + R"(,"continue_final_message":true,"temperature":0,"max_tokens":5})");
  const std::string text = content_of(reply);
  EXPECT_FALSE(text.starts_with("Water is"));  // only what is new
  const Reply raw =
      complete(R"("prompt":)" + dump_json(continued) + R"(,"temperature":0,"max_tokens":5)");
  EXPECT_EQ(text_of(first_choice(raw.json()).at("text")), text);
}

TEST_F(Api, ToolCallsWholeAndStreamed) {
  start();
  // nano was not taught to call anything: the call is begun for it, its arguments are what it says.
  const std::string fields =
      R"("max_tokens":12,"temperature":0,"tools":[{"type":"function","function":{"name":"look_up"}}],)"
      R"("tool_choice":{"type":"function","function":{"name":"look_up"}})";
  const json::value whole = chat(fields).json();
  const json::value& message = whole.at("choices").at(0).at("message");
  EXPECT_TRUE(message.at("content").is_null());
  const json::value& call = message.at("tool_calls").at(0);
  EXPECT_EQ(text_of(call.at("id")).size(), 9u);
  EXPECT_EQ(call.at("type"), "function");
  EXPECT_EQ(call.at("function").at("name"), "look_up");
  const std::string arguments = text_of(call.at("function").at("arguments"));
  EXPECT_FALSE(arguments.empty());

  std::string streamed, name;
  int heads = 0;
  for (const std::string& event : chat(fields + R"(,"stream":true)").events()) {
    if (event == "[DONE]") continue;
    const json::value value = parse_json(event, "event");
    const auto& delta = value.at("choices").at(0).at("delta").as_object();
    const auto* calls = delta.if_contains("tool_calls");
    if (calls == nullptr) continue;
    const auto& piece = calls->at(0).as_object();
    EXPECT_EQ(piece.at("index"), 0);
    if (piece.contains("id")) {
      ++heads;
      name = text_of(piece.at("function").at("name"));
    }
    streamed += text_of(piece.at("function").at("arguments"));
  }
  EXPECT_EQ(heads, 1);
  EXPECT_EQ(name, "look_up");
  EXPECT_EQ(streamed, arguments);

  // Told about, not called: an ordinary answer, with the tools in its prompt.
  const std::string tools =
      R"("max_tokens":4,"tools":[{"type":"function","function":{"name":"f"}}])";
  const json::value plain = chat(R"("max_tokens":4)").json(), told = chat(tools).json();
  EXPECT_GT(told.at("usage").at("prompt_tokens").as_int64(),
            plain.at("usage").at("prompt_tokens").as_int64());
  EXPECT_EQ(chat(tools + R"(,"tool_choice":"none")").json().at("usage").at("prompt_tokens"),
            plain.at("usage").at("prompt_tokens"));
}

TEST_F(Api, ToolResultsWithForeignIds) {
  start();
  const auto prompt_tokens = [&](const std::string& id) {
    const Reply reply = post(port(), "/v1/chat/completions",
                             R"({"max_tokens":1,"messages":[{"role":"user","content":"x"},)"
                             R"({"role":"assistant","content":null,"tool_calls":[{"id":")" +
                                 id +
                                 R"(","type":"function","function":{"name":"f","arguments":)"
                                 R"("{\"a\": 1}"}}]},{"role":"tool","tool_call_id":")" +
                                 id + R"(","content":"42"}]})");
    EXPECT_EQ(reply.status, 200) << reply.body;
    return reply.json().at("usage").at("prompt_tokens").as_int64();
  };
  EXPECT_EQ(prompt_tokens("call_Kz3sW0iQ1v8bT7"), prompt_tokens("abcdefghi"));
}

TEST_F(Api, TextCompletions) {
  start();
  const json::value value =
      complete(R"("prompt":["The sea","The sky"],"n":2,"temperature":0,"max_tokens":4)").json();
  EXPECT_TRUE(text_of(value.at("id")).starts_with("cmpl-"));
  EXPECT_EQ(text_of(value.at("object")), "text_completion");
  ASSERT_EQ(value.at("choices").as_array().size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(value.at("choices").at(i).at("index"), i);
  EXPECT_EQ(value.at("choices").at(0).at("text"), value.at("choices").at(1).at("text"));
  EXPECT_EQ(value.at("usage").at("completion_tokens"), 16);
  const auto events =
      complete(R"("prompt":["The sea","The sky"],"temperature":0,"max_tokens":4,"stream":true)")
          .events();
  EXPECT_EQ(events.back(), "[DONE]");
  EXPECT_EQ(streamed_text(events, 0), text_of(value.at("choices").at(0).at("text")));
  EXPECT_EQ(streamed_text(events, 1), text_of(value.at("choices").at(2).at("text")));
}

TEST_F(Api, EchoScoresThePrompt) {
  start();
  const std::string prompt = R"("prompt":"The sea is wide","temperature":0)";
  const json::value value = complete(prompt + R"(,"echo":true,"logprobs":2,"max_tokens":3)").json();
  const auto& choice = first_choice(value);
  const std::string text = text_of(choice.at("text"));
  EXPECT_TRUE(text.starts_with("The sea is wide"));
  const auto& logprobs = choice.at("logprobs");
  const auto& tokens = logprobs.at("tokens").as_array();
  EXPECT_EQ(tokens.size(), value.at("usage").at("total_tokens").to_number<size_t>());
  EXPECT_TRUE(logprobs.at("token_logprobs").at(0).is_null());
  std::string joined;
  for (size_t i = 1; i < tokens.size(); ++i) {  // 0 is BOS
    EXPECT_EQ(logprobs.at("text_offset").at(i).to_number<size_t>(), joined.size());
    joined += text_of(tokens[i]);
  }
  EXPECT_EQ(joined, text);
  // Teacher forcing: the continuation scored as a prompt has the log-probs it was drawn with.
  std::string quoted;
  append_json_string(quoted, text);
  const json::value scored =
      complete(R"("prompt":)" + quoted + R"(,"echo":true,"logprobs":2,"max_tokens":0)").json();
  const auto& again = first_choice(scored).at("logprobs");
  ASSERT_EQ(again.at("tokens"), logprobs.at("tokens"));
  for (size_t i = 1; i < tokens.size(); ++i) {
    EXPECT_NEAR(again.at("token_logprobs").at(i).to_number<double>(),
                logprobs.at("token_logprobs").at(i).to_number<double>(), 1e-4)
        << i;
  }
  EXPECT_EQ(scored.at("usage").at("completion_tokens"), 0);
}

TEST_F(Api, ModelsVersionHealth) {
  start();
  const json::value list = get(port(), "/v1/models").json();
  EXPECT_EQ(text_of(list.at("object")), "list");
  ASSERT_EQ(list.at("data").as_array().size(), 2u);
  EXPECT_EQ(text_of(list.at("data").at(1).at("id")), "nano-alias");
  EXPECT_EQ(list.at("data").at(0).at("max_model_len"), 1400);
  EXPECT_EQ(text_of(get(port(), "/v1/models/nano").json().at("id")), "nano");
  EXPECT_EQ(get(port(), "/v1/models/other").status, 404);
  EXPECT_EQ(text_of(get(port(), "/version").json().at("version")), NIBBLE_VERSION);
  EXPECT_EQ(get(port(), "/health").status, 200);
  EXPECT_EQ(get(port(), "/ready").status, 200);
  EXPECT_EQ(text_of(chat(R"("model":"nano-alias","max_tokens":1)").json().at("model")),
            "nano-alias");
  const Reply unknown = chat(R"("model":"gpt-4o","max_tokens":1)");
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(text_of(error_of(unknown).at("code")), "model_not_found");
  EXPECT_EQ(text_of(error_of(unknown).at("param")), "model");
}

TEST_F(Api, TokenizeAndBack) {
  start();
  const json::value value =
      post(port(), "/tokenize", R"({"prompt":"Hello world","return_token_strs":true})").json();
  EXPECT_EQ(value.at("count").to_number<size_t>(), value.at("tokens").as_array().size());
  EXPECT_EQ(value.at("token_strs").as_array().size(), value.at("tokens").as_array().size());
  EXPECT_EQ(value.at("max_model_len"), 1400);
  const json::value plain =
      post(port(), "/tokenize", R"({"prompt":"Hello world","add_special_tokens":false})").json();
  EXPECT_EQ(plain.at("count").as_int64() + 1, value.at("count").as_int64());
  const json::value back =
      post(port(), "/detokenize", R"({"tokens":)" + dump_json(plain.at("tokens")) + "}").json();
  EXPECT_EQ(text_of(back.at("prompt")), "Hello world");
  EXPECT_EQ(post(port(), "/detokenize", R"({"tokens":[4096]})").status, 400);
  EXPECT_EQ(post(port(), "/detokenize", R"({"tokens":[-1]})").status, 400);
  EXPECT_EQ(post(port(), "/tokenize", "{}").status, 400);
}

TEST_F(Api, ErrorsAreNestedAndNameTheField) {
  start();
  const Reply bad = chat(R"("temperature":"hot")");
  EXPECT_EQ(bad.status, 400);
  EXPECT_EQ(text_of(error_of(bad).at("type")), "invalid_request_error");
  EXPECT_EQ(text_of(error_of(bad).at("param")), "temperature");
  EXPECT_TRUE(error_of(bad).at("code").is_null());
  EXPECT_EQ(chat(R"("temperature":-1)").status, 400);  // the engine's own check
  EXPECT_EQ(post(port(), "/v1/chat/completions", "not json").status, 400);
  EXPECT_EQ(post(port(), "/v1/chat/completions", "\xff\xfe{}").status, 400);
  EXPECT_EQ(post(port(), "/v1/chat/completions", std::string(200'000, '[')).status, 400);
  EXPECT_EQ(chat(R"("stream":true,"temperature":-1)").status, 400);  // before the stream's head
  const Reply image = post(
      port(), "/v1/chat/completions",
      R"({"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]})");
  EXPECT_EQ(image.status, 400);
  EXPECT_EQ(text_of(error_of(image).at("param")), "messages");
  EXPECT_TRUE(eventually([&] { return is_empty(); }));  // refused requests give their places back
}

TEST_F(Api, ContextOverflowHasTheWordsClientsLookFor) {
  start();
  std::string words;
  for (int i = 0; i < 1500; ++i) words += " sea";
  const Reply reply = complete(R"("prompt":")" + words + R"(","max_tokens":5)");
  EXPECT_EQ(reply.status, 400);
  EXPECT_EQ(text_of(error_of(reply).at("code")), "context_length_exceeded");
  EXPECT_EQ(text_of(error_of(reply).at("type")), "invalid_request_error");
  EXPECT_NE(text_of(error_of(reply).at("message")).find("maximum context length is 1400 tokens"),
            std::string::npos);
  EXPECT_EQ(text_of(error_of(chat(R"("max_tokens":401)")).at("code")), "context_length_exceeded");
}

TEST_F(Api, PathsAndMethods) {
  start();
  EXPECT_EQ(get(port(), "/v2/anything").status, 404);
  EXPECT_EQ(text_of(error_of(get(port(), "/v1/embeddings")).at("code")), "not_found");
  const Reply wrong = get(port(), "/v1/chat/completions");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.headers.at("allow"), "POST, OPTIONS");
  EXPECT_EQ(post(port(), "/health", "").status, 405);
  EXPECT_EQ(get(port(), "/health?probe=1").status, 200);
  EXPECT_EQ(get(port(), "/version", "X-Request-Id: mine-1\r\n").headers.at("x-request-id"),
            "mine-1");
  EXPECT_NE(get(port(), "/version", "X-Request-Id: two words\r\n").headers.at("x-request-id"),
            "two words");
}

TEST_F(Api, KeysGuardEverythingButProbes) {
  serve_test::ServerSetup setup;
  setup.api.keys = ApiKeys({"secret-1", "secret-2"});
  start(std::move(setup));
  for (const char* path : {"/v1/models", "/v1/models/nano", "/v1/chat/completions", "/nothing"}) {
    const Reply reply = get(port(), path);
    if (std::string_view(path) == "/v1/chat/completions") {
      EXPECT_EQ(post(port(), path, chat_body("")).status, 401);
      continue;
    }
    EXPECT_EQ(reply.status, 401) << path;
    EXPECT_EQ(text_of(error_of(reply).at("code")), "invalid_api_key");
    EXPECT_EQ(reply.headers.at("www-authenticate"), "Bearer");
  }
  EXPECT_EQ(get(port(), "/v1/models", "Authorization: Bearer secret-2\r\n").status, 200);
  EXPECT_EQ(get(port(), "/v1/models", "authorization: bearer secret-1\r\n").status, 200);
  EXPECT_EQ(get(port(), "/v1/models", "Authorization: Bearer secret-3\r\n").status, 401);
  EXPECT_EQ(get(port(), "/v1/models", "Authorization: secret-1\r\n").status, 401);
  for (const char* path : {"/health", "/ready", "/version", "/metrics"}) {
    EXPECT_EQ(get(port(), path).status, 200) << path;
  }
  server_->reload(ApiKeys({"secret-2", "secret-3"}));
  EXPECT_EQ(get(port(), "/v1/models", "Authorization: Bearer secret-1\r\n").status, 401);
  EXPECT_EQ(get(port(), "/v1/models", "Authorization: Bearer secret-3\r\n").status, 200);
}

TEST_F(Api, CorsOnlyForThoseInvited) {
  serve_test::ServerSetup setup;
  setup.api.cors_origins = {"https://app.example"};
  start(std::move(setup));
  const Reply allowed = get(port(), "/v1/models", "Origin: https://app.example\r\n");
  EXPECT_EQ(allowed.headers.at("access-control-allow-origin"), "https://app.example");
  EXPECT_EQ(allowed.headers.at("vary"), "Origin");
  EXPECT_FALSE(get(port(), "/v1/models", "Origin: https://evil.example\r\n")
                   .headers.contains("access-control-allow-origin"));
  Client client(port());
  client.send(
      "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example\r\n"
      "Access-Control-Request-Headers: authorization,x-custom\r\n\r\n");
  const Reply preflight = client.read_reply();
  EXPECT_EQ(preflight.status, 204);
  EXPECT_EQ(preflight.headers.at("access-control-allow-headers"), "authorization,x-custom");
  EXPECT_EQ(preflight.headers.at("access-control-allow-methods"), "GET, POST, OPTIONS");
  client.send_post("/v1/chat/completions", chat_body(R"("max_tokens":1,"stream":true)"),
                   "Origin: https://app.example\r\n");
  EXPECT_EQ(client.read_reply().headers.at("access-control-allow-origin"), "https://app.example");
}

TEST_F(Api, PagesCannotPostBlindly) {
  start();
  const std::string body = chat_body(R"("max_tokens":1)");
  const auto send = [&](const std::string& mode) {
    return post(port(), "/v1/chat/completions", body, "Sec-Fetch-Mode: " + mode + "\r\n");
  };
  EXPECT_EQ(send("cors").status, 200);
  const Reply blind = send("no-cors");
  EXPECT_EQ(blind.status, 403);
  EXPECT_EQ(blind.json().at("error").at("code"), "forbidden");
}

TEST_F(Api, NoCorsHeadersUnlessAsked) {
  start();
  EXPECT_FALSE(get(port(), "/v1/models", "Origin: https://app.example\r\n")
                   .headers.contains("access-control-allow-origin"));
}

TEST_F(Api, SaysSoWhileLoading) {
  serve_test::ServerSetup setup;
  setup.with_model = false;
  start(std::move(setup));
  for (const char* path : {"/health", "/ready", "/v1/models"}) {
    EXPECT_EQ(get(port(), path).status, 503) << path;
  }
  const Reply reply = chat("");
  EXPECT_EQ(reply.status, 503);
  EXPECT_EQ(reply.headers.at("retry-after"), "5");
  EXPECT_EQ(get(port(), "/metrics").status, 200);
  EXPECT_EQ(get(port(), "/version").status, 200);
}

TEST_F(Api, StrictRolesAreTheTemplatesOwnErrors) {
  serve_test::ServerSetup setup;
  setup.roles = RolePolicy::kStrict;
  start(std::move(setup));
  const std::string body =
      R"({"messages":[{"role":"user","content":"a"},{"role":"user","content":"b"}],"max_tokens":1})";
  EXPECT_EQ(post(port(), "/v1/chat/completions", body).status, 400);
  server_->stop();
  start();
  EXPECT_EQ(post(port(), "/v1/chat/completions", body).status, 200);
}

TEST_F(Api, MetricsCountWhatHappened) {
  start();
  chat(R"("max_tokens":5,"ignore_eos":true)");
  chat(R"("max_tokens":5,"ignore_eos":true,"stream":true)");
  chat(R"("temperature":"x")");
  EXPECT_EQ(metric("vllm:generation_tokens_total"), 10);
  EXPECT_EQ(metric("vllm:time_to_first_token_seconds_count"), 2);
  EXPECT_EQ(metric("vllm:inter_token_latency_seconds_count"), 8);
  EXPECT_EQ(metric("vllm:e2e_request_latency_seconds_count"), 2);
  EXPECT_EQ(metric("vllm:request_generation_tokens_sum"), 10);
  EXPECT_EQ(metric("vllm:request_max_num_generation_tokens_sum"), 10);
  const double prompts = metric("vllm:request_prompt_tokens_sum"),
               hits = metric("vllm:prefix_cache_hits_total");
  EXPECT_EQ(metric("vllm:request_prefill_kv_computed_tokens_sum"), prompts - hits);
  EXPECT_EQ(metric("vllm:iteration_tokens_total_count"), metric("nibble:steps_total"));
  EXPECT_EQ(metric("vllm:iteration_tokens_total_sum"), metric("nibble:step_tokens_total"));
  EXPECT_EQ(metric("vllm:request_success_total{model_name=\"nano\",engine=\"0\",finished_reason="
                   "\"length\"}"),
            2);
  EXPECT_EQ(metric("vllm:kv_cache_usage_perc"), 0);
  EXPECT_GT(metric("vllm:prefix_cache_hits_total"), 0);
  EXPECT_EQ(metric("nibble:http_replies_total{model_name=\"nano\",engine=\"0\",code=\"400\"}"), 1);
}

TEST_F(Api, TheLogTellsTokensAndNeverTexts) {
  start();
  chat(R"("max_tokens":3,"ignore_eos":true)");
  get(port(), "/v1/models?key=SECRET", "Authorization: Bearer SECRET\r\n");
  get(port(), "/health");
  ASSERT_TRUE(eventually([&] { return log_lines().size() == 2; }));
  std::this_thread::sleep_for(50ms);
  const auto lines = log_lines();
  ASSERT_EQ(lines.size(), 2u);  // a healthy probe is no news
  const json::value line = parse_json(lines[0], "line");
  EXPECT_EQ(text_of(line.at("path")), "/v1/chat/completions");
  EXPECT_EQ(line.at("status"), 200);
  EXPECT_EQ(line.at("completion_tokens"), 3);
  EXPECT_EQ(text_of(line.at("finish")), "length");
  EXPECT_TRUE(line.at("complete").as_bool());
  for (const std::string& text : lines) {
    EXPECT_EQ(text.find("water"), text.npos);
    EXPECT_EQ(text.find("SECRET"), text.npos);
  }
}

}  // namespace
}  // namespace nibble
