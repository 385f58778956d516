// One choice of one request: its tokens, how far its K/V have been computed and in which blocks,
// and what the sampling op needs to know about it. Everything is allocated when the request is made
// (on the caller's thread); the engine thread, its owner from then on, only writes into reserved
// room. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "nibble/request.h"
#include "ops/operands.h"

namespace nibble {

/// How often each id has been seen: dense entries for the sampling op, found through a small hash
/// table.
class TokenCounts {
 public:
  void reserve(size_t num_ids);  // once, before the first add
  void add(int32_t token, bool is_output);
  std::span<const TokenCount> entries() const { return entries_; }

 private:
  std::vector<TokenCount> entries_;
  std::vector<int32_t> slots_;  // power of two, at least twice the ids; -1 or an index of entries_
};

enum class SequenceState : uint8_t { kNew, kWaiting, kRunning, kFinished };

struct Sequence {
  // Identity.
  RequestId request_id = 0;
  int index = 0;               // choice
  int priority = 0;            // lower first
  uint64_t arrival = 0;        // the scheduler's order among equals
  Sequence* leader = nullptr;  // choice 0, whose prefill the siblings wait for
  std::string cache_salt;
  bool reuse_prefix = true;

  // Tokens. K/V of [0, num_computed_tokens) lie in block_table; the last token's are never there
  // yet when a token is drawn from its logits.
  std::vector<int32_t> tokens;
  int num_prompt_tokens = 0;
  int max_tokens = 0;  // to generate
  int num_computed_tokens = 0;
  int num_cached_tokens =
      -1;  // prompt tokens not computed thanks to the prefix index; -1: not started
  bool prompt_done = false;  // the whole prompt has been computed once
  std::vector<int32_t> block_table;
  int32_t root = 0;  // of its salt, in the block pool

  // Sampling.
  SampleRow row;  // position and ranges are filled in by the step buffer
  bool has_history = false;
  TokenCounts history;
  std::vector<TokenBias> bias;        // from min_tokens on
  std::vector<TokenBias> early_bias;  // before: what would stop it is banned too
  int min_tokens = 0;
  std::vector<int32_t> eos_ids;  // empty with ignore_eos, unless there is a matcher
  std::vector<int32_t> stop_ids;
  int prompt_logprobs = -1;
  std::unique_ptr<TokenMatcher>
      matcher;  // of the constraint, after all settled tokens; may be null
  bool ignore_eos = false;
  int num_scored_tokens = 0;  // prompt rows [0, num_scored) have given their log-probs

  // State, written by the scheduler alone.
  SequenceState state = SequenceState::kNew;
  std::optional<FinishReason> finish_reason;
  int32_t stop_token = -1;
  // The last token has been drawn by a step that has not been read yet: it is that step's logit row
  // `pending_row`, and a placeholder here. -1: all tokens are known.
  int pending_row = -1;
  int num_preemptions = 0;
  uint64_t last_step = 0;  // the last step it had rows in

  int num_tokens() const { return static_cast<int>(tokens.size()); }
  int num_output_tokens() const { return num_tokens() - num_prompt_tokens; }
  int num_uncomputed_tokens() const { return num_tokens() - num_computed_tokens; }
  bool is_decoding() const { return num_uncomputed_tokens() == 1 && prompt_done; }
  bool is_pending() const { return pending_row >= 0; }
  /// Whatever the pending token turns out to be, there is none after it.
  bool is_ending() const { return is_pending() && num_output_tokens() >= max_tokens; }
  bool wants_prompt_rows() const {
    return prompt_logprobs >= 0 && num_scored_tokens < num_prompt_tokens - 1;
  }
  std::span<const TokenBias> current_bias() const {
    return num_output_tokens() < min_tokens ? early_bias : bias;
  }

  /// An end-of-sequence id may come next, as far as min_tokens and ignore_eos go.
  bool may_stop_now() const { return !ignore_eos && num_output_tokens() >= min_tokens; }

  /// Makes room for the token of logit row `row` of a step that has been launched.
  void append_pending(int row);
  /// Nobody will hear of it.
  void drop_pending();
  /// The pending token is this one; says whether that ends the sequence. kError: it does not fit
  /// the constraint, because no id did; it is not kept.
  std::optional<FinishReason> settle(int32_t token);
};

/// What the engine adds to a request to make its sequences.
struct SequenceDefaults {
  std::span<const int32_t> eos_ids;
  int max_tokens = 0;  // resolved
  int block_tokens = 0;
  uint64_t seed = 0;
};

/// The sequence of choice `index`; everything it will ever hold is allocated here.
Sequence make_sequence(const Request& request, RequestId id, int index,
                       const SequenceDefaults& defaults);

}  // namespace nibble
