// SPDX-License-Identifier: Apache-2.0
#include "engine/executor.h"

#include <algorithm>
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
          .vocab_size = plan.spec.vocab_size,
          .max_masks = plan.limits.max_batch_size};
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
      device_step_(backend.alloc(StepBuffer::capacity_bytes(step_shape(plan, max_logit_rows)))) {
  const StepShape shape = step_shape(plan, max_logit_rows);
  const size_t result_bytes = size_t(max_logit_rows) * (2 + 2 * kMaxTopLogprobs) * sizeof(int32_t);
  device_result_ = backend.alloc(result_bytes);
  previous_tokens_ = backend.alloc(size_t(max_logit_rows) * sizeof(int32_t));
  for (Flight& flight : flights_) {
    flight.input = HostBuffer(backend, StepBuffer::capacity_bytes(shape));
    flight.output = HostBuffer(backend, result_bytes);
    flight.step = std::make_unique<StepBuffer>(shape, flight.input.as<std::byte>());
  }
  if (!allowed.empty()) {
    NIBBLE_CHECK(allowed.size() * 64 >= static_cast<size_t>(plan.spec.vocab_size));
    device_allowed_ = backend.alloc(allowed.size_bytes());
    backend.upload(device_allowed_.data(), allowed.data(), allowed.size_bytes());
    backend.sync();
  }
}

ModelExecutor::~ModelExecutor() {
  if (num_collected_ == num_launched_) return;
  try {
    backend_.sync();  // a step in flight uses what is freed now
  } catch (...) {
    return;  // then it does not run either
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

void ModelExecutor::launch(const StepPlan& plan) {
  Flight& flight = flights_[num_launched_++ % 2];
  StepBuffer& step = *flight.step;
  step.build(plan);
  backend_.upload(device_step_.data(), step.bytes().data(), step.bytes().size());
  copy_blocks(plan.copies);

  flight.start = std::chrono::steady_clock::now();
  // The result's arrays lie one after another, so that one download brings them all.
  const size_t num_rows = step.num_rows(), num_top = num_rows * step.max_logprobs();
  int32_t* device = device_result_.as<int32_t>();
  const auto run = [&] {
    StepBatch batch = step.step_batch(device_step_.data());
    batch.previous_tokens = device;
    // Sampling writes there, row by row, while other rows still want to know.
    if (step.counts_previous()) {
      backend_.copy(previous_tokens_.data(), device, previous_tokens_.bytes());
    }
    decoder_.forward(batch, kv_cache_.layers());
    if (num_rows == 0) return;
    const SampleResult sampled{
        .tokens = device,
        .logprobs = reinterpret_cast<float*>(device + num_rows),
        .top_tokens = device + 2 * num_rows,
        .top_logprobs = reinterpret_cast<float*>(device + 2 * num_rows + num_top)};
    SampleBatch samples = step.sample_batch(device_step_.data(), device_allowed_.as<uint64_t>());
    samples.previous_tokens = previous_tokens_.as<int32_t>();
    backend_.sample(samples, decoder_.logits(), sampled);
  };
  backend_.run(step.graph_key(device_step_.data()),
               std::ref(run));  // by reference: a copy might allocate
  if (num_rows > 0) {
    backend_.download(flight.output.as<void>(), device,
                      (2 * num_rows + 2 * num_top) * sizeof(int32_t));
  }
  flight.mark = backend_.mark();
}

const StepResult& ModelExecutor::collect() {
  NIBBLE_CHECK(num_collected_ < num_launched_);
  const Flight& flight = flights_[num_collected_++ % 2];
  backend_.wait(flight.mark);
  // A step that was launched early begins where the one before it ended.
  const auto end = std::chrono::steady_clock::now(), start = std::max(flight.start, last_end_);
  last_end_ = end;

  const StepBuffer& step = *flight.step;
  const size_t num_rows = step.num_rows(), num_top = num_rows * step.max_logprobs();
  const int32_t* host = flight.output.as<int32_t>();
  const float* host_floats = reinterpret_cast<const float*>(host);
  result_ = {
      .tokens = {host, num_rows},
      .logprobs = {host_floats + num_rows, num_rows},
      .max_logprobs = step.max_logprobs(),
      .top_tokens = {host + 2 * num_rows, num_top},
      .top_logprobs = {host_floats + 2 * num_rows + num_top, num_top},
      .forward_us = std::chrono::duration_cast<std::chrono::microseconds>(end - start).count()};
  return result_;
}

}  // namespace nibble
