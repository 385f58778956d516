// One row per weight of a model. The Hugging Face reader, the checkpoint reader and writer, the
// sharder, the packer and `inspect` all walk this table; "each tensor consumed once, none left
// over" follows from it and is checked in one place (formats/). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "spec/model_spec.h"

namespace nibble {

enum class WeightRole : uint8_t {
  kEmbedding,  // [vocab, hidden]
  kAttnNorm,   // [hidden]
  kQkv,        // [q + 2 kv, hidden]: q, k, v rows one after another
  kO,          // [hidden, q]
  kMlpNorm,    // [hidden]
  kGate,       // [ffn, hidden]: the branch through SiLU; TensorRT-LLM calls it mlp.fc
  kUp,         // [ffn, hidden]: TensorRT-LLM calls it mlp.gate
  kDown,       // [hidden, ffn]
  kFinalNorm,  // [hidden]
  kLmHead,     // [vocab, hidden]
};

enum class ShardRule : uint8_t {
  kReplicated,
  kRows,     // column parallel: split the out dimension
  kQkvRows,  // split q, k and v rows each by itself; kv heads are duplicated when tp > num_kv_heads
  kColumns,  // row parallel: split the in dimension (and a prequant vector with it)
  kVocab,    // split the vocabulary, padded to a multiple of tp
};

struct WeightRow {
  WeightRole role;
  int layer = -1;    // -1 for weights outside the layers
  std::string name;  // nibble's own: "layers.3.qkv", "embedding", "final_norm", "lm_head"
  std::vector<std::string>
      hf_names;  // concatenated along rows, without the ".weight" suffix's prefix variants:
                 // "model.layers.3.self_attn.q_proj.weight", ...
  std::string trtllm_name;     // without the ".weight" suffix: "transformer.layers.3.attention.qkv"
  std::vector<int64_t> shape;  // [out, in], or [hidden] for norms
  ShardRule shard = ShardRule::kReplicated;
  bool quantizable = false;  // qkv, o, gate, up, down; lm_head where a checkpoint asks for it

  bool is_linear() const { return shape.size() == 2 && role != WeightRole::kEmbedding; }
};

/// How a quantized checkpoint stores lm_head; the linears of the layers are int4 whatever this is.
enum class LmHeadFormat : uint8_t {
  kDense,  // 16 bits, as TensorRT-LLM's int4_awq checkpoints have it
  kInt8,
  kInt4,
};
/// Largest magnitude of lm_head's int8: 16 hi + lo with both in -8..7 reaches 119 on either side.
constexpr int kMaxInt8 = 119;
const char* lm_head_format_name(LmHeadFormat format);          // "none", "int8", "int4"
LmHeadFormat lm_head_format_from_name(std::string_view name);  // throws Error{kInput}

/// Bits of this row's integers in a quantized checkpoint; 0: it stays dense.
int quantized_bits(const WeightRow& row, LmHeadFormat lm_head = LmHeadFormat::kDense);

/// In the order of the forward pass: embedding, layers, final norm, lm_head. With tied embeddings
/// the lm_head row is absent and the embedding serves for it.
std::vector<WeightRow> weight_table(const ModelSpec& spec);

}  // namespace nibble
