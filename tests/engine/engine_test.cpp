// The engine thread over the fake model: requests' life, limits, failures, cancellation,
// allocations. SPDX-License-Identifier: Apache-2.0
#include "nibble/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <list>
#include <random>
#include <semaphore>
#include <thread>

#include "base/error.h"
#include "engine/allocation_counter.h"
#include "engine/collector.h"
#include "engine/engine_parts.h"
#include "engine/fake_model.h"

namespace nibble {
namespace {

using std::chrono::milliseconds;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kVocab = 1000;
constexpr int kEosId = 2;

// Whether the executor's steps overlap, as on a GPU; set by EngineTest.
bool steps_overlap = false;

struct Options {
  EngineLimits limits{
      .max_batch_size = 8, .max_input_len = 200, .max_output_len = 100, .max_num_tokens = 64};
  int num_kv_blocks = 100;
  int max_queue = 16;
  std::function<void()> before_step, before_collect;
  std::vector<uint64_t> allowed_tokens;
  bool overlaps = steps_overlap;
};

std::unique_ptr<Engine> make_engine(Options options = {}) {
  EngineParts parts;
  parts.plan.spec.vocab_size = kVocab;
  parts.plan.spec.eos_token_ids = {kEosId};
  parts.plan.limits = options.limits;
  parts.plan.kv_block_tokens = 8;
  parts.num_kv_blocks = options.num_kv_blocks;
  parts.max_queue = options.max_queue;
  parts.allowed_tokens = options.allowed_tokens;
  auto executor = std::make_unique<FakeExecutor>(
      StepShape{.max_batch_size = options.limits.max_batch_size,
                .max_num_tokens = options.limits.max_num_tokens,
                .max_logit_rows = options.limits.max_batch_size + parts.num_prompt_logprob_rows,
                .max_seq_len = options.limits.max_seq_len(),
                .block_tokens = 8,
                .vocab_size = kVocab},
      options.num_kv_blocks, options.overlaps);
  executor->before_step = std::move(options.before_step);
  executor->before_collect = std::move(options.before_collect);
  parts.executor = std::move(executor);
  return Engine::create(std::move(parts));
}

Request make_request(std::vector<int32_t> prompt, int max_tokens, Collector& collector) {
  Request request;
  request.prompt_tokens = std::move(prompt);
  request.max_tokens = max_tokens;
  request.params.temperature = 0;
  request.params.seed = 0;
  request.sink = collector.sink();
  return request;
}

std::vector<int32_t> tokens_from(int first, int count) {
  std::vector<int32_t> tokens(count);
  for (int i = 0; i < count; ++i) tokens[i] = (first + i * 7) % kVocab;
  return tokens;
}

FakeAnswer oracle(const Request& request, int index = 0) {
  return fake_generate(request, index, request.max_tokens.value(), {kEosId}, kVocab);
}

/// Holds the engine inside a step until released.
class Gate {
 public:
  void operator()() {
    num_steps_.fetch_add(1);
    if (is_closed_.load()) {
      entered_.release();
      open_.acquire();
    }
  }
  void close() { is_closed_ = true; }
  void wait_until_held() { entered_.acquire(); }
  void open() {
    is_closed_ = false;
    open_.release();
  }
  void let_one_step_pass() {
    open_.release();
    entered_.acquire();
  }
  int num_steps() const { return num_steps_.load(); }

 private:
  std::atomic<bool> is_closed_{false};
  std::atomic<int> num_steps_{0};
  std::counting_semaphore<> entered_{0}, open_{0};
};

class EngineTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { steps_overlap = GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Steps, EngineTest, testing::Bool(), [](const auto& info) {
  return std::string(info.param ? "overlapping" : "alone");
});

TEST_P(EngineTest, AnswersAsTheModelDoesAlone) {
  auto engine = make_engine();
  Collector collector;
  Request request = make_request(tokens_from(10, 30), 20, collector);
  request.params.logprobs = 3;
  request.params.prompt_logprobs = 0;
  const FakeAnswer expected = oracle(request);
  const Submitted submitted = engine->submit(request);
  ASSERT_TRUE(submitted);
  ASSERT_TRUE(collector.wait());
  const auto choice = collector.choice();
  EXPECT_EQ(choice.tokens, expected.tokens);
  EXPECT_EQ(choice.logprobs, expected.logprobs);
  EXPECT_EQ(choice.prompt_logprobs, expected.prompt_logprobs);
  ASSERT_EQ(choice.top_tokens.size(), expected.tokens.size());
  for (size_t i = 0; i < expected.tokens.size(); ++i) {
    const int32_t t = expected.tokens[i];
    EXPECT_EQ(choice.top_tokens[i], (std::vector<int32_t>{t, (t + 1) % kVocab, (t + 2) % kVocab}));
  }
  EXPECT_EQ(choice.reason, expected.reason);
  EXPECT_EQ(choice.usage.prompt_tokens, 30);
  EXPECT_EQ(choice.usage.cached_tokens, 0);
  EXPECT_EQ(engine->stats().kv_blocks_used, 0);
}

TEST_P(EngineTest, ASecondTurnReusesTheFirst) {
  auto engine = make_engine();
  Collector first, second, salted;
  Request request = make_request(tokens_from(10, 30), 21, first);
  ASSERT_TRUE(engine->submit(request));
  ASSERT_TRUE(first.wait());
  const auto output = first.choice().tokens;
  Request turn = make_request(request.prompt_tokens, 10, second);
  turn.prompt_tokens.insert(turn.prompt_tokens.end(), output.begin(), output.end());
  turn.prompt_tokens.push_back(77);
  const FakeAnswer expected = oracle(turn);
  ASSERT_TRUE(engine->submit(turn));
  ASSERT_TRUE(second.wait());
  EXPECT_EQ(second.choice().tokens, expected.tokens);
  EXPECT_EQ(second.choice().usage.cached_tokens, 30 + static_cast<int>(output.size()) - 1);
  EXPECT_EQ(engine->stats().prefix_hit_tokens, uint64_t(second.choice().usage.cached_tokens));
  // Under another salt nothing is found.
  turn.cache_salt = "other";
  turn.sink = salted.sink();
  ASSERT_TRUE(engine->submit(turn));
  ASSERT_TRUE(salted.wait());
  EXPECT_EQ(salted.choice().tokens, expected.tokens);
  EXPECT_EQ(salted.choice().usage.cached_tokens, 0);
}

TEST_P(EngineTest, ChoicesShareOnePrefill) {
  auto engine = make_engine();
  Collector collector;
  Request request = make_request(tokens_from(3, 100), 12, collector);
  request.params.temperature = 1;
  request.params.seed = 42;
  request.params.n = 5;
  request.params.ignore_eos = true;
  ASSERT_TRUE(engine->submit(request));
  ASSERT_TRUE(collector.wait());
  ASSERT_EQ(collector.choices().size(), 5u);
  std::set<std::vector<int32_t>> different;
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(collector.choice(i).tokens, oracle(request, i).tokens) << i;
    EXPECT_EQ(collector.choice(i).usage.cached_tokens, 0);
    different.insert(collector.choice(i).tokens);
  }
  EXPECT_EQ(different.size(), 5u);
  // The prompt once, its last row for each sibling, and the generated tokens but each one's last.
  EXPECT_EQ(engine->stats().step_tokens, 100u + 4 + 5 * 11);
}

TEST_P(EngineTest, StoppingRules) {
  auto engine = make_engine();
  const auto run = [&](auto change) {
    Collector collector;
    Request request = make_request(tokens_from(5, 9), 30, collector);
    change(request);
    EXPECT_TRUE(engine->submit(request));
    EXPECT_TRUE(collector.wait());
    return collector.choice();
  };
  const auto plain = run([](Request&) {});
  ASSERT_EQ(plain.tokens.size(), 30u);
  EXPECT_EQ(plain.reason, FinishReason::kLength);
  const int32_t sixth = plain.tokens[5];
  ASSERT_EQ(std::ranges::find(plain.tokens, sixth) - plain.tokens.begin(), 5);

  const auto stopped = run([&](Request& r) { r.params.stop_token_ids = {sixth}; });
  EXPECT_EQ(stopped.reason, FinishReason::kStopToken);
  EXPECT_EQ(stopped.stop_token, sixth);
  EXPECT_EQ(stopped.tokens, std::vector<int32_t>(plain.tokens.begin(), plain.tokens.begin() + 6));

  const auto later = run([&](Request& r) {
    r.params.stop_token_ids = {sixth};
    r.params.min_tokens = 10;
  });
  ASSERT_GE(later.tokens.size(), 10u);
  EXPECT_EQ(std::count(later.tokens.begin(), later.tokens.begin() + 9, sixth), 0);

  const auto nothing = run([](Request& r) { r.max_tokens = 0; });
  EXPECT_TRUE(nothing.tokens.empty());
  EXPECT_EQ(nothing.reason, FinishReason::kLength);

  // A prompt whose first token is end-of-sequence: found by search.
  for (int32_t last = 0; last < 20 * kVocab; ++last) {
    const auto prompt = std::vector<int32_t>{last / kVocab, last % kVocab};
    Request probe;
    probe.prompt_tokens = prompt;
    probe.params.temperature = 0;
    probe.max_tokens = 5;
    if (oracle(probe).tokens[0] != kEosId) continue;
    const auto ended = run([&](Request& r) { r.prompt_tokens = prompt; });
    EXPECT_EQ(ended.tokens, std::vector<int32_t>{kEosId});
    EXPECT_EQ(ended.reason, FinishReason::kEos);
    const auto ignored = run([&](Request& r) {
      r.prompt_tokens = prompt;
      r.params.ignore_eos = true;
    });
    EXPECT_EQ(ignored.tokens.size(), 30u);
    EXPECT_EQ(ignored.tokens[0], kEosId);
    return;
  }
  FAIL() << "no prompt ends at once";
}

std::string message_of(Engine& engine, Request request, ErrorKind kind) {
  try {
    (void)engine.submit(std::move(request));
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing thrown";
  return "";
}

TEST_P(EngineTest, OverlongRequestsHearTheLimits) {
  auto engine = make_engine();
  Collector c;
  const std::string prompt =
      message_of(*engine, make_request(tokens_from(0, 201), 1, c), ErrorKind::kLimit);
  EXPECT_THAT(prompt, HasSubstr("maximum context length is 300 tokens"));
  EXPECT_THAT(prompt, HasSubstr("200 may be prompt"));
  EXPECT_THAT(prompt, HasSubstr("201 tokens"));
  const std::string output = message_of(*engine, make_request({1}, 101, c), ErrorKind::kLimit);
  EXPECT_THAT(output, HasSubstr("max_tokens is 101"));
  EXPECT_THAT(output, HasSubstr("at most 100 tokens"));
  auto small = make_engine({.num_kv_blocks = 10});  // 80 tokens
  EXPECT_EQ(small->max_seq_len(), 80);
  const std::string both =
      message_of(*small, make_request(tokens_from(0, 60), 21, c), ErrorKind::kLimit);
  EXPECT_THAT(both, HasSubstr("maximum context length is 80 tokens"));
  EXPECT_THAT(both, HasSubstr("needs 81: 60 in the prompt and 21 to generate"));
  Collector whole;
  ASSERT_TRUE(small->submit(make_request(tokens_from(0, 60), 20, whole)));
  ASSERT_TRUE(whole.wait());
  EXPECT_EQ(whole.choice().tokens.size(), 20u);
  // Without max_tokens: as many as fit.
  Collector open;
  Request request = make_request(tokens_from(0, 60), 0, open);
  request.max_tokens.reset();
  request.params.ignore_eos = true;
  ASSERT_TRUE(small->submit(request));
  ASSERT_TRUE(open.wait());
  EXPECT_EQ(open.choice().tokens.size(), 20u);
}

TEST_P(EngineTest, ParametersOutOfRangeAreNamed) {
  auto engine = make_engine();
  Collector c;
  const auto message = [&](auto change) {
    Request request = make_request({1, 2}, 5, c);
    change(request);
    return message_of(*engine, request, ErrorKind::kInput);
  };
  EXPECT_THAT(message([](Request& r) { r.params.temperature = -1; }),
              HasSubstr("temperature is -1"));
  EXPECT_THAT(message([](Request& r) { r.params.temperature = NAN; }),
              HasSubstr("temperature is nan"));
  EXPECT_THAT(message([](Request& r) { r.params.top_p = 0; }), HasSubstr("top_p is 0"));
  EXPECT_THAT(message([](Request& r) { r.params.min_p = 2; }), HasSubstr("min_p is 2"));
  EXPECT_THAT(message([](Request& r) { r.params.repetition_penalty = 0; }),
              HasSubstr("repetition_penalty is 0"));
  EXPECT_THAT(message([](Request& r) { r.params.logprobs = 21; }), HasSubstr("logprobs is 21"));
  EXPECT_THAT(message([](Request& r) { r.params.n = 0; }), HasSubstr("n is 0"));
  EXPECT_THAT(message([](Request& r) { r.params.min_tokens = 6; }), HasSubstr("min_tokens is 6"));
  EXPECT_THAT(message([](Request& r) { r.max_tokens = -1; }), HasSubstr("max_tokens is -1"));
  EXPECT_THAT(message([](Request& r) { r.prompt_tokens = {}; }), HasSubstr("no tokens"));
  EXPECT_THAT(message([](Request& r) { r.prompt_tokens = {1, kVocab}; }),
              HasSubstr("prompt_tokens[1] is 1000"));
  EXPECT_THAT(message([](Request& r) { r.params.stop_token_ids = {-1}; }),
              HasSubstr("stop_token_ids[0] is -1"));
  EXPECT_THAT(message([](Request& r) { r.params.logit_bias = {{5, NAN}}; }),
              HasSubstr("logit_bias of token 5"));
  EXPECT_THAT(message([](Request& r) { r.sink = nullptr; }), HasSubstr("no sink"));
  EXPECT_EQ(engine->stats().num_queued, 0);
}

TEST_P(EngineTest, AConstraintHoldsForEveryChoiceAndEndsIt) {
  auto engine = make_engine();
  std::list<std::pair<Request, Collector>> items;
  for (const auto& [ignore_eos, min_tokens] :
       std::vector<std::pair<bool, int>>{{false, 0}, {true, 0}, {false, 7}, {false, 15}}) {
    auto& [request, collector] = items.emplace_back();
    request = make_request(tokens_from(3 + min_tokens, 20), 40, collector);
    request.params.temperature = 1;
    request.params.n = 3;
    request.params.ignore_eos = ignore_eos;
    request.params.min_tokens = min_tokens;
    request.params.logprobs = 0;
    request.params.constraint =
        std::make_shared<FakeConstraint>(kVocab, 5, std::set<int32_t>{kEosId});
    ASSERT_TRUE(engine->submit(request));
  }
  // Beside them one without.
  auto& [free, told] = items.emplace_back();
  free = make_request(tokens_from(1, 20), 40, told);
  ASSERT_TRUE(engine->submit(free));
  for (auto& [request, collector] : items) {
    ASSERT_TRUE(collector.wait());
    for (int i = 0; i < request.params.n; ++i) {
      const auto choice = collector.choice(i);
      const FakeAnswer expected = oracle(request, i);
      EXPECT_EQ(choice.tokens, expected.tokens);
      EXPECT_EQ(choice.logprobs,
                request.params.logprobs < 0 ? std::vector<float>() : expected.logprobs);
      EXPECT_EQ(choice.reason, expected.reason);
      if (request.params.constraint == nullptr) continue;
      // Five ids and at most two more; never more, whatever ignore_eos and min_tokens ask for.
      EXPECT_EQ(choice.reason, FinishReason::kEos);
      EXPECT_EQ(choice.stop_token, kEosId);
      EXPECT_GE(choice.tokens.size(), 6u);
      EXPECT_LE(choice.tokens.size(), 8u);
      if (request.params.ignore_eos || request.params.min_tokens >= 7) {
        EXPECT_EQ(choice.tokens.size(), 8u);
      }
    }
  }
}

TEST_P(EngineTest, AConstraintThatLeavesNothingEndsItsRequestOnly) {
  // Lets any id be drawn and takes none of them: what a matcher does that has run into a limit.
  class Nothing final : public TokenConstraint {
    class Matcher final : public TokenMatcher {
      Ending fill_mask(std::span<uint64_t> allowed) override {
        std::ranges::fill(allowed, ~uint64_t{0});
        return {};
      }
      bool accept(int32_t) override { return false; }
      bool can_end() override { return false; }
    };
    std::unique_ptr<TokenMatcher> start() const override { return std::make_unique<Matcher>(); }
  };
  auto engine = make_engine();
  Collector bad, good;
  Request request = make_request({1, 2, 3}, 5, bad);
  request.params.constraint = std::make_shared<Nothing>();
  ASSERT_TRUE(engine->submit(request));
  ASSERT_TRUE(bad.wait());
  EXPECT_EQ(bad.choice().reason, FinishReason::kError);
  EXPECT_THAT(bad.choice().error, HasSubstr("no token"));
  EXPECT_TRUE(bad.choice().tokens.empty());
  EXPECT_TRUE(engine->healthy());
  ASSERT_TRUE(engine->submit(make_request({1, 2, 3}, 5, good)));
  ASSERT_TRUE(good.wait());
  EXPECT_EQ(good.choice().reason, FinishReason::kLength);
}

TEST_P(EngineTest, BanningEveryTokenIsRefusedAndDepressingAllIsNot) {
  constexpr float kBan = -std::numeric_limits<float>::infinity();
  // Ids 2 (end of sequence), 64, 65 and 999 can be drawn at all.
  std::vector<uint64_t> allowed(16);
  for (const int32_t id : {kEosId, 64, 65, 999}) allowed[id / 64] |= uint64_t{1} << id % 64;
  for (const bool masked : {false, true}) {
    SCOPED_TRACE(masked);
    auto engine = make_engine({.allowed_tokens = masked ? allowed : std::vector<uint64_t>{}});
    Collector c;
    Request all = make_request({1, 2}, 5, c);
    for (int32_t id = 0; id < kVocab; ++id) {
      if (!masked || allowed[id / 64] >> id % 64 & 1) all.params.logit_bias.push_back({id, kBan});
    }
    const auto accepted = [&](Request request) {
      Collector own;
      request.sink = own.sink();
      EXPECT_TRUE(engine->submit(request));
      EXPECT_TRUE(own.wait());
      return own.choice().tokens;
    };
    const auto number = fmt::format("bans all {} tokens", masked ? 4 : kVocab);
    EXPECT_THAT(message_of(*engine, all, ErrorKind::kInput), HasSubstr(number));

    // The end-of-sequence id alone is left: nothing before min_tokens, unless it ends nothing.
    Request stop = all;
    for (auto& [id, bias] : stop.params.logit_bias) bias = id == kEosId ? 0 : kBan;
    Request early = stop;
    early.params.min_tokens = 1;
    EXPECT_THAT(message_of(*engine, early, ErrorKind::kInput),
                AllOf(HasSubstr(number), HasSubstr("min_tokens")));
    early.params.ignore_eos = true;
    const std::vector<int32_t> ignored = accepted(early);
    early.params.stop_token_ids = {kEosId};
    EXPECT_THAT(message_of(*engine, early, ErrorKind::kInput), HasSubstr(number));
    const std::vector<int32_t> stopped = accepted(stop);
    if (!masked) {  // the fake model knows biases, not the mask
      EXPECT_EQ(ignored, std::vector<int32_t>(5, kEosId));
      EXPECT_EQ(stopped, std::vector<int32_t>{kEosId});
    }
    Request prompt_only = all;
    prompt_only.max_tokens = 0;
    EXPECT_TRUE(accepted(prompt_only).empty());

    // The last of two biases counts, and a finite one never bans.
    Request last = all;
    last.params.logit_bias.back().second = -3e38f;
    EXPECT_FALSE(accepted(last).empty());
    for (auto& [id, bias] : last.params.logit_bias) bias = -100;
    EXPECT_FALSE(accepted(last).empty());
  }
}

TEST_P(EngineTest, ASinkThatThrowsEndsItsOwnRequestOnly) {
  auto engine = make_engine();
  Collector good;
  Request bad = make_request(tokens_from(1, 5), 50, good);
  std::atomic<int> num_calls{0};
  bad.params.n = 3;
  bad.sink = [&](const TokenEvent&) {
    ++num_calls;
    throw std::runtime_error("no");
  };
  const Request request = make_request(tokens_from(2, 5), 50, good);
  ASSERT_TRUE(engine->submit(bad));
  ASSERT_TRUE(engine->submit(request));
  ASSERT_TRUE(good.wait());
  EXPECT_EQ(good.choice().tokens, oracle(request).tokens);
  EXPECT_TRUE(engine->drain(milliseconds(10000)));
  EXPECT_EQ(num_calls, 1);
  EXPECT_TRUE(engine->healthy());
  EXPECT_EQ(engine->stats().finished[size_t(FinishReason::kCancelled)], 3u);
}

TEST_P(EngineTest, AFailedStepFailsEveryRequestAndTheEngine) {
  std::atomic<int> num_steps{0}, num_submitted{0};
  Options options;
  options.limits.max_batch_size = 2;  // some requests are still waiting then
  options.before_step = [&] {
    while (num_submitted < 4) std::this_thread::yield();
    if (++num_steps == 5) throw std::runtime_error("the device fell off");
  };
  auto engine = make_engine(options);
  std::vector<Collector> collectors(4);
  for (auto& collector : collectors) {
    ASSERT_TRUE(engine->submit(make_request(tokens_from(1, 5), 50, collector)));
    ++num_submitted;
  }
  for (auto& collector : collectors) {
    ASSERT_TRUE(collector.wait());
    EXPECT_EQ(collector.choice().reason, FinishReason::kError);
    EXPECT_THAT(collector.choice().error, HasSubstr("the device fell off"));
  }
  EXPECT_FALSE(engine->healthy());
  EXPECT_THAT(engine->failure(), HasSubstr("the device fell off"));
  Collector late;
  EXPECT_EQ(engine->submit(make_request({1}, 1, late)).status, SubmitStatus::kFailed);
  engine->cancel(1);
  EXPECT_TRUE(engine->drain(milliseconds(1000)));
}

TEST_P(EngineTest, TheQueueIsBoundedAndSlotsCount) {
  Gate gate;
  gate.close();
  Options options;
  options.limits.max_batch_size = 1;
  options.max_queue = 3;
  options.before_step = std::ref(gate);
  auto engine = make_engine(options);
  std::vector<Collector> c(6);
  ASSERT_TRUE(engine->submit(make_request({1}, 2, c[0])));
  gate.wait_until_held();  // the first has started: the queue is empty
  EXPECT_EQ(engine->stats().num_queued, 0);
  ASSERT_TRUE(engine->submit(make_request({2}, 2, c[1])));
  ASSERT_TRUE(engine->submit(make_request({3}, 2, c[2])));
  {
    QueueSlot slot = engine->reserve_slot();
    ASSERT_TRUE(slot);
    EXPECT_FALSE(engine->reserve_slot());
    EXPECT_EQ(engine->submit(make_request({4}, 2, c[3])).status, SubmitStatus::kQueueFull);
    ASSERT_TRUE(engine->submit(make_request({4}, 2, c[3]), std::move(slot)));
  }
  EXPECT_EQ(engine->stats().num_queued, 3);
  {
    EXPECT_FALSE(engine->reserve_slot());
  }
  gate.open();
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(c[i].wait());
  {
    EXPECT_TRUE(engine->reserve_slot());
  }
  EXPECT_EQ(engine->stats().num_queued, 0);
  ASSERT_TRUE(engine->submit(make_request({5}, 2, c[4])));
  ASSERT_TRUE(c[4].wait());
}

TEST_P(EngineTest, CancellationTakesEffectWithinTwoSteps) {
  Gate gate;
  gate.close();
  auto engine = make_engine({.before_step = std::ref(gate)});
  Collector a, b;
  Request request = make_request(tokens_from(0, 5), 90, a);
  request.params.ignore_eos = true;
  const Submitted submitted = engine->submit(request);
  ASSERT_TRUE(submitted);
  gate.wait_until_held();
  for (int i = 0; i < 5; ++i) gate.let_one_step_pass();  // in the sixth step now
  const int step = gate.num_steps();
  engine->cancel(submitted.id);
  const Request next = make_request(tokens_from(1, 5), 3, b);
  ASSERT_TRUE(engine->submit(next));  // keeps steps coming
  gate.let_one_step_pass();  // the step that was running ends, and the cancellation is seen
  ASSERT_LE(gate.num_steps(), step + 1);
  ASSERT_TRUE(a.wait(std::chrono::seconds(0)));
  EXPECT_EQ(a.choice().reason, FinishReason::kCancelled);
  // What the running step draws is dropped where the cancellation is seen before it is read.
  EXPECT_EQ(a.choice().tokens.size(), GetParam() ? 5u : 6u);
  gate.open();
  ASSERT_TRUE(b.wait());
  EXPECT_EQ(b.choice().tokens, oracle(next).tokens);
  EXPECT_EQ(engine->stats().kv_blocks_used, 0);
}

TEST_P(EngineTest, OneChoiceCanBeCancelled) {
  auto engine = make_engine();
  Collector collector;
  Request request = make_request(tokens_from(0, 5), 60, collector);
  request.params.n = 3;
  request.params.temperature = 1;
  request.params.ignore_eos = true;
  auto inner = request.sink;
  request.sink = [&engine, inner, count = 0](const TokenEvent& event) mutable {
    inner(event);
    if (event.index == 1 && ++count == 4)
      engine->cancel(event.request_id, 1);  // as a stop string would
  };
  ASSERT_TRUE(engine->submit(request));
  ASSERT_TRUE(collector.wait());
  EXPECT_EQ(collector.choice(0).reason, FinishReason::kLength);
  EXPECT_EQ(collector.choice(1).reason, FinishReason::kCancelled);
  EXPECT_EQ(collector.choice(1).tokens.size(), 4u);
  EXPECT_EQ(collector.choice(2).tokens, oracle(request, 2).tokens);
}

TEST_P(EngineTest, DrainWaitsThenCancels) {
  {
    auto engine = make_engine();
    Collector collector;
    ASSERT_TRUE(engine->submit(make_request({1}, 20, collector)));
    EXPECT_TRUE(engine->drain(milliseconds(60000)));
    EXPECT_TRUE(collector.wait(std::chrono::seconds(0)));
    EXPECT_EQ(engine->submit(make_request({1}, 1, collector)).status, SubmitStatus::kDraining);
  }
  Options options;
  options.before_step = [] { std::this_thread::sleep_for(milliseconds(20)); };
  auto engine = make_engine(options);
  Collector collector;
  Request request = make_request({1}, 100, collector);
  request.params.ignore_eos = true;
  ASSERT_TRUE(engine->submit(request));
  EXPECT_FALSE(engine->drain(milliseconds(100)));
  ASSERT_TRUE(collector.wait(std::chrono::seconds(0)));
  EXPECT_EQ(collector.choice().reason, FinishReason::kCancelled);
}

TEST_P(EngineTest, WaitingForTheDeviceIsToldFromWork) {
  Options options;
  options.before_step = [] { std::this_thread::sleep_for(milliseconds(2)); };
  options.before_collect = [] { std::this_thread::sleep_for(milliseconds(5)); };
  const auto engine = make_engine(std::move(options));
  Collector collector;
  ASSERT_TRUE(engine->submit(make_request(tokens_from(5, 10), 20, collector)));
  ASSERT_TRUE(engine->drain(milliseconds(10'000)));
  engine->stop();  // the last step's times are published
  const EngineStats stats = engine->stats();
  EXPECT_GE(stats.steps, 20u);
  EXPECT_GE(stats.wait_us, stats.steps * 5000);
  EXPECT_GE(stats.step_us - stats.wait_us, stats.steps * 2000);
}

TEST_P(EngineTest, ASteadyStepAllocatesNothing) {
  std::vector<uint64_t> counts;
  counts.reserve(1000);
  auto engine = make_engine({.before_step = [&] { counts.push_back(num_allocations()); }});
  constexpr int kRequests = 4;
  std::atomic<int> num_done{0};
  std::atomic<uint64_t> checksum{0};
  for (int i = 0; i < kRequests; ++i) {
    Collector unused;
    Request request = make_request(tokens_from(i, 20), 100, unused);
    request.params.ignore_eos = true;
    request.params.temperature = 1;
    request.params.presence_penalty = 1;
    request.params.logprobs = 5;
    request.params.logit_bias = {{1, -INFINITY}, {2, 3}};
    request.params.min_tokens = 50;
    request.sink = [&](const TokenEvent& event) {
      for (const TokenLogprobs& score : event.logprobs) checksum += score.token + score.top.size();
      num_done += event.last;
    };
    ASSERT_TRUE(engine->submit(request));
  }
  while (num_done < kRequests) std::this_thread::sleep_for(milliseconds(1));
  engine->stop();
  ASSERT_GT(counts.size(), 99u);
  // All have arrived after a few steps; until the first ends no step may allocate. 90 steps cross
  // 11 blocks.
  const size_t begin = counts.size() - 95, end = counts.size() - 4;
  EXPECT_EQ(counts[end] - counts[begin], 0u);
  EXPECT_GT(checksum, 0u);
}

TEST_P(EngineTest, ManyThreadsSubmitAndCancel) {
  Options options;
  options.num_kv_blocks = 40;  // fewer than the sequences want: preemption
  options.max_queue = 1;
  auto engine = make_engine(options);
  constexpr int kThreads = 4, kPerThread = 60;
  std::atomic<int> num_full{0}, num_cancelled{0}, num_checked{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < kPerThread; ++i) {
        Collector collector;
        Request request = make_request(tokens_from(random() % 3, 1 + random() % 120),
                                       1 + random() % 60, collector);
        request.params.temperature = random() % 2;
        request.params.seed = random();
        request.params.n = 1 + random() % 3;
        request.priority = random() % 3;
        const bool cancels = random() % 4 == 0;
        Submitted submitted = engine->submit(request);
        while (!submitted) {
          ASSERT_EQ(submitted.status, SubmitStatus::kQueueFull);
          ++num_full;
          std::this_thread::sleep_for(milliseconds(1));
          submitted = engine->submit(request);
        }
        if (cancels) {
          collector.wait_for_tokens(random() % 2);
          engine->cancel(submitted.id);
        }
        (void)engine->stats();
        ASSERT_TRUE(collector.wait());
        for (int n = 0; n < request.params.n; ++n) {
          const auto choice = collector.choice(n);
          const FakeAnswer expected = oracle(request, n);
          if (choice.reason == FinishReason::kCancelled) {
            ++num_cancelled;
            ASSERT_LE(choice.tokens.size(), expected.tokens.size());
            ASSERT_TRUE(
                std::equal(choice.tokens.begin(), choice.tokens.end(), expected.tokens.begin()));
          } else {
            ++num_checked;
            ASSERT_EQ(choice.tokens, expected.tokens);
            ASSERT_EQ(choice.reason, expected.reason);
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(engine->drain(milliseconds(1000)));
  const EngineStats stats = engine->stats();
  EXPECT_EQ(stats.kv_blocks_used, 0);
  EXPECT_EQ(stats.num_running + stats.num_waiting + stats.num_queued, 0);
  EXPECT_EQ(stats.requests, uint64_t(kThreads * kPerThread));
  EXPECT_GT(num_checked, 100);
  EXPECT_GT(num_full, 0);
  uint64_t num_finished = 0;
  for (const uint64_t count : stats.finished) num_finished += count;
  EXPECT_EQ(num_finished, uint64_t(num_checked + num_cancelled));
  std::printf("queue full %d times, %d choices cancelled, %d checked, %lu preemptions\n",
              num_full.load(), num_cancelled.load(), num_checked.load(), stats.preemptions);
}

}  // namespace
}  // namespace nibble
