// SPDX-License-Identifier: Apache-2.0
#include "engine/sharing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>
#include <list>
#include <map>
#include <random>
#include <thread>

#include "build/model_loader.h"
#include "engine/collector.h"
#include "engine/engine_parts.h"
#include "engine/sampling_params.h"
#include "formats/synthetic.h"
#include "model/single_sequence.h"
#include "nibble/engine.h"

namespace nibble {
namespace {

constexpr int kMaxOutput = 40, kMaxTail = 30;

LoadedModel load(const Sharing& sharing, const EngineLimits& limits) {
  LoadOptions options;
  options.build.target = sharing.target;
  options.build.limits = limits;
  options.build.kv_format = sharing.kv_format;
  options.build.kv_block_tokens = sharing.block_tokens;
  options.build.activation_precision = sharing.precision;
  options.num_threads = 1;
  return load_source(open_synthetic(sharing.spec, 5), options);
}

/// A prompt that continues an answer to another.
int longest_input(const Sharing& sharing) {
  return sharing.stem_tokens + kMaxOutput + 2 * kMaxTail;
}

std::vector<uint64_t> allowed_tokens(int vocab) {
  std::vector<uint64_t> mask(static_cast<size_t>(vocab) / 64, ~uint64_t{0});
  for (const int token : {0, 1, 100, 101, 102}) mask[token / 64] &= ~(uint64_t{1} << token % 64);
  return mask;
}

struct Drawn {
  int32_t token = -1;
  float logprob = NAN;
};

/// One request at a time, with no engine.
class Alone {
 public:
  struct Step {
    Drawn own, told;     // what would have been drawn, and the token that was
    double missing = 0;  // what the latter's logit lacks to the best, penalties and bias included
  };
  struct Answer {
    std::vector<Step> steps;
    std::vector<float> prompt_logprobs;
  };

  explicit Alone(const Sharing& sharing)
      : vocab_(sharing.spec.vocab_size),
        model_(load(sharing, {.max_batch_size = 1,
                              .max_input_len = longest_input(sharing) + kMaxOutput,
                              .max_output_len = 1,
                              .max_num_tokens = longest_input(sharing) + kMaxOutput})),
        sequence_(*model_.backend, model_.plan, model_.weights, longest_input(sharing) + kMaxOutput,
                  longest_input(sharing) + kMaxOutput) {
    Backend& backend = *model_.backend;
    const auto mask = allowed_tokens(vocab_);
    allowed_ = backend.alloc(mask.size() * sizeof(uint64_t));
    backend.upload(allowed_.data(), mask.data(), allowed_.bytes());
    row_ = backend.alloc(sizeof(SampleRow));
    history_ = backend.alloc(static_cast<size_t>(vocab_) * sizeof(TokenCount));
    bias_ = backend.alloc(static_cast<size_t>(vocab_) * sizeof(TokenBias));
    logits_ = backend.alloc(static_cast<size_t>(vocab_) * sizeof(float));
    token_ = backend.alloc(sizeof(int32_t));
    logprob_ = backend.alloc(sizeof(float));
    backend.sync();
  }

  /// The request's choice `index`, led along `told`, the tokens it got from the engine.
  Answer follow(const Request& request, int index, std::span<const int32_t> told) {
    const SamplingParams& params = request.params;
    Answer answer;
    const auto& prompt = request.prompt_tokens;
    std::map<int32_t, int32_t> counts;
    for (const int32_t token : prompt) counts[token] += 0;
    sequence_.reset();
    std::vector<float> logits;
    if (params.prompt_logprobs >= 0 && index == 0) {
      const auto all = sequence_.extend(prompt, SingleSequence::Logits::kAll);
      for (size_t i = 1; i < prompt.size(); ++i) {
        const auto row = all.begin() + static_cast<std::ptrdiff_t>(i - 1) * vocab_;
        answer.prompt_logprobs.push_back(
            draw({.temperature = 0, .num_logprobs = 0, .forced_token = prompt[i]},
                 {row, row + vocab_}, {}, {})
                .logprob);
      }
      logits.assign(all.end() - vocab_, all.end());
    } else {
      const auto last = sequence_.extend(prompt, SingleSequence::Logits::kLast);
      logits.assign(last.begin(), last.end());
    }
    SampleRow row = make_sample_row(params, choice_seed(*params.seed, index));
    row.num_logprobs = 0;
    for (const int32_t token : told) {
      row.position = prompt.size() + answer.steps.size();
      std::vector<TokenCount> history;
      if (needs_history(params)) {
        for (const auto& [seen, count] : counts) history.push_back({seen, count});
      }
      std::vector<TokenBias> bias;
      for (const auto& [biased, value] : params.logit_bias) bias.push_back({biased, value});
      row.forced_token = -1;
      const Drawn own = draw(row, logits, history, bias);
      row.forced_token = token;
      answer.steps.push_back(
          {own, draw(row, logits, history, bias), missing(params, logits, history, token)});
      ++counts[token];
      const auto next = sequence_.extend(std::span(&token, 1), SingleSequence::Logits::kLast);
      logits.assign(next.begin(), next.end());
    }
    return answer;
  }

 private:
  /// The sampling op's penalties and bias once more, in doubles.
  double missing(const SamplingParams& params, const std::vector<float>& logits,
                 const std::vector<TokenCount>& history, int32_t token) const {
    std::vector<double> adjusted(logits.begin(), logits.end());
    for (const auto& [seen, count] : history) {
      double& logit = adjusted[static_cast<size_t>(seen)];
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
      if (count > 0) logit -= params.presence_penalty + params.frequency_penalty * count;
    }
    for (const auto& [biased, value] : params.logit_bias)
      adjusted[static_cast<size_t>(biased)] += value;
    const auto allowed = allowed_tokens(vocab_);
    double best = -INFINITY;
    for (size_t v = 0; v < adjusted.size(); ++v) {
      if (allowed[v / 64] >> (v % 64) & 1) best = std::max(best, adjusted[v]);
    }
    return best - adjusted[static_cast<size_t>(token)];
  }

  template <typename T>
  T* upload(const Buffer& to, const std::vector<T>& from) {
    if (!from.empty()) model_.backend->upload(to.data(), from.data(), from.size() * sizeof(T));
    return to.as<T>();
  }

  Drawn draw(SampleRow row, const std::vector<float>& logits,
             const std::vector<TokenCount>& history, const std::vector<TokenBias>& bias) {
    Backend& backend = *model_.backend;
    row.history_end = static_cast<int32_t>(history.size());
    row.bias_end = static_cast<int32_t>(bias.size());
    const std::vector<SampleRow> rows = {row};
    backend.sample({.num_rows = 1,
                    .vocab_size = vocab_,
                    .rows = upload(row_, rows),
                    .history = upload(history_, history),
                    .bias = upload(bias_, bias),
                    .allowed = allowed_.as<uint64_t>()},
                   upload(logits_, logits),
                   {.tokens = token_.as<int32_t>(), .logprobs = logprob_.as<float>()});
    Drawn drawn;
    backend.download(&drawn.token, token_.data(), sizeof drawn.token);
    backend.download(&drawn.logprob, logprob_.data(), sizeof drawn.logprob);
    backend.sync();
    return drawn;
  }

  int vocab_;
  LoadedModel model_;
  SingleSequence sequence_;
  Buffer allowed_, row_, history_, bias_, logits_, token_, logprob_;
};

/// What the engine told against what the request gets alone.
class Judge {
 public:
  explicit Judge(double tolerance) : tolerance_(tolerance) {}

  void expect_same(const Request& request, const Collector::Choice& told,
                   const Alone::Answer& alone) {
    ASSERT_EQ(told.logprobs.size(), told.tokens.size());
    for (size_t i = 0; i < told.tokens.size(); ++i) {
      const auto& [own, told_alone, missing] = alone.steps[i];
      expect_close(told.logprobs[i], told_alone.logprob);
      if (tolerance_ == 0) {
        EXPECT_EQ(told.tokens[i], own.token) << "token " << i;
      }
      if (request.params.temperature > 0) continue;
      // Two logits may each be off, and penalties stretch them.
      EXPECT_LE(missing, 3 * tolerance_ + 1e-5) << "token " << i;
      num_other_tokens_ += told.tokens[i] != own.token;
    }
    ASSERT_LE(told.prompt_logprobs.size(), alone.prompt_logprobs.size());
    for (size_t i = 0; i < told.prompt_logprobs.size(); ++i)
      expect_close(told.prompt_logprobs[i], alone.prompt_logprobs[i]);
    num_tokens_ += static_cast<int>(told.tokens.size());
  }
  /// A wrong block would move few log-probs far, or many a little.
  void expect_small_on_average() const {
    if (tolerance_ > 0) {
      EXPECT_LT(root_mean_square(), tolerance_ / 3);
    }
  }
  double root_mean_square() const { return std::sqrt(squares_ / std::max(num_compared_, 1)); }
  double largest_difference() const { return largest_; }
  int num_other_tokens() const { return num_other_tokens_; }
  int num_tokens() const { return num_tokens_; }

 private:
  void expect_close(float a, float b) {
    if (tolerance_ == 0) {
      EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0) << a << " and " << b;
    } else {
      const double difference = double{a} - double{b};
      EXPECT_NEAR(a, b, tolerance_);
      largest_ = std::max(largest_, std::fabs(difference));
      squares_ += difference * difference;
      ++num_compared_;
    }
  }
  double tolerance_, largest_ = 0, squares_ = 0;
  int num_other_tokens_ = 0, num_tokens_ = 0, num_compared_ = 0;
};

std::unique_ptr<Engine> make_engine(const Sharing& sharing, const EngineLimits& limits,
                                    int num_kv_blocks) {
  auto model = std::make_shared<LoadedModel>(load(sharing, limits));
  EngineParts parts;
  parts.plan = model->plan;
  parts.backend = std::move(model->backend);
  parts.weights = model->weights;
  parts.num_kv_blocks = num_kv_blocks;
  parts.allowed_tokens = allowed_tokens(sharing.spec.vocab_size);
  parts.num_prompt_logprob_rows = 11;
  parts.tensors = std::move(model);
  return Engine::create(std::move(parts));
}

}  // namespace

void expect_as_alone(const Sharing& sharing) {
  const int vocab = sharing.spec.vocab_size;
  Alone alone(sharing);
  Judge judge(sharing.tolerance);
  std::mt19937 random(17);
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const auto allowed = allowed_tokens(vocab);
  EngineStats totals;
  int num_requests = 0, num_cancelled = 0;
  for (int round = 0; round < sharing.num_rounds; ++round) {
    // In even rounds the first sink holds the engine until all have arrived: a full house, and the
    // same one each time.
    const bool is_full_house = round % 2 == 0;
    std::promise<void> all_arrived;
    const auto arrived = all_arrived.get_future().share();
    const int max_batch_size =
        is_full_house ? sharing.max_batch_size : 1 + pick(sharing.max_batch_size);
    const EngineLimits limits{
        .max_batch_size = max_batch_size,
        .max_input_len = longest_input(sharing),
        .max_output_len = kMaxOutput,
        .max_num_tokens = max_batch_size + pick(pick(2) ? 16 : sharing.stem_tokens)};
    auto engine = make_engine(sharing, limits, sharing.num_blocks + pick(4));
    std::list<std::pair<Request, Collector>> items;
    std::vector<int32_t> stem(static_cast<size_t>(sharing.stem_tokens));
    for (int32_t& token : stem) token = pick(vocab);
    for (int i = 0; i < sharing.num_requests; ++i) {
      auto& [request, collector] = items.emplace_back();
      // Chats over the same beginning, each going its own way after a while; some continue an
      // earlier answer.
      request.prompt_tokens.assign(stem.begin(), stem.begin() + 1 + pick(sharing.stem_tokens));
      if (pick(3) == 0 && items.size() > 1 && !is_full_house) {
        auto& [earlier, told] = items.front();
        ASSERT_TRUE(told.wait());
        request.prompt_tokens = earlier.prompt_tokens;
        const auto tokens = told.choice().tokens;
        request.prompt_tokens.insert(request.prompt_tokens.end(), tokens.begin(), tokens.end());
      }
      for (int n = pick(kMaxTail); n > 0; --n) request.prompt_tokens.push_back(pick(vocab));
      request.max_tokens = 1 + pick(kMaxOutput);
      SamplingParams& params = request.params;
      params.temperature = pick(2) ? 0.0f : 0.8f;
      params.seed = pick(1 << 20);
      params.ignore_eos = true;
      params.logprobs = 0;
      if (pick(3) == 0) params.top_k = 20;
      if (pick(3) == 0) params.top_p = 0.9f;
      if (pick(3) == 0) params.repetition_penalty = 1.3f;
      if (pick(3) == 0) params.frequency_penalty = 0.4f;
      if (pick(3) == 0) params.logit_bias = {{pick(vocab), -INFINITY}};
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
      if (items.size() > 1 && pick(8) == 0) {
        if (!is_full_house && pick(2)) {
          ASSERT_TRUE(collector.wait_for_tokens(1));
        }
        engine->cancel(submitted.id);
      }
      if (pick(2)) std::this_thread::sleep_for(std::chrono::milliseconds(pick(3)));
    }
    all_arrived.set_value();
    for (auto& [request, collector] : items) {
      ASSERT_TRUE(collector.wait());
      for (int i = 0; i < request.params.n; ++i) {
        SCOPED_TRACE(testing::Message() << "round " << round << ", request " << num_requests
                                        << " in all, choice " << i);
        const auto told = collector.choice(i);
        if (told.reason == FinishReason::kCancelled) {
          ++num_cancelled;
          ASSERT_LE(told.tokens.size(), static_cast<size_t>(request.max_tokens.value()));
        } else {
          ASSERT_EQ(told.reason, FinishReason::kLength) << told.error;
          ASSERT_EQ(told.tokens.size(), static_cast<size_t>(request.max_tokens.value()));
        }
        const auto expected = alone.follow(request, i, told.tokens);
        if (told.reason != FinishReason::kCancelled) {
          ASSERT_EQ(told.prompt_logprobs.size(), expected.prompt_logprobs.size());
        }
        judge.expect_same(request, told, expected);
        if (testing::Test::HasFailure()) return;
        for (const int32_t token : told.tokens) {
          ASSERT_TRUE(allowed[static_cast<size_t>(token) / 64] >> (token % 64) & 1) << token;
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
  judge.expect_small_on_average();
  EXPECT_GT(totals.preemptions, 0u);
  EXPECT_GT(num_cancelled, 0);
  EXPECT_GT(totals.prefix_hit_tokens, 200u * static_cast<unsigned>(sharing.num_rounds));
  std::printf(
      "%d requests, %d choices cancelled, %lu steps of %.1f rows, %lu preemptions, %lu hit tokens, "
      "%.1f us a step outside the model; log-probs within %.2e (%.2e rms), %d greedy ones of %d "
      "tokens others than alone\n",
      num_requests, num_cancelled, totals.steps,
      static_cast<double>(totals.step_tokens) / static_cast<double>(totals.steps),
      totals.preemptions, totals.prefix_hit_tokens,
      static_cast<double>(totals.step_us - totals.forward_us) / static_cast<double>(totals.steps),
      judge.largest_difference(), judge.root_mean_square(), judge.num_other_tokens(),
      judge.num_tokens());
}

}  // namespace nibble
