// SPDX-License-Identifier: Apache-2.0
#include "quantize/quantizer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <utility>

#include "base/error.h"
#include "base/interrupt.h"
#include "formats/checkpoint_writer.h"
#include "quantize/layer_stream.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Linears that read one input are searched together.
struct InputGroup {
  Tap tap;
  std::vector<WeightRole> roles;
};
const std::vector<InputGroup>& input_groups() {
  static const std::vector<InputGroup> groups = {
      {Tap::kQkvInput, {WeightRole::kQkv}},
      {Tap::kOInput, {WeightRole::kO}},
      {Tap::kGateUpInput, {WeightRole::kGate, WeightRole::kUp}},
      {Tap::kDownInput, {WeightRole::kDown}}};
  return groups;
}

void check_options(const WeightSource& source, const QuantizeOptions& options) {
  if (options.group_size != 64 && options.group_size != 128) {
    fail(ErrorKind::kUsage, "--group-size {}: wanted 64 or 128", options.group_size);
  }
  if (options.dtype != DType::kBF16 && options.dtype != DType::kF16) {
    fail(ErrorKind::kUsage, "--dtype {}: wanted bfloat16 or float16", dtype_name(options.dtype));
  }
  for (const WeightRow& row : weight_table(source.spec())) {
    if (!row.quantizable) continue;
    if (source.is_quantized(row)) {
      fail(ErrorKind::kUnsupported,
           "{} is already quantized; quantize wants the original 16-bit model", row.name);
    }
    if (row.shape[1] % options.group_size != 0) {
      fail(ErrorKind::kUnsupported, "{} has {} in-features, not a multiple of the group size {}{}",
           row.name, row.shape[1], options.group_size,
           row.shape[1] % 64 == 0 ? "; use --group-size 64" : "");
    }
  }
}

class Quantizer {
 public:
  Quantizer(const WeightSource& source, Backend* backend, const CalibrationData* calibration,
            const QuantizeOptions& options, Progress& progress)
      : source_(source),
        backend_(backend),
        options_(options),
        progress_(progress),
        pool_(options.num_threads) {
    for (WeightRow& row : weight_table(source.spec())) {
      if (row.quantizable) rows_[{row.layer, row.role}] = std::move(row);
    }
    if (!needs_calibration(options)) return;
    NIBBLE_CHECK(backend != nullptr && calibration != nullptr);
    stream_ = std::make_unique<LayerStream>(*backend, source, calibration->sequences,
                                            options.calib_batch, options.max_step_tokens);
    report_.num_calibration_tokens = stream_->num_tokens();
    stream_passes_ = options.method == QuantizeMethod::kAwq && options.sequential ? 2 : 1;
  }

  QuantizeReport run(const fs::path& directory, const CheckpointOptions& checkpoint) {
    const Clock::time_point start = Clock::now();
    const int layers = source_.spec().num_layers;
    units_per_layer_ = 100 * (stream_ ? stream_passes_ : 0) + 100;
    progress_.begin("quantizing", int64_t{layers} * units_per_layer_ / 100, "passes");
    CheckpointContent content;
    content.linear = [&](const WeightRow& row) {
      if (row.layer != layer_) process_layer(row.layer);
      const auto found = done_.find(row.role);
      NIBBLE_CHECK(found != done_.end(), "{} asked for twice or out of order", row.name);
      CheckpointLinear linear = std::move(found->second);
      done_.erase(found);
      return linear;
    };
    content.kv_scales = [&] { return report_.kv_scales; };
    write_checkpoint(directory, source_, checkpoint, content);
    progress_.end();
    report_.seconds = seconds_since(start);
    return std::move(report_);
  }

 private:
  const WeightRow& row(WeightRole role) const { return rows_.at({layer_, role}); }

  // Within a layer `done` of `total` units of pass `pass` are finished.
  void tick(int pass, int64_t done, int64_t total) {
    throw_if_interrupted();
    const int64_t percent = int64_t{layer_} * units_per_layer_ + int64_t{pass} * 100 +
                            done * 100 / std::max<int64_t>(total, 1);
    progress_.advance(percent / 100);
  }

  void process_layer(int layer) {
    NIBBLE_CHECK(layer == layer_ + 1 && done_.empty(), "layer {} after {}", layer, layer_);
    layer_ = layer;
    const bool awq = options_.method == QuantizeMethod::kAwq;
    std::map<Tap, awq::InputStatistics> statistics;
    std::unique_ptr<StreamedLayer> streamed;
    if (stream_) {
      const Clock::time_point start = Clock::now();
      streamed = std::make_unique<StreamedLayer>(*backend_, source_, layer);
      listen(*streamed, awq ? &statistics : nullptr);
      report_.forward_seconds += seconds_since(start);
      if (stream_passes_ == 1) streamed.reset();
    }
    const Clock::time_point start = Clock::now();
    int64_t searched = 0;
    const int search_pass = stream_ ? 1 : 0;
    for (const InputGroup& group : input_groups()) {
      std::vector<std::vector<float>> weights;
      std::vector<awq::DenseLinear> linears;
      for (const WeightRole role : group.roles) {
        weights.push_back(load(row(role)));
        linears.push_back({weights.back().data(), row(role).shape[0]});
      }
      const int64_t in_features = row(group.roles[0]).shape[1];
      if (awq) {
        awq::InputStatistics& input = statistics.at(group.tap);
        const awq::RoundingOptions rounding = {.group_size = options_.group_size,
                                               .dtype = options_.dtype,
                                               .rounding = options_.rounding};
        awq::QuantizedGroup result =
            awq::quantize_group(pool_, linears, in_features, input, rounding);
        for (size_t i = 0; i < group.roles.size(); ++i) {
          report_.linears.push_back({row(group.roles[i]).name, result.report, input.max_abs()});
          done_[group.roles[i]] = std::move(result.linears[i]);
        }
        statistics.erase(group.tap);
      } else {
        for (size_t i = 0; i < group.roles.size(); ++i) {
          done_[group.roles[i]] =
              awq::round_to_nearest(pool_, linears[i], in_features, options_.group_size);
        }
      }
      tick(search_pass, ++searched, static_cast<int64_t>(input_groups().size()));
    }
    report_.search_seconds += seconds_since(start);
    if (stream_passes_ == 2) {
      const Clock::time_point forward = Clock::now();
      for (const auto& [role, linear] : done_) {
        streamed->replace(role, awq::dequantize(pool_, linear, row(role).shape[1]));
      }
      stream_->run(layer, streamed->weights(), {}, true,
                   [&](int64_t tokens) { tick(2, tokens, stream_->num_tokens()); });
      report_.forward_seconds += seconds_since(forward);
    }
  }

  // One pass of the dense layer: statistics of every linear's input, and the ranges of K after RoPE
  // and of V.
  void listen(const StreamedLayer& layer, std::map<Tap, awq::InputStatistics>* statistics) {
    const ModelSpec& spec = source_.spec();
    const bool keep = stream_passes_ == 1;
    if (statistics != nullptr) {
      for (const InputGroup& group : input_groups()) {
        statistics->try_emplace(group.tap, row(group.roles[0]).shape[1], options_.group_size,
                                options_.max_gram_bytes);
      }
    }
    float k_max = 0, v_max = 0;
    const auto range = [](const float* x, int count, float& maximum) {
      for (int i = 0; i < count; ++i) maximum = std::max(maximum, std::fabs(x[i]));
    };
    stream_->run(
        layer_, layer.weights(),
        [&](Tap tap, const float* x, int rows, int cols) {
          if (tap == Tap::kRotatedQkv) {
            for (int64_t r = 0; r < rows; ++r) {
              range(x + r * cols + spec.q_size(), spec.kv_size(), k_max);
              range(x + r * cols + spec.q_size() + spec.kv_size(), spec.kv_size(), v_max);
            }
          } else if (statistics != nullptr) {
            statistics->at(tap).add(pool_, x, rows);
          }
        },
        keep, [&](int64_t tokens) { tick(0, tokens, stream_->num_tokens()); });
    if (statistics != nullptr) {
      for (auto& [tap, input] : *statistics) {
        input.finish(pool_);
        if (!std::isfinite(input.max_abs())) {
          fail(ErrorKind::kInput,
               "layer {}: an activation is not finite on the calibration texts; is the model "
               "damaged?",
               layer_);
        }
      }
    }
    if (options_.int8_kv) {
      // An all-zero layer still needs a positive scale.
      report_.kv_scales.k.push_back(k_max > 0 ? k_max / 127.0f : 1.0f);
      report_.kv_scales.v.push_back(v_max > 0 ? v_max / 127.0f : 1.0f);
    }
  }

  std::vector<float> load(const WeightRow& row) {
    std::vector<float> weight = source_.load_dense(row);
    source_.release(row);
    const auto bad =
        std::find_if(weight.begin(), weight.end(), [](float w) { return !std::isfinite(w); });
    if (bad != weight.end()) {
      fail(ErrorKind::kInput, "{} holds {} at element {}; wanted finite weights", row.name, *bad,
           bad - weight.begin());
    }
    return weight;
  }

  const WeightSource& source_;
  Backend* backend_;
  const QuantizeOptions& options_;
  Progress& progress_;
  ThreadPool pool_;
  std::map<std::pair<int, WeightRole>, WeightRow> rows_;
  std::unique_ptr<LayerStream> stream_;
  int stream_passes_ = 0;  // over the tokens, per layer
  int64_t units_per_layer_ = 0;
  int layer_ = -1;  // the one in done_
  std::map<WeightRole, CheckpointLinear> done_;
  QuantizeReport report_;
};

}  // namespace

const char* rounding_name(awq::Rounding rounding) {
  return rounding == awq::Rounding::kNearest ? "nearest" : "compensated";
}

bool needs_calibration(const QuantizeOptions& options) {
  return options.method == QuantizeMethod::kAwq || options.int8_kv;
}

QuantizeReport quantize(const fs::path& directory, const WeightSource& source, Backend* backend,
                        const CalibrationData* calibration, const QuantizeOptions& options,
                        Progress& progress) {
  check_options(source, options);
  CheckpointOptions checkpoint;
  checkpoint.tp_size = options.tp_size;
  checkpoint.group_size = options.group_size;
  checkpoint.dtype = options.dtype;
  checkpoint.int8_kv = options.int8_kv;
  json::object facts = {{"method", options.method == QuantizeMethod::kAwq ? "awq" : "rtn"}};
  if (options.method == QuantizeMethod::kAwq) {
    facts["rounding"] = rounding_name(options.rounding);
    facts["sequential"] = options.sequential;
  }
  if (needs_calibration(options)) {
    NIBBLE_CHECK(calibration != nullptr);
    facts["calibration"] = calibration->to_json();
    for (const std::string& sentence : calibration->notices()) progress.note(sentence);
  }
  checkpoint.extra_config["nibble"] = std::move(facts);
  return Quantizer(source, backend, calibration, options, progress).run(directory, checkpoint);
}

json::object QuantizeReport::to_json() const {
  json::array list;
  for (const LinearReport& linear : linears) {
    const awq::GroupReport& search = linear.search;
    list.push_back({{"name", linear.name},
                    {"alpha", search.alpha},
                    {"beta", search.beta},
                    {"error_rtn", search.error_rtn},
                    {"error_scaled", search.error_scaled},
                    {"error", search.error},
                    {"mean_clip", search.mean_clip},
                    {"input_max_abs", linear.input_max_abs}});
  }
  json::array k(kv_scales.k.begin(), kv_scales.k.end()), v(kv_scales.v.begin(), kv_scales.v.end());
  return {{"linears", std::move(list)},
          {"kv_scales", {{"k", std::move(k)}, {"v", std::move(v)}}},
          {"calibration_tokens", num_calibration_tokens},
          {"seconds", seconds},
          {"forward_seconds", forward_seconds},
          {"search_seconds", search_seconds}};
}

}  // namespace nibble
