// config.json of a TensorRT-LLM checkpoint: the model, how it is cut, how it is quantized.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "base/json.h"
#include "spec/model_spec.h"

namespace nibble {

struct CheckpointConfig {
  enum class KvQuant { kNone, kInt8, kFp8 };
  enum class EmbeddingSplit { kReplicated, kVocab, kHidden };

  ModelSpec spec;
  int tp_size = 1, pp_size = 1;
  bool quantized = false;  // W4A16_AWQ; otherwise every weight is dense
  int group_size = 0;      // 0: take it from the scales' shape
  KvQuant kv = KvQuant::kNone;
  EmbeddingSplit embedding = EmbeddingSplit::kReplicated;
};

/// Pure: a fuzz target's entry. Throws Error{kInput, kUnsupported}. An engine's config.json, with
/// the checkpoint's under "pretrained_config", is read too.
CheckpointConfig parse_checkpoint_config(const json::object& config, std::string_view what);

}  // namespace nibble
