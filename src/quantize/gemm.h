// The one dense product of the quantizer, on host floats: C (+)= A B^T over strided views, so that
// X^T X and E G are the same call. Single-threaded on purpose: callers split rows or tiles over a
// ThreadPool, and a result then depends on the split, never on the number of threads. The kernel is
// chosen once per process (AVX-512, AVX2, generic); the three differ in the last bits.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble::awq {

/// Element (i, k) is data[i * row_stride + k * col_stride].
struct MatrixView {
  const float* data = nullptr;
  int64_t row_stride = 0, col_stride = 1;
};

/// c[i, j] = (accumulate ? c[i, j] : 0) + sum_k a(i, k) b(j, k), for i < m, j < n, k < depth.
/// c is row-major with leading dimension ldc and must not overlap a or b.
void gemm(int64_t m, int64_t n, int64_t depth, MatrixView a, MatrixView b, bool accumulate,
          float* c, int64_t ldc);

}  // namespace nibble::awq
