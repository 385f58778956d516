// SPDX-License-Identifier: Apache-2.0
#include "engine/executor.h"

#include <chrono>
#include <functional>

#include "base/error.h"

namespace nibble {
namespace {

StepShape step_shape(const EnginePlan& plan, int max_logit_rows) {
  return {.max_batch_size = plan.limits.max_batch_size,
          .max_num_tokens = plan.limits.max_num_tokens,
          .max_logit_rows = max_logit_rows,
          .max_seq_len = plan.limits.max_seq_len(),
          .block_tokens = plan.kv_block_tokens,
          .vocab_size = plan.spec.vocab_size};
}

}  // namespace

ModelExecutor::ModelExecutor(Backend& backend, const EnginePlan& plan, const ModelWeights& weights,
                             int num_kv_blocks, int max_logit_rows,
                             std::span<const uint64_t> allowed)
    : backend_(backend),
      decoder_(backend, plan, weights, plan.limits.max_num_tokens, max_logit_rows),
      kv_cache_(backend, plan, weights, num_kv_blocks),
      kv_block_bytes_(backend.kv_block_bytes(plan.kv_format, plan.kv_block_tokens,
                                             plan.spec.num_kv_heads, plan.spec.head_dim)),
      step_(step_shape(plan, max_logit_rows)),
      device_step_(backend.alloc(step_.capacity_bytes())) {
  host_result_.resize(size_t(max_logit_rows) * (2 + 2 * kMaxTopLogprobs));
  device_result_ = backend.alloc(host_result_.size() * sizeof(int32_t));
  if (!allowed.empty()) {
    NIBBLE_CHECK(allowed.size() * 64 >= static_cast<size_t>(plan.spec.vocab_size));
    device_allowed_ = backend.alloc(allowed.size_bytes());
    backend.upload(device_allowed_.data(), allowed.data(), allowed.size_bytes());
    backend.sync();
  }
}

void ModelExecutor::copy_blocks(std::span<const BlockCopy> copies) {
  for (const KvLayer& layer : kv_cache_.layers()) {
    std::byte* data = static_cast<std::byte*>(layer.data);
    for (const BlockCopy& copy : copies) {  // in order: a block may be handed on within a step
      backend_.copy(data + size_t(copy.to) * kv_block_bytes_,
                    data + size_t(copy.from) * kv_block_bytes_, kv_block_bytes_);
    }
  }
}

const StepResult& ModelExecutor::run(const StepPlan& plan) {
  step_.build(plan);
  backend_.upload(device_step_.data(), step_.bytes().data(), step_.bytes().size());
  copy_blocks(plan.copies);

  const auto start = std::chrono::steady_clock::now();
  // The result's arrays lie one after another, so that one download brings them all.
  const size_t num_rows = step_.num_rows(), num_top = num_rows * step_.max_logprobs();
  int32_t* device = device_result_.as<int32_t>();
  const auto step = [&] {
    decoder_.forward(step_.step_batch(device_step_.data()), kv_cache_.layers());
    if (num_rows == 0) return;
    const SampleResult sampled{
        .tokens = device,
        .logprobs = reinterpret_cast<float*>(device + num_rows),
        .top_tokens = device + 2 * num_rows,
        .top_logprobs = reinterpret_cast<float*>(device + 2 * num_rows + num_top)};
    backend_.sample(step_.sample_batch(device_step_.data(), device_allowed_.as<uint64_t>()),
                    decoder_.logits(), sampled);
  };
  backend_.run(step_.graph_key(device_step_.data()),
               std::ref(step));  // by reference: a copy might allocate
  if (num_rows > 0) {
    backend_.download(host_result_.data(), device, (2 * num_rows + 2 * num_top) * sizeof(int32_t));
  }
  backend_.sync();
  const auto end = std::chrono::steady_clock::now();

  const int32_t* host = host_result_.data();
  const float* host_floats = reinterpret_cast<const float*>(host);
  result_ = {
      .tokens = {host, num_rows},
      .logprobs = {host_floats + num_rows, num_rows},
      .max_logprobs = step_.max_logprobs(),
      .top_tokens = {host + 2 * num_rows, num_top},
      .top_logprobs = {host_floats + 2 * num_rows + num_top, num_top},
      .forward_us = std::chrono::duration_cast<std::chrono::microseconds>(end - start).count()};
  return result_;
}

}  // namespace nibble
