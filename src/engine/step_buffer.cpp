// SPDX-License-Identifier: Apache-2.0
#include "engine/step_buffer.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/hash.h"

namespace nibble {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHistoryStep = 4096;

int num_blocks_of(int num_tokens, int block_tokens) {
  return (num_tokens + block_tokens - 1) / block_tokens;
}

int num_mask_words(int vocab_size) { return (vocab_size + 63) / 64; }

}  // namespace

StepBuffer::Layout StepBuffer::layout(int num_tokens, int num_seqs, int num_logit_rows,
                                      int num_blocks, size_t num_history, size_t num_bias,
                                      size_t num_mask_words) {
  Layout l{};
  size_t end = 0;
  const auto carve = [&](size_t count, size_t size) {
    const size_t begin = end;
    end = (end + count * size + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  l.token_ids = carve(num_tokens, sizeof(int32_t));
  l.positions = carve(num_tokens, sizeof(int32_t));
  l.seq_starts = carve(size_t(num_seqs) + 1, sizeof(int32_t));
  l.kv_lens = carve(num_seqs, sizeof(int32_t));
  l.block_tables = carve(size_t(num_seqs) * num_blocks, sizeof(int32_t));
  l.logit_rows = carve(num_logit_rows, sizeof(int32_t));
  l.rows = carve(num_logit_rows, sizeof(SampleRow));
  // By many, so that a growing history moves nothing behind it for a while.
  l.history =
      carve((num_history + kHistoryStep - 1) / kHistoryStep * kHistoryStep, sizeof(TokenCount));
  l.bias = carve(num_bias, sizeof(TokenBias));
  l.masks = carve(num_mask_words, sizeof(uint64_t));
  l.end = end;
  return l;
}

size_t StepBuffer::capacity_bytes(const StepShape& shape) {
  const size_t num_seqs = shape.max_batch_size;
  return layout(shape.max_num_tokens, shape.max_batch_size, shape.max_logit_rows,
                num_blocks_of(shape.max_seq_len, shape.block_tokens) + 1,
                num_seqs * std::min(shape.max_seq_len, shape.vocab_size),
                num_seqs * (kMaxLogitBias + kMaxStopTokenIds + kMaxEosIds),
                size_t(shape.max_masks) * num_mask_words(shape.vocab_size))
      .end;
}

StepBuffer::StepBuffer(const StepShape& shape)
    : shape_(shape),
      mask_words_(num_mask_words(shape.vocab_size)),
      owned_(static_cast<std::byte*>(::operator new[](capacity_bytes(shape)))),
      host_(owned_.get()) {}

StepBuffer::StepBuffer(const StepShape& shape, std::byte* memory)
    : shape_(shape), mask_words_(num_mask_words(shape.vocab_size)), host_(memory) {}

void StepBuffer::build(const StepPlan& plan) {
  int num_blocks = 1;
  int64_t used_blocks = 0;
  size_t num_history = 0, num_bias = 0;
  max_logprobs_ = 0;
  num_masks_ = 0;
  counts_previous_ = false;
  for (const ScheduledSequence& scheduled : plan.sequences) {
    const Sequence& seq = *scheduled.seq;
    const int used =
        num_blocks_of(scheduled.first_token + scheduled.num_tokens, shape_.block_tokens);
    num_blocks = std::max(num_blocks, used);
    used_blocks += used;
    if (scheduled.num_prompt_rows > 0) max_logprobs_ = std::max(max_logprobs_, seq.prompt_logprobs);
    if (!scheduled.draws) continue;
    max_logprobs_ = std::max(max_logprobs_, seq.row.num_logprobs);
    if (seq.has_history) num_history += seq.history.entries().size();
    num_bias += seq.current_bias().size();
    num_masks_ += seq.matcher != nullptr;
  }
  NIBBLE_CHECK(num_masks_ <= shape_.max_masks, "{} masks in a step of at most {}", num_masks_,
               shape_.max_masks);
  // By eights, so that a growing sequence keeps its graph_key() for a while.
  num_blocks = std::min((num_blocks + 7) / 8 * 8,
                        num_blocks_of(shape_.max_seq_len, shape_.block_tokens) + 1);
  step_ = {
      .num_tokens = plan.num_tokens,
      .num_seqs = static_cast<int>(plan.sequences.size()),
      .num_logit_rows = plan.num_logit_rows,
      .num_decode_seqs =
          static_cast<int>(std::ranges::find(plan.sequences, false, &ScheduledSequence::is_decode) -
                           plan.sequences.begin()),
      .max_blocks_per_seq = num_blocks,
      .is_uneven = is_uneven(used_blocks, static_cast<int>(plan.sequences.size()), num_blocks)};
  layout_ = layout(step_.num_tokens, step_.num_seqs, step_.num_logit_rows, num_blocks, num_history,
                   num_bias, size_t(num_masks_) * mask_words_);
  used_bytes_ = layout_.end;
  NIBBLE_CHECK(used_bytes_ <= capacity_bytes(shape_), "a step of {} bytes in a buffer of {}",
               used_bytes_, capacity_bytes(shape_));

  int32_t* token_ids = at<int32_t>(layout_.token_ids);
  int32_t* positions = at<int32_t>(layout_.positions);
  int32_t* seq_starts = at<int32_t>(layout_.seq_starts);
  int32_t* kv_lens = at<int32_t>(layout_.kv_lens);
  int32_t* block_table = at<int32_t>(layout_.block_tables);
  int32_t* logit_rows = at<int32_t>(layout_.logit_rows);
  SampleRow* rows = at<SampleRow>(layout_.rows);
  TokenCount* history = at<TokenCount>(layout_.history);
  TokenBias* bias = at<TokenBias>(layout_.bias);
  uint64_t* masks = at<uint64_t>(layout_.masks);

  int token = 0, row = 0, history_end = 0, bias_end = 0, mask = 0;
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    const ScheduledSequence& scheduled = plan.sequences[s];
    const Sequence& seq = *scheduled.seq;
    const int end = scheduled.first_token + scheduled.num_tokens;
    seq_starts[s] = token;
    kv_lens[s] = end;
    const int used = num_blocks_of(end, shape_.block_tokens);
    std::copy_n(seq.block_table.begin(), used, block_table);
    std::fill(block_table + used, block_table + num_blocks, 0);
    block_table += num_blocks;

    for (int i = 0; i < scheduled.num_prompt_rows; ++i) {
      const int position = scheduled.first_prompt_row + i;
      logit_rows[row] = token + position - scheduled.first_token;
      rows[row++] = {.temperature = 0,
                     .num_logprobs = seq.prompt_logprobs,
                     .forced_token = seq.tokens[position + 1]};
    }
    if (scheduled.draws) {
      logit_rows[row] = token + scheduled.num_tokens - 1;
      SampleRow& sample = rows[row++];
      sample = seq.row;
      sample.position = static_cast<uint64_t>(seq.num_tokens());
      sample.history_begin = history_end;
      if (seq.has_history) {
        const auto entries = seq.history.entries();
        std::ranges::copy(entries, history + history_end);
        history_end += static_cast<int>(entries.size());
        sample.pending = seq.pending_row;
        counts_previous_ |= seq.is_pending();
      }
      sample.history_end = history_end;
      sample.bias_begin = bias_end;
      std::ranges::copy(seq.current_bias(), bias + bias_end);
      bias_end += static_cast<int>(seq.current_bias().size());
      sample.bias_end = bias_end;
      if (seq.matcher != nullptr) {
        fill_mask(seq, masks + size_t(mask) * mask_words_);
        sample.mask = mask++;
      }
    }
    for (int position = scheduled.first_token; position < end; ++position, ++token) {
      const bool pending = seq.is_pending() && position + 1 == seq.num_tokens();
      token_ids[token] = pending ? -1 - seq.pending_row : seq.tokens[position];
      positions[token] = position;
    }
  }
  seq_starts[plan.sequences.size()] = token;
  NIBBLE_CHECK(token == plan.num_tokens && row == plan.num_logit_rows);
}

void StepBuffer::fill_mask(const Sequence& seq, uint64_t* words) const {
  const auto [can_end, must_end] =
      seq.matcher->fill_mask({words, static_cast<size_t>(mask_words_)});
  if (!must_end && (!can_end || !seq.may_stop_now())) return;
  for (const int32_t id : seq.eos_ids) words[id / 64] |= uint64_t{1} << (id % 64);
}

uint64_t StepBuffer::graph_key(const void* base) const {
  if (step_.num_decode_seqs != step_.num_seqs) return 0;
  const size_t what[] = {reinterpret_cast<size_t>(base),
                         static_cast<size_t>(step_.num_seqs),
                         static_cast<size_t>(step_.num_logit_rows),
                         static_cast<size_t>(step_.max_blocks_per_seq),
                         step_.is_uneven ? size_t{1} : 0,
                         static_cast<size_t>(max_logprobs_),
                         layout_.logit_rows,
                         layout_.rows,
                         layout_.history,
                         layout_.bias,
                         num_masks_ > 0 ? layout_.masks : 0,
                         counts_previous_ ? size_t{1} : 0};
  return xxh3_64(std::as_bytes(std::span(what))) | 1;  // not 0
}

StepBatch StepBuffer::step_batch(const void* base) const {
  const std::byte* bytes = static_cast<const std::byte*>(base);
  const auto ints = [&](size_t offset) { return reinterpret_cast<const int32_t*>(bytes + offset); };
  StepBatch batch = step_;
  batch.token_ids = ints(layout_.token_ids);
  batch.positions = ints(layout_.positions);
  batch.seq_starts = ints(layout_.seq_starts);
  batch.kv_lens = ints(layout_.kv_lens);
  batch.block_tables = ints(layout_.block_tables);
  batch.logit_rows = ints(layout_.logit_rows);
  batch.host_seq_starts = at<int32_t>(layout_.seq_starts);
  batch.host_kv_lens = at<int32_t>(layout_.kv_lens);
  return batch;
}

SampleBatch StepBuffer::sample_batch(const void* base, const uint64_t* allowed) const {
  const std::byte* bytes = static_cast<const std::byte*>(base);
  return {
      .num_rows = step_.num_logit_rows,
      .vocab_size = shape_.vocab_size,
      .rows = reinterpret_cast<const SampleRow*>(bytes + layout_.rows),
      .history = reinterpret_cast<const TokenCount*>(bytes + layout_.history),
      .bias = reinterpret_cast<const TokenBias*>(bytes + layout_.bias),
      .allowed = allowed,
      .masks = num_masks_ > 0 ? reinterpret_cast<const uint64_t*>(bytes + layout_.masks) : nullptr,
      .mask_words = mask_words_,
      .max_logprobs = max_logprobs_};
}

}  // namespace nibble
