// Opens anything that can run: an engine, a checkpoint or a Hugging Face directory (the latter two
// are packed in memory for the asked target), with its backend and weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "build/engine_builder.h"
#include "formats/weight_source.h"
#include "model/weights.h"

namespace nibble {

/// How int4 linears are fed when nothing is asked for: three times as fast as kF32, and it costs
/// 0.02 % of perplexity (docs/quantization.md, docs/performance.md).
inline constexpr ActivationPrecision kDefaultCpuActivationPrecision =
    ActivationPrecision::kInt8Group;

/// Throws Error{kUsage} that names the targets that can, where `target` cannot feed its linears so.
void check_activation_precision(const std::string& target, ActivationPrecision precision);

/// "ref", "cpu:native", "cpu:avx512", "cpu:avx2", "cpu:generic", "cuda:sm_90", "cuda:portable".
/// Throws Error{kDevice or kUsage}.
std::unique_ptr<Backend> make_backend(const std::string& target, ActivationPrecision precision,
                                      int num_threads);
/// cpu:native -> the best instruction set of this machine. A cuda target is checked by name only.
std::string resolve_target(const std::string& target);

struct LoadOptions {
  BuildOptions build;   // for what is not an engine yet; limits and kv format matter
  int num_threads = 0;  // 0: usable_cpu_count()
  bool verify = false;  // check the engine's checksums first
  /// Called when everything is known and nothing has been packed or loaded into the backend; may
  /// throw.
  std::function<void(const EnginePlan&, uint64_t weight_bytes, Backend&)> before_load;
};

struct LoadedModel {
  fs::path directory;  // tokenizer and chat template are here
  ModelKind kind = ModelKind::kEngine;
  EnginePlan plan;
  std::unique_ptr<WeightSource> source;  // null for engines; host backends map its bytes
  std::unique_ptr<EngineTensors> tensors;
  std::unique_ptr<Backend> backend;
  ModelWeights weights;
  std::vector<std::string> notices;  // of the engine on this machine, for people
  double load_seconds = 0;           // until the weights were where the backend reads them
};

/// Throws EngineRefused (engine_check.h) for an engine that must be built again.
LoadedModel load_model(const fs::path& directory, const LoadOptions& options);
/// The same from an open source (synthetic models).
LoadedModel load_source(std::unique_ptr<WeightSource> source, const LoadOptions& options);

}  // namespace nibble
