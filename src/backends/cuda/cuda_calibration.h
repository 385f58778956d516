// Quantizing on the device: CalibrationOps as cuBLAS products and the kernels of
// calibration_kernels.h. Its own file and opened only when asked for: serving needs none of it.
//
// Products of f32 operands are tf32 where their result is compared or rounded (losses, feedback,
// sweeps), and f32 where a nearly singular system is built or solved (factor, multiply, solve).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>

#include "backends/cuda/blas.h"
#include "backends/cuda/calibration_kernels.h"
#include "backends/cuda/device_memory.h"
#include "ops/calibration_ops.h"

namespace nibble::cuda {

class CudaCalibrationOps final : public CalibrationOps {
 public:
  /// `flush` does what the backend has put off; every op begins with it. Throws Error{kDevice} when
  /// there is no cuBLAS.
  CudaCalibrationOps(void* stream, std::function<void()> flush);
  ~CudaCalibrationOps() override;

  /// y [rows, N] = x [rows, K] W^T, plus y when `add`; all bf16. The backend's own kernel for bf16
  /// rows is made for any shape, this one for thousands of rows.
  void linear(const void* x, const LinearOperand& w, int rows, bool add, void* y);

  void clear(void* data, uint64_t bytes) override;
  void add_product(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows, int64_t m,
                   int64_t n, float* c, int64_t ldc) override;
  void add_abs(const void* x, int64_t rows, int64_t features, double* sums,
               float* maximum) override;
  void add_range(const void* x, int64_t rows, int64_t stride, int64_t first, int64_t count,
                 float* maximum) override;
  void subtract(const void* a, const void* b, int64_t count, void* out) override;
  void combine(float alpha, float* y, float beta, const float* x, int64_t count) override;
  double trace(const BlockMatrix& m) override;
  void widen(const LinearOperand& w, float* out) override;
  void add_weight_abs(const float* w, int64_t rows, int64_t features, double* sums) override;
  bool factor(const BlockMatrix& gram, float damping, float floor, float* factor,
              float* diagonal) override;
  void multiply(const float* w, const BlockMatrix& m, int64_t rows, float* out) override;
  void solve(const BlockMatrix& factor, const float* diagonal, int64_t rows, float* b) override;
  void choose_scales(const DevicePanel& panel, const BlockMatrix& gram,
                     std::span<const float> ratios, DType dtype,
                     std::span<uint64_t> counts) override;
  void round_nearest(const DevicePanel& panel) override;
  void round_compensated(const DevicePanel& panel, const BlockMatrix& factor) override;
  void descend(const DevicePanel& panel, const BlockMatrix& gram, int sweeps, DType dtype) override;
  double loss(const DevicePanel& panel, const BlockMatrix& gram) override;
  void results(const DevicePanel& panel, int8_t* ints, void* dense) override;
  WeightLayout dense_layout() const override { return WeightLayout::kBf16Rows; }

 private:
  /// product = error times the block matrix.
  void error_product(const DevicePanel& panel, const BlockMatrix& gram);
  double sum_of_parts();
  /// [features / block, rows, group] f32, for one group of every block.
  float* group_rows(const DevicePanel& panel, int64_t block);

  void* stream_;
  std::function<void()> flush_;
  Blas blas_;
  void* parts_ = nullptr;   // double [kDotParts]
  void* counts_ = nullptr;  // unsigned long long [kMaxRatios], then int: factor_diagonal's `failed`
  uint64_t moves_ = 0;
  Scratch group_rows_{&moves_};
};

}  // namespace nibble::cuda
