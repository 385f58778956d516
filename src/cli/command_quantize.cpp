// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <chrono>
#include <cstdio>

#include "base/error.h"
#include "build/model_loader.h"
#include "build/tokenizer_files.h"
#include "cli/builtin_calibration.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "formats/inspect.h"
#include "quantize/quantizer.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace nibble::cli {
namespace {

CalibrationData calibrate(const QuantizeFlags& flags, TerminalProgress& progress) {
  const fs::path model = flags.model;
  if (!fs::exists(model / "tokenizer.json")) {
    fail(ErrorKind::kInput,
         "{} has no tokenizer.json, which calibration needs (--method rtn --kv-cache none does "
         "without)",
         flags.model);
  }
  const Tokenizer tokenizer =
      Tokenizer::load(model, {parse_tokenizer_regex(flags.tokenizer_regex)});
  for (const std::string& notice : tokenizer.notices()) progress.note(notice);
  const ChatTemplate chat = ChatTemplate::load(model);
  CalibrationEncoder encoder;
  encoder.chat = [&](const json::object& row) {
    ChatRequest request;
    request.messages = row.at("messages").as_array();
    if (const json::value* tools = row.if_contains("tools")) request.tools = *tools;
    request.add_generation_prompt = false;
    const RenderedSegments rendered = chat.render(request);
    std::vector<Tokenizer::Segment> segments;
    for (const RenderedSegment& segment : rendered)
      segments.push_back({segment.text, segment.is_template});
    return tokenizer.encode_segments(segments);
  };
  encoder.text = [&](std::string_view text) {
    std::vector<int32_t> ids = tokenizer.encode(text);
    if (tokenizer.bos_id()) ids.insert(ids.begin(), *tokenizer.bos_id());
    if (tokenizer.eos_id()) ids.push_back(*tokenizer.eos_id());
    return ids;
  };
  const CalibrationOptions options{
      .size = flags.calib_size, .seq_len = flags.calib_seq_len, .seed = flags.seed};
  CalibrationData data =
      flags.calib.empty()
          ? make_calibration("builtin.jsonl", builtin_calibration(), options, encoder)
          : load_calibration(flags.calib, options, encoder);
  for (const std::string& notice : data.notices()) progress.note(notice);
  progress.note(fmt::format("calibrating on {} tokens in {} sequences from {}", data.tokens,
                            data.sequences.size(),
                            flags.calib.empty() ? "the texts shipped with nibble" : flags.calib));
  return data;
}

}  // namespace

int run_quantize(const QuantizeFlags& flags) {
  const auto start = std::chrono::steady_clock::now();
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
  options.method = flags.method == "rtn" ? QuantizeMethod::kRtn : QuantizeMethod::kAwq;
  options.group_size = flags.group_size;
  options.tp_size = flags.tp;
  options.dtype = flags.dtype.empty()        ? source->spec().dtype
                  : flags.dtype == "float16" ? DType::kF16
                                             : DType::kBF16;
  if (options.dtype == DType::kF32) options.dtype = DType::kBF16;
  options.int8_kv = flags.kv_cache == "int8";
  options.calib_batch = flags.calib_batch;
  options.num_threads = flags.threads;

  std::optional<CalibrationData> calibration;
  std::unique_ptr<Backend> backend;
  if (needs_calibration(options)) {
    calibration = calibrate(flags, progress);
    backend = make_backend(flags.device == "ref" ? "ref" : "cpu:native", ActivationPrecision::kF32,
                           flags.threads);
  }
  AtomicDirectory out = AtomicDirectory::create(flags.out);
  const fs::path checkpoint = out.path() / "trt-llm" / "checkpoints";
  fs::create_directories(checkpoint);
  const QuantizeReport report = quantize(checkpoint, *source, backend.get(),
                                         calibration ? &*calibration : nullptr, options, progress);
  copy_tokenizer_files(flags.model, out.path());
  out.commit();

  uint64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(flags.out)) {
    if (entry.is_regular_file()) bytes += entry.file_size();
  }
  double before = 0, after = 0;
  for (const LinearReport& linear : report.linears) {
    before += linear.search.error_rtn;
    after += linear.search.error;
  }
  fmt::print("quantized {} to {}: {} ({}, group {}, {}{}) in {}\n", flags.model, flags.out,
             human_bytes(bytes), flags.method, flags.group_size,
             options.int8_kv ? "int8 KV scales, " : "", fmt::format("tp {}", flags.tp),
             human_duration(
                 std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()));
  if (before > 0) {
    fmt::print(
        "mean output error of the linears on the calibration set: {:.4f} % (round to nearest: "
        "{:.4f} %)\n",
        100 * after / static_cast<double>(report.linears.size()),
        100 * before / static_cast<double>(report.linears.size()));
  }
  fmt::print("next: nibble build {} --out ENGINE\n", flags.out);
  return 0;
}

}  // namespace nibble::cli
