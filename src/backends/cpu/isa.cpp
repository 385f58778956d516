// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/isa.h"

#include <fmt/ranges.h>
#include "backends/cpu/cpu_backend.h"

#include "base/error.h"

namespace nibble {
namespace {

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide
// registers.
bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}
bool has_avxvnni() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avxvnni");
#else
  return false;
#endif
}
bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

[[noreturn]] void refuse(std::string_view isa, std::string_view needs) {
  fail(ErrorKind::kDevice,
       "instruction set {} asked for, but this machine lacks it (needs {}); it can run {}", isa,
       needs, fmt::join(available_cpu_isas(), ", "));
}

}  // namespace

std::vector<std::string> available_cpu_isas() {
  std::vector<std::string> isas = {"generic"};
  if (has_avx2()) isas.emplace_back("avx2-plain");
  if (has_avxvnni()) isas.emplace_back("avx2");
  if (has_avx512()) isas.emplace_back("avx512");
  return isas;
}

std::string resolve_cpu_isa(std::string_view isa) {
  if (isa == "native") return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "generic";
  cpu::kernels_for(isa);
  return std::string(isa);
}

namespace cpu {

const Kernels& kernels_for(std::string_view isa) {
  if (isa == "generic") return kKernelsGeneric;
  if (isa == "native") return kernels_for(resolve_cpu_isa(isa));
  const bool avx2 = isa == "avx2", plain = isa == "avx2-plain", avx512 = isa == "avx512";
  if (!avx2 && !plain && !avx512) {
    fail(ErrorKind::kUsage,
         "unknown instruction set \"{}\"; known: native, avx512, avx2, avx2-plain, generic", isa);
  }
  if (avx512 && !has_avx512()) refuse(isa, "AVX-512 F, BW, VL, DQ and VNNI");
  if ((avx2 || plain) && !has_avx2()) refuse(isa, "AVX2, FMA and F16C");
#if defined(__x86_64__)
  if (avx512) return kKernelsAvx512;
  if (avx2 && has_avxvnni()) return kKernelsAvxVnni;
  return kKernelsAvx2;
#else
  return kKernelsGeneric;
#endif
}

}  // namespace cpu
}  // namespace nibble
