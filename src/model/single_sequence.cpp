// SPDX-License-Identifier: Apache-2.0
#include "model/single_sequence.h"

#include <algorithm>

#include "base/error.h"

namespace nibble {
namespace {

EnginePlan with_context(EnginePlan plan, int max_context) {
  plan.limits.max_input_len = max_context;
  plan.limits.max_output_len = 0;
  plan.limits.max_batch_size = 1;
  return plan;
}

int blocks_for(const EnginePlan& plan, int max_context) {
  return (max_context + plan.kv_block_tokens - 1) / plan.kv_block_tokens;
}

}  // namespace

SingleSequence::SingleSequence(Backend& backend, const EnginePlan& plan,
                               const ModelWeights& weights, int max_context, int max_step_tokens)
    : backend_(backend),
      plan_(with_context(plan, max_context)),
      max_context_(max_context),
      max_step_tokens_(std::min(max_step_tokens, max_context)),
      decoder_(backend, plan_, weights, max_step_tokens_, max_step_tokens_),
      kv_(backend, plan_, weights, blocks_for(plan_, max_context)),
      step_(static_cast<size_t>(3 * max_step_tokens_ + 3 + kv_.num_blocks())),
      device_step_(backend.alloc(step_.size() * sizeof(int32_t))) {}

void SingleSequence::step(std::span<const int32_t> ids, int num_logit_rows) {
  const int count = static_cast<int>(ids.size());
  NIBBLE_CHECK(count > 0 && count <= max_step_tokens_);
  if (length_ + count > max_context_) {
    fail(ErrorKind::kLimit, "{} tokens do not fit a context of {}", length_ + count, max_context_);
  }
  int32_t* host = step_.data();
  const auto device = [&](const int32_t* at) {
    return device_step_.as<int32_t>() + (at - step_.data());
  };
  StepBatch batch{.num_tokens = count,
                  .num_seqs = 1,
                  .num_logit_rows = num_logit_rows,
                  .num_decode_seqs = count == 1 ? 1 : 0,
                  .max_blocks_per_seq = kv_.num_blocks()};
  const auto field = [&](int size) {
    int32_t* at = host;
    host += size;
    return at;
  };
  int32_t* token_ids = field(count);
  int32_t* positions = field(count);
  int32_t* starts = field(2);
  int32_t* kv_len = field(1);
  int32_t* table = field(kv_.num_blocks());
  int32_t* rows = field(num_logit_rows);
  for (int i = 0; i < count; ++i) {
    if (ids[static_cast<size_t>(i)] < 0 || ids[static_cast<size_t>(i)] >= plan_.spec.vocab_size) {
      fail(ErrorKind::kInput, "token id {} is outside the vocabulary of {}",
           ids[static_cast<size_t>(i)], plan_.spec.vocab_size);
    }
    token_ids[i] = ids[static_cast<size_t>(i)];
    positions[i] = length_ + i;
  }
  starts[0] = 0;
  starts[1] = count;
  kv_len[0] = length_ + count;
  for (int b = 0; b < kv_.num_blocks(); ++b) table[b] = b;
  for (int r = 0; r < num_logit_rows; ++r) rows[r] = count - num_logit_rows + r;

  batch.token_ids = device(token_ids);
  batch.positions = device(positions);
  batch.seq_starts = device(starts);
  batch.kv_lens = device(kv_len);
  batch.block_tables = device(table);
  batch.logit_rows = device(rows);
  batch.host_seq_starts = starts;
  batch.host_kv_lens = kv_len;
  backend_.upload(device_step_.data(), step_.data(),
                  static_cast<size_t>(host - step_.data()) * sizeof(int32_t));
  decoder_.forward(batch, kv_.layers());
  length_ += count;
}

std::span<const float> SingleSequence::extend(std::span<const int32_t> ids, Logits which) {
  if (which == Logits::kAll) NIBBLE_CHECK(static_cast<int>(ids.size()) <= max_step_tokens_);
  int rows = 0;
  while (!ids.empty()) {
    const size_t count = std::min(ids.size(), static_cast<size_t>(max_step_tokens_));
    const bool last = count == ids.size();
    rows = !last || which == Logits::kNone ? 0
           : which == Logits::kLast        ? 1
                                           : static_cast<int>(count);
    step(ids.first(count), rows);
    ids = ids.subspan(count);
  }
  logits_.resize(static_cast<size_t>(rows) * static_cast<size_t>(plan_.spec.vocab_size));
  if (rows > 0)
    backend_.download(logits_.data(), decoder_.logits(), logits_.size() * sizeof(float));
  backend_.sync();
  return logits_;
}

}  // namespace nibble
