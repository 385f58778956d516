// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "quantize/awq.h"
#include "quantize/gemm.h"

namespace nibble::awq {
namespace {

constexpr int64_t kTile = 256;  // of the Gram matrix, one chunk of work

// The largest multiple of `granularity` that divides `features` and whose blocks fit the memory.
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

}  // namespace

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
  mean_abs_.resize(sum_abs_.size());
  for (size_t c = 0; c < sum_abs_.size(); ++c) {
    mean_abs_[c] = static_cast<float>(sum_abs_[c] / static_cast<double>(tokens_));
  }
}

}  // namespace nibble::awq
