// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/cuda_calibration.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/error.h"

namespace nibble::cuda {
namespace {

constexpr size_t kCountsBytes = kMaxRatios * sizeof(uint64_t);

RoundingArgs rounding_args(const DevicePanel& panel, int64_t block, DType dtype = DType::kBF16) {
  NIBBLE_CHECK(dtype == DType::kBF16 || dtype == DType::kF32, "scales in {}", dtype_name(dtype));
  return {.rows = panel.rows,
          .features = panel.features,
          .block = block,
          .group = static_cast<int>(panel.group),
          .weight = panel.weight,
          .pre = panel.pre,
          .scales = panel.scales,
          .q = panel.q,
          .error = panel.error,
          .bf16_scales = dtype == DType::kBF16};
}

int num_blocks(const BlockMatrix& m) { return static_cast<int>(m.features / m.block); }

}  // namespace

CudaCalibrationOps::CudaCalibrationOps(void* stream, std::function<void()> flush)
    : stream_(stream), flush_(std::move(flush)), blas_(stream) {
  check(memory_alloc(&parts_, kDotParts * sizeof(double)), "allocating device memory");
  check(memory_alloc(&counts_, kCountsBytes + sizeof(int)), "allocating device memory");
}

CudaCalibrationOps::~CudaCalibrationOps() {
  memory_free(parts_);
  memory_free(counts_);
}

void CudaCalibrationOps::linear(const void* x, const LinearOperand& w, int rows, bool add,
                                void* y) {
  blas_.gemm({.m = rows,
              .n = w.out_features,
              .k = w.in_features,
              .a = x,
              .lda = w.in_features,
              .b = w.weight,
              .ldb = w.in_features,
              .b_transposed = true,
              .c = y,
              .ldc = w.out_features,
              .beta = add ? 1.0f : 0.0f,
              .in = BlasType::kBf16,
              .out = BlasType::kBf16});
}

// Statistics
// ------------------------------------------------------------------------------------------------

void CudaCalibrationOps::clear(void* data, uint64_t bytes) {
  flush_();
  check(memory_fill(data, 0, bytes, stream_), "clearing memory");
}

void CudaCalibrationOps::add_product(const void* a, int64_t lda, const void* b, int64_t ldb,
                                     int64_t rows, int64_t m, int64_t n, float* c, int64_t ldc) {
  flush_();
  blas_.gemm({.m = m,
              .n = n,
              .k = rows,
              .a = a,
              .lda = lda,
              .a_transposed = true,
              .b = b,
              .ldb = ldb,
              .c = c,
              .ldc = ldc,
              .beta = 1,
              .in = BlasType::kBf16});
}

void CudaCalibrationOps::add_abs(const void* x, int64_t rows, int64_t features, double* sums,
                                 float* maximum) {
  flush_();
  check(add_column_abs(x, /*is_bf16=*/true, rows, features, sums, maximum, stream_), "add_abs");
}

void CudaCalibrationOps::add_range(const void* x, int64_t rows, int64_t stride, int64_t first,
                                   int64_t count, float* maximum) {
  flush_();
  const auto* begin = static_cast<const uint16_t*>(x) + first;
  check(cuda::add_range(begin, rows, stride, count, maximum, stream_), "add_range");
}

void CudaCalibrationOps::subtract(const void* a, const void* b, int64_t count, void* out) {
  flush_();
  check(subtract_bf16(a, b, count, out, stream_), "subtract");
}

void CudaCalibrationOps::combine(float alpha, float* y, float beta, const float* x, int64_t count) {
  flush_();
  check(cuda::combine(alpha, y, beta, x, count, stream_), "combine");
}

double CudaCalibrationOps::sum_of_parts() {
  std::vector<double> parts(kDotParts);
  check(copy_to_host(parts.data(), parts_, kDotParts * sizeof(double), stream_), "copying a sum");
  check(stream_sync(stream_), "a kernel or copy before this point");
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

double CudaCalibrationOps::trace(const BlockMatrix& m) {
  flush_();
  check(diagonal_sum(m.values, m.features, m.block, static_cast<double*>(parts_), stream_),
        "trace");
  return sum_of_parts();
}

// Weights
// ------------------------------------------------------------------------------------------------

void CudaCalibrationOps::widen(const LinearOperand& w, float* out) {
  flush_();
  NIBBLE_CHECK(w.layout == WeightLayout::kBf16Rows, "weights in layout {}",
               static_cast<int>(w.layout));
  check(widen_bf16(w.weight, out, int64_t{w.out_features} * w.in_features, stream_), "widen");
}

void CudaCalibrationOps::add_weight_abs(const float* w, int64_t rows, int64_t features,
                                        double* sums) {
  flush_();
  check(add_column_abs(w, /*is_bf16=*/false, rows, features, sums, nullptr, stream_),
        "add_weight_abs");
}

// Rounding
// ------------------------------------------------------------------------------------------------

// Right-looking by panels, all blocks at once where the product allows it. The squares below the
// diagonal are updated like those above: cuBLAS has no half product in batches.
bool CudaCalibrationOps::factor(const BlockMatrix& gram, float damping, float floor, float* factor,
                                float* diagonal) {
  flush_();
  const int64_t size = gram.block, stride = size * size;
  const int blocks = num_blocks(gram);
  int* failed = reinterpret_cast<int*>(static_cast<std::byte*>(counts_) + kCountsBytes);
  check(memory_fill(failed, 0, sizeof(int), stream_), "clearing memory");
  check(copy_on_device(factor, gram.values,
                       static_cast<size_t>(gram.features * size) * sizeof(float), stream_),
        "copying on the device");
  check(damp_diagonal(factor, gram.features, size, damping, floor, stream_), "damp_diagonal");
  for (int64_t k = 0; k < size; k += kFactorPanel) {
    const int64_t panel = std::min<int64_t>(kFactorPanel, size - k), rest = size - k - panel;
    check(factor_diagonal(factor, blocks, size, k, panel, failed, stream_), "factor_diagonal");
    if (rest == 0) break;
    float* corner = factor + k * size + k;
    for (int b = 0; b < blocks; ++b) {
      float* at = corner + b * stride;
      blas_.solve_left_transposed(at, size, panel, at + panel, size, rest);
    }
    blas_.gemm({.m = rest,
                .n = rest,
                .k = panel,
                .a = corner + panel,
                .lda = size,
                .a_transposed = true,
                .b = corner + panel,
                .ldb = size,
                .c = corner + panel * size + panel,
                .ldc = size,
                .alpha = -1,
                .beta = 1,
                .batch = blocks,
                .a_stride = stride,
                .b_stride = stride,
                .c_stride = stride});
  }
  check(unit_diagonal(factor, gram.features, size, diagonal, stream_), "unit_diagonal");
  int has_failed = 0;
  check(copy_to_host(&has_failed, failed, sizeof(int), stream_), "copying a flag");
  check(stream_sync(stream_), "a kernel or copy before this point");
  return has_failed == 0;
}

void CudaCalibrationOps::multiply(const float* w, const BlockMatrix& m, int64_t rows, float* out) {
  flush_();
  blas_.gemm({.m = rows,
              .n = m.block,
              .k = m.block,
              .a = w,
              .lda = m.features,
              .b = m.values,
              .ldb = m.block,
              .c = out,
              .ldc = m.features,
              .batch = num_blocks(m),
              .a_stride = m.block,
              .b_stride = m.block * m.block,
              .c_stride = m.block});
}

void CudaCalibrationOps::solve(const BlockMatrix& factor, const float* diagonal, int64_t rows,
                               float* b) {
  flush_();
  SolveRightArgs args{.rows = rows,
                      .size = factor.block,
                      .ldr = factor.block,
                      .unit = true,
                      .ldb = factor.features};
  for (const bool transposed : {false, true}) {
    args.transposed = transposed;
    for (int64_t first = 0; first < factor.features; first += factor.block) {
      args.r = factor.values + first * factor.block;
      args.b = b + first;
      blas_.solve_right(args);
    }
    if (!transposed) {
      check(divide_columns(b, diagonal, rows, factor.features, stream_), "divide_columns");
    }
  }
}

void CudaCalibrationOps::choose_scales(const DevicePanel& panel, const BlockMatrix& gram,
                                       std::span<const float> ratios, DType dtype,
                                       std::span<uint64_t> counts) {
  flush_();
  NIBBLE_CHECK(counts.size() == ratios.size() && ratios.size() <= kMaxRatios, "{} ratios",
               ratios.size());
  const int count = static_cast<int>(ratios.size());
  check(memory_fill(counts_, 0, kCountsBytes, stream_), "clearing memory");
  check(cuda::choose_scales(rounding_args(panel, gram.block, dtype), gram.values, ratios.data(),
                            count, static_cast<unsigned long long*>(counts_), stream_),
        "choose_scales");
  if (count == 1) {
    counts[0] += static_cast<uint64_t>(panel.rows * (panel.features / panel.group));
    return;
  }
  uint64_t chosen[kMaxRatios];
  check(copy_to_host(chosen, counts_, kCountsBytes, stream_), "copying counts");
  check(stream_sync(stream_), "a kernel or copy before this point");
  for (size_t i = 0; i < counts.size(); ++i) counts[i] += chosen[i];
}

void CudaCalibrationOps::round_nearest(const DevicePanel& panel) {
  flush_();
  check(cuda::round_nearest(rounding_args(panel, panel.features), stream_), "round_nearest");
}

float* CudaCalibrationOps::group_rows(const DevicePanel& panel, int64_t block) {
  const int64_t count = panel.features / block * panel.rows * panel.group;
  return static_cast<float*>(group_rows_.get(static_cast<size_t>(count) * sizeof(float), stream_));
}

void CudaCalibrationOps::round_compensated(const DevicePanel& panel, const BlockMatrix& factor) {
  flush_();
  const RoundingArgs args = rounding_args(panel, factor.block);
  const int64_t size = factor.block, group = panel.group;
  float* feedback = group_rows(panel, size);
  for (int64_t g = size / group - 1; g >= 0; --g) {
    const int64_t offset = g * group, after = offset + group;
    if (after < size) {
      blas_.gemm({.m = panel.rows,
                  .n = group,
                  .k = size - after,
                  .a = panel.error + after,
                  .lda = panel.features,
                  .b = factor.values + offset * size + after,
                  .ldb = size,
                  .b_transposed = true,
                  .c = feedback,
                  .ldc = group,
                  .tf32 = true,
                  .batch = num_blocks(factor),
                  .a_stride = size,
                  .b_stride = size * size,
                  .c_stride = panel.rows * group});
    }
    check(compensate_group(args, factor.values, after < size ? feedback : nullptr, g, stream_),
          "compensate_group");
  }
}

void CudaCalibrationOps::error_product(const DevicePanel& panel, const BlockMatrix& gram) {
  blas_.gemm({.m = panel.rows,
              .n = gram.block,
              .k = gram.block,
              .a = panel.error,
              .lda = panel.features,
              .b = gram.values,
              .ldb = gram.block,
              .c = panel.product,
              .ldc = panel.features,
              .tf32 = true,
              .batch = num_blocks(gram),
              .a_stride = gram.block,
              .b_stride = gram.block * gram.block,
              .c_stride = gram.block});
}

// Without the host's early stop: a sweep that finds nothing to move changes nothing.
void CudaCalibrationOps::descend(const DevicePanel& panel, const BlockMatrix& gram, int sweeps,
                                 DType dtype) {
  flush_();
  const RoundingArgs args = rounding_args(panel, gram.block, dtype);
  const int64_t size = gram.block, group = panel.group;
  float* change = group_rows(panel, size);
  error_product(panel, gram);
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (int64_t g = size / group - 1; g >= 0; --g) {
      check(descend_group(args, gram.values, panel.product, change, g, stream_), "descend_group");
      // The whole block hears of this group's changes.
      blas_.gemm({.m = panel.rows,
                  .n = size,
                  .k = group,
                  .a = change,
                  .lda = group,
                  .b = gram.values + g * group * size,
                  .ldb = size,
                  .c = panel.product,
                  .ldc = panel.features,
                  .beta = 1,
                  .tf32 = true,
                  .batch = num_blocks(gram),
                  .a_stride = panel.rows * group,
                  .b_stride = size * size,
                  .c_stride = size});
    }
  }
  check(restate_error(args, stream_), "restate_error");
}

double CudaCalibrationOps::loss(const DevicePanel& panel, const BlockMatrix& gram) {
  flush_();
  error_product(panel, gram);
  check(dot(panel.error, panel.product, panel.rows * panel.features, static_cast<double*>(parts_),
            stream_),
        "dot");
  return sum_of_parts();
}

void CudaCalibrationOps::results(const DevicePanel& panel, int8_t* ints, void* dense) {
  flush_();
  check(write_results(rounding_args(panel, panel.features), ints, dense, stream_), "results");
}

}  // namespace nibble::cuda
