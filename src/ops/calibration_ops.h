// What quantizing on a device needs beside the seam's ops: statistics of activations and the
// rounding of weights, where both are. The host does the same with quantize/rounding.h and
// statistics.cpp on panels of rows, which are the specification (tests/cuda_op compares).
//
// All pointers are device pointers unless a comment says host. "act" is the backend's activation
// type. Asynchronous and ordered with the backend's ops, unless a value is returned.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "ops/operands.h"
#include "spec/dtype.h"

namespace nibble {

/// Square blocks on a diagonal: [features / block, block, block].
struct BlockMatrix {
  const float* values = nullptr;
  int64_t features = 0, block = 0;
};

/// Rows of a weight with their grid, integers and error, as quantize/rounding.h has them.
struct DevicePanel {
  int64_t rows = 0, features = 0, group = 0;  // group: 64 or 128
  const float* weight = nullptr;              // [rows, features]
  const float* pre = nullptr;                 // [features]
  float* scales = nullptr;                    // [rows, features / group]
  float* q = nullptr;                         // [rows, features] integers -8..7
  float* error = nullptr;                     // [rows, features] weight - q * scale * pre
  float* product = nullptr;                   // [rows, features] error times Gram
};

class CalibrationOps {
 public:
  virtual ~CalibrationOps() = default;

  // Statistics
  // ------------------------------------------------------------------------------------------
  virtual void clear(void* data, uint64_t bytes) = 0;
  /// c [m, n] += a^T b with a: act [rows, m] in rows of lda, b: act [rows, n] in rows of ldb.
  virtual void add_product(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows,
                           int64_t m, int64_t n, float* c, int64_t ldc) = 0;
  /// sums[c] += sum over rows of |x[r, c]|; *maximum = max of it and all |x|. x: act [rows,
  /// features].
  virtual void add_abs(const void* x, int64_t rows, int64_t features, double* sums,
                       float* maximum) = 0;
  /// *maximum = max of it and |x[r, first .. first + count)|; x: act [rows, stride].
  virtual void add_range(const void* x, int64_t rows, int64_t stride, int64_t first, int64_t count,
                         float* maximum) = 0;
  virtual void subtract(const void* a, const void* b, int64_t count, void* out) = 0;  // act
  /// y = alpha y + beta x; x may be null.
  virtual void combine(float alpha, float* y, float beta, const float* x, int64_t count) = 0;

  virtual double trace(const BlockMatrix& m) = 0;

  // Weights
  // ---------------------------------------------------------------------------------------------
  /// The rows of a dense layout [N, K] as floats.
  virtual void widen(const LinearOperand& w, float* out) = 0;
  /// sums[c] += sum over rows of |w[r, c]|.
  virtual void add_weight_abs(const float* w, int64_t rows, int64_t features, double* sums) = 0;

  // Rounding
  // --------------------------------------------------------------------------------------------
  /// awq::factor_gram() for one damping: G (1 + damping on the diagonal) + floor = R^T D R, R with
  /// a unit diagonal; zeros below it are not promised. False when there is no such factor.
  virtual bool factor(const BlockMatrix& gram, float damping, float floor, float* factor,
                      float* diagonal /*[features]*/) = 0;
  /// out [rows, features] = w [rows, features] M, block by block.
  virtual void multiply(const float* w, const BlockMatrix& m, int64_t rows, float* out) = 0;
  /// b [rows, features] becomes b (R^T D R)^-1.
  virtual void solve(const BlockMatrix& factor, const float* diagonal, int64_t rows, float* b) = 0;
  /// Leaves panel.scales. `ratios`: host. How often each was chosen is added to `counts` (host),
  /// which has as many elements.
  virtual void choose_scales(const DevicePanel& panel, const BlockMatrix& gram,
                             std::span<const float> ratios, DType dtype,
                             std::span<uint64_t> counts) = 0;
  virtual void round_nearest(const DevicePanel& panel) = 0;
  virtual void round_compensated(const DevicePanel& panel, const BlockMatrix& factor) = 0;
  virtual void descend(const DevicePanel& panel, const BlockMatrix& gram, int sweeps,
                       DType dtype) = 0;
  /// Sum over rows of error G error^T.
  virtual double loss(const DevicePanel& panel, const BlockMatrix& gram) = 0;
  /// ints [rows, features] = q; dense [rows, features] = q * scale * pre in dense_layout().
  virtual void results(const DevicePanel& panel, int8_t* ints, void* dense) = 0;
  virtual WeightLayout dense_layout() const = 0;  // kBf16Rows or kF32Rows
};

}  // namespace nibble
