// The sampling op of one row: the reference's semantics (SampleRow) without sorting the vocabulary.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "backends/cpu/kernels.h"
#include "ops/operands.h"

namespace nibble::cpu {

/// Scratch of one thread; grows to the vocabulary once.
struct SampleScratch {
  struct Candidate {
    float logit;
    int32_t token;
    float weight;
  };
  std::vector<float> raw, weights;
  std::vector<float> block_max;
  std::vector<Candidate> candidates;
  void reserve(int vocab_size);
};

/// Overwrites `logits` [vocab]; writes row `r` of `result`.
void sample_row(const Kernels& kernels, const SampleBatch& batch, int r, float* logits,
                const SampleResult& result, SampleScratch& scratch);

}  // namespace nibble::cpu
