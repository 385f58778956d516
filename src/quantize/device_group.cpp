// SPDX-License-Identifier: Apache-2.0
#include "quantize/device_group.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/interrupt.h"
#include "quantize/drift.h"

namespace nibble::awq {
namespace {

template <typename T>
std::vector<T> download(Backend& backend, const void* from, int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  backend.download(out.data(), from, out.size() * sizeof(T));
  backend.sync();
  return out;
}

}  // namespace

DeviceStatistics::DeviceStatistics(Backend& backend, int64_t features, int64_t granularity,
                                   uint64_t max_gram_bytes, bool drift, int64_t residual_features)
    : backend_(backend),
      ops_(*backend.calibration_ops()),
      features_(features),
      block_(gram_block(features, granularity, max_gram_bytes)),
      residual_features_(residual_features) {
  const auto zeros = [&](int64_t count, size_t size) {
    Buffer buffer = backend.alloc(static_cast<size_t>(count) * size);
    ops_.clear(buffer.data(), buffer.bytes());
    return buffer;
  };
  gram_ = zeros(gram_size(), sizeof(float));
  if (drift) drift_ = zeros(gram_size(), sizeof(float));
  if (residual_features > 0) residual_ = zeros(residual_features * features, sizeof(float));
  sums_ = zeros(features, sizeof(double));
  maximum_ = zeros(1, sizeof(float));
}

void DeviceStatistics::add(const void* x, int64_t rows) {
  const size_t act = backend_.act_bytes();
  for (int64_t first = 0; first < features_; first += block_) {
    const auto* columns = static_cast<const std::byte*>(x) + static_cast<size_t>(first) * act;
    ops_.add_product(columns, features_, columns, features_, rows, block_, block_,
                     gram_.as<float>() + first * block_, block_);
  }
  ops_.add_abs(x, rows, features_, sums_.as<double>(), maximum_.as<float>());
  tokens_ += rows;
}

// X_dense^T X is summed here; finish() takes the Gram matrix off.
void DeviceStatistics::add_drift(const void* x, const void* dense, const void* residual,
                                 int64_t rows) {
  const size_t act = backend_.act_bytes();
  for (int64_t first = 0; first < features_; first += block_) {
    const size_t offset = static_cast<size_t>(first) * act;
    ops_.add_product(static_cast<const std::byte*>(dense) + offset, features_,
                     static_cast<const std::byte*>(x) + offset, features_, rows, block_, block_,
                     drift_.as<float>() + first * block_, block_);
  }
  if (residual_features_ == 0) return;
  ops_.add_product(residual, residual_features_, x, features_, rows, residual_features_, features_,
                   residual_.as<float>(), features_);
}

void DeviceStatistics::finish() {
  NIBBLE_CHECK(tokens_ > 0, "no calibration tokens");
  const float inverse = 1.0f / static_cast<float>(tokens_);
  ops_.combine(inverse, gram_.as<float>(), 0, nullptr, gram_size());
  if (has_drift()) ops_.combine(inverse, drift_.as<float>(), -1, gram_.as<float>(), gram_size());
  if (residual_features_ > 0)
    ops_.combine(inverse, residual_.as<float>(), 0, nullptr, residual_features_ * features_);
  mean_abs_.clear();
  bool finite = true;
  for (const double sum : download<double>(backend_, sums_.data(), features_)) {
    finite = finite && std::isfinite(sum);
    mean_abs_.push_back(static_cast<float>(sum / static_cast<double>(tokens_)));
  }
  max_abs_ = finite ? download<float>(backend_, maximum_.data(), 1)[0] : std::nanf("");
  mean_diagonal_ = ops_.trace(gram()) / static_cast<double>(features_);
}

DeviceGroup::DeviceGroup(Backend& backend, std::span<const LinearOperand> linears,
                         const DeviceStatistics& input, const RoundingOptions& options,
                         float drift_strength)
    : GroupSearch(options),
      backend_(backend),
      ops_(*backend.calibration_ops()),
      input_(input),
      features_(linears[0].in_features) {
  const int64_t features = features_;
  for (const LinearOperand& linear : linears) {
    out_features_.push_back(linear.out_features);
    rows_ += linear.out_features;
  }
  const int64_t size = rows_ * features;
  weight_ = floats(size);
  int64_t row = 0;
  for (const LinearOperand& linear : linears) {
    ops_.widen(linear, weight_.as<float>() + row * features);
    row += linear.out_features;
  }
  scales_ = floats(size / options.group_size);
  q_ = floats(size);
  error_ = floats(size);
  product_ = floats(size);
  pre_ = floats(features);
  if (drift_strength > 0 && input.has_drift()) correct_drift(drift_strength);

  const Buffer sums = backend.alloc(static_cast<size_t>(features) * sizeof(double));
  ops_.clear(sums.data(), sums.bytes());
  ops_.add_weight_abs(weight_.as<float>(), rows_, features, sums.as<double>());
  std::vector<float> mean;
  for (const double sum : download<double>(backend, sums.data(), features)) {
    finite_ = finite_ && std::isfinite(sum);
    mean.push_back(static_cast<float>(sum / static_cast<double>(rows_)));
  }
  set_means(input.mean_abs(), std::move(mean));

  const std::vector<PanelRange> panels = panel_ranges(out_features_);
  const size_t stride = search_stride(panels.size());
  if (stride == 1) {
    num_voters_ = rows_;
    return;
  }
  for (size_t i = 0; i < panels.size(); i += stride) num_voters_ += panels[i].rows;
  voting_ = floats(num_voters_ * features);
  int64_t to = 0;
  for (size_t i = 0; i < panels.size(); i += stride) {
    int64_t from = panels[i].begin;
    for (size_t l = 0; l < panels[i].linear; ++l) from += out_features_[l];
    backend.copy(voting_.as<float>() + to * features, weight_.as<float>() + from * features,
                 static_cast<size_t>(panels[i].rows * features) * sizeof(float));
    to += panels[i].rows;
  }
}

DevicePanel DeviceGroup::all_rows() const {
  return {.rows = rows_,
          .features = features_,
          .group = options_.group_size,
          .weight = weight_.as<float>(),
          .pre = pre_.as<float>(),
          .scales = scales_.as<float>(),
          .q = q_.as<float>(),
          .error = error_.as<float>(),
          .product = product_.as<float>()};
}

DevicePanel DeviceGroup::voters() const {
  DevicePanel panel = all_rows();
  panel.rows = num_voters_;
  if (voting_.data() != nullptr) panel.weight = voting_.as<float>();
  return panel;
}

void DeviceGroup::set_pre(const std::vector<float>& pre) {
  backend_.upload(pre_.data(), pre.data(), pre.size() * sizeof(float));
  backend_.sync();  // `pre` may go
}

// As factor_gram(): damping grows until the factor exists.
Buffer DeviceGroup::factor(double damping, Buffer* diagonal) {
  const float floor = static_cast<float>(std::max(input_.mean_diagonal() * 1e-6, 1e-30));
  const BlockMatrix gram = input_.gram();
  Buffer factor = floats(features_ * gram.block);
  *diagonal = floats(features_);
  for (int attempt = 0; attempt < 12; ++attempt, damping = std::max(damping, 1e-6) * 10) {
    throw_if_interrupted();
    if (ops_.factor(gram, static_cast<float>(damping), floor, factor.as<float>(),
                    diagonal->as<float>()))
      return factor;
  }
  fail(ErrorKind::kInternal, "the calibration Hessian of {} channels cannot be factored",
       features_);
}

void DeviceGroup::correct_drift(float strength) {
  Buffer diagonal;
  const Buffer r = factor(double{kDriftDamping}, &diagonal);
  const BlockMatrix drift = input_.drift();
  float* b = error_.as<float>();
  ops_.multiply(weight_.as<float>(), drift, rows_, b);
  if (input_.residual() != nullptr) ops_.combine(1, b, 1, input_.residual(), rows_ * features_);
  ops_.solve({r.as<float>(), features_, drift.block}, diagonal.as<float>(), rows_, b);
  ops_.combine(1, weight_.as<float>(), strength, b, rows_ * features_);
  backend_.sync();  // before the factor goes
}

GroupSearch::Energy DeviceGroup::energy() {
  // loss() reads the error only: here the weights are it.
  DevicePanel all = all_rows(), some = voters();
  all.error = weight_.as<float>();
  some.error = voting_.data() != nullptr ? voting_.as<float>() : weight_.as<float>();
  const double energy = ops_.loss(all, input_.gram());
  return {energy, voting_.data() != nullptr ? ops_.loss(some, input_.gram()) : energy};
}

double DeviceGroup::candidate_loss(const std::vector<float>& pre, std::span<const float> ratios) {
  throw_if_interrupted();
  set_pre(pre);
  const DevicePanel panel = voters();
  std::vector<uint64_t> counts(ratios.size());
  ops_.choose_scales(panel, input_.gram(), ratios, scale_type(options_), counts);
  ops_.round_nearest(panel);
  return ops_.loss(panel, input_.gram());
}

GroupSearch::Rounded DeviceGroup::round(const std::vector<float>& pre,
                                        std::span<const float> ratios) {
  Rounded result;
  set_pre(pre);
  const DevicePanel panel = all_rows();
  std::vector<uint64_t> counts(ratios.size());
  ops_.choose_scales(panel, input_.gram(), ratios, scale_type(options_), counts);
  double ratio_sum = 0, chosen = 0;
  for (size_t i = 0; i < ratios.size(); ++i) {
    ratio_sum += double{ratios[i]} * static_cast<double>(counts[i]);
    chosen += static_cast<double>(counts[i]);
  }
  result.mean_clip = ratio_sum / chosen;
  if (options_.rounding == Rounding::kCompensated) {
    Buffer diagonal;
    const Buffer r = factor(double{options_.damping}, &diagonal);
    ops_.round_compensated(panel, {r.as<float>(), features_, input_.gram().block});
    ops_.descend(panel, input_.gram(), options_.sweeps, scale_type(options_));
    backend_.sync();  // before the factor goes
  } else {
    ops_.round_nearest(panel);
  }
  result.loss = ops_.loss(panel, input_.gram());

  const int64_t groups = features_ / options_.group_size;
  int64_t row = 0;
  for (const int64_t rows : out_features_) {
    DevicePanel part = panel;
    part.rows = rows;
    part.scales += row * groups;
    part.q += row * features_;
    Buffer ints = backend_.alloc(static_cast<size_t>(rows * features_));
    const size_t dense_bytes = ops_.dense_layout() == WeightLayout::kBf16Rows ? 2 : 4;
    Buffer dense = backend_.alloc(static_cast<size_t>(rows * features_) * dense_bytes);
    ops_.results(part, ints.as<int8_t>(), dense.data());
    CheckpointLinear& linear = result.linears.emplace_back();
    linear.q = download<int8_t>(backend_, ints.data(), rows * features_);
    linear.scales = download<float>(backend_, part.scales, rows * groups);
    dequantized_.push_back(std::move(dense));
    row += rows;
  }
  return result;
}

}  // namespace nibble::awq
