// SPDX-License-Identifier: Apache-2.0
#include "formats/inspect.h"

#include "base/thread_pool.h"
#include "formats/checkpoint_writer.h"
#include "formats/safetensors.h"
#include "formats/synthetic.h"
#include "testing.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;
using testing_::catch_error;
using testing_::TemporaryDirectory;

TEST(Inspect, HuggingFaceDirectory) {
  TemporaryDirectory directory;
  ThreadPool pool(1);
  const ModelSpec spec = synthetic_shape("nano-like").spec;
  write_synthetic_hf(directory / "m", spec, 1, 2, pool);
  const json::object report = inspect_model(directory / "m");
  EXPECT_EQ(report.at("kind"), "hugging-face");
  EXPECT_EQ(report.at("parameters").to_number<int64_t>(), spec.num_parameters());
  EXPECT_EQ(report.at("bytes").to_number<int64_t>(), 2 * spec.num_parameters());
  EXPECT_EQ(report.at("weights").as_array().size(), 10u);
  EXPECT_THAT(describe_model(report),
              ::testing::AllOf(HasSubstr("MistralForCausalLM"), HasSubstr("BF16"),
                               HasSubstr("16 bits each")));
  const json::object norm = inspect_tensor(directory / "m", "layers.1.attn_norm");
  EXPECT_EQ(norm.at("dtype"), "BF16");
  EXPECT_NEAR(norm.at("mean").as_double(), 1.1, 0.3);
  EXPECT_EQ(norm.at("first").as_array().size(), 8u);
  const json::object raw = inspect_tensor(directory / "m", "model.layers.1.input_layernorm.weight");
  EXPECT_EQ(raw.at("mean"), norm.at("mean"));
  EXPECT_THAT(raw.at("file").as_string().c_str(), HasSubstr("model-0000"));
  EXPECT_THAT(catch_error([&] { inspect_tensor(directory / "m", "layers.1.atn_norm"); }).message,
              HasSubstr("\"layers.1.attn_norm\""));
}

TEST(Inspect, CheckpointAndInt4Row) {
  TemporaryDirectory directory;
  const ModelSpec spec = synthetic_shape("nano-like").spec;
  const auto source = open_synthetic(spec, 1, false);
  fs::create_directories(directory / "c");
  write_checkpoint(directory / "c", *source, {},
                   {.linear =
                        [](const WeightRow& row) {
                          const size_t n = static_cast<size_t>(row.shape[0] * row.shape[1]);
                          CheckpointLinear linear{
                              std::vector<int8_t>(n, -3), std::vector<float>(n / 128, 0.5f), {}};
                          linear.q[1] = 7;
                          return linear;
                        },
                    .kv_scales =
                        [&] {
                          const std::vector<float> ones(static_cast<size_t>(spec.num_layers), 1.0f);
                          return KvScales{ones, ones};
                        }});
  const json::object report = inspect_model(directory / "c");
  EXPECT_EQ(report.at("kind"), "checkpoint");
  EXPECT_TRUE(report.at("kv_scales").as_bool());
  EXPECT_THAT(describe_model(report), HasSubstr("int4 / 128"));
  const json::object row = inspect_tensor(directory / "c", "layers.0.down");
  EXPECT_EQ(row.at("dtype"), "int4");
  EXPECT_EQ(row.at("min").as_double(), -1.5);
  EXPECT_EQ(row.at("max").as_double(), 3.5);
  EXPECT_EQ(row.at("first").as_array()[1], 3.5);
  EXPECT_EQ(row.at("q_histogram").as_array()[15], 1);
  EXPECT_EQ(row.at("scale_mean").as_double(), 0.5);
  EXPECT_EQ(row.at("prequant_min").as_double(), 1.0);
  EXPECT_THAT(describe_tensor(row), HasSubstr("group_size         128"));
}

TEST(Inspect, EngineMetadataWithoutChecksums) {
  TemporaryDirectory directory;
  SafetensorsWriter writer = SafetensorsWriter::create(
      directory / "rank0.engine", {{"a", DType::kU8, {3}}, {"b", DType::kU8, {1}}},
      {{"plan", "{}"}, {"xxh3:a", "00"}}, 64);
  writer.write(std::vector<std::byte>(4, std::byte{2}));
  writer.commit();
  const json::object report = inspect_model(directory.path());
  EXPECT_EQ(report.at("tensors"), 2);
  EXPECT_EQ(dump_json(report.at("metadata")), R"({"rank0.engine": {"plan": "{}"}})");
  EXPECT_EQ(inspect_tensor(directory.path(), "a").at("mean").as_double(), 2.0);
}

TEST(Inspect, HumanBytes) {
  EXPECT_EQ(human_bytes(999), "999 B");
  EXPECT_EQ(human_bytes(47'144'806'400), "47.1 GB");
  EXPECT_EQ(human_bytes(999'900), "1 MB");
}

}  // namespace
}  // namespace nibble
