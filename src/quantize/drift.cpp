// SPDX-License-Identifier: Apache-2.0
#include "quantize/drift.h"

#include <algorithm>

#include "base/error.h"
#include "base/interrupt.h"
#include "quantize/gemm.h"
#include "quantize/rounding.h"

namespace nibble::awq {
namespace {

constexpr int64_t kRows = 128;     // of one chunk of work
constexpr int64_t kColumns = 128;  // solved one by one; the rest goes through gemm

// b [rows, ldb] becomes b (R^T D R)^-1 on `size` columns; R [size, size] has a unit diagonal.
void solve(const float* r, const float* d, int64_t size, float* b, int64_t rows, int64_t ldb,
           std::vector<float>& scratch) {
  scratch.resize(static_cast<size_t>(rows * kColumns));
  for (int64_t k = 0; k < size; k += kColumns) {  // R^T y = b
    const int64_t ks = std::min(kColumns, size - k), after = k + ks;
    for (int64_t row = 0; row < rows; ++row) {
      float* x = b + row * ldb + k;
      for (int64_t i = 0; i < ks; ++i) {
        const float* above = r + (k + i) * size + k;
        for (int64_t j = i + 1; j < ks; ++j) x[j] -= x[i] * above[j];
      }
      for (int64_t i = 0; i < ks; ++i) scratch[static_cast<size_t>(row * kColumns + i)] = -x[i];
    }
    if (after < size) {
      gemm(rows, size - after, ks, {scratch.data(), kColumns, 1}, {r + k * size + after, 1, size},
           true, b + after, ldb);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < size; ++j) b[row * ldb + j] /= d[j];
  }
  for (int64_t k = (size - 1) / kColumns * kColumns; k >= 0; k -= kColumns) {  // R x = y
    const int64_t ks = std::min(kColumns, size - k), after = k + ks;
    gemm(rows, ks, size - after, {b + after, ldb, 1}, {r + k * size + after, size, 1}, false,
         scratch.data(), kColumns);
    for (int64_t row = 0; row < rows; ++row) {
      float* x = b + row * ldb + k;
      for (int64_t i = ks - 1; i >= 0; --i) {
        const float* right = r + (k + i) * size + k;
        float sum = scratch[static_cast<size_t>(row * kColumns + i)];
        for (int64_t j = i + 1; j < ks; ++j) sum += right[j] * x[j];
        x[i] -= sum;
      }
    }
  }
}

}  // namespace

void correct_drift(ThreadPool& pool, const InputStatistics& input, float strength,
                   std::vector<float>& weight) {
  if (input.drift().empty()) return;
  const int64_t features = input.gram().features, block = input.gram().block;
  const int64_t out = static_cast<int64_t>(weight.size()) / features;
  std::vector<float> factor, diagonal;
  factor_gram(pool, input.gram(), kDriftDamping, factor, &diagonal);
  const bool has_residual = !input.residual().empty();
  NIBBLE_CHECK(!has_residual || static_cast<int64_t>(input.residual().size()) == features * out,
               "residual of {} values for {} x {}", input.residual().size(), features, out);
  const int64_t chunks = (out + kRows - 1) / kRows;
  pool.parallel_for(chunks, [&](int64_t chunk, int) {
    throw_if_interrupted();
    const int64_t first = chunk * kRows, rows = std::min(kRows, out - first);
    float* w = weight.data() + first * features;
    std::vector<float> b(static_cast<size_t>(rows * features), 0.0f), scratch;
    if (has_residual) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < features; ++j)
          b[static_cast<size_t>(r * features + j)] =
              input.residual()[static_cast<size_t>(j * out + first + r)];
      }
    }
    for (int64_t index = 0; index < features / block; ++index) {
      const int64_t at = index * block, square = at * block;
      gemm(rows, block, block, {w + at, features, 1}, {input.drift().data() + square, block, 1},
           true, b.data() + at, features);
      solve(factor.data() + square, diagonal.data() + at, block, b.data() + at, rows, features,
            scratch);
    }
    for (size_t i = 0; i < b.size(); ++i) w[i] += strength * b[i];
  });
}

}  // namespace nibble::awq
