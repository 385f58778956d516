// Requests that share steps, blocks and prefixes, against the same requests alone: the engine under
// load (reuse, chunking, preemption, cancellation, choices, priorities) and SingleSequence give
// every request the same tokens and log-probs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>

#include "spec/engine_plan.h"
#include "spec/model_spec.h"

namespace nibble {

struct Sharing {
  std::string target;
  std::optional<ActivationPrecision> precision;  // none: the target's own
  KvFormat kv_format;
  ModelSpec spec;  // random int4 weights of this shape
  int block_tokens;
  int num_rounds;
  int num_requests = 16;  // of a round, all over one beginning of at most
  int stem_tokens = 80;   // tokens, each going its own way after some of them
  int max_batch_size = 6;
  int num_blocks = 15;  // and 0 to 3 more; of them the longest request must fit
  /// 0: tokens and log-probs are equal bit for bit. Else what log-probs may differ by, and what a
  /// greedy token's may be below that of the best one alone: for targets that sum in an order that
  /// depends on the step.
  double tolerance = 0;
};

/// Fails the test where a request got something else than alone; also where no request was
/// preempted, none cancelled, or no prefix was reused, because then it has shown nothing. Throws
/// what loading the target throws.
void expect_as_alone(const Sharing& sharing);

}  // namespace nibble
