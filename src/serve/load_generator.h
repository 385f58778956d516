// `bench serve`: sends chats or prompts to any OpenAI-compatible server and measures what its
// clients would feel. Figures are defined as in vLLM's benchmark:
//   TTFT  send to the first piece of text        E2E   send to the last piece
//   TPOT  (E2E - TTFT) / (tokens - 1), per request
//   ITL   gaps between pieces, of all requests together
// One thread, libcurl's multi interface. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/progress.h"

namespace nibble {

struct LoadTestOptions {
  std::string url;    // "http://127.0.0.1:8000/v1"
  std::string model;  // empty: the first the server lists
  std::string api_key;
  bool random_ids = false;  // /v1/completions with random token ids instead of chats
  int vocab_size = 32000;   // ids are drawn from [100, vocab_size)
  std::string text;         // chats: words are taken from here in order
  int num_sessions = 100;
  int turns = 1;          // requests of a session; each holds the ones before and their answers
  double think_s = 0;     // between an answer and the session's next turn
  int shared_prefix = 0;  // words (ids) that begin every session: one system prompt for all
  // That many different prefixes of this length, which sessions begin with in turn: conversations
  // that so many clients have had.
  int num_prefixes = 1;
  bool warm_prefixes = false;            // every prefix is sent once, before what is measured
  int input_min = 128, input_max = 128;  // words (ids) of a turn's new text, drawn uniformly
  int output_min = 64, output_max = 64;  // tokens of an answer (ignore_eos is sent)
  int concurrency = 0;                   // sessions at a time; 0: no bound
  json::object extra_body;               // goes into every request, over what is there
  double rate = 0;         // sessions begun a second, Poisson arrivals; 0: as soon as possible
  double timeout_s = 600;  // of a request
  uint64_t seed = 1;
  // A request is good when it meets every bound that is set; 0: none.
  double slo_ttft_ms = 0, slo_tpot_ms = 0, slo_e2e_ms = 0;
};

struct Percentiles {
  double mean = 0, p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;
  /// Linear interpolation between ranks, as numpy does. All zero for no values.
  static Percentiles of(std::vector<double> values);
  json::object to_json() const;
};

struct LoadTestReport {
  int completed = 0, failed = 0, good = 0;
  double seconds = 0;  // first send to last piece
  // Sessions begun a second, from the first to the last: what `rate` came to in this draw. 0
  // without a rate. Requests a second by `seconds` are fewer, for the last ones take their time.
  double arrivals_per_s = 0;
  int64_t input_tokens = 0, cached_tokens = 0, output_tokens = 0;
  int peak_concurrency = 0;
  Percentiles ttft_ms, tpot_ms, itl_ms, e2e_ms;
  std::vector<std::pair<std::string, int>> errors;  // message, how often; the most frequent first

  json::object to_json() const;
};

/// Runs to the end (or until interrupted, then reports what there is). Throws Error{kIo} when the
/// server cannot be reached at all, Error{kUsage} for options that do not go together.
LoadTestReport run_load_test(const LoadTestOptions& options, Progress& progress);

/// Incremental parser of an event stream's "data: " payloads.
class EventParser {
 public:
  /// Appends bytes as they come; `on_data` hears each complete payload.
  template <class OnData>
  void feed(std::string_view bytes, OnData on_data) {
    pending_ += bytes;
    size_t at = 0;
    for (size_t end; (end = pending_.find('\n', at)) != std::string::npos; at = end + 1) {
      std::string_view line(pending_.data() + at, end - at);
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (!line.starts_with("data:")) continue;
      line.remove_prefix(5);
      if (line.starts_with(' ')) line.remove_prefix(1);
      on_data(line);
    }
    pending_.erase(0, at);
  }

 private:
  std::string pending_;
};

}  // namespace nibble
