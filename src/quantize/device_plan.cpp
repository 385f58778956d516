// SPDX-License-Identifier: Apache-2.0
#include "quantize/device_plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "quantize/awq.h"
#include "quantize/input_groups.h"

namespace nibble {
namespace {

constexpr uint64_t kFloat = sizeof(float);

double gigabytes(uint64_t bytes) { return static_cast<double>(bytes) * 1e-9; }

uint64_t product(int64_t a, int64_t b) {
  return static_cast<uint64_t>(a) * static_cast<uint64_t>(b);
}

// Weights, integers, error and its product with G; the factor; one group's rows of every block; the
// results of one linear.
uint64_t rounding_bytes(int64_t rows, int64_t features, int64_t largest_rows, int64_t block,
                        const QuantizeOptions& options) {
  return 4 * kFloat * product(rows, features) + kFloat * product(features, block) +
         kFloat * product(rows, features / block * options.group_size) +
         3 * product(largest_rows, features);
}

}  // namespace

std::string DevicePlan::sentence() const {
  return fmt::format(
      "device memory: states {:.1f} GB, weights {:.1f}, statistics {:.1f}, a step {:.1f}, rounding "
      "{:.1f}: {:.1f} GB",
      gigabytes(states), gigabytes(weights), gigabytes(statistics), gigabytes(steps),
      gigabytes(rounding), gigabytes(total()));
}

DevicePlan plan_device(const ModelSpec& spec, const QuantizeOptions& options, int64_t tokens,
                       size_t act_bytes) {
  const bool searches = options.method != QuantizeMethod::kRtn;
  const bool drift = searches && options.sequential && options.correct_drift;
  const int64_t streams = drift ? 2 : 1, hidden = spec.hidden_size, ffn = spec.ffn_size;
  const int64_t step = std::min<int64_t>(options.max_step_tokens, tokens);
  const auto block = [&](int64_t features) {
    return awq::gram_block(features, options.group_size, options.max_gram_bytes);
  };
  DevicePlan layer, head;
  layer.states = product(streams * tokens, hidden) * act_bytes;
  // A decoder a stream, up's half of gate_up, and copies of what the other stream had.
  layer.steps =
      act_bytes * product(step, streams * (2 * hidden + spec.qkv_size() + spec.q_size() + ffn) +
                                    ffn + (drift ? 5 * hidden + spec.q_size() + ffn : 0));
  for (const WeightRow& row : weight_table(spec)) {
    if (row.layer == 0 && row.shape.size() == 2)
      layer.weights += product(row.shape[0], row.shape[1]) * act_bytes;
  }
  if (!searches) return layer;
  for (const InputGroup& group : input_groups()) {
    int64_t rows = 0, features = 0, largest = 0;
    for (const WeightRow& row : weight_table(spec)) {
      if (row.layer != 0 ||
          std::find(group.roles.begin(), group.roles.end(), row.role) == group.roles.end())
        continue;
      rows += row.shape[0];
      largest = std::max(largest, row.shape[0]);
      features = row.shape[1];
    }
    layer.statistics += kFloat * product(features, block(features)) * (drift ? 2 : 1);
    if (drift && adds_to_stream(group.tap)) layer.statistics += kFloat * product(features, hidden);
    layer.rounding =
        std::max(layer.rounding, rounding_bytes(rows, features, largest, block(features), options));
  }
  if (options.lm_head != LmHeadFormat::kInt4) return layer;
  head.states = layer.states;
  head.steps = layer.steps;
  head.weights = product(spec.vocab_size, hidden) * act_bytes;
  head.statistics = kFloat * product(hidden, block(hidden)) * (drift ? 2 : 1);
  head.rounding = rounding_bytes(spec.vocab_size, hidden, spec.vocab_size, block(hidden), options);
  return head.total() > layer.total() ? head : layer;
}

}  // namespace nibble
