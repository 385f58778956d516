// SPDX-License-Identifier: Apache-2.0
#include "eval/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/error.h"
#include "base/interrupt.h"
#include "model/single_sequence.h"

namespace nibble {
namespace {

constexpr int kStepTokens = 256;  // rows of logits held at once

double log_sum_exp(std::span<const float> logits) {
  const float maximum = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double{logit} - maximum);
  return maximum + std::log(sum);
}

size_t best(std::span<const float> logits) {
  return static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

double kl_divergence(std::span<const float> p, double p_lse, std::span<const float> q,
                     double q_lse) {
  double sum = 0;
  for (size_t v = 0; v < p.size(); ++v) {
    const double log_p = p[v] - p_lse;
    sum += std::exp(log_p) * (log_p - (q[v] - q_lse));
  }
  return sum;
}

// Runs windows through one model and hands every scored row's logits to `score(model, target,
// logits)`.
class Windows {
 public:
  Windows(std::span<const int32_t> ids, const EvalOptions& options, int vocab_size)
      : ids_(ids), context_(options.context) {
    if (context_ < 2) fail(ErrorKind::kUsage, "--context is {}; it must be at least 2", context_);
    count_ = static_cast<int64_t>(ids.size()) / context_;
    if (count_ == 0) {
      fail(ErrorKind::kInput,
           "the text has {} tokens, fewer than one window of {}; give more text or a smaller "
           "--context",
           ids.size(), context_);
    }
    const auto bad =
        std::ranges::find_if(ids, [&](int32_t id) { return id < 0 || id >= vocab_size; });
    if (bad != ids.end()) {
      fail(ErrorKind::kInput,
           "token {} of the text is id {}, but the model's ids run from 0 to {}; was it made with "
           "another model's tokenizer?",
           bad - ids.begin(), *bad, vocab_size - 1);
    }
    if (options.max_windows > 0) count_ = std::min<int64_t>(count_, options.max_windows);
  }
  int64_t count() const { return count_; }
  std::span<const int32_t> window(int64_t k) const {
    return ids_.subspan(static_cast<size_t>(k * context_), static_cast<size_t>(context_));
  }

 private:
  std::span<const int32_t> ids_;
  int context_;
  int64_t count_ = 0;
};

void finish(EvalResult& result, std::chrono::steady_clock::time_point start) {
  result.nll_mean /= static_cast<double>(result.num_scored);
  result.perplexity = std::exp(result.nll_mean);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

EvalResult evaluate(const LoadedModel& model, std::span<const int32_t> ids,
                    const EvalOptions& options, Progress& progress) {
  const auto start = std::chrono::steady_clock::now();
  const Windows windows(ids, options, model.plan.spec.vocab_size);
  const auto vocab = static_cast<size_t>(model.plan.spec.vocab_size);
  SingleSequence sequence(*model.backend, model.plan, model.weights, options.context, kStepTokens);
  EvalResult result;
  result.num_windows = windows.count();
  progress.begin("evaluating", windows.count() * options.context, "tokens");
  for (int64_t k = 0; k < windows.count(); ++k) {
    throw_if_interrupted();
    const std::span<const int32_t> window = windows.window(k);
    sequence.reset();
    double nll = 0;
    for (size_t at = 0; at < window.size(); at += kStepTokens) {
      const size_t count = std::min(window.size() - at, static_cast<size_t>(kStepTokens));
      const std::span<const float> logits =
          sequence.extend(window.subspan(at, count), SingleSequence::Logits::kAll);
      for (size_t i = 0; i < count && at + i + 1 < window.size(); ++i) {
        const std::span<const float> row = logits.subspan(i * vocab, vocab);
        nll += log_sum_exp(row) - row[static_cast<size_t>(window[at + i + 1])];
      }
    }
    const auto scored = static_cast<int64_t>(window.size()) - 1;
    result.window_nll.push_back(nll / static_cast<double>(scored));
    result.nll_mean += nll;
    result.num_scored += scored;
    progress.advance((k + 1) * options.context);
  }
  progress.end();
  finish(result, start);
  return result;
}

Comparison compare(const LoadedModel& model, const LoadedModel& other, std::span<const int32_t> ids,
                   const EvalOptions& options, Progress& progress) {
  if (model.plan.spec.vocab_size != other.plan.spec.vocab_size) {
    fail(ErrorKind::kInput,
         "the two models have vocabularies of {} and {}; only models with one vocabulary compare",
         model.plan.spec.vocab_size, other.plan.spec.vocab_size);
  }
  const auto start = std::chrono::steady_clock::now();
  const Windows windows(ids, options, model.plan.spec.vocab_size);
  const auto vocab = static_cast<size_t>(model.plan.spec.vocab_size);
  SingleSequence q_sequence(*model.backend, model.plan, model.weights, options.context,
                            kStepTokens);
  SingleSequence p_sequence(*other.backend, other.plan, other.weights, options.context,
                            kStepTokens);
  Comparison result;
  progress.begin("comparing", windows.count() * options.context, "tokens");
  for (int64_t k = 0; k < windows.count(); ++k) {
    throw_if_interrupted();
    const std::span<const int32_t> window = windows.window(k);
    q_sequence.reset();
    p_sequence.reset();
    double q_nll = 0, p_nll = 0;
    for (size_t at = 0; at < window.size(); at += kStepTokens) {
      const size_t count = std::min(window.size() - at, static_cast<size_t>(kStepTokens));
      const auto q_logits =
          q_sequence.extend(window.subspan(at, count), SingleSequence::Logits::kAll);
      const auto p_logits =
          p_sequence.extend(window.subspan(at, count), SingleSequence::Logits::kAll);
      for (size_t i = 0; i < count && at + i + 1 < window.size(); ++i) {
        const auto target = static_cast<size_t>(window[at + i + 1]);
        const std::span<const float> q = q_logits.subspan(i * vocab, vocab),
                                     p = p_logits.subspan(i * vocab, vocab);
        const double q_lse = log_sum_exp(q), p_lse = log_sum_exp(p);
        q_nll += q_lse - q[target];
        p_nll += p_lse - p[target];
        result.kl_mean += kl_divergence(p, p_lse, q, q_lse);
        result.top1_agreement += best(p) == best(q);
      }
    }
    const auto scored = static_cast<int64_t>(window.size()) - 1;
    for (auto [eval, nll] : {std::pair{&result.model, q_nll}, std::pair{&result.other, p_nll}}) {
      eval->num_windows = windows.count();
      eval->window_nll.push_back(nll / static_cast<double>(scored));
      eval->nll_mean += nll;
      eval->num_scored += scored;
    }
    progress.advance((k + 1) * options.context);
  }
  progress.end();
  result.kl_mean /= static_cast<double>(result.model.num_scored);
  result.top1_agreement /= static_cast<double>(result.model.num_scored);
  finish(result.model, start);
  finish(result.other, start);
  return result;
}

}  // namespace nibble
