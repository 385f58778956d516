// SPDX-License-Identifier: Apache-2.0
#include "quantize/input_groups.h"

#include <algorithm>

namespace nibble {

const std::vector<InputGroup>& input_groups() {
  static const std::vector<InputGroup> groups = {
      {Tap::kQkvInput, {WeightRole::kQkv}},
      {Tap::kOInput, {WeightRole::kO}},
      {Tap::kGateUpInput, {WeightRole::kGate, WeightRole::kUp}},
      {Tap::kDownInput, {WeightRole::kDown}}};
  return groups;
}

bool adds_to_stream(Tap tap) { return tap == Tap::kOInput || tap == Tap::kDownInput; }

InputReport describe_input(const std::vector<float>& mean_abs, float max_abs) {
  std::vector<float> sorted = mean_abs;
  const auto middle = sorted.begin() + static_cast<int64_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  const auto loudest = std::max_element(mean_abs.begin(), mean_abs.end());
  return {.max_abs = max_abs,
          .median_channel = *middle,
          .loudest_channel_mean = *loudest,
          .loudest_channel = loudest - mean_abs.begin()};
}

}  // namespace nibble
