// The search for a group's scales, which host (awq.cpp) and device (device_group.cpp) share: both
// only say what a candidate loses and round with the best one. Internal to quantize/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantize/awq.h"

namespace nibble::awq {

inline constexpr int64_t kPanelRows = 128;       // rows are looked at in panels of this many
inline constexpr int64_t kMaxSearchRows = 8192;  // rows that vote on the scale candidates

/// Rows of a group's linears, cut into panels that never straddle two linears.
struct PanelRange {
  size_t linear;
  int64_t begin, rows;
};
std::vector<PanelRange> panel_ranges(std::span<const int64_t> out_features);
/// Every how manyth panel votes.
size_t search_stride(size_t num_panels);

/// A scale that TensorRT-LLM casts to the model's type when it loads is chosen exact in bf16, which
/// f16 holds too.
DType scale_type(const RoundingOptions& options);

class GroupSearch {
 public:
  virtual ~GroupSearch() = default;
  QuantizedGroup run();

 protected:
  struct Energy {
    double all = 0, voters = 0;
  };
  struct Rounded {
    std::vector<CheckpointLinear> linears;
    double loss = 0;
    double mean_clip = 1;
  };
  explicit GroupSearch(const RoundingOptions& options) : options_(options) {}
  /// Mean |x| and mean |w| of each in-channel; before run().
  void set_means(std::vector<float> act, std::vector<float> weight);

  /// w G w^T of all rows, and of those that vote: what errors are reported relative to.
  virtual Energy energy() = 0;
  /// Loss of rounding to nearest under `pre`, over the rows that vote.
  virtual double candidate_loss(const std::vector<float>& pre, std::span<const float> ratios) = 0;
  virtual Rounded round(const std::vector<float>& pre, std::span<const float> ratios) = 0;

  const RoundingOptions options_;

 private:
  std::vector<float> search(GroupReport& report);
  std::vector<float> pre_scale(double alpha, double beta) const;
  std::vector<float> act_, weight_;
};

}  // namespace nibble::awq
