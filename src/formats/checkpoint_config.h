// config.json of a TensorRT-LLM checkpoint: the model, how it is cut, how it is quantized.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "base/json.h"
#include "spec/model_spec.h"
#include "spec/weight_table.h"

namespace nibble {

/// quantization.lm_head_quant_algo of an int8 lm_head: 8-bit weights, 16-bit activations, by
/// groups.
inline constexpr std::string_view kInt8LmHeadAlgo = "W8A16_GROUP";

struct CheckpointConfig {
  enum class KvQuant { kNone, kInt8, kFp8 };
  enum class EmbeddingSplit { kReplicated, kVocab, kHidden };

  ModelSpec spec;
  int tp_size = 1, pp_size = 1;
  bool quantized = false;  // W4A16_AWQ; otherwise every weight is dense
  int group_size = 0;      // 0: take it from the scales' shape
  LmHeadFormat lm_head = LmHeadFormat::kDense;
  KvQuant kv = KvQuant::kNone;
  EmbeddingSplit embedding = EmbeddingSplit::kReplicated;
};

/// Pure: a fuzz target's entry. Throws Error{kInput, kUnsupported}. An engine's config.json, with
/// the checkpoint's under "pretrained_config", is read too.
CheckpointConfig parse_checkpoint_config(const json::object& config, std::string_view what);

}  // namespace nibble
