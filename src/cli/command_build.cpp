// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <chrono>
#include <cstdio>

#include "base/error.h"
#include "build/cuda_plugin.h"
#include "build/engine_builder.h"
#include "build/model_card.h"
#include "build/model_loader.h"
#include "build/tokenizer_files.h"
#include "cli/names.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "formats/inspect.h"
#include "formats/synthetic.h"

namespace nibble::cli {

BuildOptions build_options(const BuildFlags& flags) {
  BuildOptions options;
  options.target = resolve_target(flags.target);
  options.limits.max_batch_size = flags.max_batch_size;
  options.limits.max_input_len = flags.max_input_len;
  options.limits.max_output_len = flags.max_output_len;
  if (flags.max_num_tokens > 0) options.limits.max_num_tokens = flags.max_num_tokens;
  options.kv_format = kv_format_from_name(flags.kv_cache);
  options.activation_precision = activation_precision_from_flag(flags.activations);
  options.tune = !flags.no_tune;
  options.synthetic = flags.synthetic;
  options.synthetic_lm_head = flags.quantize_lm_head;
  if (!flags.tokenizer.empty()) options.tokenizer_dir = flags.tokenizer;
  return options;
}

int run_build(const BuildFlags& flags) {
  const auto start = std::chrono::steady_clock::now();
  const BuildOptions options = build_options(flags);
  if (flags.checkpoint.empty() == flags.synthetic.empty()) {
    fail(ErrorKind::kUsage, "build: give a CHECKPOINT or --synthetic SHAPE");
  }
  const bool synthetic = !flags.synthetic.empty();
  const ModelKind kind = synthetic ? ModelKind::kCheckpoint : model_kind(flags.checkpoint);
  if (kind == ModelKind::kEngine) {
    fail(ErrorKind::kUsage,
         "{} is an engine already; build wants the checkpoint or Hugging Face directory it came "
         "from",
         flags.checkpoint);
  }
  if (!synthetic && !flags.quantize_lm_head.empty()) {
    fail(
        ErrorKind::kUsage,
        "build: --quantize-lm-head {} goes with --synthetic; a checkpoint's lm_head is what nibble "
        "quantize made of it (its flag has the same name)",
        flags.quantize_lm_head);
  }
  const auto source = synthetic
                          ? open_synthetic(synthetic_shape(flags.synthetic).spec, /*seed=*/1,
                                           /*int4=*/true,
                                           flags.quantize_lm_head.empty()
                                               ? LmHeadFormat::kDense
                                               : lm_head_format_from_name(flags.quantize_lm_head))
                          : open_source(flags.checkpoint);
  TerminalProgress progress;
  for (const std::string& notice : source->notices()) progress.note(notice);
  if (kind == ModelKind::kHuggingFace) {
    progress.note(
        "the model is not quantized: this engine keeps its weights at full size (nibble quantize "
        "makes a 4-bit checkpoint)");
  }
  const fs::path tokenizer_source = options.tokenizer_dir.value_or(flags.checkpoint);
  if (tokenizer_source.empty() ||
      !fs::exists(tokenizer_directory(tokenizer_source) / "tokenizer.json")) {
    progress.note(
        fmt::format("no tokenizer.json beside {}: the engine can be measured but not chatted with; "
                    "--tokenizer DIR "
                    "takes one from elsewhere",
                    synthetic ? flags.synthetic : flags.checkpoint));
  }
  if (const auto unused = unused_gpu(options.target)) progress.note(*unused);
  build_engine(flags.checkpoint, *source, options, flags.out, progress);
  if (kind == ModelKind::kCheckpoint && !synthetic) {  // it has a card
    const fs::path config = fs::path(flags.out) / "config.json";
    update_cards(flags.checkpoint, flags.out,
                 EnginePlan::from_json(parse_json(read_file(config), config.string()).as_object(),
                                       config.string()));
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const uint64_t bytes = fs::file_size(fs::path(flags.out) / "rank0.engine");
  fmt::print("built {} for {}: {} in {} ({}/s)\n", flags.out, options.target, human_bytes(bytes),
             human_duration(seconds),
             human_bytes(static_cast<uint64_t>(static_cast<double>(bytes) / seconds)));
  return 0;
}

}  // namespace nibble::cli
