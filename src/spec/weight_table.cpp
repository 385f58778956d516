// SPDX-License-Identifier: Apache-2.0
#include "spec/weight_table.h"

#include <fmt/format.h>

#include "base/error.h"

namespace nibble {

std::vector<WeightRow> weight_table(const ModelSpec& spec) {
  const int64_t hidden = spec.hidden_size, q = spec.q_size(), qkv = spec.qkv_size();
  const int64_t ffn = spec.ffn_size, vocab = spec.vocab_size;
  std::vector<WeightRow> table;
  table.reserve(static_cast<size_t>(spec.num_layers) * 7 + 3);
  table.push_back({.role = WeightRole::kEmbedding,
                   .name = "embedding",
                   .hf_names = {"model.embed_tokens.weight"},
                   .trtllm_name = "transformer.vocab_embedding",
                   .shape = {vocab, hidden},
                   .shard = ShardRule::kVocab});
  for (int layer = 0; layer < spec.num_layers; ++layer) {
    const std::string own = fmt::format("layers.{}.", layer);
    const std::string hf = "model." + own;
    const std::string trtllm = "transformer." + own;
    table.push_back({.role = WeightRole::kAttnNorm,
                     .layer = layer,
                     .name = own + "attn_norm",
                     .hf_names = {hf + "input_layernorm.weight"},
                     .trtllm_name = trtllm + "input_layernorm",
                     .shape = {hidden}});
    table.push_back({.role = WeightRole::kQkv,
                     .layer = layer,
                     .name = own + "qkv",
                     .hf_names = {hf + "self_attn.q_proj.weight", hf + "self_attn.k_proj.weight",
                                  hf + "self_attn.v_proj.weight"},
                     .trtllm_name = trtllm + "attention.qkv",
                     .shape = {qkv, hidden},
                     .shard = ShardRule::kQkvRows,
                     .quantizable = true});
    table.push_back({.role = WeightRole::kO,
                     .layer = layer,
                     .name = own + "o",
                     .hf_names = {hf + "self_attn.o_proj.weight"},
                     .trtllm_name = trtllm + "attention.dense",
                     .shape = {hidden, q},
                     .shard = ShardRule::kColumns,
                     .quantizable = true});
    table.push_back({.role = WeightRole::kMlpNorm,
                     .layer = layer,
                     .name = own + "mlp_norm",
                     .hf_names = {hf + "post_attention_layernorm.weight"},
                     .trtllm_name = trtllm + "post_layernorm",
                     .shape = {hidden}});
    // The naming trap: TensorRT-LLM's fc is the branch through SiLU, its gate is the other one.
    table.push_back({.role = WeightRole::kGate,
                     .layer = layer,
                     .name = own + "gate",
                     .hf_names = {hf + "mlp.gate_proj.weight"},
                     .trtllm_name = trtllm + "mlp.fc",
                     .shape = {ffn, hidden},
                     .shard = ShardRule::kRows,
                     .quantizable = true});
    table.push_back({.role = WeightRole::kUp,
                     .layer = layer,
                     .name = own + "up",
                     .hf_names = {hf + "mlp.up_proj.weight"},
                     .trtllm_name = trtllm + "mlp.gate",
                     .shape = {ffn, hidden},
                     .shard = ShardRule::kRows,
                     .quantizable = true});
    table.push_back({.role = WeightRole::kDown,
                     .layer = layer,
                     .name = own + "down",
                     .hf_names = {hf + "mlp.down_proj.weight"},
                     .trtllm_name = trtllm + "mlp.proj",
                     .shape = {hidden, ffn},
                     .shard = ShardRule::kColumns,
                     .quantizable = true});
  }
  table.push_back({.role = WeightRole::kFinalNorm,
                   .name = "final_norm",
                   .hf_names = {"model.norm.weight"},
                   .trtllm_name = "transformer.ln_f",
                   .shape = {hidden}});
  if (!spec.tied_embeddings) {
    table.push_back({.role = WeightRole::kLmHead,
                     .name = "lm_head",
                     .hf_names = {"lm_head.weight"},
                     .trtllm_name = "lm_head",
                     .shape = {vocab, hidden},
                     .shard = ShardRule::kVocab,
                     .quantizable = true});
  }
  return table;
}

const char* lm_head_format_name(LmHeadFormat format) {
  return format == LmHeadFormat::kInt4 ? "int4" : format == LmHeadFormat::kInt8 ? "int8" : "none";
}

LmHeadFormat lm_head_format_from_name(std::string_view name) {
  for (const LmHeadFormat format :
       {LmHeadFormat::kDense, LmHeadFormat::kInt8, LmHeadFormat::kInt4}) {
    if (name == lm_head_format_name(format)) return format;
  }
  fail(ErrorKind::kInput, "lm_head format \"{}\"; wanted none, int8 or int4", name);
}

int quantized_bits(const WeightRow& row, LmHeadFormat lm_head) {
  if (!row.quantizable) return 0;
  if (row.role != WeightRole::kLmHead) return 4;
  return lm_head == LmHeadFormat::kInt4 ? 4 : lm_head == LmHeadFormat::kInt8 ? 8 : 0;
}

int64_t ModelSpec::num_parameters() const {
  int64_t total = 0;
  for (const WeightRow& row : weight_table(*this)) {
    int64_t count = 1;
    for (const int64_t dim : row.shape) count *= dim;
    total += count;
  }
  return total;
}

}  // namespace nibble
