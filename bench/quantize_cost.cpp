// What quantizing a large model costs, measured on one layer of its shape: CPU seconds of the
// layer's passes over tokens, of their statistics, and of the search and rounding of a few rows of
// each linear. From these the time of a whole model follows (docs/quantization.md has the figures).
//   nibble_quantize_cost [SHAPE] [TOKENS] [ROWS]      SHAPE of `nibble synthesize`
// CPU time, not wall time: other programs on the machine change it little. SPDX-License-Identifier:
// Apache-2.0
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "base/error.h"
#include "formats/synthetic.h"
#include "quantize/awq.h"
#include "quantize/drift.h"
#include "quantize/layer_stream.h"
#include "quantize/quantizer.h"
#include "quantize/rounding.h"

namespace nibble {
namespace {

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double peak_gb() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024 * 1e-9;
}

double timed(const std::function<void()>& work) {
  const double start = cpu_seconds();
  work();
  return cpu_seconds() - start;
}

std::vector<float> random_values(int64_t count, unsigned seed, float scale) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values)  // sums of four bytes: near enough to normal
    value = (static_cast<float>((random() & 255) + (random() >> 24)) - 255.0f) * scale / 104.0f;
  return values;
}

// Linears that share an input, as the quantizer searches them.
struct Group {
  const char* name;
  int64_t features, rows;
  bool adds_to_stream;
};

struct Cost {
  double per_token = 0;  // CPU seconds
  double per_layer = 0;
};

class Bench {
 public:
  Bench(const ModelSpec& spec, int64_t tokens, int64_t rows)
      : spec_(spec), tokens_(tokens), rows_(rows), pool_(0) {}

  Cost run() {
    forward();
    const int64_t hidden = spec_.hidden_size, ffn = spec_.ffn_size;
    for (const Group& group :
         {Group{"qkv", hidden, spec_.qkv_size(), false}, Group{"o", spec_.q_size(), hidden, true},
          Group{"gate, up", hidden, 2 * ffn, false}, Group{"down", ffn, hidden, true}}) {
      measure(group);
    }
    return cost_;
  }

 private:
  // Three passes a layer: the dense model's, the quantized one's, and again with the new weights.
  void forward() {
    const auto source = open_synthetic(spec_, 1, /*int4=*/false);
    const auto backend = make_cpu_backend("native", ActivationPrecision::kF32, 0);
    std::vector<std::vector<int32_t>> sequences(1);
    for (int64_t t = 0; t < tokens_; ++t)
      sequences[0].push_back(static_cast<int32_t>(t % spec_.vocab_size));
    LayerStream stream(*backend, *source, sequences, 1, static_cast<int>(tokens_));
    const StreamedLayer layer(*backend, *source, 0);
    const double seconds = timed([&] { stream.run(0, layer.weights(), {}, true, [](int64_t) {}); });
    double parameters = 0;
    for (const WeightRow& row : weight_table(spec_)) {
      if (row.layer == 0 && row.shape.size() == 2)
        parameters += static_cast<double>(row.shape[0] * row.shape[1]);
    }
    fmt::print("forward: {:.2f} s for {} tokens, {:.0f} GFLOP/s a thread\n", seconds, tokens_,
               2e-9 * parameters * static_cast<double>(tokens_) / seconds);
    cost_.per_token += 3 * seconds / static_cast<double>(tokens_);
  }

  void measure(const Group& group) {
    const std::vector<float> x = random_values(tokens_ * group.features, 1, 1.0f),
                             dense = random_values(tokens_ * group.features, 2, 1.0f),
                             residual = random_values(tokens_ * spec_.hidden_size, 3, 0.1f);
    double statistics = 0;
    if (group.adds_to_stream) {  // a second one: below, the residual would have to fit all rows
      awq::InputStatistics with_residual(group.features, 128, QuantizeOptions().max_gram_bytes);
      statistics = timed([&] {
        with_residual.add_drift(pool_, x.data(), dense.data(), residual.data(), spec_.hidden_size,
                                tokens_);
      });
    }
    awq::InputStatistics input(group.features, 128, QuantizeOptions().max_gram_bytes);
    statistics += timed([&] { input.add(pool_, x.data(), tokens_); });
    const double without_residual = timed([&] {
      input.add_drift(pool_, x.data(), dense.data(), nullptr, spec_.hidden_size, tokens_);
    });
    if (!group.adds_to_stream) statistics += without_residual;
    input.finish(pool_);
    cost_.per_token += statistics / static_cast<double>(tokens_);

    const std::vector<float> weight = random_values(rows_ * group.features, 4, 0.02f);
    const awq::DenseLinear linear{weight.data(), rows_};
    const awq::RoundingOptions options;
    std::vector<float> factor;
    const double factoring =
        timed([&] { awq::factor_gram(pool_, input.gram(), options.damping, factor); });
    factor = {};
    const auto quantize = [&](awq::Rounding rounding, int alpha_steps, bool clip) {
      awq::RoundingOptions less = options;
      less.rounding = rounding;
      less.alpha_steps = alpha_steps;
      less.beta_steps = 0;
      less.clip = clip;
      return timed(
          [&] { awq::quantize_group(pool_, std::span(&linear, 1), group.features, input, less); });
    };
    // Of these rows: one candidate, what its clip search adds (once when it is a finalist, once
    // when the winner is rounded), and everything with one candidate.
    using enum awq::Rounding;
    const double nearest = quantize(kNearest, 0, false);
    const double candidate = (quantize(kNearest, 2, false) - nearest) / 2;
    const double finalist = (quantize(kNearest, 0, true) - nearest) / 2;
    const double one = quantize(kCompensated, 0, false) - factoring;
    std::vector<float> moved = weight;
    const double drift =
        timed([&] { awq::correct_drift(pool_, input, awq::kDriftStrength, moved); });
    const double per_row = 1 / static_cast<double>(rows_);
    const double rows = static_cast<double>(group.rows),
                 voters = std::min(rows, 8192.0);  // kMaxSearchRows
    const double candidates = (options.alpha_steps + 1) * (options.beta_steps + 1);
    const double search = (candidates * candidate + 4 * finalist) * voters * per_row;
    const double rounding = factoring + (one - candidate + finalist) * rows * per_row;
    const double correcting = factoring + std::max(0.0, drift - factoring) * rows * per_row;
    cost_.per_layer += search + rounding + correcting;
    fmt::print(
        "{:9} statistics {:.2f} s for {} tokens; of the whole linear: search {:.0f} s, rounding "
        "{:.0f} s, drift {:.0f} s; one candidate of {} rows {:.2f} s ({:.0f} GFLOP/s), factoring "
        "{:.1f} s\n",
        group.name, statistics, tokens_, search, rounding, correcting, rows_, candidate,
        2e-9 * static_cast<double>(rows_ * group.features * input.gram().block) / candidate,
        factoring);
  }

  const ModelSpec spec_;
  const int64_t tokens_, rows_;
  ThreadPool pool_;
  Cost cost_;
};

int run(int argc, char** argv) {
  ModelSpec spec = synthetic_shape(argc > 1 ? argv[1] : "mistral-24b").spec;
  const int64_t tokens = argc > 2 ? std::atoi(argv[2]) : 256,
                rows = argc > 3 ? std::atoi(argv[3]) : 128;
  const int layers = spec.num_layers;
  spec.num_layers = 1;
  spec.vocab_size = 1024;  // the embedding costs nothing here
  const Cost cost = Bench(spec, tokens, rows).run();
  constexpr double kTokens = 64 * 5675;
  const double seconds = layers * (cost.per_token * kTokens + cost.per_layer);
  fmt::print(
      "CPU seconds = layers x ({:.4g} x tokens + {:.4g}); {} layers and {:.0f} tokens: {:.3g} s = "
      "{:.1f} days of one thread\npeak resident {:.2f} GB\n",
      cost.per_token, cost.per_layer, layers, kTokens, seconds, seconds / 86400, peak_gb());
  return 0;
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a long run may be cut short
  try {
    return nibble::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
