// The whole engine over a small random model on real backends, against one sequence at a time
// through the decoder (model/single_sequence.h): tokens and log-probs must be equal bit for bit
// whatever shares the steps, the cache and the blocks with them. SPDX-License-Identifier:
// Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <future>
#include <list>
#include <map>
#include <ostream>
#include <random>
#include <thread>

#include "base/error.h"
#include "build/model_loader.h"
#include "engine/collector.h"
#include "engine/engine_parts.h"
#include "engine/sampling_params.h"
#include "formats/synthetic.h"
#include "model/single_sequence.h"
#include "nibble/engine.h"

namespace nibble {
namespace {

constexpr int kVocab = 256;

struct Target {
  const char* name;
  const char* target;
  ActivationPrecision precision;
  KvFormat kv_format;
  int num_rounds;
};

void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

LoadedModel load(const Target& target, const EngineLimits& limits) {
  ModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 128;
  spec.num_heads = 4;
  spec.num_kv_heads = 2;
  spec.head_dim = 32;
  spec.ffn_size = 256;
  spec.vocab_size = kVocab;
  spec.max_position = 4096;
  LoadOptions options;
  options.build.target = target.target;
  options.build.limits = limits;
  options.build.kv_format = target.kv_format;
  options.build.kv_block_tokens = 16;
  options.build.activation_precision = target.precision;
  options.num_threads = 1;
  return load_source(open_synthetic(spec, 5), options);
}

std::vector<uint64_t> allowed_tokens() {
  std::vector<uint64_t> mask(kVocab / 64, ~uint64_t{0});
  for (const int token : {0, 1, 100, 101, 102}) mask[token / 64] &= ~(uint64_t{1} << token % 64);
  return mask;
}

/// What a request must get, computed with no engine.
class Alone {
 public:
  explicit Alone(const Target& target)
      : model_(load(target, {.max_batch_size = 1,
                             .max_input_len = 300,
                             .max_output_len = 100,
                             .max_num_tokens = 512})),
        sequence_(*model_.backend, model_.plan, model_.weights, 400, 400) {}

  Collector::Choice generate(const Request& request, int index) {
    const SamplingParams& params = request.params;
    Collector::Choice answer;
    const auto& prompt = request.prompt_tokens;
    std::map<int32_t, int32_t> counts;
    for (const int32_t token : prompt) counts[token] += 0;
    sequence_.reset();
    std::vector<float> logits;
    if (params.prompt_logprobs >= 0 && index == 0) {
      const auto all = sequence_.extend(prompt, SingleSequence::Logits::kAll);
      for (size_t i = 1; i < prompt.size(); ++i) {
        std::vector<float> row(all.begin() + (i - 1) * kVocab, all.begin() + i * kVocab);
        answer.prompt_logprobs.push_back(
            draw({.temperature = 0, .num_logprobs = 0, .forced_token = prompt[i]}, row, {}, {})
                .second);
      }
      logits.assign(all.end() - kVocab, all.end());
    } else {
      const auto last = sequence_.extend(prompt, SingleSequence::Logits::kLast);
      logits.assign(last.begin(), last.end());
    }
    SampleRow row = make_sample_row(params, choice_seed(*params.seed, index));
    row.num_logprobs = 0;
    for (int i = 0; i < request.max_tokens.value(); ++i) {
      row.position = prompt.size() + i;
      std::vector<TokenCount> history;
      if (needs_history(params)) {
        for (const auto& [token, count] : counts) history.push_back({token, count});
      }
      std::vector<TokenBias> bias;
      for (const auto& [token, value] : params.logit_bias) bias.push_back({token, value});
      const auto [token, logprob] = draw(row, logits, history, bias);
      answer.tokens.push_back(token);
      answer.logprobs.push_back(logprob);
      ++counts[token];
      const auto next = sequence_.extend(std::span(&token, 1), SingleSequence::Logits::kLast);
      logits.assign(next.begin(), next.end());
    }
    return answer;
  }

 private:
  std::pair<int32_t, float> draw(SampleRow row, std::vector<float> logits,
                                 const std::vector<TokenCount>& history,
                                 const std::vector<TokenBias>& bias) {
    row.history_end = static_cast<int32_t>(history.size());
    row.bias_end = static_cast<int32_t>(bias.size());
    int32_t token = -1;
    float logprob = NAN;
    const auto mask = allowed_tokens();
    model_.backend->sample({.num_rows = 1,
                            .vocab_size = kVocab,
                            .rows = &row,
                            .history = history.data(),
                            .bias = bias.data(),
                            .allowed = mask.data()},
                           logits.data(), {.tokens = &token, .logprobs = &logprob});
    return {token, logprob};
  }

  LoadedModel model_;
  SingleSequence sequence_;
};

class RealModel : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    try {
      if (!make_backend(GetParam().target, GetParam().precision, 1))
        GTEST_SKIP() << "no such backend yet";
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }

  std::unique_ptr<Engine> make_engine(const EngineLimits& limits, int num_kv_blocks) {
    auto model = std::make_shared<LoadedModel>(load(GetParam(), limits));
    EngineParts parts;
    parts.plan = model->plan;
    parts.backend = std::move(model->backend);
    parts.weights = model->weights;
    parts.num_kv_blocks = num_kv_blocks;
    parts.allowed_tokens = allowed_tokens();
    parts.num_prompt_logprob_rows = 11;
    parts.tensors = std::move(model);
    return Engine::create(std::move(parts));
  }
};

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

TEST_P(RealModel, SharingChangesNoBit) {
  Alone alone(GetParam());
  std::mt19937 random(17);
  const auto pick = [&](int n) { return static_cast<int>(random() % n); };
  EngineStats totals;
  int num_requests = 0, num_cancelled = 0;
  for (int round = 0; round < GetParam().num_rounds; ++round) {
    // In even rounds the first sink holds the engine until all have arrived: a full house, and the
    // same one each time.
    const bool is_full_house = round % 2 == 0;
    std::promise<void> all_arrived;
    const auto arrived = all_arrived.get_future().share();
    const int max_batch_size = is_full_house ? 6 : 1 + pick(6);
    const EngineLimits limits{.max_batch_size = max_batch_size,
                              .max_input_len = 200,
                              .max_output_len = 40,
                              .max_num_tokens = max_batch_size + pick(pick(2) ? 16 : 80)};
    auto engine = make_engine(limits, 15 + pick(4));
    std::list<std::pair<Request, Collector>> items;
    std::vector<int32_t> stem(80);
    for (int32_t& token : stem) token = pick(kVocab);
    for (int i = 0; i < 16; ++i) {
      auto& [request, collector] = items.emplace_back();
      // Chats over the same beginning, each going its own way after a while; some continue an
      // earlier answer.
      request.prompt_tokens.assign(stem.begin(), stem.begin() + 1 + pick(80));
      if (pick(3) == 0 && items.size() > 1 && !is_full_house) {
        auto& [earlier, told] = items.front();
        ASSERT_TRUE(told.wait());
        request.prompt_tokens = earlier.prompt_tokens;
        const auto tokens = told.choice().tokens;
        request.prompt_tokens.insert(request.prompt_tokens.end(), tokens.begin(), tokens.end());
      }
      for (int n = pick(30); n > 0; --n) request.prompt_tokens.push_back(pick(kVocab));
      request.max_tokens = 1 + pick(40);
      SamplingParams& params = request.params;
      params.temperature = pick(2) ? 0.0f : 0.8f;
      params.seed = pick(1 << 20);
      params.ignore_eos = true;
      params.logprobs = 0;
      if (pick(3) == 0) params.top_k = 20;
      if (pick(3) == 0) params.top_p = 0.9f;
      if (pick(3) == 0) params.repetition_penalty = 1.3f;
      if (pick(3) == 0) params.frequency_penalty = 0.4f;
      if (pick(3) == 0) params.logit_bias = {{pick(kVocab), -INFINITY}};
      if (pick(5) == 0) params.prompt_logprobs = 0;
      if (pick(4) == 0) params.n = 2 + pick(2);
      request.priority = pick(2);
      request.sink = collector.sink();
      if (is_full_house && i == 0) {
        request.sink = [arrived, sink = request.sink](const TokenEvent& event) {
          arrived.wait();
          sink(event);
        };
      }
      const Submitted submitted = engine->submit(request);
      ASSERT_TRUE(submitted);
      if (items.size() > 1 && pick(8) == 0) engine->cancel(submitted.id);
      if (pick(2)) std::this_thread::sleep_for(std::chrono::milliseconds(pick(3)));
    }
    all_arrived.set_value();
    for (auto& [request, collector] : items) {
      ASSERT_TRUE(collector.wait());
      for (int i = 0; i < request.params.n; ++i) {
        const auto told = collector.choice(i);
        auto expected = alone.generate(request, i);
        if (told.reason == FinishReason::kCancelled) {
          ++num_cancelled;
          ASSERT_LE(told.tokens.size(), expected.tokens.size());
          expected.tokens.resize(told.tokens.size());
          expected.logprobs.resize(told.tokens.size());
          expected.prompt_logprobs.resize(told.prompt_logprobs.size());
        } else {
          ASSERT_EQ(told.reason, FinishReason::kLength);
        }
        ASSERT_EQ(told.tokens, expected.tokens);
        ASSERT_TRUE(same_bits(told.logprobs, expected.logprobs));
        ASSERT_TRUE(same_bits(told.prompt_logprobs, expected.prompt_logprobs));
        for (const int32_t token : told.tokens) {
          ASSERT_TRUE(allowed_tokens()[token / 64] >> (token % 64) & 1) << token;
        }
      }
      ++num_requests;
    }
    const EngineStats stats = engine->stats();
    EXPECT_EQ(stats.kv_blocks_used, 0);
    totals.preemptions += stats.preemptions;
    totals.prefix_hit_tokens += stats.prefix_hit_tokens;
    totals.steps += stats.steps;
    totals.step_tokens += stats.step_tokens;
    totals.step_us += stats.step_us;
    totals.forward_us += stats.forward_us;
  }
  EXPECT_GT(totals.preemptions, 0u);
  EXPECT_GT(totals.prefix_hit_tokens, 200u * GetParam().num_rounds);
  std::printf(
      "%s: %d requests, %d choices cancelled, %lu steps of %.1f rows, %lu preemptions, %lu hit "
      "tokens, "
      "%.1f us a step outside the model\n",
      GetParam().name, num_requests, num_cancelled, totals.steps,
      double(totals.step_tokens) / double(totals.steps), totals.preemptions,
      totals.prefix_hit_tokens, double(totals.step_us - totals.forward_us) / double(totals.steps));
}

INSTANTIATE_TEST_SUITE_P(
    Backends, RealModel,
    ::testing::Values(
        Target{"reference", "ref", ActivationPrecision::kF32, KvFormat::kInt8Dynamic, 3},
        Target{"reference_static_kv", "ref", ActivationPrecision::kF32, KvFormat::kInt8Static, 2},
        Target{"cpu_f32", "cpu:native", ActivationPrecision::kF32, KvFormat::kInt8Dynamic, 8},
        Target{"cpu_int8", "cpu:native", ActivationPrecision::kInt8Group, KvFormat::kInt8Dynamic,
               8},
        Target{"cpu_avx2", "cpu:avx2", ActivationPrecision::kInt8Group, KvFormat::kInt8Dynamic, 8},
        Target{"cpu_generic", "cpu:generic", ActivationPrecision::kF32, KvFormat::kInt8Static, 3}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nibble
