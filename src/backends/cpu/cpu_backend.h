// The cpu backend: AVX-512, AVX2 or plain C++ kernels, chosen at run time from one binary.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "ops/backend.h"

namespace nibble {

/// "native" -> the best of this machine; another name is checked. Throws Error{kDevice or kUsage}.
std::string resolve_cpu_isa(std::string_view isa);

/// `isa`: native, avx512, avx2 or generic. `num_threads` 0: usable_cpu_count().
std::unique_ptr<Backend> make_cpu_backend(std::string_view isa, ActivationPrecision precision, int num_threads);

}  // namespace nibble
