// Which kernel tables this machine can run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "backends/cpu/kernels.h"

namespace nibble::cpu {

/// The table for a name of make_cpu_backend(); throws as that does.
const Kernels& kernels_for(std::string_view isa);

}  // namespace nibble::cpu
