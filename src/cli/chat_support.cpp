// SPDX-License-Identifier: Apache-2.0
#include "cli/chat_support.h"

#include <fmt/format.h>

#include <cstdio>

#include "backends/cpu/bandwidth.h"
#include "cli/names.h"
#include "cli/terminal.h"

namespace nibble::cli {

std::unique_ptr<ChatModel> open_chat_model(const RunFlags& flags) {
  ChatModelOptions options;
  options.load.num_threads = flags.threads;
  options.load.build.target = flags.target;
  options.load.build.kv_format = kv_format_from_name(flags.kv_cache);
  options.tokenizer.regex = parse_tokenizer_regex(flags.tokenizer_regex);
  options.roles = flags.roles == "strict" ? RolePolicy::kStrict : RolePolicy::kTolerant;
  options.kv_cache_bytes = flags.kv_memory_gib > 0
                               ? static_cast<uint64_t>(flags.kv_memory_gib * (1 << 30))
                               : flags.kv_cache_bytes;
  options.on_memory_plan = [](const std::string& plan) { print_stderr("{}\n", plan); };
  if (model_kind(flags.model) != ModelKind::kEngine) {
    print_stderr(
        "{} is not an engine: packing it in memory (nibble build makes one that starts at once)\n",
        flags.model);
  }
  auto model = ChatModel::open(flags.model, options);
  for (const std::string& notice : model->notices()) print_stderr("{}\n", notice);
  return model;
}

SamplingParams sampling_params(const SamplingFlags& flags) {
  SamplingParams params;
  params.temperature = static_cast<float>(flags.temperature);
  params.top_k = flags.top_k;
  params.top_p = static_cast<float>(flags.top_p);
  params.min_p = static_cast<float>(flags.min_p);
  params.repetition_penalty = static_cast<float>(flags.repetition_penalty);
  params.presence_penalty = static_cast<float>(flags.presence_penalty);
  params.frequency_penalty = static_cast<float>(flags.frequency_penalty);
  params.seed = flags.seed;
  return params;
}

std::optional<int> max_tokens(const SamplingFlags& flags) {
  if (flags.max_tokens > 0) return flags.max_tokens;
  return std::nullopt;
}

SpeedReport::SpeedReport(const ChatModel& model) : bytes_per_step_(model.bytes_per_decode_step()) {
  // A device's memory is not this machine's: `nibble bench latency` measures that.
  if (!model.plan().target.starts_with("cuda:")) {
    read_bandwidth_ = measure_read_bandwidth(0, size_t{256} << 20, 2);
  }
}

std::string SpeedReport::line(const Generated& generated) const {
  const Usage& usage = generated.usage;
  std::string line =
      fmt::format("[{} token{}", usage.completion_tokens, usage.completion_tokens == 1 ? "" : "s");
  if (usage.completion_tokens > 1 && usage.decode_us > 0) {
    const double rate =
        (usage.completion_tokens - 1) / (static_cast<double>(usage.decode_us) * 1e-6);
    const double gb_per_s = rate * static_cast<double>(bytes_per_step_) * 1e-9;
    line += fmt::format(" at {:.1f} tokens/s, {:.2f} GB/s of weights", rate, gb_per_s);
    if (read_bandwidth_ > 0) {
      line += fmt::format(" = {:.0f} % of the {:.1f} GB/s this machine reads",
                          100 * gb_per_s / read_bandwidth_, read_bandwidth_);
    }
  }
  line +=
      fmt::format("; prompt {} tokens ({} cached) in {}]", usage.prompt_tokens, usage.cached_tokens,
                  human_duration(static_cast<double>(usage.prefill_us) * 1e-6));
  return line;
}

}  // namespace nibble::cli
