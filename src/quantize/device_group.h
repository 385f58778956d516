// awq.h's statistics and rounding where a device has the activations: the same formulas through
// ops/calibration_ops.h. Internal to quantize/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/backend.h"
#include "quantize/awq.h"
#include "quantize/group_search.h"

namespace nibble::awq {

/// InputStatistics in the backend's memory.
class DeviceStatistics {
 public:
  /// `residual_features`: of the residuals that add_drift() gets; 0: it gets none.
  DeviceStatistics(Backend& backend, int64_t features, int64_t granularity, uint64_t max_gram_bytes,
                   bool drift, int64_t residual_features);
  /// x, dense: act [rows, features]; residual: act [rows, residual_features] or null.
  void add(const void* x, int64_t rows);
  void add_drift(const void* x, const void* dense, const void* residual, int64_t rows);
  void finish();  // once, after the last add()

  BlockMatrix gram() const { return {gram_.as<float>(), features_, block_}; }
  bool has_drift() const { return drift_.data() != nullptr; }
  /// (X_dense - X)^T X / tokens: InputStatistics::drift() transposed, as correct_drift() needs it.
  BlockMatrix drift() const { return {drift_.as<float>(), features_, block_}; }
  /// residual^T X / tokens [residual_features, features]; null without residuals.
  const float* residual() const { return residual_.as<float>(); }
  const std::vector<float>& mean_abs() const { return mean_abs_; }  // host [features]
  float max_abs() const { return max_abs_; }                        // not finite: an input was not
  double mean_diagonal() const { return mean_diagonal_; }           // of the Gram matrix

 private:
  int64_t gram_size() const { return features_ * block_; }
  Backend& backend_;
  CalibrationOps& ops_;
  int64_t features_, block_, residual_features_, tokens_ = 0;
  Buffer gram_, drift_, residual_, sums_, maximum_;
  std::vector<float> mean_abs_;
  float max_abs_ = 0;
  double mean_diagonal_ = 0;
};

class DeviceGroup final : public GroupSearch {
 public:
  /// `linears` are dense and read one input. `drift_strength` 0: weights are taken as they are,
  /// else correct_drift() is done first.
  DeviceGroup(Backend& backend, std::span<const LinearOperand> linears,
              const DeviceStatistics& input, const RoundingOptions& options, float drift_strength);

  /// After run(): the dequantized rows of linear `index`, in the ops' dense_layout().
  Buffer take_dequantized(size_t index) { return std::move(dequantized_[index]); }
  bool finite() const { return finite_; }  // of the weights

 private:
  Energy energy() override;
  double candidate_loss(const std::vector<float>& pre, std::span<const float> ratios) override;
  Rounded round(const std::vector<float>& pre, std::span<const float> ratios) override;

  Buffer floats(int64_t count) {
    return backend_.alloc(static_cast<size_t>(count) * sizeof(float));
  }
  Buffer factor(double damping, Buffer* diagonal);
  void correct_drift(float strength);
  void set_pre(const std::vector<float>& pre);
  DevicePanel all_rows() const;
  DevicePanel voters() const;

  Backend& backend_;
  CalibrationOps& ops_;
  const DeviceStatistics& input_;
  std::vector<int64_t> out_features_;
  const int64_t features_;
  int64_t rows_ = 0, num_voters_ = 0;
  bool finite_ = true;
  Buffer weight_, voting_;  // f32 [rows, features]; of the voters when not all rows vote
  Buffer scales_, q_, error_, product_, pre_;
  std::vector<Buffer> dequantized_;
};

}  // namespace nibble::awq
