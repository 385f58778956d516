// SPDX-License-Identifier: Apache-2.0
#include "serve/load_generator.h"

#include <curl/curl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <utility>

#include "base/error.h"
#include "base/interrupt.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

struct CurlEasy {
  CurlEasy() : handle(curl_easy_init()) { NIBBLE_CHECK(handle != nullptr); }
  CurlEasy(const CurlEasy&) = delete;
  CurlEasy& operator=(const CurlEasy&) = delete;
  ~CurlEasy() {
    curl_slist_free_all(headers);
    curl_easy_cleanup(handle);
  }
  CURL* handle;
  curl_slist* headers = nullptr;
};

struct CurlMulti {
  CurlMulti() : handle(curl_multi_init()) { NIBBLE_CHECK(handle != nullptr); }
  CurlMulti(const CurlMulti&) = delete;
  CurlMulti& operator=(const CurlMulti&) = delete;
  ~CurlMulti() { curl_multi_cleanup(handle); }
  operator CURLM*() const { return handle; }
  CURLM* handle;
};

size_t append_to_string(char* data, size_t size, size_t count, void* out) {
  static_cast<std::string*>(out)->append(data, size * count);
  return size * count;
}

std::vector<std::string_view> split_words(std::string_view text) {
  std::vector<std::string_view> words;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = text.find_first_not_of(" \t\r\n", at);
    if (begin == text.npos) break;
    const size_t end = std::min(text.find_first_of(" \t\r\n", begin), text.size());
    words.push_back(text.substr(begin, end - begin));
    at = end;
  }
  return words;
}

/// One conversation, or one growing prompt of ids.
struct Session {
  bool is_measured = true;
  int turn = 0;
  size_t next_word = 0;
  json::array messages;
  json::array ids;
  Clock::time_point due;
};

struct Running {
  CurlEasy curl;
  Session* session = nullptr;
  std::string body, answer, error_body;
  EventParser parser;
  Clock::time_point sent;
  std::optional<Clock::time_point> first, last;
  std::vector<double> gaps_ms;
  int64_t chunks = 0;
  std::optional<int64_t> prompt_tokens, completion_tokens, cached_tokens;
  std::string failure;
  bool done = false;
};

class LoadGenerator {
 public:
  LoadGenerator(const LoadTestOptions& options, Progress& progress)
      : options_(options),
        progress_(progress),
        words_(split_words(options.text)),
        random_(options.seed) {
    check();
    while (options_.url.ends_with('/')) options_.url.pop_back();
    if (options_.model.empty()) options_.model = first_model();
    curl_multi_setopt(multi_, CURLMOPT_MAXCONNECTS, 10'000L);
  }
  LoadGenerator(const LoadGenerator&) = delete;
  LoadGenerator& operator=(const LoadGenerator&) = delete;
  ~LoadGenerator() {
    for (const auto& running : running_) curl_multi_remove_handle(multi_, running->curl.handle);
    running_.clear();
  }

  LoadTestReport run() {
    if (options_.warm_prefixes) warm();
    plan_arrivals();
    progress_.begin("requests", int64_t{options_.num_sessions} * options_.turns, "requests");
    const double arriving_s = ms_between(Clock::time_point{}, sessions_.back().due) * 1e-3;
    if (options_.rate > 0 && arriving_s > 0) {
      report_.arrivals_per_s = static_cast<double>(sessions_.size() - 1) / arriving_s;
    }
    start_ = last_piece_ = Clock::now();
    for (auto& session : sessions_) session.due = start_ + (session.due - Clock::time_point{});
    send_all();
    progress_.end();
    return report();
  }

 private:
  /// Until everything that waits has been sent and answered.
  void send_all() {
    while (!interrupt_requested()) {
      start_due();
      if (running_.empty() && waiting_.empty()) break;
      int still = 0;
      curl_multi_perform(multi_, &still);
      reap();
      curl_multi_poll(multi_, nullptr, 0, poll_ms(), nullptr);
    }
  }

  /// Sends every prefix once, for one token. Nothing of it is measured.
  void warm() {
    warming_.resize(static_cast<size_t>(options_.num_prefixes));
    for (size_t i = 0; i < warming_.size(); ++i) {
      warming_[i].is_measured = false;
      begin_session(warming_[i], i);
      waiting_.push_back(&warming_[i]);
    }
    send_all();
    peak_ = 0;
  }

  void check() const {
    const auto range = [](const char* name, int low, int high) {
      if (low < 1 || high < low) {
        fail(ErrorKind::kUsage, "{} runs from {} to {}, but needs 1 <= from <= to", name, low,
             high);
      }
    };
    range("input length", options_.input_min, options_.input_max);
    range("output length", options_.output_min, options_.output_max);
    if (options_.num_prefixes < 1) {
      fail(ErrorKind::kUsage, "--prefixes is {}, but must be at least 1", options_.num_prefixes);
    }
    if (options_.shared_prefix == 0 && (options_.num_prefixes > 1 || options_.warm_prefixes)) {
      fail(ErrorKind::kUsage, "--prefixes and --warm need --shared-prefix, the prefixes' length");
    }
    if (!options_.random_ids && words_.size() < 2) {
      fail(ErrorKind::kUsage, "the text for prompts has {} words; give one with more",
           words_.size());
    }
    if (options_.random_ids && options_.vocab_size <= 100) {
      fail(ErrorKind::kUsage, "--vocab-size is {}, but random ids are drawn from 100 up",
           options_.vocab_size);
    }
  }

  void set_common(CurlEasy& curl, const std::string& url) const {
    curl_easy_setopt(curl.handle, CURLOPT_URL, url.c_str());
    curl_easy_setopt(curl.handle, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl.handle, CURLOPT_TCP_NODELAY, 1L);
    curl_easy_setopt(curl.handle, CURLOPT_SSL_VERIFYPEER, 1L);
    curl_easy_setopt(curl.handle, CURLOPT_TIMEOUT_MS, static_cast<long>(options_.timeout_s * 1e3));
    if (!options_.api_key.empty()) {
      curl.headers =
          curl_slist_append(curl.headers, ("Authorization: Bearer " + options_.api_key).c_str());
    }
  }

  std::string first_model() const {
    CurlEasy curl;
    const std::string url = options_.url + "/models";
    set_common(curl, url);
    std::string body;
    curl_easy_setopt(curl.handle, CURLOPT_HTTPHEADER, curl.headers);
    curl_easy_setopt(curl.handle, CURLOPT_WRITEFUNCTION, append_to_string);
    curl_easy_setopt(curl.handle, CURLOPT_WRITEDATA, &body);
    const CURLcode code = curl_easy_perform(curl.handle);
    if (code != CURLE_OK) fail(ErrorKind::kIo, "{}: {}", url, curl_easy_strerror(code));
    long status = 0;
    curl_easy_getinfo(curl.handle, CURLINFO_RESPONSE_CODE, &status);
    if (status != 200) fail(ErrorKind::kIo, "{} answered {}: {}", url, status, body.substr(0, 300));
    const json::value value = parse_json(body, url);
    const auto* object = value.if_object();
    const auto* data = object ? object->if_contains("data") : nullptr;
    if (data == nullptr || !data->is_array() || data->get_array().empty() ||
        !data->get_array()[0].is_object() || !data->get_array()[0].get_object().contains("id") ||
        !data->get_array()[0].get_object().at("id").is_string()) {
      fail(ErrorKind::kIo, "{} lists no model; name one with --model", url);
    }
    return std::string(data->get_array()[0].get_object().at("id").get_string());
  }

  /// Session starts, as durations since the beginning.
  void plan_arrivals() {
    sessions_.resize(static_cast<size_t>(options_.num_sessions));
    std::exponential_distribution<double> gap(options_.rate > 0 ? options_.rate : 1);
    double at = 0;
    size_t word = 0, index = 0;
    for (Session& session : sessions_) {
      session.due = Clock::time_point{} +
                    std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(at));
      if (options_.rate > 0) at += gap(random_);
      // Sessions begin at different places of the text, so that only the prefix is shared.
      session.next_word = word;
      word += 7919;
      begin_session(session, index++);
      waiting_.push_back(&session);
    }
  }

  void begin_session(Session& session, size_t index) {
    if (options_.shared_prefix == 0) return;
    const size_t prefix = index % static_cast<size_t>(options_.num_prefixes);
    if (options_.random_ids) {
      std::mt19937_64 same((options_.seed ^ 0x5eed) + (uint64_t{prefix} << 32));
      for (int i = 0; i < options_.shared_prefix; ++i) session.ids.push_back(random_id(same));
      return;
    }
    size_t from = prefix * 104729;
    session.messages.push_back(
        json::object{{"role", "system"}, {"content", take_words(from, options_.shared_prefix)}});
  }

  json::string take_words(size_t& from, int count) const {
    std::string out;
    for (int i = 0; i < count; ++i) {
      if (i > 0) out += ' ';
      out += words_[from++ % words_.size()];
    }
    return json::string(out);
  }

  template <class Random>
  int random_id(Random& random) const {
    return std::uniform_int_distribution<int>(100, options_.vocab_size - 1)(random);
  }

  int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  void start_due() {
    const Clock::time_point now = Clock::now();
    // In order of time; a session that goes on keeps its place among the concurrent ones.
    while (!waiting_.empty()) {
      const auto next = std::min_element(waiting_.begin(), waiting_.end(), [](auto* a, auto* b) {
        return std::pair(a->turn == 0, a->due) < std::pair(b->turn == 0, b->due);
      });
      if ((*next)->due > now) {
        // Later turns come first in this order; a new session may still be due.
        const auto fresh = std::find_if(waiting_.begin(), waiting_.end(), [&](const Session* s) {
          return s->turn == 0 && s->due <= now;
        });
        if (fresh == waiting_.end() || !has_room()) return;
        Session* session = *fresh;
        waiting_.erase(fresh);
        send(*session);
        continue;
      }
      if ((*next)->turn == 0 && !has_room()) return;
      Session* session = *next;
      waiting_.erase(next);
      send(*session);
    }
  }

  bool has_room() const {
    const int bound = options_.concurrency > 0 ? options_.concurrency
                      : sessions_.empty()      ? kMaxWarming
                                               : 0;
    return bound == 0 || num_open_sessions_ < bound;
  }

  int poll_ms() const {
    double wait = 100;
    const Clock::time_point now = Clock::now();
    for (const Session* session : waiting_) {
      if (session->due > now) wait = std::min(wait, ms_between(now, session->due));
    }
    return static_cast<int>(std::ceil(wait));
  }

  void send(Session& session) {
    if (session.turn == 0) ++num_open_sessions_;
    auto running = std::make_unique<Running>();
    running->session = &session;
    const bool measured = session.is_measured;
    const int input = measured ? draw(options_.input_min, options_.input_max) : 1;
    const int output = measured ? draw(options_.output_min, options_.output_max) : 1;
    json::object body{
        {"model", options_.model}, {"max_tokens", output},
        {"stream", true},          {"stream_options", json::object{{"include_usage", true}}},
        {"ignore_eos", true},      {"temperature", 0}};
    if (options_.random_ids) {
      for (int i = 0; i < input; ++i) session.ids.push_back(random_id(random_));
      body["prompt"] = session.ids;
    } else {
      session.messages.push_back(
          json::object{{"role", "user"}, {"content", take_words(session.next_word, input)}});
      body["messages"] = session.messages;
    }
    for (const auto& [key, value] : options_.extra_body) body[key] = value;
    running->body = dump_json(body);
    CurlEasy& curl = running->curl;
    set_common(curl, options_.url + (options_.random_ids ? "/completions" : "/chat/completions"));
    curl.headers = curl_slist_append(curl.headers, "Content-Type: application/json");
    curl.headers = curl_slist_append(curl.headers, "Expect:");
    curl_easy_setopt(curl.handle, CURLOPT_HTTPHEADER, curl.headers);
    curl_easy_setopt(curl.handle, CURLOPT_POSTFIELDS, running->body.data());
    curl_easy_setopt(curl.handle, CURLOPT_POSTFIELDSIZE_LARGE,
                     static_cast<curl_off_t>(running->body.size()));
    curl_easy_setopt(curl.handle, CURLOPT_WRITEFUNCTION, &LoadGenerator::on_bytes);
    curl_easy_setopt(curl.handle, CURLOPT_WRITEDATA, running.get());
    curl_easy_setopt(curl.handle, CURLOPT_PRIVATE, running.get());
    running->sent = Clock::now();
    curl_multi_add_handle(multi_, curl.handle);
    running_.push_back(std::move(running));
    peak_ = std::max(peak_, static_cast<int>(running_.size()));
  }

  static size_t on_bytes(char* data, size_t size, size_t count, void* target) {
    auto& running = *static_cast<Running*>(target);
    const std::string_view bytes(data, size * count);
    long status = 0;
    curl_easy_getinfo(running.curl.handle, CURLINFO_RESPONSE_CODE, &status);
    if (status != 200) {
      if (running.error_body.size() < 2000) running.error_body += bytes;
      return bytes.size();
    }
    try {
      running.parser.feed(bytes, [&](std::string_view payload) { on_payload(running, payload); });
    } catch (const std::exception& error) {
      running.failure = error.what();
      return 0;  // ends the transfer
    }
    return bytes.size();
  }

  static void on_payload(Running& running, std::string_view payload) {
    if (payload == "[DONE]") {
      running.done = true;
      return;
    }
    const json::value value = parse_json(payload, "event");
    const json::object& event = value.as_object();
    if (const auto* error = event.if_contains("error")) {
      fail(ErrorKind::kIo, "{}", dump_json(*error));
    }
    if (const auto* usage = event.if_contains("usage"); usage != nullptr && usage->is_object()) {
      const auto& object = usage->get_object();
      running.prompt_tokens = object.at("prompt_tokens").to_number<int64_t>();
      running.completion_tokens = object.at("completion_tokens").to_number<int64_t>();
      const auto* details = object.if_contains("prompt_tokens_details");
      if (details != nullptr && details->is_object() &&
          details->get_object().contains("cached_tokens")) {
        running.cached_tokens = details->get_object().at("cached_tokens").to_number<int64_t>();
      }
    }
    const auto* choices = event.if_contains("choices");
    if (choices == nullptr || choices->as_array().empty()) return;
    const json::object& choice = choices->as_array()[0].as_object();
    const auto* delta = choice.if_contains("delta");
    const auto* text =
        delta != nullptr ? delta->as_object().if_contains("content") : choice.if_contains("text");
    if (text == nullptr || !text->is_string() || text->get_string().empty()) return;
    const Clock::time_point now = Clock::now();
    if (!running.first) {
      running.first = now;
    } else {
      running.gaps_ms.push_back(ms_between(*running.last, now));
    }
    running.last = now;
    ++running.chunks;
    running.answer += std::string_view(text->get_string());
  }

  void reap() {
    int left = 0;
    while (CURLMsg* message = curl_multi_info_read(multi_, &left)) {
      if (message->msg != CURLMSG_DONE) continue;
      const CURLcode code = message->data.result;
      char* target = nullptr;
      curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &target);
      auto* running = reinterpret_cast<Running*>(target);
      curl_multi_remove_handle(multi_, running->curl.handle);
      finish(*running, code);
      std::erase_if(running_, [&](const auto& each) { return each.get() == running; });
    }
  }

  void finish(Running& running, CURLcode code) {
    Session& session = *running.session;
    long status = 0;
    curl_easy_getinfo(running.curl.handle, CURLINFO_RESPONSE_CODE, &status);
    if (running.failure.empty() && code != CURLE_OK) running.failure = curl_easy_strerror(code);
    if (running.failure.empty() && status != 200) {
      running.failure = fmt::format("HTTP {}: {}", status, running.error_body.substr(0, 200));
    }
    if (running.failure.empty() && !running.first && session.is_measured) {
      running.failure = "no text came";
    }
    if (running.failure.empty() && !running.done) running.failure = "the stream broke off";
    if (!session.is_measured) {
      if (!running.failure.empty()) ++errors_["sending a prefix: " + running.failure];
      --num_open_sessions_;
      return;
    }
    ++num_finished_;
    progress_.advance(num_finished_);
    if (!running.failure.empty()) {
      ++errors_[running.failure];
      num_finished_ += options_.turns - session.turn - 1;  // the rest of its session falls away
      --num_open_sessions_;
      return;
    }
    measure(running);
    if (++session.turn == options_.turns) {
      --num_open_sessions_;
      return;
    }
    if (!options_.random_ids) {
      session.messages.push_back(
          json::object{{"role", "assistant"}, {"content", json::string(running.answer)}});
    }
    session.due = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                     std::chrono::duration<double>(options_.think_s));
    waiting_.push_back(&session);
  }

  void measure(Running& running) {
    const int64_t tokens = running.completion_tokens.value_or(running.chunks);
    const double ttft = ms_between(running.sent, *running.first);
    const double e2e = ms_between(running.sent, *running.last);
    const double tpot = tokens > 1 ? (e2e - ttft) / static_cast<double>(tokens - 1) : 0;
    ++report_.completed;
    report_.input_tokens += running.prompt_tokens.value_or(0);
    report_.cached_tokens += running.cached_tokens.value_or(0);
    report_.output_tokens += tokens;
    ttft_.push_back(ttft);
    e2e_.push_back(e2e);
    if (tokens > 1) tpot_.push_back(tpot);
    itl_.insert(itl_.end(), running.gaps_ms.begin(), running.gaps_ms.end());
    const auto meets = [](double value, double bound) { return bound <= 0 || value <= bound; };
    report_.good += meets(ttft, options_.slo_ttft_ms) && meets(tpot, options_.slo_tpot_ms) &&
                    meets(e2e, options_.slo_e2e_ms);
    last_piece_ = std::max(last_piece_, *running.last);
  }

  LoadTestReport report() {
    report_.seconds = ms_between(start_, last_piece_) * 1e-3;
    report_.peak_concurrency = peak_;
    report_.ttft_ms = Percentiles::of(std::move(ttft_));
    report_.tpot_ms = Percentiles::of(std::move(tpot_));
    report_.itl_ms = Percentiles::of(std::move(itl_));
    report_.e2e_ms = Percentiles::of(std::move(e2e_));
    for (const auto& [message, count] : errors_) {
      report_.failed += count;
      report_.errors.emplace_back(message, count);
    }
    std::stable_sort(report_.errors.begin(), report_.errors.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    return std::move(report_);
  }

  LoadTestOptions options_;
  Progress& progress_;
  std::vector<std::string_view> words_;  // of the caller's text
  std::mt19937_64 random_;
  CurlMulti multi_;
  static constexpr int kMaxWarming = 16;     // at a time, where concurrency has no bound
  std::vector<Session> warming_, sessions_;  // never grow once running
  std::deque<Session*> waiting_;
  std::vector<std::unique_ptr<Running>> running_;
  int num_open_sessions_ = 0, peak_ = 0;
  int64_t num_finished_ = 0;
  Clock::time_point start_, last_piece_;
  std::vector<double> ttft_, tpot_, itl_, e2e_;
  std::map<std::string, int> errors_;
  LoadTestReport report_;
};

}  // namespace

Percentiles Percentiles::of(std::vector<double> values) {
  Percentiles out;
  if (values.empty()) return out;
  std::sort(values.begin(), values.end());
  for (const double value : values) out.mean += value;
  out.mean /= static_cast<double>(values.size());
  const auto at = [&](double share) {
    const double rank = share * static_cast<double>(values.size() - 1);
    const auto low = static_cast<size_t>(rank);
    const size_t high = std::min(low + 1, values.size() - 1);
    return values[low] + (rank - static_cast<double>(low)) * (values[high] - values[low]);
  };
  out.p50 = at(0.5);
  out.p90 = at(0.9);
  out.p95 = at(0.95);
  out.p99 = at(0.99);
  out.max = values.back();
  return out;
}

json::object Percentiles::to_json() const {
  return {{"mean", mean}, {"p50", p50}, {"p90", p90}, {"p95", p95}, {"p99", p99}, {"max", max}};
}

json::object LoadTestReport::to_json() const {
  const auto rate = [&](double count) { return seconds > 0 ? count / seconds : 0.0; };
  json::array error_list;
  for (const auto& [message, count] : errors) {
    error_list.push_back(json::object{{"message", message}, {"count", count}});
  }
  return {{"completed", completed},
          {"failed", failed},
          {"seconds", seconds},
          {"input_tokens", input_tokens},
          {"cached_tokens", cached_tokens},
          {"output_tokens", output_tokens},
          {"requests_per_s", rate(completed)},
          {"arrivals_per_s", arrivals_per_s},
          {"output_tokens_per_s", rate(static_cast<double>(output_tokens))},
          {"total_tokens_per_s", rate(static_cast<double>(input_tokens + output_tokens))},
          {"goodput_requests_per_s", rate(good)},
          {"peak_concurrency", peak_concurrency},
          {"ttft_ms", ttft_ms.to_json()},
          {"tpot_ms", tpot_ms.to_json()},
          {"itl_ms", itl_ms.to_json()},
          {"e2e_ms", e2e_ms.to_json()},
          {"errors", std::move(error_list)}};
}

LoadTestReport run_load_test(const LoadTestOptions& options, Progress& progress) {
  curl_global_init(CURL_GLOBAL_DEFAULT);
  return LoadGenerator(options, progress).run();
}

}  // namespace nibble
