// An exactly equivalent model with the activation outliers of a large one: about 1.5 % of the
// channels of each RMSNorm weight that a layer reads are multiplied by 5 to 50, and the matching
// columns of the linears after it divided by the same. Rounding to nearest suffers; a quantizer
// with scales must not. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"

namespace nibble::testing_ {

/// Writes `out` (created), a Hugging Face directory in F32, from the one at `model`. Same seed,
/// same channels.
void write_outlier_model(const fs::path& model, const fs::path& out, uint64_t seed);

}  // namespace nibble::testing_
