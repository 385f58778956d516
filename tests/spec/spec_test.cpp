// config.json in every spelling met, the weight table, dtypes, engine plans.
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>

#include "base/error.h"
#include "base/nearest.h"
#include "spec/engine_plan.h"
#include "spec/weight_table.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;

json::object parse(std::string_view text) { return parse_json(text, "test").as_object(); }

struct Caught {
  ErrorKind kind = ErrorKind::kInternal;
  std::string message;
};
Caught catch_error(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return {error.kind(), error.what()};
  }
  ADD_FAILURE() << "no Error was thrown";
  return {};
}

// The plain text-only config of the 24B family (mistral.md 1.1, 1.5).
json::object mistral_24b() {
  return parse(R"({
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000000.0, "sliding_window": null, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.56.2", "use_cache": true, "vocab_size": 131072})");
}

ModelSpec spec_24b() {
  ModelSpec spec;
  spec.num_layers = 40;
  spec.hidden_size = 5120;
  spec.num_heads = 32;
  spec.num_kv_heads = 8;
  spec.head_dim = 128;
  spec.ffn_size = 32768;
  spec.vocab_size = 131072;
  spec.max_position = 131072;
  spec.rope_theta = 1e9;
  return spec;
}

// Mistral-Small-3.1's wrapper: no token ids, no tie inside (mistral.md 1.2).
json::object mistral3() {
  json::object text = mistral_24b();
  for (const char* key :
       {"architectures", "bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype"}) {
    text.erase(key);
  }
  return {{"architectures", json::array{"Mistral3ForConditionalGeneration"}},
          {"model_type", "mistral3"},
          {"image_token_index", 10},
          {"multimodal_projector_bias", false},
          {"projector_hidden_act", "gelu"},
          {"spatial_merge_size", 2},
          {"text_config", text},
          {"torch_dtype", "bfloat16"},
          {"vision_config", {{"hidden_size", 1024}, {"head_dim", 64}, {"rope_theta", 10000.0}}}};
}

TEST(ModelSpec, TheFamilysConfig) {
  const ModelSpec spec = ModelSpec::from_hf(mistral_24b());
  EXPECT_EQ(spec.to_json(), spec_24b().to_json());
  EXPECT_EQ(spec.num_parameters(), 23'572'403'200);  // mistral.md 1.1
  EXPECT_EQ(spec.q_size(), 4096);
  EXPECT_EQ(spec.qkv_size(), 6144);
}

struct Variant {
  const char* title;
  std::function<void(json::object&)> edit;
  std::function<void(ModelSpec&)> expect;  // change to the family's spec; null: none
};

TEST(ModelSpec, SpellingVariants) {
  const auto llama3 = parse(R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})");
  const auto expect_llama3 = [](ModelSpec& s) {
    s.rope_factor = 8;
    s.rope_low_freq_factor = 1;
    s.rope_high_freq_factor = 4;
    s.rope_original_max_position = 8192;
  };
  const std::vector<Variant> table = {
      {"dtype for torch_dtype",
       [](json::object& c) {
         c.erase("torch_dtype");
         c["dtype"] = "bfloat16";
       },
       nullptr},
      {"torch.float16", [](json::object& c) { c["torch_dtype"] = "torch.float16"; },
       [](ModelSpec& s) { s.dtype = DType::kF16; }},
      {"float32", [](json::object& c) { c["torch_dtype"] = "float32"; },
       [](ModelSpec& s) { s.dtype = DType::kF32; }},
      {"rope_theta as a whole number", [](json::object& c) { c["rope_theta"] = 1000000000; },
       nullptr},
      {"rope_parameters instead (transformers 5)",
       [](json::object& c) {
         c.erase("rope_theta");
         c["rope_parameters"] = {{"rope_theta", 1e9}, {"rope_type", "default"}};
       },
       nullptr},
      {"rope_parameters as well",
       [](json::object& c) { c["rope_parameters"] = {{"rope_theta", 1e9}}; }, nullptr},
      {"rope_type none", [](json::object& c) { c["rope_parameters"] = {{"rope_type", "none"}}; },
       nullptr},
      {"rope_scaling null", [](json::object& c) { c["rope_scaling"] = nullptr; }, nullptr},
      {"old rope_scaling type", [](json::object& c) { c["rope_scaling"] = {{"type", "default"}}; },
       nullptr},
      {"llama3 scaling", [&](json::object& c) { c["rope_scaling"] = llama3; }, expect_llama3},
      {"llama3 in rope_parameters",
       [&](json::object& c) {
         json::object rope = llama3;
         rope["rope_theta"] = 1e9;
         c["rope_parameters"] = rope;
       },
       expect_llama3},
      {"llama3 twice, the same",
       [&](json::object& c) {
         c["rope_parameters"] = llama3;
         c["rope_scaling"] = llama3;
       },
       expect_llama3},
      {"no rope_theta", [](json::object& c) { c.erase("rope_theta"); },
       [](ModelSpec& s) { s.rope_theta = 10000; }},
      {"head_dim null", [](json::object& c) { c["head_dim"] = nullptr; },
       [](ModelSpec& s) { s.head_dim = 160; }},
      {"head_dim absent", [](json::object& c) { c.erase("head_dim"); },
       [](ModelSpec& s) { s.head_dim = 160; }},
      {"eos list", [](json::object& c) { c["eos_token_id"] = {2, 11}; },
       [](ModelSpec& s) { s.eos_token_ids = {2, 11}; }},
      {"no token ids",
       [](json::object& c) {
         c.erase("eos_token_id");
         c["bos_token_id"] = nullptr;
       },
       nullptr},
      {"no kv heads (Mistral's default)", [](json::object& c) { c.erase("num_key_value_heads"); },
       nullptr},
      {"no kv heads (Llama: all)",
       [](json::object& c) {
         c["architectures"] = json::array({"LlamaForCausalLM"});
         c["model_type"] = "llama";
         c.erase("num_key_value_heads");
       },
       [](ModelSpec& s) {
         s.architecture = "LlamaForCausalLM";
         s.num_kv_heads = 32;
       }},
      {"architectures absent", [](json::object& c) { c.erase("architectures"); }, nullptr},
      {"tied", [](json::object& c) { c["tie_word_embeddings"] = true; },
       [](ModelSpec& s) { s.tied_embeddings = true; }},
      {"swish", [](json::object& c) { c["hidden_act"] = "swish"; }, nullptr},
      {"window as long as the positions", [](json::object& c) { c["sliding_window"] = 131072; },
       nullptr},
      {"window absent", [](json::object& c) { c.erase("sliding_window"); }, nullptr},
      {"all layers full",
       [](json::object& c) { c["layer_types"] = {"full_attention", "full_attention"}; }, nullptr},
      {"biases said to be off",
       [](json::object& c) {
         c["attention_bias"] = false;
         c["mlp_bias"] = false;
       },
       nullptr},
      {"quantization_config null", [](json::object& c) { c["quantization_config"] = nullptr; },
       nullptr},
      {"whole numbers written as fractions", [](json::object& c) { c["hidden_size"] = 5120.0; },
       nullptr},
      {"keys without effect",
       [](json::object& c) {
         c["pad_token_id"] = 11;
         c["_name_or_path"] = "x";
         c["_attn_implementation_autoset"] = true;
         c["pretraining_tp"] = 1;
         c["max_window_layers"] = 40;
         c["logits_scaling"] = 1.0;
         c["use_sliding_window"] = false;
         c["final_logit_softcapping"] = nullptr;
       },
       nullptr},
  };
  for (const Variant& variant : table) {
    SCOPED_TRACE(variant.title);
    json::object config = mistral_24b();
    variant.edit(config);
    ModelSpec expected = spec_24b();
    if (variant.expect) variant.expect(expected);
    try {
      EXPECT_EQ(ModelSpec::from_hf(config).to_json(), expected.to_json());
    } catch (const Error& error) {
      ADD_FAILURE() << error.what();
    }
  }
}

TEST(ModelSpec, TextPartOfMistral3) {
  EXPECT_EQ(ModelSpec::from_hf(mistral3()).to_json(), spec_24b().to_json());
  json::object config = mistral3();
  config["tie_word_embeddings"] = true;  // transformers 5 re-save: the inside is right
  config["text_config"].as_object()["tie_word_embeddings"] = false;
  config.erase("torch_dtype");
  config["dtype"] = "float16";
  config["text_config"].as_object()["dtype"] = "bfloat16";
  EXPECT_EQ(ModelSpec::from_hf(config).to_json(), spec_24b().to_json());
  config["eos_token_id"] = 4;
  EXPECT_EQ(ModelSpec::from_hf(config).eos_token_ids, std::vector<int>{4});
}

struct Refusal {
  const char* title;
  std::function<void(json::object&)> edit;
  ErrorKind kind;
  std::vector<std::string> named;
};

TEST(ModelSpec, RefusalsNameTheKeyAndTheValue) {
  const auto set = [](const char* key, const json::value& value) {
    return [=](json::object& c) { c[key] = value; };
  };
  const auto quantized = [&](const char* method) {
    return set("quantization_config", {{"quant_method", method}, {"bits", 4}});
  };
  const auto k = ErrorKind::kUnsupported;
  const std::vector<Refusal> table = {
      {"awq", quantized("awq"), k, {"AutoAWQ", "original"}},
      {"gptq", quantized("gptq"), k, {"GPTQ"}},
      {"exl2", quantized("exl2"), k, {"EXL2"}},
      {"exl3", quantized("exl3"), k, {"EXL3"}},
      {"bitsandbytes", quantized("bitsandbytes"), k, {"bitsandbytes"}},
      {"old bitsandbytes",
       set("quantization_config", {{"load_in_4bit", true}}),
       k,
       {"bitsandbytes"}},
      {"compressed-tensors", quantized("compressed-tensors"), k, {"compressed-tensors"}},
      {"compression_config",
       set("compression_config", {{"format", "pack-quantized"}}),
       k,
       {"compressed-tensors"}},
      {"unknown", quantized("quip"), k, {"quip"}},
      {"class",
       set("architectures", {"Qwen2ForCausalLM"}),
       k,
       {"Qwen2ForCausalLM", "MistralForCausalLM"}},
      {"model_type", set("model_type", "mixtral"), k, {"mixtral"}},
      {"attention bias", set("attention_bias", true), k, {"attention_bias"}},
      {"mlp bias", set("mlp_bias", true), k, {"mlp_bias"}},
      {"yarn",
       set("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}),
       k,
       {"yarn", "llama3"}},
      {"linear", set("rope_scaling", {{"type", "linear"}, {"factor", 2.0}}), k, {"linear"}},
      {"dynamic in rope_parameters",
       set("rope_parameters", {{"rope_type", "dynamic"}}),
       k,
       {"dynamic"}},
      {"unknown rope key",
       set("rope_parameters", {{"rope_type", "default"}, {"llama_4_scaling_beta", 0.1}}),
       ErrorKind::kInput,
       {"llama_4_scaling_beta"}},
      {"two thetas",
       set("rope_parameters", {{"rope_theta", 1e6}}),
       ErrorKind::kInput,
       {"rope_theta", "1000000"}},
      {"llama3 half",
       set("rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}),
       ErrorKind::kInput,
       {"low_freq_factor"}},
      {"window", set("sliding_window", 4096), k, {"sliding_window", "4096", "131072"}},
      {"layer types",
       set("layer_types", {"full_attention", "sliding_attention"}),
       k,
       {"layer_types"}},
      {"activation", set("hidden_act", "gelu"), k, {"gelu"}},
      {"partial rotation", set("partial_rotary_factor", 0.5), k, {"partial_rotary_factor"}},
      {"softcap", set("final_logit_softcapping", 30.0), k, {"final_logit_softcapping", "30"}},
      {"multiplier", set("embedding_multiplier", 12.0), k, {"embedding_multiplier"}},
      {"qk norm", set("use_qk_norm", true), k, {"use_qk_norm"}},
      {"experts", set("num_local_experts", 8), k, {"num_local_experts"}},
      {"dtype", set("torch_dtype", "float8_e4m3fn"), k, {"float8_e4m3fn"}},
      {"zero layers", set("num_hidden_layers", 0), ErrorKind::kInput, {"num_hidden_layers", "0"}},
      {"huge",
       set("num_hidden_layers", 1'000'000'000'000),
       ErrorKind::kInput,
       {"num_hidden_layers"}},
      {"text for a number",
       set("hidden_size", "5120"),
       ErrorKind::kInput,
       {"hidden_size", "\"5120\""}},
      {"fraction", set("hidden_size", 5120.5), ErrorKind::kInput, {"hidden_size", "5120.5"}},
      {"missing vocabulary",
       [](json::object& c) { c.erase("vocab_size"); },
       ErrorKind::kInput,
       {"vocab_size"}},
      {"heads", set("num_key_value_heads", 5), ErrorKind::kInput, {"32", "5"}},
      {"odd head_dim", set("head_dim", 127), ErrorKind::kInput, {"head_dim", "127"}},
      {"eps", set("rms_norm_eps", -1.0), ErrorKind::kInput, {"epsilon", "-1"}},
      {"theta", set("rope_theta", 0.0), ErrorKind::kInput, {"rope_theta"}},
      {"negative eos", set("eos_token_id", -1), ErrorKind::kInput, {"eos_token_id"}},
      {"architectures text",
       set("architectures", "MistralForCausalLM"),
       ErrorKind::kInput,
       {"architectures"}},
  };
  for (const Refusal& refusal : table) {
    SCOPED_TRACE(refusal.title);
    json::object config = mistral_24b();
    refusal.edit(config);
    const Caught caught = catch_error([&] { ModelSpec::from_hf(config, "dir/config.json"); });
    EXPECT_EQ(caught.kind, refusal.kind) << caught.message;
    EXPECT_THAT(caught.message, HasSubstr("dir/config.json"));
    for (const std::string& part : refusal.named) EXPECT_THAT(caught.message, HasSubstr(part));
  }
  json::object wrapper = mistral3();
  wrapper.erase("text_config");
  EXPECT_THAT(catch_error([&] { ModelSpec::from_hf(wrapper); }).message, HasSubstr("text_config"));
  wrapper = mistral3();
  wrapper["text_config"].as_object()["model_type"] = "ministral3";
  EXPECT_THAT(catch_error([&] { ModelSpec::from_hf(wrapper); }).message, HasSubstr("ministral3"));
  wrapper = mistral3();
  wrapper["text_config"].as_object()["quantization_config"] = {{"quant_method", "fp8"}};
  EXPECT_THAT(catch_error([&] { ModelSpec::from_hf(wrapper); }).message, HasSubstr("FP8"));
}

TEST(ModelSpec, JsonIsTheIdentityAndRefusesUnknownKeys) {
  ModelSpec spec = spec_24b();
  spec.architecture = "LlamaForCausalLM";
  spec.rope_factor = 8;
  spec.rope_low_freq_factor = 1;
  spec.rope_high_freq_factor = 4;
  spec.rope_original_max_position = 8192;
  spec.tied_embeddings = true;
  spec.dtype = DType::kF16;
  spec.eos_token_ids = {5, 6, 7};
  spec.norm_eps = 1e-6;
  EXPECT_TRUE(ModelSpec::from_json(parse(dump_json(spec.to_json()))) == spec);
  json::object object = spec.to_json();
  object["num_layer"] = 3;
  EXPECT_THAT(catch_error([&] { ModelSpec::from_json(object); }).message,
              ::testing::AllOf(HasSubstr("\"num_layer\""), HasSubstr("\"num_layers\"")));
}

TEST(WeightTable, ShapesNamesAndOrder) {
  const ModelSpec spec = spec_24b();
  const std::vector<WeightRow> table = weight_table(spec);
  ASSERT_EQ(table.size(), 40u * 7 + 3);
  EXPECT_EQ(table.front().role, WeightRole::kEmbedding);
  EXPECT_EQ(table.back().name, "lm_head");
  EXPECT_EQ(table.back().trtllm_name, "lm_head");
  std::map<std::string, const WeightRow*> rows;
  size_t num_hf = 0;
  std::set<std::string> hf_names, trtllm_names;
  for (const WeightRow& row : table) {
    rows[row.name] = &row;
    num_hf += row.hf_names.size();
    hf_names.insert(row.hf_names.begin(), row.hf_names.end());
    trtllm_names.insert(row.trtllm_name);
    EXPECT_EQ(row.quantizable, row.is_linear()) << row.name;
    const bool head = row.role == WeightRole::kLmHead;
    EXPECT_EQ(quantized_bits(row), row.is_linear() && !head ? 4 : 0) << row.name;
    EXPECT_EQ(quantized_bits(row, LmHeadFormat::kInt4), row.is_linear() ? 4 : 0) << row.name;
    EXPECT_EQ(quantized_bits(row, LmHeadFormat::kInt8), !row.is_linear() ? 0 : head ? 8 : 4);
  }
  EXPECT_EQ(num_hf, 363u);  // mistral.md 1.1
  EXPECT_EQ(hf_names.size(), 363u);
  EXPECT_EQ(trtllm_names.size(), table.size());
  const WeightRow& qkv = *rows.at("layers.39.qkv");
  EXPECT_EQ(qkv.layer, 39);
  EXPECT_EQ(qkv.shape, (std::vector<int64_t>{6144, 5120}));
  EXPECT_THAT(qkv.hf_names, ::testing::ElementsAre("model.layers.39.self_attn.q_proj.weight",
                                                   "model.layers.39.self_attn.k_proj.weight",
                                                   "model.layers.39.self_attn.v_proj.weight"));
  EXPECT_EQ(qkv.trtllm_name, "transformer.layers.39.attention.qkv");
  EXPECT_EQ(rows.at("layers.0.o")->shape, (std::vector<int64_t>{5120, 4096}));
  EXPECT_EQ(rows.at("layers.0.down")->shape, (std::vector<int64_t>{5120, 32768}));
  EXPECT_EQ(rows.at("layers.0.down")->trtllm_name, "transformer.layers.0.mlp.proj");
  EXPECT_EQ(rows.at("layers.0.gate")->hf_names[0], "model.layers.0.mlp.gate_proj.weight");
  EXPECT_EQ(rows.at("layers.0.gate")->trtllm_name, "transformer.layers.0.mlp.fc");
  EXPECT_EQ(rows.at("layers.0.up")->trtllm_name, "transformer.layers.0.mlp.gate");
  EXPECT_EQ(rows.at("layers.7.mlp_norm")->hf_names[0],
            "model.layers.7.post_attention_layernorm.weight");
  ModelSpec tied = spec;
  tied.tied_embeddings = true;
  EXPECT_EQ(weight_table(tied).back().role, WeightRole::kFinalNorm);
  EXPECT_EQ(spec.num_parameters() - tied.num_parameters(), 671'088'640);
}

TEST(DType, NamesAndBits) {
  for (int i = 0; i <= static_cast<int>(DType::kU64); ++i) {
    const DType dtype = static_cast<DType>(i);
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype);
  }
  EXPECT_EQ(dtype_bits(DType::kF4), 4);
  EXPECT_EQ(dtype_bits(DType::kF6E3M2), 6);
  EXPECT_EQ(dtype_bits(DType::kF8E8M0), 8);
  EXPECT_EQ(dtype_bits(DType::kBF16), 16);
  EXPECT_EQ(dtype_bits(DType::kU32), 32);
  EXPECT_EQ(dtype_bits(DType::kC64), 64);
  EXPECT_EQ(dtype_from_name("F8_E4M3"), DType::kF8E4M3);
  EXPECT_FALSE(dtype_from_name("bf16").has_value());
}

EnginePlan some_plan() {
  EnginePlan plan;
  plan.nibble_version = "0.1.0";
  plan.target = "cuda:sm_90";
  plan.spec = spec_24b();
  plan.tp_rank = 1;
  plan.tp_size = 2;
  plan.limits = {
      .max_batch_size = 3, .max_input_len = 100, .max_output_len = 20, .max_num_tokens = 64};
  plan.linear_layout = WeightLayout::kCudaInt4;
  plan.dense_layout = WeightLayout::kF16Rows;
  plan.lm_head_layout = WeightLayout::kCpuInt8;
  plan.activation_precision = ActivationPrecision::kInt8Group;
  plan.group_size = 64;
  plan.kv_format = KvFormat::kInt8Static;
  plan.kv_block_tokens = 16;
  plan.tactics = {{.out_features = 6144,
                   .in_features = 5120,
                   .max_rows = 16,
                   .best = {"wgmma 256 rows cluster 2 split 1", 9.64},
                   .slower = {{"small 64 rows whole early 1", 10.5},
                              {"wgmma 128 rows cluster 1 split 2", 11}}}};
  plan.cuda = {.major = 13, .gpu = "NVIDIA H200"};
  plan.source = {.checkpoint = "/models/a b",
                 .synthetic = "",
                 .quantize_lm_head = "",
                 .tokenizer = "/t",
                 .no_tune = true};
  return plan;
}

TEST(EnginePlan, JsonIsTheIdentity) {
  const EnginePlan plan = some_plan();
  EXPECT_TRUE(EnginePlan::from_json(parse(dump_json(plan.to_json())), "rank0.engine") == plan);
  EnginePlan other = plan;
  other.target = "cpu:avx2";
  other.cuda = {};
  other.source = {.checkpoint = "",
                  .synthetic = "mistral-24b",
                  .quantize_lm_head = "int8",
                  .tokenizer = "",
                  .no_tune = false};
  EXPECT_FALSE(other.to_json().contains("cuda"));
  EXPECT_TRUE(EnginePlan::from_json(parse(dump_json(other.to_json())), "rank0.engine") == other);
  for (const WeightLayout layout :
       {WeightLayout::kF32Rows, WeightLayout::kBf16Rows, WeightLayout::kF16Rows,
        WeightLayout::kInt4Portable, WeightLayout::kCpuInt4, WeightLayout::kCudaInt4,
        WeightLayout::kInt8Portable, WeightLayout::kCpuInt8, WeightLayout::kCudaInt8}) {
    EXPECT_EQ(weight_layout_from_name(weight_layout_name(layout)), layout);
  }
  for (const KvFormat format :
       {KvFormat::kInt8Dynamic, KvFormat::kInt8Static, KvFormat::kF16, KvFormat::kF32}) {
    EXPECT_EQ(kv_format_from_name(kv_format_name(format)), format);
  }
  EXPECT_STREQ(kv_format_name(KvFormat::kInt8Dynamic), "int8");
}

TEST(EnginePlan, RefusalsNameTheNearest) {
  const auto read = [](const std::function<void(json::object&)>& edit) {
    json::object object = some_plan().to_json();
    edit(object);
    return catch_error([&] { EnginePlan::from_json(object, "rank0.engine"); });
  };
  EXPECT_THAT(read([](json::object& o) { o["kv-formt"] = "f16"; }).message,
              ::testing::AllOf(HasSubstr("\"kv-formt\""), HasSubstr("\"kv_format\"")));
  EXPECT_THAT(read([](json::object& o) { o["limits"].as_object()["max_batch"] = 1; }).message,
              HasSubstr("\"max_batch_size\""));
  EXPECT_THAT(read([](json::object& o) { o["kv_format"] = "int8-dynamic"; }).message,
              HasSubstr("int8-static"));
  EXPECT_THAT(read([](json::object& o) { o["linear_layout"] = "cuda_int4x"; }).message,
              HasSubstr("\"cuda-int4\""));
  EXPECT_THAT(read([](json::object& o) { o.erase("kv_format"); }).message,
              HasSubstr("kv_format is missing"));
  EXPECT_THAT(read([](json::object& o) { o["tactics"] = "none"; }).message,
              HasSubstr("tactics is \"none\"; wanted an array"));
  EXPECT_THAT(
      read([](json::object& o) { o["tactics"].as_array()[0].as_object().erase("kernel"); }).message,
      HasSubstr("tactics[0]: kernel is missing"));
  EXPECT_THAT(read([](json::object& o) {
                o["tactics"].at(0).at("slower").at(1).as_object().erase("microseconds");
              }).message,
              HasSubstr("tactics[0], slower[1]: microseconds is missing"));
  EXPECT_THAT(read([](json::object& o) { o.erase("cuda"); }).message, HasSubstr("cuda is missing"));
  EXPECT_THAT(read([](json::object& o) { o["target"] = "ref"; }).message, HasSubstr("\"cuda\""));
  EXPECT_THAT(read([](json::object& o) { o["cuda"].as_object()["major"] = "13"; }).message,
              HasSubstr("major is \"13\""));
  EXPECT_THAT(read([](json::object& o) { o.erase("source"); }).message,
              HasSubstr("source is missing"));
  EXPECT_THAT(read([](json::object& o) { o["source"].as_object()["chekpoint"] = "/"; }).message,
              HasSubstr("\"checkpoint\""));
  EXPECT_THAT(read([](json::object& o) { o["tp_rank"] = 2; }).message, HasSubstr("tp_rank is 2"));
  const Caught version = read([](json::object& o) { o["format_version"] = 1; });
  EXPECT_EQ(version.kind, ErrorKind::kUnsupported);
  EXPECT_THAT(version.message, HasSubstr("format_version is 1; this nibble reads 5"));
}

TEST(Nearest, EditDistance) {
  EXPECT_EQ(edit_distance("", ""), 0);
  EXPECT_EQ(edit_distance("abc", ""), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  EXPECT_EQ(edit_distance("max_seq_len", "max-seq-len"), 0);
  EXPECT_EQ(edit_distance("tpo_k", "top_k"), 1);
  const std::vector<std::string> names = {"--port", "--prompt", "--top-k"};
  EXPECT_EQ(nearest_name("--prot", names), "--port");
  EXPECT_EQ(nearest_name("--topk", names), "--top-k");
  EXPECT_EQ(nearest_name("x", std::vector<std::string>{}), "");
}

}  // namespace
}  // namespace nibble
