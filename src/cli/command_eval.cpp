// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "base/error.h"
#include "base/json.h"
#include "build/tokenizer_files.h"
#include "cli/names.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/texts.h"
#include "eval/evaluate.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace nibble::cli {
namespace {

LoadedModel load(const std::string& directory, const EvalFlags& flags) {
  LoadOptions options;
  options.num_threads = flags.threads;
  options.build.target = flags.target;
  options.build.limits.max_input_len = flags.context;
  options.build.limits.max_output_len = 1;
  options.build.activation_precision = activation_precision_from_flag(flags.activations);
  options.build.kv_format =
      !flags.kv_cache.empty() ? kv_format_from_name(flags.kv_cache)
      : model_kind(directory) == ModelKind::kHuggingFace
          ? (flags.target.starts_with("cuda") ? KvFormat::kF16 : KvFormat::kF32)
          : KvFormat::kInt8Dynamic;
  LoadedModel model = load_model(directory, options);
  for (const std::string& notice : model.notices) print_stderr("{}\n", notice);
  return model;
}

// KL divergence compares two distributions over the same pieces of text, so equal sizes of the
// vocabularies do not suffice.
void check_same_vocabulary(const fs::path& model, const fs::path& other,
                           const TokenizerOptions& options, Progress& progress) {
  for (const fs::path& directory : {model, other}) {
    if (!fs::exists(directory / "tokenizer.json")) {
      progress.note(
          fmt::format("{} has no tokenizer.json: whether both models read ids alike is not checked",
                      directory.string()));
      return;
    }
  }
  const Tokenizer a = Tokenizer::load(model, options), b = Tokenizer::load(other, options);
  const auto spell = [](const Tokenizer& tokenizer, int32_t id) {
    if (!tokenizer.has_token(id)) return std::string("no token");
    std::string text;
    utf8::append_lossy(text, tokenizer.token_bytes(id));
    return dump_json(json::value(text));
  };
  for (int32_t id = 0; id < std::max(a.vocab_size(), b.vocab_size()); ++id) {
    if (a.has_token(id) == b.has_token(id) && a.token_bytes(id) == b.token_bytes(id)) continue;
    fail(
        ErrorKind::kInput,
        "--against {}: its tokenizer differs from that of {} (id {} is {} there and {} here); only "
        "models with one vocabulary compare",
        other.string(), model.string(), id, spell(b, id), spell(a, id));
  }
}

json::object describe(const EvalResult& result) {
  return {{"perplexity", result.perplexity},
          {"nll_mean", result.nll_mean},
          {"windows", result.num_windows},
          {"scored_tokens", result.num_scored},
          {"seconds", result.seconds}};
}

}  // namespace

int run_eval(const EvalFlags& flags) {
  if (flags.text.empty() && flags.ids.empty()) {
    fail(ErrorKind::kUsage, "eval: give --text FILE or --ids FILE.u16");
  }
  const LoadedModel model = load(flags.model, flags);
  const std::vector<int32_t> ids =
      !flags.ids.empty() ? read_ids_file(flags.ids)
                         : encode_text_file(model.directory, flags.text, flags.tokenizer_regex);
  const EvalOptions options{.context = flags.context, .max_windows = flags.max_windows};
  TerminalProgress progress;
  const std::string how = fmt::format("{}, KV {}, activations {}", model.plan.target,
                                      kv_format_name(model.plan.kv_format),
                                      activation_precision_name(model.plan.activation_precision));
  if (flags.against.empty()) {
    const EvalResult result = evaluate(model, ids, options, progress);
    if (flags.json) {
      json::object out = describe(result);
      out["target"] = model.plan.target;
      out["kv_cache"] = kv_format_name(model.plan.kv_format);
      fmt::print("{}\n", dump_json(out));
    } else {
      fmt::print("perplexity {:.4f} ({} tokens scored in {} windows of {}; {}; {:.0f} tokens/s)\n",
                 result.perplexity, result.num_scored, result.num_windows, flags.context, how,
                 static_cast<double>(result.num_windows * flags.context) / result.seconds);
    }
    return 0;
  }
  check_same_vocabulary(model.directory, tokenizer_directory(flags.against),
                        {parse_tokenizer_regex(flags.tokenizer_regex)}, progress);
  EvalFlags parent_flags = flags;
  // What the model is compared with stays exact, and is unquantized as a rule: nothing that could
  // read e4m3.
  if (flags.activations == activation_precision_name(ActivationPrecision::kE4m3)) {
    parent_flags.activations.clear();
  }
  const LoadedModel parent = load(flags.against, parent_flags);
  const Comparison comparison = compare(model, parent, ids, options, progress);
  const double rise = 100 * (comparison.model.perplexity / comparison.other.perplexity - 1);
  if (flags.json) {
    json::object out = describe(comparison.model);
    out["target"] = model.plan.target;
    out["kv_cache"] = kv_format_name(model.plan.kv_format);
    out["against"] = describe(comparison.other);
    out["perplexity_rise_percent"] = rise;
    out["kl_divergence"] = comparison.kl_mean;
    out["top1_agreement"] = comparison.top1_agreement;
    fmt::print("{}\n", dump_json(out));
  } else {
    fmt::print(
        "perplexity {:.4f} against {:.4f}: {:+.3f} %\nKL divergence {:.6f} nats, top-1 agreement "
        "{:.3f} %\n({}; {} tokens scored)\n",
        comparison.model.perplexity, comparison.other.perplexity, rise, comparison.kl_mean,
        100 * comparison.top1_agreement, how, comparison.model.num_scored);
  }
  return 0;
}

}  // namespace nibble::cli
