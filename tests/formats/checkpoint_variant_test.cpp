// Checkpoints as others write them, and damaged ones: what is read, what is refused and how.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <functional>

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
