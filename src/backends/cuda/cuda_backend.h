// The cuda backend: the ops of the seam as kernels on one stream of device 0; for sm_90a, or the
// portable ones (variant.h).
// Activations bf16, sums f32, weights kCudaInt4 or kBf16Rows, pages of 64 tokens, head_dim 128.
//
// Where it keeps the seam's invariant (a row depends on its own sequence only, bit for bit), and
// where not: embed, rms_norm, rope_store_kv, sample, logits, bf16 linears and portable attention
// keep it. int4 linears sum over k in an order that depends on the number of rows in the step
// (kernel and tile by M), and up to 64 rows they take part in the norms around them. With an int8
// cache and 4 query heads per KV head, one-token rows and prompt chunks run different attention
// kernels; a one-token row's order of summation depends on the number of sequences, in mixed steps
// on all their lengths. All of it is run-to-run deterministic.
//
// Ops may be put off until the op that follows shows whether one kernel can do both; whoever looks
// (copies, waits, other ops) finds them done.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "ops/backend.h"

namespace nibble::cuda {

/// Throws Error{kDevice} that names what is missing: driver, GPU, or the right GPU.
/// precision: kBf16, or kE4m3 for int4 linears with e4m3 inputs in steps with rows of prompts and
/// in those of kFp8MinTokens and more (sm_90 only).
std::unique_ptr<Backend> make_cuda_backend(ActivationPrecision precision);

}  // namespace nibble::cuda
