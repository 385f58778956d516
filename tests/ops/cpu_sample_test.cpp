// The sampling op of the cpu backend against the reference: same tokens, same log-probabilities.
// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "cpu_test_util.h"

namespace nibble::ops {
namespace {

class CpuSample : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Isa, CpuSample, testing::ValuesIn(available_cpu_isas()), isa_test_name);

constexpr int kLogprobs = 5;

struct Result {
  std::vector<int32_t> tokens, top_tokens;
  std::vector<float> logprobs, top_logprobs;
};

Result run(Backend& backend, const SampleBatch& batch, std::vector<float> logits) {
  const auto rows = static_cast<size_t>(batch.num_rows);
  Result r{std::vector<int32_t>(rows, -7), std::vector<int32_t>(rows * kLogprobs, -7),
           std::vector<float>(rows, -7), std::vector<float>(rows * kLogprobs, -7)};
  backend.sample(batch, logits.data(),
                 {.tokens = r.tokens.data(),
                  .logprobs = r.logprobs.data(),
                  .top_tokens = r.top_tokens.data(),
                  .top_logprobs = r.top_logprobs.data()});
  return r;
}

TEST_P(CpuSample, MatchesReference) {
  const auto reference = make_reference_backend();
  const auto cpu = make_cpu_backend(GetParam(), ActivationPrecision::kF32, 3);
  for (const int vocab : {1, 5, 64, 1000, 5003}) {
    std::vector<SampleRow> rows;
    for (const float temperature : {0.0f, 0.7f, 1.0f, 3.0f}) {
      for (const float top_p : {1.0f, 0.9f, 0.3f, 1e-6f}) {
        for (const int top_k : {0, 1, 3, 40, 100000}) {
          for (const float min_p : {0.0f, 0.05f, 1.0f}) {
            SampleRow row{
                .temperature = temperature, .top_p = top_p, .min_p = min_p, .top_k = top_k};
            row.seed = rows.size() * 77;
            row.position = rows.size();
            if (rows.size() % 3 == 1) row.num_logprobs = static_cast<int32_t>(rows.size() % 7);
            if (rows.size() % 4 == 2) {
              row.repetition_penalty = 1.3f;
              row.presence_penalty = 0.4f;
              row.frequency_penalty = 0.2f;
              row.history_end = std::min(vocab, 5);
              row.bias_end = std::min(vocab, 2);
              // In the history, at its end, and in it or not.
              if (rows.size() % 8 == 6) row.pending = static_cast<int32_t>(rows.size() / 8 % 3);
            }
            if (rows.size() % 6 == 4) {  // log-probs of a given text; 4 is also a scored row
              row.forced_token = static_cast<int32_t>(rows.size()) % vocab;
            }
            rows.push_back(row);
          }
        }
      }
    }
    std::vector<TokenCount> history;
    for (int i = 0; i < std::min(vocab, 5); ++i)
      history.push_back({i * (vocab / std::min(vocab, 5)), i % 3});
    const std::vector<int32_t> previous = {0, vocab - 1, vocab / 2};
    const std::vector<TokenBias> bias = {{0, -std::numeric_limits<float>::infinity()},
                                         {vocab - 1, 2.5f}};
    std::vector<uint64_t> allowed(static_cast<size_t>(vocab) / 64 + 1, ~uint64_t{0});
    allowed[0] = 0xfffffffffffffff5u;  // two ids banned
    // Of the rows that have one: a few ids, one id, every id but some.
    const int mask_words = (vocab + 63) / 64;
    std::vector<uint64_t> masks(3 * static_cast<size_t>(mask_words));
    for (int v = 0; v < vocab; ++v) {
      const auto word = static_cast<size_t>(v / 64);
      const uint64_t bit = uint64_t{1} << (v % 64);
      if (v % 37 == 4) masks[word] |= bit;
      if (v == vocab / 2) masks[static_cast<size_t>(mask_words) + word] |= bit;
      if (v % 5 != 0) masks[2 * static_cast<size_t>(mask_words) + word] |= bit;
    }
    if (vocab > 5) {
      for (size_t r = 0; r < rows.size(); ++r) {
        if (r % 5 == 3) rows[r].mask = static_cast<int32_t>(r % 3);
      }
    }
    std::vector<float> logits(rows.size() * static_cast<size_t>(vocab));
    fill_normal(logits, static_cast<uint64_t>(vocab), 2.0f);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = std::round(logits[i] * 8) / 8;  // ties
    const SampleBatch batch{.num_rows = static_cast<int>(rows.size()),
                            .vocab_size = vocab,
                            .rows = rows.data(),
                            .history = history.data(),
                            .previous_tokens = previous.data(),
                            .bias = bias.data(),
                            .allowed = vocab == 1000 ? allowed.data() : nullptr,
                            .masks = masks.data(),
                            .mask_words = mask_words,
                            .max_logprobs = kLogprobs};
    const Result want = run(*reference, batch, logits), got = run(*cpu, batch, logits);
    for (size_t r = 0; r < rows.size(); ++r) {
      EXPECT_EQ(got.tokens[r], want.tokens[r])
          << "vocab " << vocab << " row " << r << " temperature " << rows[r].temperature
          << " top_p " << rows[r].top_p << " top_k " << rows[r].top_k << " min_p " << rows[r].min_p;
      if (rows[r].mask >= 0 && rows[r].forced_token < 0) {
        const auto at = static_cast<size_t>(rows[r].mask * mask_words + got.tokens[r] / 64);
        EXPECT_TRUE(masks[at] >> (got.tokens[r] % 64) & 1) << "vocab " << vocab << " row " << r;
      }
    }
    EXPECT_EQ(got.top_tokens, want.top_tokens);
    for (size_t i = 0; i < want.logprobs.size(); ++i)
      EXPECT_NEAR(got.logprobs[i], want.logprobs[i], 1e-5);
    for (size_t i = 0; i < want.top_logprobs.size(); ++i) {
      if (std::isinf(want.top_logprobs[i])) {
        EXPECT_EQ(got.top_logprobs[i], want.top_logprobs[i]);
      } else {
        EXPECT_NEAR(got.top_logprobs[i], want.top_logprobs[i], 1e-5);
      }
    }
  }
}

TEST_P(CpuSample, DrawsFollowTheDistribution) {
  const auto cpu = make_cpu_backend(GetParam(), ActivationPrecision::kF32, 1);
  const std::vector<float> logits = {0.0f, std::log(2.0f), std::log(5.0f),
                                     -std::numeric_limits<float>::infinity()};
  const int n = 8000;
  std::vector<SampleRow> rows(n);
  std::vector<float> all;
  for (int i = 0; i < n; ++i) {
    rows[static_cast<size_t>(i)].seed = 42;
    rows[static_cast<size_t>(i)].position = static_cast<uint64_t>(i);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  std::vector<int32_t> tokens(n);
  cpu->sample({.num_rows = n, .vocab_size = 4, .rows = rows.data()}, all.data(),
              {.tokens = tokens.data()});
  int counts[4] = {};
  for (const int32_t t : tokens) ++counts[t];
  EXPECT_NEAR(counts[0], n / 8, 120);  // four standard deviations
  EXPECT_NEAR(counts[1], n / 4, 160);
  EXPECT_NEAR(counts[2], n * 5 / 8, 175);
  EXPECT_EQ(counts[3], 0);
}

}  // namespace
}  // namespace nibble::ops
