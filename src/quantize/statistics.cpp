// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "quantize/awq.h"
#include "quantize/gemm.h"

namespace nibble::awq {
namespace {

constexpr int64_t kTile = 256;  // of the Gram matrix, one chunk of work

}  // namespace

int64_t gram_block(int64_t features, int64_t granularity, uint64_t max_bytes) {
  const int64_t units = features / granularity;
  for (int64_t parts = 1; parts <= units; ++parts) {
    if (units % parts != 0) continue;
    const uint64_t block = static_cast<uint64_t>(features / parts);
    if (block * static_cast<uint64_t>(features) * sizeof(float) <= max_bytes)
      return static_cast<int64_t>(block);
  }
  return granularity;
}

InputStatistics::InputStatistics(int64_t features, int64_t granularity, uint64_t max_gram_bytes) {
  NIBBLE_CHECK(features > 0 && granularity > 0 && features % granularity == 0,
               "{} features, groups of {}", features, granularity);
  gram_.features = features;
  gram_.block = gram_block(features, granularity, max_gram_bytes);
  gram_.values.assign(static_cast<size_t>(features * gram_.block), 0.0f);
  sum_abs_.assign(static_cast<size_t>(features), 0.0);
}

void InputStatistics::add(ThreadPool& pool, const float* x, int64_t rows) {
  if (rows <= 0) return;
  const int64_t features = gram_.features, block = gram_.block;
  const int64_t tiles = (block + kTile - 1) / kTile;
  // Tiles on and above the diagonal; finish() mirrors them.
  struct Tile {
    int64_t index, i, j;
  };
  std::vector<Tile> work;
  for (int64_t index = 0; index < gram_.num_blocks(); ++index) {
    for (int64_t i = 0; i < tiles; ++i) {
      for (int64_t j = i; j < tiles; ++j) work.push_back({index, i * kTile, j * kTile});
    }
  }
  pool.parallel_for(static_cast<int64_t>(work.size()), [&](int64_t chunk, int) {
    const Tile& tile = work[static_cast<size_t>(chunk)];
    const float* columns = x + tile.index * block;
    float* out = gram_.values.data() + tile.index * block * block + tile.i * block + tile.j;
    gemm(std::min(kTile, block - tile.i), std::min(kTile, block - tile.j), rows,
         {columns + tile.i, 1, features}, {columns + tile.j, 1, features}, true, out, block);
  });
  constexpr int64_t kColumns = 64;
  std::vector<float> maxima(static_cast<size_t>((features + kColumns - 1) / kColumns), 0.0f);
  pool.parallel_for(static_cast<int64_t>(maxima.size()), [&](int64_t chunk, int) {
    const int64_t begin = chunk * kColumns, count = std::min(kColumns, features - begin);
    float sum[kColumns] = {}, maximum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const float* in = x + r * features + begin;
      for (int64_t c = 0; c < count; ++c) {
        const float magnitude = std::fabs(in[c]);
        sum[c] += magnitude;
        maximum = std::max(maximum, magnitude);
      }
    }
    for (int64_t c = 0; c < count; ++c) sum_abs_[static_cast<size_t>(begin + c)] += double{sum[c]};
    maxima[static_cast<size_t>(chunk)] = maximum;
  });
  max_abs_ = std::max(max_abs_, *std::max_element(maxima.begin(), maxima.end()));
  tokens_ += rows;
}

void InputStatistics::add_drift(ThreadPool& pool, const float* x, const float* dense,
                                const float* residual, int64_t out_features, int64_t rows) {
  const int64_t features = gram_.features, block = gram_.block;
  if (drift_.empty()) drift_.assign(gram_.values.size(), 0.0f);
  std::vector<float> delta(static_cast<size_t>(rows * features));
  pool.parallel_for(rows, [&](int64_t r, int) {
    for (int64_t i = r * features; i < (r + 1) * features; ++i)
      delta[static_cast<size_t>(i)] = dense[i] - x[i];
  });
  // out[i, j] += sum over rows of a[r, i] b[r, j], in tiles.
  const auto add_product = [&](const float* a, int64_t m, const float* b, int64_t ldb, int64_t n,
                               float* out, int64_t ldc) {
    const int64_t across = (n + kTile - 1) / kTile, down = (m + kTile - 1) / kTile;
    pool.parallel_for(down * across, [&](int64_t chunk, int) {
      const int64_t i = chunk / across * kTile, j = chunk % across * kTile;
      gemm(std::min(kTile, m - i), std::min(kTile, n - j), rows, {a + i, 1, features},
           {b + j, 1, ldb}, true, out + i * ldc + j, ldc);
    });
  };
  for (int64_t index = 0; index < gram_.num_blocks(); ++index) {
    add_product(x + index * block, block, delta.data() + index * block, features, block,
                drift_.data() + index * block * block, block);
  }
  if (residual == nullptr) return;
  if (residual_.empty()) residual_.assign(static_cast<size_t>(features * out_features), 0.0f);
  add_product(x, features, residual, out_features, out_features, residual_.data(), out_features);
}

void InputStatistics::finish(ThreadPool& pool) {
  NIBBLE_CHECK(tokens_ > 0, "no calibration tokens");
  const int64_t block = gram_.block;
  const float inverse = 1.0f / static_cast<float>(tokens_);
  pool.parallel_for(gram_.features, [&](int64_t row, int) {  // scale on and above the diagonal
    float* values = gram_.values.data() + (row / block) * block * block + (row % block) * block;
    for (int64_t j = row % block; j < block; ++j) values[j] *= inverse;
  });
  pool.parallel_for(gram_.features, [&](int64_t row, int) {  // mirror below it
    float* base = gram_.values.data() + (row / block) * block * block;
    const int64_t i = row % block;
    for (int64_t j = 0; j < i; ++j) base[i * block + j] = base[j * block + i];
  });
  for (std::vector<float>* sums : {&drift_, &residual_}) {
    for (float& value : *sums) value *= inverse;
  }
  mean_abs_.resize(sum_abs_.size());
  for (size_t c = 0; c < sum_abs_.size(); ++c) {
    mean_abs_[c] = static_cast<float>(sum_abs_[c] / static_cast<double>(tokens_));
  }
}

}  // namespace nibble::awq
