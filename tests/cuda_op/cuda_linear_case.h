// Linears of the op case table as the cuda backend takes them, and how their results are compared.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "backends/reference/reference_backend.h"
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

}  // namespace nibble::ops
