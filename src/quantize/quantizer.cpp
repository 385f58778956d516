// SPDX-License-Identifier: Apache-2.0
#include "quantize/quantizer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/hash.h"
#include "base/interrupt.h"
#include "formats/checkpoint_writer.h"
#include "quantize/device_layer.h"
#include "quantize/device_plan.h"
#include "quantize/drift.h"
#include "quantize/input_groups.h"
#include "quantize/layer_stream.h"
#include "quantize/resume.h"
#include "quantize/untied_source.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
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

bool searches(const QuantizeOptions& options) { return options.method != QuantizeMethod::kRtn; }

bool corrects_drift(const QuantizeOptions& options) {
  return options.method == QuantizeMethod::kAwq && options.sequential && options.correct_drift;
}

class Quantizer {
 public:
  Quantizer(const WeightSource& source, Backend* backend, const CalibrationData* calibration,
            const QuantizeOptions& options, std::optional<ResumeFolder> resume, Progress& progress)
      : source_(source),
        backend_(backend),
        options_(options),
        resume_(std::move(resume)),
        progress_(progress),
        pool_(options.num_threads) {
    for (WeightRow& row : weight_table(source.spec())) {
      // lm_head is taken for a layer behind the last.
      const int layer = row.role == WeightRole::kLmHead ? source.spec().num_layers : row.layer;
      if (quantized_bits(row, options.lm_head) != 0) rows_[{layer, row.role}] = std::move(row);
    }
    if (!needs_calibration(options)) return;
    NIBBLE_CHECK(backend != nullptr && calibration != nullptr);
    if (backend->calibration_ops() != nullptr) {
      const DevicePlan plan =
          plan_device(source.spec(), options, calibration->tokens, backend->act_bytes());
      const uint64_t available = backend->free_memory_bytes();
      if (available > 0 && plan.total() > available) {
        fail(ErrorKind::kMemory,
             "{}, but {:.1f} GB are free there; lower --calib-size or --calib-seq-len",
             plan.sentence(), static_cast<double>(available) * 1e-9);
      }
      progress.note(plan.sentence());
      device_ = std::make_unique<DeviceLayers>(*backend, source, *calibration, options);
      report_.num_calibration_tokens = device_->num_tokens();
      stream_passes_ = searches(options) && options.sequential ? 2 : 1;
      return;
    }
    stream_ = std::make_unique<LayerStream>(*backend, source, calibration->sequences,
                                            options.calib_batch, options.max_step_tokens);
    report_.num_calibration_tokens = stream_->num_tokens();
    stream_passes_ = searches(options) && options.sequential ? 2 : 1;
    if (corrects_drift(options)) {
      dense_stream_ = std::make_unique<LayerStream>(*backend, source, calibration->sequences,
                                                    options.calib_batch, options.max_step_tokens);
    }
  }

  QuantizeReport run(const fs::path& directory, const CheckpointOptions& checkpoint) {
    const Clock::time_point start = Clock::now();
    const int layers = source_.spec().num_layers;
    units_per_layer_ = 100 * stream_passes_ + 100;
    if (resume_ && resume_->layers_done() > 0) {
      report_.layers_continued = resume_->layers_done();
      progress_.note(fmt::format("continuing after layer {} of {}: an earlier run got that far",
                                 resume_->layers_done(), layers));
      resume_->load_states(all_states());
    }
    const int with_head = layers + (options_.lm_head == LmHeadFormat::kDense ? 0 : 1);
    progress_.begin("quantizing", int64_t{with_head} * units_per_layer_ / 100, "passes");
    CheckpointContent content;
    content.linear = [&](const WeightRow& row) {
      if (row.role == WeightRole::kLmHead) {
        next_is_lm_head();
      } else if (row.layer != layer_) {
        next_layer(row.layer);
      }
      const auto found = done_.linears.find(row.role);
      NIBBLE_CHECK(found != done_.linears.end(), "{} asked for twice or out of order", row.name);
      CheckpointLinear linear = std::move(found->second);
      done_.linears.erase(found);
      return linear;
    };
    content.kv_scales = [&] { return report_.kv_scales; };
    write_checkpoint(directory, source_, checkpoint, content);
    progress_.end();
    report_.write_seconds = seconds_since(start) - searched_here_;
    return std::move(report_);
  }

 private:
  const WeightRow& row(WeightRole role) const { return rows_.at({layer_, role}); }

  // Within the layer in hand `done` of `total` units of pass `pass` are finished.
  void tick(int pass, int64_t done, int64_t total) { tick(layer_, pass, done, total); }
  void tick(int layer, int pass, int64_t done, int64_t total) {
    throw_if_interrupted();
    const int64_t percent = int64_t{layer} * units_per_layer_ + int64_t{pass} * 100 +
                            done * 100 / std::max<int64_t>(total, 1);
    progress_.advance(percent / 100);
  }

  DeviceLayers::Tick ticker(int layer) {
    return [this, layer](int pass, int64_t done, int64_t total) { tick(layer, pass, done, total); };
  }

  // The device goes on with the next layer while this one is packed and written: without that it
  // would wait a tenth of the time. One thread at a time uses it.
  LayerResult take_device_layer() {
    const auto begin = [this](int layer) {
      ahead_ =
          std::async(std::launch::async, [this, layer] { return device_->next(ticker(layer)); });
    };
    if (!ahead_.valid()) begin(layer_);
    LayerResult result = ahead_.get();
    if (layer_ + 1 < source_.spec().num_layers) begin(layer_ + 1);
    return result;
  }

  // The layer's integers come to done_, from an earlier run or made now.
  void next_layer(int layer) {
    NIBBLE_CHECK(layer == layer_ + 1 && done_.linears.empty(), "layer {} after {}", layer, layer_);
    layer_ = layer;
    if (resume_ && layer < resume_->layers_done()) {
      done_ = resume_->load(layer);
    } else {
      done_ = LayerResult();
      process_layer();
      searched_here_ += done_.forward_seconds + done_.search_seconds;
      if (resume_) {
        resume_->save(done_, all_states());
      }
    }
    if (options_.int8_kv) {
      report_.kv_scales.k.push_back(done_.k_scale);
      report_.kv_scales.v.push_back(done_.v_scale);
    }
    add_to_report();
  }

  // Made from the states after the last layer, which a run that goes on has too: nothing to keep.
  void next_is_lm_head() {
    NIBBLE_CHECK(layer_ == source_.spec().num_layers - 1 && done_.linears.empty());
    ++layer_;
    done_ = LayerResult();
    if (device_ && searches(options_) && options_.lm_head == LmHeadFormat::kInt4) {
      done_ = device_->lm_head(ticker(layer_));
      searched_here_ += done_.forward_seconds + done_.search_seconds;
      add_to_report();
      return;
    }
    const InputGroup head = {Tap::kHeadInput, {WeightRole::kLmHead}};
    std::optional<awq::InputStatistics> input;
    if (searches(options_) && options_.lm_head == LmHeadFormat::kInt4) {
      const Clock::time_point start = Clock::now();
      input.emplace(source_.spec().hidden_size, options_.group_size, options_.max_gram_bytes);
      listen_after_layers(*input);
      done_.forward_seconds = seconds_since(start);
    }
    const Clock::time_point start = Clock::now();
    quantize_group(head, input ? &*input : nullptr);
    done_.search_seconds = seconds_since(start);
    searched_here_ += done_.forward_seconds + done_.search_seconds;
    add_to_report();
  }

  void add_to_report() {
    report_.linears.insert(report_.linears.end(), done_.reports.begin(), done_.reports.end());
    report_.forward_seconds += done_.forward_seconds;
    report_.search_seconds += done_.search_seconds;
  }

  // Statistics of lm_head's input: the states of all tokens after the final norm.
  void listen_after_layers(awq::InputStatistics& input) {
    std::vector<float> norm;
    for (const WeightRow& row : weight_table(source_.spec())) {
      if (row.role == WeightRole::kFinalNorm) norm = source_.load_dense(row);
    }
    const int64_t hidden = source_.spec().hidden_size;
    std::vector<float> dense;  // of one step
    for (size_t step = 0; step < stream_->num_steps(); ++step) {
      if (dense_stream_) {
        dense_stream_->final_norm_step(step, norm, [&](const void* act, int rows) {
          const auto* x = static_cast<const float*>(act);
          dense.assign(x, x + rows * hidden);
        });
      }
      stream_->final_norm_step(step, norm, [&](const void* act, int rows) {
        const auto* x = static_cast<const float*>(act);
        input.add(pool_, x, rows);
        if (dense_stream_) input.add_drift(pool_, x, dense.data(), nullptr, 0, rows);
      });
      tick(0, stream_->tokens_after(step), stream_->num_tokens());
    }
    finish(input);
  }

  void finish(awq::InputStatistics& input) {
    input.finish(pool_);
    if (!std::isfinite(input.max_abs())) {
      fail(ErrorKind::kInput,
           "layer {}: an activation is not finite on the calibration texts; is the model damaged?",
           layer_);
    }
  }

  std::vector<std::span<std::byte>> all_states() {
    std::vector<std::span<std::byte>> states;
    if (stream_) states.push_back(stream_->states());
    if (dense_stream_) states.push_back(dense_stream_->states());
    return states;
  }

  void process_layer() {
    if (device_) {
      if (searches(options_)) {
        done_ = take_device_layer();
        return;
      }
      done_ = device_->next(ticker(layer_));
    }
    std::map<Tap, awq::InputStatistics> statistics;
    std::unique_ptr<StreamedLayer> streamed;
    if (stream_) {
      const Clock::time_point start = Clock::now();
      streamed = std::make_unique<StreamedLayer>(*backend_, source_, layer_);
      listen(*streamed, searches(options_) ? &statistics : nullptr);
      done_.forward_seconds += seconds_since(start);
      if (stream_passes_ == 1) streamed.reset();
    }
    const Clock::time_point start = Clock::now();
    int64_t searched = 0;
    for (const InputGroup& group : input_groups()) {
      const auto input = statistics.find(group.tap);
      quantize_group(group, input == statistics.end() ? nullptr : &input->second);
      if (input != statistics.end()) statistics.erase(input);
      tick(stream_ ? 1 : 0, ++searched, static_cast<int64_t>(input_groups().size()));
    }
    done_.search_seconds += seconds_since(start);
    if (stream_passes_ == 2) {
      const Clock::time_point forward = Clock::now();
      for (const auto& [role, linear] : done_.linears) {
        streamed->replace(role, awq::dequantize(pool_, linear, row(role).shape[1]));
      }
      stream_->run(layer_, streamed->weights(), {}, true,
                   [&](int64_t tokens) { tick(2, tokens, stream_->num_tokens()); });
      done_.forward_seconds += seconds_since(forward);
    }
  }

  // `input` is null for kRtn and for 8 bits.
  void quantize_group(const InputGroup& group, const awq::InputStatistics* input) {
    std::vector<std::vector<float>> weights;
    std::vector<awq::DenseLinear> linears;
    for (const WeightRole role : group.roles) {
      weights.push_back(load(row(role)));
      linears.push_back({weights.back().data(), row(role).shape[0]});
    }
    const int64_t in_features = row(group.roles[0]).shape[1];
    if (dense_stream_ && input != nullptr) {
      for (std::vector<float>& weight : weights)
        awq::correct_drift(pool_, *input, awq::kDriftStrength, weight);
    }
    if (input == nullptr) {
      for (size_t i = 0; i < group.roles.size(); ++i) {
        const bool int8 = quantized_bits(row(group.roles[i]), options_.lm_head) == 8;
        done_.linears[group.roles[i]] = (int8 ? awq::round_to_int8 : awq::round_to_nearest)(
            pool_, linears[i], in_features, options_.group_size);
      }
      return;
    }
    const awq::RoundingOptions rounding = {.group_size = options_.group_size,
                                           .dtype = options_.dtype,
                                           .rounding = options_.rounding,
                                           .clip = options_.clip,
                                           .sweeps = options_.sweeps};
    if (options_.method == QuantizeMethod::kAwqLite) {
      for (size_t i = 0; i < group.roles.size(); ++i) {
        awq::LiteResult result = awq::quantize_lite(pool_, lite_parts(group.roles[i], linears[i]),
                                                    in_features, *input, rounding);
        keep(group.roles[i], std::move(result.linear), result.report, *input);
      }
    } else {
      awq::QuantizedGroup result =
          awq::quantize_group(pool_, linears, in_features, *input, rounding);
      for (size_t i = 0; i < group.roles.size(); ++i)
        keep(group.roles[i], std::move(result.linears[i]), result.report, *input);
    }
  }

  // ModelOpt knows q, k and v as three linears.
  std::vector<awq::DenseLinear> lite_parts(WeightRole role, const awq::DenseLinear& linear) const {
    if (role != WeightRole::kQkv) return {linear};
    const ModelSpec& spec = source_.spec();
    const int64_t in_features = spec.hidden_size, q = spec.q_size(), kv = spec.kv_size();
    return {{linear.weight, q},
            {linear.weight + q * in_features, kv},
            {linear.weight + (q + kv) * in_features, kv}};
  }

  void keep(WeightRole role, CheckpointLinear linear, const awq::GroupReport& search,
            const awq::InputStatistics& input) {
    const auto [least, most] =
        std::minmax_element(linear.pre_scale.begin(), linear.pre_scale.end());
    done_.reports.push_back(
        {row(role).name, search, describe_input(input.mean_abs(), input.max_abs()), *least, *most});
    done_.linears[role] = std::move(linear);
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
    const int64_t hidden = spec.hidden_size;
    std::map<Tap, std::vector<float>> dense;  // of one step: what the unquantized model has there
    std::vector<float> residual;              // [rows, hidden] that the stream lacks
    const auto hear = [&](Tap tap, const void* act, int rows, int cols) {
      const auto* x = static_cast<const float*>(act);
      if (tap == Tap::kRotatedQkv) {
        for (int64_t r = 0; r < rows; ++r) {
          range(x + r * cols + spec.q_size(), spec.kv_size(), k_max);
          range(x + r * cols + spec.q_size() + spec.kv_size(), spec.kv_size(), v_max);
        }
        return;
      }
      if (tap == Tap::kAttnResidual || tap == Tap::kMlpResidual) {
        if (!dense_stream_) return;
        residual = std::move(dense.at(tap));
        for (int64_t i = 0; i < rows * hidden; ++i) residual[static_cast<size_t>(i)] -= x[i];
        return;
      }
      if (statistics == nullptr) return;
      awq::InputStatistics& input = statistics->at(tap);
      input.add(pool_, x, rows);
      if (!dense_stream_) return;
      input.add_drift(pool_, x, dense.at(tap).data(),
                      adds_to_stream(tap) ? residual.data() : nullptr, hidden, rows);
    };
    for (size_t step = 0; step < stream_->num_steps(); ++step) {
      if (dense_stream_) {
        dense_stream_->run_step(
            step, layer_, layer.weights(),
            [&](Tap tap, const void* act, int rows, int cols) {
              const auto* x = static_cast<const float*>(act);
              if (tap != Tap::kRotatedQkv) dense[tap].assign(x, x + int64_t{rows} * cols);
            },
            /*keep=*/true);
      }
      stream_->run_step(step, layer_, layer.weights(), hear, keep);
      tick(0, stream_->tokens_after(step), stream_->num_tokens());
    }
    if (statistics != nullptr) {
      for (auto& [tap, input] : *statistics) finish(input);
    }
    if (options_.int8_kv) {
      // An all-zero layer still needs a positive scale.
      done_.k_scale = k_max > 0 ? k_max / 127.0f : 1.0f;
      done_.v_scale = v_max > 0 ? v_max / 127.0f : 1.0f;
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
  std::optional<ResumeFolder> resume_;
  Progress& progress_;
  ThreadPool pool_;
  std::map<std::pair<int, WeightRole>, WeightRow> rows_;
  std::unique_ptr<DeviceLayers> device_;  // where the backend has calibration ops; else:
  std::unique_ptr<LayerStream> stream_;
  std::unique_ptr<LayerStream> dense_stream_;  // the unquantized model, to correct drift
  int stream_passes_ = 0;                      // over the tokens, per layer
  int64_t units_per_layer_ = 0;
  int layer_ = -1;  // the one in done_
  LayerResult done_;
  double searched_here_ = 0;  // seconds of this run in passes and search
  QuantizeReport report_;
  std::future<LayerResult> ahead_;  // last: what it runs uses the others
};

// Everything the integers and scales depend on. Of the weights the sizes and a sample: reading all
// of them to begin with would cost as much as a layer.
json::object fingerprint(const WeightSource& source, const Backend* backend,
                         const CalibrationData* calibration, const QuantizeOptions& options,
                         const json::object& facts) {
  const ModelSpec& spec = source.spec();
  uint64_t weights = 0;
  for (const WeightRow& row : weight_table(spec)) {
    std::vector<std::byte> storage;
    const TensorView view = source.view_dense(row, storage);
    const size_t sample = std::min<size_t>(view.bytes.size(), 4096);
    weights = weights * 1099511628211u + xxh3_64(view.bytes.first(sample)) +
              xxh3_64(view.bytes.last(sample));
    source.release(row);
  }
  json::object print = facts;
  print["version"] = NIBBLE_VERSION;
  print["model"] = spec.to_json();
  print["weights"] = hex64(weights);
  print["dtype"] = dtype_name(options.dtype);
  print["group_size"] = options.group_size;
  print["lm_head"] = lm_head_format_name(options.lm_head);
  print["int8_kv"] = options.int8_kv;
  print["calib_batch"] = options.calib_batch;
  print["max_step_tokens"] = options.max_step_tokens;
  print["max_gram_bytes"] = options.max_gram_bytes;
  if (backend != nullptr) print["backend"] = backend->name();
  if (calibration != nullptr) print["tokens"] = calibration->checksum();
  return print;
}

}  // namespace

const char* method_name(QuantizeMethod method) {
  switch (method) {
    case QuantizeMethod::kAwq: return "awq";
    case QuantizeMethod::kAwqLite: return "awq-lite";
    case QuantizeMethod::kRtn: return "rtn";
  }
  fail(ErrorKind::kInternal, "no such method");
}

const char* rounding_name(awq::Rounding rounding) {
  return rounding == awq::Rounding::kNearest ? "nearest" : "compensated";
}

bool needs_calibration(const QuantizeOptions& options) {
  return searches(options) || options.int8_kv;
}

QuantizeReport quantize(const fs::path& directory, const WeightSource& source, Backend* backend,
                        const CalibrationData* calibration, const QuantizeOptions& options,
                        Progress& progress) {
  check_options(source, options);
  if (options.lm_head != LmHeadFormat::kDense && source.spec().tied_embeddings) {
    progress.note(
        fmt::format("lm_head is tied to the embedding, which stays in {}; lm_head becomes "
                    "an {} tensor of its own",
                    dtype_name(options.dtype), lm_head_format_name(options.lm_head)));
    return quantize(directory, UntiedSource(source), backend, calibration, options, progress);
  }
  CheckpointOptions checkpoint;
  checkpoint.tp_size = options.tp_size;
  checkpoint.group_size = options.group_size;
  checkpoint.dtype = options.dtype;
  checkpoint.int8_kv = options.int8_kv;
  checkpoint.lm_head = options.lm_head;
  json::object facts = {{"method", method_name(options.method)}};
  if (options.method == QuantizeMethod::kAwq) {
    facts["rounding"] = rounding_name(options.rounding);
    facts["sweeps"] = options.rounding == awq::Rounding::kCompensated ? options.sweeps : 0;
    facts["clip"] = options.clip;
  }
  if (searches(options)) facts["sequential"] = options.sequential;
  if (options.method == QuantizeMethod::kAwq) facts["correct_drift"] = corrects_drift(options);
  if (options.lm_head != LmHeadFormat::kDense)
    facts["lm_head"] = lm_head_format_name(options.lm_head);
  if (needs_calibration(options)) {
    NIBBLE_CHECK(calibration != nullptr);
    facts["calibration"] = calibration->to_json();
    for (const std::string& sentence : calibration->notices()) progress.note(sentence);
  }
  std::optional<ResumeFolder> resume;
  // What flows through the layers stays in a device's memory, and the whole run takes minutes
  // there.
  const bool on_host = backend == nullptr || backend->calibration_ops() == nullptr;
  if (!options.resume_directory.empty() && on_host) {
    resume = ResumeFolder::open(options.resume_directory,
                                fingerprint(source, backend, calibration, options, facts));
  }
  checkpoint.extra_config["nibble"] = std::move(facts);
  return Quantizer(source, backend, calibration, options, std::move(resume), progress)
      .run(directory, checkpoint);
}

}  // namespace nibble
