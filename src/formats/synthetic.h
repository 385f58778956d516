// Models of random weights: Hugging Face directories for end-to-end tests at real size, and a
// source that makes rows on demand for benchmarks. Same (shape, seed): same weights, on disk and in
// memory, however many shards or threads. Weights are scaled so that activations keep their size
// through the layers. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/thread_pool.h"
#include "formats/weight_source.h"

namespace nibble {

struct SyntheticShape {
  const char* name;
  const char* about;
  ModelSpec spec;
  int num_shards;
};

/// "nano-like", "bench-1.1b", "mistral-7b", "mistral-24b".
const std::vector<SyntheticShape>& synthetic_shapes();
/// Throws Error{kUsage} naming the nearest known shape.
const SyntheticShape& synthetic_shape(std::string_view name);

/// A bf16 Hugging Face directory (config.json, generation_config.json, shards, index; no
/// tokenizer), atomically. Shards are written side by side on `pool`.
void write_synthetic_hf(const fs::path& out, const ModelSpec& shape, uint64_t seed, int num_shards,
                        ThreadPool& pool);

/// The same weights in memory; with `int4` the quantizable rows are random int4 of the right size
/// instead (group 128, or all of a shorter row), with prequant vectors shared as a quantizer shares
/// them, KV scales, and an lm_head as `lm_head` says.
std::unique_ptr<WeightSource> open_synthetic(const ModelSpec& spec, uint64_t seed, bool int4 = true,
                                             LmHeadFormat lm_head = LmHeadFormat::kDense);

}  // namespace nibble
