// SPDX-License-Identifier: Apache-2.0
#include "quantize/group_search.h"

#include <algorithm>
#include <cmath>

namespace nibble::awq {
namespace {

constexpr size_t kFinalists = 4;  // candidates that are tried with the clip search

// Clip ratios: above 1 a step is wider than the largest weight asks for, which can land more
// weights near a step.
std::vector<float> clip_ratios() {
  std::vector<float> ratios;
  for (int i = 0; i < 24; ++i) ratios.push_back(1.05f - 0.025f * static_cast<float>(i));
  return ratios;
}

// Values far below the rest (dead channels) must not stretch the range of the scales.
void raise_floor(std::vector<float>& values) {
  double mean = 0;
  for (const float value : values) mean += double{value};
  const float floor =
      static_cast<float>(std::max(mean / static_cast<double>(values.size()) * 1e-3, 1e-20));
  for (float& value : values) value = std::max(value, floor);
}

// pre = 1 / s rounded to the checkpoint's type, s = act^alpha / weight^beta with geometric mean 1.
std::vector<float> make_pre_scale(const std::vector<float>& act, const std::vector<float>& weight,
                                  double alpha, double beta, DType dtype) {
  std::vector<double> log_scale(act.size());
  double mean = 0;
  for (size_t c = 0; c < act.size(); ++c) {
    log_scale[c] = alpha * std::log(double{act[c]}) - beta * std::log(double{weight[c]});
    mean += log_scale[c] / static_cast<double>(act.size());
  }
  std::vector<float> pre(act.size());
  for (size_t c = 0; c < act.size(); ++c) {
    const double scale = std::clamp(std::exp(log_scale[c] - mean), 1e-3, 1e3);
    pre[c] = round_to(dtype, static_cast<float>(1.0 / scale));
  }
  return pre;
}

}  // namespace

std::vector<PanelRange> panel_ranges(std::span<const int64_t> out_features) {
  std::vector<PanelRange> ranges;
  for (size_t i = 0; i < out_features.size(); ++i) {
    for (int64_t row = 0; row < out_features[i]; row += kPanelRows)
      ranges.push_back({i, row, std::min(kPanelRows, out_features[i] - row)});
  }
  return ranges;
}

size_t search_stride(size_t num_panels) {
  return std::max<size_t>(1, num_panels * static_cast<size_t>(kPanelRows) / kMaxSearchRows);
}

DType scale_type(const RoundingOptions& options) {
  return options.dtype == DType::kF32 ? DType::kF32 : DType::kBF16;
}

void GroupSearch::set_means(std::vector<float> act, std::vector<float> weight) {
  act_ = std::move(act);
  weight_ = std::move(weight);
  raise_floor(act_);
  raise_floor(weight_);
}

QuantizedGroup GroupSearch::run() {
  QuantizedGroup result;
  GroupReport& report = result.report;
  const Energy weights = energy();
  const std::vector<float> pre = search(report);
  if (weights.voters > 0) report.error_rtn /= weights.voters, report.error_scaled /= weights.voters;
  Rounded rounded = round(pre, options_.clip ? clip_ratios() : std::vector<float>{1.0f});
  for (CheckpointLinear& linear : rounded.linears) linear.pre_scale = pre;
  result.linears = std::move(rounded.linears);
  report.error = weights.all > 0 ? rounded.loss / weights.all : 0.0;
  report.mean_clip = rounded.mean_clip;
  return result;
}

std::vector<float> GroupSearch::search(GroupReport& report) {
  struct Candidate {
    double alpha, beta, loss;
  };
  const float one[] = {1.0f};
  std::vector<Candidate> candidates;
  for (int a = 0; a <= options_.alpha_steps; ++a) {
    for (int b = 0; b <= options_.beta_steps; ++b) {
      const double alpha =
          options_.alpha_steps > 0 ? static_cast<double>(a) / options_.alpha_steps : 0.0;
      const double beta =
          options_.beta_steps > 0 ? static_cast<double>(b) / options_.beta_steps : 0.0;
      candidates.push_back({alpha, beta, candidate_loss(pre_scale(alpha, beta), one)});
    }
  }
  report.error_rtn = candidates[0].loss;  // alpha = beta = 0: all scales one
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.loss < b.loss; });
  report.error_scaled = candidates[0].loss;
  if (options_.clip) {
    candidates.resize(std::min(candidates.size(), kFinalists));
    const std::vector<float> ratios = clip_ratios();
    for (Candidate& candidate : candidates) {
      candidate.loss = candidate_loss(pre_scale(candidate.alpha, candidate.beta), ratios);
    }
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return a.loss < b.loss; });
  }
  report.alpha = candidates[0].alpha;
  report.beta = candidates[0].beta;
  return pre_scale(report.alpha, report.beta);
}

std::vector<float> GroupSearch::pre_scale(double alpha, double beta) const {
  return make_pre_scale(act_, weight_, alpha, beta, options_.dtype);
}

}  // namespace nibble::awq
