// cuBLAS, opened at run time: only quantizing on the device needs it, and nibble links nothing of
// CUDA's libraries. Matrices are row-major, as everywhere here. Free of CUDA types.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

namespace nibble::cuda {

enum class BlasType : uint8_t { kBf16, kF32 };

/// c = alpha a b + beta c for `batch` matrices, each `*_stride` elements after the one before.
/// Sums are f32. Of f32 operands `tf32` takes the upper 19 bits, eight times as fast.
struct GemmArgs {
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;  // [m, k] in rows of lda elements; a_transposed: [k, m]
  int64_t lda = 0;
  bool a_transposed = false;
  const void* b = nullptr;  // [k, n] in rows of ldb; b_transposed: [n, k]
  int64_t ldb = 0;
  bool b_transposed = false;
  void* c = nullptr;  // [m, n] in rows of ldc
  int64_t ldc = 0;
  float alpha = 1, beta = 0;
  BlasType in = BlasType::kF32, out = BlasType::kF32;  // of a and b; of c
  bool tf32 = false;
  int batch = 1;
  int64_t a_stride = 0, b_stride = 0, c_stride = 0;
};

/// b [rows, size] in rows of ldb becomes b R^-1, or b R^-T when `transposed`; R [size, size] is
/// upper triangular in rows of ldr, with ones on its diagonal when `unit` says so. f32.
struct SolveRightArgs {
  int64_t rows = 0, size = 0;
  const float* r = nullptr;
  int64_t ldr = 0;
  bool transposed = false, unit = false;
  float* b = nullptr;
  int64_t ldb = 0;
};

/// Everything is asynchronous on one stream.
class Blas {
 public:
  /// Throws Error{kDevice} naming what was looked for when there is no cuBLAS.
  explicit Blas(void* stream);
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  void gemm(const GemmArgs& args);
  /// b becomes b R^-1 (or b R^-T).
  void solve_right(const SolveRightArgs& args);
  /// b [size, columns] in rows of ldb becomes R^-T b; R as above, its diagonal not ones.
  void solve_left_transposed(const float* r, int64_t ldr, int64_t size, float* b, int64_t ldb,
                             int64_t columns);

 private:
  struct Functions;
  void check(int status, const std::string& what) const;
  const Functions* functions_;
  void* handle_ = nullptr;
};

}  // namespace nibble::cuda
