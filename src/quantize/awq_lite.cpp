// ModelOpt's awq_lite, as TensorRT-LLM's int4_awq uses it, step for step: each of q, k, v, o, gate,
// up and down is searched alone, 11 alphas, no clip, rounding to nearest, and q, k and v get the
// mean of their three pre-scales afterwards. It is here so that one can compare; awq.cpp loses
// less. Two known differences: the loss is the Gram matrix's (the same number in exact arithmetic),
// and no pad tokens are counted, because there are none. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/half.h"
#include "base/interrupt.h"
#include "quantize/awq.h"
#include "quantize/rounding.h"

namespace nibble::awq {
namespace {

constexpr int kAlphaSteps = 10;      // alpha 0, 0.1 ... 1
constexpr int64_t kPanelRows = 128;  // of one chunk of work

float smallest_normal(DType dtype) { return dtype == DType::kF16 ? 6.1035156e-5f : 1.1754944e-38f; }

// w as it stands in memory after the pre-scale was multiplied out of it.
void scale_row(const float* w, const float* pre, int64_t features, DType dtype, float* scaled) {
  for (int64_t j = 0; j < features; ++j) scaled[j] = round_to(dtype, w[j] * (1.0f / pre[j]));
}

// Quantizes one scaled row: amax / 7 of each group in fp32, half to even.
void round_row(const float* scaled, int64_t features, int group, float* scales, float* q) {
  for (int64_t g = 0; g < features / group; ++g) {
    float widest = 0;
    for (int64_t j = g * group; j < (g + 1) * group; ++j)
      widest = std::max(widest, std::fabs(scaled[j]));
    const float scale = widest > 0x1p-24f ? widest / 7.0f : 0.0f;
    scales[g] = scale > 0 ? scale : 1.0f;
    for (int64_t j = g * group; j < (g + 1) * group; ++j)
      q[j] = scale > 0 ? std::clamp(std::nearbyint(scaled[j] / scale), -8.0f, 7.0f) : 0.0f;
  }
}

// Mean over the rows of |w| / group amax, in the weights' type.
std::vector<float> weight_scale(ThreadPool& pool, const DenseLinear& linear, int64_t features,
                                const RoundingOptions& options) {
  std::vector<float> result(static_cast<size_t>(features));
  const int group = options.group_size;
  pool.parallel_for(features / group, [&](int64_t g, int) {
    std::vector<double> sum(static_cast<size_t>(group));
    for (int64_t r = 0; r < linear.out_features; ++r) {
      const float* w = linear.weight + r * features + g * group;
      float widest = 0;
      for (int j = 0; j < group; ++j) widest = std::max(widest, std::fabs(w[j]));
      widest += smallest_normal(options.dtype);
      for (int j = 0; j < group; ++j)
        sum[static_cast<size_t>(j)] += double{round_to(options.dtype, std::fabs(w[j]) / widest)};
    }
    for (int j = 0; j < group; ++j) {
      result[static_cast<size_t>(g * group + j)] =
          round_to(options.dtype, static_cast<float>(sum[static_cast<size_t>(j)] /
                                                     static_cast<double>(linear.out_features)));
    }
  });
  return result;
}

std::vector<float> make_pre_scale(const std::vector<float>& act, const std::vector<float>& weight,
                                  double alpha, DType dtype) {
  std::vector<float> pre(act.size());
  const float tiny = smallest_normal(dtype);
  for (size_t c = 0; c < act.size(); ++c) {
    const double scale =
        std::pow(double{act[c]}, alpha) / (std::pow(double{weight[c]}, 1 - alpha) + double{tiny});
    pre[c] = static_cast<float>(std::clamp(scale, 1e-4, 1e4));
  }
  const auto [least, most] = std::minmax_element(pre.begin(), pre.end());
  const float norm = std::sqrt(*least * *most);
  for (float& value : pre) value = round_to(dtype, norm / value);
  return pre;
}

// Sum over the rows of e G e^T, e = w - q * step under `pre`; or of w G w^T without one.
double linear_loss(ThreadPool& pool, const DenseLinear& linear, int64_t features, const Gram& gram,
                   const std::vector<float>* pre, const RoundingOptions& options) {
  const int64_t chunks = (linear.out_features + kPanelRows - 1) / kPanelRows;
  std::vector<double> losses(static_cast<size_t>(chunks));
  pool.parallel_for(chunks, [&](int64_t chunk, int) {
    throw_if_interrupted();
    Panel panel;
    panel.rows = std::min(kPanelRows, linear.out_features - chunk * kPanelRows);
    panel.features = features;
    panel.group = options.group_size;
    const float* w = linear.weight + chunk * kPanelRows * features;
    panel.error.assign(w, w + panel.rows * features);
    panel.product.resize(panel.error.size());
    if (pre != nullptr) {
      std::vector<float> scaled(static_cast<size_t>(features)), q(scaled.size());
      std::vector<float> scales(static_cast<size_t>(panel.groups()));
      for (int64_t r = 0; r < panel.rows; ++r) {
        float* e = panel.error.data() + r * features;
        scale_row(e, pre->data(), features, options.dtype, scaled.data());
        round_row(scaled.data(), features, options.group_size, scales.data(), q.data());
        for (int64_t j = 0; j < features; ++j) {
          e[j] -= q[static_cast<size_t>(j)] * scales[static_cast<size_t>(j / panel.group)] *
                  (*pre)[static_cast<size_t>(j)];
        }
      }
    }
    losses[static_cast<size_t>(chunk)] = panel_loss(panel, gram);
  });
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

}  // namespace

LiteResult quantize_lite(ThreadPool& pool, std::span<const DenseLinear> parts, int64_t in_features,
                         const InputStatistics& input, const RoundingOptions& options) {
  const size_t features = static_cast<size_t>(in_features);
  const DType dtype = options.dtype;
  std::vector<float> act = input.mean_abs();
  for (float& value : act) value = round_to(dtype, value);
  const std::vector<float> ones(features, 1.0f);

  LiteResult result;
  std::vector<std::vector<float>> pres;
  double energy = 0, rtn = 0, scaled_loss = 0;
  for (const DenseLinear& part : parts) {
    const std::vector<float> weight = weight_scale(pool, part, in_features, options);
    energy += linear_loss(pool, part, in_features, input.gram(), nullptr, options);
    rtn += linear_loss(pool, part, in_features, input.gram(), &ones, options);
    double best = 0;
    std::vector<float> best_pre;
    for (int step = 0; step <= kAlphaSteps; ++step) {
      const double alpha = static_cast<double>(step) / kAlphaSteps;
      std::vector<float> pre = make_pre_scale(act, weight, alpha, dtype);
      const double loss = linear_loss(pool, part, in_features, input.gram(), &pre, options);
      if (step == 0 || loss < best) {
        best = loss, best_pre = std::move(pre);
        if (result.alphas.size() < pres.size() + 1) result.alphas.emplace_back();
        result.alphas.back() = alpha;
      }
    }
    scaled_loss += best;
    pres.push_back(std::move(best_pre));
  }

  CheckpointLinear& out = result.linear;
  out.pre_scale.assign(features, 0.0f);
  for (size_t j = 0; j < features; ++j) {
    float sum = 0;
    for (const std::vector<float>& pre : pres) sum += pre[j];
    out.pre_scale[j] = round_to(dtype, sum / static_cast<float>(pres.size()));
  }
  const int64_t groups = in_features / options.group_size;
  for (size_t p = 0; p < parts.size(); ++p) {
    const size_t at = out.q.size(), scale_at = out.scales.size();
    out.q.resize(at + static_cast<size_t>(parts[p].out_features) * features);
    out.scales.resize(scale_at + static_cast<size_t>(parts[p].out_features * groups));
    pool.parallel_for(parts[p].out_features, [&](int64_t r, int) {
      std::vector<float> scaled(features), q(features);
      scale_row(parts[p].weight + r * in_features, pres[p].data(), in_features, dtype,
                scaled.data());
      if (parts.size() > 1) {  // onto the common pre-scale: both steps round to the weights' type
        for (size_t j = 0; j < features; ++j) {
          scaled[j] = round_to(dtype, round_to(dtype, scaled[j] * pres[p][j]) / out.pre_scale[j]);
        }
      }
      round_row(scaled.data(), in_features, options.group_size,
                out.scales.data() + scale_at + static_cast<size_t>(r * groups), q.data());
      std::transform(q.begin(), q.end(), out.q.begin() + static_cast<int64_t>(at) + r * in_features,
                     [](float value) { return static_cast<int8_t>(value); });
    });
  }

  // The error of what is really written, after the averaging.
  double loss = 0;
  std::vector<float> dense = dequantize(pool, out, in_features);
  int64_t row = 0;
  for (const DenseLinear& part : parts) {
    const float* w = part.weight;
    float* e = dense.data() + row * in_features;
    for (int64_t i = 0; i < part.out_features * in_features; ++i) e[i] = w[i] - e[i];
    loss += linear_loss(pool, {e, part.out_features}, in_features, input.gram(), nullptr, options);
    row += part.out_features;
  }
  GroupReport& report = result.report;
  for (const double alpha : result.alphas)
    report.alpha += alpha / static_cast<double>(result.alphas.size());
  report.beta = 1 - report.alpha;
  if (energy > 0) {
    report.error_rtn = rtn / energy;
    report.error_scaled = scaled_loss / energy;
    report.error = loss / energy;
  }
  return result;
}

}  // namespace nibble::awq
