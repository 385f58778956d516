// bench latency | throughput | ops. Every figure comes with the read bandwidth measured in the same
// run. SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <optional>

#include "backends/cpu/bandwidth.h"
#include "base/error.h"
#include "base/interrupt.h"
#include "bench/bench_ops.h"
#include "build/model_card.h"
#include "build/model_loader.h"
#include "cli/names.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "engine/engine_parts.h"
#include "formats/synthetic.h"
#include "model/kv_cache.h"
#include "nibble/engine.h"
#include "ops/sample_rng.h"

namespace nibble::cli {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

LoadOptions load_options(const BenchFlags& flags) {
  LoadOptions options;
  options.num_threads = flags.threads;
  options.build.target = flags.target;
  options.build.kv_format = kv_format_from_name(flags.kv_cache);
  options.build.activation_precision = activation_precision_from_flag(flags.activations);
  options.build.limits.max_batch_size = std::max(flags.batch, 1);
  options.build.limits.max_input_len = flags.prompt_tokens;
  options.build.limits.max_output_len = flags.output_tokens;
  return options;
}

LoadedModel load(const BenchFlags& flags, TerminalProgress& progress) {
  if (flags.model.empty() && flags.synthetic.empty()) {
    fail(ErrorKind::kUsage, "bench: give a MODEL directory or --synthetic SHAPE");
  }
  if (!flags.model.empty()) return load_model(flags.model, load_options(flags));
  const ModelSpec& spec = synthetic_shape(flags.synthetic).spec;
  progress.note(fmt::format("making random int4 weights of shape {}", flags.synthetic));
  return load_source(open_synthetic(spec, /*seed=*/1), load_options(flags));
}

/// Engine counters around the steps of a whole batch: from the last first token to the first end.
struct WholeBatch {
  EngineStats before, after;
  /// What the engine's thread does beside waiting for the device.
  double host_us_per_step() const {
    const double us = static_cast<double>(after.step_us - before.step_us) -
                      static_cast<double>(after.wait_us - before.wait_us);
    return us / static_cast<double>(std::max<uint64_t>(after.steps - before.steps, 1));
  }
};

struct Timeline {  // of one request
  Clock::time_point submitted, first, last;
  std::vector<Clock::time_point> times;  // of its tokens
  int tokens = 0;
  bool done = false;
};

class Load {
 public:
  Load(LoadedModel model, int num_sequences)
      : plan_(model.plan), bytes_per_step_(model.weights.bytes_per_decode_step) {
    EngineParts parts;
    overlaps_ = model.backend->overlaps();
    parts.plan = model.plan;
    const int per_sequence = plan_.limits.max_seq_len() / plan_.kv_block_tokens + 1;
    parts.num_kv_blocks = per_sequence * (num_sequences + 1);
    parts.backend = std::move(model.backend);
    parts.tensors = std::move(model.tensors);
    parts.weights = std::move(model.weights);
    parts.max_queue = 1 << 20;
    source_ = std::move(model.source);
    engine_ = Engine::create(std::move(parts));
  }

  /// `count` requests of random ids, at most `concurrency` at a time; every one generates `output`
  /// tokens.
  std::vector<Timeline> run(int count, int concurrency, int prompt, int output) {
    std::vector<Timeline> timelines(static_cast<size_t>(count));
    std::mutex mutex;
    std::condition_variable changed;
    int active = 0, finished = 0;
    for (int i = 0; i < count; ++i) {
      {
        std::unique_lock lock(mutex);
        while (active >= concurrency) changed.wait_for(lock, std::chrono::milliseconds(100));
        ++active;
      }
      throw_if_interrupted();
      Request request;
      for (int t = 0; t < prompt; ++t) {
        const uint32_t random =
            philox4x32(static_cast<uint64_t>(next_seed_), static_cast<uint64_t>(t))[0];
        request.prompt_tokens.push_back(
            static_cast<int32_t>(random % static_cast<uint32_t>(plan_.spec.vocab_size)));
      }
      ++next_seed_;
      request.params.ignore_eos = true;
      request.params.seed = static_cast<uint64_t>(i);
      request.max_tokens = output;
      Timeline& timeline = timelines[static_cast<size_t>(i)];
      timeline.times.reserve(static_cast<size_t>(output));
      request.sink = [&](const TokenEvent& event) {
        const std::lock_guard lock(mutex);
        if (timeline.tokens == 0 && !event.tokens.empty()) {
          timeline.first = Clock::now();
          whole_batch_.before = engine_->stats();
        }
        timeline.tokens += static_cast<int>(event.tokens.size());
        timeline.last = Clock::now();
        timeline.times.insert(timeline.times.end(), event.tokens.size(), timeline.last);
        if (event.last) {
          if (finished == 0) whole_batch_.after = engine_->stats();
          timeline.done = event.finish_reason == FinishReason::kLength;
          --active;
          ++finished;
          changed.notify_all();
        }
      };
      timeline.submitted = Clock::now();
      if (!engine_->submit(std::move(request)))
        fail(ErrorKind::kInternal, "the engine refused: {}", engine_->failure());
    }
    std::unique_lock lock(mutex);
    while (finished < count) changed.wait_for(lock, std::chrono::milliseconds(100));
    for (const Timeline& timeline : timelines) {
      if (!timeline.done || timeline.tokens != output) {
        fail(ErrorKind::kInternal, "a request ended after {} of {} tokens: {}", timeline.tokens,
             output, engine_->failure());
      }
    }
    return timelines;
  }

  Engine& engine() { return *engine_; }
  const EnginePlan& plan() const { return plan_; }
  uint64_t bytes_per_step() const { return bytes_per_step_; }
  /// Of the last run; nothing where the engine's thread computes the steps itself.
  std::optional<double> host_us_per_step() const {
    if (!overlaps_) return std::nullopt;
    return whole_batch_.host_us_per_step();
  }

 private:
  EnginePlan plan_;
  uint64_t bytes_per_step_;
  std::unique_ptr<WeightSource> source_;
  std::unique_ptr<Engine> engine_;
  int next_seed_ = 1;
  bool overlaps_ = false;  // the next step is launched while the device computes one
  WholeBatch whole_batch_;
};

double percentile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(p * static_cast<double>(values.size() - 1) + 0.5)];
}

struct Share {  // of step time outside the decoder and sampling
  EngineStats before;
  double percent(const EngineStats& after) const {
    const double step = static_cast<double>(after.step_us - before.step_us);
    const double forward = static_cast<double>(after.forward_us - before.forward_us);
    return step > 0 ? 100 * (step - forward) / step : 0;
  }
};

double read_bandwidth(const LoadedModel& model, const BenchFlags& flags) {
  const double device = model.backend->measure_read_gb_per_s();
  return device > 0 ? device : measure_read_bandwidth(flags.threads);
}

void measure_latency(const BenchFlags& flags, Load& load, double bandwidth) {
  load.run(flags.batch, flags.batch, std::min(flags.prompt_tokens, 64),
           std::min(flags.output_tokens, 4));  // warm up
  const Share share{load.engine().stats()};
  const std::vector<Timeline> times =
      load.run(flags.batch, flags.batch, flags.prompt_tokens, flags.output_tokens);
  // Steps of the whole batch: from the last first token to the earliest last one.
  const Timeline* last_to_start = &times[0];
  Clock::time_point first_to_end = times[0].last;
  for (const Timeline& time : times) {
    if (time.first > last_to_start->first) last_to_start = &time;
    first_to_end = std::min(first_to_end, time.last);
  }
  const std::vector<Clock::time_point>& steps = last_to_start->times;
  const size_t num_steps = static_cast<size_t>(
      std::upper_bound(steps.begin(), steps.end(), first_to_end) - steps.begin());
  if (num_steps < 2) {
    fail(ErrorKind::kUsage,
         "bench latency: the first of {} sequences had its {} tokens before the last had read its "
         "prompt, so no step was of the whole batch; raise --output-tokens",
         flags.batch, flags.output_tokens);
  }
  const double prefill_seconds =
      std::chrono::duration<double>(last_to_start->first - times[0].submitted).count();
  const double prefill_rate = flags.batch * flags.prompt_tokens / prefill_seconds;
  const double step_ms =
      std::chrono::duration<double, std::milli>(steps[num_steps - 1] - steps[0]).count() /
      static_cast<double>(num_steps - 1);
  const double rate = flags.batch / step_ms * 1e3;
  const double gb_per_s = static_cast<double>(load.bytes_per_step()) / step_ms * 1e-6;
  const double outside = share.percent(load.engine().stats());
  const std::optional<double> host_us = load.host_us_per_step();
  const double host_percent = host_us ? 0.1 * *host_us / step_ms : 0;
  if (flags.write_card) {
    const std::vector<fs::path> cards = cards_of_engine(flags.model);
    const SpeedRow row = {.engine = cards[0].parent_path().filename().string(),
                          .target = load.plan().target,
                          .batch = flags.batch,
                          .prompt_tokens = flags.prompt_tokens,
                          .output_tokens = flags.output_tokens,
                          .prefill_tokens_per_s = prefill_rate,
                          .decode_tokens_per_s = rate,
                          .weight_gb_per_s = gb_per_s,
                          .read_gb_per_s = bandwidth};
    for (const fs::path& card : cards)
      write_file_atomically(card, add_speed_to_card(read_file(card), row));
  }
  if (flags.json) {
    json::object object{
        {"target", load.plan().target},
        {"activations", activation_precision_name(load.plan().activation_precision)},
        {"batch", flags.batch},
        {"prompt_tokens", flags.prompt_tokens},
        {"output_tokens", flags.output_tokens},
        {"prefill_tokens_per_s", prefill_rate},
        {"time_to_first_token_s", prefill_seconds},
        {"decode_step_ms", step_ms},
        {"decode_tokens_per_s", rate},
        {"weight_gb_per_s", gb_per_s},
        {"read_bandwidth_gb_per_s", bandwidth},
        {"percent_of_read_bandwidth", 100 * gb_per_s / bandwidth},
        {"percent_outside_kernels", outside}};
    if (host_us) {
      object["host_us_per_step"] = *host_us;
      object["host_percent_of_step"] = host_percent;
    }
    fmt::print("{}\n", dump_json(object));
    return;
  }
  fmt::print(
      "{}, activations {}, batch {}: prompt {} tokens, output {} tokens\n"
      "  prefill  {:.1f} tokens/s ({})\n"
      "  decode   {:.2f} ms a step, {:.1f} tokens/s; {:.2f} GB of weights a step: {:.1f} GB/s = "
      "{:.0f} % of the {:.1f} GB/s read here\n"
      "  outside the kernels: {:.2f} % of step time\n",
      load.plan().target, activation_precision_name(load.plan().activation_precision), flags.batch,
      flags.prompt_tokens, flags.output_tokens, prefill_rate, human_duration(prefill_seconds),
      step_ms, rate, static_cast<double>(load.bytes_per_step()) * 1e-9, gb_per_s,
      100 * gb_per_s / bandwidth, bandwidth, outside);
  if (host_us) {
    fmt::print(
        "  engine's thread, not waiting for the device: {:.1f} us a decode step = {:.2f} % of it\n",
        *host_us, host_percent);
  }
}

int run_latency(const BenchFlags& flags, LoadedModel model) {
  const double bandwidth = read_bandwidth(model, flags);
  Load load(std::move(model), flags.batch);
  BenchFlags one = flags;
  for (const int batch : flags.batches) {
    one.batch = batch;
    measure_latency(one, load, bandwidth);
  }
  return 0;
}

int run_throughput(const BenchFlags& flags, LoadedModel model) {
  const double bandwidth = read_bandwidth(model, flags);
  const int requests = flags.requests > 0 ? flags.requests : 4 * flags.batch;
  Load load(std::move(model), flags.batch);
  load.run(flags.batch, flags.batch, std::min(flags.prompt_tokens, 64),
           std::min(flags.output_tokens, 4));
  const Share share{load.engine().stats()};
  const auto start = Clock::now();
  const std::vector<Timeline> times =
      load.run(requests, flags.batch, flags.prompt_tokens, flags.output_tokens);
  const double seconds = seconds_since(start);
  std::vector<double> ttft, tpot;
  for (const Timeline& time : times) {
    ttft.push_back(std::chrono::duration<double>(time.first - time.submitted).count());
    tpot.push_back(1e3 * std::chrono::duration<double>(time.last - time.first).count() /
                   std::max(flags.output_tokens - 1, 1));
  }
  const double output_rate = requests * flags.output_tokens / seconds;
  const double total_rate = requests * (flags.output_tokens + flags.prompt_tokens) / seconds;
  const double outside = share.percent(load.engine().stats());
  if (flags.json) {
    fmt::print("{}\n", dump_json(json::object{{"target", load.plan().target},
                                              {"requests", requests},
                                              {"batch", flags.batch},
                                              {"prompt_tokens", flags.prompt_tokens},
                                              {"output_tokens", flags.output_tokens},
                                              {"requests_per_s", requests / seconds},
                                              {"output_tokens_per_s", output_rate},
                                              {"total_tokens_per_s", total_rate},
                                              {"ttft_p50_s", percentile(ttft, 0.5)},
                                              {"ttft_p95_s", percentile(ttft, 0.95)},
                                              {"tpot_p50_ms", percentile(tpot, 0.5)},
                                              {"tpot_p95_ms", percentile(tpot, 0.95)},
                                              {"read_bandwidth_gb_per_s", bandwidth},
                                              {"percent_outside_kernels", outside}}));
    return 0;
  }
  fmt::print(
      "{}: {} requests of {} + {} tokens, {} at a time, in {}\n"
      "  {:.2f} requests/s, {:.1f} output tokens/s, {:.1f} tokens/s in all\n"
      "  time to first token p50 {:.3f} s, p95 {:.3f} s; time per output token p50 {:.1f} ms, p95 "
      "{:.1f} ms\n"
      "  outside the kernels: {:.2f} % of step time; this machine reads {:.1f} GB/s\n",
      load.plan().target, requests, flags.prompt_tokens, flags.output_tokens, flags.batch,
      human_duration(seconds), requests / seconds, output_rate, total_rate, percentile(ttft, 0.5),
      percentile(ttft, 0.95), percentile(tpot, 0.5), percentile(tpot, 0.95), outside, bandwidth);
  return 0;
}

int run_ops(const BenchFlags& flags, TerminalProgress& progress) {
  const std::string target = resolve_target(flags.target);
  if (!target.starts_with("cpu:"))
    fail(ErrorKind::kUsage,
         "bench ops measures cpu targets; {} is not one (a GPU's kernels: nibble_cuda_bench)",
         target);
  BenchOpsOptions options;
  options.spec = bench_model_spec();
  if (!flags.synthetic.empty()) options.spec = synthetic_shape(flags.synthetic).spec;
  if (!flags.model.empty()) options.spec = load_model(flags.model, load_options(flags)).plan.spec;
  options.kv_format = kv_format_from_name(flags.kv_cache);
  options.rows = flags.batch;
  options.context = flags.prompt_tokens;
  const auto precision =
      activation_precision_from_flag(flags.activations).value_or(kDefaultCpuActivationPrecision);
  progress.note(fmt::format("ops of {} (activations {}): {} sequences with {} tokens of context",
                            target, activation_precision_name(precision), options.rows,
                            options.context));
  const auto backend = make_backend(target, precision, flags.threads);
  const double bandwidth = measure_read_bandwidth(flags.threads);
  const std::vector<OpTiming> timings = bench_ops(*backend, options);
  if (flags.json) {
    fmt::print("{}\n", dump_json(op_timings_to_json(timings, bandwidth)));
  } else {
    fmt::print("{}", format_op_timings(timings, bandwidth));
  }
  return 0;
}

}  // namespace

int run_bench(const BenchFlags& given) {
  TerminalProgress progress;
  BenchFlags flags = given;
  if (flags.what.empty()) {
    fail(ErrorKind::kUsage, "bench: say what to measure: latency, throughput, ops or serve");
  }
  if (flags.batches.size() > 1 && flags.what != "latency") {
    fail(ErrorKind::kUsage, "bench {}: --batch has {} values; only bench latency takes a list",
         flags.what, flags.batches.size());
  }
  flags.batch = *std::max_element(flags.batches.begin(), flags.batches.end());
  if (flags.write_card) {  // before minutes of measuring
    if (flags.what != "latency" || flags.model.empty() ||
        model_kind(flags.model) != ModelKind::kEngine) {
      fail(ErrorKind::kUsage,
           "--write-card: wanted `bench latency` of an engine, got bench {} of {}", flags.what,
           flags.model.empty() ? flags.synthetic : flags.model);
    }
    cards_of_engine(flags.model);
  }
  if (flags.what == "ops") return run_ops(flags, progress);
  LoadedModel model = load(flags, progress);
  for (const std::string& notice : model.notices) progress.note(notice);
  if (model.backend->free_memory_bytes() > 0) {  // others read the mapping where it is
    const auto bytes = static_cast<double>(model.tensors->total_bytes());
    progress.note(fmt::format("weights: {:.2f} GB to {} in {:.2f} s, {:.1f} GB/s", bytes * 1e-9,
                              model.backend->name(), model.load_seconds,
                              bytes * 1e-9 / model.load_seconds));
  }
  return flags.what == "latency" ? run_latency(flags, std::move(model))
                                 : run_throughput(flags, std::move(model));
}

}  // namespace nibble::cli
