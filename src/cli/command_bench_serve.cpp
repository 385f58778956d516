// bench serve: load for any OpenAI-compatible server, and what its clients would feel.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/file.h"
#include "cli/builtin_calibration.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "serve/load_generator.h"

namespace nibble::cli {
namespace {

/// The words of the shipped calibration texts, without their JSON.
std::string shipped_text() {
  const std::string_view lines = builtin_calibration();
  std::string text;
  for (size_t at = 0; at < lines.size();) {
    const size_t end = std::min(lines.find('\n', at), lines.size());
    const json::value row = parse_json(lines.substr(at, end - at), "calibration line");
    at = end + 1;
    const json::object& object = row.get_object();
    if (const auto* plain = object.if_contains("text"))
      text += std::string(plain->as_string()) + "\n";
    if (const auto* messages = object.if_contains("messages")) {
      for (const auto& message : messages->as_array()) {
        const auto* content = message.as_object().if_contains("content");
        if (content != nullptr && content->is_string()) {
          text += std::string(content->get_string()) + "\n";
        }
      }
    }
  }
  return text;
}

void print_row(const char* name, const Percentiles& p) {
  fmt::print("{:<6}{:>11.2f}{:>11.2f}{:>11.2f}{:>11.2f}{:>11.2f}{:>11.2f}\n", name, p.mean, p.p50,
             p.p90, p.p95, p.p99, p.max);
}

}  // namespace

int run_bench_serve(const BenchServeFlags& flags) {
  LoadTestOptions options;
  options.url = flags.url;
  options.model = flags.model;
  if (!flags.api_key_file.empty()) {
    const std::string keys = read_file(flags.api_key_file);
    options.api_key = keys.substr(0, keys.find_first_of("\r\n"));
  }
  options.random_ids = flags.prompts == "random-ids";
  options.vocab_size = flags.vocab_size;
  if (!options.random_ids) {
    options.text = flags.text.empty() ? shipped_text() : read_file(flags.text);
  }
  if (!flags.extra_body.empty()) {
    const json::value extra = parse_json(flags.extra_body, "--extra-body");
    if (!extra.is_object()) {
      fail(ErrorKind::kUsage, "--extra-body is {}, but must be a JSON object such as {}",
           flags.extra_body, R"({"repetition_penalty": 1.1})");
    }
    options.extra_body = extra.get_object();
  }
  options.num_sessions = flags.sessions;
  options.turns = flags.turns;
  options.think_s = flags.think_s;
  options.shared_prefix = flags.shared_prefix;
  options.num_prefixes = flags.prefixes;
  options.warm_prefixes = flags.warm;
  options.input_min = flags.input_len;
  options.input_max = flags.input_len_max > 0 ? flags.input_len_max : flags.input_len;
  options.output_min = flags.output_len;
  options.output_max = flags.output_len_max > 0 ? flags.output_len_max : flags.output_len;
  options.concurrency = flags.concurrency;
  options.rate = flags.rate;
  options.timeout_s = flags.timeout_s;
  options.seed = flags.seed;
  options.slo_ttft_ms = flags.slo_ttft_ms;
  options.slo_tpot_ms = flags.slo_tpot_ms;
  options.slo_e2e_ms = flags.slo_e2e_ms;

  TerminalProgress progress;
  const LoadTestReport report = run_load_test(options, progress);
  if (flags.json) {
    fmt::print("{}\n", dump_json(report.to_json()));
  } else {
    const double seconds = std::max(report.seconds, 1e-9);
    fmt::print("{} requests in {:.2f} s, {} failed, at most {} at a time\n", report.completed,
               report.seconds, report.failed, report.peak_concurrency);
    fmt::print(
        "{:.2f} requests/s, {:.1f} output tokens/s, {:.1f} tokens/s in all; {} of {} prompt "
        "tokens cached\n",
        report.completed / seconds, static_cast<double>(report.output_tokens) / seconds,
        static_cast<double>(report.input_tokens + report.output_tokens) / seconds,
        report.cached_tokens, report.input_tokens);
    if (report.arrivals_per_s > 0) {
      fmt::print("{:.2f} sessions/s arrived\n", report.arrivals_per_s);
    }
    if (flags.slo_ttft_ms > 0 || flags.slo_tpot_ms > 0 || flags.slo_e2e_ms > 0) {
      fmt::print("goodput {:.2f} requests/s ({} of {} met the bounds)\n", report.good / seconds,
                 report.good, report.completed);
    }
    fmt::print("{:<6}{:>11}{:>11}{:>11}{:>11}{:>11}{:>11}\n", "ms", "mean", "p50", "p90", "p95",
               "p99", "max");
    print_row("TTFT", report.ttft_ms);
    print_row("TPOT", report.tpot_ms);
    print_row("ITL", report.itl_ms);
    print_row("E2E", report.e2e_ms);
    for (const auto& [message, count] : report.errors) fmt::print("{} x {}\n", count, message);
  }
  return report.failed == 0 && report.completed > 0 ? 0 : 1;
}

}  // namespace nibble::cli
