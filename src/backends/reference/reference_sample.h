// The sampling op, one row, as specification. See SampleRow for the order of operations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/operands.h"

namespace nibble::reference {

/// `logits`: [vocab], overwritten. Writes row `r` of `result`.
void sample_row(const SampleBatch& batch, int r, float* logits, const SampleResult& result);

}  // namespace nibble::reference
