// What a model is, as a value: read from a Hugging Face config.json or from a TensorRT-LLM
// checkpoint's, written to the latter. A key that would change the mathematics and is not
// understood is an error. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"
#include "spec/dtype.h"

namespace nibble {

struct ModelSpec {
  std::string architecture = "MistralForCausalLM";  // the Hugging Face class name
  int num_layers = 0;
  int hidden_size = 0;
  int num_heads = 0;  // query heads
  int num_kv_heads = 0;
  int head_dim = 0;
  int ffn_size = 0;  // intermediate_size
  int vocab_size = 0;
  int max_position = 0;  // max_position_embeddings
  double rope_theta = 10000.0;
  double norm_eps = 1e-5;
  bool tied_embeddings = false;
  DType dtype = DType::kBF16;  // of the unquantized tensors: kBF16, kF16 or kF32
  // Llama-3 style rope scaling ("llama3"), 0 factor when absent. Other rope types are refused.
  double rope_factor = 0.0, rope_low_freq_factor = 0.0, rope_high_freq_factor = 0.0;
  int rope_original_max_position = 0;
  int bos_token_id = 1;
  std::vector<int> eos_token_ids = {2};  // generation_config.json overrides config.json

  int q_size() const { return num_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }
  int qkv_size() const { return q_size() + 2 * kv_size(); }
  int64_t num_parameters() const;

  /// `config` is config.json; the text part of a Mistral3 wrapper is taken. Throws Error{kInput or
  /// kUnsupported} naming file, key, value seen and values wanted. Quantized inputs (exl2/3,
  /// bitsandbytes, awq, gptq, compressed-tensors, gguf, ...) are refused by name.
  static ModelSpec from_hf(const json::object& config, std::string_view what = "config.json");
  /// A checkpoint's config.json, or an engine's with it under "pretrained_config".
  static ModelSpec from_trtllm(const json::object& config, std::string_view what = "config.json");

  /// For engine plans: every field by its own name; from_json(to_json()) is the identity.
  json::object to_json() const;
  static ModelSpec from_json(const json::object& object);
  bool operator==(const ModelSpec&) const = default;
};

}  // namespace nibble
