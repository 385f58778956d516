// Writes the portable checkpoint in TensorRT-LLM's layout: config.json and rank{r}.safetensors for
// any tensor-parallel size, streaming, one layer in memory (docs/formats.md; facts trtllm.md 1 and
// 9). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "formats/weight_source.h"

namespace nibble {

struct CheckpointOptions {
  int tp_size = 1;
  int group_size = 128;
  DType dtype = DType::kBF16;                   // of unquantized tensors and prequant vectors
  bool int8_kv = true;                          // write kv_cache_quant_algo INT8 and the scales
  LmHeadFormat lm_head = LmHeadFormat::kDense;  // not of a source whose embeddings are tied
  std::string producer_version = NIBBLE_VERSION;
  json::object extra_config;  // further top-level keys ("nibble": {...}), ignored by TensorRT-LLM;
                              // vocab_size, bos_token_id, eos_token_ids are added to "nibble"
};

/// A linear to write: dense values are never re-quantized here.
struct CheckpointLinear {
  std::vector<int8_t> q;         // [out, in], -8..7; 8 bits: -kMaxInt8..kMaxInt8
  std::vector<float> scales;     // [out, in/group]
  std::vector<float> pre_scale;  // [in]; empty: ones are written. 8 bits: empty
};

/// Called once per quantized row (quantized_bits()), in table order. KV scales are asked for after
/// the last row.
struct CheckpointContent {
  std::function<CheckpointLinear(const WeightRow&)> linear;
  std::function<KvScales()> kv_scales;  // empty when int8_kv is false
};

/// `directory` must exist (usually inside an AtomicDirectory). Dense rows are taken from `source`.
/// All rank files are written in one pass over the layers.
void write_checkpoint(const fs::path& directory, const WeightSource& source,
                      const CheckpointOptions& options, const CheckpointContent& content);

}  // namespace nibble
