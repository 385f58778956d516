// Perplexity, and closeness of one model to another, by the protocol of the golden files: window k
// holds ids [k L, (k+1) L) at positions 0..L-1, nothing carried over, the remainder dropped;
// positions 1..L-1 are scored. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/progress.h"
#include "build/model_loader.h"

namespace nibble {

struct EvalOptions {
  int context = 1024;   // L
  int max_windows = 0;  // 0: all
};

struct EvalResult {
  int64_t num_windows = 0, num_scored = 0;
  double nll_mean = 0, perplexity = 0;
  std::vector<double> window_nll;  // mean of each window
  double seconds = 0;
};

struct Comparison {
  EvalResult model, other;
  double kl_mean =
      0;  // nats, KL(other || model) averaged over scored positions; other is the parent
  double top1_agreement = 0;  // share of positions where both models' best id is the same
};

/// Throws Error{kInput} when `ids` does not fill one window.
EvalResult evaluate(const LoadedModel& model, std::span<const int32_t> ids,
                    const EvalOptions& options, Progress& progress);
Comparison compare(const LoadedModel& model, const LoadedModel& other, std::span<const int32_t> ids,
                   const EvalOptions& options, Progress& progress);

}  // namespace nibble
