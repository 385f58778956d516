// Making up for what the quantized layers before have changed: their errors move a linear's inputs
// and the residual stream it adds to. The least-squares answer to both is another weight, which is
// then rounded instead of the original one (GPTAQ's and QEP's idea, with the residual stream
// added). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "quantize/awq.h"

namespace nibble::awq {

/// All of the answer fits the noise of the calibration texts as well; half of it measured best.
inline constexpr float kDriftStrength = 0.5f;

inline constexpr float kDriftDamping = 0.01f;  // relative to the Gram matrix's diagonal

/// w += strength (w D^T + E^T) (G + 0.01 diag G)^-1 with D = input.drift(), E = input.residual().
/// `weight` is [out_features, features]. Does nothing when there is no drift.
void correct_drift(ThreadPool& pool, const InputStatistics& input, float strength,
                   std::vector<float>& weight);

}  // namespace nibble::awq
