// Operands of the sampling op: plain structs that CUDA sources can include too. Shapes as in
// operands.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble {

/// One row of the sampling op. Order: bias and penalties, then temperature, top_k, top_p, min_p on
/// the tempered distribution, then one draw. temperature 0 is greedy: the smallest id among the
/// maxima.
struct SampleRow {
  float temperature = 1.0f;
  float top_p = 1.0f;               // 1: off
  float min_p = 0.0f;               // 0: off
  int32_t top_k = 0;                // 0: off
  float repetition_penalty = 1.0f;  // divides positive, multiplies negative logits of seen ids
  float presence_penalty = 0.0f;    // subtracted once for ids generated
  float frequency_penalty = 0.0f;   // subtracted per count of ids generated
  uint64_t seed = 0;
  uint64_t position = 0;  // index of the token drawn in its sequence: (seed, position) keys the RNG
  int32_t history_begin = 0, history_end = 0;  // into SampleBatch::history
  int32_t bias_begin = 0, bias_end = 0;        // into SampleBatch::bias
  int32_t num_logprobs = -1;  // -1: none; k >= 0: the sampled token's and the k best
  int32_t forced_token =
      -1;             // >= 0: "drawn" whatever the logits and masks say (log-probs of a given text)
  int32_t mask = -1;  // >= 0: which of SampleBatch::masks its id must be in, besides `allowed`
  // >= 0: SampleBatch::previous_tokens[pending] has been generated too; `history` does not count it
  int32_t pending = -1;
};

struct TokenCount {
  int32_t token = 0;
  int32_t output_count = 0;  // times generated; 0: only in the prompt
};
struct TokenBias {
  int32_t token = 0;
  float bias = 0;  // added to the logit; -infinity bans
};

struct SampleBatch {
  int num_rows = 0;  // R
  int vocab_size = 0;
  const SampleRow* rows = nullptr;           // [R]
  const TokenCount* history = nullptr;       // ragged; each id once a row
  const int32_t* previous_tokens = nullptr;  // what the step before drew; read where rows say so
  const TokenBias* bias = nullptr;           // ragged; each id once a row
  const uint64_t* allowed = nullptr;         // [vocab/64 bits]; null: every id may be drawn
  // [masks, mask_words] bits of the ids that rows naming one may draw (structured output)
  const uint64_t* masks = nullptr;
  int mask_words = 0;    // ceil(vocab/64)
  int max_logprobs = 0;  // columns of the two arrays below
};

struct SampleResult {
  int32_t* tokens = nullptr;  // [R]
  float* logprobs = nullptr;  // [R] of the drawn token under softmax(raw logits); may be null
  int32_t* top_tokens =
      nullptr;  // [R, max_logprobs], best first, ties by smaller id; -1 past num_logprobs
  float* top_logprobs = nullptr;  // [R, max_logprobs]
};

}  // namespace nibble
