// rope_store_kv and attention of the cpu backend against the reference, and their independence of
// chunking, batch-mates, block ids and threads, bit for bit. SPDX-License-Identifier: Apache-2.0
#include "cpu_test_util.h"

namespace nibble::ops {
namespace {

using Chunk = AttentionRun::Chunk;

class CpuAttention : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Isa, CpuAttention, testing::ValuesIn(available_cpu_isas()), isa_test_name);

std::unique_ptr<Backend> cpu(const std::string& isa, int threads) {
  return make_cpu_backend(isa, ActivationPrecision::kF32, threads);
}

TEST_P(CpuAttention, MatchesReference) {
  const auto reference = make_reference_backend();
  const auto backend = cpu(GetParam(), 2);
  for (const AttentionShape& shape : attention_shapes()) {
    AttentionRun want(*reference, shape, 4, 620, 3, true), got(*backend, shape, 4, 620, 5, true);
    // Prompts, a chunk, ragged decode, more chunks past one 512-key span, decode past it.
    const std::vector<std::vector<Chunk>> steps = {
        {{0, 33}, {1, 1}}, {{0, 1}, {1, 40}, {2, 7}}, {{0, 1}, {1, 1}, {2, 1}},
        {{3, 575}},        {{3, 1}, {0, 1}},          {{3, 1}}};
    for (size_t i = 0; i < steps.size(); ++i) {
      const std::vector<float> expected = want.step(steps[i]);
      // int8 rounds q exactly alike except where rotation differs in its last bit at a tie: one
      // step of 1/127.
      EXPECT_LT(relative_error(got.step(steps[i]), expected),
                shape.format == KvFormat::kF32 ? 3e-5 : 2e-2)
          << shape.name() << " step " << i;
    }
  }
}

TEST_P(CpuAttention, BitsDoNotDependOnChunkingBatchBlocksOrThreads) {
  for (const AttentionShape& shape : attention_shapes()) {
    const int length = 1100;  // three spans
    const auto row = static_cast<size_t>(shape.num_heads * shape.head_dim);
    const auto one = cpu(GetParam(), 1), three = cpu(GetParam(), 3);
    AttentionRun whole(*one, shape, 1, length, 0);
    const std::vector<float> all = whole.step({{0, length}});

    AttentionRun chunked(*three, shape, 3, length, 11);  // shuffled blocks, batch-mates, threads
    int done = 0;
    const auto check = [&](const std::vector<Chunk>& step) {
      const std::vector<float> y = chunked.step(step);
      size_t at = 0;
      for (const Chunk& chunk : step) {
        const auto n = static_cast<size_t>(chunk.count) * row;
        if (chunk.sequence == 0) {
          ASSERT_TRUE(same_bits(y.data() + at, all.data() + static_cast<size_t>(done) * row, n))
              << shape.name() << " positions " << done << '+' << chunk.count;
          done += chunk.count;
        }
        at += n;
      }
    };
    check({{1, 50}, {0, 1}});
    check({{0, 30}});
    check({{0, 1}, {2, 300}});
    check({{2, 1}, {0, 96}, {1, 5}});
    check({{0, 383}});
    check({{0, 1}, {1, 1}});
    for (int i = 0; i < 5; ++i) check({{0, 1}});  // crosses the span at 512
    check({{0, 500}, {1, 1}});
    for (int i = 0; i < 8; ++i) check({{0, 1}});  // split decode over two spans
    while (done < length) check({{0, std::min(40, length - done)}});
  }
}

TEST_P(CpuAttention, StaticScalesSaturate) {
  const auto reference = make_reference_backend();
  const auto backend = cpu(GetParam(), 1);
  const AttentionShape shape{2, 1, 16, 8,
                             KvFormat::kInt8Static};  // scales 0.02, 0.015 clip normal values
  AttentionRun want(*reference, shape, 1, 64, 0), got(*backend, shape, 1, 64, 0);
  const std::vector<float> expected = want.step({{0, 64}});
  EXPECT_LT(relative_error(got.step({{0, 64}}), expected), 2e-2);
}

}  // namespace
}  // namespace nibble::ops
