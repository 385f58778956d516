// SPDX-License-Identifier: Apache-2.0
#include "engine/sequence.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "engine/sampling_params.h"

namespace nibble {

void TokenCounts::reserve(size_t num_ids) {
  entries_.reserve(num_ids);
  slots_.assign(std::bit_ceil(num_ids * 2 + 1), -1);
}

void TokenCounts::add(int32_t token, bool is_output) {
  const size_t mask = slots_.size() - 1;
  size_t slot = (static_cast<uint32_t>(token) * 0x9E3779B1u) & mask;
  while (slots_[slot] >= 0 && entries_[slots_[slot]].token != token) slot = (slot + 1) & mask;
  if (slots_[slot] < 0) {
    NIBBLE_CHECK(entries_.size() < entries_.capacity(), "more ids than reserved");
    slots_[slot] = static_cast<int32_t>(entries_.size());
    entries_.push_back({token, 0});
  }
  entries_[slots_[slot]].output_count += is_output;
}

void Sequence::append_pending(int row) {
  NIBBLE_CHECK(tokens.size() < tokens.capacity() && !is_pending());
  tokens.push_back(-1);
  pending_row = row;
}

void Sequence::drop_pending() {
  if (is_pending()) tokens.pop_back();
  pending_row = -1;
}

std::optional<FinishReason> Sequence::settle(int32_t token) {
  NIBBLE_CHECK(is_pending());
  tokens.back() = token;
  pending_row = -1;
  const bool is_eos = std::ranges::find(eos_ids, token) != eos_ids.end();
  if (matcher != nullptr && !(is_eos ? matcher->can_end() : matcher->accept(token))) {
    tokens.pop_back();
    return FinishReason::kError;
  }
  if (has_history) history.add(token, true);
  const bool may_stop = num_output_tokens() >= min_tokens;
  if (is_eos && (may_stop || matcher != nullptr)) {
    stop_token = token;
    return FinishReason::kEos;
  }
  if (may_stop && std::ranges::find(stop_ids, token) != stop_ids.end()) {
    stop_token = token;
    return FinishReason::kStopToken;
  }
  if (num_output_tokens() >= max_tokens) return FinishReason::kLength;
  return std::nullopt;
}

Sequence make_sequence(const Request& request, RequestId id, int index,
                       const SequenceDefaults& defaults) {
  const SamplingParams& params = request.params;
  Sequence seq;
  seq.request_id = id;
  seq.index = index;
  seq.priority = request.priority;
  seq.cache_salt = request.cache_salt;
  seq.reuse_prefix = request.reuse_prefix;

  seq.num_prompt_tokens = static_cast<int>(request.prompt_tokens.size());
  seq.max_tokens = defaults.max_tokens;
  const size_t capacity = request.prompt_tokens.size() + std::max(defaults.max_tokens, 1);
  seq.tokens.reserve(capacity);
  seq.tokens.assign(request.prompt_tokens.begin(), request.prompt_tokens.end());
  seq.block_table.reserve((capacity + defaults.block_tokens - 1) / defaults.block_tokens + 1);

  seq.row = make_sample_row(params, choice_seed(defaults.seed, index));
  seq.min_tokens = params.min_tokens;
  seq.ignore_eos = params.ignore_eos;
  if (params.constraint != nullptr) seq.matcher = params.constraint->start();
  if (!params.ignore_eos || seq.matcher != nullptr) {
    seq.eos_ids.assign(defaults.eos_ids.begin(), defaults.eos_ids.end());
  }
  seq.stop_ids = params.stop_token_ids;
  seq.bias = make_bias(params, {});
  if (params.min_tokens > 0) {
    std::vector<int32_t> banned = seq.stop_ids;
    if (seq.matcher == nullptr) {
      banned.insert(banned.end(), seq.eos_ids.begin(), seq.eos_ids.end());
    } else {  // whose mask holds them back until it needs them
      std::erase_if(banned, [&](int32_t id) {
        return std::ranges::find(seq.eos_ids, id) != seq.eos_ids.end();
      });
    }
    seq.early_bias = make_bias(params, banned);
  }
  if (needs_history(params)) {
    seq.has_history = true;
    seq.history.reserve(capacity);
    for (const int32_t token : request.prompt_tokens) seq.history.add(token, false);
  }
  seq.prompt_logprobs = index == 0 ? params.prompt_logprobs : -1;
  return seq;
}

}  // namespace nibble
