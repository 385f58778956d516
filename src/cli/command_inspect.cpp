// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>

#include "base/error.h"
#include "build/engine_check.h"
#include "build/kernel_table.h"
#include "build/model_loader.h"
#include "cli/options.h"
#include "formats/inspect.h"
#include "model/kv_cache.h"

namespace nibble::cli {
namespace {

// What running the engine takes: weights as they lie in the file, KV per token, one step's
// activations.
json::object memory_plan(const EnginePlan& plan, uint64_t weight_bytes) {
  const auto backend = make_backend(plan.target, plan.activation_precision, 1);
  const uint64_t block = KvCache::bytes_per_block(*backend, plan);
  const uint64_t per_token = block / static_cast<uint64_t>(plan.kv_block_tokens);
  const auto sequence_blocks = static_cast<uint64_t>(
      (plan.limits.max_seq_len() + plan.kv_block_tokens - 1) / plan.kv_block_tokens);
  const ModelSpec& spec = plan.spec;
  const uint64_t row =
      backend->act_bytes() *
      static_cast<uint64_t>(2 * spec.hidden_size + spec.qkv_size() + spec.q_size() + spec.ffn_size);
  const uint64_t activations = row * static_cast<uint64_t>(plan.limits.max_num_tokens);
  const uint64_t logits = 4 * static_cast<uint64_t>(plan.limits.max_batch_size) *
                          static_cast<uint64_t>(spec.vocab_size);
  return {{"weights_bytes", weight_bytes},
          {"kv_bytes_per_token", per_token},
          {"kv_bytes_one_full_sequence", sequence_blocks * block},
          {"kv_bytes_full_batch",
           sequence_blocks * block * static_cast<uint64_t>(plan.limits.max_batch_size)},
          {"activation_bytes", activations},
          {"logit_bytes", logits}};
}

}  // namespace

int run_inspect(const InspectFlags& flags) {
  const bool is_engine = model_kind(flags.model) == ModelKind::kEngine;
  if (is_engine) open_engine(flags.model);  // a refusal with the command that builds it again
  if (!flags.tensor.empty()) {
    const json::object report = inspect_tensor(flags.model, flags.tensor);
    fmt::print("{}\n", flags.json ? dump_json(report) : describe_tensor(report));
    return 0;
  }
  json::object report = inspect_model(flags.model);
  std::string text = describe_model(report);
  if (is_engine) {
    const SafetensorsFile file = open_engine(flags.model);
    const EnginePlan plan = read_engine_plan(file, flags.model);
    json::object memory;
    std::string unknown;
    try {
      memory = memory_plan(plan, file.file().bytes().size());
    } catch (const Error& error) {  // an engine for a GPU that is elsewhere can still be read
      if (error.kind() != ErrorKind::kDevice) throw;
      unknown = fmt::format("  unknown here: {}\n", error.what());
    }
    report["plan"] = plan.to_json();
    report["memory"] = memory;
    json::object shown = plan.to_json();
    shown.erase("tactics");  // as a table
    text += "\nplan\n" + dump_json(shown, {.indent = 2}) + "\n";
    if (!plan.tactics.empty()) {
      text += fmt::format("int4 kernels, as measured on {}\n{}\n{}\n", plan.cuda.gpu,
                          chosen_kernels(plan.tactics), kernel_times(plan.tactics));
    }
    text += "memory\n" + unknown;
    for (const auto& [name, bytes] : memory) {
      text += fmt::format("  {:28} {}\n", std::string_view(name),
                          human_bytes(bytes.to_number<uint64_t>()));
    }
    if (flags.verify) {
      verify_engine(file, flags.model);
      report["checksums"] = "ok";
      text += "checksums ok\n";
    }
  } else if (flags.verify) {
    fail(ErrorKind::kUsage, "--verify checks an engine's checksums; {} is not an engine",
         flags.model);
  }
  if (flags.json) {
    fmt::print("{}\n", dump_json(report));
  } else {
    fmt::print("{}{}", text, text.ends_with('\n') ? "" : "\n");
  }
  return 0;
}

}  // namespace nibble::cli
