// The plan of a device's memory: what fits, and what the refusals say.
// SPDX-License-Identifier: Apache-2.0
#include "build/memory_plan.h"

#include <regex>

#include "formats/synthetic.h"
#include "formats/testing.h"

namespace nibble {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
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

MemoryFacts facts(uint64_t free) {
  return {.device = "cuda:sm_90 (NVIDIA H200)",
          .free = free,
          .weights = kWeights,
          .kv_block = kBlock,
          .act_element = 2};
}

MemoryPlan plan(uint64_t free, const MemoryWish& wish = {}) {
  return plan_memory(plan_of_24b(), facts(free), wish);
}

bool fits(const EnginePlan& engine, uint64_t free) {
  try {
    plan_memory(engine, facts(free), {});
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::string refusal(const EnginePlan& engine, uint64_t free, const MemoryWish& wish = {}) {
  const testing_::Caught caught = catch_error([&] { plan_memory(engine, facts(free), wish); });
  EXPECT_EQ(caught.kind, ErrorKind::kMemory) << caught.message;
  return caught.message;
}

/// The values that a message wants limits to be lowered to.
std::vector<std::pair<std::string, int>> advice(const std::string& message) {
  const std::regex flag("--max-[a-z-]+ ([0-9]+)");
  std::vector<std::pair<std::string, int>> out;
  for (std::sregex_iterator it(message.begin(), message.end(), flag), end; it != end; ++it) {
    const std::string text = it->str();
    out.emplace_back(text.substr(0, text.find(' ')), std::stoi((*it)[1]));
  }
  return out;
}

void set(EngineLimits& limits, const std::string& flag, int value) {
  if (flag == "--max-num-tokens") limits.max_num_tokens = value;
  if (flag == "--max-batch-size") limits.max_batch_size = value;
  if (flag == "--max-input-len") limits.max_input_len = value;
  if (flag == "--max-output-len") limits.max_output_len = value;
}

TEST(MemoryPlan, TheCacheTakesItsFractionOfWhatIsLeft) {
  const MemoryPlan memory = plan(139 * kGiB);
  EXPECT_EQ(memory.weights, kWeights);
  EXPECT_GT(memory.arena, kGiB / 2);
  EXPECT_LT(memory.arena, 2 * kGiB);
  const double left = static_cast<double>(139 * kGiB - kWeights - memory.arena);
  EXPECT_NEAR(static_cast<double>(memory.kv), 0.9 * left, kBlock);
  EXPECT_EQ(memory.kv, static_cast<uint64_t>(memory.kv_blocks) * kBlock);
  EXPECT_THAT(memory.text(), AllOf(HasSubstr("weights 14 GB"), HasSubstr("blocks of 64"),
                                   HasSubstr("free on cuda:sm_90 (NVIDIA H200)")));
  EXPECT_EQ(plan(139 * kGiB, {.kv_bytes = 10 * kGiB}).kv_blocks, 2048);
}

TEST(MemoryPlan, AnUpperBoundOfTheCacheIsNoDemand) {
  EXPECT_EQ(plan(139 * kGiB, {.kv_at_most = 100 * kBlock}).kv_blocks, 100);
  const MemoryPlan memory = plan(16 * kGiB, {.kv_at_most = 1000 * kGiB});
  EXPECT_LT(memory.kv, 16 * kGiB - kWeights - memory.arena);
}

// The value that a refusal names is the largest that fits: it does, and one more does not.
TEST(MemoryPlan, RefusalsNameTheLargestLimitThatFits) {
  EnginePlan engine = plan_of_24b();
  engine.limits.max_num_tokens = 16384;
  engine.limits.max_input_len = 30000;
  engine.limits.max_batch_size = 512;
  size_t num_advised = 0;
  for (uint64_t free = 14 * kGiB; free < 22 * kGiB; free += kGiB / 4) {
    SCOPED_TRACE(free);
    if (fits(engine, free)) break;
    const std::string message = refusal(engine, free);
    if (message.find("together") != message.npos) continue;
    for (const auto& [flag, value] : advice(message)) {
      SCOPED_TRACE(flag);
      ++num_advised;
      EnginePlan lowered = engine;
      set(lowered.limits, flag, value);
      EXPECT_GE(lowered.limits.max_num_tokens, lowered.limits.max_batch_size) << message;
      EXPECT_TRUE(fits(lowered, free)) << message;
      set(lowered.limits, flag, value + 1);
      EXPECT_FALSE(fits(lowered, free)) << message;
    }
  }
  EXPECT_GT(num_advised, 10u);
}

TEST(MemoryPlan, SeveralLimitsTogetherWhereNoneSuffices) {
  EnginePlan engine = plan_of_24b();
  engine.limits = {.max_batch_size = 2048,
                   .max_input_len = 100000,
                   .max_output_len = 30000,
                   .max_num_tokens = 65536};
  const uint64_t free = kWeights + kGiB;
  const std::string message = refusal(engine, free);
  EXPECT_THAT(message, HasSubstr("together"));
  EXPECT_EQ(advice(message).size(), 4u) << message;
  EnginePlan lowered = engine;
  for (const auto& [flag, value] : advice(message)) set(lowered.limits, flag, value);
  EXPECT_GE(lowered.limits.max_num_tokens, lowered.limits.max_batch_size);
  EXPECT_TRUE(fits(lowered, free)) << message;
}

TEST(MemoryPlan, WeightsThatAreTooLargeAreNoMatterOfLimits) {
  for (const uint64_t free : {kGiB, 12 * kGiB, kWeights, kWeights + kGiB / 4}) {
    const std::string message = refusal(plan_of_24b(), free);
    EXPECT_THAT(message, AllOf(HasSubstr("cuda:sm_90 (NVIDIA H200) has"),
                               HasSubstr("No limit helps: the weights alone are 14 GB")));
    EXPECT_TRUE(advice(message).empty()) << message;
  }
  EnginePlan dense = plan_of_24b();
  dense.linear_layout = WeightLayout::kBf16Rows;
  EXPECT_THAT(refusal(dense, kGiB), HasSubstr("nibble quantize"));
  EXPECT_THAT(refusal(plan_of_24b(), kGiB), Not(HasSubstr("nibble quantize")));
}

TEST(MemoryPlan, RefusalsOfACacheNameTheBytes) {
  EXPECT_THAT(refusal(plan_of_24b(), 20 * kGiB, {.kv_bytes = 30 * kGiB}),
              AllOf(HasSubstr("more than"), HasSubstr("lower --kv-cache-bytes to")));
  // 5675 tokens are 89 blocks.
  const std::string small = refusal(plan_of_24b(), 20 * kGiB, {.kv_bytes = 89 * kBlock - 1});
  EXPECT_THAT(small, AllOf(HasSubstr("holds 5632 tokens, fewer than one sequence of 5675"),
                           HasSubstr(fmt::format("--kv-cache-bytes {} or more", 89 * kBlock)),
                           HasSubstr("--max-input-len 5482 or less")));
  plan(20 * kGiB, {.kv_bytes = 89 * kBlock});
  EnginePlan shorter = plan_of_24b();
  shorter.limits.max_input_len = 5482;
  plan_memory(shorter, facts(20 * kGiB), {.kv_bytes = 89 * kBlock - 1});
  EXPECT_THAT(refusal(plan_of_24b(), 20 * kGiB, {.kv_fraction = 0.01}),
              HasSubstr(fmt::format("--kv-cache-bytes {} or more", 89 * kBlock)));
}

}  // namespace
}  // namespace nibble
