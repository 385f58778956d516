// SPDX-License-Identifier: Apache-2.0
#include "serve/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

namespace nibble {
namespace {

// vLLM's buckets, and 1 to 8 ms ones below the inter-token times: a 4-bit model answers faster than
// its first bucket of 10 ms.
constexpr double kFirstToken[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                  1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
constexpr double kInterToken[] = {.001, .002, .003, .004, .005, .006, .008, .01, .025,
                                  .05,  .075, .1,   .15,  .2,   .3,   .4,   .5,  .75,
                                  1,    2.5,  5,    7.5,  10,   20,   40,   80};
constexpr double kLatency[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                               30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
constexpr double kTokens[] = {1,    2,    5,    10,    20,    50,    100,    200,   500,
                              1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
constexpr double kChoices[] = {1, 2, 5, 10, 20};

void escape_label(std::string& out, std::string_view value) {
  for (const char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
}

class Page {
 public:
  explicit Page(std::string labels) : labels_(std::move(labels)) {}

  void family(std::string_view name, std::string_view type, std::string_view help) {
    fmt::format_to(std::back_inserter(text), "# HELP {} {}\n# TYPE {} {}\n", name, help, name,
                   type);
  }
  template <class Number>
  void sample(std::string_view name, Number value, std::string_view more = {}) {
    fmt::format_to(std::back_inserter(text), "{}{{{}{}{}}} {}\n", name, labels_,
                   more.empty() ? "" : ",", more, value);
  }
  template <class Number>
  void single(std::string_view name, std::string_view type, std::string_view help, Number value) {
    family(name, type, help);
    sample(name, value);
  }
  void histogram(std::string_view name, std::string_view help, const Histogram& histogram) {
    family(name, "histogram", help);
    histogram.append(text, name, labels_);
  }

  std::string text;

 private:
  std::string labels_;
};

/// A histogram that the engine counts.
void append_step_sizes(Page& page, const EngineStats& stats) {
  constexpr std::string_view kName = "vllm:iteration_tokens_total";
  uint64_t total = 0;
  for (size_t i = 0; i < stats.steps_by_size.size(); ++i) {
    total += stats.steps_by_size[i];
    const std::string bound =
        i < EngineStats::kStepSizes.size() ? fmt::format("{}", EngineStats::kStepSizes[i]) : "+Inf";
    page.sample(fmt::format("{}_bucket", kName), total, fmt::format("le=\"{}\"", bound));
  }
  page.sample(fmt::format("{}_sum", kName), stats.step_tokens);
  page.sample(fmt::format("{}_count", kName), total);
}

}  // namespace

void Histogram::observe(double value) {
  const auto at = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  ++counts_[static_cast<size_t>(at)];
  sum_ += value;
}

void Histogram::append(std::string& out, std::string_view name, std::string_view labels) const {
  uint64_t total = 0;
  for (size_t i = 0; i < counts_.size(); ++i) {
    total += counts_[i];
    const std::string bound = i < bounds_.size() ? fmt::format("{}", bounds_[i]) : "+Inf";
    fmt::format_to(std::back_inserter(out), "{}_bucket{{{},le=\"{}\"}} {}\n", name, labels, bound,
                   total);
  }
  fmt::format_to(std::back_inserter(out), "{}_sum{{{}}} {}\n{}_count{{{}}} {}\n", name, labels,
                 sum_, name, labels, total);
}

Metrics::Metrics()
    : first_token_(kFirstToken),
      inter_token_(kInterToken),
      per_output_token_(kInterToken),
      e2e_(kLatency),
      queue_(kLatency),
      inference_(kLatency),
      prefill_(kLatency),
      decode_(kLatency),
      prompt_tokens_(kTokens),
      generation_tokens_(kTokens),
      longest_choice_(kTokens),
      computed_tokens_(kTokens),
      max_tokens_(kTokens),
      n_(kChoices) {
  // Known series exist from the start, so that rates over them are right from the first event.
  for (const char* reason : {"stop", "length", "tool_calls", "abort", "error"})
    finished_[reason] = 0;
  for (const char* why : {"queue_full", "draining", "loading", "failed"}) rejected_[why] = 0;
}

void Metrics::observe_first_token(double seconds) { first_token_.observe(seconds); }
void Metrics::observe_next_token(double seconds) { inter_token_.observe(seconds); }

void Metrics::observe_request(const RequestTimes& times) {
  prompt_tokens_.observe(static_cast<double>(times.prompt_tokens));
  generation_tokens_.observe(static_cast<double>(times.completion_tokens));
  longest_choice_.observe(static_cast<double>(times.longest_choice));
  computed_tokens_.observe(static_cast<double>(times.prompt_tokens - times.cached_tokens));
  n_.observe(times.n);
  if (times.max_tokens > 0) max_tokens_.observe(static_cast<double>(times.max_tokens));
  cached_tokens_ += static_cast<uint64_t>(times.cached_tokens);
  e2e_.observe(times.e2e_s);
  queue_.observe(times.queue_s);
  if (!times.has_started) return;
  prefill_.observe(times.prefill_s);
  decode_.observe(times.decode_s);
  inference_.observe(times.prefill_s + times.decode_s);
  const double later = static_cast<double>(times.completion_tokens) / times.n - 1;
  if (later >= 1) per_output_token_.observe(times.decode_s / later);
}

void Metrics::count_finish(std::string_view reason) { ++finished_[std::string(reason)]; }
void Metrics::count_reply(int status) { ++replies_[status]; }
void Metrics::count_rejected(std::string_view why) { ++rejected_[std::string(why)]; }
void Metrics::count_disconnect() { ++disconnects_; }

std::string Metrics::render(const Context& context) const {
  std::string labels = "model_name=\"";
  escape_label(labels, context.model_name);
  labels += "\",engine=\"0\"";
  Page page(labels);
  const EngineStats stats = context.engine ? *context.engine : EngineStats{};
  const double used = stats.kv_blocks_total > 0
                          ? static_cast<double>(stats.kv_blocks_used) / stats.kv_blocks_total
                          : 0;

  page.single("vllm:num_requests_running", "gauge", "Sequences holding KV blocks.",
              stats.num_running);
  page.single("vllm:num_requests_waiting", "gauge", "Sequences waiting for a place.",
              stats.num_waiting);
  page.family("vllm:num_requests_waiting_by_reason", "gauge", "The same, by what they wait for.");
  page.sample("vllm:num_requests_waiting_by_reason", stats.num_waiting, "reason=\"capacity\"");
  page.single("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks held by sequences, 0 to 1.",
              used);
  page.single("vllm:gpu_cache_usage_perc", "gauge", "Older name of vllm:kv_cache_usage_perc.",
              used);
  page.family("vllm:cache_config_info", "gauge", "How the KV cache is laid out.");
  page.sample("vllm:cache_config_info", 1,
              fmt::format("block_size=\"{}\",num_gpu_blocks=\"{}\",cache_dtype=\"{}\"",
                          context.kv_block_tokens, stats.kv_blocks_total, context.cache_dtype));
  for (const char* prefix : {"vllm:prefix_cache", "vllm:gpu_prefix_cache"}) {
    page.single(fmt::format("{}_queries_total", prefix), "counter",
                "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens);
    page.single(fmt::format("{}_hits_total", prefix), "counter",
                "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens);
  }
  page.single("vllm:gpu_prefix_cache_hit_rate", "gauge", "Hits per query since the start.",
              stats.prefix_query_tokens > 0 ? static_cast<double>(stats.prefix_hit_tokens) /
                                                  static_cast<double>(stats.prefix_query_tokens)
                                            : 0.0);
  page.single("vllm:num_preemptions_total", "counter", "Sequences that lost their blocks.",
              stats.preemptions);
  page.single("vllm:prompt_tokens_total", "counter", "Prompt tokens of started sequences.",
              stats.prompt_tokens);
  page.single("vllm:prompt_tokens_cached_total", "counter",
              "Prompt tokens of finished requests that were not computed again.", cached_tokens_);
  page.family("vllm:prompt_tokens_by_source_total", "counter",
              "The same, by where they came from.");
  page.sample("vllm:prompt_tokens_by_source_total", stats.prompt_tokens - stats.prefix_hit_tokens,
              "source=\"local_compute\"");
  page.sample("vllm:prompt_tokens_by_source_total", stats.prefix_hit_tokens,
              "source=\"local_cache_hit\"");
  page.single("vllm:generation_tokens_total", "counter", "Tokens generated.",
              stats.generated_tokens);
  page.family("vllm:request_success_total", "counter", "Choices that ended, by reason.");
  for (const auto& [reason, count] : finished_) {
    page.sample("vllm:request_success_total", count, "finished_reason=\"" + reason + "\"");
  }

  page.histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", first_token_);
  page.histogram("vllm:inter_token_latency_seconds", "Between two tokens of a choice.",
                 inter_token_);
  page.histogram("vllm:request_time_per_output_token_seconds",
                 "Mean time of a request's tokens after the first.", per_output_token_);
  page.histogram("vllm:time_per_output_token_seconds",
                 "Older name of vllm:inter_token_latency_seconds.", inter_token_);
  page.histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", e2e_);
  page.histogram("vllm:request_queue_time_seconds", "Submitted to first step.", queue_);
  page.histogram("vllm:request_inference_time_seconds", "First step to last token.", inference_);
  page.histogram("vllm:request_prefill_time_seconds", "First step to first token.", prefill_);
  page.histogram("vllm:request_decode_time_seconds", "First token to last token.", decode_);
  page.histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", prompt_tokens_);
  page.histogram("vllm:request_generation_tokens", "Tokens generated for a request.",
                 generation_tokens_);
  page.histogram("vllm:request_max_num_generation_tokens", "Of a request's longest choice.",
                 longest_choice_);
  page.histogram("vllm:request_prefill_kv_computed_tokens",
                 "Prompt tokens of a request that were not in the cache.", computed_tokens_);
  page.family("vllm:iteration_tokens_total", "histogram", "Rows of an engine step.");
  append_step_sizes(page, stats);
  page.histogram("vllm:request_params_max_tokens", "max_tokens asked for.", max_tokens_);
  page.histogram("vllm:request_params_n", "Choices asked for.", n_);

  page.single("nibble:kv_blocks_total", "gauge", "KV blocks.", stats.kv_blocks_total);
  page.single("nibble:kv_blocks_used", "gauge", "KV blocks held by sequences.",
              stats.kv_blocks_used);
  page.single("nibble:kv_blocks_cached", "gauge", "KV blocks kept for reuse, held by nobody.",
              stats.kv_blocks_cached);
  page.single("nibble:num_requests_queued", "gauge", "Requests that count against --max-queue.",
              stats.num_queued);
  page.single("nibble:steps_total", "counter", "Engine steps.", stats.steps);
  page.single("nibble:step_tokens_total", "counter", "Rows computed in engine steps.",
              stats.step_tokens);
  page.single("nibble:step_seconds_total", "counter", "Time in engine steps.",
              static_cast<double>(stats.step_us) * 1e-6);
  page.single("nibble:forward_seconds_total", "counter", "Time in the model inside the steps.",
              static_cast<double>(stats.forward_us) * 1e-6);
  page.single("nibble:replies_in_flight", "gauge", "Generations whose client still waits.",
              context.streams);
  page.single("nibble:client_disconnects_total", "counter",
              "Generations cancelled because their client left or read too slowly.", disconnects_);
  page.family("nibble:requests_rejected_total", "counter", "Requests refused unread, by reason.");
  for (const auto& [why, count] : rejected_) {
    page.sample("nibble:requests_rejected_total", count, "reason=\"" + why + "\"");
  }
  page.family("nibble:http_replies_total", "counter", "Replies by status.");
  for (const auto& [status, count] : replies_) {
    page.sample("nibble:http_replies_total", count, fmt::format("code=\"{}\"", status));
  }
  const HttpStats& http = context.http;
  page.single("nibble:http_connections", "gauge", "Connections open.", http.connections);
  page.single("nibble:http_connections_total", "counter", "Connections accepted.", http.accepted);
  page.single("nibble:http_connections_refused_total", "counter",
              "Connections over --max-connections.", http.refused);
  page.single("nibble:http_bad_requests_total", "counter",
              "Requests that were not HTTP or over a limit.", http.bad_requests);
  page.single("nibble:http_timeouts_total", "counter",
              "Connections closed while waiting for a request.", http.timeouts);
  page.single("nibble:http_slow_readers_cut_total", "counter",
              "Connections cut because their reader was too slow.", http.slow_readers_cut);
  return page.text;
}

}  // namespace nibble
