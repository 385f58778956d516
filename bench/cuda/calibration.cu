// What `quantize --device cuda` runs between its matrix products, timed at the 24B's gate_up and
// down: us, the bytes an op must move, of choose_scales also flops, against the limits of this run.
// Checked by cuda_op_tests (CudaCalibration).
//   calibration
// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/calibration_kernels.h"

#include <algorithm>
#include <string>
#include <vector>

#include "common.cuh"

namespace nibble::bench {
namespace {

constexpr int kGroup = 128;
constexpr int kTokens = 8192;        // of a step
constexpr int kGramTokens = 256;     // that the Gram matrix here is made of
constexpr float kDeviation = 0.02f;  // of a weight

__global__ void fill_floats(float* out, size_t count, float scale, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    out[i] = normal(seed * 0x1000000007ull + i) * scale;
  }
}

// x^T x / tokens + I of each block of columns. x: [kGramTokens, features].
__global__ void fill_gram(const float* x, int64_t features, int64_t block, float* gram) {
  const int64_t j = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, row = blockIdx.y;
  if (j >= block) return;
  const int64_t i = row % block, first = row - i;
  float sum = 0;
  for (int t = 0; t < kGramTokens; ++t) {
    sum += x[t * features + row] * x[t * features + first + j];
  }
  gram[row * block + j] = sum / kGramTokens + (i == j ? 1.0f : 0.0f);
}

// R as compensate_group reads it: a unit diagonal, small numbers to the right of it.
__global__ void fill_factor(float* factor, int64_t features, int64_t block) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < features * block;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / block % block, column = i % block;
    factor[i] = column < row ? 0.0f : column == row ? 1.0f : 0.02f * normal(77 * i);
  }
}

// What the errors times G may be: of the weight's own error, and noise that moves some weights.
__global__ void fill_product(const float* error, const float* gram, int64_t rows, int64_t features,
                             int64_t block, float* product) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * features;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t j = i % features;
    product[i] = gram[j * block + j % block] * (error[i] + 0.1f * kDeviation * normal(5 * i));
  }
}

// The diagonal squares of kFactorPanel.
__global__ void copy_squares(const float* from, float* to, int64_t block) {
  const int64_t first = blockIdx.x * int64_t{cuda::kFactorPanel};
  for (int i = static_cast<int>(threadIdx.x); i < cuda::kFactorPanel * cuda::kFactorPanel;
       i += static_cast<int>(blockDim.x)) {
    const int64_t row = first + i / cuda::kFactorPanel;
    const int64_t at = row * block + (first % block) + i % cuda::kFactorPanel;
    to[at] = from[at];
  }
}

class CalibrationTimer {
 public:
  CalibrationTimer(cudaStream_t stream, const Limits& limits, std::string matrix, int64_t rows,
                   int64_t features, int64_t block)
      : stream_(stream),
        limits_(limits),
        matrix_(std::move(matrix)),
        rows_(rows),
        features_(features),
        block_(block) {
    const size_t weights = static_cast<size_t>(rows * features);
    const size_t square = static_cast<size_t>(features * block);
    for (float** p : {&weight_, &q_, &error_, &product_}) *p = floats(weights);
    for (float** p : {&gram_, &factor_}) *p = floats(square);
    pre_ = floats(static_cast<size_t>(features));
    scales_ = floats(weights / kGroup);
    group_rows_ = floats(static_cast<size_t>(features / block * rows * kGroup));
    fill_floats<<<1056, 256, 0, stream>>>(weight_, weights, kDeviation, 1);
    fill_uniform<<<64, 256, 0, stream>>>(pre_, static_cast<size_t>(features), 0.9f, 1.1f, 2);
    fill_floats<<<1056, 256, 0, stream>>>(
        group_rows_, static_cast<size_t>(features / block * rows * kGroup), 0.1f * kDeviation, 3);
    float* x = floats(static_cast<size_t>(features) * kGramTokens);
    fill_floats<<<1056, 256, 0, stream>>>(x, static_cast<size_t>(features) * kGramTokens, 1.0f, 4);
    const dim3 grid(static_cast<unsigned>((block + 255) / 256), static_cast<unsigned>(features));
    fill_gram<<<grid, 256, 0, stream>>>(x, features, block, gram_);
    fill_factor<<<1056, 256, 0, stream>>>(factor_, features, block);
    BENCH_CHECK(cudaGetLastError());
  }
  CalibrationTimer(const CalibrationTimer&) = delete;
  CalibrationTimer& operator=(const CalibrationTimer&) = delete;
  ~CalibrationTimer() {
    for (void* p : allocations_) BENCH_CHECK(cudaFree(p));
  }

  void run() {
    const double weights = static_cast<double>(rows_ * features_);
    const double scales = 4 * weights / kGroup, groups = static_cast<double>(block_ / kGroup);
    std::vector<float> ratios;
    for (int i = 0; i < 24; ++i) ratios.push_back(1.0f - 0.02f * static_cast<float>(i));
    auto* counts = reinterpret_cast<unsigned long long*>(floats(2 * cuda::kMaxRatios));
    const auto choose = [&](int count) {
      return cuda::choose_scales(args(), gram_, ratios.data(), count, counts, stream_);
    };
    row("choose_scales, 24 ratios", time(2, [&](int) { return choose(24); }),
        4 * weights + scales + 4.0 * kGroup * static_cast<double>(features_),
        24 * 2.0 * kGroup * weights);
    row("choose_scales, 1 ratio", time(2, [&](int) { return choose(1); }), 4 * weights + scales);
    row("round_nearest", time(2, [&](int) { return cuda::round_nearest(args(), stream_); }),
        12 * weights + scales);
    row("restate_error", time(2, [&](int) { return cuda::restate_error(args(), stream_); }),
        12 * weights + scales);
    // A group of every block at a time.
    const double group_bytes = kGroup * kGroup * 4.0 * static_cast<double>(features_ / block_);
    row("compensate_group",
        time(static_cast<int>(groups),
             [&](int i) {
               return cuda::compensate_group(args(), factor_, group_rows_, i, stream_);
             }),
        (16 * weights + scales) / groups + group_bytes);
    row("descend_group", descend(static_cast<int>(groups)),
        (28 * weights + 2 * scales) / groups + group_bytes);
    auto* ints = reinterpret_cast<int8_t*>(floats(static_cast<size_t>(weights) / 4));
    void* dense = floats(static_cast<size_t>(weights) / 2);
    row("write_results",
        time(2, [&](int) { return cuda::write_results(args(), ints, dense, stream_); }),
        7 * weights + scales);
    row("widen_bf16",
        time(2, [&](int) { return cuda::widen_bf16(dense, product_, rows_ * features_, stream_); }),
        6 * weights);
    row("divide_columns",
        time(2, [&](int) { return cuda::divide_columns(error_, pre_, rows_, features_, stream_); }),
        8 * weights);
    auto* partial = reinterpret_cast<double*>(floats(2 * cuda::kDotParts));
    row("dot",
        time(2,
             [&](int) { return cuda::dot(error_, product_, rows_ * features_, partial, stream_); }),
        8 * weights);
    statistics(static_cast<__nv_bfloat16*>(dense), partial);
    factoring();
  }

 private:
  float* floats(size_t count) {
    allocations_.push_back(device_alloc<float>(count));
    return static_cast<float*>(allocations_.back());
  }
  cuda::RoundingArgs args() const {
    return {.rows = rows_,
            .features = features_,
            .block = block_,
            .group = kGroup,
            .weight = weight_,
            .pre = pre_,
            .scales = scales_,
            .q = q_,
            .error = error_,
            .bf16_scales = true};
  }
  template <typename Call>
  double time(int calls, Call call) {
    return time_calls(stream_, calls, call);
  }
  void row(const std::string& what, double us, double bytes, double flops = 0) {
    std::printf("%-8s %-24s %9.2f us", matrix_.c_str(), what.c_str(), us);
    print_gbps(bytes, us, limits_);
    if (flops > 0) print_tflops(flops, us, WgmmaKind::kBf16, stream_);
    std::printf("\n");
  }

  // A sweep from rounded weights each time: one that has been swept has less to move.
  double descend(int groups) {
    cudaEvent_t start, stop;
    BENCH_CHECK(cudaEventCreate(&start));
    BENCH_CHECK(cudaEventCreate(&stop));
    const float ratio = 1;
    std::vector<float> times;
    for (int i = 0; i < 7; ++i) {
      BENCH_CHECK(cuda::choose_scales(args(), gram_, &ratio, 1, nullptr, stream_));
      BENCH_CHECK(cuda::round_nearest(args(), stream_));
      fill_product<<<1056, 256, 0, stream_>>>(error_, gram_, rows_, features_, block_, product_);
      BENCH_CHECK(cudaGetLastError());
      BENCH_CHECK(cudaEventRecord(start, stream_));
      for (int g = groups - 1; g >= 0; --g) {
        BENCH_CHECK(cuda::descend_group(args(), gram_, product_, group_rows_, g, stream_));
      }
      BENCH_CHECK(cudaEventRecord(stop, stream_));
      BENCH_CHECK(cudaEventSynchronize(stop));
      float ms;
      BENCH_CHECK(cudaEventElapsedTime(&ms, start, stop));
      times.push_back(ms * 1000.0f / static_cast<float>(groups));
    }
    BENCH_CHECK(cudaEventDestroy(start));
    BENCH_CHECK(cudaEventDestroy(stop));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  // Of activations [kTokens, features] (bf16, the first rows of what write_results wrote where the
  // matrix has as many) and of weights.
  void statistics(const __nv_bfloat16* x, double* partial) {
    const int64_t tokens = std::min<int64_t>(kTokens, rows_);
    const double count = static_cast<double>(tokens * features_);
    auto* sums = reinterpret_cast<double*>(floats(2 * static_cast<size_t>(features_)));
    float* maximum = floats(1);
    BENCH_CHECK(cudaMemsetAsync(sums, 0, static_cast<size_t>(features_) * 8, stream_));
    BENCH_CHECK(cudaMemsetAsync(maximum, 0, 4, stream_));
    row("add_column_abs of tokens",
        time(4,
             [&](int) {
               return cuda::add_column_abs(x, true, tokens, features_, sums, maximum, stream_);
             }),
        2 * count);
    row("add_column_abs of weights",
        time(2,
             [&](int) {
               return cuda::add_column_abs(weight_, false, rows_, features_, sums, nullptr,
                                           stream_);
             }),
        4 * static_cast<double>(rows_ * features_));
    row("add_range, a fifth",
        time(4,
             [&](int) {
               return cuda::add_range(x, tokens, features_, features_ / 5, maximum, stream_);
             }),
        2 * count / 5);
    void* difference = floats(static_cast<size_t>(count) / 2);
    row("subtract_bf16",
        time(4,
             [&](int) {
               return cuda::subtract_bf16(x, x + 1, tokens * features_ - 1, difference, stream_);
             }),
        6 * count);
    row("diagonal_sum",
        time(4,
             [&](int) { return cuda::diagonal_sum(gram_, features_, block_, partial, stream_); }),
        4 * static_cast<double>(features_));
  }

  // The other ops on the Gram matrix; factor_ is overwritten.
  void factoring() {
    const double square = static_cast<double>(features_ * block_);
    row("combine",
        time(4,
             [&](int) {
               return cuda::combine(0.5f, factor_, 0.5f, gram_, features_ * block_, stream_);
             }),
        12 * square);
    row("damp_diagonal",
        time(4,
             [&](int) {
               return cuda::damp_diagonal(factor_, features_, block_, 1e-6f, 1e-6f, stream_);
             }),
        8 * static_cast<double>(features_));
    const auto squares = static_cast<unsigned>(features_ / cuda::kFactorPanel);
    const int panels = static_cast<int>(block_ / cuda::kFactorPanel);
    int* failed = reinterpret_cast<int*>(floats(1));
    BENCH_CHECK(cudaMemsetAsync(failed, 0, 4, stream_));
    row("factor_diagonal",
        time(panels,
             [&](int i) {
               if (i == 0) {  // factoring is in place
                 copy_squares<<<squares, 256, 0, stream_>>>(gram_, factor_, block_);
                 BENCH_CHECK(cudaGetLastError());
               }
               return cuda::factor_diagonal(factor_, features_ / block_, block_,
                                            int64_t{i} * cuda::kFactorPanel, cuda::kFactorPanel,
                                            failed, stream_);
             }),
        8.0 * cuda::kFactorPanel * cuda::kFactorPanel * static_cast<double>(features_ / block_));
    int has_failed;
    BENCH_CHECK(cudaMemcpyAsync(&has_failed, failed, 4, cudaMemcpyDeviceToHost, stream_));
    BENCH_CHECK(cudaStreamSynchronize(stream_));
    if (has_failed) std::printf("factor_diagonal met a square that is not positive definite\n");
    float* diagonal = floats(static_cast<size_t>(features_));
    row("unit_diagonal",
        time(4,
             [&](int) {
               return cuda::unit_diagonal(factor_, features_, block_, diagonal, stream_);
             }),
        4 * square);  // half of it, read and written
  }

  cudaStream_t stream_;
  const Limits& limits_;
  std::string matrix_;
  int64_t rows_, features_, block_;
  float *weight_, *q_, *error_, *product_, *gram_, *factor_, *pre_, *scales_, *group_rows_;
  std::vector<void*> allocations_;
};

}  // namespace

void bench_calibration(cudaStream_t stream, const Limits& limits) {
  wgmma_tflops(WgmmaKind::kBf16, stream);  // not in the middle of a row
  CalibrationTimer(stream, limits, "gate_up", 65536, 5120, 5120).run();
  CalibrationTimer(stream, limits, "down", 5120, 32768, 8192).run();  // a GiB of Gram matrix
}

}  // namespace nibble::bench
