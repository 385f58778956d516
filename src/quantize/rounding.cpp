// SPDX-License-Identifier: Apache-2.0
#include "quantize/rounding.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "quantize/gemm.h"

namespace nibble::awq {
namespace {

constexpr int64_t kFactorBlock = 128;

// Half to even without a library call: exact for |x| < 2^22, and larger values are clamped all the
// same.
inline float round_half_even(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
}

inline float to_grid(float x) { return round_half_even(std::min(std::max(x, -8.0f), 7.0f)); }

inline float amax(const float* x, const float* pre, int64_t count) {
  float maximum = 0;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < count; ++i) maximum = std::max(maximum, std::fabs(x[i] / pre[i]));
  return maximum;
}

float positive(float scale) { return scale > 0 ? scale : 1.0f; }

// One diagonal block of H, in place: R on and above the diagonal. False when H is not positive
// definite.
bool factor_block(ThreadPool& pool, float* h, int64_t size) {
  std::vector<double> diagonal(static_cast<size_t>(kFactorBlock * kFactorBlock));
  std::vector<float> negated;
  for (int64_t k = 0; k < size; k += kFactorBlock) {
    const int64_t ks = std::min(kFactorBlock, size - k);
    const auto d = [&](int64_t i, int64_t j) -> double& {
      return diagonal[static_cast<size_t>(i * kFactorBlock + j)];
    };
    for (int64_t i = 0; i < ks; ++i) {
      for (int64_t j = i; j < ks; ++j) {
        double sum = double{h[(k + i) * size + k + j]};
        for (int64_t p = 0; p < i; ++p) sum -= d(p, i) * d(p, j);
        if (i == j) {
          if (!(sum > 0)) return false;
          d(i, i) = std::sqrt(sum);
        } else {
          d(i, j) = sum / d(i, i);
        }
        h[(k + i) * size + k + j] = static_cast<float>(d(i, j));
      }
    }
    const int64_t rest = size - k - ks;
    if (rest == 0) break;
    float* right = h + k * size + k + ks;  // [ks, rest] of the same rows
    constexpr int64_t kColumns = 256;
    negated.resize(static_cast<size_t>(ks * rest));
    pool.parallel_for((rest + kColumns - 1) / kColumns, [&](int64_t chunk, int) {
      const int64_t begin = chunk * kColumns, end = std::min(rest, begin + kColumns);
      for (int64_t i = 0; i < ks; ++i) {
        float* row = right + i * size;
        for (int64_t p = 0; p < i; ++p) {
          const float factor = static_cast<float>(d(p, i));
          const float* above = right + p * size;
          for (int64_t j = begin; j < end; ++j) row[j] -= factor * above[j];
        }
        const float inverse = static_cast<float>(1.0 / d(i, i));
        for (int64_t j = begin; j < end; ++j) {
          row[j] *= inverse;
          negated[static_cast<size_t>(i * rest + j)] = -row[j];
        }
      }
    });
    const int64_t tiles = (rest + kColumns - 1) / kColumns;
    pool.parallel_for(tiles * tiles, [&](int64_t chunk, int) {
      const int64_t i = chunk / tiles * kColumns, j = chunk % tiles * kColumns;
      if (j < i) return;
      gemm(std::min(kColumns, rest - i), std::min(kColumns, rest - j), ks,
           {negated.data() + i, 1, rest}, {right + j, 1, size}, true,
           h + (k + ks + i) * size + k + ks + j, size);
    });
  }
  return true;
}

}  // namespace

float factor_gram(ThreadPool& pool, const Gram& gram, float damping, std::vector<float>& factor,
                  std::vector<float>* diagonal) {
  if (diagonal != nullptr) diagonal->resize(static_cast<size_t>(gram.features));
  const int64_t size = gram.block;
  // A channel that is always zero gets a diagonal of its own so that the factor exists; it costs
  // nothing anyway.
  double mean = 0;
  for (int64_t j = 0; j < gram.features; ++j)
    mean += double{gram.at(j / size)[(j % size) * (size + 1)]};
  const float floor =
      static_cast<float>(std::max(mean / static_cast<double>(gram.features) * 1e-6, 1e-30));
  for (int attempt = 0; attempt < 12; ++attempt, damping = std::max(damping, 1e-6f) * 10) {
    factor = gram.values;
    bool good = true;
    for (int64_t index = 0; index < gram.num_blocks() && good; ++index) {
      float* h = factor.data() + index * size * size;
      for (int64_t j = 0; j < size; ++j)
        h[j * (size + 1)] = h[j * (size + 1)] * (1 + damping) + floor;
      good = factor_block(pool, h, size);
      for (int64_t j = 0; j < size && good; ++j) {
        const float inverse = 1.0f / h[j * (size + 1)];
        if (diagonal != nullptr)
          (*diagonal)[static_cast<size_t>(index * size + j)] =
              h[j * (size + 1)] * h[j * (size + 1)];
        for (int64_t i = j; i < size; ++i) h[j * size + i] *= inverse;
      }
    }
    if (good) return damping;
  }
  fail(ErrorKind::kInternal, "the calibration Hessian of {} channels cannot be factored",
       gram.features);
}

double panel_loss(Panel& panel, const Gram& gram) {
  const int64_t size = gram.block;
  double loss = 0;
  for (int64_t index = 0; index < gram.num_blocks(); ++index) {
    gemm(panel.rows, size, size, {panel.error.data() + index * size, panel.features, 1},
         {gram.at(index), size, 1}, false, panel.product.data() + index * size, panel.features);
  }
  for (int64_t r = 0; r < panel.rows; ++r) {
    const float* e = panel.error.data() + r * panel.features;
    const float* p = panel.product.data() + r * panel.features;
    float sum = 0;
    for (int64_t j = 0; j < panel.features; j += panel.group) {
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = j; i < j + panel.group; ++i) part += e[i] * p[i];
      sum += part;
    }
    loss += double{sum};
  }
  return loss;
}

double choose_scales(Panel& panel, const Gram& gram, std::span<const float> ratios, DType dtype) {
  const int64_t group = panel.group, rows = panel.rows, groups = panel.groups();
  const int64_t count = static_cast<int64_t>(ratios.size());
  panel.scales.resize(static_cast<size_t>(rows * groups));
  std::vector<float>& errors = panel.scratch;  // [ratios, rows, group], then their products with G
  errors.resize(static_cast<size_t>(2 * count * rows * group));
  float* products = errors.data() + count * rows * group;
  double chosen = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const float* pre = panel.pre + g * group;
    for (int64_t r = 0; r < rows; ++r) {
      const float* w = panel.weight + r * panel.features + g * group;
      const float widest = amax(w, pre, group) / 7.0f;
      panel.scales[static_cast<size_t>(r * groups + g)] =
          positive(round_to(dtype, ratios[0] * widest));
      if (count == 1) continue;
      for (int64_t c = 0; c < count; ++c) {
        const float scale = positive(round_to(dtype, ratios[static_cast<size_t>(c)] * widest));
        const float inverse = 1.0f / scale;
        float* e = errors.data() + (c * rows + r) * group;
        for (int64_t j = 0; j < group; ++j)
          e[j] = w[j] - to_grid(w[j] / pre[j] * inverse) * (scale * pre[j]);
      }
    }
    if (count == 1) {
      chosen += double{ratios[0]} * static_cast<double>(rows);
      continue;
    }
    const int64_t first = g * group, offset = first % gram.block;
    gemm(count * rows, group, group, {errors.data(), group, 1},
         {gram.at(first / gram.block) + offset * (gram.block + 1), gram.block, 1}, false, products,
         group);
    for (int64_t r = 0; r < rows; ++r) {
      float best = 0;
      int64_t best_ratio = 0;
      for (int64_t c = 0; c < count; ++c) {
        const float* e = errors.data() + (c * rows + r) * group;
        const float* p = products + (c * rows + r) * group;
        float loss = 0;
#pragma omp simd reduction(+ : loss)
        for (int64_t j = 0; j < group; ++j) loss += e[j] * p[j];
        if (c == 0 || loss < best) best = loss, best_ratio = c;
      }
      const float widest = amax(panel.weight + r * panel.features + g * group, pre, group) / 7.0f;
      const float ratio = ratios[static_cast<size_t>(best_ratio)];
      panel.scales[static_cast<size_t>(r * groups + g)] = positive(round_to(dtype, ratio * widest));
      chosen += double{ratio};
    }
  }
  return chosen;
}

void round_nearest(Panel& panel) {
  const int64_t size = panel.rows * panel.features;
  panel.q.resize(static_cast<size_t>(size));
  panel.error.resize(static_cast<size_t>(size));
  panel.product.resize(static_cast<size_t>(size));
  for (int64_t r = 0; r < panel.rows; ++r) {
    for (int64_t g = 0; g < panel.groups(); ++g) {
      const float scale = panel.scales[static_cast<size_t>(r * panel.groups() + g)];
      const int64_t at = r * panel.features + g * panel.group;
      for (int64_t j = 0; j < panel.group; ++j) {
        const float w = panel.weight[at + j], pre = panel.pre[g * panel.group + j];
        const float q = to_grid(w / pre / scale);
        panel.q[static_cast<size_t>(at + j)] = q;
        panel.error[static_cast<size_t>(at + j)] = w - q * (scale * pre);
      }
    }
  }
}

void round_compensated(Panel& panel, const Gram& gram, const std::vector<float>& factor) {
  const int64_t size = gram.block, group = panel.group, rows = panel.rows, groups = panel.groups();
  round_nearest(panel);  // sizes the vectors; the integers are overwritten
  panel.scratch.resize(static_cast<size_t>(rows * group));
  for (int64_t g = groups - 1; g >= 0; --g) {
    const int64_t first = g * group, offset = first % size;
    const float* r_rows =
        factor.data() + (first / size) * size * size + offset * size;  // [group, size] of R
    const int64_t after = offset + group, rest = size - after;
    gemm(rows, group, rest, {panel.error.data() + first + group, panel.features, 1},
         {r_rows + after, size, 1}, false, panel.scratch.data(), group);
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = panel.scales[static_cast<size_t>(r * groups + g)];
      const float* w = panel.weight + r * panel.features + first;
      float* q = panel.q.data() + r * panel.features + first;
      float* e = panel.error.data() + r * panel.features + first;
      const float* feedback = panel.scratch.data() + r * group;
      for (int64_t j = group - 1; j >= 0; --j) {
        const float* row = r_rows + j * size + offset;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = j + 1; i < group; ++i) sum += row[i] * e[i];
        const float step = scale * panel.pre[first + j];
        q[j] = to_grid((w[j] + feedback[j] + sum) / step);
        e[j] = w[j] - q[j] * step;
      }
    }
  }
}

void descend(Panel& panel, const Gram& gram, int sweeps, DType dtype) {
  const int64_t size = gram.block, group = panel.group, rows = panel.rows, groups = panel.groups();
  std::vector<float>& change = panel.scratch;  // [rows, group] of the error, then q * pre times G
  change.resize(static_cast<size_t>(3 * rows * group));
  float* unit = change.data() + rows * group;
  float* unit_product = unit + rows * group;
  panel_loss(panel, gram);  // product = error G
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    bool changed = false;
    for (int64_t g = groups - 1; g >= 0; --g) {
      const int64_t first = g * group, offset = first % size;
      const float* g_rows = gram.at(first / size) + offset * size;  // [group, size] of G
      const float* pre = panel.pre + first;
      for (int64_t r = 0; r < rows; ++r) {
        const float* q = panel.q.data() + r * panel.features + first;
        for (int64_t j = 0; j < group; ++j) unit[r * group + j] = q[j] * pre[j];
      }
      gemm(rows, group, group, {unit, group, 1}, {g_rows + offset, size, 1}, false, unit_product,
           group);
      std::fill(change.begin(), change.begin() + rows * group, 0.0f);
      for (int64_t r = 0; r < rows; ++r) {
        float& scale = panel.scales[static_cast<size_t>(r * groups + g)];
        const float* w = panel.weight + r * panel.features + first;
        float* q = panel.q.data() + r * panel.features + first;
        float* e = panel.error.data() + r * panel.features + first;
        float* p = panel.product.data() + r * panel.features + first;
        float* de = change.data() + r * group;
        float slope = 0, curvature = 0;
#pragma omp simd reduction(+ : slope, curvature)
        for (int64_t j = 0; j < group; ++j) {
          slope += unit[r * group + j] * p[j];
          curvature += unit[r * group + j] * unit_product[r * group + j];
        }
        if (curvature > 0) {
          const float refitted = round_to(dtype, scale + slope / curvature);
          const float moved = refitted - scale;
          // Rounding the scale to its type may undo the gain: moving by m changes the loss by m^2 c
          // - 2 m s.
          if (refitted > 0 && moved != 0 && moved * (moved * curvature - 2 * slope) < 0) {
            for (int64_t j = 0; j < group; ++j) {
              de[j] = -moved * unit[r * group + j];
              p[j] -= moved * unit_product[r * group + j];
              e[j] += de[j];
            }
            scale = refitted;
            changed = true;
          }
        }
        for (int64_t j = group - 1; j >= 0; --j) {
          const float* row = g_rows + j * size + offset;
          const float curve = row[j];
          if (!(curve > 0)) continue;
          const float step = scale * pre[j];
          const float best = to_grid((w[j] - e[j] + p[j] / curve) / step);
          if (best == q[j]) continue;
          const float delta = (q[j] - best) * step;
          q[j] = best;
          e[j] += delta;
          de[j] += delta;
          for (int64_t i = 0; i < group; ++i) p[i] += delta * row[i];
          changed = true;
        }
      }
      // The rest of the block hears of this group's changes.
      float* product = panel.product.data() + (first / size) * size;
      if (offset > 0) {
        gemm(rows, offset, group, {change.data(), group, 1}, {g_rows, 1, size}, true, product,
             panel.features);
      }
      const int64_t after = offset + group;
      if (after < size) {
        gemm(rows, size - after, group, {change.data(), group, 1}, {g_rows + after, 1, size}, true,
             product + after, panel.features);
      }
    }
    if (!changed) break;
  }
  // Steps accumulated in fp32 drift; the error is defined by the integers and scales.
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < panel.features; ++j) {
      const size_t at = static_cast<size_t>(r * panel.features + j);
      const float step = panel.scales[static_cast<size_t>(r * groups + j / group)] * panel.pre[j];
      panel.error[at] = panel.weight[at] - panel.q[at] * step;
    }
  }
}

}  // namespace nibble::awq
