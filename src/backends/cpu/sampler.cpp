// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/sample_rng.h"

namespace nibble::cpu {
namespace {

constexpr int kBlock = 256;  // logits a block maximum covers; also the length of one float sum
// exp() of the kernels never returns 0; smaller weights than this are impossible tokens (logit
// -infinity).
constexpr float kNoWeight = 1e-30f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

using Candidate = SampleScratch::Candidate;

// Higher logit first, ties by smaller id: the order of the specification.
bool better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

/// Ids whose bit is not set become impossible.
void apply_mask(const uint64_t* mask, int vocab_size, float* logits) {
  for (int word = 0; word * 64 < vocab_size; ++word) {
    if (mask[word] == ~uint64_t{0}) continue;
    const int end = std::min(vocab_size, word * 64 + 64);
    if (mask[word] == 0) {
      std::fill(logits + word * 64, logits + end, kMinusInfinity);
      continue;
    }
    for (int v = word * 64; v < end; ++v) {
      if ((mask[word] >> (v % 64) & 1) == 0) logits[v] = kMinusInfinity;
    }
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
  if (batch.allowed != nullptr) apply_mask(batch.allowed, batch.vocab_size, logits);
  if (row.mask >= 0) {
    apply_mask(batch.masks + int64_t{row.mask} * batch.mask_words, batch.vocab_size, logits);
  }
}

int32_t first_of(const float* logits, int n, float value) {
  return static_cast<int32_t>(std::find(logits, logits + n, value) - logits);
}

/// candidates = the `count` best, best first. Any `count` blocks' maxima are `count` logits, so the
/// count-th largest block maximum bounds the count-th largest logit from below: one more pass
/// collects few ids.
void select_best(const Kernels& kernels, const float* logits, int n, int count, SampleScratch& s) {
  s.candidates.clear();
  count = std::min(count, n);
  if (count <= 0) return;
  float threshold = kMinusInfinity;
  const int num_blocks = (n + kBlock - 1) / kBlock;
  if (count <= num_blocks) {
    s.block_max.clear();
    for (int b = 0; b < num_blocks; ++b) {
      s.block_max.push_back(kernels.max(logits + b * kBlock, std::min(kBlock, n - b * kBlock)));
    }
    std::nth_element(s.block_max.begin(), s.block_max.begin() + (count - 1), s.block_max.end(),
                     std::greater<>());
    threshold = s.block_max[static_cast<size_t>(count - 1)];
  }
  for (int v = 0; v < n; ++v) {
    if (logits[v] >= threshold) s.candidates.push_back({logits[v], v, 0});
  }
  if (static_cast<int>(s.candidates.size()) > count) {
    std::nth_element(s.candidates.begin(), s.candidates.begin() + (count - 1), s.candidates.end(),
                     better);
    s.candidates.resize(static_cast<size_t>(count));
  }
  std::sort(s.candidates.begin(), s.candidates.end(), better);
}

/// weights[v] = exp((logits[v] - best) / temperature); returns their sum.
double weigh(const Kernels& kernels, const float* logits, int n, float best, float temperature,
             float* weights) {
  double total = 0;
  for (int v = 0; v < n; v += kBlock) {
    total +=
        kernels.exp_sum(logits + v, best, 1.0f / temperature, std::min(kBlock, n - v), weights + v);
  }
  return total;
}

/// Number of leading candidates (sorted, weighted) that top_p of `total` and min_p keep, at least
/// one.
size_t keep_count(const SampleRow& row, const std::vector<Candidate>& candidates, double total) {
  size_t kept = candidates.size();
  if (row.top_p < 1.0f) {
    double cumulative = 0;
    for (kept = 0;
         kept < candidates.size() && (kept == 0 || cumulative < double{row.top_p} * total);) {
      cumulative += candidates[kept++].weight;
    }
  }
  if (row.min_p > 0) {
    while (kept > 1 && candidates[kept - 1].weight < row.min_p) --kept;
  }
  return kept;
}

/// The worst id that top_p keeps. The ids are binned by logit, bins are added best first until they
/// hold top_p of the mass, and only the bin where that happens is sorted: linear in the vocabulary
/// however flat the distribution.
Candidate top_p_cut(const SampleRow& row, int n, const float* logits, float best, double total,
                    SampleScratch& s) {
  constexpr int kBins = 2048;
  double mass[kBins] = {};
  const float bins_per_logit =
      32.0f / row.temperature;  // 32 bins a factor e of weight; the last one takes the rest
  const auto bin_of = [&](int v) {
    return static_cast<int>(std::min((best - logits[v]) * bins_per_logit, kBins - 1.0f));
  };
  for (int v = 0; v < n; ++v) {
    if (s.weights[static_cast<size_t>(v)] >= kNoWeight)
      mass[bin_of(v)] += s.weights[static_cast<size_t>(v)];
  }
  const double wanted = double{row.top_p} * total;
  double cumulative = 0;
  int bin = 0, last_filled = 0;
  for (; bin < kBins; ++bin) {
    if (mass[bin] > 0) last_filled = bin;
    if (mass[bin] > 0 && cumulative + mass[bin] >= wanted) break;
    cumulative += mass[bin];
  }
  if (bin == kBins) {  // rounding left the sum short: the last bin that holds anything
    bin = last_filled;
    cumulative = 0;
    for (int b = 0; b < bin; ++b) cumulative += mass[b];
  }
  s.candidates.clear();
  for (int v = 0; v < n; ++v) {
    const float w = s.weights[static_cast<size_t>(v)];
    if (w >= kNoWeight && bin_of(v) == bin) s.candidates.push_back({logits[v], v, w});
  }
  std::sort(s.candidates.begin(), s.candidates.end(), better);
  for (const Candidate& c : s.candidates) {
    cumulative += c.weight;
    if (cumulative >= wanted) return c;
  }
  return s.candidates.back();
}

int32_t draw(const Kernels& kernels, const SampleRow& row, int n, const float* logits,
             SampleScratch& s) {
  const float best = kernels.max(logits, n);
  if (row.temperature <= 0 || best == kMinusInfinity) return first_of(logits, n, best);
  const double uniform = double{sample_uniform(row.seed, row.position)};

  const bool top_k = row.top_k > 0 && row.top_k < n;
  if (!top_k && !(row.top_p < 1.0f) && !(row.min_p > 0)) {  // no filter: walk the ids
    const double target =
        uniform * weigh(kernels, logits, n, best, row.temperature, s.weights.data());
    double cumulative = 0;
    int32_t last = 0;
    for (int v = 0; v < n; ++v) {
      if (s.weights[static_cast<size_t>(v)] < kNoWeight) continue;
      cumulative += s.weights[static_cast<size_t>(v)];
      last = v;
      if (target < cumulative) return v;
    }
    return last;
  }

  if (top_k) {
    select_best(kernels, logits, n, row.top_k, s);
    double total = 0;
    for (Candidate& c : s.candidates) {
      kernels.exp_sum(&c.logit, best, 1.0f / row.temperature, 1, &c.weight);
      total += c.weight;
    }
    s.candidates.resize(keep_count(row, s.candidates, total));
    std::sort(s.candidates.begin(), s.candidates.end(),
              [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  } else {
    const double total = weigh(kernels, logits, n, best, row.temperature, s.weights.data());
    Candidate cut{kMinusInfinity, n, 0};
    if (row.top_p < 1.0f) cut = top_p_cut(row, n, logits, best, total, s);
    const Candidate first{best, first_of(logits, n, best), 1.0f};
    s.candidates.clear();
    for (int v = 0; v < n; ++v) {
      const Candidate c{logits[v], v, s.weights[static_cast<size_t>(v)]};
      const bool kept = c.weight >= kNoWeight && c.weight >= row.min_p && !better(cut, c);
      if (kept || v == first.token) s.candidates.push_back(c);
    }
  }
  double total = 0;
  for (const Candidate& c : s.candidates) total += c.weight < kNoWeight ? 0 : c.weight;
  const double target = uniform * total;
  double cumulative = 0;
  int32_t last = s.candidates.front().token;
  for (const Candidate& c : s.candidates) {
    if (c.weight < kNoWeight) continue;
    cumulative += c.weight;
    last = c.token;
    if (target < cumulative) break;
  }
  return last;
}

}  // namespace

void SampleScratch::reserve(int vocab_size) {
  const auto n = static_cast<size_t>(vocab_size);
  if (weights.size() >= n) return;
  raw.resize(n);
  weights.resize(n);
  block_max.reserve(n / kBlock + 1);
  candidates.reserve(n);
}

void sample_row(const Kernels& kernels, const SampleBatch& batch, int r, float* logits,
                const SampleResult& result, SampleScratch& s) {
  const SampleRow& row = batch.rows[r];
  const int n = batch.vocab_size;
  s.reserve(n);
  const bool logprobs = row.num_logprobs >= 0;
  if (logprobs) std::copy(logits, logits + n, s.raw.begin());
  apply_bias_and_penalties(batch, row, logits);
  const int32_t token = row.forced_token >= 0 ? row.forced_token : draw(kernels, row, n, logits, s);
  result.tokens[r] = token;
  if (!logprobs) return;

  // Log-probabilities are the model's own: before bias, penalties, temperature and filters.
  const float best = kernels.max(s.raw.data(), n);
  const double sum = weigh(kernels, s.raw.data(), n, best, 1.0f, s.weights.data());
  const double log_sum = best + std::log(sum);
  if (result.logprobs != nullptr) {
    result.logprobs[r] = static_cast<float>(s.raw[static_cast<size_t>(token)] - log_sum);
  }
  if (batch.max_logprobs == 0) return;
  select_best(kernels, s.raw.data(), n, std::min(row.num_logprobs, batch.max_logprobs), s);
  for (int j = 0; j < batch.max_logprobs; ++j) {
    const int64_t at = int64_t{r} * batch.max_logprobs + j;
    const bool have = j < static_cast<int>(s.candidates.size());
    result.top_tokens[at] = have ? s.candidates[static_cast<size_t>(j)].token : -1;
    result.top_logprobs[at] =
        have ? static_cast<float>(s.candidates[static_cast<size_t>(j)].logit - log_sum)
             : kMinusInfinity;
  }
}

}  // namespace nibble::cpu
