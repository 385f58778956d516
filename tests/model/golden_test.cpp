// The reference backend against Hugging Face's numbers on real models: logits, perplexity of the
// first windows, greedy continuations. nano ships with nibble; small lies in the shared folder and
// is skipped without it. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <boost/json/value_to.hpp>
#include <cmath>
#include <cstring>

#include "base/json.h"
#include "build/model_loader.h"
#include "eval/evaluate.h"
#include "model/single_sequence.h"

namespace nibble {
namespace {

// Where Hugging Face's two best logits are closer than this, another correct engine may choose the
// other.
constexpr double kGreedyGap = 2e-3;

struct GoldenCase {
  const char* name;
  fs::path model, golden;
};

class Golden : public ::testing::TestWithParam<GoldenCase> {
 protected:
  void SetUp() override {
    if (!fs::exists(GetParam().model)) GTEST_SKIP() << GetParam().model << " is not here";
    golden_ = parse_json(read_file(GetParam().golden / "golden.json"), "golden.json");
    LoadOptions options;
    options.build.target = "ref";
    options.build.kv_format = KvFormat::kF32;
    model_ = load_model(GetParam().model, options);
  }
  std::vector<int32_t> eval_ids(const char* file, size_t count) const {
    const std::string bytes = read_file(GetParam().golden / file);
    std::vector<int32_t> ids;
    for (size_t i = 0; i < count; ++i) {
      ids.push_back(static_cast<uint8_t>(bytes[2 * i]) | static_cast<uint8_t>(bytes[2 * i + 1])
                                                             << 8);
    }
    return ids;
  }
  json::value golden_;
  LoadedModel model_;
};

double relative_error(std::span<const float> a, std::span<const float> b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    norm += double{b[i]} * b[i];
  }
  return std::sqrt(difference / norm);
}

TEST_P(Golden, LogitsMatchHuggingFace) {
  const SafetensorsFile full = SafetensorsFile::open(GetParam().golden / "full_logits.safetensors");
  SingleSequence sequence(*model_.backend, model_.plan, model_.weights, 2112, 256);
  for (const json::value& prompt : golden_.at("prompts").as_array()) {
    const auto ids = json::value_to<std::vector<int32_t>>(prompt.at("ids"));
    const std::string name(prompt.at("name").as_string());
    sequence.reset();
    const std::span<const float> logits = sequence.extend(ids, SingleSequence::Logits::kLast);
    const auto top_ids = json::value_to<std::vector<int32_t>>(prompt.at("top50_ids"));
    const auto top_logits = json::value_to<std::vector<double>>(prompt.at("top50_logits"));
    for (size_t i = 0; i < top_ids.size(); ++i) {
      EXPECT_NEAR(logits[static_cast<size_t>(top_ids[i])], top_logits[i],
                  1e-3 * std::fabs(top_logits[i]) + 1e-4)
          << name << " rank " << i;
    }
    if (full.contains(name)) {
      const TensorView view = full.tensor(name);
      ASSERT_EQ(view.dtype, DType::kF32);
      std::vector<float> expected(logits.size());
      ASSERT_EQ(view.bytes.size(), expected.size() * sizeof(float));
      std::memcpy(expected.data(), view.bytes.data(), view.bytes.size());
      const double error = relative_error(logits, expected);
      RecordProperty(name, std::to_string(error));
      EXPECT_LE(error, 1e-3) << name;  // the bar; measured is nearer 1e-6
      EXPECT_LE(error, 2e-5) << name;
    }
  }
}

TEST_P(Golden, FirstWindowsPerplexityMatches) {
  for (const auto& [set, file] :
       {std::pair{"wiki", "eval_wiki.u16"}, std::pair{"dialog", "eval_dialog.u16"}}) {
    const json::value& nll = golden_.at("nll").at(set).at("fp32");
    const auto expected = json::value_to<std::vector<double>>(nll.at("first_windows"));
    SilentProgress silent;
    const EvalResult result = evaluate(model_, eval_ids(file, 3 * 1024), {.context = 1024}, silent);
    ASSERT_EQ(result.num_windows, 3);
    EXPECT_EQ(result.num_scored, 3 * 1023);
    for (size_t k = 0; k < 3; ++k)
      EXPECT_NEAR(result.window_nll[k], expected[k], 5e-6) << set << " window " << k;
  }
}

TEST_P(Golden, GreedyContinuationsMatchUpToTies) {
  SingleSequence sequence(*model_.backend, model_.plan, model_.weights, 2112, 256);
  for (const json::value& prompt : golden_.at("prompts").as_array()) {
    const auto expected = json::value_to<std::vector<int32_t>>(prompt.at("greedy64"));
    const auto gaps = json::value_to<std::vector<double>>(prompt.at("greedy64_top1_minus_top2"));
    std::vector<int32_t> next = json::value_to<std::vector<int32_t>>(prompt.at("ids"));
    sequence.reset();
    for (size_t step = 0; step < expected.size(); ++step) {
      const std::span<const float> logits = sequence.extend(next, SingleSequence::Logits::kLast);
      const auto token =
          static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      if (token != expected[step]) {
        EXPECT_LT(gaps[step], kGreedyGap) << prompt.at("name") << " step " << step;
        break;
      }
      next = {token};
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Golden,
                         ::testing::Values(GoldenCase{"nano", NIBBLE_SOURCE_DIR "/models/nano",
                                                      NIBBLE_SOURCE_DIR "/tests/data/nano"},
                                           GoldenCase{"small", NIBBLE_SHARED_DIR "/models/small",
                                                      NIBBLE_SHARED_DIR "/models/small/golden"}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nibble
