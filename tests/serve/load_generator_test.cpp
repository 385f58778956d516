// The load generator: its arithmetic alone, and its counts against what a real server counted.
// SPDX-License-Identifier: Apache-2.0
#include "serve/load_generator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "serve/server_fixture.h"

namespace nibble {
namespace {

TEST(Percentiles, InterpolateAsNumpyDoes) {
  const Percentiles p = Percentiles::of({4, 1, 3, 2, 10});
  EXPECT_DOUBLE_EQ(p.mean, 4);
  EXPECT_DOUBLE_EQ(p.p50, 3);
  EXPECT_DOUBLE_EQ(p.p90, 7.6);  // numpy.percentile([1, 2, 3, 4, 10], 90)
  EXPECT_DOUBLE_EQ(p.p99, 9.76);
  EXPECT_DOUBLE_EQ(p.max, 10);
  EXPECT_EQ(Percentiles::of({}).max, 0);
  EXPECT_EQ(Percentiles::of({7}).p99, 7);
}

TEST(EventParser, DoesNotCareHowBytesArrive) {
  const std::string stream =
      ": ping\n\ndata: {\"a\":1}\n\nevent: x\ndata:two\r\n\r\ndata: [DONE]\n\n";
  for (size_t step = 1; step < stream.size(); ++step) {
    EventParser parser;
    std::vector<std::string> heard;
    for (size_t at = 0; at < stream.size(); at += step) {
      parser.feed(std::string_view(stream).substr(at, step),
                  [&](std::string_view data) { heard.emplace_back(data); });
    }
    EXPECT_EQ(heard, (std::vector<std::string>{"{\"a\":1}", "two", "[DONE]"})) << step;
  }
}

class LoadGenerator : public serve_test::ServerTest {
 protected:
  LoadTestOptions options() {
    LoadTestOptions options;
    options.url = fmt::format("http://127.0.0.1:{}/v1/", port());
    options.text = "the sea is wide and the sky is high over the old town by the river";
    options.input_min = 3;
    options.input_max = 9;
    options.output_min = 4;
    options.output_max = 8;
    options.num_sessions = 10;
    options.concurrency = 4;
    return options;
  }
  SilentProgress progress_;
};

TEST_F(LoadGenerator, CountsWhatTheServerCounts) {
  start();
  LoadTestOptions options = this->options();
  options.turns = 3;
  options.shared_prefix = 40;
  const LoadTestReport report = run_load_test(options, progress_);
  EXPECT_EQ(report.completed, 30);
  EXPECT_EQ(report.failed, 0);
  EXPECT_EQ(report.good, 30);
  EXPECT_LE(report.peak_concurrency, 4);
  EXPECT_EQ(report.output_tokens, metric("vllm:generation_tokens_total"));
  EXPECT_EQ(report.input_tokens, metric("vllm:request_prompt_tokens_sum"));
  EXPECT_EQ(report.cached_tokens, metric("vllm:prompt_tokens_cached_total"));
  EXPECT_GT(report.cached_tokens, report.input_tokens / 3);  // the prefix and the turns before
  EXPECT_GT(report.ttft_ms.p50, 0);
  EXPECT_GT(report.e2e_ms.p50, report.ttft_ms.p50);
  EXPECT_GE(report.output_tokens, 30 * 4);
  EXPECT_LE(report.output_tokens, 30 * 8);
}

TEST_F(LoadGenerator, RandomIdsAtARate) {
  start();
  LoadTestOptions options = this->options();
  options.random_ids = true;
  options.vocab_size = 4000;
  options.input_min = options.input_max = 20;
  options.concurrency = 0;
  options.rate = 50;
  options.slo_ttft_ms = 1e-6;
  const LoadTestReport report = run_load_test(options, progress_);
  EXPECT_EQ(report.completed, 10);
  EXPECT_EQ(report.input_tokens, 200);
  EXPECT_EQ(report.good, 0);  // nothing is that fast
}

TEST_F(LoadGenerator, ExtraBodyGoesIntoEveryRequest) {
  start();
  LoadTestOptions options = this->options();
  options.extra_body = {{"max_tokens", 3}, {"n", 1}};
  const LoadTestReport report = run_load_test(options, progress_);
  EXPECT_EQ(report.failed, 0);
  EXPECT_EQ(report.output_tokens, 3 * report.completed);
  options.extra_body = {{"repetition_penalty", -1}};
  const LoadTestReport refused = run_load_test(options, progress_);
  EXPECT_EQ(refused.completed, 0);
  ASSERT_FALSE(refused.errors.empty());
  EXPECT_THAT(refused.errors[0].first, ::testing::HasSubstr("repetition_penalty"));
}

// Conversations of their own that the server has had before: no session computes its prefix again.
TEST_F(LoadGenerator, PrefixesOfTheirOwnAreWarm) {
  start();
  for (const bool random_ids : {true, false}) {
    LoadTestOptions options = this->options();
    options.random_ids = random_ids;
    options.vocab_size = 4000;
    options.input_min = options.input_max = 20;
    options.num_sessions = 9;
    options.rate = 100;
    options.shared_prefix = 96;
    options.num_prefixes = 3;
    options.warm_prefixes = true;
    const double prompts = metric("vllm:request_prompt_tokens_sum");
    const double cached = metric("vllm:prompt_tokens_cached_total");
    const LoadTestReport report = run_load_test(options, progress_);
    EXPECT_EQ(report.completed, 9);
    EXPECT_EQ(report.failed, 0);
    EXPECT_GE(report.cached_tokens, 9 * 96);
    // Eight gaps of 10 ms on average, as the standard library draws them. What is served cannot be
    // more.
    EXPECT_GT(report.arrivals_per_s, 30);
    EXPECT_LT(report.arrivals_per_s, 400);
    EXPECT_LT((report.completed - 1) / report.seconds, report.arrivals_per_s);
    // The prefixes differ: what was sent to warm them found nothing, and is not in the report.
    if (!random_ids) continue;  // the words of so short a text repeat
    EXPECT_EQ(metric("vllm:prompt_tokens_cached_total") - cached, report.cached_tokens);
    EXPECT_EQ(report.input_tokens, 9 * (96 + 20));
    EXPECT_EQ(metric("vllm:request_prompt_tokens_sum") - prompts, report.input_tokens + 3 * 97);
  }
  LoadTestOptions options = this->options();
  options.warm_prefixes = true;  // of which there are none
  EXPECT_THROW(run_load_test(options, progress_), Error);
}

TEST_F(LoadGenerator, FailuresAreCountedWithTheirReason) {
  start();
  LoadTestOptions options = this->options();
  options.model = "no-such-model";
  const LoadTestReport report = run_load_test(options, progress_);
  EXPECT_EQ(report.completed, 0);
  EXPECT_EQ(report.failed, 10);
  ASSERT_EQ(report.errors.size(), 1u);
  EXPECT_EQ(report.errors[0].second, 10);
  EXPECT_NE(report.errors[0].first.find("HTTP 404"), std::string::npos);
  options.url = "http://127.0.0.1:1/v1";
  options.model.clear();
  EXPECT_THROW(run_load_test(options, progress_), Error);
  options = this->options();
  options.text = "word";
  EXPECT_THROW(run_load_test(options, progress_), Error);
}

}  // namespace
}  // namespace nibble
