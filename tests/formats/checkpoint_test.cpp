// The checkpoint writer and reader: any tp in, any tp out.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>

#include "base/half.h"
#include "checkpoint_case.h"
#include "formats/checkpoint_config.h"
#include "formats/checkpoint_writer.h"
#include "formats/model_directory.h"
#include "formats/safetensors.h"
#include "formats/shard.h"
#include "formats/synthetic.h"
#include "formats/widen.h"
#include "testing.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;
using testing_::catch_error;
using testing_::TemporaryDirectory;

class TensorParallel : public ::testing::TestWithParam<int> {};

TEST_P(TensorParallel, ReadsBackWhole) {
  TemporaryDirectory directory;
  const ModelSpec spec = tiny_spec();
  write(directory / "c", spec, GetParam());
  const auto read = open_checkpoint(directory / "c");
  EXPECT_THAT(read->notices(), ::testing::IsEmpty());
  expect_equals_source(*read, spec);
}

// 4 exceeds the two kv heads, which are then held twice.
INSTANTIATE_TEST_SUITE_P(Sizes, TensorParallel, ::testing::Values(1, 2, 4));

TEST_P(TensorParallel, LmHeadReadsBackWholeInFourAndEightBits) {
  TemporaryDirectory directory;
  const WeightRow row = weight_table(tiny_spec()).back();
  for (const LmHeadFormat format : {LmHeadFormat::kInt4, LmHeadFormat::kInt8}) {
    const fs::path path = directory / lm_head_format_name(format);
    write_head(path, GetParam(), format);
    const auto read = open_checkpoint(path);
    EXPECT_THAT(read->notices(), ::testing::IsEmpty());
    EXPECT_EQ(read->spec().to_json(), tiny_spec().to_json());
    ASSERT_EQ(read->bits(row), format == LmHeadFormat::kInt8 ? 8 : 4);
    const CheckpointLinear wanted = with_head(row, format);
    EXPECT_EQ(read->load_pre_scale(row), wanted.pre_scale);
    if (format == LmHeadFormat::kInt8) {
      const Int8Weight weight = read->load_int8(row);
      EXPECT_EQ(std::memcmp(weight.values, wanted.q.data(), wanted.q.size()), 0);
      EXPECT_EQ(weight.scales, wanted.scales);
    } else {
      const Int4Weight weight = read->load_int4(row);
      EXPECT_TRUE(unpack(weight) == wanted.q);
      EXPECT_EQ(weight.scales, wanted.scales);
    }
    // What is padded has scales, as TensorRT-LLM wants of every group.
    const int last = GetParam() - 1;
    const SafetensorsFile file =
        SafetensorsFile::open(path / fmt::format("rank{}.safetensors", last));
    EXPECT_EQ(widen(file.tensor("lm_head.weights_scaling_factor")).back(), 1);
    EXPECT_EQ(
        file.tensor("lm_head.weight").shape,
        (std::vector<int64_t>{256 / GetParam() / (format == LmHeadFormat::kInt8 ? 1 : 2), 64}));
  }
}

TEST(Checkpoint, TheConfigSaysHowLmHeadIsStored) {
  TemporaryDirectory directory;
  const auto quantization = [&](LmHeadFormat format) {
    write_head(directory / "c", 1, format);
    return read_json_object(directory / "c/config.json").at("quantization").as_object();
  };
  // In TensorRT-LLM's own words: a list without lm_head, and not an empty one.
  const json::object four = quantization(LmHeadFormat::kInt4);
  EXPECT_EQ(four.at("exclude_modules"), (json::array{"transformer.vocab_embedding"}));
  EXPECT_FALSE(four.contains("lm_head_quant_algo"));
  EXPECT_EQ(quantization(LmHeadFormat::kInt8).at("lm_head_quant_algo"), "W8A16_GROUP");
}

TEST(Checkpoint, ReshardingFromFourToOneIsByteEqual) {
  TemporaryDirectory directory;
  const ModelSpec spec = tiny_spec();
  write(directory / "one", spec, 1);
  write(directory / "four", spec, 4);
  const auto four = open_checkpoint(directory / "four");
  fs::create_directories(directory / "again");
  write_checkpoint(directory / "again", *four, {.tp_size = 1, .group_size = kGroup},
                   {.linear =
                        [&](const WeightRow& row) {
                          const Int4Weight weight = four->load_int4(row);
                          return CheckpointLinear{unpack(weight), weight.scales, weight.pre_scale};
                        },
                    .kv_scales = [&] { return *four->kv_scales(); }});
  EXPECT_TRUE(read_file(directory / "one/rank0.safetensors") ==
              read_file(directory / "again/rank0.safetensors"));
  EXPECT_EQ(read_file(directory / "one/config.json"), read_file(directory / "again/config.json"));
}

TEST(Checkpoint, RankFilesHoldWhatTheTableOfFactsSays) {
  TemporaryDirectory directory;
  const ModelSpec spec = tiny_spec();
  write(directory / "c", spec, 4);
  for (int rank = 0; rank < 4; ++rank) {
    const SafetensorsFile file =
        SafetensorsFile::open(directory / fmt::format("c/rank{}.safetensors", rank));
    const auto expect = [&](const std::string& name, DType dtype, std::vector<int64_t> shape) {
      const TensorView view = file.tensor(name);
      EXPECT_EQ(view.dtype, dtype) << name;
      EXPECT_EQ(view.shape, shape) << name;
    };
    // q 128/4 rows, k and v one whole head of 16 each: 64 rows, two a byte.
    expect("transformer.layers.3.attention.qkv.weight", DType::kI8, {32, 64});
    expect("transformer.layers.3.attention.qkv.weights_scaling_factor", DType::kF32, {64, 2});
    expect("transformer.layers.3.attention.qkv.prequant_scaling_factor", DType::kBF16, {64});
    expect("transformer.layers.3.attention.dense.weight", DType::kI8, {32, 32});
    expect("transformer.layers.3.attention.dense.weights_scaling_factor", DType::kF32, {64, 1});
    expect("transformer.layers.3.attention.dense.prequant_scaling_factor", DType::kBF16, {32});
    expect("transformer.layers.3.mlp.fc.weight", DType::kI8, {32, 64});
    expect("transformer.layers.3.mlp.gate.weight", DType::kI8, {32, 64});
    expect("transformer.layers.3.mlp.proj.weight", DType::kI8, {32, 64});
    expect("transformer.layers.3.mlp.proj.prequant_scaling_factor", DType::kBF16, {64});
    expect("transformer.layers.3.input_layernorm.weight", DType::kBF16, {64});
    expect("transformer.layers.3.post_layernorm.weight", DType::kBF16, {64});
    expect("transformer.layers.3.attention.k_cache_scaling_factor", DType::kF32, {1});
    expect("transformer.layers.3.attention.v_cache_scaling_factor", DType::kF32, {1});
    expect("transformer.layers.3.attention.kv_cache_scaling_factor", DType::kF32, {1});
    expect("transformer.vocab_embedding.weight", DType::kBF16,
           {64, 64});  // 203 padded to 256, a quarter
    expect("lm_head.weight", DType::kBF16, {64, 64});
    expect("transformer.ln_f.weight", DType::kBF16, {64});
    EXPECT_EQ(file.entries().size(), 4 * (2 + 5 * 3 + 3) + 3u);
    const std::vector<float> head = widen(file.tensor("lm_head.weight"));
    if (rank == 3) {  // rows 203 - 192 = 11 and up are padding
      EXPECT_TRUE(std::all_of(head.begin() + 11 * 64, head.end(), [](float x) { return x == 0; }));
      EXPECT_NE(head[11 * 64 - 1], 0);
    }
  }
  // fc is gate_proj, the branch through SiLU: the naming trap.
  write(directory / "one", spec, 1);
  const SafetensorsFile file = SafetensorsFile::open(directory / "one/rank0.safetensors");
  const TensorView fc = file.tensor("transformer.layers.0.mlp.fc.weight");
  for (const WeightRow& row : weight_table(spec)) {
    if (row.name != "layers.0.gate") continue;
    EXPECT_EQ(row.hf_names[0], "model.layers.0.mlp.gate_proj.weight");
    const CheckpointLinear gate = linear_of(row);
    const auto byte =
        static_cast<uint8_t>(fc.bytes[5]);  // column 5 of rows 0 (low nibble) and 1 (high)
    EXPECT_EQ(byte & 15, gate.q[5] & 15);
    EXPECT_EQ(byte >> 4, gate.q[64 + 5] & 15);
  }
}

TEST(Checkpoint, ConfigHasExactlyTheKnownKeys) {
  TemporaryDirectory directory;
  write(directory / "c", tiny_spec(), 2);
  const json::object config = read_json_object(directory / "c/config.json");
  std::vector<std::string> keys;
  for (const auto& member : config) keys.emplace_back(member.key());
  EXPECT_THAT(keys,
              ::testing::UnorderedElementsAre(
                  "producer", "architecture", "model_type", "dtype", "logits_dtype",
                  "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
                  "intermediate_size", "head_size", "norm_epsilon", "vocab_size",
                  "max_position_embeddings", "hidden_act", "position_embedding_type", "rotary_base",
                  "rotary_pct", "rotary_embedding_dim", "rotary_scaling", "use_parallel_embedding",
                  "embedding_sharding_dim", "share_embedding_table", "decoder", "rmsnorm", "bias",
                  "lm_head_bias", "residual_mlp", "rank", "mapping", "quantization", "nibble"));
  EXPECT_EQ(dump_json(config.at("mapping")), R"({"world_size": 2, "tp_size": 2, "pp_size": 1})");
  EXPECT_EQ(
      dump_json(config.at("quantization")),
      R"({"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "INT8", "group_size": 32, "has_zero_point": false, )"
      R"("pre_quant_scale": true, "exclude_modules": ["lm_head"]})");
  EXPECT_EQ(dump_json(config.at("nibble")),
            R"({"vocab_size": 203, "bos_token_id": 3, "eos_token_ids": [7, 9]})");
  EXPECT_EQ(config.at("vocab_size"), 256);
  EXPECT_EQ(config.at("head_size"), 16);
  EXPECT_EQ(config.at("dtype"), "bfloat16");
  EXPECT_EQ(config.at("rotary_base"), 1e9);
  EXPECT_EQ(config.at("rank"), 1);
}

TEST(Checkpoint, WithoutInt8KvNoScalesAreWritten) {
  TemporaryDirectory directory;
  write(directory / "c", tiny_spec(), 1, false);
  expect_equals_source(*open_checkpoint(directory / "c"), tiny_spec(), false);
  EXPECT_TRUE(read_json_object(directory / "c/config.json")
                  .at("quantization")
                  .at("kv_cache_quant_algo")
                  .is_null());
}

TEST(Checkpoint, Llama3RopeAndTiedEmbeddingsSurvive) {
  TemporaryDirectory directory;
  ModelSpec spec = tiny_spec();
  spec.architecture = "LlamaForCausalLM";
  spec.rope_factor = 8;
  spec.rope_low_freq_factor = 1;
  spec.rope_high_freq_factor = 4;
  spec.rope_original_max_position = 8192;
  spec.tied_embeddings = true;
  write(directory / "c", spec, 2);
  EXPECT_FALSE(SafetensorsFile::open(directory / "c/rank0.safetensors").contains("lm_head.weight"));
  expect_equals_source(*open_checkpoint(directory / "c"), spec);
}

TEST(Checkpoint, F16OptionConvertsDenseTensors) {
  TemporaryDirectory directory;
  const ModelSpec spec = tiny_spec();
  const auto source = open_synthetic(spec, 11, false);
  fs::create_directories(directory / "c");
  write_checkpoint(directory / "c", *source,
                   {.group_size = kGroup, .dtype = DType::kF16, .int8_kv = false},
                   {.linear = linear_of});
  const auto read = open_checkpoint(directory / "c");
  EXPECT_EQ(read->spec().dtype, DType::kF16);
  const WeightRow row = weight_table(spec)[1];
  std::vector<float> wanted = source->load_dense(row);
  for (float& value : wanted) value = f16_to_float(float_to_f16(value));
  EXPECT_EQ(read->load_dense(row), wanted);
}

TEST(Checkpoint, WhatCannotBeCutIsRefused) {
  TemporaryDirectory directory;
  fs::create_directories(directory / "c");
  const auto source = open_synthetic(tiny_spec(), 11, false);
  for (const int tp : {3, 16}) {
    const auto caught = catch_error([&] {
      write_checkpoint(directory / "c", *source, {.tp_size = tp, .group_size = kGroup},
                       {.linear = linear_of});
    });
    EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
    EXPECT_THAT(caught.message, HasSubstr("attention heads"));
  }
  const auto caught = catch_error([&] {
    write_checkpoint(directory / "c", *source, {.tp_size = 1, .group_size = 128},
                     {.linear = linear_of});
  });
  EXPECT_THAT(caught.message, HasSubstr("hidden_size is 64"));
  EXPECT_TRUE(fs::is_empty(directory / "c"));
}

TEST(Checkpoint, AFailureLeavesNothingBehind) {
  TemporaryDirectory directory;
  fs::create_directories(directory / "c");
  const auto source = open_synthetic(tiny_spec(), 11, false);
  int calls = 0;
  catch_error([&] {
    write_checkpoint(directory / "c", *source, {.tp_size = 2, .group_size = kGroup},
                     {.linear = [&](const WeightRow& row) {
                       if (++calls == 7) fail(ErrorKind::kInterrupted, "stop");
                       return linear_of(row);
                     }});
  });
  EXPECT_EQ(calls, 7);
  EXPECT_TRUE(fs::is_empty(directory / "c"));
}

}  // namespace
}  // namespace nibble
