// What an engine is made of. build/ fills one in from an engine directory; tests from thin air.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/block_pool.h"
#include "engine/executor.h"
#include "model/weights.h"
#include "nibble/engine.h"
#include "ops/backend.h"
#include "spec/engine_plan.h"

namespace nibble {

struct EngineParts {
  EnginePlan plan;
  std::unique_ptr<Backend> backend;
  std::shared_ptr<const void> tensors;  // owns what the weights point into (EngineTensors, or more)
  ModelWeights weights;                 // imported into `backend`
  int num_kv_blocks = 0;                // memory / KvCache::bytes_per_block()
  std::vector<int32_t> eos_token_ids;   // empty: plan.spec's
  std::vector<uint64_t> allowed_tokens;  // bit per id that may be drawn; empty: all
  int max_queue = 256;                   // requests accepted and not yet started
  int num_prompt_logprob_rows = 64;      // prompt tokens scored per step, for all requests together
  BlockPool::HashFn hash = BlockPool::default_hash;
  std::unique_ptr<Executor> executor;  // set by tests instead of backend and weights
};

}  // namespace nibble
