// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>

#include "backends/cuda/device_memory.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/wgmma_tactic.h"

namespace nibble::cuda {
namespace {

// Weights that take turns: more than L2 holds (50 ... 60 MB), unless the whole model would fit
// there.
constexpr int64_t kTurnBytes = int64_t{256} << 20, kMaxCopies = 32;
constexpr double kReplaySeconds = 2e-3;
constexpr int kReplays = 7;

int launch(LinearArgs args, const LinearKernel& kernel, void* stream) {
  args.tactic = kernel.tactic;
  args.early = kernel.early;
  return kernel.small ? linear_small(args, stream) : linear_wgmma(args, stream);
}

struct Matrix {
  int64_t rows, k;  // as packed
  Epilogue epilogue;
};

/// One matrix shape on the device: weights that take turns, inputs and outputs for max_rows.
class Bench {
 public:
  Bench(Backend& backend, const Matrix& matrix, int max_rows, int num_sms, void* workspace,
        void* stream)
      : matrix_(matrix),
        shape_{matrix.rows, matrix.k},
        copies_(std::clamp<int64_t>(
            (kTurnBytes + shape_.packed_bytes() - 1) / shape_.packed_bytes(), 2, kMaxCopies)),
        weights_(backend.alloc(static_cast<size_t>(copies_ * shape_.packed_bytes()))),
        x_(backend.alloc(static_cast<size_t>(max_rows * matrix.k * 2))),
        out_(backend.alloc(static_cast<size_t>(max_rows * matrix.rows * 2))),
        num_sms_(num_sms),
        workspace_(workspace),
        stream_(stream) {
    check(fill_random_int4(weights_.data(),
                           copies_ * shape_.packed_bytes() / cuda_layout::kBlockBytes, 1, stream),
          "filling weights");
    check(fill_random_bf16(x_.data(), max_rows * matrix.k, 2, stream), "filling activations");
    check(memory_fill(out_.data(), 0, static_cast<size_t>(max_rows * matrix.rows * 2), stream),
          "clearing outputs");
  }

  LinearTactic measure(int rows) {
    check(make_tensor_map(&map_, x_.data(), rows, matrix_.k, matrix_.k * 2,
                          linear_wgmma_box_rows(args(rows, 0))),
          "making a tensor map");
    std::vector<KernelTime> times;
    for (const LinearKernel& kernel : candidates(rows)) {
      times.push_back(
          {.kernel = kernel.name(), .microseconds = std::round(time(kernel, rows) * 100) / 100});
    }
    std::ranges::stable_sort(times, {}, &KernelTime::microseconds);
    return {.out_features = static_cast<int>(matrix_.rows),
            .in_features = static_cast<int>(matrix_.k),
            .max_rows = rows,
            .best = times.front(),
            .slower = {times.begin() + 1, times.end()}};
  }

 private:
  /// Those that differ for this shape.
  std::vector<LinearKernel> candidates(int rows) const {
    const std::vector<WgmmaTactic> wgmma = wgmma_tactics(args(rows, 0));
    std::vector<LinearKernel> out;
    for (const LinearKernel& kernel : all_linear_kernels()) {
      const bool differs =
          kernel.small || std::ranges::any_of(wgmma, [&](const WgmmaTactic& tactic) {
            return tactic.encode() == kernel.tactic;
          });
      if (kernel.takes(rows) && differs) out.push_back(kernel);
    }
    return out;
  }

  LinearArgs args(int rows, int64_t copy) const {
    return {.weights = weights_.as<std::byte>() + copy % copies_ * shape_.packed_bytes(),
            .rows = matrix_.rows,
            .k = matrix_.k,
            .tokens = rows,
            .x = x_.data(),
            .x_stride = matrix_.k,
            .x_map = &map_,
            .out = out_.data(),
            .residual = matrix_.epilogue == Epilogue::kResidual ? out_.data() : nullptr,
            .out_scale = nullptr,
            .epilogue = matrix_.epilogue,
            .next = nullptr,
            .next_weight = nullptr,
            .next_squares = nullptr,
            .squares = nullptr,
            .eps = 0,
            .workspace = workspace_,
            .num_sms = num_sms_,
            .dependent = true,
            .in_order = false,
            .tactic = 0,
            .early = 0,
            .trace = nullptr};
  }

  void launches(const LinearKernel& kernel, int rows, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      check(launch(args(rows, i), kernel, stream_), "measuring a kernel");
    }
  }
  static double seconds(const std::function<void()>& what) {
    const auto start = std::chrono::steady_clock::now();
    what();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  /// Median of replays, microseconds a launch.
  double time(const LinearKernel& kernel, int rows) const {
    launches(kernel, rows, copies_);  // compiles nothing, but the first launch of a kernel loads it
    check(stream_sync(stream_), "measuring a kernel");
    const double rough = seconds([&] {
      launches(kernel, rows, copies_);
      check(stream_sync(stream_), "measuring a kernel");
    });
    const auto turns = static_cast<int64_t>(kReplaySeconds / rough);
    const int64_t count = copies_ * std::clamp<int64_t>(turns, 1, 16);
    void* graph = nullptr;
    check(capture_begin(stream_), "beginning a graph");
    launches(kernel, rows, count);
    check(capture_end(stream_, &graph), "ending a graph");
    std::vector<double> times;
    for (int replay = 0; replay < kReplays; ++replay) {
      times.push_back(seconds([&] {
        check(graph_launch(graph, stream_), "launching a graph");
        check(stream_sync(stream_), "measuring a kernel");
      }));
    }
    graph_destroy(graph);
    std::ranges::nth_element(times, times.begin() + kReplays / 2);
    return times[kReplays / 2] / static_cast<double>(count) * 1e6;
  }

  const Matrix matrix_;
  const cuda_layout::Shape shape_;
  const int64_t copies_;
  const Buffer weights_, x_, out_;
  const int num_sms_;
  void* const workspace_;
  void* const stream_;
  TensorMap map_;
};

}  // namespace

std::vector<LinearTactic> tune_linears(Backend& backend, const ModelSpec& spec, int max_rows,
                                       int num_sms, void* workspace, void* stream) {
  // Sizes at which kernels or their tiles change, and some between. Not 9 to 16, which
  // linear_digits has, nor all tiles of more than 64 rows: both are by rule.
  constexpr int kRows[] = {1, 2, 4, 8, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048};
  const Matrix matrices[] = {{spec.qkv_size(), spec.hidden_size, Epilogue::kPlain},
                             {spec.hidden_size, spec.q_size(), Epilogue::kResidual},
                             {2 * int64_t{spec.ffn_size}, spec.hidden_size, Epilogue::kSiluMul},
                             {spec.hidden_size, spec.ffn_size, Epilogue::kResidual}};
  std::vector<LinearTactic> found;
  for (const Matrix& matrix : matrices) {
    const auto same = [&](const LinearTactic& t) {
      return t.out_features == matrix.rows && t.in_features == matrix.k;
    };
    if (std::ranges::any_of(found, same)) continue;
    const int most = std::min(max_rows, kRows[std::size(kRows) - 1]);
    Bench bench(backend, matrix, most, num_sms, workspace, stream);
    for (const int rows : kRows) {
      if (rows <= most) found.push_back(bench.measure(rows));
    }
    check(stream_sync(stream), "measuring kernels");  // before the memory goes
  }
  return found;
}

void TacticTable::set(std::span<const LinearTactic> tactics) {
  std::vector<Entry> entries;
  for (const LinearTactic& t : tactics) {
    const std::optional<LinearKernel> kernel = linear_kernel_of(t.best.kernel);
    if (!kernel || !kernel->takes(t.max_rows)) {
      fail(ErrorKind::kInput,
           "the engine's kernel for {} x {}, up to {} rows, is \"{}\", which cuda:sm_90 does not "
           "have for so many; build the engine again",
           t.out_features, t.in_features, t.max_rows, t.best.kernel);
    }
    entries.push_back({t.out_features, t.in_features, t.max_rows, *kernel});
  }
  entries_ = std::move(entries);
}

int TacticTable::linear(const LinearArgs& args, void* stream) const {
  for (const Entry& entry : entries_) {
    if (entry.rows != args.rows || entry.k != args.k || args.tokens > entry.max_tokens) continue;
    if (!entry.kernel.takes(args.tokens)) break;
    if (args.in_order && !entry.kernel.in_order(args.k)) break;
    return launch(args, entry.kernel, stream);
  }
  return cuda::linear(args, stream);
}

}  // namespace nibble::cuda
