// The two real small models that lie beside the repository; skipped where they do not.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "formats/safetensors.h"
#include "formats/weight_source.h"
#include "testing.h"

namespace nibble {
namespace {

class RealModel : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    directory_ = fs::path(NIBBLE_SHARED_DIR) / "models" / GetParam();
    if (!fs::exists(directory_ / "config.json")) GTEST_SKIP() << directory_ << " is not there";
  }
  fs::path directory_;
};

TEST_P(RealModel, EveryWeightLoadsAndIsSane) {
  EXPECT_EQ(model_kind(directory_), ModelKind::kHuggingFace);
  const auto source = open_hf(directory_);
  EXPECT_EQ(source->spec().architecture, "MistralForCausalLM");
  EXPECT_EQ(source->spec().rope_theta, 1e6);
  EXPECT_EQ(source->spec().eos_token_ids, std::vector<int>{2});
  EXPECT_TRUE(source->notices().empty());
  int64_t total = 0;
  for (const WeightRow& row : weight_table(source->spec())) {
    const std::vector<float> values = source->load_dense(row);
    double sum_squares = 0;
    for (const float value : values) sum_squares += static_cast<double>(value) * value;
    const double rms = std::sqrt(sum_squares / static_cast<double>(values.size()));
    EXPECT_TRUE(rms > 1e-3 && rms < 100) << row.name << " rms " << rms;
    total += static_cast<int64_t>(values.size());
    std::vector<std::byte> storage;
    EXPECT_EQ(source->view_dense(row, storage).bytes.size(), values.size() * 2) << row.name;
    source->release(row);
    EXPECT_EQ(source->load_dense(row), values) << row.name << " after release";
  }
  EXPECT_EQ(total, source->spec().num_parameters());
}

TEST_P(RealModel, QkvIsQThenKThenV) {
  const auto source = open_hf(directory_);
  const ModelSpec& spec = source->spec();
  const std::vector<float> qkv = source->load_dense(weight_table(spec)[2]);
  const std::string index = read_file(directory_ / "model.safetensors.index.json");
  const SafetensorsFile shard = SafetensorsFile::open(
      directory_ / (std::string(GetParam()) == "nano" ? "model-00001-of-00002.safetensors"
                                                      : "model-00001-of-00006.safetensors"));
  const TensorView v = shard.tensor("model.layers.0.self_attn.v_proj.weight");
  uint16_t bits;
  std::memcpy(&bits, v.bytes.data(), 2);
  const uint32_t wide = uint32_t{bits} << 16;
  float first;
  std::memcpy(&first, &wide, 4);
  EXPECT_EQ(qkv[static_cast<size_t>(spec.q_size() + spec.kv_size()) *
                static_cast<size_t>(spec.hidden_size)],
            first);
}

INSTANTIATE_TEST_SUITE_P(Both, RealModel, ::testing::Values("nano", "small"));

}  // namespace
}  // namespace nibble
