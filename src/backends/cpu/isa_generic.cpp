// Kernels for any CPU: plain C++, one exported symbol.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/kernels.h"

namespace nibble::cpu {
namespace {
// In this order: each uses what the one before it defines.
// clang-format off
#include "backends/cpu/vector_generic.h"
#include "backends/cpu/kernel_body.h"
#include "backends/cpu/int4_generic.h"
// clang-format on
}  // namespace

#define NIBBLE_KERNELS kKernelsGeneric
#define NIBBLE_ISA_NAME "generic"
#include "backends/cpu/kernel_table.h"
}  // namespace nibble::cpu
