// Whole models on the GPU: logits against the reference backend, and chunked prefill plus decode
// against one prefill. Skipped where the plugin finds no GPU.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <ostream>

#include "base/error.h"
#include "base/file.h"
#include "build/model_loader.h"
#include "formats/synthetic.h"
#include "model/single_sequence.h"
#include "ops/cpu_test_util.h"

namespace nibble {
namespace {

struct Shape {
  const char* name;
  int heads, kv_heads;
  bool int4;
  KvFormat kv;
  LmHeadFormat lm_head = LmHeadFormat::kDense;
};
void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

class CudaModel : public testing::TestWithParam<std::tuple<const char*, Shape>> {
 protected:
  static LoadedModel load(const char* target) {
    const Shape& shape = std::get<1>(GetParam());
    ModelSpec spec = synthetic_shape("nano-like").spec;
    spec.num_heads = shape.heads;
    spec.num_kv_heads = shape.kv_heads;
    LoadOptions options;
    options.build.target = target;
    options.build.kv_format = shape.kv;
    options.build.limits.max_input_len = 400;
    options.build.limits.max_output_len = 100;
    options.build.limits.max_num_tokens = 512;
    return load_source(open_synthetic(spec, 7, shape.int4, shape.lm_head), options);
  }
  void SetUp() override {
    try {
      cuda_ = load(std::get<0>(GetParam()));
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kDevice) throw;
      GTEST_SKIP() << error.what();
    }
  }
  LoadedModel cuda_;
};
INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaModel,
    testing::Combine(testing::Values("cuda:sm_90", "cuda:portable"),
                     testing::Values(Shape{"int4_4to1_int8", 8, 2, true, KvFormat::kInt8Dynamic},
                                     Shape{"int4_4to1_static", 4, 1, true, KvFormat::kInt8Static},
                                     Shape{"int4_2to1_int8", 4, 2, true, KvFormat::kInt8Dynamic},
                                     Shape{"int4_2to1_f16", 4, 2, true, KvFormat::kF16},
                                     Shape{"int4_head8", 8, 2, true, KvFormat::kInt8Dynamic,
                                           LmHeadFormat::kInt8},
                                     Shape{"int4_head4", 8, 2, true, KvFormat::kInt8Dynamic,
                                           LmHeadFormat::kInt4},
                                     Shape{"bf16_4to1_int8", 8, 2, false, KvFormat::kInt8Dynamic},
                                     Shape{"bf16_2to1_f16", 2, 1, false, KvFormat::kF16})),
    [](const auto& info) {
      return std::string(std::get<0>(info.param)).substr(std::string("cuda:").size()) + "_" +
             std::get<1>(info.param).name;
    });

std::vector<int32_t> random_ids(int count, int vocab) {
  std::vector<int32_t> ids;
  for (int i = 0; i < count; ++i) ids.push_back((i * 7919 + i * i * 31 + 5) % vocab);
  return ids;
}

// Mean over rows of KL(want || got) in nats.
double mean_kl(std::span<const float> want, std::span<const float> got, size_t vocab) {
  double kl = 0;
  const size_t rows = want.size() / vocab;
  for (size_t r = 0; r < rows; ++r) {
    double sums[2] = {0, 0};
    for (size_t v = 0; v < vocab; ++v) {
      sums[0] += std::exp(double{want[r * vocab + v]});
      sums[1] += std::exp(double{got[r * vocab + v]});
    }
    for (size_t v = 0; v < vocab; ++v) {
      const double p = want[r * vocab + v] - std::log(sums[0]);
      const double q = got[r * vocab + v] - std::log(sums[1]);
      kl += std::exp(p) * (p - q);
    }
  }
  return kl / static_cast<double>(rows);
}

TEST_P(CudaModel, LogitsAreTheReferences) {
  const LoadedModel reference = load("ref");
  const auto vocab = static_cast<size_t>(cuda_.plan.spec.vocab_size);
  const std::vector<int32_t> ids = random_ids(300, cuda_.plan.spec.vocab_size);
  SingleSequence want(*reference.backend, reference.plan, reference.weights, 400, 300);
  SingleSequence got(*cuda_.backend, cuda_.plan, cuda_.weights, 400, 300);
  const auto expected = want.extend(ids, SingleSequence::Logits::kAll);
  const auto result = got.extend(ids, SingleSequence::Logits::kAll);
  const std::vector<float> a(result.begin(), result.end()), b(expected.begin(), expected.end());
  EXPECT_LT(ops::rms_error(a, b), 0.03);
  EXPECT_LT(mean_kl(b, a, vocab), 2e-3);
  size_t same = 0;
  for (size_t r = 0; r < ids.size(); ++r) {
    const auto best = [&](const std::vector<float>& x) {
      return std::max_element(x.begin() + static_cast<long>(r * vocab),
                              x.begin() + static_cast<long>((r + 1) * vocab)) -
             x.begin();
    };
    same += best(a) == best(b);
  }
  EXPECT_GE(same, ids.size() * 95 / 100);
}

TEST_P(CudaModel, ChunksAndDecodeGiveThePrefillsLogits) {
  const std::vector<int32_t> ids = random_ids(200, cuda_.plan.spec.vocab_size);
  SingleSequence whole(*cuda_.backend, cuda_.plan, cuda_.weights, 256, 200);
  SingleSequence parts(*cuda_.backend, cuda_.plan, cuda_.weights, 256, 200);
  const auto all = whole.extend(ids, SingleSequence::Logits::kLast);
  const std::vector<float> want(all.begin(), all.end());
  const std::span<const int32_t> span(ids);
  size_t done = 0;
  std::vector<float> got;
  for (const size_t count : {50, 1, 1, 64, 13, 20, 49, 1, 1}) {
    const auto logits = parts.extend(span.subspan(done, count), SingleSequence::Logits::kLast);
    got.assign(logits.begin(), logits.end());
    done += count;
  }
  ASSERT_EQ(done, ids.size());
  EXPECT_LT(ops::rms_error(got, want), 0.03);
  const auto& [target, shape] = GetParam();
  // Kernels that promise the same bits.
  if (std::string(target) == "cuda:portable" || (!shape.int4 && shape.kv == KvFormat::kF16)) {
    EXPECT_TRUE(ops::same_bits(got.data(), want.data(), want.size()));
  }
}

// Rows of prompts keep the seam's invariant on every target.
TEST_P(CudaModel, ChunksOfPromptsGiveThePrefillsBits) {
  const std::vector<int32_t> ids = random_ids(400, cuda_.plan.spec.vocab_size);
  SingleSequence whole(*cuda_.backend, cuda_.plan, cuda_.weights, 400, 400);
  SingleSequence parts(*cuda_.backend, cuda_.plan, cuda_.weights, 400, 400);
  const auto all = whole.extend(ids, SingleSequence::Logits::kAll);
  const std::vector<float> want(all.begin(), all.end());
  const auto vocab = static_cast<size_t>(cuda_.plan.spec.vocab_size);
  const std::span<const int32_t> span(ids);
  size_t done = 0;
  for (const size_t count : {50, 2, 9, 64, 15, 65, 7, 186, 2}) {
    const auto logits = parts.extend(span.subspan(done, count), SingleSequence::Logits::kAll);
    EXPECT_TRUE(ops::same_bits(logits.data(), want.data() + done * vocab, logits.size()))
        << "rows " << done << '+' << count;
    done += count;
  }
  EXPECT_EQ(done, ids.size());
}

// The real model of the repository, unquantized, against the cpu backend.
class CudaNano : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Targets, CudaNano, testing::Values("cuda:sm_90", "cuda:portable"),
                         [](const auto& info) {
                           return std::string(info.param).substr(std::string("cuda:").size());
                         });
TEST_P(CudaNano, LogitsAreTheCpus) {
  fs::path root = NIBBLE_SOURCE_DIR;
  if (!fs::exists(root / "models/nano")) root = ".";  // a binary carried to another machine
  ASSERT_TRUE(fs::exists(root / "models/nano")) << "run this from the repository's root";
  LoadOptions options;
  options.build.limits.max_input_len = 600;
  options.build.limits.max_output_len = 1;
  options.build.limits.max_num_tokens = 512;
  options.build.target = GetParam();
  LoadedModel cuda;
  try {
    cuda = load_model(root / "models/nano", options);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kDevice) throw;
    GTEST_SKIP() << error.what();
  }
  options.build.target = "cpu:native";
  options.build.activation_precision = ActivationPrecision::kF32;
  const LoadedModel cpu = load_model(root / "models/nano", options);
  const std::string text = read_file(root / "tests/data/nano/eval_wiki.u16");
  std::vector<int32_t> ids;
  for (size_t i = 0; i < 512; ++i) {
    ids.push_back(static_cast<uint8_t>(text[2 * i]) | static_cast<uint8_t>(text[2 * i + 1]) << 8);
  }
  SingleSequence want(*cpu.backend, cpu.plan, cpu.weights, 512, 512);
  SingleSequence got(*cuda.backend, cuda.plan, cuda.weights, 512, 512);
  const auto expected = want.extend(ids, SingleSequence::Logits::kAll);
  const auto result = got.extend(ids, SingleSequence::Logits::kAll);
  const std::vector<float> a(result.begin(), result.end()), b(expected.begin(), expected.end());
  EXPECT_LT(ops::rms_error(a, b), 0.02);
  EXPECT_LT(mean_kl(b, a, static_cast<size_t>(cpu.plan.spec.vocab_size)), 1e-3);
}

}  // namespace
}  // namespace nibble
