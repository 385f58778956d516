// SPDX-License-Identifier: Apache-2.0
#include "bench/bench_ops.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>

#include "base/error.h"
#include "bench/op_cases.h"

namespace nibble {
namespace {

using ops::TestWeight;

/// Median microseconds of one call, after one warm-up call.
double time_us(Backend& backend, double min_seconds, const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  call();
  backend.sync();
  std::vector<double> times;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    call();
    backend.sync();
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  } while (times.size() < 5 ||
           std::chrono::duration<double>(Clock::now() - begin).count() < min_seconds);
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2),
                   times.end());
  return times[times.size() / 2];
}

OpTiming bench_linear(Backend& backend, const BenchOpsOptions& options, const ops::LinearCase& c,
                      double calls) {
  // Copies so that a call never finds the previous call's weights in a cache.
  const double bytes = c.bytes();
  const int copies = static_cast<int>(std::clamp(256e6 / bytes, 1.0, 12.0)) + 1;
  std::vector<std::unique_ptr<TestWeight>> weights;
  for (int i = 0; i < copies * (c.gate_up ? 2 : 1); ++i) {
    weights.push_back(std::make_unique<TestWeight>(backend, c.layout, c.out_features, c.in_features,
                                                   c.group_size, c.seed, false));
  }
  const auto rows = static_cast<size_t>(c.rows);
  std::vector<float> x(rows * static_cast<size_t>(c.in_features));
  ops::fill_normal(x, c.seed);
  const Buffer in = ops::to_device(backend, x);
  const Buffer out =
      ops::to_device(backend, std::vector<float>(rows * static_cast<size_t>(c.out_features)));
  size_t next = 0;
  const double us = time_us(backend, options.min_seconds, [&] {
    const size_t i = next++ % static_cast<size_t>(copies);
    if (c.gate_up) {
      backend.gate_up(in.data(), weights[2 * i]->operand(), weights[2 * i + 1]->operand(), c.rows,
                      nullptr, out.data());
    } else {
      backend.linear(in.data(), weights[i]->operand(), c.rows, c.add, out.data());
    }
  });
  return {.name = c.name(), .us = us, .calls = calls, .bytes = bytes, .flops = c.flops()};
}

}  // namespace

ModelSpec bench_model_spec() {
  ModelSpec spec;
  spec.num_layers = 16;
  spec.hidden_size = 2048;
  spec.num_heads = 16;
  spec.num_kv_heads = 4;
  spec.head_dim = 128;
  spec.ffn_size = 8192;
  spec.vocab_size = 32768;
  spec.max_position = 8192;
  return spec;
}

std::vector<OpTiming> bench_ops(Backend& backend, const BenchOpsOptions& o) {
  NIBBLE_CHECK(o.rows > 0 && o.context >= 0);
  const ModelSpec& s = o.spec;
  const int sequences = o.prefill ? 1 : o.rows, logit_rows = sequences;
  EngineLimits limits;
  limits.max_num_tokens = o.rows;
  limits.max_batch_size = sequences;
  limits.max_input_len = o.context + o.rows;
  backend.reserve(s, limits, logit_rows);
  std::vector<OpTiming> timings;
  const double layers = s.num_layers;

  std::vector<ops::LinearCase> linears =
      ops::model_linear_cases(s, o.int4_layout, o.group_size, o.rows);
  linears.back().rows = logit_rows;  // lm_head
  for (size_t i = 0; i < linears.size(); ++i) {
    timings.push_back(bench_linear(backend, o, linears[i], i + 1 == linears.size() ? 1 : layers));
  }

  const auto hidden = static_cast<size_t>(s.hidden_size), rows = static_cast<size_t>(o.rows);
  std::vector<float> x(rows * hidden), weight(hidden, 1.0f);
  ops::fill_normal(x, 3);
  const Buffer in = ops::to_device(backend, x), out = ops::to_device(backend, x),
               norm = ops::to_device(backend, weight);
  timings.push_back({.name = fmt::format("rms_norm {}x{}", o.rows, s.hidden_size),
                     .us = time_us(backend, o.min_seconds,
                                   [&] {
                                     backend.rms_norm(in.data(), norm.as<float>(), 1e-5f, o.rows,
                                                      s.hidden_size, out.data());
                                   }),
                     .calls = 2 * layers + 1,
                     .bytes = 8.0 * static_cast<double>(x.size()),
                     .flops = 4.0 * static_cast<double>(x.size())});

  const ops::AttentionShape shape{s.num_heads, s.num_kv_heads, s.head_dim, o.kv_block_tokens,
                                  o.kv_format};
  const int chunk = o.prefill ? o.rows : 1;
  ops::AttentionRun attention(backend, shape, sequences, o.context + chunk, 1);
  std::vector<ops::AttentionRun::Chunk> past, step;
  for (int i = 0; i < sequences; ++i) {
    past.push_back({i, o.context});
    step.push_back({i, chunk});
  }
  if (o.context > 0) {
    attention.prepare(past);
    attention.store();
  }
  attention.prepare(step);
  const double qkv_bytes = 4.0 * static_cast<double>(rows) * s.qkv_size();
  timings.push_back({.name = fmt::format("rope_store_kv {} tokens", o.rows),
                     .us = time_us(backend, o.min_seconds, [&] { attention.store(); }),
                     .calls = layers,
                     .bytes = 2 * qkv_bytes,
                     .flops = 3 * qkv_bytes / 4});
  timings.push_back({.name = fmt::format("attention {} tokens, context {}", o.rows, o.context),
                     .us = time_us(backend, o.min_seconds, [&] { attention.attend(); }),
                     .calls = layers,
                     .bytes = attention.attend_bytes(),
                     .flops = attention.attend_flops()});

  std::vector<float> logits(static_cast<size_t>(logit_rows) * static_cast<size_t>(s.vocab_size));
  ops::fill_normal(logits, 5, 3.0f);
  const Buffer logits_dev = ops::to_device(backend, logits);
  const Buffer tokens = backend.alloc(static_cast<size_t>(logit_rows) * sizeof(int32_t));
  std::vector<SampleRow> sample_rows(static_cast<size_t>(logit_rows));
  for (size_t i = 0; i < sample_rows.size(); ++i) {
    sample_rows[i].temperature = 0.8f;
    sample_rows[i].top_p = 0.95f;
    sample_rows[i].seed = i;
  }
  const Buffer sample_rows_dev = ops::to_device(backend, sample_rows);
  const SampleBatch batch{
      .num_rows = logit_rows, .vocab_size = s.vocab_size, .rows = sample_rows_dev.as<SampleRow>()};
  timings.push_back({.name = fmt::format("sample {} rows, top_p", logit_rows),
                     .us = time_us(backend, o.min_seconds,
                                   [&] {
                                     backend.sample(batch, logits_dev.as<float>(),
                                                    {.tokens = tokens.as<int32_t>()});
                                   }),
                     .calls = 1,
                     .bytes = 4.0 * static_cast<double>(logits.size()),
                     .flops = 20.0 * static_cast<double>(logits.size())});
  return timings;
}

double step_us(const std::vector<OpTiming>& timings) {
  double total = 0;
  for (const OpTiming& t : timings) total += t.us * t.calls;
  return total;
}

std::string format_op_timings(const std::vector<OpTiming>& timings, double read_gb_per_s) {
  std::string out = fmt::format("{:<44} {:>10} {:>7} {:>9} {:>7} {:>9} {:>7}\n", "op", "us",
                                "calls", "GB/s", "% read", "GFLOPS", "% step");
  const double total = step_us(timings);
  for (const OpTiming& t : timings) {
    out += fmt::format(
        "{:<44} {:>10.1f} {:>7.0f} {:>9.2f} {:>7} {:>9.1f} {:>6.1f}%\n", t.name, t.us, t.calls,
        t.gb_per_s(),
        read_gb_per_s > 0 ? fmt::format("{:.0f}%", 100 * t.gb_per_s() / read_gb_per_s) : "-",
        t.gflops(), 100 * t.us * t.calls / total);
  }
  out += fmt::format("{:<44} {:>10.1f}\n", "step (ops only)", total);
  return out;
}

json::array op_timings_to_json(const std::vector<OpTiming>& timings, double read_gb_per_s) {
  json::array out;
  for (const OpTiming& t : timings) {
    json::object row{{"op", t.name},        {"us", t.us},       {"calls_per_step", t.calls},
                     {"bytes", t.bytes},    {"flops", t.flops}, {"gb_per_s", t.gb_per_s()},
                     {"gflops", t.gflops()}};
    if (read_gb_per_s > 0) row["fraction_of_read_bandwidth"] = t.gb_per_s() / read_gb_per_s;
    out.push_back(std::move(row));
  }
  return out;
}

}  // namespace nibble
