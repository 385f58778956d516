// One allocation for the paged KV cache of all layers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "ops/backend.h"
#include "spec/engine_plan.h"

namespace nibble {

struct ModelWeights;

class KvCache {
 public:
  /// Throws Error{kMemory} naming the bytes asked for.
  KvCache(Backend& backend, const EnginePlan& plan, const ModelWeights& weights, int num_blocks);
  static size_t bytes_per_block(const Backend& backend, const EnginePlan& plan);  // all layers

  std::span<const KvLayer> layers() const { return layers_; }
  int num_blocks() const { return num_blocks_; }

 private:
  int num_blocks_;
  Buffer data_;
  std::vector<KvLayer> layers_;
};

}  // namespace nibble
