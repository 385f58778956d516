// SPDX-License-Identifier: Apache-2.0
#include "build/model_loader.h"

#include <fmt/ranges.h>

#include <chrono>

#include "backends/cpu/cpu_backend.h"
#include "backends/reference/reference_backend.h"
#include "base/error.h"
#include "base/nearest.h"
#include "build/cuda_plugin.h"
#include "build/engine_check.h"
#include "build/tokenizer_files.h"

namespace nibble {

std::string resolve_target(const std::string& target) {
  if (target == "ref") return target;
  if (target.starts_with("cuda")) return resolve_cuda_target(target);
  if (target.starts_with("cpu:")) return "cpu:" + resolve_cpu_isa(target.substr(4));
  const std::vector<std::string> known = {"cpu:native", "cpu:avx512",    "cpu:avx2", "cpu:generic",
                                          "cuda:sm_90", "cuda:portable", "ref"};
  fail(ErrorKind::kUsage, "unknown target {}; did you mean {}? Known: {}", target,
       nearest_name(target, known), fmt::join(known, ", "));
}

void check_activation_precision(const std::string& target, ActivationPrecision precision) {
  if (precision != ActivationPrecision::kE4m3 || target == "cuda:sm_90" || target == "ref") {
    return;
  }
  fail(ErrorKind::kUsage,
       "--activations fp8: {} has no e4m3 linears; --target cuda:sm_90 has them, and ref emulates "
       "them",
       target);
}

std::unique_ptr<Backend> make_backend(const std::string& target, ActivationPrecision precision,
                                      int num_threads) {
  const std::string resolved = resolve_target(target);
  check_activation_precision(resolved, precision);
  if (resolved == "ref") return make_reference_backend(precision);
  if (resolved.starts_with("cuda:")) return open_cuda_backend(resolved, precision);
  return make_cpu_backend(resolved.substr(4), precision, num_threads);
}

namespace {

void open_backend(LoadedModel& model, const LoadOptions& options) {
  model.backend =
      make_backend(model.plan.target, model.plan.activation_precision, options.num_threads);
  model.backend->use_tactics(model.plan.tactics);
}

void load_weights(LoadedModel& model) {
  const auto start = std::chrono::steady_clock::now();
  model.weights = ModelWeights::load(*model.backend, model.plan, *model.tensors);
  model.backend->sync();
  model.load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

LoadedModel load_source(std::unique_ptr<WeightSource> source, const LoadOptions& options) {
  LoadedModel model;
  model.kind = ModelKind::kHuggingFace;
  model.source = std::move(source);
  model.plan = plan_engine(*model.source, options.build);
  open_backend(model, options);  // first: without a GPU there is no need to pack
  if (options.before_load) {
    options.before_load(model.plan, engine_bytes(*model.source, model.plan), *model.backend);
  }
  model.tensors = std::make_unique<EngineTensors>(pack_in_memory(*model.source, model.plan));
  load_weights(model);
  return model;
}

namespace {

void load_engine(LoadedModel& model, const fs::path& directory, const LoadOptions& options) {
  SafetensorsFile file = open_engine(directory);
  model.plan = read_engine_plan(file, directory);
  try {
    open_backend(model, options);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kDevice) throw;
    std::string others;
    if (model.plan.target == "cuda:sm_90") {
      others += "\nFor any GPU of compute capability 8.0 or newer, " +
                rebuild_command(model.plan, directory, "cuda:portable");
    }
    others += "\nFor the CPU, " + rebuild_command(model.plan, directory, "cpu:native");
    fail(ErrorKind::kDevice, "{} was built for {}, which cannot run here: {}{}",
         (directory / "rank0.engine").string(), model.plan.target, error.what(), others);
  }
  const std::string notice = check_cuda(model.plan, model.backend->cuda_platform(), directory);
  if (!notice.empty()) model.notices.push_back(notice);
  if (options.verify) verify_engine(file, directory);
  model.tensors = std::make_unique<EngineTensors>(EngineTensors::from_file(std::move(file)));
  if (options.before_load) {
    options.before_load(model.plan, model.tensors->total_bytes(), *model.backend);
  }
  load_weights(model);
}

}  // namespace

LoadedModel load_model(const fs::path& directory, const LoadOptions& options) {
  const ModelKind kind = model_kind(directory);
  LoadedModel model;
  if (kind == ModelKind::kEngine) {
    try {
      load_engine(model, directory, options);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kInput && error.kind() != ErrorKind::kUnsupported) throw;
      std::string message = error.what();
      if (message.find("nibble build") == message.npos) {  // weights, kernels: not as planned
        message = fmt::format("{}: {}; {}", (directory / "rank0.engine").string(), message,
                              rebuild_command(model.plan, directory));
      }
      throw EngineRefused(error.kind(), message);
    }
  } else {
    model = load_source(open_source(directory), options);
  }
  model.kind = kind;
  model.directory = tokenizer_directory(directory);
  return model;
}

}  // namespace nibble
