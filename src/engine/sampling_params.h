// Checks a request against the engine's limits and turns its SamplingParams into what the sampling
// op eats. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "nibble/request.h"
#include "ops/operands.h"

namespace nibble {

/// What a request is measured against.
struct RequestLimits {
  int max_input_len = 0;
  int max_output_len = 0;
  int max_seq_len = 0;  // <= input + output; less when the KV cache is smaller
  int64_t kv_cache_tokens = 0;
  int vocab_size = 0;
  std::vector<uint64_t> allowed_tokens = {};  // bit per id that may be drawn; empty: all
  std::vector<int32_t> eos_ids = {};
};

/// Throws Error{kLimit} or Error{kInput} with the value seen and the values wanted.
void check_request(const Request& request, const RequestLimits& limits);

/// max_tokens, or as many as fit when the request does not say.
int resolve_max_tokens(const Request& request, const RequestLimits& limits);

/// The seed of choice `index`: choice 0 draws as n = 1 would.
uint64_t choice_seed(uint64_t seed, int index);

/// The row of the sampling op but for position and ragged ranges.
SampleRow make_sample_row(const SamplingParams& params, uint64_t seed);

/// True when the op needs the counts of the tokens seen so far.
bool needs_history(const SamplingParams& params);

/// logit_bias with each id once (the last wins); `banned` ids get -infinity.
std::vector<TokenBias> make_bias(const SamplingParams& params, std::span<const int32_t> banned);

}  // namespace nibble
