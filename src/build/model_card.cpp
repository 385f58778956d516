// SPDX-License-Identifier: Apache-2.0
#include "build/model_card.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "base/error.h"
#include "build/tokenizer_files.h"
#include "formats/inspect.h"

namespace nibble {
namespace {

constexpr std::string_view kEnginesBegin = "<!-- nibble:engines -->";
constexpr std::string_view kEnginesEnd = "<!-- /nibble:engines -->";
constexpr std::string_view kSpeedBegin = "<!-- nibble:speed -->";
constexpr std::string_view kSpeedEnd = "<!-- /nibble:speed -->";
constexpr std::string_view kNoEngines =
    "None was built yet. `nibble build` adds a row for each engine.\n";

std::string plain(const json::value& value) {
  if (value.is_string()) return std::string(std::string_view(value.get_string()));
  if (value.is_bool()) return value.get_bool() ? "on" : "off";
  return dump_json(value);
}

double number(const json::object& object, const char* key) {
  return object.at(key).to_number<double>();
}

std::string count(uint64_t value) {
  if (value >= 1'000'000'000) return fmt::format("{:.1f} B", static_cast<double>(value) / 1e9);
  return fmt::format("{:.1f} M", static_cast<double>(value) / 1e6);
}

std::string row(std::string_view name, std::string_view value) {
  return fmt::format("| {} | {} |\n", name, value);
}

const json::array* list(const json::object& report, const char* key) {
  const json::value* value = report.if_contains(key);
  return value != nullptr && value->is_array() && !value->get_array().empty() ? &value->get_array()
                                                                              : nullptr;
}

std::string front_matter(const ModelCard& card) {
  std::string out = "---\n";
  const auto line = [&](const char* key, const std::string& value) {
    if (!value.empty()) out += fmt::format("{}: {}\n", key, value);
  };
  line("license", card.base.license);
  line("license_name", card.base.license_name);
  line("license_link", card.base.license_link);
  if (!card.base_model.empty()) {
    out += fmt::format("base_model:\n- {}\nbase_model_relation: quantized\n", card.base_model);
  }
  if (!card.base.languages.empty()) {
    out += "language:\n";
    for (const std::string& language : card.base.languages) out += "- " + language + "\n";
  }
  std::string architecture = card.spec.architecture.substr(0, card.spec.architecture.find("For"));
  std::transform(architecture.begin(), architecture.end(), architecture.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return out + fmt::format(
                   "pipeline_tag: text-generation\ntags:\n- nibble\n- tensorrt-llm\n- awq\n- int4\n"
                   "- 4-bit\n- {}\n---\n\n",
                   architecture);
}

std::string specifications(const ModelCard& card) {
  const ModelSpec& spec = card.spec;
  std::string out = "## Technical specifications\n\n| | |\n|---|---|\n";
  out += row("Architecture", spec.architecture);
  out += row("Parameters", count(card.parameters));
  out += row("Layers x hidden size", fmt::format("{} x {}", spec.num_layers, spec.hidden_size));
  out += row("Attention", fmt::format("{} heads, {} KV heads, head size {}", spec.num_heads,
                                      spec.num_kv_heads, spec.head_dim));
  out += row("Feed-forward size", std::to_string(spec.ffn_size));
  out += row("Vocabulary", std::to_string(spec.vocab_size));
  out += row("Positions the model allows", std::to_string(spec.max_position));
  out += row("Weights of the linears",
             fmt::format("signed 4-bit integers, one F32 scale per row and {} input channels, one "
                         "pre-scale vector per linear",
                         card.group_size));
  if (card.lm_head == LmHeadFormat::kDense) {
    out += row("Embedding, norms, lm_head", card.dtype + ", not quantized");
  } else {
    out += row("lm_head",
               card.lm_head == LmHeadFormat::kInt4
                   ? "int4 like the linears of the layers"
                   : fmt::format("int8, one F32 scale per row and {} input channels (nibble's own "
                                 "extension of the format)",
                                 card.group_size));
    out += row("Embedding, norms", card.dtype + ", not quantized");
  }
  const json::value* kv = card.report.if_contains("kv_scales");
  const bool has_kv = kv != nullptr && !kv->as_object().at("k").as_array().empty();
  out += row("KV cache", has_kv ? "static int8 scales are in the checkpoint (one for K and one for "
                                  "V in each layer); nibble's default cache is int8 with scales "
                                  "per token and head and does not need them"
                                : "no scales in the checkpoint; nibble's default cache is int8 "
                                  "with scales per token and head");
  out += row("Size of the checkpoint",
             fmt::format("{} (the original weights: {})", human_bytes(card.checkpoint_bytes),
                         human_bytes(card.base_bytes)));
  out += row("Tensor-parallel files", std::to_string(card.tp_size));
  return out + "\n";
}

std::string details(const ModelCard& card) {
  std::string out = "## Quantization details\n\n| | |\n|---|---|\n";
  if (const json::value* settings = card.report.if_contains("settings")) {
    for (const auto& member : settings->as_object())
      out += row(std::string_view(member.key()), plain(member.value()));
  }
  out += row("Quantized by", "nibble " NIBBLE_VERSION);
  const json::value* calibration = card.report.if_contains("calibration");
  if (calibration == nullptr || !calibration->is_object()) {
    out += row("Calibration texts", "none were used");
  } else {
    const json::object& data = calibration->get_object();
    out += row("Calibration",
               fmt::format("{} tokens in {} sequences of at most {}, seed {}, no padding",
                           number(data, "tokens"), number(data, "sequences"),
                           number(data, "seq_len"), number(data, "seed")));
    for (const json::value& value : data.at("sources").as_array()) {
      const json::object& source = value.as_object();
      out += row(
          "Calibration file",
          fmt::format("`{}` (XXH3 {}), weight {}: {} of {} samples, {} tokens, {} refused by "
                      "the chat template",
                      plain(source.at("file")), plain(source.at("xxh3")), number(source, "weight"),
                      number(source, "samples_used"), number(source, "samples_in_file"),
                      number(source, "tokens"), number(source, "samples_unusable")));
    }
  }
  if (const json::array* linears = list(card.report, "linears")) {
    double before = 0, after = 0;
    for (const json::value& linear : *linears) {
      before += number(linear.as_object(), "error_rtn");
      after += number(linear.as_object(), "error");
    }
    const double n = static_cast<double>(linears->size());
    out += row("Mean output error of the linears, calibration texts",
               fmt::format("{:.4f} % of the output's energy (rounding to nearest: {:.4f} %)",
                           100 * after / n, 100 * before / n));
  }
  out += row("Time", fmt::format("{:.0f} s", number(card.report, "seconds")));
  return out + "\nMore, with plots: `report.html`.\n\n";
}

std::string quality(const ModelCard& card) {
  std::string out = "## Measured quality and speed\n\n";
  if (const json::array* rows = list(card.report, "quality")) {
    out +=
        "Against the unquantized model, weights only (exact activations and KV cache), windows of "
        "1024 tokens or the model's context:\n\n| text | windows | perplexity before | after | "
        "rise | KL divergence | same top token |\n|---|---|---|---|---|---|---|\n";
    for (const json::value& value : *rows) {
      const json::object& r = value.as_object();
      const double before = number(r, "perplexity_parent"), after = number(r, "perplexity");
      out += fmt::format("| `{}` | {} | {:.4f} | {:.4f} | {:+.3f} % | {:.5f} nats | {:.2f} % |\n",
                         plain(r.at("text")), number(r, "windows"), before, after,
                         100 * (after / before - 1), number(r, "kl_divergence"),
                         100 * number(r, "top1_agreement"));
    }
  } else {
    out +=
        "Perplexity, KL divergence and top-1 agreement: not measured (`nibble quantize --eval "
        "FILE` or `nibble eval . --against ORIGINAL --text FILE`).\n";
  }
  return out +
         fmt::format(
             "\nBenchmarks of knowledge or skill (MMLU and the like): not measured.\n\nSpeed:\n\n"
             "{}\nNot measured. `nibble bench latency ENGINE --write-card` adds a row.\n{}\n\n",
             kSpeedBegin, kSpeedEnd);
}

std::string table_rows(const std::string& section) {
  std::string rows;
  for (size_t at = 0; at < section.size();) {
    const size_t end = std::min(section.find('\n', at), section.size() - 1) + 1;
    if (section.compare(at, 3, "| `") == 0) rows += section.substr(at, end - at);
    at = end;
  }
  return rows;
}

// The part of the card between two marks as a table: its rows, less the one that begins with `key`,
// and `row`.
std::string with_row(const std::string& card, std::string_view begin_mark,
                     std::string_view end_mark, std::string_view header, const std::string& key,
                     const std::string& row) {
  const size_t begin = card.find(begin_mark), end = card.find(end_mark);
  if (begin == card.npos || end == card.npos || end < begin) return card;
  const size_t content = begin + begin_mark.size();
  std::string rows = table_rows(card.substr(content, end - content));
  if (const size_t old = rows.find(key); old != rows.npos)
    rows.erase(old, rows.find('\n', old) + 1 - old);
  return fmt::format("{}\n{}{}{}{}", card.substr(0, content), header, rows, row, card.substr(end));
}

}  // namespace

std::string render_model_card(const ModelCard& card) {
  const std::string original =
      card.base_model.empty() ? "`" + card.base_name + "`"
                              : fmt::format("[{0}](https://huggingface.co/{0})", card.base_model);
  std::string out = front_matter(card);
  out += fmt::format(
      "# {}\n\n## Overview\n\n{} quantized to 4-bit weights, as a portable checkpoint in "
      "TensorRT-LLM's layout (W4A16 AWQ). It runs with nibble on {}.\n\n"
      "License: {}.\n\n",
      card.name, original,
      card.group_size == 128 ? "CPUs and NVIDIA GPUs of compute capability 8.0 and newer"
                             : "CPUs (GPUs want groups of 128)",
      card.base.license.empty() ? "not stated in the original's directory; the original's applies"
                                : card.base.license + ", the original's");
  out += fmt::format(
      "## Key features\n\n- 4-bit weights with groups of {}: {} instead of {}\n- no GPU-specific "
      "layout: one checkpoint for every machine, re-sharded when read\n- tokenizer, chat template "
      "and generation config are beside it\n- {}\n\n",
      card.group_size, human_bytes(card.checkpoint_bytes), human_bytes(card.base_bytes),
      list(card.report, "linears") != nullptr
          ? "what every linear lost is in `report.html`"
          : "rounded to nearest, without looking at activations");
  out += specifications(card);
  out +=
      "## Artifact layout\n\n```\n"
      "README.md, report.html\n"
      "tokenizer files, chat template, generation_config.json (as far as the original has them)\n"
      "trt-llm/checkpoints/config.json\n";
  for (int rank = 0; rank < card.tp_size; ++rank)
    out += fmt::format("trt-llm/checkpoints/rank{}.safetensors\n", rank);
  out += "```\n\n";
  out += details(card);
  out += "## Compatibility\n\n- nibble " NIBBLE_VERSION
         " and later: `nibble build . --out ENGINE`, then `nibble chat ENGINE` or `nibble serve "
         "ENGINE` (OpenAI-compatible)\n- ";
  out += card.lm_head == LmHeadFormat::kInt8
             ? "TensorRT-LLM refuses the int8 lm_head (an unknown key under `quantization`)"
             : "TensorRT-LLM's TensorRT path reads this layout: not tested with this checkpoint";
  out +=
      "\n- not a Hugging Face transformers checkpoint: AutoAWQ, vLLM and "
      "llama.cpp do not read it\n\n";
  out += fmt::format("### Engines built from it\n\n{}\n{}{}\n\n", kEnginesBegin, kNoEngines,
                     kEnginesEnd);
  out +=
      "## Portability notes\n\nThe checkpoint is the same for every machine. An engine is made for "
      "one kind of machine and one version of nibble, takes seconds to minutes to build and is "
      "refused elsewhere with the command that builds it again.\n\n";
  out += quality(card);
  out +=
      "## Troubleshooting\n\n- \"built for ...\": the engine is for another machine or version; "
      "run "
      "the `nibble build` command in the message\n- answers are odd but fluent: check that the "
      "chat "
      "template is the original's (`nibble render .`)\n- out of memory: a shorter "
      "`--max-input-len`, "
      "a smaller `--max-batch-size`, or `nibble inspect ENGINE` to see what needs it\n";
  return out;
}

std::string add_engine_to_card(const std::string& card, const fs::path& engine,
                               const EnginePlan& plan, uint64_t engine_bytes) {
  const std::string key = "| `" + engine.filename().string() + "` |";
  return with_row(
      card, kEnginesBegin, kEnginesEnd,
      "| engine | machine | nibble | KV cache | activations | sequences x (prompt + answer) "
      "tokens | size |\n|---|---|---|---|---|---|---|\n",
      key,
      fmt::format("{} {} | {} | {} | {} | {} x ({} + {}) | {} |\n", key, plan.target,
                  plan.nibble_version, kv_format_name(plan.kv_format),
                  activation_precision_name(plan.activation_precision), plan.limits.max_batch_size,
                  plan.limits.max_input_len, plan.limits.max_output_len,
                  human_bytes(engine_bytes)));
}

std::string add_speed_to_card(const std::string& card, const SpeedRow& row) {
  const std::string key = fmt::format("| `{}` | {} | {} x ({} + {}) |", row.engine, row.target,
                                      row.batch, row.prompt_tokens, row.output_tokens);
  return with_row(card, kSpeedBegin, kSpeedEnd,
                  "| engine | machine | sequences x (prompt + answer) tokens | prompt tokens/s | "
                  "answer tokens/s | weights read | the machine reads |\n"
                  "|---|---|---|---|---|---|---|\n",
                  key,
                  fmt::format("{} {:.1f} | {:.1f} | {:.1f} GB/s | {:.1f} GB/s |\n", key,
                              row.prefill_tokens_per_s, row.decode_tokens_per_s,
                              row.weight_gb_per_s, row.read_gb_per_s));
}

std::vector<fs::path> cards_of_engine(const fs::path& engine) {
  const fs::path absolute = fs::absolute(engine).lexically_normal();
  const fs::path directory = absolute.has_filename() ? absolute : absolute.parent_path();
  const fs::path engines = directory.parent_path();
  std::vector<fs::path> cards = {directory / "README.md"};
  if (engines.filename() == "engines" && engines.parent_path().filename() == "trt-llm")
    cards.push_back(engines.parent_path().parent_path() / "README.md");
  for (const fs::path& card : cards) {
    if (fs::is_regular_file(card) && read_file(card).find(kSpeedBegin) != std::string::npos)
      continue;
    fail(ErrorKind::kUsage,
         "{} is not a model card with a place for measured speed; `nibble quantize` and `nibble "
         "build` make it",
         card.string());
  }
  return cards;
}

void update_cards(const fs::path& checkpoint, const fs::path& engine, const EnginePlan& plan) {
  const fs::path root = tokenizer_directory(checkpoint);
  const fs::path card = root / "README.md";
  std::error_code ignored;
  if (!fs::is_regular_file(card, ignored)) return;
  const std::string before = read_file(card);
  const fs::path absolute = fs::absolute(engine).lexically_normal();
  const fs::path directory = absolute.has_filename() ? absolute : absolute.parent_path();
  const std::string after =
      add_engine_to_card(before, directory, plan, fs::file_size(engine / "rank0.engine"));
  if (after == before) return;
  write_file_atomically(engine / "README.md", after);
  const std::string inside =
      (fs::absolute(root).lexically_normal() / "trt-llm" / "engines" / "").string();
  if (directory.string().starts_with(inside)) write_file_atomically(card, after);
}

}  // namespace nibble
