// What a device's memory is spent on, decided before anything is loaded into it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "spec/engine_plan.h"

namespace nibble {

struct MemoryWish {
  uint64_t kv_bytes = 0;     // 0: by the fraction
  double kv_fraction = 0.9;  // of what weights and arena leave
};

/// All in bytes but the last two.
struct MemoryPlan {
  uint64_t free = 0;     // before loading
  uint64_t weights = 0;  // the engine's tensors
  uint64_t arena = 0;  // activations, logits, sampling and kernels' workspaces for the largest step
  uint64_t kv = 0;
  int kv_blocks = 0, block_tokens = 0;

  /// One line for people.
  std::string text() const;
};

/// block_bytes: of one KV block, all layers; act_bytes: Backend::act_bytes(). Throws
/// Error{kMemory} that says what is too large for the device, by how much, and which limit to
/// lower.
MemoryPlan plan_memory(const EnginePlan& plan, uint64_t weight_bytes, uint64_t free_bytes,
                       uint64_t block_bytes, uint64_t act_bytes, const MemoryWish& wish);

}  // namespace nibble
