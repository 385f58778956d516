// The cuda backend's ops against the reference, with the tolerances bf16 leaves, and which of them
// keep the seam's bitwise invariant. Skipped where the plugin finds no GPU.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>

#include "backends/cuda/kernels.h"
#include "backends/cuda/tactic.h"
#include "backends/reference/reference_backend.h"
#include "base/error.h"
#include "bench/op_cases.h"
#include "build/cuda_plugin.h"
#include "cuda_linear_case.h"
#include "formats/synthetic.h"
#include "ops/cpu_test_util.h"

namespace nibble::ops {
namespace {

using Chunk = AttentionRun::Chunk;

/// Both targets, each opened once; where neither runs every test skips.
class CudaOps : public testing::TestWithParam<const char*> {
 protected:
  struct Opened {
    std::unique_ptr<Backend> backend;
    std::string why_not;
  };
  static Opened& opened(const std::string& target) {
    const auto [it, is_new] = opened_.try_emplace(target);
    if (is_new) {
      try {
        it->second.backend = open_cuda_backend(target, ActivationPrecision::kBf16);
      } catch (const Error& error) {
        it->second.why_not = error.what();
      }
    }
    return it->second;
  }
  static void TearDownTestSuite() { opened_.clear(); }
  void SetUp() override {
    const Opened& found = opened(GetParam());
    cuda_ = found.backend.get();
    if (cuda_ == nullptr) GTEST_SKIP() << found.why_not;
  }
  bool portable() const { return std::string(GetParam()) == "cuda:portable"; }
  Backend* cuda_ = nullptr;
  const std::unique_ptr<Backend> reference_ = make_reference_backend();

 private:
  static std::map<std::string, Opened> opened_;
};
std::map<std::string, CudaOps::Opened> CudaOps::opened_;
INSTANTIATE_TEST_SUITE_P(Targets, CudaOps, testing::Values("cuda:sm_90", "cuda:portable"),
                         [](const auto& info) {
                           return std::string(info.param).substr(std::string("cuda:").size());
                         });

// Linears
// ------------------------------------------------------------------------------------------------

TEST_P(CudaOps, LinearsMatchReference) {
  int fused_cases = 0;
  for (const LinearCase& c : cuda_linear_cases()) {
    const bool int4 = c.layout == WeightLayout::kCpuInt4;
    const std::vector<float> x =
        normal(static_cast<size_t>(c.rows) * static_cast<size_t>(c.in_features), c.seed + 3);
    const Weights host(*reference_, c, int4 ? WeightLayout::kInt4Portable : c.layout);
    const std::vector<float> want = run(*reference_, c, host, x, c.rows);
    for (const bool fused : {false, true}) {
      if (fused && !(int4 && c.gate_up)) continue;
      fused_cases += fused;
      const Weights weights(*cuda_, c, int4 ? WeightLayout::kCudaInt4 : c.layout, fused);
      const std::vector<float> got = run(*cuda_, c, weights, x, c.rows);
      // Weights, output and (where there are any) pre-scaled inputs are rounded to bf16, 2^-9 each.
      EXPECT_LT(rms_error(got, want), 0.012) << c.name() << (fused ? " fused" : "");
      EXPECT_LT(element_error(got, want, got.size()), 0.04) << c.name() << (fused ? " fused" : "");
      const std::vector<float> again = run(*cuda_, c, weights, x, c.rows);
      EXPECT_TRUE(same_bits(got.data(), again.data(), got.size())) << c.name() << " second run";
    }
  }
  EXPECT_GT(fused_cases, 10);
}

TEST_P(CudaOps, TheBackendSaysWhichGpuItFound) {
  const CudaPlatform platform = cuda_->cuda_platform();
  EXPECT_GE(platform.major, 12);
  EXPECT_EQ(platform.major, cuda_plugin_major(portable() ? "cuda:portable" : "cuda:sm_90"));
  EXPECT_FALSE(platform.gpu.empty());
  EXPECT_NE(cuda_->name().find(platform.gpu), std::string::npos) << cuda_->name();
  EXPECT_EQ(reference_->cuda_platform(), CudaPlatform{});
}

// Whatever tune() finds fastest here, and any other tactic it could have found, serves its shape.
TEST_P(CudaOps, TunedLinearsMatchReference) {
  const ModelSpec spec = synthetic_shape("nano-like").spec;
  const std::vector<LinearTactic> found = cuda_->tune(spec, 200);
  EXPECT_EQ(found.empty(), portable());
  const auto check = [&](const LinearTactic& t) {
    const bool gate_up = t.out_features == 2 * spec.ffn_size;
    const LinearCase c{.layout = WeightLayout::kCpuInt4,
                       .out_features = gate_up ? spec.ffn_size : t.out_features,
                       .in_features = t.in_features,
                       .group_size = 128,
                       .rows = t.max_rows,
                       .add = !gate_up && t.out_features == spec.hidden_size,
                       .gate_up = gate_up,
                       .seed = 6};
    const std::vector<float> x =
        normal(static_cast<size_t>(c.rows) * static_cast<size_t>(c.in_features), 8);
    const Weights host(*reference_, c, WeightLayout::kInt4Portable),
        weights(*cuda_, c, WeightLayout::kCudaInt4, gate_up);
    cuda_->use_tactics({});
    const std::vector<float> by_rules = run(*cuda_, c, weights, x, c.rows);
    cuda_->use_tactics({&t, 1});
    const std::vector<float> want = run(*reference_, c, host, x, c.rows),
                             got = run(*cuda_, c, weights, x, c.rows);
    const auto name = [&] { return fmt::format("{} {}", c.name(), t.best.kernel); };
    EXPECT_LT(rms_error(got, want), 0.012) << name();
    EXPECT_LT(rms_error(got, by_rules), 0.006) << name();
  };
  for (LinearTactic t : found) {
    EXPECT_GT(t.best.microseconds, 0);
    check(t);
    EXPECT_FALSE(t.slower.empty());
    double before = t.best.microseconds;
    for (const KernelTime& other : t.slower) {
      EXPECT_NE(other.kernel, t.best.kernel);
      EXPECT_GE(other.microseconds, before) << other.kernel;
      before = other.microseconds;
    }
    for (const char* kernel :
         {"wgmma 128 rows cluster 1 split 1", "wgmma 128 rows cluster 1 split 3",
          "wgmma 128 rows cluster 2 split 2", "wgmma 256 rows cluster 1 split 1",
          "wgmma 256 rows cluster 2 split 1", "wgmma 64 rows cluster 1 split 1 warpgroups 1",
          "wgmma 64 rows cluster 2 split 1 warpgroups 1",
          "wgmma 128 rows cluster 1 split 3 warpgroups 2",
          "wgmma 128 rows cluster 2 split 1 warpgroups 2", "small 64 rows whole early 1",
          "small 64 rows shared early 2", "small 128 rows shared early 2"}) {
      t.best.kernel = kernel;
      if (cuda::linear_kernel_of(kernel).value().takes(t.max_rows)) check(t);
    }
  }
  LinearTactic unknown{.out_features = 128,
                       .in_features = 128,
                       .max_rows = 4,
                       .best = {"wgmma 128 rows cluster 1 split 1", 1},
                       .slower = {}};
  if (!portable()) {
    EXPECT_THROW(cuda_->use_tactics({&unknown, 1}), Error);
  }
  cuda_->use_tactics({});
}

// A norm between two int4 linears has no kernel: the first leaves its input and sums of squares,
// the second multiplies by 1/rms. Looked at in between, it is done by itself; both are the
// reference's. The second of two steps is the smaller one, whose sums of squares lie where others
// were.
TEST_P(CudaOps, NormBetweenLinearsMatchesReference) {
  const auto result = [this](Backend& backend, const LinearCase& c, bool look) {
    const bool on_gpu = &backend == cuda_;
    const WeightLayout layout = on_gpu ? WeightLayout::kCudaInt4 : WeightLayout::kInt4Portable;
    const int hidden = c.in_features;
    const auto h = static_cast<size_t>(hidden);
    LinearCase first = c;
    first.out_features = hidden;
    first.in_features = 384;
    first.gate_up = false;
    const Weights adds(backend, first, layout), reads(backend, c, layout, on_gpu && c.gate_up);
    const Buffer weight = to_device(backend, normal(h, 12));
    const Buffer scale = to_device(backend, normal(static_cast<size_t>(c.out_features), 14));
    std::vector<float> both;
    for (const int rows : {c.rows, (c.rows + 1) / 2}) {
      const auto n = static_cast<size_t>(rows);
      const Buffer in = acts_to_device(backend, normal(n * 384, 13));
      GuardedOutput x(backend, n * h, backend.act_bytes());
      GuardedOutput normed(backend, n * h, backend.act_bytes());
      GuardedOutput y(backend, n * static_cast<size_t>(c.out_features), backend.act_bytes());
      x.fill(normal(n * h, 15));
      backend.linear(in.data(), adds.gate_operand, rows, true, x.data());
      backend.rms_norm(x.data(), weight.as<float>(), 1e-5f, rows, hidden, normed.data());
      if (look) normed.read();
      if (c.gate_up) {
        backend.gate_up(normed.data(), reads.gate_operand, reads.up_operand, rows,
                        scale.as<float>(), y.data());
      } else {
        backend.linear(normed.data(), reads.gate_operand, rows, false, y.data());
      }
      for (const GuardedOutput* out : {&x, &y}) {
        const std::vector<float> values = out->read();
        both.insert(both.end(), values.begin(), values.end());
      }
    }
    return both;
  };
  for (const int hidden : {128, 384, 1152, 5120}) {
    for (const int rows : {1, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65}) {
      for (const bool gate_up : {false, true}) {
        const LinearCase c{.layout = WeightLayout::kCpuInt4,
                           .out_features = 264,
                           .in_features = hidden,
                           .group_size = 128,
                           .rows = rows,
                           .gate_up = gate_up,
                           .seed = 78};
        const std::vector<float> want = result(*reference_, c, false),
                                 fused = result(*cuda_, c, false), again = result(*cuda_, c, false),
                                 apart = result(*cuda_, c, true);
        EXPECT_LT(rms_error(fused, want), 0.012) << hidden << ' ' << rows << ' ' << gate_up;
        EXPECT_LT(rms_error(fused, apart), 0.006) << hidden << ' ' << rows << ' ' << gate_up;
        EXPECT_TRUE(same_bits(fused.data(), again.data(), fused.size())) << hidden << ' ' << rows;
      }
    }
  }
}

TEST_P(CudaOps, DenseRowsDoNotDependOnTheBatch) {
  const LinearCase c{.layout = WeightLayout::kBf16Rows,
                     .out_features = 300,
                     .in_features = 520,
                     .rows = 150,
                     .seed = 5};
  const Weights weights(*cuda_, c, c.layout);
  const std::vector<float> x = normal(150 * 520, 8);
  const std::vector<float> all = run(*cuda_, c, weights, x, 150);
  for (const auto& [first, rows] : std::vector<std::pair<int, int>>{
           {0, 1}, {149, 1}, {3, 2}, {11, 8}, {20, 9}, {7, 33}, {50, 100}}) {
    const std::vector<float> some =
        run(*cuda_, c, weights, {x.begin() + first * 520, x.begin() + (first + rows) * 520}, rows);
    EXPECT_TRUE(same_bits(some.data(), all.data() + first * 300, some.size()))
        << "rows " << first << '+' << rows;
  }
}

// Portable: the int4 linear sums in one order whatever the number of rows (tiles of 8, 16, 32 and
// 64 tokens, parts with CTAs of their own and all parts in one CTA). sm_90: in steps with rows of
// prompts (CTAs of 64, 128 and 256 rows of weights, tiles of 16 to 128 tokens; a long k in three
// parts, likewise).
TEST_P(CudaOps, PromptRowsOfInt4LinearsDoNotDependOnTheBatch) {
  struct Case {
    int out_features, in_features;
    bool gate_up;
  };
  const int rows = 2300;
  cuda_->begin_step({.num_seqs = 1});
  for (const auto& [n, k, gate_up] : {Case{512, 4096, false}, Case{512, 4096, true},
                                      Case{2048, 16640, false}, Case{136, 16512, false}}) {
    const LinearCase c{.layout = WeightLayout::kCpuInt4,
                       .out_features = n,
                       .in_features = k,
                       .group_size = 128,
                       .rows = rows,
                       .gate_up = gate_up,
                       .seed = 6};
    const Weights weights(*cuda_, c, WeightLayout::kCudaInt4, gate_up);
    const std::vector<float> x = normal(size_t{rows} * static_cast<size_t>(k), 8);
    const std::vector<float> all = run(*cuda_, c, weights, x, rows);
    const std::pair<int, int> some_rows[] = {
        {0, 1},   {2299, 1}, {3, 2},   {11, 8},   {20, 9},  {7, 33},     {90, 47},   {50, 64},
        {60, 90}, {40, 128}, {9, 250}, {70, 300}, {5, 390}, {1000, 700}, {700, 1500}};
    for (const auto& [first, count] : some_rows) {
      const std::vector<float> some =
          run(*cuda_, c, weights,
              {x.begin() + int64_t{first} * k, x.begin() + int64_t{first + count} * k}, count);
      EXPECT_TRUE(same_bits(some.data(), all.data() + int64_t{first} * n, some.size()))
          << n << " x " << k << " rows " << first << '+' << count;
    }
  }
  cuda_->begin_step({});
}

TEST_P(CudaOps, EmbedNormAndHeadMatchReference) {
  for (const int hidden : {8, 264, 5120}) {
    for (const int num_logits : {1, 5, 20, 64, 90}) {
      const int vocab = 77, tokens = 100;
      const auto h = static_cast<size_t>(hidden), r = static_cast<size_t>(num_logits);
      std::vector<int32_t> ids(tokens), logit_rows(r);
      for (int t = 0; t < tokens; ++t) ids[static_cast<size_t>(t)] = t * 31 % vocab;
      for (size_t i = 0; i < r; ++i) logit_rows[i] = static_cast<int32_t>(i * 37 % tokens);
      const std::vector<float> weight = normal(h, 12);
      std::vector<float> results[2][3];
      for (Backend* backend : {reference_.get(), cuda_}) {
        auto& out = results[backend == cuda_];
        const TestWeight table(*backend, WeightLayout::kBf16Rows, vocab, hidden, 0, 5, false);
        const Buffer device_ids = to_device(*backend, ids), rows = to_device(*backend, logit_rows);
        const Buffer norm = to_device(*backend, weight);
        const StepBatch batch{.num_tokens = tokens,
                              .num_logit_rows = num_logits,
                              .token_ids = device_ids.as<int32_t>(),
                              .logit_rows = rows.as<int32_t>()};
        const size_t act = backend->act_bytes();
        GuardedOutput x(*backend, tokens * h, act), y(*backend, tokens * h, act),
            logits(*backend, r * vocab);
        backend->embed(batch, table.operand(), x.data());
        backend->rms_norm(x.data(), norm.as<float>(), 1e-5f, tokens, hidden, y.data());
        backend->lm_head(batch, x.data(), norm.as<float>(), 1e-5f, table.operand(), logits.data());
        out[0] = x.read();
        out[1] = y.read();
        out[2] = logits.read();
      }
      EXPECT_EQ(results[0][0], results[1][0]) << "embed " << hidden;
      EXPECT_LT(rms_error(results[1][1], results[0][1]), 3e-3) << "rms_norm " << hidden;
      EXPECT_LT(element_error(results[1][1], results[0][1], h), 6e-3) << "rms_norm " << hidden;
      EXPECT_LT(rms_error(results[1][2], results[0][2]), 5e-3)
          << "lm_head " << hidden << " rows " << num_logits;
    }
  }
}

// In 8 bits it is an int4 matrix of twice the inputs, which the norm writes twice.
TEST_P(CudaOps, QuantizedHeadMatchesReference) {
  const int tokens = 100;
  for (const auto& [vocab, hidden] : {std::pair{328, 256}, {1000, 1152}, {40960, 384}}) {
    const std::vector<float> x = normal(static_cast<size_t>(tokens) * static_cast<size_t>(hidden),
                                        21),
                             weight = normal(static_cast<size_t>(hidden), 22);
    for (const WeightLayout layout : {WeightLayout::kCudaInt4, WeightLayout::kCudaInt8}) {
      for (const int rows : {1, 5, 9, 16, 17, 33, 64, 90}) {
        std::vector<int32_t> picked;
        for (int r = 0; r < rows; ++r) picked.push_back(r * 7 % tokens);
        const auto head = [&](Backend& backend, WeightLayout lies) {
          const TestWeight w(backend, lies, vocab, hidden, 128, 5, false);
          const Buffer in = acts_to_device(backend, x), norm = to_device(backend, weight),
                       indices = to_device(backend, picked);
          const StepBatch batch{
              .num_tokens = tokens, .num_logit_rows = rows, .logit_rows = indices.as<int32_t>()};
          GuardedOutput logits(backend, static_cast<size_t>(rows) * static_cast<size_t>(vocab));
          backend.lm_head(batch, in.data(), norm.as<float>(), 1e-5f, w.operand(), logits.data());
          return logits.read();
        };
        const auto name = [&] {
          return fmt::format("{} x {} {} rows {}", vocab, hidden, weight_layout_name(layout), rows);
        };
        const std::vector<float> want =
            head(*reference_,
                 is_int8(layout) ? WeightLayout::kInt8Portable : WeightLayout::kInt4Portable);
        const std::vector<float> got = head(*cuda_, layout);
        EXPECT_LT(rms_error(got, want), 0.006) << name();
        const std::vector<float> again = head(*cuda_, layout);
        EXPECT_TRUE(same_bits(got.data(), again.data(), got.size())) << name() << " second run";
      }
    }
  }
}

// Attention
// ------------------------------------------------------------------------------------------------

std::vector<AttentionShape> cuda_attention_shapes() {
  std::vector<AttentionShape> shapes;
  for (const KvFormat format : {KvFormat::kInt8Dynamic, KvFormat::kInt8Static, KvFormat::kF16}) {
    for (const auto& [heads, kv_heads] :
         {std::pair{4, 1}, {8, 2}, {2, 1}, {6, 2}, {3, 3}, {8, 1}}) {
      shapes.push_back({heads, kv_heads, 128, 64, format});
    }
  }
  return shapes;
}

TEST_P(CudaOps, AttentionMatchesReference) {
  for (const AttentionShape& shape : cuda_attention_shapes()) {
    AttentionRun want(*reference_, shape, 4, 620, 3, true), got(*cuda_, shape, 4, 620, 5, true);
    // Prompts, decode in front of a chunk and behind one, decode alone, a long prompt.
    const std::vector<std::vector<Chunk>> steps = {
        {{0, 33}, {1, 1}}, {{0, 1}, {1, 40}, {2, 7}}, {{1, 63}, {0, 1}}, {{0, 1}, {1, 1}, {2, 1}},
        {{3, 575}},        {{3, 1}, {0, 1}},          {{3, 20}, {0, 3}}};
    for (size_t i = 0; i < steps.size(); ++i) {
      const std::vector<float> expected = want.step(steps[i]), result = got.step(steps[i]);
      EXPECT_LT(rms_error(result, expected), 1e-2) << shape.name() << " step " << i;
      // Scales are f16 here: one value in sixteen is rounded to the next of its 127 steps, which a
      // token that attends to itself alone passes on whole (times out_scale, up to 2.6).
      const auto row = static_cast<size_t>(shape.num_heads * shape.head_dim);
      EXPECT_LT(element_error(result, expected, row), 0.08) << shape.name() << " step " << i;
    }
  }
}

// Every number of CTAs a sequence and an SM that attention_step.cu has, and more sequences than
// the device takes at once.
TEST_P(CudaOps, DecodeStepsMatchReference) {
  struct Case {
    KvFormat format;
    std::vector<int> lengths;
    std::vector<std::pair<int, int>> steps;  // first sequence, count
  };
  std::vector<int> many;
  for (int s = 0; s < 72; ++s) many.push_back(s * 37 % 400 + 1);
  // Around page borders, and more pages than a CTA has in flight.
  const std::vector<int> few = {1, 63, 64, 65, 127, 300, 1400, 513, 16};
  const std::vector<std::pair<int, int>> few_steps = {
      {6, 1}, {0, 1}, {1, 2}, {5, 2}, {2, 4}, {4, 5}, {0, 8}, {0, 8}, {1, 8}, {0, 9}, {8, 1}};
  for (const Case& c :
       {Case{KvFormat::kInt8Dynamic, few, few_steps}, Case{KvFormat::kInt8Static, few, few_steps},
        Case{KvFormat::kInt8Dynamic,
             many,
             {{0, 17}, {1, 33}, {2, 34}, {0, 64}, {6, 66}, {0, 72}}}}) {
    const AttentionShape shape{32, 8, 128, 64, c.format};
    const int sequences = static_cast<int>(c.lengths.size());
    const int most = *std::max_element(c.lengths.begin(), c.lengths.end()) + 100;
    AttentionRun want(*reference_, shape, sequences, most, 3, true),
        got(*cuda_, shape, sequences, most, 5, true);
    for (int s = 0; s < sequences; ++s) {
      want.step({{s, c.lengths[static_cast<size_t>(s)]}});
      got.step({{s, c.lengths[static_cast<size_t>(s)]}});
    }
    for (const auto& [first, count] : c.steps) {
      std::vector<Chunk> step;
      for (int s = first; s < first + count; ++s) step.push_back({s, 1});
      const std::vector<float> expected = want.step(step), result = got.step(step);
      EXPECT_LT(rms_error(result, expected), 1e-2) << count << " from " << first;
      EXPECT_LT(element_error(result, expected, size_t{32} * 128), 0.08)
          << count << " from " << first;
    }
  }
}

// Many more pages than a CTA has in flight, with every number of CTAs a sequence: against the same
// tokens in steps that have a chunk of another sequence too, which another kernel serves.
TEST_P(CudaOps, LongDecodeStepsMatchMixedOnes) {
  if (portable()) return;  // one kernel for both
  const AttentionShape shape{32, 8, 128, 64, KvFormat::kInt8Dynamic};
  const size_t row = size_t{32} * 128;
  struct Case {
    int sequences, length, longest;  // of one in the middle
  };
  // The last five are uneven (StepBatch::is_uneven): shared by four and two CTAs.
  for (const auto& [sequences, length, longest] :
       {Case{16, 1100, 1100}, Case{8, 1200, 1200}, Case{4, 2300, 2300}, Case{1, 4600, 4600},
        Case{12, 60, 3100}, Case{17, 300, 2050}, Case{33, 130, 3700}, Case{40, 64, 2600},
        Case{64, 200, 3700}}) {
    AttentionRun alone(*cuda_, shape, sequences + 1, longest + 100, 3),
        mixed(*cuda_, shape, sequences + 1, longest + 100, 5);
    std::vector<Chunk> step;
    for (int s = 0; s < sequences; ++s) {
      const int count = s == sequences / 2 ? longest : length;
      alone.step({{s, count}});
      mixed.step({{s, count}});
      step.push_back({s, 1});
    }
    std::vector<Chunk> with_chunk = step;
    with_chunk.push_back({sequences, 2});
    for (int i = 0; i < 10; ++i) {
      const std::vector<float> result = alone.step(step);
      std::vector<float> expected = mixed.step(with_chunk);
      expected.resize(result.size());
      ASSERT_LT(rms_error(result, expected), 1e-2)
          << sequences << " x " << length << " ... " << longest << ", step " << i;
      ASSERT_LT(element_error(result, expected, row), 0.08)
          << sequences << " x " << length << " ... " << longest << ", step " << i;
    }
  }
}

TEST_P(CudaOps, AttentionOfPromptsDoesNotDependOnChunksOrBatch) {
  for (const AttentionShape& shape : {AttentionShape{2, 1, 128, 64, KvFormat::kInt8Dynamic},
                                      AttentionShape{4, 1, 128, 64, KvFormat::kF16},
                                      AttentionShape{8, 2, 128, 64, KvFormat::kInt8Dynamic},
                                      AttentionShape{4, 1, 128, 64, KvFormat::kInt8Static}}) {
    // On sm_90 int8 and four heads per KV head have kernels of their own, others for drawn tokens.
    const bool one_kernel =
        portable() || shape.format == KvFormat::kF16 || shape.num_heads != 4 * shape.num_kv_heads;
    const int length = 400;
    const auto row = static_cast<size_t>(shape.num_heads * shape.head_dim);
    AttentionRun whole(*cuda_, shape, 1, length, 0);
    const std::vector<float> all = whole.step({{0, length}});
    AttentionRun chunked(*cuda_, shape, 2, length, 11);
    int done = 0;
    for (const auto& step : std::vector<std::vector<Chunk>>{{{1, 50}, {0, 1, true}},
                                                            {{0, 63}},
                                                            {{0, 1, !one_kernel}, {1, 30}},
                                                            {{1, 1}, {0, 130}},
                                                            {{0, 1, !one_kernel}},
                                                            {{0, 204}}}) {
      const std::vector<float> y = chunked.step(step);
      size_t at = 0;
      for (const Chunk& chunk : step) {
        const size_t n = static_cast<size_t>(chunk.count) * row;
        if (chunk.sequence == 0) {
          ASSERT_TRUE(same_bits(y.data() + at, all.data() + static_cast<size_t>(done) * row, n))
              << shape.name() << " positions " << done << '+' << chunk.count;
          done += chunk.count;
        }
        at += n;
      }
    }
    EXPECT_EQ(done, length);
  }
}

// Contexts of several parts (512 tokens each), alone and among others, as one-token rows whose
// parts have CTAs of their own and as rows of a chunk, which walks them.
TEST_P(CudaOps, PortableAttentionDoesNotDependOnHowItIsSplit) {
  if (!portable()) return;
  for (const AttentionShape& shape : {AttentionShape{4, 1, 128, 64, KvFormat::kInt8Dynamic},
                                      AttentionShape{2, 2, 128, 64, KvFormat::kF16}}) {
    const int length = 1100;
    const auto row = static_cast<size_t>(shape.num_heads * shape.head_dim);
    AttentionRun whole(*cuda_, shape, 3, length, 0), steps(*cuda_, shape, 3, length, 0);
    for (AttentionRun* run : {&whole, &steps}) run->step({{0, 509}, {1, 700}, {2, 30}});
    const std::vector<float> all = whole.step({{0, 520}});
    for (int i = 0; i < 5; ++i) {  // across a part's border
      const std::vector<float> y = steps.step({{0, 1}, {1, 1}, {2, 1}});
      ASSERT_TRUE(same_bits(y.data(), all.data() + static_cast<size_t>(i) * row, row))
          << shape.name() << " position " << 509 + i;
    }
    steps.step({{0, 510}});
    for (int i = 515; i < 520; ++i) {
      const std::vector<float> y = steps.step({{0, 1}});
      ASSERT_TRUE(same_bits(y.data(), all.data() + static_cast<size_t>(i) * row, row))
          << shape.name() << " position " << 509 + i;
    }
  }
}

TEST_P(CudaOps, RefusesWhatItsKernelsCannotDo) {
  EXPECT_THROW(cuda_->kv_block_bytes(KvFormat::kF32, 64, 1, 128), Error);
  EXPECT_THROW(cuda_->kv_block_bytes(KvFormat::kInt8Dynamic, 32, 1, 128), Error);
  EXPECT_THROW(cuda_->kv_block_bytes(KvFormat::kInt8Dynamic, 64, 1, 64), Error);
  const Buffer memory = cuda_->alloc(4096);
  EXPECT_THROW(cuda_->linear(memory.data(),
                             {.layout = WeightLayout::kInt4Portable,
                              .out_features = 8,
                              .in_features = 128,
                              .group_size = 128,
                              .weight = memory.data()},
                             1, false, memory.data()),
               Error);
}

// Sampling
// ------------------------------------------------------------------------------------------------

constexpr int kLogprobs = 5;

struct Drawn {
  std::vector<int32_t> tokens, top_tokens;
  std::vector<float> logprobs, top_logprobs;
};

struct SampleInput {
  std::vector<SampleRow> rows;
  std::vector<TokenCount> history;
  std::vector<int32_t> previous;  // SampleBatch::previous_tokens
  std::vector<TokenBias> bias;
  std::vector<uint64_t> allowed;  // empty: all
  std::vector<uint64_t> masks;    // [n, ceil(vocab / 64)]
  std::vector<float> logits;
  int vocab = 0;
};

template <typename T>
std::vector<T> from_device(Backend& backend, const Buffer& buffer, size_t count) {
  std::vector<T> host(count);
  backend.sync();
  backend.download(host.data(), buffer.data(), count * sizeof(T));
  backend.sync();
  return host;
}

Drawn draw(Backend& backend, const SampleInput& in) {
  const size_t rows = in.rows.size(), top = rows * kLogprobs;
  const Buffer device_rows = to_device(backend, in.rows), history = to_device(backend, in.history),
               previous = to_device(backend, in.previous), bias = to_device(backend, in.bias),
               allowed = to_device(backend, in.allowed), masks = to_device(backend, in.masks),
               logits = to_device(backend, in.logits);
  const Buffer tokens = to_device(backend, std::vector<int32_t>(rows, -7)),
               top_tokens = to_device(backend, std::vector<int32_t>(top, -7)),
               logprobs = to_device(backend, std::vector<float>(rows, -7)),
               top_logprobs = to_device(backend, std::vector<float>(top, -7));
  backend.sample({.num_rows = static_cast<int>(rows),
                  .vocab_size = in.vocab,
                  .rows = device_rows.as<SampleRow>(),
                  .history = history.as<TokenCount>(),
                  .previous_tokens = previous.as<int32_t>(),
                  .bias = bias.as<TokenBias>(),
                  .allowed = in.allowed.empty() ? nullptr : allowed.as<uint64_t>(),
                  .masks = masks.as<uint64_t>(),
                  .mask_words = (in.vocab + 63) / 64,
                  .max_logprobs = kLogprobs},
                 logits.as<float>(),
                 {.tokens = tokens.as<int32_t>(),
                  .logprobs = logprobs.as<float>(),
                  .top_tokens = top_tokens.as<int32_t>(),
                  .top_logprobs = top_logprobs.as<float>()});
  return {
      from_device<int32_t>(backend, tokens, rows), from_device<int32_t>(backend, top_tokens, top),
      from_device<float>(backend, logprobs, rows), from_device<float>(backend, top_logprobs, top)};
}

TEST_P(CudaOps, SampleMatchesReference) {
  for (const int vocab : {1, 5, 64, 1000, 5003, 131072}) {
    SampleInput in;
    in.vocab = vocab;
    for (const float temperature : {0.0f, 0.7f, 1.0f, 3.0f}) {
      for (const float top_p : {1.0f, 0.9f, 0.3f, 1e-6f}) {
        for (const int top_k : {0, 1, 40, 100000}) {
          for (const float min_p : {0.0f, 0.05f}) {
            if (vocab == 131072 && (in.rows.size() % 5 != 0 || in.rows.size() > 60)) {
              in.rows.push_back({.temperature = 0});
              continue;
            }
            SampleRow row{
                .temperature = temperature, .top_p = top_p, .min_p = min_p, .top_k = top_k};
            row.seed = in.rows.size() * 77;
            row.position = in.rows.size();
            if (in.rows.size() % 3 == 1)
              row.num_logprobs = static_cast<int32_t>(in.rows.size() % 7);
            if (in.rows.size() % 4 == 2) {
              row.repetition_penalty = 1.3f;
              row.presence_penalty = 0.4f;
              row.frequency_penalty = 0.2f;
              row.history_end = std::min(vocab, 5);
              row.bias_end = std::min(vocab, 2);
              // In the history, at its end, and in it or not.
              if (in.rows.size() % 8 == 6)
                row.pending = static_cast<int32_t>(in.rows.size() / 8 % 3);
            }
            if (in.rows.size() % 16 == 9) row.forced_token = vocab / 2;
            if (in.rows.size() % 5 == 3) row.mask = static_cast<int32_t>(in.rows.size() % 3);
            in.rows.push_back(row);
          }
        }
      }
    }
    for (int i = 0; i < std::min(vocab, 5); ++i)
      in.history.push_back({i * (vocab / std::min(vocab, 5)), i % 3});
    in.previous = {0, vocab - 1, vocab / 2};
    in.bias = {{0, -std::numeric_limits<float>::infinity()}, {vocab - 1, 2.5f}};
    if (vocab == 1000) {
      in.allowed.assign(static_cast<size_t>(vocab) / 64 + 1, ~uint64_t{0});
      in.allowed[0] = 0xfffffffffffffff5u;  // two ids banned
    }
    // A few ids (none of vocab 1), one id, every id but some.
    const auto words = static_cast<size_t>(vocab + 63) / 64;
    in.masks.resize(3 * words);
    for (int v = 0; v < vocab; ++v) {
      const auto word = static_cast<size_t>(v / 64);
      const uint64_t bit = uint64_t{1} << (v % 64);
      if (v % 37 == 4) in.masks[word] |= bit;
      if (v == vocab / 2) in.masks[words + word] |= bit;
      if (v % 5 != 0) in.masks[2 * words + word] |= bit;
    }
    in.logits.resize(in.rows.size() * static_cast<size_t>(vocab));
    fill_normal(in.logits, static_cast<uint64_t>(vocab), 2.0f);
    for (float& logit : in.logits) logit = std::round(logit * 8) / 8;  // ties
    const Drawn want = draw(*reference_, in), got = draw(*cuda_, in);
    for (size_t r = 0; r < in.rows.size(); ++r) {
      EXPECT_EQ(got.tokens[r], want.tokens[r])
          << "vocab " << vocab << " row " << r << " temperature " << in.rows[r].temperature
          << " top_p " << in.rows[r].top_p << " top_k " << in.rows[r].top_k << " min_p "
          << in.rows[r].min_p;
    }
    EXPECT_EQ(got.top_tokens, want.top_tokens) << vocab;
    for (size_t i = 0; i < want.logprobs.size(); ++i)
      EXPECT_NEAR(got.logprobs[i], want.logprobs[i], 1e-5);
    for (size_t i = 0; i < want.top_logprobs.size(); ++i) {
      if (std::isinf(want.top_logprobs[i])) {
        EXPECT_EQ(got.top_logprobs[i], want.top_logprobs[i]);
      } else {
        EXPECT_NEAR(got.top_logprobs[i], want.top_logprobs[i], 1e-5);
      }
    }
  }
}

// A model that has broken gives no number; what is drawn then must still be an id.
TEST_P(CudaOps, SampleOfNoNumbersIsAnId) {
  for (const int vocab : {5, 5003}) {
    SampleInput in;
    in.vocab = vocab;
    in.rows = {{.temperature = 0}, {.temperature = 1}, {.top_p = 0.9f}, {.top_k = 3}};
    for (SampleRow& row : in.rows) row.num_logprobs = 2;
    in.previous = {0};
    in.masks.assign(static_cast<size_t>(vocab + 63) / 64, ~uint64_t{0});
    in.logits.assign(in.rows.size() * static_cast<size_t>(vocab),
                     std::numeric_limits<float>::quiet_NaN());
    // In the last row one is.
    in.logits.back() = 1;
    const Drawn got = draw(*cuda_, in);
    for (size_t r = 0; r + 1 < in.rows.size(); ++r) {
      EXPECT_GE(got.tokens[r], 0);
      EXPECT_LT(got.tokens[r], vocab);
      EXPECT_EQ(got.top_tokens[r * kLogprobs], -1);
    }
    EXPECT_EQ(got.tokens.back(), vocab - 1);
  }
}

}  // namespace
}  // namespace nibble::ops
