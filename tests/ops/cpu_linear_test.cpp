// linear, gate_up, embed, rms_norm and lm_head of the cpu backend on every instruction set this
// machine has, against the reference; and the bitwise invariant. SPDX-License-Identifier:
// Apache-2.0
#include "base/error.h"
#include "cpu_test_util.h"

namespace nibble::ops {
namespace {

class CpuLinear : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Isa, CpuLinear, testing::ValuesIn(available_cpu_isas()), isa_test_name);

std::vector<float> normal(size_t n, uint64_t seed) {
  std::vector<float> x(n);
  fill_normal(x, seed);
  return x;
}

struct Weights {
  TestWeight w, up;
  Weights(Backend& backend, const LinearCase& c, WeightLayout layout)
      : w(backend, layout, c.out_features, c.in_features, c.group_size, c.seed, c.pre_scale),
        up(backend, layout, c.out_features, c.in_features, c.group_size, c.seed + 50, c.pre_scale) {
  }
};

/// Runs case `c` on `rows` rows of x. The old content of y (for add) and out_scale (for gate_up)
/// come from the seed.
std::vector<float> run(Backend& backend, const LinearCase& c, const Weights& weights,
                       const float* x, int rows, const float* old_y, bool drop_pre_scale = false) {
  const auto n = static_cast<size_t>(c.out_features);
  GuardedOutput y(backend, static_cast<size_t>(rows) * n);
  if (c.add) y.fill(std::vector<float>(old_y, old_y + static_cast<size_t>(rows) * n));
  LinearOperand w = weights.w.operand(), up = weights.up.operand();
  LinearOperand w_copy = w;
  if (drop_pre_scale) {
    w_copy.pre_scale = nullptr;
    up.pre_scale = nullptr;
  } else {
    up.pre_scale = w.pre_scale;  // gate and up share their input, so they share its pre-scale
  }
  const Buffer in = to_device(
      backend, x, static_cast<size_t>(rows) * static_cast<size_t>(c.in_features) * sizeof(float));
  if (c.gate_up) {
    const std::vector<float> out_scale = normal(n, c.seed + 9);
    const Buffer scale = to_device(backend, out_scale);
    backend.gate_up(in.data(), w_copy, up, rows, c.seed % 2 == 0 ? scale.as<float>() : nullptr,
                    y.data());
  } else {
    backend.linear(in.data(), w_copy, rows, c.add, y.data());
  }
  return y.read();
}

/// The specification of kInt8Group's rounding, naively: x * pre_scale to int8 by groups of 64 (32
/// when 64 does not divide the weight group), back to float.
std::vector<float> round_to_int8(const LinearCase& c, const std::vector<float>& x,
                                 const float* pre_scale) {
  const size_t group = c.group_size % 64 == 0 ? 64 : 32;
  const auto k = static_cast<size_t>(c.in_features);
  std::vector<float> out = x;
  if (pre_scale != nullptr) {
    for (size_t i = 0; i < out.size(); ++i) out[i] *= pre_scale[i % k];
  }
  for (size_t begin = 0; begin < out.size(); begin += group) {
    float amax = 0;
    for (size_t i = begin; i < begin + group; ++i) amax = std::max(amax, std::fabs(out[i]));
    if (amax == 0) continue;
    const float scale = amax / 127.0f, inverse = 127.0f / amax;
    for (size_t i = begin; i < begin + group; ++i)
      out[i] = std::nearbyint(out[i] * inverse) * scale;
  }
  return out;
}

WeightLayout portable_layout(WeightLayout layout) {
  return layout == WeightLayout::kCpuInt4   ? WeightLayout::kInt4Portable
         : layout == WeightLayout::kCpuInt8 ? WeightLayout::kInt8Portable
                                            : layout;
}

TEST_P(CpuLinear, MatchesReference) {
  const auto reference = make_reference_backend();
  const auto exact = make_cpu_backend(GetParam(), ActivationPrecision::kF32, 2);
  const auto int8 = make_cpu_backend(GetParam(), ActivationPrecision::kInt8Group, 2);
  for (const LinearCase& c : linear_cases()) {
    const WeightLayout portable = portable_layout(c.layout);
    const std::vector<float> x =
        normal(static_cast<size_t>(c.rows) * static_cast<size_t>(c.in_features), c.seed + 3);
    const std::vector<float> old_y =
        normal(static_cast<size_t>(c.rows) * static_cast<size_t>(c.out_features), c.seed + 4);
    const Weights ref_weights(*reference, c, portable);
    const std::vector<float> want = run(*reference, c, ref_weights, x.data(), c.rows, old_y.data());
    const Weights weights(*exact, c, c.layout);
    EXPECT_LT(relative_error(run(*exact, c, weights, x.data(), c.rows, old_y.data()), want), 2e-5)
        << c.name();
    if (portable == c.layout) continue;
    // int8: the same numbers as the reference fed with the rounded activations, and near the exact
    // ones.
    const std::vector<float> rounded = round_to_int8(c, x, ref_weights.w.operand().pre_scale);
    const std::vector<float> want8 =
        run(*reference, c, ref_weights, rounded.data(), c.rows, old_y.data(), true);
    const std::vector<float> got8 = run(*int8, c, weights, x.data(), c.rows, old_y.data());
    EXPECT_LT(relative_error(got8, want8), 5e-5) << c.name() << " int8";
    EXPECT_LT(rms_error(got8, want), 0.05) << c.name() << " int8 against exact";
  }
}

TEST_P(CpuLinear, ExtremeValuesDoNotSaturate) {
  // Every weight 7 or -8, every activation +-127 steps: the largest sums a 16-bit lane can meet.
  const auto reference = make_reference_backend();
  const auto cpu = make_cpu_backend(GetParam(), ActivationPrecision::kInt8Group, 1);
  const int n = 32, k = 256, group = 128;
  for (const int q : {7, -8}) {
    const Int4Matrix m{.out_features = n,
                       .in_features = k,
                       .group_size = group,
                       .q = std::vector<int8_t>(n * k, static_cast<int8_t>(q)),
                       .scales = std::vector<float>(n * k / group, 1.0f)};
    const PackedLinear packed = pack_int4(m, WeightLayout::kCpuInt4);
    const LinearOperand w{.layout = WeightLayout::kCpuInt4,
                          .out_features = n,
                          .in_features = k,
                          .group_size = group,
                          .weight = packed.weight.data()};
    for (const float sign : {1.0f, -1.0f}) {
      for (const int rows : {1, 2, 4, 13}) {
        const std::vector<float> x(static_cast<size_t>(rows * k), sign * 127.0f);
        GuardedOutput y(*cpu, static_cast<size_t>(rows * n));
        cpu->linear(x.data(), w, rows, false, y.data());
        for (const float value : y.read())
          ASSERT_EQ(value, sign * 127.0f * static_cast<float>(q * k));
      }
    }
  }
}

TEST_P(CpuLinear, ZeroAndTinyActivationsStayFinite) {
  const auto cpu = make_cpu_backend(GetParam(), ActivationPrecision::kInt8Group, 1);
  const LinearCase c{.out_features = 32, .in_features = 128, .group_size = 64};
  const Weights weights(*cpu, c, WeightLayout::kCpuInt4);
  for (const float value : {0.0f, 1e-40f, -1e-38f, 1e-20f}) {
    const std::vector<float> x(128, value);
    for (const float y : run(*cpu, c, weights, x.data(), 1, nullptr)) {
      ASSERT_TRUE(std::isfinite(y));
      if (std::fabs(value) < 1e-30f) {
        ASSERT_EQ(y, 0.0f);
      }
    }
  }
}

TEST_P(CpuLinear, RowsDoNotDependOnTheBatchOrTheThreads) {
  const int kRows = 230;  // more than every row block of every kernel
  const int shapes[][3] = {{50, 384, 64}, {130, 512, 128}, {98, 257, 0}, {37, 1100, 0}};
  for (const ActivationPrecision precision :
       {ActivationPrecision::kF32, ActivationPrecision::kInt8Group}) {
    const auto one = make_cpu_backend(GetParam(), precision, 1);
    const auto three = make_cpu_backend(GetParam(), precision, 3);
    for (const auto& [n, k, group] : shapes) {
      for (const bool gate_up : {false, true}) {
        LinearCase c{.layout = group != 0 ? WeightLayout::kCpuInt4 : WeightLayout::kBf16Rows,
                     .out_features = n,
                     .in_features = k,
                     .group_size = group,
                     .rows = kRows,
                     .pre_scale = true,
                     .gate_up = gate_up,
                     .seed = 4};
        const Weights weights(*one, c, c.layout);
        const std::vector<float> x = normal(static_cast<size_t>(kRows * k), 8);
        const std::vector<float> all = run(*one, c, weights, x.data(), kRows, nullptr);
        ASSERT_TRUE(same_bits(run(*three, c, weights, x.data(), kRows, nullptr).data(), all.data(),
                              all.size()))
            << c.name() << " 3 threads";
        for (const auto& [first, rows] : std::vector<std::pair<int, int>>{{0, 1},
                                                                          {57, 1},
                                                                          {229, 1},
                                                                          {3, 2},
                                                                          {3, 3},
                                                                          {10, 4},
                                                                          {1, 5},
                                                                          {2, 8},
                                                                          {7, 11},
                                                                          {7, 12},
                                                                          {7, 13},
                                                                          {30, 17},
                                                                          {9, 100},
                                                                          {1, 200}}) {
          const std::vector<float> some =
              run(first % 2 == 0 ? *one : *three, c, weights,
                  x.data() + static_cast<size_t>(first) * static_cast<size_t>(k), rows, nullptr);
          ASSERT_TRUE(same_bits(some.data(),
                                all.data() + static_cast<size_t>(first) * static_cast<size_t>(n),
                                some.size()))
              << c.name() << " rows " << first << '+' << rows
              << (precision == ActivationPrecision::kF32 ? " f32" : " int8");
        }
      }
    }
  }
}

TEST_P(CpuLinear, RefusesLayoutsOfOtherBackends) {
  const auto cpu = make_cpu_backend(GetParam(), ActivationPrecision::kF32, 1);
  const float x[64] = {};
  float y[2];
  EXPECT_THROW(cpu->linear(x,
                           {.layout = WeightLayout::kInt4Portable,
                            .out_features = 2,
                            .in_features = 64,
                            .group_size = 64,
                            .weight = x},
                           1, false, y),
               Error);
}

TEST_P(CpuLinear, EmbedNormAndHeadMatchReference) {
  const auto reference = make_reference_backend();
  for (const WeightLayout layout :
       {WeightLayout::kBf16Rows, WeightLayout::kF16Rows, WeightLayout::kF32Rows}) {
    for (const int hidden : {1, 7, 64, 100, 130}) {
      for (const int threads : {1, 3}) {
        const auto cpu = make_cpu_backend(GetParam(), ActivationPrecision::kF32, threads);
        const int vocab = 77, tokens = 300;
        const auto h = static_cast<size_t>(hidden);
        std::vector<int32_t> ids(tokens), logit_rows = {299, 0, 13, 13, 7};
        for (int t = 0; t < tokens; ++t) ids[static_cast<size_t>(t)] = t * 31 % vocab;
        const std::vector<float> norm = normal(h, 12);
        std::vector<float> results[2][3];
        for (Backend* backend : {reference.get(), cpu.get()}) {
          auto& out = results[backend == cpu.get()];
          const TestWeight table(*backend, layout, vocab, hidden, 0, 5, false);
          const StepBatch batch{.num_tokens = tokens,
                                .num_logit_rows = 5,
                                .token_ids = ids.data(),
                                .logit_rows = logit_rows.data()};
          GuardedOutput x(*backend, tokens * h), y(*backend, tokens * h),
              logits(*backend, size_t{5} * vocab);
          backend->embed(batch, table.operand(), x.data());
          backend->rms_norm(x.data(), norm.data(), 1e-5f, tokens, hidden, y.data());
          backend->lm_head(batch, x.data(), norm.data(), 1e-5f, table.operand(), logits.data());
          out[0] = x.read();
          out[1] = y.read();
          out[2] = logits.read();
        }
        EXPECT_EQ(results[0][0], results[1][0]) << "embed " << hidden;
        EXPECT_LT(relative_error(results[1][1], results[0][1]), 1e-5) << "rms_norm " << hidden;
        EXPECT_LT(relative_error(results[1][2], results[0][2]), 2e-5) << "lm_head " << hidden;
      }
    }
  }
}

// An lm_head in 4 and 8 bits, of an odd vocabulary; its pre-scale lies in the norm.
TEST_P(CpuLinear, QuantizedHeadMatchesReference) {
  const auto reference = make_reference_backend();
  const int vocab = 331, hidden = 256, tokens = 40;
  const std::vector<float> x = normal(size_t{tokens} * hidden, 21), norm = normal(hidden, 22);
  for (const WeightLayout layout : {WeightLayout::kCpuInt4, WeightLayout::kCpuInt8}) {
    for (const int rows : {1, 5, 40}) {
      std::vector<int32_t> logit_rows;
      for (int r = 0; r < rows; ++r) logit_rows.push_back(r * 7 % tokens);
      const StepBatch batch{
          .num_tokens = tokens, .num_logit_rows = rows, .logit_rows = logit_rows.data()};
      const auto head = [&](Backend& backend, WeightLayout lies) {
        const TestWeight weight(backend, lies, vocab, hidden, 128, 5, false);
        GuardedOutput logits(backend, static_cast<size_t>(rows) * vocab);
        backend.lm_head(batch, x.data(), norm.data(), 1e-5f, weight.operand(), logits.data());
        return logits.read();
      };
      const std::vector<float> want = head(*reference, portable_layout(layout));
      for (const ActivationPrecision precision :
           {ActivationPrecision::kF32, ActivationPrecision::kInt8Group}) {
        const auto cpu = make_cpu_backend(GetParam(), precision, 3);
        const std::vector<float> have = head(*cpu, layout);
        const bool exact = precision == ActivationPrecision::kF32;
        EXPECT_LT(exact ? relative_error(have, want) : rms_error(have, want), exact ? 2e-5 : 0.05)
            << weight_layout_name(layout) << ' ' << rows;
        // A row's logits do not depend on the others.
        const std::vector<int32_t> one = {logit_rows.back()};
        const StepBatch alone{.num_tokens = tokens, .num_logit_rows = 1, .logit_rows = one.data()};
        const TestWeight weight(*cpu, layout, vocab, hidden, 128, 5, false);
        GuardedOutput logits(*cpu, vocab);
        cpu->lm_head(alone, x.data(), norm.data(), 1e-5f, weight.operand(), logits.data());
        EXPECT_EQ(logits.read(), std::vector<float>(have.end() - vocab, have.end()));
      }
    }
  }
}

TEST(CpuIsa, NamesAreChecked) {
  EXPECT_THROW(make_cpu_backend("sse9", ActivationPrecision::kF32, 1), Error);
  EXPECT_EQ(resolve_cpu_isa("generic"), "generic");
  EXPECT_EQ(make_cpu_backend("native", ActivationPrecision::kF32, 1)->name(),
            "cpu:" + resolve_cpu_isa("native"));
  const auto isas = available_cpu_isas();
  if (std::find(isas.begin(), isas.end(), "avx512") == isas.end()) {
    try {
      make_cpu_backend("avx512", ActivationPrecision::kF32, 1);
      FAIL() << "avx512 accepted on a machine without it";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kDevice);
      EXPECT_NE(std::string(error.what()).find("VNNI"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace nibble::ops
