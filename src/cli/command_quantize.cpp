// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "base/error.h"
#include "build/cuda_plugin.h"
#include "build/model_card.h"
#include "build/model_loader.h"
#include "build/tokenizer_files.h"
#include "cli/calibrate.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/texts.h"
#include "eval/evaluate.h"
#include "formats/inspect.h"
#include "quantize/quantizer.h"
#include "quantize/report_html.h"

namespace nibble::cli {
namespace {

// A flag that the method has no use for is an error: it would be taken for something that was done.
void set_method(const QuantizeFlags& flags, QuantizeOptions& options) {
  const auto refuse = [&](const char* flag, const std::string& value, const char* why) {
    fail(ErrorKind::kUsage, "{} {}: --method {} {}; leave the flag out or use --method awq", flag,
         value, flags.method, why);
  };
  options.method = flags.method == "rtn"        ? QuantizeMethod::kRtn
                   : flags.method == "awq-lite" ? QuantizeMethod::kAwqLite
                                                : QuantizeMethod::kAwq;
  options.sequential = options.method == QuantizeMethod::kAwq;
  if (options.method != QuantizeMethod::kAwq) {
    options.rounding = awq::Rounding::kNearest;
    options.clip = false;
    if (flags.rounding == "compensated") refuse("--rounding", "compensated", "rounds to nearest");
    if (flags.clip == "on") refuse("--clip", "on", "does not clip");
    if (flags.sweeps > 0) refuse("--sweeps", std::to_string(flags.sweeps), "rounds to nearest");
    if (options.method == QuantizeMethod::kRtn && flags.sequential == "on")
      refuse("--sequential", "on", "chooses nothing from activations");
  }
  if (!flags.rounding.empty()) {
    options.rounding =
        flags.rounding == "nearest" ? awq::Rounding::kNearest : awq::Rounding::kCompensated;
  }
  if (options.rounding == awq::Rounding::kNearest) {
    if (flags.sweeps > 0 && options.method == QuantizeMethod::kAwq) {
      fail(ErrorKind::kUsage,
           "--sweeps {}: --rounding nearest has none; leave one of the two flags out",
           flags.sweeps);
    }
    options.sweeps = 0;
  } else if (flags.sweeps >= 0) {
    options.sweeps = flags.sweeps;
  }
  if (!flags.clip.empty()) options.clip = flags.clip == "on";
  if (!flags.sequential.empty()) options.sequential = flags.sequential == "on";
  options.correct_drift = options.method == QuantizeMethod::kAwq && options.sequential;
  if (flags.correct_drift == "on" && !options.correct_drift) {
    refuse("--correct-drift", "on",
           options.method == QuantizeMethod::kAwq ? "with --sequential off knows no layers before"
                                                  : "moves no weights");
  }
  if (flags.correct_drift == "off") options.correct_drift = false;
}

// What runs the model over the calibration set, and where it is a GPU the search as well.
std::unique_ptr<Backend> calibration_backend(const QuantizeFlags& flags, const ModelSpec& spec) {
  if (flags.device == "cuda") {
    if (spec.head_dim != 128) {
      fail(ErrorKind::kUnsupported,
           "--device cuda: its attention has head_dim 128, this model has {}; use --device cpu",
           spec.head_dim);
    }
    std::unique_ptr<Backend> backend = open_any_cuda_backend();
    backend->calibration_ops();  // says what is missing before the texts are read
    return backend;
  }
  return make_backend(flags.device == "ref" ? "ref" : "cpu:native", ActivationPrecision::kF32,
                      flags.threads);
}

// Perplexity, KL divergence and top-1 agreement of the checkpoint with the model it came from: the
// weights alone, with exact activations and cache.
json::array measure_quality(const QuantizeFlags& flags, const fs::path& quantized,
                            const ModelSpec& spec, Progress& progress) {
  json::array rows;
  if (flags.eval.empty()) return rows;
  LoadOptions options;
  options.num_threads = flags.threads;
  options.build.limits.max_input_len = std::min(1024, spec.max_position);
  options.build.limits.max_output_len = 1;
  options.build.activation_precision = ActivationPrecision::kF32;
  options.build.kv_format = KvFormat::kF32;
  const LoadedModel model = load_model(quantized, options),
                    parent = load_model(flags.model, options);
  for (const std::string& file : flags.eval) {
    const std::vector<int32_t> ids = eval_ids(flags.model, file, flags.tokenizer_regex);
    const Comparison result =
        compare(model, parent, ids,
                {.context = options.build.limits.max_input_len, .max_windows = flags.eval_windows},
                progress);
    rows.push_back({{"text", fs::path(file).filename().string()},
                    {"windows", result.model.num_windows},
                    {"perplexity", result.model.perplexity},
                    {"perplexity_parent", result.other.perplexity},
                    {"kl_divergence", result.kl_mean},
                    {"top1_agreement", result.top1_agreement},
                    {"seconds", result.model.seconds}});
  }
  return rows;
}

// report.json: what was asked for, what was done, what was measured, how long it took.
json::object full_report(const QuantizeFlags& flags, const QuantizeOptions& options,
                         const QuantizeReport& report, const CalibrationData* calibration,
                         json::array quality, double calibration_seconds) {
  json::object settings = {{"method", flags.method}};
  if (options.method == QuantizeMethod::kAwq) {
    settings["rounding"] = rounding_name(options.rounding);
    settings["clip"] = options.clip;
    settings["sweeps"] = options.sweeps;
    settings["drift corrected"] = options.correct_drift;
  }
  if (options.method != QuantizeMethod::kRtn) settings["sequential"] = options.sequential;
  settings["group size"] = options.group_size;
  settings["lm_head"] = options.lm_head == LmHeadFormat::kDense
                            ? dtype_name(options.dtype)
                            : lm_head_format_name(options.lm_head);
  settings["unquantized tensors"] = dtype_name(options.dtype);
  settings["static int8 KV scales"] = options.int8_kv;
  json::object full = report.to_json();
  full["model"] = fs::path(flags.model).filename().string();
  full["settings"] = std::move(settings);
  full["calibration"] = calibration != nullptr ? json::value(calibration->to_json()) : nullptr;
  double evaluation = 0;
  for (const json::value& row : quality) evaluation += row.at("seconds").to_number<double>();
  full["stages"] = {{"calibration texts", calibration_seconds},
                    {"passes over the tokens", report.forward_seconds},
                    {"scales, clips and rounding", report.search_seconds},
                    {"reading and writing", report.write_seconds},
                    {"evaluation", evaluation}};
  full["quality"] = std::move(quality);
  return full;
}

constexpr const char* kUnfinished =
    "unfinished";  // in OUT.tmp: finished layers of an unfinished run

bool has_layers(const fs::path& directory) {
  return fs::exists(directory / kUnfinished / "layer-0.safetensors");
}

// OUT.tmp, of what an earlier run left there only its finished layers. From then on no error may
// cost these layers: a mistyped flag must not throw hours away.
AtomicDirectory open_output(const std::string& path, bool can_continue) {
  AtomicDirectory out = AtomicDirectory::open_or_create(path);
  const bool continues = has_layers(out.path());
  if (continues) out.keep();
  if (continues && !can_continue) {
    fail(
        ErrorKind::kUsage,
        "{} holds an unfinished quantization begun with other arguments; repeat the command it was "
        "begun with to continue it, or remove {} to begin anew",
        out.path().string(), out.path().string());
  }
  for (const auto& entry : fs::directory_iterator(out.path())) {
    if (!continues || entry.path().filename() != kUnfinished) fs::remove_all(entry.path());
  }
  return out;
}

// Sizes are counted before the card itself is there.
uint64_t bytes_under(const fs::path& directory) {
  uint64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.is_regular_file()) bytes += entry.file_size();
  }
  return bytes;
}

ModelCard model_card(const QuantizeFlags& flags, const QuantizeOptions& options,
                     const WeightSource& source, const fs::path& checkpoint,
                     const json::object& report) {
  const auto name = [](const std::string& directory) {
    const fs::path path = fs::absolute(directory).lexically_normal();
    return (path.has_filename() ? path : path.parent_path()).filename().string();
  };
  ModelCard card{.name = name(flags.out),
                 .base_name = name(flags.model),
                 .base_model = flags.base_model,
                 .base = read_hf_card(flags.model),
                 .spec = source.spec(),
                 .report = report,
                 .tp_size = options.tp_size,
                 .group_size = options.group_size,
                 .dtype = dtype_name(options.dtype),
                 .lm_head = options.lm_head,
                 .checkpoint_bytes = bytes_under(checkpoint)};
  for (const WeightRow& row : weight_table(source.spec())) {
    uint64_t elements = 1;
    for (const int64_t size : row.shape) elements *= static_cast<uint64_t>(size);
    card.parameters += elements;
    card.base_bytes += elements * static_cast<uint64_t>(dtype_bits(source.spec().dtype)) / 8;
  }
  return card;
}

}  // namespace

int run_quantize(const QuantizeFlags& flags) {
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const ModelKind kind = model_kind(flags.model);
  if (kind != ModelKind::kHuggingFace) {
    fail(ErrorKind::kInput,
         "{} is {}; quantize wants the Hugging Face directory of the unquantized model",
         flags.model,
         kind == ModelKind::kCheckpoint ? "a quantized checkpoint already" : "an engine");
  }
  const auto source = open_hf(flags.model);
  TerminalProgress progress;
  for (const std::string& notice : source->notices()) progress.note(notice);

  QuantizeOptions options;
  set_method(flags, options);
  options.group_size = flags.group_size;
  options.tp_size = flags.tp;
  options.dtype = flags.dtype.empty()        ? source->spec().dtype
                  : flags.dtype == "float16" ? DType::kF16
                                             : DType::kBF16;
  if (options.dtype == DType::kF32) options.dtype = DType::kBF16;
  if (!flags.quantize_lm_head.empty())
    options.lm_head = lm_head_format_from_name(flags.quantize_lm_head);
  options.int8_kv = flags.kv_cache == "int8";
  options.calib_batch = flags.calib_batch;
  options.num_threads = flags.threads;

  const bool on_gpu = flags.device == "cuda";
  if (on_gpu && !needs_calibration(options)) {
    fail(ErrorKind::kUsage, "--device cuda: --method rtn --kv-cache none calibrates nothing");
  }
  if (on_gpu && options.method == QuantizeMethod::kAwqLite) {
    fail(ErrorKind::kUnsupported, "--method awq-lite: not with --device cuda; use --device cpu");
  }
  std::optional<CalibrationData> calibration;
  std::unique_ptr<Backend> backend;
  AtomicDirectory out = open_output(flags.out, needs_calibration(options) && !on_gpu);
  if (needs_calibration(options)) {
    backend = calibration_backend(flags, source->spec());
    calibration = calibrate(flags, progress);
    options.resume_directory = out.path() / kUnfinished;
  }
  const double calibration_seconds = seconds();
  const fs::path checkpoint = out.path() / "trt-llm" / "checkpoints";
  fs::create_directories(checkpoint);
  const json::object report = [&] {
    try {
      const QuantizeReport done =
          quantize(checkpoint, *source, backend.get(), calibration ? &*calibration : nullptr,
                   options, progress);
      copy_tokenizer_files(flags.model, out.path());
      return full_report(flags, options, done, calibration ? &*calibration : nullptr,
                         measure_quality(flags, out.path(), source->spec(), progress),
                         calibration_seconds);
    } catch (const Error& error) {
      if (error.kind() == ErrorKind::kInterrupted && has_layers(out.path())) {
        out.keep();
        fail(ErrorKind::kInterrupted,
             "interrupted; the layers done so far are in {}, and the same command goes on from "
             "there (remove it to begin anew)",
             out.path().string());
      }
      throw;
    }
  }();
  fs::remove_all(out.path() / kUnfinished);
  write_file_atomically(out.path() / "README.md",
                        render_model_card(model_card(flags, options, *source, checkpoint, report)));
  write_file_atomically(out.path() / "report.html", render_report_html(report));
  if (flags.report_json) {
    write_file_atomically(out.path() / "report.json", dump_json(report, {.indent = 2}) + "\n");
  }
  out.commit();

  fmt::print("quantized {} to {}: {} ({}, group {}, {}tp {}) in {}\n", flags.model, flags.out,
             human_bytes(bytes_under(flags.out)), flags.method, flags.group_size,
             options.int8_kv ? "int8 KV scales, " : "", flags.tp, human_duration(seconds()));
  double before = 0, after = 0;
  const json::array& linears = report.at("linears").as_array();
  for (const json::value& linear : linears) {
    before += linear.at("error_rtn").to_number<double>();
    after += linear.at("error").to_number<double>();
  }
  if (before > 0) {
    fmt::print(
        "mean output error of the linears on the calibration set: {:.4f} % (round to nearest: "
        "{:.4f} %)\n",
        100 * after / static_cast<double>(linears.size()),
        100 * before / static_cast<double>(linears.size()));
  }
  for (const json::value& row : report.at("quality").as_array()) {
    const double parent = row.at("perplexity_parent").to_number<double>();
    fmt::print(
        "{}: perplexity {:.4f} before, {:.4f} after ({:+.3f} %), KL divergence {:.5f} nats, "
        "same top token {:.2f} %\n",
        std::string_view(row.at("text").as_string()), parent,
        row.at("perplexity").to_number<double>(),
        100 * (row.at("perplexity").to_number<double>() / parent - 1),
        row.at("kl_divergence").to_number<double>(),
        100 * row.at("top1_agreement").to_number<double>());
  }
  fmt::print("next: nibble build {} --out ENGINE\n", flags.out);
  return 0;
}

}  // namespace nibble::cli
