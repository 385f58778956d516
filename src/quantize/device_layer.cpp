// SPDX-License-Identifier: Apache-2.0
#include "quantize/device_layer.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/error.h"
#include "quantize/drift.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Backend memory that grows and is reused from step to step.
class Copy {
 public:
  explicit Copy(Backend& backend) : backend_(backend) {}
  void* get(size_t bytes) {
    if (bytes > buffer_.bytes()) {
      buffer_ = Buffer();
      buffer_ = backend_.alloc(bytes);
    }
    return buffer_.data();
  }
  void* data() const { return buffer_.data(); }

 private:
  Backend& backend_;
  Buffer buffer_;
};

}  // namespace

DeviceLayers::DeviceLayers(Backend& backend, const WeightSource& source,
                           const CalibrationData& calibration, const QuantizeOptions& options)
    : backend_(backend),
      ops_(*backend.calibration_ops()),
      source_(source),
      options_(options),
      stream_(backend, source, calibration.sequences, options.calib_batch,
              options.max_step_tokens) {
  if (options.method == QuantizeMethod::kAwqLite) {
    fail(ErrorKind::kUnsupported,
         "--method awq-lite on the {} backend: not there yet; use --device cpu", backend.name());
  }
  for (WeightRow& row : weight_table(source.spec())) {
    const int layer = row.role == WeightRole::kLmHead ? source.spec().num_layers : row.layer;
    if (quantized_bits(row, options.lm_head) != 0) rows_[{layer, row.role}] = std::move(row);
  }
  if (searches() && options.sequential && options.correct_drift) {
    dense_stream_ = std::make_unique<LayerStream>(backend, source, calibration.sequences,
                                                  options.calib_batch, options.max_step_tokens);
  }
}

LayerResult DeviceLayers::next(const Tick& tick) {
  ++layer_;
  LayerResult result;
  Clock::time_point start = Clock::now();
  StreamedLayer layer(backend_, source_, layer_);
  std::map<Tap, awq::DeviceStatistics> statistics;
  listen(layer, statistics, result, tick);
  backend_.sync();
  result.forward_seconds += seconds_since(start);
  if (!searches()) return result;

  start = Clock::now();
  int64_t searched = 0;
  for (const InputGroup& group : input_groups()) {
    std::vector<LinearOperand> linears;
    for (const WeightRole role : group.roles) linears.push_back(layer.linear(role));
    search(group, statistics.at(group.tap), linears, options_.sequential ? &layer : nullptr,
           result);
    statistics.erase(group.tap);
    tick(1, ++searched, static_cast<int64_t>(input_groups().size()));
  }
  result.search_seconds += seconds_since(start);
  if (options_.sequential) {
    start = Clock::now();
    stream_.run(layer_, layer.weights(), {}, true,
                [&](int64_t tokens) { tick(2, tokens, stream_.num_tokens()); });
    result.forward_seconds += seconds_since(start);
  }
  return result;
}

LayerResult DeviceLayers::lm_head(const Tick& tick) {
  ++layer_;
  LayerResult result;
  Clock::time_point start = Clock::now();
  awq::DeviceStatistics input(backend_, source_.spec().hidden_size, options_.group_size,
                              options_.max_gram_bytes, dense_stream_ != nullptr, 0);
  listen_after_layers(input, tick);
  result.forward_seconds = seconds_since(start);
  start = Clock::now();
  Buffer weight;
  const LinearOperand head = upload_dense(backend_, source_, row(WeightRole::kLmHead), &weight);
  search({Tap::kHeadInput, {WeightRole::kLmHead}}, input, {&head, 1}, nullptr, result);
  tick(1, 1, 1);
  result.search_seconds = seconds_since(start);
  return result;
}

void DeviceLayers::listen_after_layers(awq::DeviceStatistics& input, const Tick& tick) {
  std::vector<float> norm;
  for (const WeightRow& row : weight_table(source_.spec())) {
    if (row.role == WeightRole::kFinalNorm) norm = source_.load_dense(row);
  }
  for (size_t step = 0; step < stream_.num_steps(); ++step) {
    const void* dense = nullptr;  // in dense_stream_'s own memory
    if (dense_stream_) {
      dense_stream_->final_norm_step(step, norm, [&](const void* act, int) { dense = act; });
    }
    stream_.final_norm_step(step, norm, [&](const void* act, int rows) {
      input.add(act, rows);
      if (dense != nullptr) input.add_drift(act, dense, nullptr, rows);
    });
    tick(0, stream_.tokens_after(step), stream_.num_tokens());
  }
  finish(input);
}

void DeviceLayers::finish(awq::DeviceStatistics& input) const {
  input.finish();
  if (!std::isfinite(input.max_abs())) {
    fail(ErrorKind::kInput,
         "layer {}: an activation is not finite on the calibration texts; is the model damaged?",
         layer_);
  }
}

void DeviceLayers::listen(const StreamedLayer& layer,
                          std::map<Tap, awq::DeviceStatistics>& statistics, LayerResult& result,
                          const Tick& tick) {
  const ModelSpec& spec = source_.spec();
  const bool drift = dense_stream_ != nullptr;
  const size_t act = backend_.act_bytes();
  if (searches()) {
    for (const InputGroup& group : input_groups()) {
      statistics.try_emplace(group.tap, backend_, row(group.roles[0]).shape[1], options_.group_size,
                             options_.max_gram_bytes, drift,
                             drift && adds_to_stream(group.tap) ? spec.hidden_size : 0);
    }
  }
  const Buffer ranges = backend_.alloc(2 * sizeof(float));  // of K and of V
  ops_.clear(ranges.data(), ranges.bytes());
  std::map<Tap, Copy> dense;  // of one step: what the unquantized model has there
  Copy residual(backend_);    // [rows, hidden] that the stream lacks
  const auto hear = [&](Tap tap, const void* x, int rows, int cols) {
    if (tap == Tap::kRotatedQkv) {
      ops_.add_range(x, rows, cols, spec.q_size(), spec.kv_size(), ranges.as<float>());
      ops_.add_range(x, rows, cols, spec.q_size() + spec.kv_size(), spec.kv_size(),
                     ranges.as<float>() + 1);
      return;
    }
    if (tap == Tap::kAttnResidual || tap == Tap::kMlpResidual) {
      if (!drift) return;
      const int64_t count = int64_t{rows} * cols;
      ops_.subtract(dense.at(tap).data(), x, count, residual.get(static_cast<size_t>(count) * act));
      return;
    }
    if (!searches()) return;
    awq::DeviceStatistics& input = statistics.at(tap);
    input.add(x, rows);
    if (drift) {
      input.add_drift(x, dense.at(tap).data(), adds_to_stream(tap) ? residual.data() : nullptr,
                      rows);
    }
  };
  const bool keep = !(searches() && options_.sequential);
  for (size_t step = 0; step < stream_.num_steps(); ++step) {
    if (drift) {
      dense_stream_->run_step(
          step, layer_, layer.weights(),
          [&](Tap tap, const void* x, int rows, int cols) {
            if (tap == Tap::kRotatedQkv) return;
            const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(cols) * act;
            backend_.copy(dense.try_emplace(tap, backend_).first->second.get(bytes), x, bytes);
          },
          /*keep=*/true);
    }
    stream_.run_step(step, layer_, layer.weights(), hear, keep);
    tick(0, stream_.tokens_after(step), stream_.num_tokens());
  }
  for (auto& [tap, input] : statistics) finish(input);
  float range[2];
  backend_.download(range, ranges.data(), sizeof range);
  backend_.sync();
  // An all-zero layer still needs a positive scale.
  result.k_scale = range[0] > 0 ? range[0] / 127.0f : 1.0f;
  result.v_scale = range[1] > 0 ? range[1] / 127.0f : 1.0f;
}

void DeviceLayers::search(const InputGroup& group, const awq::DeviceStatistics& input,
                          std::span<const LinearOperand> linears, StreamedLayer* layer,
                          LayerResult& result) {
  const awq::RoundingOptions rounding = {.group_size = options_.group_size,
                                         .dtype = options_.dtype,
                                         .rounding = options_.rounding,
                                         .clip = options_.clip,
                                         .sweeps = options_.sweeps};
  awq::DeviceGroup work(backend_, linears, input, rounding,
                        dense_stream_ ? awq::kDriftStrength : 0.0f);
  if (!work.finite()) {
    fail(ErrorKind::kInput, "{} holds a value that is not finite; wanted finite weights",
         row(group.roles[0]).name);
  }
  awq::QuantizedGroup quantized = work.run();
  for (size_t i = 0; i < group.roles.size(); ++i) {
    const WeightRole role = group.roles[i];
    CheckpointLinear& linear = quantized.linears[i];
    const auto [least, most] =
        std::minmax_element(linear.pre_scale.begin(), linear.pre_scale.end());
    result.reports.push_back({row(role).name, quantized.report,
                              describe_input(input.mean_abs(), input.max_abs()), *least, *most});
    result.linears[role] = std::move(linear);
    if (layer != nullptr) layer->replace(role, ops_.dense_layout(), work.take_dequantized(i));
  }
}

}  // namespace nibble
