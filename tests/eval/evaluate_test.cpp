// Perplexity by the protocol of the golden files, and comparison of two models.
// SPDX-License-Identifier: Apache-2.0
#include "eval/evaluate.h"

#include <algorithm>
#include <boost/json/value_to.hpp>
#include <cmath>

#include "base/json.h"
#include "formats/synthetic.h"
#include "formats/testing.h"
#include "model/single_sequence.h"

namespace nibble {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing_::catch_error;

const fs::path kSource = NIBBLE_SOURCE_DIR;

std::vector<int32_t> wiki_ids(size_t count) {
  const std::string bytes = read_file(kSource / "tests" / "data" / "nano" / "eval_wiki.u16");
  std::vector<int32_t> ids;
  for (size_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<uint8_t>(bytes[2 * i]) | static_cast<uint8_t>(bytes[2 * i + 1]) << 8);
  }
  return ids;
}

LoadedModel nano(const std::string& target, KvFormat kv = KvFormat::kF32) {
  LoadOptions options;
  options.build.target = target;
  options.build.kv_format = kv;
  options.build.activation_precision = ActivationPrecision::kF32;
  return load_model(kSource / "models" / "nano", options);
}

LoadedModel synthetic(int vocab_size, uint64_t seed) {
  ModelSpec spec = synthetic_shape("nano-like").spec;
  spec.vocab_size = vocab_size;
  spec.max_position = 256;
  LoadOptions options;
  options.build.target = "ref";
  options.build.limits.max_input_len = 100;
  options.build.limits.max_output_len = 10;
  return load_source(open_synthetic(spec, seed), options);
}

TEST(Evaluate, TheFastPathGivesHuggingFacesPerplexity) {
  const json::value golden =
      parse_json(read_file(kSource / "tests" / "data" / "nano" / "golden.json"), "golden.json");
  const auto expected = json::value_to<std::vector<double>>(
      golden.at("nll").at("wiki").at("fp32").at("first_windows"));
  SilentProgress silent;
  const LoadedModel model = nano("cpu:native");
  const EvalResult result =
      evaluate(model, wiki_ids(4 * 1024 + 500), {.context = 1024, .max_windows = 3}, silent);
  EXPECT_EQ(result.num_windows, 3);
  EXPECT_EQ(result.num_scored, 3 * 1023);
  double sum = 0;
  for (size_t k = 0; k < 3; ++k) {
    EXPECT_NEAR(result.window_nll.at(k), expected[k], 2e-4) << k;
    sum += result.window_nll[k];
  }
  EXPECT_DOUBLE_EQ(result.nll_mean, sum / 3);
  EXPECT_DOUBLE_EQ(result.perplexity, std::exp(result.nll_mean));
  // The remainder is dropped, and 0 means all windows.
  EXPECT_EQ(evaluate(model, wiki_ids(300), {.context = 64}, silent).num_windows, 4);
}

TEST(Evaluate, WindowsStandAloneAndScoreAllButTheFirstPosition) {
  const LoadedModel model = nano("ref");
  const std::vector<int32_t> ids = wiki_ids(3 * 24);
  SilentProgress silent;
  const EvalResult result = evaluate(model, ids, {.context = 24}, silent);
  ASSERT_EQ(result.num_windows, 3);
  const auto vocab = static_cast<size_t>(model.plan.spec.vocab_size);
  double total = 0;
  for (size_t k = 0; k < 3; ++k) {
    SingleSequence fresh(*model.backend, model.plan, model.weights, 24, 24);
    const auto window = std::span(ids).subspan(k * 24, 24);
    const auto logits = fresh.extend(window, SingleSequence::Logits::kAll);
    double nll = 0;
    for (size_t i = 0; i + 1 < window.size(); ++i) {
      const auto row = logits.subspan(i * vocab, vocab);
      double sum = 0;
      for (const float logit : row) sum += std::exp(double{logit});
      nll += std::log(sum) - row[static_cast<size_t>(window[i + 1])];
    }
    EXPECT_NEAR(result.window_nll[k], nll / 23, 1e-9);
    total += nll;
  }
  EXPECT_NEAR(result.nll_mean, total / (3 * 23), 1e-9);
}

TEST(Compare, AModelDiffersFromItselfByNothingAndFromOthersBySomething) {
  const LoadedModel exact = nano("cpu:native"), coarse = nano("cpu:native", KvFormat::kInt8Dynamic);
  SilentProgress silent;
  const std::vector<int32_t> ids = wiki_ids(2 * 128);
  const Comparison self = compare(exact, exact, ids, {.context = 128}, silent);
  EXPECT_EQ(self.kl_mean, 0);
  EXPECT_EQ(self.top1_agreement, 1);
  EXPECT_EQ(self.model.perplexity, self.other.perplexity);
  EXPECT_EQ(self.model.num_scored, 2 * 127);
  const Comparison other = compare(coarse, exact, ids, {.context = 128}, silent);
  EXPECT_GT(other.kl_mean, 0);
  EXPECT_LT(other.kl_mean, 1e-3);
  EXPECT_EQ(other.other.perplexity, self.other.perplexity);
  EXPECT_DOUBLE_EQ(other.model.perplexity,
                   evaluate(coarse, ids, {.context = 128}, silent).perplexity);
}

TEST(Compare, DivergenceIsTheTextbooksAndNotSymmetric) {
  const LoadedModel a = synthetic(320, 1), b = synthetic(320, 2);
  SilentProgress silent;
  std::vector<int32_t> ids;
  for (int i = 0; i < 16; ++i) ids.push_back(i * 13 % 320);
  const Comparison both = compare(a, b, ids, {.context = 16}, silent);
  SingleSequence q(*a.backend, a.plan, a.weights, 16, 16), p(*b.backend, b.plan, b.weights, 16, 16);
  const auto ql = q.extend(ids, SingleSequence::Logits::kAll);
  const auto pl = p.extend(ids, SingleSequence::Logits::kAll);
  double kl = 0;
  for (size_t i = 0; i < 15; ++i) {
    double q_sum = 0, p_sum = 0;
    for (size_t v = 0; v < 320; ++v) {
      q_sum += std::exp(double{ql[i * 320 + v]});
      p_sum += std::exp(double{pl[i * 320 + v]});
    }
    for (size_t v = 0; v < 320; ++v) {
      const double pv = std::exp(double{pl[i * 320 + v]}) / p_sum;
      kl += pv * std::log(pv / (std::exp(double{ql[i * 320 + v]}) / q_sum));
    }
  }
  EXPECT_NEAR(both.kl_mean, kl / 15, 1e-9 + 1e-6 * kl);
  EXPECT_GT(std::fabs(both.kl_mean - compare(b, a, ids, {.context = 16}, silent).kl_mean), 1e-6);
}

TEST(Evaluate, WhatDoesNotFitIsNamed) {
  const LoadedModel model = synthetic(320, 1), other = synthetic(384, 1);
  SilentProgress silent;
  std::vector<int32_t> ids(40, 3);
  const auto message = [&](const EvalOptions& options) {
    return catch_error([&] { evaluate(model, ids, options, silent); }).message;
  };
  EXPECT_THAT(message({.context = 64}), AllOf(HasSubstr("40 tokens"), HasSubstr("--context")));
  EXPECT_THAT(message({.context = 1}), HasSubstr("--context is 1"));
  ids[39] = 320;  // only ever a target: no forward pass would look at it
  EXPECT_THAT(message({.context = 40}),
              AllOf(HasSubstr("token 39"), HasSubstr("is id 320"), HasSubstr("0 to 319")));
  ids[39] = 3;
  EXPECT_THAT(catch_error([&] { compare(model, other, ids, {.context = 40}, silent); }).message,
              AllOf(HasSubstr("320 and 384"), HasSubstr("one vocabulary")));
}

}  // namespace
}  // namespace nibble
