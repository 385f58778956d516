// SPDX-License-Identifier: Apache-2.0
#include "backends/reference/reference_sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ops/sample_rng.h"

namespace nibble::reference {
namespace {

// Log-probabilities are those of the model itself: before bias, penalties, temperature and filters.
void write_logprobs(const SampleBatch& batch, int r, const std::vector<float>& raw, int32_t token,
                    const SampleResult& result) {
  const float maximum = *std::max_element(raw.begin(), raw.end());
  double sum = 0;
  for (const float logit : raw) sum += std::exp(double{logit} - maximum);
  const double log_sum = maximum + std::log(sum);
  if (result.logprobs != nullptr)
    result.logprobs[r] = static_cast<float>(raw[static_cast<size_t>(token)] - log_sum);
  if (batch.max_logprobs == 0) return;
  const int wanted = std::min(std::max(batch.rows[r].num_logprobs, 0), batch.max_logprobs);
  std::vector<int32_t> order(raw.size());
  std::iota(order.begin(), order.end(), 0);
  const int kept = std::min(wanted, static_cast<int>(raw.size()));
  std::partial_sort(order.begin(), order.begin() + kept, order.end(), [&](int32_t a, int32_t b) {
    const float x = raw[static_cast<size_t>(a)], y = raw[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (int j = 0; j < batch.max_logprobs; ++j) {
    const int64_t at = int64_t{r} * batch.max_logprobs + j;
    result.top_tokens[at] = j < kept ? order[static_cast<size_t>(j)] : -1;
    result.top_logprobs[at] =
        j < kept
            ? static_cast<float>(raw[static_cast<size_t>(order[static_cast<size_t>(j)])] - log_sum)
            : -INFINITY;
  }
}

void apply_bias_and_penalties(const SampleBatch& batch, const SampleRow& row, float* logits) {
  const auto penalize = [&](int32_t token, int32_t output_count) {
    float& logit = logits[token];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (output_count > 0) {
      logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(output_count);
    }
  };
  const int32_t pending = row.pending >= 0 ? batch.previous_tokens[row.pending] : -1;
  bool is_new = pending >= 0;
  for (int i = row.history_begin; i < row.history_end; ++i) {
    const TokenCount& seen = batch.history[i];
    const bool again = seen.token == pending;
    penalize(seen.token, seen.output_count + (again ? 1 : 0));
    is_new = is_new && !again;
  }
  if (is_new) penalize(pending, 1);
  for (int i = row.bias_begin; i < row.bias_end; ++i)
    logits[batch.bias[i].token] += batch.bias[i].bias;
  if (batch.allowed != nullptr) {
    for (int v = 0; v < batch.vocab_size; ++v) {
      if ((batch.allowed[v / 64] >> (v % 64) & 1) == 0) logits[v] = -INFINITY;
    }
  }
  if (row.mask >= 0) {
    const uint64_t* mask = batch.masks + int64_t{row.mask} * batch.mask_words;
    for (int v = 0; v < batch.vocab_size; ++v) {
      if ((mask[v / 64] >> (v % 64) & 1) == 0) logits[v] = -INFINITY;
    }
  }
}

int32_t draw(const SampleRow& row, int vocab_size, const float* logits) {
  const auto best = std::max_element(logits, logits + vocab_size);  // the first among equals
  if (row.temperature <= 0 || *best == -INFINITY) return static_cast<int32_t>(best - logits);

  std::vector<int32_t> order(static_cast<size_t>(vocab_size));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (row.top_k > 0 && row.top_k < vocab_size) order.resize(static_cast<size_t>(row.top_k));

  // Probabilities relative to the best id, after temperature, over what top_k kept.
  std::vector<double> weight(order.size());
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    weight[i] = std::exp((double{logits[order[i]]} - *best) / row.temperature);
    total += weight[i];
  }
  size_t kept = order.size();
  if (row.top_p < 1.0f) {  // the smallest set whose probability reaches top_p, at least one id
    double cumulative = 0;
    for (kept = 0; kept < order.size() && (kept == 0 || cumulative < double{row.top_p} * total);) {
      cumulative += weight[kept++];
    }
  }
  if (row.min_p > 0) {
    while (kept > 1 && weight[kept - 1] < double{row.min_p}) --kept;
  }
  // The draw walks the kept ids in order of id, so that it needs no sort where no filter is on.
  std::vector<std::pair<int32_t, double>> candidates;
  total = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (weight[i] <= 0) continue;
    candidates.emplace_back(order[i], weight[i]);
    total += weight[i];
  }
  std::sort(candidates.begin(), candidates.end());
  const double target = double{sample_uniform(row.seed, row.position)} * total;
  double cumulative = 0;
  for (const auto& [token, probability] : candidates) {
    cumulative += probability;
    if (target < cumulative) return token;
  }
  return candidates.back().first;
}

}  // namespace

void sample_row(const SampleBatch& batch, int r, float* logits, const SampleResult& result) {
  const SampleRow& row = batch.rows[r];
  const std::vector<float> raw(logits, logits + batch.vocab_size);
  apply_bias_and_penalties(batch, row, logits);
  const int32_t token =
      row.forced_token >= 0 ? row.forced_token : draw(row, batch.vocab_size, logits);
  result.tokens[r] = token;
  if (row.num_logprobs >= 0) write_logprobs(batch, r, raw, token, result);
}

}  // namespace nibble::reference
