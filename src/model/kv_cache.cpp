// SPDX-License-Identifier: Apache-2.0
#include "model/kv_cache.h"

#include "base/error.h"
#include "model/weights.h"

namespace nibble {

size_t KvCache::bytes_per_block(const Backend& backend, const EnginePlan& plan) {
  return static_cast<size_t>(plan.spec.num_layers) *
         backend.kv_block_bytes(plan.kv_format, plan.kv_block_tokens, plan.spec.num_kv_heads,
                                plan.spec.head_dim);
}

KvCache::KvCache(Backend& backend, const EnginePlan& plan, const ModelWeights& weights,
                 int num_blocks)
    : num_blocks_(num_blocks),
      data_(backend.alloc(bytes_per_block(backend, plan) * static_cast<size_t>(num_blocks))) {
  const size_t layer_bytes = bytes_per_block(backend, plan) /
                             static_cast<size_t>(plan.spec.num_layers) *
                             static_cast<size_t>(num_blocks);
  for (size_t layer = 0; layer < static_cast<size_t>(plan.spec.num_layers); ++layer) {
    layers_.push_back(KvLayer{.format = plan.kv_format,
                              .num_blocks = num_blocks,
                              .block_tokens = plan.kv_block_tokens,
                              .num_kv_heads = plan.spec.num_kv_heads,
                              .head_dim = plan.spec.head_dim,
                              .data = data_.as<std::byte>() + layer * layer_bytes,
                              .k_scale = weights.layers[layer].k_scale,
                              .v_scale = weights.layers[layer].v_scale});
  }
}

}  // namespace nibble
