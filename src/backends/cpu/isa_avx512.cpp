// Kernels for AVX-512 F, BW, VL, DQ and VNNI (flags: cmake/cpu_isa.cmake). Intrinsics only, one
// exported symbol. SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#include <immintrin.h>

#include "backends/cpu/kernels.h"

namespace nibble::cpu {
namespace {
// In this order: each uses what the one before it defines.
// clang-format off
#include "backends/cpu/vector_avx512.h"
#include "backends/cpu/kernel_body.h"
#include "backends/cpu/int4_avx512.h"
// clang-format on
}  // namespace

#define NIBBLE_KERNELS kKernelsAvx512
#define NIBBLE_ISA_NAME "avx512"
#include "backends/cpu/kernel_table.h"
}  // namespace nibble::cpu
#endif
