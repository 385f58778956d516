// Kernels for AVX2, FMA, F16C and AVX-VNNI (flags: cmake/cpu_isa.cmake). Intrinsics only, one
// exported symbol. SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#include <immintrin.h>

#include "backends/cpu/kernels.h"

#define NIBBLE_AVXVNNI 1

namespace nibble::cpu {
namespace {
// In this order: each uses what the one before it defines.
// clang-format off
#include "backends/cpu/vector_avx2.h"
#include "backends/cpu/kernel_body.h"
#include "backends/cpu/int4_avx2.h"
// clang-format on
}  // namespace

#define NIBBLE_KERNELS kKernelsAvxVnni
#define NIBBLE_ISA_NAME "avxvnni"
#include "backends/cpu/kernel_table.h"
}  // namespace nibble::cpu
#endif
