// The server under load and abuse: clients that vanish or do not read, a full queue, a drain. After
// each of them the engine holds nothing. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "serve/server_fixture.h"

namespace nibble {
namespace {

using serve_test::Client;
using serve_test::get;
using serve_test::post;
using serve_test::Reply;
using serve_test::ServerSetup;
using serve_test::streamed_text;
using serve_test::text_of;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

class Load : public serve_test::ServerTest {
 protected:
  static std::string long_answer(bool stream) {
    return chat_body(std::string(R"("max_tokens":400,"ignore_eos":true,"stream":)") +
                     (stream ? "true" : "false"));
  }
};

TEST_F(Load, AClientThatLeavesEndsItsWork) {
  start();
  for (const bool stream : {true, false}) {
    const uint64_t before = stats().generated_tokens;
    Client client(port());
    client.send_post("/v1/chat/completions", long_answer(stream));
    if (stream) {
      ASSERT_TRUE(client.read_until("\"content\":"));
    }
    ASSERT_TRUE(eventually([&] { return stats().kv_blocks_used > 0; }));
    client.close();
    EXPECT_TRUE(eventually([&] { return is_empty(); })) << stream;
    EXPECT_LT(stats().generated_tokens - before, 300u) << stream;  // of 400
  }
  EXPECT_EQ(metric("nibble:client_disconnects_total"), 2);
  EXPECT_EQ(
      metric(
          "vllm:request_success_total{model_name=\"nano\",engine=\"0\",finished_reason=\"abort\"}"),
      2);
  ASSERT_TRUE(eventually([&] { return log_lines().size() >= 2; }));
  const json::value line = parse_json(log_lines()[0], "line");
  EXPECT_FALSE(line.at("complete").as_bool());
  EXPECT_EQ(text_of(line.at("finish")), "abort");
}

TEST_F(Load, EveryChoiceOfAVanishedRequestEnds) {
  start();
  Client client(port());
  client.send_post("/v1/completions",
                   R"({"prompt":["a","b","c"],"n":4,"max_tokens":400,"ignore_eos":true})");
  ASSERT_TRUE(eventually([&] { return stats().num_running >= 8; }));
  client.close();
  EXPECT_TRUE(eventually([&] { return is_empty(); }));
}

TEST_F(Load, AFullQueueIsAnsweredAtOnce) {
  ServerSetup setup;
  setup.max_queue = 4;
  start(std::move(setup));
  // 16 sequences run, 4 wait; the next are refused.
  std::vector<std::unique_ptr<Client>> busy;
  for (int i = 0; i < 20; ++i) {
    busy.push_back(std::make_unique<Client>(port()));
    busy.back()->send_post("/v1/chat/completions", long_answer(true));
    ASSERT_TRUE(eventually([&] {
      const EngineStats now = stats();
      return now.num_running + now.num_waiting >= i + 1;
    })) << i;
  }
  EXPECT_EQ(stats().num_queued, 4);
  for (int i = 0; i < 20; ++i) {
    const Clock::time_point start = Clock::now();
    const Reply reply = chat(R"("max_tokens":1)");
    EXPECT_EQ(reply.status, 429);
    EXPECT_EQ(reply.headers.at("retry-after"), "1");
    EXPECT_EQ(text_of(reply.json().at("error").at("type")), "rate_limit_exceeded");
    EXPECT_LT(ms_since(start), 1000);  // the machine may be busy; alone it is below 1 ms
  }
  EXPECT_EQ(
      metric(
          "nibble:requests_rejected_total{model_name=\"nano\",engine=\"0\",reason=\"queue_full\"}"),
      20);
  busy.clear();
  EXPECT_TRUE(eventually([&] { return is_empty(); }));
  EXPECT_EQ(chat(R"("max_tokens":1)").status, 200);
}

TEST_F(Load, ManyPromptsBeyondTheQueueLeaveNothingBehind) {
  ServerSetup setup;
  setup.max_queue = 2;
  start(std::move(setup));
  std::string prompts = R"("a")";
  for (int i = 0; i < 63; ++i) prompts += R"(,"a")";
  const Reply reply = complete(R"("max_tokens":400,"ignore_eos":true,"prompt":[)" + prompts + "]");
  EXPECT_EQ(reply.status, 429);
  EXPECT_TRUE(eventually([&] { return is_empty(); }));
}

TEST_F(Load, TwoHundredStreamsWithClientsThatVanish) {
  ServerSetup setup;
  setup.max_queue = 300;
  start(std::move(setup));
  constexpr int kStreams = 200;
  const std::string expected = streamed_text(
      chat(R"("temperature":0,"max_tokens":20,"ignore_eos":true,"stream":true)").events());
  ASSERT_FALSE(expected.empty());
  std::atomic<int> right{0}, vanished{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      // Each thread opens all its streams at once, then tends to them one by one.
      std::vector<std::unique_ptr<Client>> clients;
      for (int i = t; i < kStreams; i += 8) {
        clients.push_back(std::make_unique<Client>(port()));
        clients.back()->send_post(
            "/v1/chat/completions",
            chat_body(i % 4 == 0
                          ? R"("max_tokens":400,"ignore_eos":true,"stream":true)"
                          : R"("temperature":0,"max_tokens":20,"ignore_eos":true,"stream":true)"));
      }
      for (int i = t, k = 0; i < kStreams; i += 8, ++k) {
        Client& client = *clients[static_cast<size_t>(k)];
        if (i % 4 == 0) {
          client.read_some(0);
          client.close();
          ++vanished;
        } else if (streamed_text(client.read_reply().events()) == expected) {
          ++right;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(vanished, kStreams / 4);
  EXPECT_EQ(right, kStreams - kStreams / 4);
  EXPECT_TRUE(eventually([&] { return is_empty(); }));
  EXPECT_TRUE(eventually([&] { return metric("nibble:replies_in_flight") == 0; }));
}

TEST_F(Load, AStalledReaderIsCutWithoutHurtingOthers) {
  ServerSetup setup;
  setup.api.http.write_timeout = 1000ms;
  start(std::move(setup));
  // Log-probs make chunks of kilobytes: the small buffers fill within the 400 tokens.
  const std::string body = chat_body(
      R"("max_tokens":400,"ignore_eos":true,"stream":true,"logprobs":true,"top_logprobs":20,"n":8)");
  Client stalled(port(), false, 4096);
  stalled.send_post("/v1/chat/completions", body);
  ASSERT_TRUE(eventually([&] { return stats().num_running >= 1; }));
  const Reply reply = chat(R"("max_tokens":200,"ignore_eos":true,"stream":true)");
  EXPECT_EQ(reply.events().back(), "[DONE]");
  EXPECT_TRUE(eventually([&] { return metric("nibble:http_slow_readers_cut_total") == 1; }));
  EXPECT_TRUE(eventually([&] { return is_empty(); }));
}

TEST_F(Load, ALongPromptDoesNotStopAStream) {
  start();
  std::string words;
  for (int i = 0; i < 230; ++i) words += " sea";
  Client stream(port());
  stream.send_post("/v1/chat/completions", long_answer(true));
  ASSERT_TRUE(stream.read_until("\"content\":\""));
  // 230 tokens are four steps of 64 rows: the stream gets a token in each of them.
  const uint64_t steps_before = stats().steps, tokens_before = stats().generated_tokens;
  const Reply reply = complete(R"("max_tokens":1,"prompt":")" + words + "\"");
  EXPECT_EQ(reply.status, 200);
  const EngineStats after = stats();
  EXPECT_GE(after.steps - steps_before, 4u);
  EXPECT_GE(after.generated_tokens - tokens_before, after.steps - steps_before);
}

TEST_F(Load, DrainingFinishesWhatRunsAndRefusesTheRest) {
  start();
  std::vector<std::unique_ptr<Client>> streams;
  for (int i = 0; i < 10; ++i) {
    streams.push_back(std::make_unique<Client>(port()));
    streams.back()->send_post("/v1/chat/completions",
                              chat_body(R"("max_tokens":60,"ignore_eos":true,"stream":true)"));
    ASSERT_TRUE(streams.back()->read_until("\"role\":\"assistant\""));
  }
  Client other(port());  // connected before, asks during the drain
  std::atomic<bool> clean{false};
  std::thread drain([&] { clean = server_->drain(120'000ms); });
  EXPECT_TRUE(eventually([&] { return other.get("/ready").status == 503; }));
  EXPECT_EQ(other.get("/health").status, 200);
  const Reply refused = other.post("/v1/chat/completions", chat_body(""));
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.headers.at("retry-after"), "5");
  for (auto& stream : streams) EXPECT_TRUE(stream->read_until("data: [DONE]\n\n"));
  drain.join();
  EXPECT_TRUE(clean);
}

TEST_F(Load, TheDrainsDeadlineEndsStreamsWithAnError) {
  start();
  Client stream(port());
  stream.send_post("/v1/chat/completions", long_answer(true));
  ASSERT_TRUE(stream.read_until("\"content\":\""));
  EXPECT_FALSE(server_->drain(50ms));
  EXPECT_TRUE(stream.read_until("data: {\"error\":{"));
  EXPECT_TRUE(stream.read_until("data: [DONE]\n\n"));
}

TEST_F(Load, SilentStreamsGetPings) {
  ServerSetup setup;
  setup.api.ping_interval = 150ms;
  start(std::move(setup));
  std::vector<std::unique_ptr<Client>> busy;  // 16 run, so that the next one waits in silence
  for (int i = 0; i < 16; ++i) {
    busy.push_back(std::make_unique<Client>(port()));
    busy.back()->send_post("/v1/chat/completions", long_answer(true));
  }
  ASSERT_TRUE(eventually([&] { return stats().num_running == 16; }));
  Client waiting(port());
  waiting.send_post("/v1/chat/completions", chat_body(R"("max_tokens":2,"stream":true)"));
  EXPECT_TRUE(waiting.read_until(": ping\n\n"));
  busy.clear();
  EXPECT_TRUE(waiting.read_until("data: [DONE]\n\n"));
}

TEST_F(Load, StoppingUnderLoadIsQuick) {
  start();
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 30; ++i) {
    clients.push_back(std::make_unique<Client>(port()));
    clients.back()->send_post("/v1/chat/completions", long_answer(i % 2 == 0));
  }
  ASSERT_TRUE(eventually([&] { return stats().num_running == 16; }));
  const Clock::time_point begin = Clock::now();
  server_->stop();
  EXPECT_LT(ms_since(begin), 5000);
}

TEST_F(Load, JsonBombsCostAnErrorAndNoMore) {
  start();
  std::string many = R"({"messages":[)";
  for (int i = 0; i < 100'000; ++i) many += "[],";
  many += "1]}";
  std::string keys = "{";
  for (int i = 0; i < 50'000; ++i) keys += fmt::format("\"k{}\":{{}},", i);
  keys += R"("messages":5})";
  for (const std::string& bomb :
       {std::string(3'000'000, '['), std::string(3'000'000, '{'), many, keys,
        "{\"stop\":[" + std::string(1'000'000, ' ') + "}",
        R"({"messages":[{"role":"user","content":")" + std::string(2'000'000, 'r') + "\"}]}"}) {
    const Reply reply = post(port(), "/v1/chat/completions", bomb);
    EXPECT_EQ(reply.status, 400) << bomb.substr(0, 20) << reply.body.substr(0, 200);
    EXPECT_LT(reply.body.size(), 2000u);
  }
  const Reply huge = post(port(), "/v1/chat/completions", std::string((4 << 20) + 1, ' '));
  EXPECT_EQ(huge.status, 413);
  EXPECT_EQ(text_of(huge.json().at("error").at("code")), "request_too_large");
  EXPECT_TRUE(eventually([&] { return is_empty(); }));
  EXPECT_EQ(chat(R"("max_tokens":1)").status, 200);
}

}  // namespace
}  // namespace nibble
