// Which linears of a layer read one input: they are searched together. Internal to quantize/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "model/decoder.h"
#include "quantize/report.h"
#include "spec/weight_table.h"

namespace nibble {

struct InputGroup {
  Tap tap;
  std::vector<WeightRole> roles;
};
const std::vector<InputGroup>& input_groups();

/// Whether the linears that read it add to the residual stream.
bool adds_to_stream(Tap tap);

/// mean_abs: [features] mean |x| of each channel.
InputReport describe_input(const std::vector<float>& mean_abs, float max_abs);

}  // namespace nibble
