// The cpu backend: int4 and dense GEMM, attention over the int8 paged cache, sampling, on generic,
// AVX2
// (+AVX-VNNI) or AVX-512 VNNI kernels of one binary. Activations are fp32 in memory; the precision
// of int4 linears is the plan's choice:
//   kF32        fp32 dot products of the exact weights
//   kInt8Group  activations rounded to int8 by groups of 64 channels (scale amax / 127), exact
//   integer dot products
//               per group, fp32 sums over groups
// Every op keeps the seam's bitwise invariant: neither rows in the call, threads, chunking nor
// block ids change bits. Bits do differ between instruction sets. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ops/backend.h"
#include "spec/engine_plan.h"

namespace nibble {

/// Instruction sets this machine can run, slowest first: "generic", "avx2-plain", "avx2" (with
/// AVX-VNNI where present, else equal to avx2-plain and left out), "avx512".
std::vector<std::string> available_cpu_isas();

/// "native" -> the best of "avx512", "avx2" and "generic" here; another name is checked and
/// returned. Throws Error{kDevice} when this machine lacks it, Error{kUsage} for an unknown name.
std::string resolve_cpu_isa(std::string_view isa);

/// isa: "native", "avx512", "avx2", "avx2-plain" (no AVX-VNNI even where present) or "generic";
/// throws as resolve_cpu_isa(). num_threads 0: usable_cpu_count().
std::unique_ptr<Backend> make_cpu_backend(std::string_view isa, ActivationPrecision precision,
                                          int num_threads = 0);

}  // namespace nibble
