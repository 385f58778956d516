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
  std::string target = "cpu:native";  // cpu:native|cpu:avx512|cpu:avx2|cpu:generic|cuda:sm_90|ref
  EngineLimits limits;
  KvFormat kv_format = KvFormat::kInt8Dynamic;
  int kv_block_tokens = 32;                                 // cuda: 64 always
  std::optional<ActivationPrecision> activation_precision;  // default: by target
  std::optional<fs::path> tokenizer_dir;  // when the checkpoint directory has no tokenizer
};

/// Every decision, made once. Throws Error naming the option, value and wanted range.
EnginePlan plan_engine(const WeightSource& source, const BuildOptions& options);

/// Writes `out` atomically. `model_dir` is where tokenizer files are looked for.
void build_engine(const fs::path& model_dir, const WeightSource& source,
                  const BuildOptions& options, const fs::path& out, Progress& progress);

/// The engine file's plan, checked against this binary: version, target available here, tp. The
/// message of a refusal holds the exact command that rebuilds.
EnginePlan read_engine_plan(const SafetensorsFile& file, const fs::path& engine_dir);

/// The command that makes an engine for this machine at the same place.
std::string rebuild_command(const fs::path& engine_dir);

/// Compares every tensor's XXH3 with the one recorded at build time. Throws Error{kInput} naming
/// the tensor.
void verify_engine(const SafetensorsFile& file);

}  // namespace nibble
