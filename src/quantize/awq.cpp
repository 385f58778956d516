// SPDX-License-Identifier: Apache-2.0
#include "quantize/awq.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/error.h"
#include "base/half.h"
#include "base/interrupt.h"
#include "quantize/rounding.h"
#include "spec/weight_table.h"

namespace nibble::awq {
namespace {

constexpr int64_t kPanelRows = 128;  // of one chunk of work; results depend on it, so it is fixed
constexpr int64_t kMaxSearchRows = 8192;  // rows that vote on the scale candidates
constexpr size_t kFinalists = 4;          // candidates that are tried with the clip search

// Clip ratios: above 1 a step is wider than the largest weight asks for, which can land more
// weights near a step.
std::vector<float> clip_ratios() {
  std::vector<float> ratios;
  for (int i = 0; i < 24; ++i) ratios.push_back(1.05f - 0.025f * static_cast<float>(i));
  return ratios;
}

// Rows of the group's linears, cut into panels that never straddle two linears.
struct PanelRange {
  size_t linear;
  int64_t begin, rows;
};
std::vector<PanelRange> panel_ranges(std::span<const DenseLinear> linears) {
  std::vector<PanelRange> ranges;
  for (size_t i = 0; i < linears.size(); ++i) {
    for (int64_t row = 0; row < linears[i].out_features; row += kPanelRows) {
      ranges.push_back({i, row, std::min(kPanelRows, linears[i].out_features - row)});
    }
  }
  return ranges;
}

// Mean |w| of each in-channel over all rows.
std::vector<float> column_mean_abs(ThreadPool& pool, std::span<const DenseLinear> linears,
                                   int64_t features) {
  std::vector<float> mean(static_cast<size_t>(features));
  int64_t rows = 0;
  for (const DenseLinear& linear : linears) rows += linear.out_features;
  constexpr int64_t kColumns = 64;
  pool.parallel_for((features + kColumns - 1) / kColumns, [&](int64_t chunk, int) {
    const int64_t begin = chunk * kColumns, count = std::min(kColumns, features - begin);
    double sum[kColumns] = {};
    for (const DenseLinear& linear : linears) {
      for (int64_t r = 0; r < linear.out_features; ++r) {
        const float* w = linear.weight + r * features + begin;
        for (int64_t c = 0; c < count; ++c) sum[c] += double{std::fabs(w[c])};
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      mean[static_cast<size_t>(begin + c)] = static_cast<float>(sum[c] / static_cast<double>(rows));
    }
  });
  return mean;
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

// A scale that TensorRT-LLM casts to the model's type when it loads is chosen exact in bf16, which
// f16 holds too.
DType scale_type(const RoundingOptions& options) {
  return options.dtype == DType::kF32 ? DType::kF32 : DType::kBF16;
}

class GroupQuantizer {
 public:
  GroupQuantizer(ThreadPool& pool, std::span<const DenseLinear> linears, int64_t features,
                 const InputStatistics& input, const RoundingOptions& options)
      : pool_(pool),
        linears_(linears),
        features_(features),
        gram_(input.gram()),
        options_(options),
        ranges_(panel_ranges(linears)),
        panels_(static_cast<size_t>(pool.num_threads())) {
    search_stride_ =
        std::max<size_t>(1, ranges_.size() * static_cast<size_t>(kPanelRows) / kMaxSearchRows);
    act_ = input.mean_abs();
    weight_ = column_mean_abs(pool, linears, features);
    raise_floor(act_);
    raise_floor(weight_);
  }

  QuantizedGroup run() {
    QuantizedGroup result;
    GroupReport& report = result.report;
    const double energy = weight_energy();
    const auto relative = [&](double loss) { return energy > 0 ? loss / energy : 0.0; };
    const std::vector<float> pre = search(report);
    if (voters_energy_ > 0)
      report.error_rtn /= voters_energy_, report.error_scaled /= voters_energy_;

    std::vector<float> factor;
    if (options_.rounding == Rounding::kCompensated)
      factor_gram(pool_, gram_, options_.damping, factor);
    for (const DenseLinear& linear : linears_) {
      CheckpointLinear& out = result.linears.emplace_back();
      out.q.resize(static_cast<size_t>(linear.out_features * features_));
      out.scales.resize(static_cast<size_t>(linear.out_features * features_ / options_.group_size));
      out.pre_scale = pre;
    }
    const std::vector<float> ratios = options_.clip ? clip_ratios() : std::vector<float>{1.0f};
    std::vector<double> losses(ranges_.size()), clips(ranges_.size());
    pool_.parallel_for(static_cast<int64_t>(ranges_.size()), [&](int64_t chunk, int thread) {
      throw_if_interrupted();
      const PanelRange& range = ranges_[static_cast<size_t>(chunk)];
      Panel& panel = open_panel(range, pre, thread);
      clips[static_cast<size_t>(chunk)] = choose_scales(panel, gram_, ratios, scale_type(options_));
      if (options_.rounding == Rounding::kCompensated) {
        round_compensated(panel, gram_, factor);
        descend(panel, gram_, options_.sweeps, scale_type(options_));
      } else {
        round_nearest(panel);
      }
      losses[static_cast<size_t>(chunk)] = panel_loss(panel, gram_);
      CheckpointLinear& out = result.linears[range.linear];
      std::transform(panel.q.begin(), panel.q.begin() + range.rows * features_,
                     out.q.begin() + range.begin * features_,
                     [](float q) { return static_cast<int8_t>(q); });
      std::copy(panel.scales.begin(), panel.scales.end(),
                out.scales.begin() + range.begin * features_ / options_.group_size);
    });
    double loss = 0, clip = 0;
    int64_t rows = 0;
    for (size_t i = 0; i < ranges_.size(); ++i)
      loss += losses[i], clip += clips[i], rows += ranges_[i].rows;
    report.error = relative(loss);
    const int64_t num_groups = features_ / options_.group_size;
    report.mean_clip = clip / static_cast<double>(rows * num_groups);
    return result;
  }

 private:
  Panel& open_panel(const PanelRange& range, const std::vector<float>& pre, int thread) {
    Panel& panel = panels_[static_cast<size_t>(thread)];
    panel.rows = range.rows;
    panel.features = features_;
    panel.group = options_.group_size;
    panel.weight = linears_[range.linear].weight + range.begin * features_;
    panel.pre = pre.data();
    return panel;
  }

  // Loss of rounding to nearest under `pre`, over the rows that vote.
  double candidate_loss(const std::vector<float>& pre, std::span<const float> ratios) {
    const int64_t voters =
        static_cast<int64_t>((ranges_.size() + search_stride_ - 1) / search_stride_);
    std::vector<double> losses(static_cast<size_t>(voters));
    pool_.parallel_for(voters, [&](int64_t chunk, int thread) {
      throw_if_interrupted();
      Panel& panel = open_panel(ranges_[static_cast<size_t>(chunk) * search_stride_], pre, thread);
      choose_scales(panel, gram_, ratios, scale_type(options_));
      round_nearest(panel);
      losses[static_cast<size_t>(chunk)] = panel_loss(panel, gram_);
    });
    double total = 0;
    for (const double loss : losses) total += loss;
    return total;
  }

  // w G w^T of all rows, and of those that vote: what errors are reported relative to.
  double weight_energy() {
    const std::vector<float> ones(static_cast<size_t>(features_), 1.0f);
    std::vector<double> energies(ranges_.size());
    pool_.parallel_for(static_cast<int64_t>(ranges_.size()), [&](int64_t chunk, int thread) {
      const PanelRange& range = ranges_[static_cast<size_t>(chunk)];
      Panel& panel = open_panel(range, ones, thread);
      const size_t size = static_cast<size_t>(range.rows * features_);
      panel.error.assign(panel.weight, panel.weight + size);
      panel.product.resize(size);
      energies[static_cast<size_t>(chunk)] = panel_loss(panel, gram_);
    });
    double total = 0;
    for (size_t i = 0; i < energies.size(); ++i) {
      total += energies[i];
      if (i % search_stride_ == 0) voters_energy_ += energies[i];
    }
    return total;
  }

  std::vector<float> search(GroupReport& report) {
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

  std::vector<float> pre_scale(double alpha, double beta) const {
    return make_pre_scale(act_, weight_, alpha, beta, options_.dtype);
  }

  ThreadPool& pool_;
  std::span<const DenseLinear> linears_;
  const int64_t features_;
  const Gram& gram_;
  const RoundingOptions& options_;
  std::vector<PanelRange> ranges_;
  std::vector<Panel> panels_;  // one a thread
  size_t search_stride_ = 1;
  double voters_energy_ = 0;
  std::vector<float> act_, weight_;  // [features] mean |x|, mean |w|
};

}  // namespace

float round_to(DType dtype, float value) {
  switch (dtype) {
    case DType::kBF16: return bf16_to_float(float_to_bf16(value));
    case DType::kF16: return f16_to_float(float_to_f16(value));
    case DType::kF32: return value;
    default: fail(ErrorKind::kInternal, "no rounding to {}", dtype_name(dtype));
  }
}

namespace {

// scale = amax / most, integers in least..most.
CheckpointLinear round_groups(ThreadPool& pool, const DenseLinear& linear, int64_t in_features,
                              int group_size, float least, float most) {
  NIBBLE_CHECK(in_features % group_size == 0, "{} in-features, groups of {}", in_features,
               group_size);
  const int64_t groups = in_features / group_size;
  CheckpointLinear out;
  out.q.resize(static_cast<size_t>(linear.out_features * in_features));
  out.scales.resize(static_cast<size_t>(linear.out_features * groups));
  pool.parallel_for(linear.out_features, [&](int64_t row, int) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = row * in_features + g * group_size;
      float widest = 0;
      for (int64_t j = at; j < at + group_size; ++j)
        widest = std::max(widest, std::fabs(linear.weight[j]));
      float scale = widest / most;
      if (!(scale > 0)) scale = 1.0f;
      out.scales[static_cast<size_t>(row * groups + g)] = scale;
      for (int64_t j = at; j < at + group_size; ++j) {
        const float q =
            std::nearbyint(linear.weight[j] / scale);  // ties to even: the default rounding mode
        out.q[static_cast<size_t>(j)] = static_cast<int8_t>(std::clamp(q, least, most));
      }
    }
  });
  return out;
}

}  // namespace

CheckpointLinear round_to_nearest(ThreadPool& pool, const DenseLinear& linear, int64_t in_features,
                                  int group_size) {
  CheckpointLinear out = round_groups(pool, linear, in_features, group_size, -8.0f, 7.0f);
  out.pre_scale.assign(static_cast<size_t>(in_features), 1.0f);
  return out;
}

CheckpointLinear round_to_int8(ThreadPool& pool, const DenseLinear& linear, int64_t in_features,
                               int group_size) {
  constexpr float kMost = kMaxInt8;
  return round_groups(pool, linear, in_features, group_size, -kMost, kMost);
}

QuantizedGroup quantize_group(ThreadPool& pool, std::span<const DenseLinear> linears,
                              int64_t in_features, const InputStatistics& input,
                              const RoundingOptions& options) {
  NIBBLE_CHECK(input.gram().features == in_features && input.gram().block % options.group_size == 0,
               "statistics of {} features in blocks of {} for a linear of {} in groups of {}",
               input.gram().features, input.gram().block, in_features, options.group_size);
  return GroupQuantizer(pool, linears, in_features, input, options).run();
}

std::vector<float> dequantize(ThreadPool& pool, const CheckpointLinear& linear,
                              int64_t in_features) {
  std::vector<float> weight(linear.q.size());
  const int64_t rows = static_cast<int64_t>(linear.q.size()) / in_features;
  const int64_t groups = static_cast<int64_t>(linear.scales.size()) / rows;
  const int64_t group = in_features / groups;
  pool.parallel_for(rows, [&](int64_t row, int) {
    for (int64_t j = 0; j < in_features; ++j) {
      const size_t at = static_cast<size_t>(row * in_features + j);
      const float step = linear.scales[static_cast<size_t>(row * groups + j / group)] *
                         linear.pre_scale[static_cast<size_t>(j)];
      weight[at] = static_cast<float>(linear.q[at]) * step;
    }
  });
  return weight;
}

}  // namespace nibble::awq
