// The search and the roundings against brute force and against each other, on small made-up
// linears. SPDX-License-Identifier: Apache-2.0
#include "quantize/awq.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "base/half.h"
#include "quantize/drift.h"
#include "quantize/gemm.h"
#include "quantize/rounding.h"

namespace nibble::awq {
namespace {

struct Problem {
  int64_t out, in, tokens;
  std::vector<float> x, w;  // [tokens, in], [out, in]
  DenseLinear linear() const { return {w.data(), out}; }
};

// Inputs with correlated channels; channels listed in `outliers` are `factor` times as loud.
Problem make_problem(int64_t out, int64_t in, int64_t tokens, std::vector<int64_t> outliers = {},
                     float factor = 30) {
  Problem p{out, in, tokens, {}, {}};
  std::mt19937 random(static_cast<unsigned>(out * 7919 + in));
  std::normal_distribution<float> normal;
  for (int64_t t = 0; t < tokens; ++t) {
    const float common = normal(random);
    for (int64_t j = 0; j < in; ++j) p.x.push_back(0.5f * common + normal(random));
  }
  for (int64_t i = 0; i < out * in; ++i) p.w.push_back(0.03f * normal(random));
  for (const int64_t j : outliers) {
    for (int64_t t = 0; t < tokens; ++t) p.x[static_cast<size_t>(t * in + j)] *= factor;
  }
  return p;
}

InputStatistics statistics_of(ThreadPool& pool, const Problem& p, uint64_t max_bytes = 1u << 30,
                              int64_t group = 64) {
  InputStatistics statistics(p.in, group, max_bytes);
  const int64_t half = p.tokens / 2;  // two steps: adding must not depend on how tokens arrive
  statistics.add(pool, p.x.data(), half);
  statistics.add(pool, p.x.data() + half * p.in, p.tokens - half);
  statistics.finish(pool);
  return statistics;
}

// Mean over tokens of the squared output error, summed over outputs: the objective by definition.
double token_loss(const Problem& p, const std::vector<float>& dequantized) {
  double loss = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t n = 0; n < p.out; ++n) {
      double y = 0;
      for (int64_t j = 0; j < p.in; ++j) {
        const size_t at = static_cast<size_t>(n * p.in + j);
        y += double{p.x[static_cast<size_t>(t * p.in + j)]} *
             (double{p.w[at]} - double{dequantized[at]});
      }
      loss += y * y;
    }
  }
  return loss / static_cast<double>(p.tokens);
}

double relative_token_loss(const Problem& p, const std::vector<float>& dequantized) {
  return token_loss(p, dequantized) / token_loss(p, std::vector<float>(p.w.size(), 0.0f));
}

QuantizedGroup run(ThreadPool& pool, const Problem& p, const RoundingOptions& options,
                   uint64_t max_bytes = 1u << 30) {
  const DenseLinear linear = p.linear();
  return quantize_group(pool, {&linear, 1}, p.in,
                        statistics_of(pool, p, max_bytes, options.group_size), options);
}

TEST(Gemm, MatchesPlainSumsForOddSizesAndStrides) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const auto& [m, n, k] :
       {std::array<int64_t, 3>{1, 1, 1}, {7, 33, 5}, {200, 300, 270}, {193, 257, 256}}) {
    std::vector<float> a(static_cast<size_t>(m * k)), b(static_cast<size_t>(n * k));
    for (float& v : a) v = normal(random);
    for (float& v : b) v = normal(random);
    const int64_t ldc = n + 3;
    std::vector<float> c(static_cast<size_t>(m * ldc), 0.5f);
    // a is stored transposed: element (i, k) at k * m + i.
    gemm(m, n, k, {a.data(), 1, m}, {b.data(), k, 1}, true, c.data(), ldc);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0.5;
        for (int64_t p = 0; p < k; ++p) {
          sum +=
              double{a[static_cast<size_t>(p * m + i)]} * double{b[static_cast<size_t>(j * k + p)]};
        }
        ASSERT_NEAR(c[static_cast<size_t>(i * ldc + j)], sum, 2e-4) << m << " " << n << " " << k;
      }
      for (int64_t j = n; j < ldc; ++j)
        ASSERT_EQ(c[static_cast<size_t>(i * ldc + j)], 0.5f) << "wrote past the row";
    }
  }
}

TEST(RoundToNearest, IsAmaxOverSevenHalfToEvenAndClamped) {
  ThreadPool pool(2);
  std::vector<float> w(256, 0.0f);
  w[0] = 7.0f, w[1] = 0.5f, w[2] = 1.5f, w[3] = 2.5f, w[4] = -0.5f, w[5] = -1.5f, w[6] = -7.0f,
  w[7] = 3.49f;
  const CheckpointLinear out = round_to_nearest(pool, {w.data(), 1}, 256, 128);
  ASSERT_EQ(out.scales.size(), 2u);
  EXPECT_EQ(out.scales[0], 1.0f);
  EXPECT_EQ(out.scales[1], 1.0f) << "a group of zeros gets scale 1";
  const std::vector<int> want = {7, 0, 2, 2, 0, -2, -7, 3};
  for (size_t i = 0; i < want.size(); ++i) EXPECT_EQ(out.q[i], want[i]) << i;
  EXPECT_EQ(out.pre_scale, std::vector<float>(256, 1.0f));

  std::vector<float> tiny(128, 0.0f);
  tiny[5] = 1e-45f;  // amax / 7 underflows to zero
  EXPECT_EQ(round_to_nearest(pool, {tiny.data(), 1}, 128, 128).scales[0], 1.0f);

  w[0] = -3.0f, w[6] = 0, w[7] = 0;  // amax from a negative weight: -7 is reached, -8 is not
  const CheckpointLinear negative = round_to_nearest(pool, {w.data(), 1}, 256, 128);
  EXPECT_EQ(negative.scales[0], 3.0f / 7.0f);
  EXPECT_EQ(negative.q[0], -7);
}

TEST(InputStatistics, GramIsTheMeanOuterProductWhateverTheStepsAndBlocks) {
  ThreadPool pool(2);
  const Problem p = make_problem(1, 320, 37);
  const InputStatistics whole = statistics_of(pool, p);
  ASSERT_EQ(whole.gram().block, 320);
  EXPECT_EQ(whole.tokens(), 37);
  const InputStatistics cut = statistics_of(pool, p, 320 * 64 * sizeof(float));
  ASSERT_EQ(cut.gram().block, 64);
  float max_abs = 0;
  for (int64_t i = 0; i < p.in; ++i) {
    double sum_abs = 0;
    for (int64_t t = 0; t < p.tokens; ++t) {
      sum_abs += std::fabs(double{p.x[static_cast<size_t>(t * p.in + i)]});
      max_abs = std::max(max_abs, std::fabs(p.x[static_cast<size_t>(t * p.in + i)]));
    }
    EXPECT_NEAR(whole.mean_abs()[static_cast<size_t>(i)], sum_abs / 37, 1e-5);
    for (int64_t j = 0; j < p.in; ++j) {
      double sum = 0;
      for (int64_t t = 0; t < p.tokens; ++t) {
        sum += double{p.x[static_cast<size_t>(t * p.in + i)]} *
               double{p.x[static_cast<size_t>(t * p.in + j)]};
      }
      ASSERT_NEAR(whole.gram().at(0)[i * 320 + j], sum / 37, 1e-4) << i << " " << j;
      if (i / 64 == j / 64) {
        ASSERT_NEAR(cut.gram().at(i / 64)[i % 64 * 64 + j % 64], sum / 37, 1e-4) << i << " " << j;
      }
    }
  }
  EXPECT_EQ(whole.max_abs(), max_abs);
}

TEST(Factor, TimesItselfIsTheDampedGram) {
  ThreadPool pool(2);
  const Problem p = make_problem(1, 320, 500);
  const InputStatistics input = statistics_of(pool, p);
  std::vector<float> factor;
  EXPECT_EQ(factor_gram(pool, input.gram(), 0.02f, factor), 0.02f);
  // Rows are divided by their diagonal, so R^T R needs the diagonal back: d_i^2 is what the row
  // leaves of H_ii.
  std::vector<double> d2(320);
  const float* g = input.gram().at(0);
  for (int64_t i = 0; i < 320; ++i) {
    d2[static_cast<size_t>(i)] = double{g[i * 321]} * 1.02;
    for (int64_t k = 0; k < i; ++k) {
      d2[static_cast<size_t>(i)] -= d2[static_cast<size_t>(k)] *
                                    std::pow(double{factor[static_cast<size_t>(k * 320 + i)]}, 2);
    }
    ASSERT_GT(d2[static_cast<size_t>(i)], 0);
  }
  for (int64_t i = 0; i < 320; i += 7) {
    for (int64_t j = i + 1; j < 320; j += 5) {
      double sum = 0;
      for (int64_t k = 0; k <= i; ++k) {
        sum += d2[static_cast<size_t>(k)] * double{factor[static_cast<size_t>(k * 320 + i)]} *
               double{factor[static_cast<size_t>(k * 320 + j)]};
      }
      ASSERT_NEAR(sum, g[i * 320 + j], 1e-3) << i << " " << j;
    }
  }
}

TEST(Factor, SurvivesDeadChannelsAndFewTokens) {
  ThreadPool pool(2);
  Problem p = make_problem(16, 256, 20);  // rank 20 of 256
  for (int64_t t = 0; t < p.tokens; ++t) p.x[static_cast<size_t>(t * p.in + 3)] = 0;
  const QuantizedGroup result = run(pool, p, {});
  const std::vector<float> weight = dequantize(pool, result.linears[0], p.in);
  for (const float w : weight) ASSERT_TRUE(std::isfinite(w));
  EXPECT_LT(result.report.error, result.report.error_rtn);
}

TEST(Objective, EqualsTheTokenLoss) {
  ThreadPool pool(2);
  const Problem p = make_problem(24, 256, 600, {17, 200});
  for (const Rounding rounding : {Rounding::kNearest, Rounding::kCompensated}) {
    const QuantizedGroup result = run(pool, p, {.group_size = 64, .rounding = rounding});
    const double by_tokens = relative_token_loss(p, dequantize(pool, result.linears[0], p.in));
    EXPECT_NEAR(result.report.error / by_tokens, 1, 2e-3);
  }
  const double rtn =
      relative_token_loss(p, dequantize(pool, round_to_nearest(pool, p.linear(), p.in, 64), p.in));
  EXPECT_NEAR(run(pool, p, {.group_size = 64}).report.error_rtn / rtn, 1, 0.02)
      << "scales are rounded to bf16 here";
}

TEST(Search, EachStepLosesLess) {
  ThreadPool pool(2);
  const Problem p = make_problem(160, 512, 1500, {5, 130, 300});
  const RoundingOptions nearest = {.rounding = Rounding::kNearest, .clip = false};
  const RoundingOptions clipped = {.rounding = Rounding::kNearest};
  const GroupReport scaled = run(pool, p, nearest).report;
  EXPECT_LE(scaled.error, scaled.error_rtn);
  EXPECT_NEAR(scaled.error, scaled.error_scaled, scaled.error * 1e-6);
  const double clip = run(pool, p, clipped).report.error;
  EXPECT_LT(clip, scaled.error);
  const double once = run(pool, p, {.sweeps = 0}).report.error;
  EXPECT_LT(once, clip * 0.95);
  const double refined = run(pool, p, {.sweeps = 3}).report.error;
  EXPECT_LT(refined, once * 0.98);
}

TEST(Search, RecoversOutlierChannels) {
  ThreadPool pool(2);
  const Problem p = make_problem(128, 256, 800, {9, 77, 140, 201}, 50);
  const Problem plain = make_problem(128, 256, 800);
  const double rtn =
      relative_token_loss(p, dequantize(pool, round_to_nearest(pool, p.linear(), p.in, 128), p.in));
  const double awq = relative_token_loss(
      p, dequantize(pool, run(pool, p, {.rounding = Rounding::kNearest}).linears[0], p.in));
  EXPECT_LT(awq, rtn / 5);
}

// An equivalent model: channels made loud by a power of two and the weights that read them as much
// smaller. Nothing that a quantizer sees as error should change much.
TEST(Search, UndoesAnEquivalentRescalingOfChannels) {
  ThreadPool pool(2);
  const Problem plain = make_problem(128, 256, 800);
  Problem loud = plain;
  for (const int64_t j : {3, 99, 180}) {
    for (int64_t t = 0; t < loud.tokens; ++t) loud.x[static_cast<size_t>(t * loud.in + j)] *= 32;
    for (int64_t n = 0; n < loud.out; ++n) loud.w[static_cast<size_t>(n * loud.in + j)] /= 32;
  }
  const GroupReport a = run(pool, plain, {}).report, b = run(pool, loud, {}).report;
  EXPECT_GT(b.error_rtn, a.error_rtn * 1.05)
      << "rounding to nearest must suffer, or this tests nothing";
  EXPECT_LT(b.error, a.error * 1.1);
}

TEST(Descend, NeverRaisesTheLossAndEndsInALocalMinimum) {
  ThreadPool pool(1);
  const Problem p = make_problem(8, 128, 400);
  const InputStatistics input = statistics_of(pool, p);
  const std::vector<float> pre(128, 1.0f);
  Panel panel;
  panel.rows = p.out, panel.features = p.in, panel.group = 64, panel.weight = p.w.data(),
  panel.pre = pre.data();
  const float ratio[] = {1.0f};
  choose_scales(panel, input.gram(), ratio, DType::kF32);
  round_nearest(panel);
  double loss = panel_loss(panel, input.gram());
  for (int sweep = 0; sweep < 30; ++sweep) {
    descend(panel, input.gram(), 1, DType::kF32);
    const double next = panel_loss(panel, input.gram());
    EXPECT_LE(next, loss * (1 + 1e-5));
    loss = next;
  }
  // No single integer of the first row can be moved by one to gain anything.
  for (int64_t j = 0; j < p.in; ++j) {
    for (const float move : {-1.0f, 1.0f}) {
      const float q = panel.q[static_cast<size_t>(j)] + move;
      if (q < -8 || q > 7) continue;
      const float keep = panel.error[static_cast<size_t>(j)];
      panel.error[static_cast<size_t>(j)] -= move * panel.scales[static_cast<size_t>(j / 64)];
      EXPECT_GE(panel_loss(panel, input.gram()), loss * (1 - 1e-5)) << j;
      panel.error[static_cast<size_t>(j)] = keep;
    }
  }
}

TEST(Result, IsWithinHalfAStepAndExactInTheCheckpointsType) {
  ThreadPool pool(2);
  const Problem p = make_problem(96, 256, 300, {11});
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    const QuantizedGroup result =
        run(pool, p, {.dtype = dtype, .rounding = Rounding::kNearest, .clip = false});
    const CheckpointLinear& linear = result.linears[0];
    const std::vector<float> weight = dequantize(pool, linear, p.in);
    for (const float pre : linear.pre_scale) ASSERT_EQ(pre, round_to(dtype, pre));
    for (const float scale : linear.scales) ASSERT_EQ(scale, round_to(DType::kBF16, scale));
    for (int64_t n = 0; n < p.out; ++n) {
      for (int64_t j = 0; j < p.in; ++j) {
        const size_t at = static_cast<size_t>(n * p.in + j);
        const float step = linear.scales[static_cast<size_t>(n * 2 + j / 128)] *
                           linear.pre_scale[static_cast<size_t>(j)];
        ASSERT_EQ(weight[at], static_cast<float>(linear.q[at]) * step);
        ASSERT_LE(std::fabs(weight[at] - p.w[at]), 0.5001f * step) << n << " " << j;
      }
    }
  }
}

TEST(Result, SharesOnePreScaleAmongLinearsOfOneInput) {
  ThreadPool pool(2);
  const Problem p = make_problem(200, 128, 300, {4});
  const DenseLinear parts[] = {{p.w.data(), 130}, {p.w.data() + 130 * 128, 70}};
  const QuantizedGroup split = quantize_group(pool, parts, 128, statistics_of(pool, p), {});
  ASSERT_EQ(split.linears.size(), 2u);
  EXPECT_EQ(split.linears[0].pre_scale, split.linears[1].pre_scale);
  EXPECT_EQ(split.linears[0].q.size(), 130u * 128);
  EXPECT_EQ(split.linears[1].scales.size(), 70u);
  // Rows are quantized independently once the scale is chosen: joined, the rows come out the same.
  const QuantizedGroup joined = run(pool, p, {});
  ASSERT_EQ(joined.linears[0].pre_scale, split.linears[0].pre_scale);
  int different = 0;
  for (size_t i = 0; i < joined.linears[0].q.size(); ++i) {
    const CheckpointLinear& part = split.linears[i < 130 * 128 ? 0 : 1];
    different += joined.linears[0].q[i] != part.q[i < 130 * 128 ? i : i - 130 * 128];
  }
  EXPECT_EQ(different, 0);
}

TEST(Result, DoesNotDependOnTheNumberOfThreads) {
  const Problem p = make_problem(300, 384, 500, {40});
  for (const Rounding rounding : {Rounding::kNearest, Rounding::kCompensated}) {
    ThreadPool one(1), three(3);
    const QuantizedGroup a = run(one, p, {.rounding = rounding}),
                         b = run(three, p, {.rounding = rounding});
    EXPECT_EQ(a.linears[0].q, b.linears[0].q);
    EXPECT_EQ(a.linears[0].scales, b.linears[0].scales);
    EXPECT_EQ(a.linears[0].pre_scale, b.linears[0].pre_scale);
    EXPECT_EQ(a.report.error, b.report.error);
  }
}

TEST(Result, OfAGramCutToBlocksStillBeatsRoundingToNearest) {
  ThreadPool pool(2);
  const Problem p = make_problem(64, 512, 900, {100});
  const double whole = relative_token_loss(p, dequantize(pool, run(pool, p, {}).linears[0], p.in));
  const double cut = relative_token_loss(
      p, dequantize(pool, run(pool, p, {}, 512 * 128 * sizeof(float)).linears[0], p.in));
  const double rtn =
      relative_token_loss(p, dequantize(pool, round_to_nearest(pool, p.linear(), p.in, 128), p.in));
  EXPECT_LT(whole, cut);
  EXPECT_LT(cut, rtn * 0.7);
}

TEST(Lite, IsModelOptsFormulaOnASingleGroup) {
  ThreadPool pool(2);
  const Problem p = make_problem(8, 128, 300, {9}, 40);
  const InputStatistics input = statistics_of(pool, p, 1u << 30, 128);
  const DenseLinear part = p.linear();
  const LiteResult result = quantize_lite(pool, {&part, 1}, 128, input, {.dtype = DType::kF32});
  ASSERT_EQ(result.alphas.size(), 1u);
  // The formula again, naively, for every alpha; the search must have found the least token loss.
  double best = 0, best_alpha = -1;
  for (int step = 0; step <= 10; ++step) {
    const double alpha = step / 10.0;
    std::vector<double> s(128);
    for (size_t j = 0; j < 128; ++j) {
      double act = 0, weight = 0;
      for (int64_t t = 0; t < p.tokens; ++t)
        act += std::fabs(p.x[static_cast<size_t>(t) * 128 + j]) / static_cast<double>(p.tokens);
      for (size_t n = 0; n < 8; ++n) {
        float widest = 0;
        for (size_t i = 0; i < 128; ++i) widest = std::max(widest, std::fabs(p.w[n * 128 + i]));
        weight += std::fabs(p.w[n * 128 + j]) / widest / 8;
      }
      s[j] = std::pow(act, alpha) / std::pow(weight, 1 - alpha);
    }
    const auto [least, most] = std::minmax_element(s.begin(), s.end());
    const double norm = std::sqrt(*least * *most);
    std::vector<float> dequantized(p.w.size());
    for (size_t n = 0; n < 8; ++n) {
      double widest = 0;
      for (size_t j = 0; j < 128; ++j)
        widest = std::max(widest, std::fabs(double{p.w[n * 128 + j]} * s[j] / norm));
      for (size_t j = 0; j < 128; ++j) {
        const double q = std::nearbyint(double{p.w[n * 128 + j]} * s[j] / norm / (widest / 7));
        dequantized[n * 128 + j] =
            static_cast<float>(std::clamp(q, -8.0, 7.0) * widest / 7 / (s[j] / norm));
      }
    }
    const double loss = token_loss(p, dequantized);
    if (best_alpha < 0 || loss < best) best = loss, best_alpha = alpha;
  }
  EXPECT_DOUBLE_EQ(result.alphas[0], best_alpha);
  EXPECT_NEAR(token_loss(p, dequantize(pool, result.linear, 128)) / best, 1, 1e-3);
}

TEST(Lite, AveragesThePreScalesOfPartsOfOneLinear) {
  ThreadPool pool(2);
  const Problem p = make_problem(48, 256, 300, {9});
  const InputStatistics input = statistics_of(pool, p, 1u << 30, 128);
  const DenseLinear parts[] = {{p.w.data(), 16}, {p.w.data() + 16 * 256, 32}};
  const LiteResult both = quantize_lite(pool, parts, 256, input, {});
  const LiteResult a = quantize_lite(pool, {parts, 1}, 256, input, {}),
                   b = quantize_lite(pool, {parts + 1, 1}, 256, input, {});
  ASSERT_EQ(both.linear.q.size(), 48u * 256);
  ASSERT_EQ(both.alphas, (std::vector<double>{a.alphas[0], b.alphas[0]}));
  for (size_t j = 0; j < 256; ++j) {
    EXPECT_EQ(both.linear.pre_scale[j],
              round_to(DType::kBF16, (a.linear.pre_scale[j] + b.linear.pre_scale[j]) / 2));
  }
  EXPECT_LT(both.report.error, both.report.error_rtn * 1.2);
}

// Inputs that have moved, as the quantized layers before move them: the corrected weight must give
// outputs closer to those of the unquantized model than the weight itself does.
TEST(Drift, CorrectionIsTheDampedLeastSquaresAnswer) {
  ThreadPool pool(2);
  const Problem dense = make_problem(40, 256, 2000);
  Problem moved = dense;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (int64_t t = 0; t < moved.tokens; ++t) {
    for (int64_t j = 0; j < moved.in; ++j) {
      float& x = moved.x[static_cast<size_t>(t * moved.in + j)];
      x = 0.95f * x + 0.02f * dense.x[static_cast<size_t>(t * moved.in + (j + 1) % moved.in)] +
          0.05f * normal(random);
    }
  }
  std::vector<float> residual(static_cast<size_t>(moved.tokens * moved.out));
  for (int64_t t = 0; t < moved.tokens; ++t) {
    for (int64_t n = 0; n < moved.out; ++n) {
      residual[static_cast<size_t>(t * moved.out + n)] =
          0.1f * moved.x[static_cast<size_t>(t * moved.in + n)];
    }
  }
  InputStatistics input(256, 128, 1u << 30);
  input.add(pool, moved.x.data(), moved.tokens);
  input.add_drift(pool, moved.x.data(), dense.x.data(), residual.data(), moved.out, moved.tokens);
  input.finish(pool);
  // Of (x_dense w^T + residual) - x w^T.
  const auto loss = [&](const std::vector<float>& w) {
    double sum = 0;
    for (int64_t t = 0; t < moved.tokens; ++t) {
      for (int64_t n = 0; n < moved.out; ++n) {
        double e = residual[static_cast<size_t>(t * moved.out + n)];
        for (int64_t j = 0; j < moved.in; ++j) {
          e += double{dense.x[static_cast<size_t>(t * moved.in + j)]} *
                   double{dense.w[static_cast<size_t>(n * moved.in + j)]} -
               double{moved.x[static_cast<size_t>(t * moved.in + j)]} *
                   double{w[static_cast<size_t>(n * moved.in + j)]};
        }
        sum += e * e;
      }
    }
    return sum;
  };
  const double before = loss(dense.w);
  std::vector<float> half = dense.w, whole = dense.w, none = dense.w;
  correct_drift(pool, input, 0.5f, half);
  correct_drift(pool, input, 1.0f, whole);
  EXPECT_LT(loss(half), before * 0.5);
  EXPECT_LT(loss(whole), loss(half) * 0.6);
  for (const float nudge : {0.99f, 1.01f}) {  // the bottom of the valley, but for the damping
    std::vector<float> near = whole;
    for (size_t i = 0; i < near.size(); ++i) near[i] = dense.w[i] + nudge * (whole[i] - dense.w[i]);
    EXPECT_GT(loss(near), loss(whole) * 0.995);
  }
  InputStatistics still(256, 128, 1u << 30);
  still.add(pool, moved.x.data(), moved.tokens);
  still.finish(pool);
  correct_drift(pool, still, 1.0f, none);
  EXPECT_EQ(none, dense.w);
}

}  // namespace
}  // namespace nibble::awq
