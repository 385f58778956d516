// `nibble bench ops`: every op of a model's step, timed alone, against the read bandwidth measured
// in the same run. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "ops/backend.h"
#include "spec/engine_plan.h"

namespace nibble {

struct OpTiming {
  std::string name;
  double us = 0;     // median over rounds of one call
  double calls = 1;  // per step of the model: layers, or 1
  double bytes = 0;  // that one call must move
  double flops = 0;
  double gb_per_s() const { return bytes / us * 1e-3; }
  double gflops() const { return flops / us * 1e-3; }
};

struct BenchOpsOptions {
  ModelSpec spec;
  WeightLayout int4_layout = WeightLayout::kCpuInt4;
  int group_size = 128;
  KvFormat kv_format = KvFormat::kInt8Dynamic;
  int kv_block_tokens = 32;
  int rows = 1;  // sequences of a decode step, or tokens of a prefill step
  bool prefill =
      false;          // rows tokens of one sequence instead of one token of each of rows sequences
  int context = 512;  // cached tokens of each sequence before the step
  double min_seconds = 0.3;  // per op
};

/// The 1.1B Mistral shape of the speed targets.
ModelSpec bench_model_spec();

/// Calls reserve() itself. Weights are rotated through copies larger than caches (1 GiB at most per
/// op), as a model's layers are.
std::vector<OpTiming> bench_ops(Backend& backend, const BenchOpsOptions& options);

/// Step time and tokens/s that the ops alone allow.
double step_us(const std::vector<OpTiming>& timings);

/// A table for people; read_gb_per_s 0 leaves the percentages out.
std::string format_op_timings(const std::vector<OpTiming>& timings, double read_gb_per_s);
json::array op_timings_to_json(const std::vector<OpTiming>& timings, double read_gb_per_s);

}  // namespace nibble
