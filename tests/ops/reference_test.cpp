// The reference backend against closed forms: what the other backends are compared with must itself
// be right. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "backends/reference/reference_backend.h"
#include "ops/sample_rng.h"

namespace nibble {
namespace {

TEST(Philox, KnownAnswers) {
  // Random123's kat_vectors, philox4x32 with 10 rounds.
  EXPECT_EQ(philox4x32(0, 0),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
}

class Sample : public ::testing::Test {
 protected:
  int32_t draw(std::vector<float> logits, SampleRow row) {
    const SampleBatch batch{.num_rows = 1,
                            .vocab_size = static_cast<int>(logits.size()),
                            .rows = &row,
                            .history = history_.data(),
                            .previous_tokens = previous_tokens_.data(),
                            .bias = bias_.data(),
                            .allowed = nullptr,
                            .max_logprobs = 3};
    backend_->sample(batch, logits.data(), {&token_, &logprob_, top_tokens_, top_logprobs_});
    return token_;
  }
  std::unique_ptr<Backend> backend_ = make_reference_backend();
  std::vector<TokenCount> history_;
  std::vector<int32_t> previous_tokens_;
  std::vector<TokenBias> bias_;
  int32_t token_ = -1;
  float logprob_ = NAN;
  int32_t top_tokens_[3];
  float top_logprobs_[3];
};

TEST_F(Sample, GreedyTakesTheSmallestIdAmongMaxima) {
  EXPECT_EQ(draw({1, 3, 3, 2}, {.temperature = 0}), 1);
}

TEST_F(Sample, FrequenciesFollowTheDistribution) {
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f, -1.0f};
  double total = 0;
  for (const float logit : logits) total += std::exp(double{logit} / 0.7);
  std::vector<int> counts(4);
  const int draws = 40000;
  for (int i = 0; i < draws; ++i) {
    ++counts[static_cast<size_t>(
        draw(logits, {.temperature = 0.7f, .seed = 7, .position = static_cast<uint64_t>(i)}))];
  }
  for (size_t v = 0; v < 4; ++v) {
    const double p = std::exp(logits[v] / 0.7) / total;
    EXPECT_NEAR(counts[v], draws * p, 5 * std::sqrt(draws * p * (1 - p)) + 1) << v;
  }
}

TEST_F(Sample, FiltersKeepWhatTheySay) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  for (uint64_t i = 0; i < 300; ++i) {
    EXPECT_LE(draw(logits, {.top_k = 2, .seed = 1, .position = i}), 1);
    EXPECT_LE(draw(logits, {.top_p = 0.79f, .seed = 2, .position = i}), 1);
    EXPECT_LE(draw(logits, {.top_p = 0.81f, .seed = 2, .position = i}), 2);
    EXPECT_EQ(draw(logits, {.top_p = 0.0f, .seed = 2, .position = i}), 0);
    EXPECT_LE(draw(logits, {.min_p = 0.25f, .seed = 3, .position = i}), 2);
  }
}

TEST_F(Sample, PenaltiesAndBias) {
  history_ = {{0, 2}, {1, 0}};
  bias_ = {{2, -INFINITY}};
  // Id 0: 4/2 - 0.5 - 2*0.25 = 1; id 1 (prompt only): 3/2; id 2 banned; id 3: 1.25.
  EXPECT_EQ(draw({4, 3, 9, 1.25f}, {.temperature = 0,
                                    .repetition_penalty = 2,
                                    .presence_penalty = 0.5f,
                                    .frequency_penalty = 0.25f,
                                    .history_end = 2,
                                    .bias_end = 1}),
            1);
}

TEST_F(Sample, PendingTokensCountAsHistory) {
  history_ = {{0, 2}, {1, 0}};
  previous_tokens_ = {3, 0, 1};
  SampleRow row{.temperature = 0,
                .repetition_penalty = 2,
                .presence_penalty = 0.5f,
                .frequency_penalty = 0.25f,
                .history_end = 2};
  // Id 0: 4/2 - 0.5 - 2*0.25 = 1, once more 0.75. Id 1, of the prompt: 3/2, drawn once 0.75. Id 3,
  // new: 1.25, drawn once 1.25/2 - 0.75.
  const std::vector<float> logits = {4, 3, -9, 1.25f};
  EXPECT_EQ(draw(logits, row), 1);
  row.pending = 2;
  EXPECT_EQ(draw(logits, row), 3);
  EXPECT_EQ(draw({4, 3, -9, 0.9f}, row), 0);
  row.pending = 1;
  EXPECT_EQ(draw({4, 1.8f, -9, 0.5f}, row), 1);  // 0.9 against 0.75
  row.pending = 0;
  EXPECT_EQ(draw({4, 1.8f, -9, 3.2f}, row), 0);  // 1 against 0.9 and 3.2/2 - 0.75
}

TEST_F(Sample, LogprobsAreTheModels) {
  bias_ = {{1, -INFINITY}};
  EXPECT_EQ(draw({std::log(0.2f), std::log(0.5f), std::log(0.3f)},
                 {.temperature = 0, .bias_end = 1, .num_logprobs = 2}),
            2);
  EXPECT_NEAR(logprob_, std::log(0.3f), 1e-6);
  EXPECT_EQ(top_tokens_[0], 1);
  EXPECT_NEAR(top_logprobs_[0], std::log(0.5f), 1e-6);
  EXPECT_EQ(top_tokens_[1], 2);
  EXPECT_EQ(top_tokens_[2], -1);
}

TEST_F(Sample, OnlyIdsOfTheMaskAreDrawnAndLogprobsDoNotChange) {
  // [masks, 1]: ids 1 and 3, then id 0. Two rows with one mask each and one without.
  const uint64_t masks[] = {0b1010, 0b0001};
  const SampleRow rows[] = {{.temperature = 0, .num_logprobs = 1, .mask = 0},
                            {.temperature = 2, .top_k = 1, .num_logprobs = 1, .mask = 1},
                            {.temperature = 0, .num_logprobs = 1}};
  std::vector<float> logits;
  for (int r = 0; r < 3; ++r) logits.insert(logits.end(), {0.0f, 1.0f, 5.0f, 2.0f});
  int32_t tokens[3], top_tokens[3];
  float logprobs[3], top_logprobs[3];
  backend_->sample({.num_rows = 3,
                    .vocab_size = 4,
                    .rows = rows,
                    .masks = masks,
                    .mask_words = 1,
                    .max_logprobs = 1},
                   logits.data(), {tokens, logprobs, top_tokens, top_logprobs});
  EXPECT_EQ(tokens[0], 3);
  EXPECT_EQ(tokens[1], 0);
  EXPECT_EQ(tokens[2], 2);
  for (const int32_t top : top_tokens) EXPECT_EQ(top, 2);  // the model's own best
  EXPECT_NEAR(logprobs[2] - logprobs[0], 3.0, 1e-5);
  EXPECT_NEAR(logprobs[2] - logprobs[1], 5.0, 1e-5);
}

TEST_F(Sample, ForcedTokenIsTakenWhateverTheLogitsSay) {
  bias_ = {{2, -INFINITY}};
  const SampleRow row{.temperature = 0, .bias_end = 1, .num_logprobs = 1, .forced_token = 2};
  EXPECT_EQ(draw({std::log(0.2f), std::log(0.5f), std::log(0.3f)}, row), 2);
  EXPECT_NEAR(logprob_, std::log(0.3f), 1e-6);
  EXPECT_EQ(top_tokens_[0], 1);
}

TEST(ReferenceLinear, Int4MatchesItsDefinition) {
  // Two output rows share a byte: low nibble = even row. Group of 2 here is not a real size, only
  // easy to read.
  const uint8_t bytes[4] = {0x1f, 0x82, 0x07, 0xe3};  // row 0: -1 2 7 3, row 1: 1 -8 0 -2
  const float scales[4] = {0.5f, 2.0f, 1.0f, 4.0f};
  const float pre_scale[4] = {1, 1, 2, 1};
  const float x[4] = {1, 2, 3, 4};
  const LinearOperand w{.layout = WeightLayout::kInt4Portable,
                        .out_features = 2,
                        .in_features = 4,
                        .group_size = 2,
                        .weight = bytes,
                        .scales = scales,
                        .pre_scale = pre_scale};
  float y[2] = {NAN, NAN};
  const auto backend = make_reference_backend();
  backend->linear(x, w, 1, false, y);
  EXPECT_FLOAT_EQ(y[0], 0.5f * (-1 * 1 + 2 * 2) + 2.0f * (7 * 6 + 3 * 4));
  EXPECT_FLOAT_EQ(y[1], 1.0f * (1 * 1 - 8 * 2) + 4.0f * (0 * 6 - 2 * 4));
  backend->linear(x, w, 1, true, y);
  EXPECT_FLOAT_EQ(y[1], 2 * (1.0f * (1 * 1 - 8 * 2) + 4.0f * (0 * 6 - 2 * 4)));
}

// Up to 64 rows 128 channels share a scale, above a row has one.
TEST(ReferenceLinear, E4m3ScalesAreOfGroupsOrRows) {
  std::vector<uint8_t> bytes(130, 0x01);  // row 0 is the sum of all channels, row 1 nothing
  const float scales[2] = {1.0f, 1.0f};
  const LinearOperand w{.layout = WeightLayout::kInt4Portable,
                        .out_features = 2,
                        .in_features = 130,
                        .group_size = 130,
                        .weight = bytes.data(),
                        .scales = scales};
  for (const int rows : {64, 65}) {
    std::vector<float> x(static_cast<size_t>(rows) * 130, 0.0f), y(static_cast<size_t>(rows) * 2);
    x[0] = 448.0f;
    x[129] = 17.5f;  // the largest of its group; a step is 2 beside 448
    make_reference_backend(ActivationPrecision::kE4m3)->linear(x.data(), w, rows, false, y.data());
    EXPECT_FLOAT_EQ(y[0], rows == 64 ? 465.5f : 466.0f);
  }
}

TEST(ReferenceLinear, E4m3RoundsPerToken) {
  const uint8_t bytes[2] = {0x01, 0x10};  // row 0 is channel 0, row 1 channel 1
  const float scales[2] = {1.0f, 1.0f};
  const LinearOperand w{.layout = WeightLayout::kInt4Portable,
                        .out_features = 2,
                        .in_features = 2,
                        .group_size = 2,
                        .weight = bytes,
                        .scales = scales};
  // 448 makes the step near 17 one of 2; 2^-101 is too small to have a scale; an infinity spoils
  // its token alone.
  const float x[8] = {17.1f, 448.0f, 0x1p-101f, 0.0f, 1.0f, INFINITY, 0x1.cp-3f, -0x1.cp-2f};
  float y[8], exact[8];
  make_reference_backend(ActivationPrecision::kE4m3)->linear(x, w, 4, false, y);
  EXPECT_FLOAT_EQ(y[0], 18.0f);
  EXPECT_FLOAT_EQ(y[1], 448.0f);
  EXPECT_EQ(y[2], 0.0f);
  EXPECT_TRUE(std::isnan(y[4]));
  EXPECT_FLOAT_EQ(y[6], 0x1.cp-3f);  // 224 of 448
  make_reference_backend()->linear(x, w, 2, false, exact);
  EXPECT_FLOAT_EQ(exact[0], 17.1f);
}

TEST(ReferenceKv, Int8RoundTripIsWithinHalfAStep) {
  const auto backend = make_reference_backend();
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const int heads = 2, kv_heads = 1, d = 4, block_tokens = 2;
  std::vector<float> qkv(3 * (heads + 2 * kv_heads) * d);
  for (float& v : qkv) v = normal(random);
  const std::vector<float> original = qkv;
  std::vector<float> cos(8 * d / 2, 1.0f), sin(8 * d / 2, 0.0f);  // no rotation
  const RopeTable rope{cos.data(), sin.data(), 8};
  Buffer cache = backend->alloc(
      4 * backend->kv_block_bytes(KvFormat::kInt8Dynamic, block_tokens, kv_heads, d));
  const KvLayer kv{.format = KvFormat::kInt8Dynamic,
                   .num_blocks = 4,
                   .block_tokens = block_tokens,
                   .num_kv_heads = kv_heads,
                   .head_dim = d,
                   .data = cache.data()};
  const int32_t positions[3] = {0, 1, 2}, starts[2] = {0, 3}, lens[1] = {3}, table[2] = {3, 1};
  const StepBatch batch{.num_tokens = 3,
                        .num_seqs = 1,
                        .max_blocks_per_seq = 2,
                        .positions = positions,
                        .seq_starts = starts,
                        .kv_lens = lens,
                        .block_tables = table,
                        .host_seq_starts = starts,
                        .host_kv_lens = lens};
  backend->rope_store_kv(batch, qkv.data(), heads, rope, kv);
  EXPECT_EQ(qkv, original);
  std::vector<float> y(3 * heads * d, NAN);
  backend->attention(batch, qkv.data(), heads, kv, nullptr, y.data());
  // Token 0 sees only itself: its output is its own V, dequantized.
  float amax = 0;
  const float* v = original.data() + (heads + kv_heads) * d;
  for (int i = 0; i < d; ++i) amax = std::max(amax, std::fabs(v[i]));
  for (int i = 0; i < d; ++i) EXPECT_NEAR(y[static_cast<size_t>(i)], v[i], amax / 254 * 1.001f);
}

}  // namespace
}  // namespace nibble
