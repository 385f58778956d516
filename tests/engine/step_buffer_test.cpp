// StepBuffer::graph_key(): what a backend that records steps relies on. Equal keys mean equal
// arguments of every op; a decoding sequence keeps its key while it grows.
// SPDX-License-Identifier: Apache-2.0
#include "engine/step_buffer.h"

#include <gtest/gtest.h>

#include <vector>

namespace nibble {
namespace {

constexpr int kBlockTokens = 64;
constexpr StepShape kShape{.max_batch_size = 4,
                           .max_num_tokens = 512,
                           .max_logit_rows = 8,
                           .max_seq_len = 4096,
                           .block_tokens = kBlockTokens,
                           .vocab_size = 100};

class StepBufferTest : public testing::Test {
 protected:
  StepBufferTest() : step_(kShape) {}

  /// A step in which each sequence of `lengths` tokens computes its last `count` ones. With one,
  /// all but the last `num_prompts` sequences decode.
  uint64_t build(const std::vector<int>& lengths, int count = 1, int num_bias = 0,
                 int num_prompts = 0) {
    sequences_.clear();
    sequences_.resize(lengths.size());
    StepPlan plan;
    for (size_t i = 0; i < lengths.size(); ++i) {
      Sequence& seq = sequences_[i];
      seq.tokens.assign(static_cast<size_t>(lengths[i]), 7);
      seq.num_prompt_tokens = lengths[i];
      seq.block_table.assign(static_cast<size_t>(lengths[i] / kBlockTokens + 1), 3);
      seq.bias.assign(static_cast<size_t>(num_bias), {5, 1.0f});
      plan.sequences.push_back(
          {.seq = &seq,
           .first_token = lengths[i] - count,
           .num_tokens = count,
           .draws = true,
           .is_decode = count == 1 && i + static_cast<size_t>(num_prompts) < lengths.size()});
      plan.num_tokens += count;
      ++plan.num_logit_rows;
    }
    step_.build(plan);
    return step_.graph_key(base_);
  }

  StepBuffer step_;
  std::vector<Sequence> sequences_;
  char base_[1] = {};
};

TEST_F(StepBufferTest, GrowingSequencesKeepTheirKeyAndTheirViews) {
  const uint64_t key = build({100, 30});
  ASSERT_NE(key, 0u);
  const StepBatch batch = step_.step_batch(base_);
  const SampleBatch sample = step_.sample_batch(base_, nullptr);
  int kept = 0;
  for (int n = 101; n <= 520; ++n) {
    if (build({n, n - 70}) != key) break;
    ++kept;
    const StepBatch other = step_.step_batch(base_);
    const SampleBatch other_sample = step_.sample_batch(base_, nullptr);
    EXPECT_EQ(other.num_tokens, batch.num_tokens);
    EXPECT_EQ(other.max_blocks_per_seq, batch.max_blocks_per_seq);
    EXPECT_EQ(other.kv_lens, batch.kv_lens);
    EXPECT_EQ(other.block_tables, batch.block_tables);
    EXPECT_EQ(other.logit_rows, batch.logit_rows);
    EXPECT_EQ(other_sample.rows, sample.rows);
    EXPECT_EQ(other_sample.bias, sample.bias);
  }
  EXPECT_EQ(kept, 512 - 100);  // eight blocks of 64
}

TEST_F(StepBufferTest, EverythingTheOpsSeeChangesTheKey) {
  const uint64_t key = build({100, 30});
  EXPECT_NE(build({100}), key);
  EXPECT_NE(build({100, 30, 30}), key);
  EXPECT_NE(build({600, 30}), key);            // wider block tables
  EXPECT_EQ(build({100, 30}, 1, 0), key);      // and back
  EXPECT_NE(step_.graph_key(base_ + 1), key);  // another executor's memory
}

TEST_F(StepBufferTest, UnevenStepsHaveAKeyOfTheirOwn) {
  const uint64_t even = build({3000, 2900, 2000});
  EXPECT_FALSE(step_.step_batch(base_).is_uneven);
  EXPECT_NE(build({3000, 1900, 500}), even);
  EXPECT_TRUE(step_.step_batch(base_).is_uneven);
  build({1500, 100, 100});  // not long enough
  EXPECT_FALSE(step_.step_batch(base_).is_uneven);
  for (int n = 1; n < kShape.max_seq_len; ++n) {  // one is as long as itself
    build({n});
    ASSERT_FALSE(step_.step_batch(base_).is_uneven) << n;
  }
}

TEST_F(StepBufferTest, PromptChunksHaveNoKey) {
  EXPECT_EQ(build({100}, 2), 0u);
  EXPECT_EQ(build({100, 200}, 50), 0u);
  EXPECT_EQ(build({100, 200}, 1, 0, 1), 0u);  // of one token, too
}

TEST_F(StepBufferTest, BackendsAreToldWhichRowsWereDrawn) {
  build({100, 200, 300}, 1, 0, 0);
  EXPECT_EQ(step_.step_batch(base_).num_decode_seqs, 3);
  build({100, 200, 300}, 1, 0, 1);
  EXPECT_EQ(step_.step_batch(base_).num_decode_seqs, 2);
  build({100, 200, 300}, 2);
  EXPECT_EQ(step_.step_batch(base_).num_decode_seqs, 0);
}

TEST_F(StepBufferTest, ALongTableStopsAtTheLongestSequence) {
  build({kShape.max_seq_len});
  EXPECT_GE(step_.step_batch(base_).max_blocks_per_seq, kShape.max_seq_len / kBlockTokens);
  EXPECT_LE(step_.bytes().size(), StepBuffer::capacity_bytes(kShape));
}

}  // namespace
}  // namespace nibble
