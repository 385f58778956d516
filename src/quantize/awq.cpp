// SPDX-License-Identifier: Apache-2.0
#include "quantize/awq.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/error.h"
#include "base/half.h"
#include "base/interrupt.h"
#include "quantize/group_search.h"
#include "quantize/rounding.h"
#include "spec/weight_table.h"

namespace nibble::awq {
namespace {

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

std::vector<int64_t> rows_of(std::span<const DenseLinear> linears) {
  std::vector<int64_t> rows;
  for (const DenseLinear& linear : linears) rows.push_back(linear.out_features);
  return rows;
}

class HostGroup final : public GroupSearch {
 public:
  HostGroup(ThreadPool& pool, std::span<const DenseLinear> linears, int64_t features,
            const InputStatistics& input, const RoundingOptions& options)
      : GroupSearch(options),
        pool_(pool),
        linears_(linears),
        features_(features),
        gram_(input.gram()),
        ranges_(panel_ranges(rows_of(linears))),
        stride_(search_stride(ranges_.size())),
        panels_(static_cast<size_t>(pool.num_threads())) {
    set_means(input.mean_abs(), column_mean_abs(pool, linears, features));
  }

 private:
  Energy energy() override {
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
    Energy energy;
    for (size_t i = 0; i < energies.size(); ++i) {
      energy.all += energies[i];
      if (i % stride_ == 0) energy.voters += energies[i];
    }
    return energy;
  }

  double candidate_loss(const std::vector<float>& pre, std::span<const float> ratios) override {
    const int64_t voters = static_cast<int64_t>((ranges_.size() + stride_ - 1) / stride_);
    std::vector<double> losses(static_cast<size_t>(voters));
    pool_.parallel_for(voters, [&](int64_t chunk, int thread) {
      throw_if_interrupted();
      Panel& panel = open_panel(ranges_[static_cast<size_t>(chunk) * stride_], pre, thread);
      choose_scales(panel, gram_, ratios, scale_type(options_));
      round_nearest(panel);
      losses[static_cast<size_t>(chunk)] = panel_loss(panel, gram_);
    });
    double total = 0;
    for (const double loss : losses) total += loss;
    return total;
  }

  Rounded round(const std::vector<float>& pre, std::span<const float> ratios) override {
    Rounded result;
    std::vector<float> factor;
    if (options_.rounding == Rounding::kCompensated)
      factor_gram(pool_, gram_, options_.damping, factor);
    for (const DenseLinear& linear : linears_) {
      CheckpointLinear& out = result.linears.emplace_back();
      out.q.resize(static_cast<size_t>(linear.out_features * features_));
      out.scales.resize(static_cast<size_t>(linear.out_features * features_ / options_.group_size));
    }
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
    double clip = 0;
    int64_t rows = 0;
    for (size_t i = 0; i < ranges_.size(); ++i)
      result.loss += losses[i], clip += clips[i], rows += ranges_[i].rows;
    const int64_t num_groups = features_ / options_.group_size;
    result.mean_clip = clip / static_cast<double>(rows * num_groups);
    return result;
  }

  Panel& open_panel(const PanelRange& range, const std::vector<float>& pre, int thread) {
    Panel& panel = panels_[static_cast<size_t>(thread)];
    panel.rows = range.rows;
    panel.features = features_;
    panel.group = options_.group_size;
    panel.weight = linears_[range.linear].weight + range.begin * features_;
    panel.pre = pre.data();
    return panel;
  }

  ThreadPool& pool_;
  std::span<const DenseLinear> linears_;
  const int64_t features_;
  const Gram& gram_;
  std::vector<PanelRange> ranges_;
  size_t stride_;
  std::vector<Panel> panels_;  // one a thread
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
  return HostGroup(pool, linears, in_features, input, options).run();
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
