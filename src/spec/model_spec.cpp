// The two dialects of config.json. Three kinds of keys: those understood; those known to change the
// mathematics, whose value must be the neutral one; the rest (token ids, dropout, tool versions),
// ignored. SPDX-License-Identifier: Apache-2.0
#include "spec/model_spec.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "base/error.h"
#include "spec/object_reader.h"

namespace nibble {
namespace {

constexpr int kMaxLayers = 4096, kMaxWidth = 1 << 20, kMaxHeads = 1 << 14, kMaxHeadDim = 1 << 12;
constexpr int kMaxFfn = 1 << 24, kMaxVocab = 1 << 24, kMaxPosition = 1 << 30;
constexpr int kMaxInt = std::numeric_limits<int>::max();

std::optional<DType> dtype_from_torch_name(std::string_view name) {
  if (name.starts_with("torch.")) name.remove_prefix(6);
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16" || name == "half") return DType::kF16;
  if (name == "float32" || name == "float") return DType::kF32;
  return std::nullopt;
}

bool contains_any(std::string_view text, std::initializer_list<std::string_view> parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [&](std::string_view part) { return text.find(part) != text.npos; });
}

bool is_neutral(std::string_view key, const json::value& value) {
  if (value.is_null()) return true;
  if (value.is_bool()) return !value.get_bool();
  if (value.is_string()) return value.get_string().empty() || value.get_string() == "none";
  if (value.is_array()) return value.get_array().empty();
  if (value.is_object()) return value.get_object().empty();
  const double number = value.to_number<double>();
  return number == 0 || (number == 1 && contains_any(key, {"scal", "multiplier", "factor"}));
}

// Keys of other models' configs that change the mathematics, met in a class that does not have
// them, and anything that looks like one: better refused than answered wrongly.
void refuse_unknown_mathematics(const json::object& config, std::string_view what) {
  static constexpr std::array<std::string_view, 30> kUnderstood = {
      "attention_bias", "mlp_bias", "sliding_window", "layer_types", "rope_scaling",
      "rope_parameters", "rope_theta", "rms_norm_eps", "partial_rotary_factor", "hidden_act",
      "head_dim",
      // Without effect on inference:
      "attention_dropout", "attn_dropout", "attn_pdrop", "attention_probs_dropout_prob",
      "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
      "_attn_implementation_internal", "max_window_layers", "unsloth_fixed", "output_attentions",
      "tensor_parallel", "base_model_tp_plan", "is_decoder", "add_cross_attention",
      "cross_attention_hidden_size", "quantization_config", "compression_config",
      "num_attention_heads"};
  for (const auto& member : config) {
    const std::string_view key = member.key();
    if (std::find(kUnderstood.begin(), kUnderstood.end(), key) != kUnderstood.end()) continue;
    if (is_neutral(key, member.value())) continue;
    if (contains_any(key, {"bias", "scal", "multiplier", "softcap", "window", "expert", "rotary",
                           "rope", "norm", "clip", "alibi", "attn", "attention", "chunk",
                           "activation", "router", "mlp", "parallel_residual", "residual"})) {
      fail(ErrorKind::kUnsupported,
           "{}: {} is {}, which nibble does not know and which may change the model's mathematics. "
           "If it does "
           "not, remove the key from {}",
           what, key, show_json(member.value()), what);
    }
  }
}

// Mistral-Small re-saves by transformers 5 and older files spell the rotary base in three places.
void read_rope(ObjectReader& in, ModelSpec& spec) {
  std::optional<double> theta;
  if (in.has("rope_theta")) theta = in.number("rope_theta");
  bool scaled = false;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const json::object* object = in.object(key);
    if (object == nullptr) continue;
    ObjectReader rope(*object, in.where() + ", " + key);
    const std::string old_type = rope.string_or("type", "default");
    const std::string type = rope.string_or("rope_type", old_type);
    if (rope.has("rope_theta")) {
      const double value = rope.number("rope_theta");
      if (theta && *theta != value) {
        fail(ErrorKind::kInput, "{}: rope_theta is {} here and {} at the top; wanted one value",
             rope.where(), value, *theta);
      }
      theta = value;
    }
    if (rope.number_or("partial_rotary_factor", 1.0) != 1.0) {
      fail(ErrorKind::kUnsupported, "{}: partial_rotary_factor is {}; only 1.0 is supported",
           rope.where(), rope.number("partial_rotary_factor"));
    }
    if (type == "llama3") {
      ModelSpec read = spec;
      read.rope_factor = rope.number("factor");
      read.rope_low_freq_factor = rope.number("low_freq_factor");
      read.rope_high_freq_factor = rope.number("high_freq_factor");
      read.rope_original_max_position =
          rope.integer("original_max_position_embeddings", 1, kMaxPosition);
      if (!(read.rope_factor >= 1) || !(read.rope_low_freq_factor > 0) ||
          !(read.rope_high_freq_factor > read.rope_low_freq_factor)) {
        fail(ErrorKind::kInput,
             "{}: factor {}, low_freq_factor {}, high_freq_factor {}; wanted factor >= 1 and "
             "0 < low < high",
             rope.where(), read.rope_factor, read.rope_low_freq_factor, read.rope_high_freq_factor);
      }
      if (scaled && read != spec) {
        fail(ErrorKind::kInput, "{}: differs from rope_parameters; wanted one of the two",
             rope.where());
      }
      scaled = true;
      spec = read;
    } else if (type != "default" && type != "none") {
      fail(ErrorKind::kUnsupported,
           "{}: rope_type is \"{}\"; supported are \"default\" and \"llama3\"", rope.where(), type);
    }
    rope.refuse_unknown_keys();
  }
  spec.rope_theta = theta.value_or(10000.0);
}

void validate(const ModelSpec& spec, std::string_view what) {
  if (spec.head_dim % 2 != 0) {
    fail(ErrorKind::kInput, "{}: head_dim is {}; wanted an even number", what, spec.head_dim);
  }
  if (spec.num_heads % spec.num_kv_heads != 0) {
    fail(ErrorKind::kInput, "{}: {} attention heads cannot share {} key/value heads evenly", what,
         spec.num_heads, spec.num_kv_heads);
  }
  if (!(spec.norm_eps > 0 && spec.norm_eps < 1)) {
    fail(ErrorKind::kInput, "{}: the norm epsilon is {}; wanted more than 0 and less than 1", what,
         spec.norm_eps);
  }
  if (!(spec.rope_theta > 0 && std::isfinite(spec.rope_theta))) {
    fail(ErrorKind::kInput, "{}: rope_theta is {}; wanted a positive number", what,
         spec.rope_theta);
  }
}

void refuse_true(ObjectReader& in, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    if (in.boolean_or(key, false)) {
      fail(ErrorKind::kUnsupported, "{}: {} is true; only models without it are supported",
           in.where(), key);
    }
  }
}

int head_dim_or_default(int head_dim, const ModelSpec& spec, std::string_view what,
                        std::string_view key) {
  if (head_dim > 0) return head_dim;
  if (spec.hidden_size % spec.num_heads != 0) {
    fail(ErrorKind::kInput, "{}: {} is missing and hidden_size {} is not a multiple of {} heads",
         what, key, spec.hidden_size, spec.num_heads);
  }
  return spec.hidden_size / spec.num_heads;
}

void refuse_quantized(ObjectReader& in) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    const json::object* object = in.object(key);
    if (object == nullptr || object->empty()) continue;
    std::string method = "of unknown method";
    if (const json::value* name = object->if_contains("quant_method"); name && name->is_string()) {
      method = std::string(name->get_string());
    } else if (object->contains("load_in_4bit") || object->contains("load_in_8bit")) {
      method = "bitsandbytes";
    } else if (std::string_view(key) == "compression_config") {
      method = "compressed-tensors";
    }
    static constexpr std::array<std::pair<std::string_view, std::string_view>, 12> kTitles = {
        {{"awq", "AutoAWQ"},
         {"gptq", "GPTQ"},
         {"auto-round", "AutoRound"},
         {"exl2", "EXL2"},
         {"exl3", "EXL3"},
         {"bitsandbytes", "bitsandbytes"},
         {"compressed-tensors", "compressed-tensors"},
         {"gguf", "GGUF"},
         {"modelopt", "ModelOpt"},
         {"fp8", "FP8"},
         {"hqq", "HQQ"},
         {"aqlm", "AQLM"}}};
    std::string title = method;
    for (const auto& [name, text] : kTitles) {
      if (method == name) title = std::string(text);
    }
    fail(ErrorKind::kUnsupported,
         "{}: the weights are quantized already ({}, {}.quant_method \"{}\"), which nibble does "
         "not read yet. Give "
         "it the original 16-bit checkpoint; `nibble quantize` makes the 4-bit one",
         in.where(), title, key, method);
  }
}

std::string hf_architecture(ObjectReader& in) {
  std::string seen;
  if (const json::value* list = in.find("architectures")) {
    if (!list->is_array() || list->get_array().empty() || !list->get_array()[0].is_string()) {
      fail(ErrorKind::kInput, "{}: architectures is {}; wanted a list with a class name",
           in.where(), show_json(*list));
    }
    seen = std::string(list->get_array()[0].get_string());
  } else {
    const std::string type = in.string_or("model_type", "");
    seen = type == "mistral"    ? "MistralForCausalLM"
           : type == "llama"    ? "LlamaForCausalLM"
           : type == "mistral3" ? "Mistral3ForConditionalGeneration"
                                : "";
    if (seen.empty()) {
      fail(ErrorKind::kInput,
           "{}: neither architectures nor a known model_type (it is \"{}\"); wanted "
           "MistralForCausalLM, LlamaForCausalLM or Mistral3ForConditionalGeneration",
           in.where(), type);
    }
  }
  if (seen != "MistralForCausalLM" && seen != "LlamaForCausalLM" &&
      seen != "Mistral3ForConditionalGeneration") {
    fail(ErrorKind::kUnsupported,
         "{}: architecture is \"{}\"; supported are MistralForCausalLM, LlamaForCausalLM "
         "and the text part of Mistral3ForConditionalGeneration",
         in.where(), seen);
  }
  return seen;
}

}  // namespace

ModelSpec ModelSpec::from_hf(const json::object& config, std::string_view what) {
  ObjectReader outer(config, std::string(what));
  refuse_quantized(outer);
  ModelSpec spec;
  spec.architecture = hf_architecture(outer);
  const json::object* text = &config;
  std::string where(what);
  const bool wrapped = spec.architecture == "Mistral3ForConditionalGeneration";
  if (wrapped) {
    text = outer.object("text_config");
    if (text == nullptr)
      fail(ErrorKind::kInput, "{}: text_config is missing; wanted the text model's object", what);
    where += ", text_config";
    spec.architecture = "MistralForCausalLM";
  }
  ObjectReader in(*text, where);
  if (wrapped) refuse_quantized(in);
  const std::string type = in.string_or("model_type", "");
  if (!type.empty() && type != "mistral" && type != "llama") {
    fail(ErrorKind::kUnsupported,
         "{}: model_type is \"{}\"; supported are \"mistral\" and \"llama\"", where, type);
  }
  const bool llama = spec.architecture == "LlamaForCausalLM";

  spec.num_layers = in.integer("num_hidden_layers", 1, kMaxLayers);
  spec.hidden_size = in.integer("hidden_size", 1, kMaxWidth);
  spec.num_heads = in.integer("num_attention_heads", 1, kMaxHeads);
  // transformers' defaults, which differ between the two classes.
  spec.num_kv_heads =
      in.integer_or("num_key_value_heads", llama ? spec.num_heads : 8, 1, kMaxHeads);
  spec.head_dim =
      head_dim_or_default(in.integer_or("head_dim", 0, 1, kMaxHeadDim), spec, where, "head_dim");
  spec.ffn_size = in.integer("intermediate_size", 1, kMaxFfn);
  spec.vocab_size = in.integer("vocab_size", 1, kMaxVocab);
  spec.max_position = in.integer("max_position_embeddings", 1, kMaxPosition);
  spec.norm_eps = in.number_or("rms_norm_eps", 1e-6);
  read_rope(in, spec);

  const std::string activation = in.string_or("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fail(ErrorKind::kUnsupported, "{}: hidden_act is \"{}\"; only \"silu\" is supported", where,
         activation);
  }
  refuse_true(in, {"attention_bias", "mlp_bias"});
  if (in.number_or("partial_rotary_factor", 1.0) != 1.0) {
    fail(ErrorKind::kUnsupported, "{}: partial_rotary_factor is {}; only 1.0 is supported", where,
         in.number("partial_rotary_factor"));
  }
  // A window no shorter than the model's positions never cuts anything.
  const int window = in.integer_or("sliding_window", kMaxInt, 0, kMaxInt);
  if (window < spec.max_position) {
    fail(ErrorKind::kUnsupported,
         "{}: sliding_window is {} but max_position_embeddings is {}; windowed attention is "
         "not supported. Set sliding_window to null, or max_position_embeddings to {} to use the "
         "model up to its "
         "window",
         where, window, spec.max_position, window);
  }
  if (const json::value* types = in.find("layer_types")) {
    const bool full =
        types->is_array() &&
        std::all_of(types->get_array().begin(), types->get_array().end(), [](const json::value& t) {
          return t.is_string() && t.get_string() == "full_attention";
        });
    if (!full) {
      fail(ErrorKind::kUnsupported,
           "{}: layer_types is {}; only \"full_attention\" layers are supported", where,
           show_json(*types));
    }
  }
  refuse_unknown_mathematics(*text, where);

  // transformers 5 re-saves of the wrapper may tie at the outside and not inside: the inside is
  // right.
  spec.tied_embeddings =
      in.boolean_or("tie_word_embeddings", outer.boolean_or("tie_word_embeddings", false));
  std::string dtype = in.string_or("dtype", in.string_or("torch_dtype", ""));
  if (dtype.empty()) dtype = outer.string_or("dtype", outer.string_or("torch_dtype", "bfloat16"));
  if (dtype == "auto") dtype = "bfloat16";
  const std::optional<DType> known = dtype_from_torch_name(dtype);
  if (!known) {
    fail(ErrorKind::kUnsupported,
         "{}: dtype is \"{}\"; supported are bfloat16, float16 and float32", where, dtype);
  }
  spec.dtype = *known;
  spec.bos_token_id =
      in.integer_or("bos_token_id", outer.integer_or("bos_token_id", 1, 0, kMaxInt), 0, kMaxInt);
  spec.eos_token_ids = in.integers("eos_token_id", 0, kMaxInt);
  if (spec.eos_token_ids.empty()) spec.eos_token_ids = outer.integers("eos_token_id", 0, kMaxInt);
  if (spec.eos_token_ids.empty()) spec.eos_token_ids = {2};
  validate(spec, where);
  return spec;
}

ModelSpec ModelSpec::from_trtllm(const json::object& config, std::string_view what) {
  ObjectReader outer(config, std::string(what));
  std::string where(what);
  const json::object* object = outer.object("pretrained_config");
  if (object != nullptr) where += ", pretrained_config";
  ObjectReader in(object == nullptr ? config : *object, where);

  ModelSpec spec;
  spec.architecture = in.string("architecture");
  if (spec.architecture == "Mistral3ForConditionalGeneration")
    spec.architecture = "MistralForCausalLM";
  if (spec.architecture == "LLaMAForCausalLM") spec.architecture = "LlamaForCausalLM";
  if (spec.architecture != "MistralForCausalLM" && spec.architecture != "LlamaForCausalLM") {
    fail(ErrorKind::kUnsupported,
         "{}: architecture is \"{}\"; supported are MistralForCausalLM and LlamaForCausalLM", where,
         spec.architecture);
  }
  const std::string dtype = in.string("dtype");
  const std::optional<DType> known = dtype_from_torch_name(dtype);
  if (!known) {
    fail(ErrorKind::kUnsupported,
         "{}: dtype is \"{}\"; supported are bfloat16, float16 and float32", where, dtype);
  }
  spec.dtype = *known;
  spec.num_layers = in.integer("num_hidden_layers", 1, kMaxLayers);
  spec.hidden_size = in.integer("hidden_size", 1, kMaxWidth);
  spec.num_heads = in.integer("num_attention_heads", 1, kMaxHeads);
  spec.num_kv_heads = in.integer_or("num_key_value_heads", spec.num_heads, 1, kMaxHeads);
  spec.head_dim =
      head_dim_or_default(in.integer_or("head_size", 0, 1, kMaxHeadDim), spec, where, "head_size");
  spec.ffn_size =
      in.integer_or("intermediate_size", std::min(spec.hidden_size * 4, kMaxFfn), 1, kMaxFfn);
  spec.vocab_size = in.integer("vocab_size", 1, kMaxVocab);
  spec.max_position = in.integer("max_position_embeddings", 1, kMaxPosition);
  spec.norm_eps = in.number_or("norm_epsilon", 1e-5);

  const std::string activation = in.string_or("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fail(ErrorKind::kUnsupported, "{}: hidden_act is \"{}\"; only \"silu\" is supported", where,
         activation);
  }
  const std::string position = in.string_or("position_embedding_type", "rope_gpt_neox");
  if (position != "rope_gpt_neox" && position != "PositionEmbeddingType.rope_gpt_neox") {
    fail(ErrorKind::kUnsupported,
         "{}: position_embedding_type is \"{}\"; only \"rope_gpt_neox\" is supported", where,
         position);
  }
  spec.rope_theta = in.number_or("rotary_base", 10000.0);
  const double percent = in.number_or("rotary_pct", 1.0);
  const int rotary_dim = in.integer_or("rotary_embedding_dim", spec.head_dim, 0, kMaxHeadDim);
  if (percent != 1.0 || rotary_dim != spec.head_dim) {
    fail(ErrorKind::kUnsupported,
         "{}: rotary_pct is {} and rotary_embedding_dim {}; only whole heads ({}) are rotated",
         where, percent, rotary_dim, spec.head_dim);
  }
  if (const json::object* scaling = in.object("rotary_scaling")) {
    json::object as_hf = {{"rope_scaling", *scaling}, {"rope_theta", spec.rope_theta}};
    ObjectReader rope(as_hf, where + ", rotary_scaling");
    read_rope(rope, spec);
  }
  refuse_true(in, {"bias", "attn_bias", "mlp_bias", "lm_head_bias", "residual_mlp", "qk_layernorm",
                   "fc_after_embed"});
  for (const char* key : {"rmsnorm", "use_input_layernorm_in_first_layer", "use_last_layernorm"}) {
    if (!in.boolean_or(key, true)) {
      fail(ErrorKind::kUnsupported, "{}: {} is false; only true is supported", where, key);
    }
  }
  for (const char* key : {"embedding_multiplier", "attention_multiplier", "residual_multiplier",
                          "output_multiplier_scale"}) {
    if (in.number_or(key, 1.0) != 1.0) {
      fail(ErrorKind::kUnsupported, "{}: {} is {}; only 1.0 is supported", where, key,
           in.number(key));
    }
  }
  if (in.integer_or("layer_idx_offset", 0, 0, kMaxInt) != 0) {
    fail(ErrorKind::kUnsupported, "{}: layer_idx_offset is not 0; only whole models are supported",
         where);
  }
  if (const json::object* moe = in.object("moe")) {
    ObjectReader experts(*moe, where + ", moe");
    if (experts.integer_or("num_experts", 0, 0, kMaxInt) > 0) {
      fail(ErrorKind::kUnsupported,
           "{}: num_experts is not 0; mixtures of experts are not supported", experts.where());
    }
  }
  spec.tied_embeddings =
      in.boolean_or("share_embedding_table", false) || in.boolean_or("tie_word_embeddings", false);

  // What TensorRT-LLM has no key for; written by nibble, absent elsewhere.
  if (const json::object* own = in.object("nibble")) {
    ObjectReader nibble(*own, where + ", nibble");
    spec.vocab_size = nibble.integer_or("vocab_size", spec.vocab_size, 1, spec.vocab_size);
    spec.bos_token_id = nibble.integer_or("bos_token_id", 1, 0, kMaxInt);
    const std::vector<int> eos = nibble.integers("eos_token_ids", 0, kMaxInt);
    if (!eos.empty()) spec.eos_token_ids = eos;
  }
  validate(spec, where);
  return spec;
}

json::object ModelSpec::to_json() const {
  return {
      {"architecture", architecture},
      {"num_layers", num_layers},
      {"hidden_size", hidden_size},
      {"num_heads", num_heads},
      {"num_kv_heads", num_kv_heads},
      {"head_dim", head_dim},
      {"ffn_size", ffn_size},
      {"vocab_size", vocab_size},
      {"max_position", max_position},
      {"rope_theta", rope_theta},
      {"norm_eps", norm_eps},
      {"tied_embeddings", tied_embeddings},
      {"dtype", dtype_name(dtype)},
      {"rope_factor", rope_factor},
      {"rope_low_freq_factor", rope_low_freq_factor},
      {"rope_high_freq_factor", rope_high_freq_factor},
      {"rope_original_max_position", rope_original_max_position},
      {"bos_token_id", bos_token_id},
      {"eos_token_ids", json::array(eos_token_ids.begin(), eos_token_ids.end())},
  };
}

ModelSpec ModelSpec::from_json(const json::object& object) {
  ObjectReader in(object, "spec");
  ModelSpec spec;
  spec.architecture = in.string("architecture");
  spec.num_layers = in.integer("num_layers", 1, kMaxLayers);
  spec.hidden_size = in.integer("hidden_size", 1, kMaxWidth);
  spec.num_heads = in.integer("num_heads", 1, kMaxHeads);
  spec.num_kv_heads = in.integer("num_kv_heads", 1, kMaxHeads);
  spec.head_dim = in.integer("head_dim", 1, kMaxHeadDim);
  spec.ffn_size = in.integer("ffn_size", 1, kMaxFfn);
  spec.vocab_size = in.integer("vocab_size", 1, kMaxVocab);
  spec.max_position = in.integer("max_position", 1, kMaxPosition);
  spec.rope_theta = in.number("rope_theta");
  spec.norm_eps = in.number("norm_eps");
  spec.tied_embeddings = in.boolean_or("tied_embeddings", false);
  const std::string dtype = in.string("dtype");
  const std::optional<DType> known = dtype_from_name(dtype);
  if (known != DType::kBF16 && known != DType::kF16 && known != DType::kF32) {
    fail(ErrorKind::kInput, "spec: dtype is \"{}\"; wanted BF16, F16 or F32", dtype);
  }
  spec.dtype = *known;
  spec.rope_factor = in.number_or("rope_factor", 0.0);
  spec.rope_low_freq_factor = in.number_or("rope_low_freq_factor", 0.0);
  spec.rope_high_freq_factor = in.number_or("rope_high_freq_factor", 0.0);
  spec.rope_original_max_position = in.integer_or("rope_original_max_position", 0, 0, kMaxPosition);
  spec.bos_token_id = in.integer("bos_token_id", 0, kMaxInt);
  spec.eos_token_ids = in.integers("eos_token_ids", 0, kMaxInt);
  in.refuse_unknown_keys();
  validate(spec, "spec");
  return spec;
}

}  // namespace nibble
