// A model that needs no weights: the next token is a hash of everything it may depend on (the whole
// prefix, seed, position, history, bias). Its "KV cache" holds token ids, read back through the
// block tables of a real StepBuffer, so that any wrong sharing, copying or reuse of a block shows
// in the output. fake_generate() is the same model without engine, blocks or batches: what every
// request must get. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "base/error.h"
#include "engine/executor.h"
#include "engine/sampling_params.h"
#include "engine/scheduler.h"
#include "engine/step_buffer.h"

namespace nibble {

inline uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b + 0x9E3779B97F4A7C15u + (a << 6) + (a >> 2))) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 29)) * 0x94D049BB133111EBu;
  return x ^ (x >> 32);
}

inline uint64_t hash_prefix(uint64_t state, int32_t token) {
  return mix(state, uint32_t(token) + 1u);
}
constexpr uint64_t kPrefixSeed = 12345;

/// The drawn token and a stand-in for its log-prob.
inline int32_t fake_draw(uint64_t prefix, const SampleRow& row, std::span<const TokenCount> history,
                         std::span<const TokenBias> bias, std::span<const uint64_t> mask,
                         int vocab_size) {
  if (row.forced_token >= 0) return row.forced_token;
  uint64_t state = prefix;
  if (row.temperature > 0) state = mix(mix(state, row.seed), row.position);
  uint64_t seen = 0;  // entries come in any order
  for (const TokenCount& entry : history) seen += mix(uint32_t(entry.token), entry.output_count);
  if (!history.empty()) state = mix(state, seen);
  for (int attempt = 0; attempt < 1000 * vocab_size; ++attempt) {
    const auto token = static_cast<int32_t>(state % vocab_size);
    bool banned = !mask.empty() && (mask[token / 64] >> (token % 64) & 1) == 0;
    for (const TokenBias& entry : bias) {
      banned |= entry.token == token && entry.bias == -std::numeric_limits<float>::infinity();
    }
    if (!banned) return token;
    state = mix(state, 1);
  }
  NIBBLE_CHECK(false, "every token is banned");
}

inline float fake_logprob(uint64_t prefix, int32_t token) {
  return -static_cast<float>(mix(prefix, token) % 1000) / 100;
}

/// A constraint by arithmetic: an id fits when it and the sum of those before leave the right
/// remainder. Whole from `num_tokens` ids on, and ends two later.
class FakeConstraint final : public TokenConstraint {
 public:
  FakeConstraint(int vocab_size, int num_tokens, std::set<int32_t> eos)
      : vocab_size_(vocab_size), num_tokens_(num_tokens), eos_(std::move(eos)) {}

  bool fits(int64_t sum, int32_t token) const {
    return !eos_.contains(token) && (sum + 7 * token) % 3 == 0;
  }

  std::unique_ptr<TokenMatcher> start() const override {
    class Matcher final : public TokenMatcher {
     public:
      explicit Matcher(const FakeConstraint& constraint) : constraint_(constraint) {}
      Ending fill_mask(std::span<uint64_t> allowed) override {
        std::ranges::fill(allowed, 0);
        const bool must_end = count_ >= constraint_.num_tokens_ + 2;
        for (int32_t token = 0; token < constraint_.vocab_size_ && !must_end; ++token) {
          if (constraint_.fits(sum_, token)) allowed[token / 64] |= uint64_t{1} << (token % 64);
        }
        return {.can_end = can_end(), .must_end = must_end};
      }
      bool accept(int32_t token) override {
        if (count_ >= constraint_.num_tokens_ + 2 || !constraint_.fits(sum_, token)) return false;
        sum_ += token;
        ++count_;
        return true;
      }
      bool can_end() override { return count_ >= constraint_.num_tokens_; }

     private:
      const FakeConstraint& constraint_;
      int64_t sum_ = 0;
      int count_ = 0;
    };
    return std::make_unique<Matcher>(*this);
  }

 private:
  const int vocab_size_, num_tokens_;
  const std::set<int32_t> eos_;
};

struct FakeAnswer {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs, prompt_logprobs;
  FinishReason reason = FinishReason::kLength;
};

inline FakeAnswer fake_generate(const Request& request, int index, int max_tokens,
                                const std::vector<int32_t>& eos_ids, int vocab_size) {
  const SamplingParams& params = request.params;
  FakeAnswer answer;
  uint64_t prefix = kPrefixSeed;
  std::map<int32_t, int32_t> counts;
  for (size_t i = 0; i < request.prompt_tokens.size(); ++i) {
    const int32_t token = request.prompt_tokens[i];
    if (i > 0) answer.prompt_logprobs.push_back(fake_logprob(prefix, token));
    prefix = hash_prefix(prefix, token);
    counts[token] += 0;
  }
  SampleRow row = make_sample_row(params, choice_seed(params.seed.value_or(0), index));
  const auto matcher = params.constraint != nullptr ? params.constraint->start() : nullptr;
  for (int i = 0; i < max_tokens; ++i) {
    row.position = request.prompt_tokens.size() + i;
    std::vector<TokenCount> history;
    if (params.repetition_penalty != 1 || params.presence_penalty != 0 ||
        params.frequency_penalty != 0) {
      for (const auto& [token, count] : counts) history.push_back({token, count});
    }
    std::map<int32_t, float> bias;
    for (const auto& [token, value] : params.logit_bias) bias[token] = value;
    std::set<int32_t> stops(params.stop_token_ids.begin(), params.stop_token_ids.end());
    std::set<int32_t> eos;
    if (!params.ignore_eos && matcher == nullptr) eos.insert(eos_ids.begin(), eos_ids.end());
    if (i < params.min_tokens) {
      for (const int32_t token : stops) {
        const bool may_have_to =
            matcher != nullptr && std::ranges::find(eos_ids, token) != eos_ids.end();
        if (!may_have_to) bias[token] = -std::numeric_limits<float>::infinity();
      }
      for (const int32_t token : eos) bias[token] = -std::numeric_limits<float>::infinity();
    }
    std::vector<TokenBias> biases;
    for (const auto& [token, value] : bias) biases.push_back({token, value});
    std::vector<uint64_t> mask;
    if (matcher != nullptr) {
      mask.resize((vocab_size + 63) / 64);
      const auto ending = matcher->fill_mask(mask);
      const bool may_end = ending.can_end && !params.ignore_eos && i >= params.min_tokens;
      for (const int32_t id : eos_ids) {
        if (may_end || ending.must_end) mask[id / 64] |= uint64_t{1} << (id % 64);
      }
    }
    const int32_t token = fake_draw(prefix, row, history, biases, mask, vocab_size);
    answer.tokens.push_back(token);
    answer.logprobs.push_back(fake_logprob(prefix, token));
    prefix = hash_prefix(prefix, token);
    ++counts[token];
    if (matcher != nullptr) {
      if (std::ranges::find(eos_ids, token) != eos_ids.end()) {
        answer.reason = FinishReason::kEos;
        break;
      }
      NIBBLE_CHECK(matcher->accept(token));
    }
    if (i + 1 >= params.min_tokens) {
      if (eos.contains(token)) {
        answer.reason = FinishReason::kEos;
        break;
      }
      if (stops.contains(token)) {
        answer.reason = FinishReason::kStopToken;
        break;
      }
    }
  }
  return answer;
}

class FakeExecutor final : public Executor {
 public:
  /// With `overlaps` a step may be launched before the last one is collected; its pending tokens
  /// are then taken from what that one drew, as a device does.
  FakeExecutor(const StepShape& shape, int num_blocks, bool overlaps = false)
      : shape_(with_masks(shape)), step_(shape_), overlaps_(overlaps) {
    kv_.assign(size_t(num_blocks) * shape.block_tokens, -1);
    writer_.assign(num_blocks, -1);
    history_.reserve(size_t(shape.vocab_size) + 1);
    for (Flight& flight : flights_) {
      flight.tokens.resize(shape.max_logit_rows);
      flight.logprobs.resize(shape.max_logit_rows);
      flight.top_tokens.resize(size_t(shape.max_logit_rows) * kMaxTopLogprobs);
      flight.top_logprobs.resize(flight.top_tokens.size());
    }
  }

  std::function<void()> before_step;     // may throw
  std::function<void()> before_collect;  // while the device would compute

  bool overlaps() const override { return overlaps_; }

  const StepResult& collect() override {
    NIBBLE_CHECK(num_collected_ < num_launched_);
    if (before_collect) before_collect();
    return flights_[num_collected_++ % 2].result;
  }
  const StepResult& run(const StepPlan& plan) {
    launch(plan);
    return collect();
  }

  void launch(const StepPlan& plan) override {
    NIBBLE_CHECK(num_launched_ - num_collected_ <= (overlaps_ ? 1 : 0));
    if (before_step) before_step();
    previous_ = flights_[(num_launched_ + 1) % 2].result.tokens;
    Flight& flight = flights_[num_launched_++ % 2];
    step_.build(plan);
    const StepBatch batch = step_.step_batch(step_.bytes().data());
    const SampleBatch samples = step_.sample_batch(step_.bytes().data(), nullptr);
    const int size = shape_.block_tokens;
    for (const BlockCopy& copy : plan.copies) {
      NIBBLE_CHECK(copy.from != copy.to);
      std::copy_n(kv_.begin() + size_t(copy.from) * size, size,
                  kv_.begin() + size_t(copy.to) * size);
    }
    // All writes come before all reads, as in a layer of a real model.
    std::fill(writer_.begin(), writer_.end(), -1);
    for (int s = 0; s < batch.num_seqs; ++s) {
      NIBBLE_CHECK(batch.seq_starts[s + 1] > batch.seq_starts[s]);
      for (int t = batch.seq_starts[s]; t < batch.seq_starts[s + 1]; ++t) {
        const int position = batch.positions[t];
        NIBBLE_CHECK(position == batch.kv_lens[s] - (batch.seq_starts[s + 1] - t));
        const int32_t block = batch.block_tables[s * batch.max_blocks_per_seq + position / size];
        NIBBLE_CHECK(writer_[block] == -1 || writer_[block] == s, "block {} has two writers",
                     block);
        writer_[block] = s;
        const int32_t id = batch.token_ids[t];
        NIBBLE_CHECK(id >= 0 || overlaps_);
        kv_[size_t(block) * size + position % size] = id >= 0 ? id : previous_[-1 - id];
      }
    }
    int row = 0;
    for (int s = 0; s < batch.num_seqs; ++s) {
      uint64_t prefix = kPrefixSeed;
      const int32_t* table = batch.block_tables + s * batch.max_blocks_per_seq;
      for (int position = 0; position < batch.kv_lens[s]; ++position) {
        prefix = hash_prefix(prefix, kv_[size_t(table[position / size]) * size + position % size]);
        while (row < batch.num_logit_rows && batch.logit_rows[row] < batch.seq_starts[s + 1] &&
               batch.positions[batch.logit_rows[row]] == position) {
          draw(flight, samples, row++, prefix);
        }
      }
    }
    NIBBLE_CHECK(row == batch.num_logit_rows);
    const size_t num_rows = row, num_top = num_rows * step_.max_logprobs();
    flight.result = {.tokens = std::span(flight.tokens).first(num_rows),
                     .logprobs = std::span(flight.logprobs).first(num_rows),
                     .max_logprobs = step_.max_logprobs(),
                     .top_tokens = std::span(flight.top_tokens).first(num_top),
                     .top_logprobs = std::span(flight.top_logprobs).first(num_top)};
  }

 private:
  static StepShape with_masks(StepShape shape) {
    shape.max_masks = shape.max_batch_size;
    return shape;
  }

  struct Flight {
    std::vector<int32_t> tokens, top_tokens;
    std::vector<float> logprobs, top_logprobs;
    StepResult result;
  };

  void draw(Flight& flight, const SampleBatch& samples, int r, uint64_t prefix) {
    auto& [tokens, top_tokens, logprobs, top_logprobs, result] = flight;
    const SampleRow& row = samples.rows[r];
    std::vector<TokenCount>& history = history_;
    history.assign(samples.history + row.history_begin, samples.history + row.history_end);
    if (row.pending >= 0) {
      NIBBLE_CHECK(overlaps_ && step_.counts_previous());
      const int32_t token = previous_[row.pending];
      const auto seen = std::ranges::find(history, token, &TokenCount::token);
      if (seen != history.end())
        ++seen->output_count;
      else
        history.push_back({token, 1});
    }
    const std::span bias(samples.bias + row.bias_begin, samples.bias + row.bias_end);
    std::span<const uint64_t> mask;
    if (row.mask >= 0) {
      mask = {samples.masks + size_t(row.mask) * samples.mask_words, size_t(samples.mask_words)};
    }
    tokens[r] = fake_draw(prefix, row, history, bias, mask, shape_.vocab_size);
    logprobs[r] = row.num_logprobs >= 0 ? fake_logprob(prefix, tokens[r]) : NAN;
    for (int i = 0; i < samples.max_logprobs; ++i) {
      const size_t at = size_t(r) * samples.max_logprobs + i;
      top_tokens[at] =
          i < row.num_logprobs ? static_cast<int32_t>((tokens[r] + i) % shape_.vocab_size) : -1;
      top_logprobs[at] = fake_logprob(prefix, top_tokens[at]);
    }
  }

  const StepShape shape_;
  StepBuffer step_;
  std::vector<int32_t> kv_;      // [blocks, block_tokens] token ids
  std::vector<int32_t> writer_;  // [blocks] of this step
  const bool overlaps_;
  Flight flights_[2];
  std::span<const int32_t> previous_;  // what the step before drew
  std::vector<TokenCount> history_;    // of the row at hand
  uint64_t num_launched_ = 0, num_collected_ = 0;
};

}  // namespace nibble
