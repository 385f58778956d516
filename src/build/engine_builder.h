// `build`: decides the plan and writes an engine directory: rank0.engine (safetensors with the plan
// and checksums in its metadata), config.json (the plan), and the tokenizer, chat template and
// generation config of the model. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>

#include "base/progress.h"
#include "build/packer.h"

namespace nibble {

struct BuildOptions {
  std::string target =
      "cpu:native";  // cpu:native|cpu:avx512|cpu:avx2|cpu:generic|cuda:sm_90|cuda:portable|ref
  EngineLimits limits;
  KvFormat kv_format = KvFormat::kInt8Dynamic;
  int kv_block_tokens = 32;                                 // cuda: 64 always
  std::optional<ActivationPrecision> activation_precision;  // default: by target
  bool tune = true;  // build_engine(): measure kernels where there are choices
  /// Of open_synthetic(), for the command that builds the engine again; empty: a checkpoint.
  std::string synthetic, synthetic_lm_head;
  std::optional<fs::path> tokenizer_dir;  // when the checkpoint directory has no tokenizer
};

/// How the int4 linears, and an int8 lm_head, lie for a target.
WeightLayout int4_layout_of(std::string_view target);
WeightLayout int8_layout_of(std::string_view target);

/// Tokens of a step when nothing is asked for. On a CPU 512 rows fill the cores, and a larger step
/// only makes those who are already answering wait longer for their next token.
int default_max_num_tokens(std::string_view target, int max_batch_size);

/// When nothing is asked for.
ActivationPrecision default_activation_precision(std::string_view target);

/// Every decision, made once. Throws Error naming the option, value and wanted range.
EnginePlan plan_engine(const WeightSource& source, const BuildOptions& options);

/// Writes `out` atomically. `model_dir` is where tokenizer files are looked for.
void build_engine(const fs::path& model_dir, const WeightSource& source,
                  const BuildOptions& options, const fs::path& out, Progress& progress);

}  // namespace nibble
