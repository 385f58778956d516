// The plan of a device's memory: what fits, and what the refusals say.
// SPDX-License-Identifier: Apache-2.0
#include "build/memory_plan.h"

#include "formats/synthetic.h"
#include "formats/testing.h"

namespace nibble {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing_::catch_error;

constexpr uint64_t kGiB = uint64_t{1} << 30, kWeights = 13 * kGiB, kBlock = 5 << 20;

EnginePlan plan_of_24b() {
  EnginePlan plan;
  plan.spec = synthetic_shape("mistral-24b").spec;
  plan.limits = {
      .max_batch_size = 64, .max_input_len = 5525, .max_output_len = 150, .max_num_tokens = 2048};
  plan.kv_block_tokens = 64;
  return plan;
}

MemoryPlan plan(uint64_t free, const MemoryWish& wish = {}) {
  return plan_memory(plan_of_24b(), kWeights, free, kBlock, 2, wish);
}

TEST(MemoryPlan, TheCacheTakesItsFractionOfWhatIsLeft) {
  const MemoryPlan memory = plan(139 * kGiB);
  EXPECT_EQ(memory.weights, kWeights);
  EXPECT_GT(memory.arena, kGiB / 2);
  EXPECT_LT(memory.arena, 2 * kGiB);
  const double left = static_cast<double>(139 * kGiB - kWeights - memory.arena);
  EXPECT_NEAR(static_cast<double>(memory.kv), 0.9 * left, kBlock);
  EXPECT_EQ(memory.kv, static_cast<uint64_t>(memory.kv_blocks) * kBlock);
  EXPECT_THAT(memory.text(), AllOf(HasSubstr("weights 14 GB"), HasSubstr("blocks of 64")));
  EXPECT_EQ(plan(139 * kGiB, {.kv_bytes = 10 * kGiB}).kv_blocks, 2048);
}

TEST(MemoryPlan, RefusalsNameTheLimitAndTheGap) {
  const auto message = [](uint64_t free, const MemoryWish& wish) {
    return catch_error([&] { plan(free, wish); }).message;
  };
  EXPECT_THAT(message(12 * kGiB, {}),
              AllOf(HasSubstr("too little"), HasSubstr("--max-num-tokens")));
  EXPECT_THAT(message(20 * kGiB, {.kv_bytes = 30 * kGiB}),
              AllOf(HasSubstr("more than"), HasSubstr("lower --kv-cache-bytes to")));
  EXPECT_THAT(message(20 * kGiB, {.kv_bytes = 89 * kBlock - 1}),
              AllOf(HasSubstr("holds 5632 tokens, fewer than one sequence of 5675"),
                    HasSubstr("43 tokens fewer")));
}

}  // namespace
}  // namespace nibble
