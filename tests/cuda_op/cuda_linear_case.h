// Linears of the op case table as the cuda backend takes them, and how their results are compared.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "backends/reference/reference_backend.h"
#include "base/half.h"
#include "bench/op_cases.h"
#include "ops/cpu_test_util.h"
#include "pack/cuda_int4.h"

namespace nibble::ops {

/// Largest |a - b| over |b| plus the root mean square of b's row: bf16 rounds relative to the
/// element, and sums carry an error relative to what was added.
inline double element_error(const std::vector<float>& a, const std::vector<float>& b, size_t row) {
  double worst = 0;
  for (size_t begin = 0; begin < b.size(); begin += row) {
    double squares = 0;
    for (size_t i = begin; i < begin + row; ++i) squares += double{b[i]} * b[i];
    const double rms = std::sqrt(squares / static_cast<double>(row));
    for (size_t i = begin; i < begin + row; ++i) {
      worst = std::max(worst, std::fabs(double{a[i]} - b[i]) / (std::fabs(double{b[i]}) + rms));
    }
  }
  return worst;
}

inline std::vector<float> normal(size_t n, uint64_t seed) {
  std::vector<float> x(n);
  fill_normal(x, seed);
  round_to_bf16(x);
  return x;
}

/// The weights of a case in one backend. On cuda an int4 gate_up may be `fused`: one matrix.
struct Weights {
  Weights(Backend& backend, const LinearCase& c, WeightLayout layout, bool fused = false)
      : w(backend, layout, c.out_features, c.in_features, c.group_size, c.seed, c.pre_scale),
        up(backend, layout, c.out_features, c.in_features, c.group_size, c.seed + 50, c.pre_scale) {
    gate_operand = w.operand();
    up_operand = up.operand();
    up_operand.pre_scale = gate_operand.pre_scale;
    if (!fused) return;
    const auto host = make_reference_backend();
    Int4Matrix both = matrix(*host, c, c.seed);
    const Int4Matrix second = matrix(*host, c, c.seed + 50);
    both.out_features *= 2;
    both.q.insert(both.q.end(), second.q.begin(), second.q.end());
    both.scales.insert(both.scales.end(), second.scales.begin(), second.scales.end());
    const std::vector<std::byte> packed = pack_cuda_int4(both, /*gate_up=*/true);
    gate_operand.weight = up_operand.weight = backend.import_weights(packed.data(), packed.size());
    backend.sync();
  }
  static Int4Matrix matrix(Backend& host, const LinearCase& c, uint64_t seed) {
    const TestWeight portable(host, WeightLayout::kInt4Portable, c.out_features, c.in_features,
                              c.group_size, seed, false);
    const LinearOperand& o = portable.operand();
    const auto elements = static_cast<size_t>(c.out_features) * static_cast<size_t>(c.in_features);
    return unpack_int4({static_cast<const std::byte*>(o.weight), elements / 2},
                       {o.scales, elements / static_cast<size_t>(c.group_size)}, c.out_features,
                       c.in_features, c.group_size, WeightLayout::kInt4Portable);
  }
  TestWeight w, up;
  LinearOperand gate_operand, up_operand;
};

inline std::vector<float> run(Backend& backend, const LinearCase& c, const Weights& weights,
                              const std::vector<float>& x, int rows) {
  const auto n = static_cast<size_t>(c.out_features);
  GuardedOutput y(backend, static_cast<size_t>(rows) * n, backend.act_bytes());
  if (c.add) y.fill(normal(static_cast<size_t>(rows) * n, c.seed + 4));
  const Buffer in = acts_to_device(backend, x);
  const Buffer scale = to_device(backend, normal(n, c.seed + 9));
  if (c.gate_up) {
    backend.gate_up(in.data(), weights.gate_operand, weights.up_operand, rows,
                    c.seed % 2 == 0 ? scale.as<float>() : nullptr, y.data());
  } else {
    backend.linear(in.data(), weights.gate_operand, rows, c.add, y.data());
  }
  return y.read();
}

inline std::vector<LinearCase> cuda_linear_cases() {
  std::vector<LinearCase> cases;
  for (const LinearCase& c : linear_cases()) {  // those of the common table that cuda takes
    const bool int4 = c.layout == WeightLayout::kCpuInt4;
    if (int4 && (c.group_size != 128 || c.out_features % 8 != 0)) continue;
    if (!int4 && (c.layout != WeightLayout::kBf16Rows || c.in_features % 8 != 0)) continue;
    if (c.gate_up && c.out_features % 8 != 0) continue;
    cases.push_back(c);
  }
  uint64_t seed = 9000;
  const int shapes[][3] = {{16, 128, 128},   {264, 256, 128},  {128, 1024, 128},
                           {512, 5120, 128}, {1024, 384, 128}, {1000, 264, 0},
                           {256, 1032, 0},   {1, 8, 0},        {130, 64, 0}};
  for (const auto& [n, k, group] : shapes) {
    for (const int rows : {1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 129, 200, 300}) {
      const bool gate_up = seed % 3 == 0 && n % 8 == 0;
      cases.push_back({.layout = group != 0 ? WeightLayout::kCpuInt4 : WeightLayout::kBf16Rows,
                       .out_features = n,
                       .in_features = k,
                       .group_size = group,
                       .rows = rows,
                       .add = !gate_up && seed % 2 == 0,
                       .pre_scale = seed % 5 < 1,
                       .gate_up = gate_up,
                       .seed = seed});
      ++seed;
    }
  }
  return cases;
}

/// Of a row of weights or a token: what its scale in a group is multiplied by.
using OfGroup = std::function<float(int index, int group)>;

/// Gives the case's weights on cuda, a plain matrix, other scales: as bf16 has them, times
/// factor(row, group). Returns what they are now.
inline Int4Matrix rescale(Weights& weights, Backend& cuda, Backend& host, const LinearCase& c,
                          const OfGroup& factor) {
  Int4Matrix m = Weights::matrix(host, c, c.seed);
  const int groups = c.in_features / 128;
  for (int row = 0; row < c.out_features; ++row)
    for (int g = 0; g < groups; ++g) {
      float& scale = m.scales[static_cast<size_t>(row * groups + g)];
      scale = bf16_to_float(float_to_bf16(scale)) * factor(row, g);
    }
  const std::vector<std::byte> packed = pack_cuda_int4(m, /*gate_up=*/false);
  weights.gate_operand.weight = cuda.import_weights(packed.data(), packed.size());
  cuda.sync();
  return m;
}

/// Largest error of `got` = x m^T against float64, beyond a rounding to bf16 and relative to the
/// root of the sum of the squared terms; expects no NaN, and 0 where every term is 0.
inline double worst_error(const Int4Matrix& m, const std::vector<float>& x,
                          const std::vector<float>& got) {
  const auto in = static_cast<size_t>(m.in_features), outs = static_cast<size_t>(m.out_features);
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const size_t token = i / outs, row = i % outs;
    double want = 0, squares = 0;
    for (size_t k = 0; k < in; ++k) {
      const size_t at = row * in + k;
      const double term = double{m.scales[at / 128]} * m.q[at] * x[token * in + k];
      want += term, squares += term * term;
    }
    const double error = std::fabs(got[i] - want) - std::fabs(want) / 256;
    EXPECT_FALSE(std::isnan(error)) << token << " " << row;
    if (squares > 0) {
      worst = std::max(worst, error / std::sqrt(squares));
    } else {
      EXPECT_EQ(got[i], 0.0f) << token << " " << row;
    }
  }
  return worst;
}

}  // namespace nibble::ops
