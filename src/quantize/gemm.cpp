// SPDX-License-Identifier: Apache-2.0
#include "quantize/gemm.h"

#include <algorithm>
#include <vector>

namespace nibble::awq {
namespace {

// Blocks of A [kBlockM, kBlockK] and B [kBlockN, kBlockK] are copied into panels that the kernel
// reads in order: 192 KiB + 256 KiB, within a 1 MiB L2.
constexpr int64_t kBlockM = 192, kBlockN = 256, kBlockK = 256;

// Panels of `width` rows: out[panel][k][lane], rows past `rows` are zero.
void pack(MatrixView view, int64_t row0, int64_t rows, int64_t k0, int64_t depth, int64_t width,
          float* out) {
  for (int64_t panel = 0; panel < rows; panel += width) {
    const int64_t lanes = std::min(width, rows - panel);
    const float* base = view.data + (row0 + panel) * view.row_stride + k0 * view.col_stride;
    if (view.row_stride == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        const float* in = base + k * view.col_stride;
        for (int64_t lane = 0; lane < lanes; ++lane) out[k * width + lane] = in[lane];
      }
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const float* in = base + lane * view.row_stride;
        for (int64_t k = 0; k < depth; ++k) out[k * width + lane] = in[k * view.col_stride];
      }
    }
    for (int64_t k = 0; k < depth && lanes < width; ++k)
      std::fill(out + k * width + lanes, out + (k + 1) * width, 0.0f);
    out += depth * width;
  }
}

// tile[kRows][kVectors * lanes] = sum over k of a[k][row] * b[k][column]. Vector is a GCC vector
// type.
template <typename Vector, int kRows, int kVectors>
[[gnu::always_inline]] inline void multiply_panels(const float* a, const float* b, int64_t depth,
                                                   float* tile) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[kVectors];
    for (int v = 0; v < kVectors; ++v)
      __builtin_memcpy(&columns[v], b + v * kLanes, sizeof(Vector));
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] += columns[v] * a[r];
    }
    a += kRows;
    b += kVectors * kLanes;
  }
  __builtin_memcpy(tile, sum, sizeof sum);
}

using Vector4 = float __attribute__((vector_size(16)));
void kernel_generic(const float* a, const float* b, int64_t depth, float* tile) {
  multiply_panels<Vector4, 4, 2>(a, b, depth, tile);
}

struct Kernel {
  void (*multiply)(const float* a, const float* b, int64_t depth, float* tile);
  int rows, columns;
};

#if defined(__x86_64__)
using Vector8 = float __attribute__((vector_size(32)));
using Vector16 = float __attribute__((vector_size(64)));
[[gnu::target("avx2,fma")]] void kernel_avx2(const float* a, const float* b, int64_t depth,
                                             float* tile) {
  multiply_panels<Vector8, 6, 2>(a, b, depth, tile);
}
[[gnu::target("avx512f,prefer-vector-width=512")]] void kernel_avx512(const float* a,
                                                                      const float* b, int64_t depth,
                                                                      float* tile) {
  multiply_panels<Vector16, 8, 2>(a, b, depth, tile);
}
Kernel choose_kernel() {
  if (__builtin_cpu_supports("avx512f")) return {kernel_avx512, 8, 32};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {kernel_avx2, 6, 16};
  return {kernel_generic, 4, 8};
}
#else
Kernel choose_kernel() { return {kernel_generic, 4, 8}; }
#endif

}  // namespace

void gemm(int64_t m, int64_t n, int64_t depth, MatrixView a, MatrixView b, bool accumulate,
          float* c, int64_t ldc) {
  static const Kernel kernel = choose_kernel();
  if (!accumulate) {
    for (int64_t i = 0; i < m; ++i) std::fill(c + i * ldc, c + i * ldc + n, 0.0f);
  }
  thread_local std::vector<float> packed_a, packed_b;
  packed_a.resize(static_cast<size_t>(kBlockM * kBlockK));
  packed_b.resize(static_cast<size_t>(kBlockN * kBlockK));
  alignas(64) float tile[8 * 32];
  for (int64_t k0 = 0; k0 < depth; k0 += kBlockK) {
    const int64_t ks = std::min(kBlockK, depth - k0);
    for (int64_t j0 = 0; j0 < n; j0 += kBlockN) {
      const int64_t js = std::min(kBlockN, n - j0);
      pack(b, j0, js, k0, ks, kernel.columns, packed_b.data());
      for (int64_t i0 = 0; i0 < m; i0 += kBlockM) {
        const int64_t is = std::min(kBlockM, m - i0);
        pack(a, i0, is, k0, ks, kernel.rows, packed_a.data());
        for (int64_t j = 0; j < js; j += kernel.columns) {
          for (int64_t i = 0; i < is; i += kernel.rows) {
            kernel.multiply(packed_a.data() + i * ks, packed_b.data() + j * ks, ks, tile);
            const int64_t rows = std::min<int64_t>(kernel.rows, is - i);
            const int64_t columns = std::min<int64_t>(kernel.columns, js - j);
            for (int64_t r = 0; r < rows; ++r) {
              float* out = c + (i0 + i + r) * ldc + j0 + j;
              for (int64_t col = 0; col < columns; ++col)
                out[col] += tile[r * kernel.columns + col];
            }
          }
        }
      }
    }
  }
}

}  // namespace nibble::awq
