// What cuda:sm_90's kernels round for the linear behind them: digits in steps of 9 to 16 rows, e4m3
// with --activations fp8 in steps of 33 to 64. Skipped where the plugin finds no GPU.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "backends/cuda/kernels.h"
#include "backends/reference/reference_backend.h"
#include "base/error.h"
#include "base/half.h"
#include "bench/op_cases.h"
#include "build/cuda_plugin.h"
#include "cuda_linear_case.h"
#include "ops/cpu_test_util.h"

namespace nibble::ops {
namespace {

std::unique_ptr<Backend> open_or_skip(ActivationPrecision precision) {
  try {
    return open_cuda_backend("cuda:sm_90", precision);
  } catch (const Error& error) {
    [&] { GTEST_SKIP() << error.what(); }();
    return nullptr;
  }
}

struct Shape {
  int hidden, ffn, kv_heads, rows;
  int longest = 200;  // tokens there is room for; with thousands a head is several CTAs' work
};

// From a decode step's attention to the next layer's first linear: what linears read is rounded by
// the kernel before them, where its tiles have whole groups of 128 channels and attention leaves a
// head's outputs to one CTA (not with two KV heads). Looked at on the way, every op is done by
// itself.
void expect_rounded_for_the_next(Backend& cuda, Backend& reference,
                                 const std::vector<Shape>& shapes, double tolerance) {
  for (const auto& [hidden, ffn, kv_heads, rows, longest] : shapes) {
    const AttentionShape shape{4 * kv_heads, kv_heads, 128, 64, KvFormat::kInt8Dynamic};
    const auto name =
        fmt::format("hidden {} ffn {} KV heads {} rows {}", hidden, ffn, kv_heads, rows);
    const auto h = static_cast<size_t>(hidden), f = static_cast<size_t>(ffn),
               n = static_cast<size_t>(rows);
    const auto linear_case = [&, rows = rows](int out, int in, bool gate_up, uint64_t seed) {
      return LinearCase{.layout = WeightLayout::kCpuInt4,
                        .out_features = out,
                        .in_features = in,
                        .group_size = 128,
                        .rows = rows,
                        .gate_up = gate_up,
                        .seed = seed};
    };
    const auto result = [&, hidden = hidden, ffn = ffn, kv_heads = kv_heads, rows = rows,
                         longest = longest](Backend& backend, bool look) {
      const bool on_gpu = &backend == &cuda;
      const WeightLayout layout = on_gpu ? WeightLayout::kCudaInt4 : WeightLayout::kInt4Portable;
      const Weights o(backend, linear_case(hidden, 4 * kv_heads * 128, false, 61), layout),
          gate_up(backend, linear_case(ffn, hidden, true, 62), layout, on_gpu),
          down(backend, linear_case(hidden, ffn, false, 63), layout),
          qkv(backend, linear_case(264, hidden, false, 64), layout);
      const Buffer weight = to_device(backend, normal(h, 12)),
                   scale = to_device(backend, normal(f, 14));
      const size_t act = backend.act_bytes();
      GuardedOutput x(backend, n * h, act), normed(backend, n * h, act), y(backend, n * f, act),
          out(backend, n * 264, act);
      x.fill(normal(n * h, 15));
      AttentionRun attention(backend, shape, rows, longest, 3, true);
      std::vector<AttentionRun::Chunk> step;
      for (int s = 0; s < rows; ++s) step.push_back({s, 1});
      for (int i = 0; i < 3; ++i) attention.step(step);
      attention.prepare(step);
      attention.store();
      attention.attend();
      if (look) backend.sync();
      const auto norm = [&] {
        backend.rms_norm(x.data(), weight.as<float>(), 1e-5f, rows, hidden, normed.data());
        if (look) backend.sync();
      };
      backend.linear(attention.result(), o.gate_operand, rows, true, x.data());
      norm();
      backend.gate_up(normed.data(), gate_up.gate_operand, gate_up.up_operand, rows,
                      scale.as<float>(), y.data());
      if (look) backend.sync();
      backend.linear(y.data(), down.gate_operand, rows, true, x.data());
      norm();
      backend.linear(normed.data(), qkv.gate_operand, rows, false, out.data());
      std::vector<float> all;
      for (const GuardedOutput* part : {&y, &x, &out}) {
        const std::vector<float> values = part->read();
        all.insert(all.end(), values.begin(), values.end());
      }
      return all;
    };
    const std::vector<float> want = result(reference, false), fused = result(cuda, false),
                             again = result(cuda, false), apart = result(cuda, true);
    const size_t ends[4] = {0, n * f, n * (f + h), n * (f + h + 264)};
    for (int i = 0; i < 3; ++i) {
      const auto part = [&](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + static_cast<int64_t>(ends[i]),
                                  all.begin() + static_cast<int64_t>(ends[i + 1]));
      };
      EXPECT_LT(rms_error(part(fused), part(want)), tolerance) << name << " part " << i;
      EXPECT_LT(rms_error(part(fused), part(apart)), tolerance) << name << " part " << i;
    }
    EXPECT_TRUE(same_bits(fused.data(), again.data(), fused.size())) << name;
  }
}

TEST(CudaRounding, DigitsForTheNext) {
  const auto cuda = open_or_skip(ActivationPrecision::kBf16);
  if (!cuda) return;
  const auto reference = make_reference_backend();
  expect_rounded_for_the_next(*cuda, *reference,
                              {{1152, 8704, 8, 16},
                               {384, 8704, 8, 9},
                               {1152, 384, 8, 12},
                               {1152, 384, 8, 12, 3600},
                               {640, 17024, 2, 10},
                               {1152, 8704, 2, 16},
                               {256, 640, 2, 13}},
                              0.01);
}

// A bf16 rounding before e4m3 moves one value in sixteen by a step, 2 % of a linear's result.
TEST(CudaRounding, E4m3ForTheNext) {
  const auto cuda = open_or_skip(ActivationPrecision::kE4m3);
  if (!cuda) return;
  const auto reference = make_reference_backend(ActivationPrecision::kE4m3);
  expect_rounded_for_the_next(*cuda, *reference,
                              {{1152, 8704, 8, 64},
                               {384, 8704, 8, 33},
                               {1152, 384, 8, 50},
                               {1152, 384, 8, 50, 2300},
                               {1152, 384, 8, 50, 3600},
                               {640, 17024, 8, 41},
                               {640, 17024, 2, 33}},
                              0.06);
}

// Codes (up to 8 rows), 16-bit integers per group (up to 16) and bf16 weights (above) must lose
// little, whatever the sizes of x and of the scales, and a token's result must not depend on its
// neighbours'. Against float64, on x as it is.
TEST(CudaRounding, LinearsOfAnySize) {
  const auto cuda = open_or_skip(ActivationPrecision::kBf16);
  if (!cuda) return;
  constexpr int kOut = 272, kIn = 2048;
  const auto host = make_reference_backend();
  const auto power = [](int exponent) { return std::ldexp(1.0f, exponent); };
  for (const int rows : {1, 4, 5, 8, 9, 12, 16, 24, 40, 64, 96}) {
    // Codes lose precision where results are below 2^-57 (ptx/dequant.cuh).
    const OfGroup weight_scales[] = {
        [](int, int) { return 1.0f; },
        [&](int, int) { return power(rows <= 8 ? -20 : -30); },
        [&](int row, int group) { return power(-(row % 7) - group % 5); },
        [](int row, int group) { return row % 3 == 0 && group % 4 != 1 ? 0.0f : 1.0f; },
    };
    const OfGroup input_scales[] = {
        [](int, int) { return 1.0f; },
        [&](int token, int) { return power(5 * (token % 17) - (rows <= 8 ? 25 : 60)); },
        [&](int token, int group) { return power(group * (token % 4) - 20); },
        [](int token, int group) { return (token + group) % 3 == 0 ? 0.0f : 30.0f; },
        [](int token, int) { return token % 2 == 0 ? 1.0f : -1.0f; },  // and see below
    };
    for (size_t ws = 0; ws < std::size(weight_scales); ++ws) {
      const LinearCase c{.layout = WeightLayout::kCpuInt4,
                         .out_features = kOut,
                         .in_features = kIn,
                         .group_size = 128,
                         .rows = rows,
                         .seed = 70 + ws};
      Weights weights(*cuda, c, WeightLayout::kCudaInt4);
      const Int4Matrix m = rescale(weights, *cuda, *host, c, weight_scales[ws]);
      for (size_t xs = 0; xs < std::size(input_scales); ++xs) {
        const bool positive = xs + 1 == std::size(input_scales);
        std::vector<float> x = normal(size_t(rows) * kIn, 80 + xs);
        for (size_t i = 0; i < x.size(); ++i) {
          const int token = static_cast<int>(i / kIn), group = static_cast<int>(i % kIn / 128);
          x[i] = (positive ? 1.0f + x[i] / 8 : x[i]) * input_scales[xs](token, group);
        }
        round_to_bf16(x);
        const std::vector<float> got = run(*cuda, c, weights, x, rows);
        const double worst = worst_error(m, x, got);
        // Half a step of an integer is 2^-16 of a group's largest value; weights that are made are
        // rounded to bf16, 2^-9 of each at most.
        EXPECT_LT(worst, rows <= 16 ? 1e-4 : 0.01)
            << rows << " rows, weight scales " << ws << ", input scales " << xs;
        if (ws > 0 || xs > 0) continue;
        // What is not a number is one token's only.
        std::vector<float> bad = x;
        bad[0] = std::numeric_limits<float>::infinity();
        if (rows > 3) bad[size_t{3} * kIn + kIn - 1] = std::numeric_limits<float>::quiet_NaN();
        const Buffer bad_x = acts_to_device(*cuda, bad);
        const Buffer out = cuda->alloc(got.size() * sizeof(uint16_t));
        cuda->linear(bad_x.data(), weights.gate_operand, rows, false, out.data());
        std::vector<uint16_t> bits(got.size());
        cuda->download(bits.data(), out.data(), out.bytes());
        cuda->sync();
        for (size_t i = 0; i < got.size(); ++i) {
          const size_t token = i / kOut;
          if (token == 0 || token == 3) {
            EXPECT_FALSE(std::isfinite(bf16_to_float(bits[i]))) << i;
          } else {
            EXPECT_EQ(bf16_to_float(bits[i]), got[i]) << i;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble::ops
