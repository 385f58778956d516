// The reference backend: every op of the seam as naive fp32 loops. It is the executable
// specification; speed is no concern here. Activations are fp32. KV block layout: see
// reference_kv.h. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "ops/backend.h"

namespace nibble {

/// kE4m3: what int4 linears read is rounded to e4m3 first. Any other precision is f32.
std::unique_ptr<Backend> make_reference_backend(
    ActivationPrecision precision = ActivationPrecision::kF32);

}  // namespace nibble
