// The checkpoint writer and reader: any tp in, any tp out, and the variants that others write.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>

#include "base/half.h"
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

// 4 heads and 2 kv heads of 16, groups of 32 so that tp 4 divides everything; an odd vocabulary.
ModelSpec tiny_spec() {
  ModelSpec spec = synthetic_shape("nano-like").spec;
  spec.num_layers = 4;
  spec.hidden_size = 64;
  spec.num_heads = 8;
  spec.num_kv_heads = 2;
  spec.head_dim = 16;
  spec.ffn_size = 256;
  spec.vocab_size = 203;
  spec.rope_theta = 1e9;
  spec.bos_token_id = 3;
  spec.eos_token_ids = {7, 9};
  return spec;
}

constexpr int kGroup = 32;

// Deterministic content that covers every nibble value.
CheckpointLinear linear_of(const WeightRow& row) {
  const size_t out = static_cast<size_t>(row.shape[0]), in = static_cast<size_t>(row.shape[1]);
  CheckpointLinear linear;
  uint32_t state = 1;
  for (const char c : row.name) state = state * 31 + static_cast<unsigned char>(c);
  const auto next = [&] { return state = state * 1664525u + 1013904223u; };
  linear.q.resize(out * in);
  for (int8_t& q : linear.q) q = static_cast<int8_t>(static_cast<int>(next() >> 28) - 8);
  linear.scales.resize(out * in / kGroup);
  for (float& scale : linear.scales) scale = 0.001f + static_cast<float>(next() >> 16) * 1e-6f;
  linear.pre_scale.resize(in);
  for (float& scale : linear.pre_scale)
    scale = 0.5f + static_cast<float>(next() >> 25) / 128.0f;  // exact in bf16
  return linear;
}

KvScales scales_of(const ModelSpec& spec) {
  KvScales scales;
  for (int i = 0; i < spec.num_layers; ++i) {
    scales.k.push_back(0.01f * static_cast<float>(i + 1));
    scales.v.push_back(0.02f * static_cast<float>(5 - i));
  }
  return scales;
}

void write(const fs::path& directory, const ModelSpec& spec, int tp, bool int8_kv = true) {
  const auto source = open_synthetic(spec, 11, false);
  fs::create_directories(directory);
  write_checkpoint(directory, *source, {.tp_size = tp, .group_size = kGroup, .int8_kv = int8_kv},
                   {.linear = linear_of, .kv_scales = [&] { return scales_of(spec); }});
}

std::vector<int8_t> unpack(const Int4Weight& weight) {
  std::vector<int8_t> q(static_cast<size_t>(weight.out_features * weight.in_features));
  for (int64_t r = 0; r < weight.out_features; ++r) {
    for (int64_t c = 0; c < weight.in_features; ++c) {
      const auto byte = static_cast<uint8_t>(weight.nibbles[r / 2 * weight.in_features + c]);
      const int nibble = r % 2 == 0 ? byte & 15 : byte >> 4;
      q[static_cast<size_t>(r * weight.in_features + c)] =
          static_cast<int8_t>(nibble >= 8 ? nibble - 16 : nibble);
    }
  }
  return q;
}

void expect_equals_source(const WeightSource& read, const ModelSpec& spec, bool int8_kv = true) {
  EXPECT_EQ(read.spec().to_json(), spec.to_json());
  const auto dense = open_synthetic(spec, 11, false);
  for (const WeightRow& row : weight_table(spec)) {
    ASSERT_EQ(read.bits(row), quantized_bits(row)) << row.name;
    if (quantized_bits(row) == 0) {
      EXPECT_EQ(read.load_dense(row), dense->load_dense(row)) << row.name;
      std::vector<std::byte> storage;
      const TensorView view = read.view_dense(row, storage);
      EXPECT_EQ(view.shape, row.shape) << row.name;
      EXPECT_EQ(static_cast<size_t>(view.num_elements()) * 2, view.bytes.size()) << row.name;
      continue;
    }
    const CheckpointLinear wanted = linear_of(row);
    const Int4Weight weight = read.load_int4(row);
    EXPECT_EQ(weight.group_size, kGroup);
    EXPECT_TRUE(unpack(weight) == wanted.q) << row.name;
    EXPECT_EQ(weight.scales, wanted.scales) << row.name;
    EXPECT_EQ(weight.pre_scale, wanted.pre_scale) << row.name;
    read.release(row);
    EXPECT_TRUE(unpack(weight) == wanted.q) << row.name << " after release";
  }
  ASSERT_EQ(read.kv_scales().has_value(), int8_kv);
  if (int8_kv) {
    EXPECT_EQ(read.kv_scales()->k, scales_of(spec).k);
    EXPECT_EQ(read.kv_scales()->v, scales_of(spec).v);
  }
}

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

// lm_head by its format; the vocabulary of 203 is odd and padded to 256.
CheckpointLinear with_head(const WeightRow& row, LmHeadFormat format) {
  CheckpointLinear linear = linear_of(row);
  if (row.role == WeightRole::kLmHead && format == LmHeadFormat::kInt8) {
    for (size_t i = 0; i < linear.q.size(); ++i)
      linear.q[i] = static_cast<int8_t>(static_cast<int>(i * 37 % (2 * kMaxInt8 + 1)) - kMaxInt8);
    linear.pre_scale.clear();
  }
  return linear;
}

void write_head(const fs::path& directory, int tp, LmHeadFormat format) {
  const auto source = open_synthetic(tiny_spec(), 11, false);
  fs::create_directories(directory);
  write_checkpoint(
      directory, *source,
      {.tp_size = tp, .group_size = kGroup, .int8_kv = false, .lm_head = format},
      {.linear = [&](const WeightRow& row) { return with_head(row, format); }, .kv_scales = {}});
}

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

// Rewrites a rank file: each tensor may be renamed, changed or dropped.
struct Stored {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};
using Edit = std::function<bool(Stored&)>;  // false drops
void rewrite(const fs::path& path, const Edit& edit, std::vector<Stored> extra = {},
             const fs::path& to = {}) {
  std::vector<Stored> all;
  {
    const SafetensorsFile file = SafetensorsFile::open(path);
    for (const auto& entry : file.entries()) {
      const TensorView view = file.tensor(entry.name);
      Stored stored{entry.name, view.dtype, view.shape, {view.bytes.begin(), view.bytes.end()}};
      if (edit(stored)) all.push_back(std::move(stored));
    }
  }
  for (Stored& stored : extra) all.push_back(std::move(stored));
  std::vector<SafetensorsWriter::Declaration> declared;
  for (const Stored& stored : all) declared.push_back({stored.name, stored.dtype, stored.shape});
  SafetensorsWriter writer = SafetensorsWriter::create(to.empty() ? path : to, declared, {});
  for (const Stored& stored : all) writer.write(stored.bytes);
  writer.commit();
}

void edit_config(const fs::path& directory, const std::function<void(json::object&)>& edit) {
  json::object config = read_json_object(directory / "config.json");
  edit(config);
  write_file_atomically(directory / "config.json", dump_json(config));
}

class CheckpointVariant : public ::testing::Test {
 protected:
  void SetUp() override { write(path(), spec_, 1); }
  fs::path path() const { return directory_ / "c"; }
  fs::path rank0() const { return path() / "rank0.safetensors"; }
  TemporaryDirectory directory_;
  ModelSpec spec_ = tiny_spec();
};

TEST_F(CheckpointVariant, UnsignedWeights) {
  rewrite(rank0(), [](Stored& tensor) {
    if (tensor.dtype == DType::kI8) tensor.dtype = DType::kU8;
    return true;
  });
  expect_equals_source(*open_checkpoint(path()), spec_);
}

TEST_F(CheckpointVariant, HalfPrecisionScales) {
  rewrite(rank0(), [](Stored& tensor) {
    if (tensor.name.ends_with("weights_scaling_factor")) {
      const TensorView view{tensor.dtype, tensor.shape, tensor.bytes};
      tensor.bytes = narrow(widen(view), DType::kF16);
      tensor.dtype = DType::kF16;
    }
    return true;
  });
  const auto read = open_checkpoint(path());
  const WeightRow row = weight_table(spec_)[2];
  std::vector<float> wanted = linear_of(row).scales;
  for (float& value : wanted) value = f16_to_float(float_to_f16(value));
  EXPECT_EQ(read->load_int4(row).scales, wanted);
}

TEST_F(CheckpointVariant, NoPrequantVectors) {
  rewrite(rank0(),
          [](Stored& tensor) { return !tensor.name.ends_with("prequant_scaling_factor"); });
  const auto read = open_checkpoint(path());
  EXPECT_TRUE(read->load_int4(weight_table(spec_)[2]).pre_scale.empty());
}

TEST_F(CheckpointVariant, KvScalesUnderOneNameOrTwo) {
  rewrite(rank0(), [](Stored& tensor) {
    return tensor.name.find(".kv_cache_scaling") == std::string::npos;
  });
  expect_equals_source(*open_checkpoint(path()), spec_);
  write(path(), spec_, 1);
  rewrite(rank0(), [](Stored& tensor) {
    return tensor.name.find(".k_cache") == std::string::npos &&
           tensor.name.find(".v_cache") == std::string::npos;
  });
  const auto read = open_checkpoint(path());
  ASSERT_TRUE(read->kv_scales().has_value());
  for (size_t i = 0; i < 4; ++i) {
    const float larger = std::max(scales_of(spec_).k[i], scales_of(spec_).v[i]);
    EXPECT_EQ(read->kv_scales()->k[i], larger);
    EXPECT_EQ(read->kv_scales()->v[i], larger);
  }
}

TEST_F(CheckpointVariant, KvScalesForKAloneOrForSomeLayersAreRefused) {
  rewrite(rank0(), [](Stored& tensor) {
    return tensor.name.find(".kv_cache") == std::string::npos &&
           tensor.name.find(".v_cache") == std::string::npos;
  });
  EXPECT_THAT(catch_error([&] { open_checkpoint(path()); }).message,
              HasSubstr("layer 0 has a KV scale for K only"));
  write(path(), spec_, 1);
  rewrite(rank0(), [](Stored& tensor) {
    return tensor.name.find("layers.2.attention.k") == std::string::npos &&
           tensor.name.find("layers.2.attention.v") == std::string::npos;
  });
  EXPECT_THAT(catch_error([&] { open_checkpoint(path()); }).message, HasSubstr("3 of 4 layers"));
}

TEST_F(CheckpointVariant, AbsentNullOrFp8KvIsSaid) {
  rewrite(rank0(), [](Stored& tensor) { return tensor.name.find("_cache_") == std::string::npos; });
  {
    const auto read = open_checkpoint(path());
    EXPECT_FALSE(read->kv_scales().has_value());
    EXPECT_THAT(read->notices(), ::testing::ElementsAre(HasSubstr("no scales")));
  }
  write(path(), spec_, 1);
  edit_config(path(), [](json::object& config) {
    config["quantization"].as_object()["kv_cache_quant_algo"] = "FP8";
  });
  {
    const auto read = open_checkpoint(path());
    EXPECT_FALSE(read->kv_scales().has_value());
    EXPECT_THAT(read->notices(), ::testing::ElementsAre(HasSubstr("FP8")));
  }
  edit_config(path(), [](json::object& config) {
    config["quantization"].as_object()["kv_cache_quant_algo"] = nullptr;
  });
  EXPECT_FALSE(open_checkpoint(path())->kv_scales().has_value());
}

TEST_F(CheckpointVariant, MissingOptionalKeys) {
  edit_config(path(), [](json::object& config) {
    for (const char* key :
         {"mapping", "logits_dtype", "producer", "rank", "decoder", "model_type", "rmsnorm", "bias",
          "lm_head_bias", "residual_mlp", "rotary_pct", "rotary_embedding_dim", "rotary_scaling",
          "hidden_act", "position_embedding_type", "share_embedding_table"}) {
      config.erase(key);
    }
    config["some_new_key"] = 5;
    config["quantization"].as_object().erase("pre_quant_scale");
    config["quantization"].as_object()["smoothquant_val"] = 0.5;
  });
  expect_equals_source(*open_checkpoint(path()), spec_);
}

TEST_F(CheckpointVariant, PretrainedConfigNesting) {
  edit_config(path(), [](json::object& config) {
    json::object inner = std::move(config);
    config = {{"version", "1.2.0"},
              {"pretrained_config", inner},
              {"build_config", {{"max_batch_size", 64}}}};
  });
  EXPECT_EQ(model_kind(path()), ModelKind::kCheckpoint);
  expect_equals_source(*open_checkpoint(path()), spec_);
}

TEST_F(CheckpointVariant, PublishedLayoutIsResolved) {
  fs::create_directories(directory_ / "out/trt-llm");
  fs::rename(path(), directory_ / "out/trt-llm/checkpoints");
  write_file_atomically(directory_ / "out/generation_config.json",
                        R"({"eos_token_id": [2, 5], "bos_token_id": 1})");
  EXPECT_EQ(model_kind(directory_ / "out"), ModelKind::kCheckpoint);
  const auto read = open_checkpoint(directory_ / "out");
  EXPECT_EQ(read->spec().eos_token_ids, (std::vector<int>{2, 5}));
  EXPECT_EQ(read->spec().bos_token_id, 1);
}

TEST_F(CheckpointVariant, TwoPipelineStages) {
  const auto layer_of = [](const std::string& name) {
    const std::string prefix = "transformer.layers.";
    return name.starts_with(prefix) ? std::stoi(name.substr(prefix.size())) : -1;
  };
  const auto stage = [&](int which) {
    return [=](Stored& tensor) {
      const int layer = layer_of(tensor.name);
      if (layer < 0) return (tensor.name.find("embedding") != std::string::npos) == (which == 0);
      if (layer / 2 != which) return false;
      const std::string prefix = "transformer.layers." + std::to_string(layer);
      tensor.name =
          "transformer.layers." + std::to_string(layer % 2) + tensor.name.substr(prefix.size());
      return true;
    };
  };
  rewrite(rank0(), stage(1), {}, path() / "rank1.safetensors");
  rewrite(rank0(), stage(0));
  edit_config(path(), [](json::object& config) {
    config["mapping"] = {{"world_size", 2}, {"tp_size", 1}, {"pp_size", 2}};
  });
  const auto read = open_checkpoint(path());
  EXPECT_THAT(read->notices(), ::testing::IsEmpty());
  expect_equals_source(*read, spec_);
}

TEST_F(CheckpointVariant, EmbeddingSplitByHiddenOrNotAtAll) {
  write(path(), spec_, 2);
  const std::vector<float> whole =
      open_synthetic(spec_, 11, false)->load_dense(weight_table(spec_)[0]);
  for (const bool by_hidden : {true, false}) {
    for (int rank = 0; rank < 2; ++rank) {
      rewrite(path() / fmt::format("rank{}.safetensors", rank), [&](Stored& tensor) {
        if (tensor.name != "transformer.vocab_embedding.weight") return true;
        const size_t width = by_hidden ? 32 : 64,
                     first = by_hidden ? 32 * static_cast<size_t>(rank) : 0;
        std::vector<float> part;
        for (size_t r = 0; r < 203; ++r) {
          for (size_t c = 0; c < width; ++c) part.push_back(whole[r * 64 + first + c]);
        }
        tensor.bytes = narrow(part, DType::kBF16);
        tensor.shape = {203, static_cast<int64_t>(width)};
        return true;
      });
    }
    edit_config(path(), [&](json::object& config) {
      config["use_parallel_embedding"] = by_hidden;
      config["embedding_sharding_dim"] = 1;
    });
    EXPECT_EQ(open_checkpoint(path())->load_dense(weight_table(spec_)[0]), whole) << by_hidden;
  }
}

TEST_F(CheckpointVariant, LeftoverTensorsAreNoticed) {
  rewrite(
      rank0(), [](Stored&) { return true; },
      {{"transformer.layers.0.mlp.router.weight", DType::kBF16, {4}, std::vector<std::byte>(8)}});
  EXPECT_THAT(open_checkpoint(path())->notices(),
              ::testing::ElementsAre(HasSubstr("mlp.router.weight")));
}

struct BadTensors {
  const char* title;
  Edit edit;
  std::vector<std::string> named;
};

TEST_F(CheckpointVariant, DamagedTensorsAreNamed) {
  const std::string fc = "transformer.layers.1.mlp.fc.";
  const std::vector<BadTensors> table = {
      {"missing",
       [&](Stored& t) { return t.name != fc + "weight"; },
       {fc + "weight", "rank0.safetensors"}},
      {"missing scales",
       [&](Stored& t) { return t.name != fc + "weights_scaling_factor"; },
       {fc + "weights_scaling_factor"}},
      {"unpacked rows",
       [&](Stored& t) {
         if (t.name == fc + "weight") t.shape = {256, 32};
         return true;
       },
       {fc + "weight", "[256, 32]", "[128, 64]"}},
      {"wrong groups",
       [&](Stored& t) {
         if (t.name == fc + "weights_scaling_factor") {
           t.shape = {256, 1};
           t.bytes.resize(256 * 4);
         }
         return true;
       },
       {fc + "weights_scaling_factor", "64", "32"}},
      {"wrong prequant",
       [&](Stored& t) {
         if (t.name == fc + "prequant_scaling_factor") {
           t.shape = {32};
           t.bytes.resize(64);
         }
         return true;
       },
       {fc + "prequant_scaling_factor", "[32]", "[64]"}},
      {"integer norm",
       [&](Stored& t) {
         if (t.name == "transformer.ln_f.weight") t.dtype = DType::kI16;
         return true;
       },
       {"transformer.ln_f.weight", "I16"}},
      {"quantized head",
       [&](Stored& t) {
         if (t.name == "lm_head.weight") {
           t.dtype = DType::kI8;
           t.shape[1] *= 2;
         }
         return true;
       },
       {"lm_head.weight", "I8"}},
      {"short vocabulary",
       [&](Stored& t) {
         if (t.name == "lm_head.weight") {
           t.shape[0] = 202;
           t.bytes.resize(202 * 64 * 2);
         }
         return true;
       },
       {"lm_head.weight", "202", "203"}},
  };
  for (const BadTensors& bad : table) {
    SCOPED_TRACE(bad.title);
    write(path(), spec_, 1);
    rewrite(rank0(), bad.edit);
    const auto caught = catch_error([&] { open_checkpoint(path()); });
    EXPECT_TRUE(caught.kind == ErrorKind::kInput || caught.kind == ErrorKind::kUnsupported);
    for (const std::string& part : bad.named) EXPECT_THAT(caught.message, HasSubstr(part));
  }
}

// A reader that is told another format than the tensor has must not guess.
TEST_F(CheckpointVariant, LmHeadAndConfigMustAgree) {
  const auto message = [&](LmHeadFormat format, json::array excluded, bool int8) {
    write_head(path(), 1, format);
    edit_config(path(), [&](json::object& config) {
      json::object& quant = config["quantization"].as_object();
      quant["exclude_modules"] = excluded;
      quant.erase("lm_head_quant_algo");
      if (int8) quant["lm_head_quant_algo"] = "W8A16_GROUP";
    });
    return catch_error([&] { open_checkpoint(path())->load_int8(weight_table(spec_).back()); })
        .message;
  };
  using enum LmHeadFormat;
  const json::array without = {"transformer.vocab_embedding"};
  for (const LmHeadFormat format : {kInt4, kInt8}) {
    for (const json::array& excluded : {json::array(), json::array{"*lm_head"}}) {
      EXPECT_THAT(message(format, excluded, false),
                  ::testing::AllOf(HasSubstr("lm_head.weight"), HasSubstr("exclude_modules")));
    }
  }
  EXPECT_THAT(message(kInt8, without, false), HasSubstr("has 512 rows"));
  EXPECT_THAT(message(kInt4, without, true), HasSubstr("has 128 rows"));
  // A value that two nibbles cannot hold.
  write_head(path(), 1, kInt8);
  rewrite(rank0(), [](Stored& t) {
    if (t.name == "lm_head.weight") t.bytes[3] = std::byte{120};
    return true;
  });
  EXPECT_THAT(
      catch_error([&] { open_checkpoint(path())->load_int8(weight_table(spec_).back()); }).message,
      ::testing::AllOf(HasSubstr("value 3 of lm_head is 120"), HasSubstr("-119..119")));
  // Dense where the config would have it quantized: the tensor speaks for itself.
  write(path(), spec_, 1);
  edit_config(path(), [&](json::object& config) {
    config["quantization"].as_object()["exclude_modules"] = without;
  });
  expect_equals_source(*open_checkpoint(path()), spec_);
}

TEST_F(CheckpointVariant, NotANumberInScalesIsFoundOnLoad) {
  rewrite(rank0(), [](Stored& tensor) {
    if (tensor.name == "transformer.layers.0.mlp.proj.weights_scaling_factor") {
      const float nan = std::nanf("");
      std::memcpy(tensor.bytes.data() + 12, &nan, 4);
    }
    return true;
  });
  const auto read = open_checkpoint(path());
  for (const WeightRow& row : weight_table(spec_)) {
    if (row.name == "layers.0.down") {
      EXPECT_THAT(
          catch_error([&] { read->load_int4(row); }).message,
          ::testing::AllOf(HasSubstr("scale 3"), HasSubstr("transformer.layers.0.mlp.proj")));
    }
  }
}

struct BadConfig {
  const char* title;
  std::function<void(json::object&)> edit;
  ErrorKind kind;
  std::vector<std::string> named;
};

TEST_F(CheckpointVariant, UnreadableConfigsAreNamed) {
  const auto set = [](const char* key, json::value value) {
    return [=](json::object& config) { config[key] = value; };
  };
  const auto quant = [](const char* key, json::value value) {
    return [=](json::object& config) { config["quantization"].as_object()[key] = value; };
  };
  const std::vector<BadConfig> table = {
      {"other algorithm",
       quant("quant_algo", "W4A8_AWQ"),
       ErrorKind::kUnsupported,
       {"W4A8_AWQ", "W4A16_AWQ"}},
      {"fp8", quant("quant_algo", "FP8"), ErrorKind::kUnsupported, {"FP8"}},
      {"zero points", quant("has_zero_point", true), ErrorKind::kUnsupported, {"has_zero_point"}},
      {"unquantized says config",
       quant("quant_algo", nullptr),
       ErrorKind::kUnsupported,
       {"quant_algo", "I8"}},
      {"kv algorithm", quant("kv_cache_quant_algo", "NVFP4"), ErrorKind::kUnsupported, {"NVFP4"}},
      {"group", quant("group_size", 64), ErrorKind::kInput, {"64", "32"}},
      {"architecture",
       set("architecture", "Qwen2ForCausalLM"),
       ErrorKind::kUnsupported,
       {"Qwen2ForCausalLM"}},
      {"no architecture",
       [](json::object& c) { c.erase("architecture"); },
       ErrorKind::kInput,
       {"architecture"}},
      {"no layers",
       [](json::object& c) { c.erase("num_hidden_layers"); },
       ErrorKind::kInput,
       {"num_hidden_layers"}},
      {"activation", set("hidden_act", "gelu"), ErrorKind::kUnsupported, {"gelu"}},
      {"positions", set("position_embedding_type", "alibi"), ErrorKind::kUnsupported, {"alibi"}},
      {"bias", set("attn_bias", true), ErrorKind::kUnsupported, {"attn_bias"}},
      {"qk norm", set("qk_layernorm", true), ErrorKind::kUnsupported, {"qk_layernorm"}},
      {"experts", set("moe", {{"num_experts", 8}}), ErrorKind::kUnsupported, {"num_experts"}},
      {"rotary", set("rotary_pct", 0.5), ErrorKind::kUnsupported, {"0.5"}},
      {"yarn",
       set("rotary_scaling", {{"type", "yarn"}, {"factor", 4.0}}),
       ErrorKind::kUnsupported,
       {"yarn"}},
      {"multiplier",
       set("embedding_multiplier", 12.0),
       ErrorKind::kUnsupported,
       {"embedding_multiplier", "12"}},
      {"no head size",
       [](json::object& c) { c.erase("head_size"); },
       ErrorKind::kUnsupported,
       {"rotary_embedding_dim"}},
      {"two ranks",
       set("mapping", {{"world_size", 2}, {"tp_size", 2}, {"pp_size", 1}}),
       ErrorKind::kInput,
       {"rank1.safetensors"}},
      {"world",
       set("mapping", {{"world_size", 3}, {"tp_size", 2}, {"pp_size", 1}}),
       ErrorKind::kInput,
       {"world_size"}},
      {"context parallel", set("mapping", {{"cp_size", 2}}), ErrorKind::kUnsupported, {"cp_size"}},
      {"layers over stages",
       set("mapping", {{"pp_size", 3}}),
       ErrorKind::kInput,
       {"4 layers", "3"}},
      {"lm_head algorithm",
       quant("lm_head_quant_algo", "W8A16"),
       ErrorKind::kUnsupported,
       {"lm_head_quant_algo", "\"W8A16\"", "W8A16_GROUP"}},
      {"lm_head both",
       quant("lm_head_quant_algo", "W8A16_GROUP"),
       ErrorKind::kInput,
       {"W8A16_GROUP", "exclude_modules"}},
      {"exclude_modules",
       quant("exclude_modules", "lm_head"),
       ErrorKind::kInput,
       {"exclude_modules", "\"lm_head\"", "list"}},
      {"type", set("vocab_size", "many"), ErrorKind::kInput, {"vocab_size", "\"many\""}},
  };
  for (const BadConfig& bad : table) {
    SCOPED_TRACE(bad.title);
    write(path(), spec_, 1);
    edit_config(path(), bad.edit);
    const auto caught = catch_error([&] { open_checkpoint(path()); });
    EXPECT_EQ(caught.kind, bad.kind) << caught.message;
    for (const std::string& part : bad.named) EXPECT_THAT(caught.message, HasSubstr(part));
  }
}

}  // namespace
}  // namespace nibble
