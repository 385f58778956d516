// The server's own counters and histograms, and /metrics in Prometheus' text format under vLLM's
// names, so that existing dashboards and routers read them. Owned by the I/O thread.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nibble/engine.h"
#include "serve/http.h"

namespace nibble {

class Histogram {
 public:
  explicit Histogram(std::span<const double> upper_bounds)  // ascending, lives forever
      : bounds_(upper_bounds), counts_(upper_bounds.size() + 1) {}
  void observe(double value);
  /// Appends NAME_bucket{...}, NAME_sum and NAME_count lines.
  void append(std::string& out, std::string_view name, std::string_view labels) const;

 private:
  std::span<const double> bounds_;
  std::vector<uint64_t> counts_;  // per bucket, not cumulative; the last is above every bound
  double sum_ = 0;
};

/// A finished or abandoned engine request, as the client saw it. Times in seconds.
struct RequestTimes {
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  int64_t longest_choice = 0;  // tokens
  int n = 1;
  int64_t max_tokens = 0;  // 0: the client set none
  double queue_s = 0, prefill_s = 0, decode_s = 0, e2e_s = 0;
  bool has_started = false;  // a first token came
};

class Metrics {
 public:
  Metrics();

  void observe_first_token(double seconds);
  void observe_next_token(double seconds);  // gap between two tokens of a choice
  void observe_request(const RequestTimes& times);
  void count_finish(std::string_view reason);  // of a choice: "stop", "length", "tool_calls", ...
  void count_reply(int status);
  void count_rejected(std::string_view why);  // "queue_full", "draining", "failed", ...
  void count_disconnect();

  struct Context {
    std::string model_name;
    const EngineStats* engine = nullptr;  // null while loading
    int kv_block_tokens = 0;
    std::string cache_dtype;
    HttpStats http;
    int streams = 0;  // generations in flight
  };
  std::string render(const Context& context) const;

 private:
  Histogram first_token_, inter_token_, per_output_token_, e2e_, queue_, inference_, prefill_,
      decode_;
  Histogram prompt_tokens_, generation_tokens_, longest_choice_, computed_tokens_, max_tokens_, n_;
  uint64_t cached_tokens_ = 0;
  uint64_t disconnects_ = 0;
  std::map<std::string, uint64_t, std::less<>> finished_, rejected_;
  std::map<int, uint64_t> replies_;
};

}  // namespace nibble
