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
  uint64_t kv_at_most = 0;   // by the fraction, but no more than this; 0: no such bound
};

/// The device and what of the engine does not depend on its limits; bytes.
struct MemoryFacts {
  std::string device;        // Backend::name()
  uint64_t free = 0;         // before loading
  uint64_t weights = 0;      // the engine's tensors
  uint64_t kv_block = 0;     // one KV block, all layers
  uint64_t act_element = 0;  // Backend::act_bytes()
};

/// All in bytes but the first and the last two.
struct MemoryPlan {
  std::string device;
  uint64_t free = 0;     // before loading
  uint64_t weights = 0;  // the engine's tensors
  uint64_t arena = 0;  // activations, logits, sampling and kernels' workspaces for the largest step
  uint64_t kv = 0;
  int kv_blocks = 0, block_tokens = 0;

  /// One line for people.
  std::string text() const;
};

/// Throws Error{kMemory} that says what is too large for the device, by how much, and which limit
/// or flag to set to what, so that it fits; or that no limit helps, because the weights are too
/// large.
MemoryPlan plan_memory(const EnginePlan& plan, const MemoryFacts& facts, const MemoryWish& wish);

}  // namespace nibble
