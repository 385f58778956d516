// SPDX-License-Identifier: Apache-2.0
#include "build/memory_plan.h"

#include <algorithm>

#include "base/error.h"
#include "formats/inspect.h"

namespace nibble {
namespace {

// What does not grow with the limits: code, graphs, the linears' exchange, allocation granularity.
constexpr uint64_t kFixedArena = uint64_t{512} << 20;
constexpr uint64_t kMaxLogitRows = 64;  // prompt log-probs, besides one row a sequence

uint64_t arena_bytes(const EnginePlan& plan, uint64_t act_bytes) {
  const ModelSpec& spec = plan.spec;
  const EngineLimits& limits = plan.limits;
  const auto rows = static_cast<uint64_t>(limits.max_num_tokens);
  const auto row = static_cast<uint64_t>(3 * spec.hidden_size + spec.qkv_size() + spec.q_size() +
                                         2 * spec.ffn_size);
  // f32 logits and the sampling op's 64-bit weights; the portable one also keeps a copy of logits.
  const uint64_t logits = (static_cast<uint64_t>(limits.max_batch_size) + kMaxLogitRows) *
                          static_cast<uint64_t>(spec.vocab_size) *
                          (plan.target == "cuda:portable" ? 16 : 12);
  const uint64_t rope = static_cast<uint64_t>(limits.max_seq_len()) *
                        static_cast<uint64_t>(spec.head_dim) * sizeof(float);
  // K and V of one sequence as f16, for the prompt kernel.
  const uint64_t expanded =
      static_cast<uint64_t>(limits.max_seq_len()) * static_cast<uint64_t>(spec.kv_size()) * 4;
  // The widest input of a linear in e4m3, in slabs of 64 tokens x 128 channels (x_layout.h), and
  // that of 64 tokens once more: a kernel reads one and writes the other.
  const uint64_t quantized =
      plan.activation_precision == ActivationPrecision::kE4m3
          ? (rows + 128) *
                (static_cast<uint64_t>(std::max({spec.ffn_size, spec.hidden_size, spec.q_size()})) +
                 128) *
                9 / 8
          : 0;
  return kFixedArena + rows * row * act_bytes + logits + rope + expanded + quantized;
}

}  // namespace

std::string MemoryPlan::text() const {
  return fmt::format(
      "device memory: {} free; weights {}, steps {}, KV cache {} ({} tokens in blocks of {}), {} "
      "left",
      human_bytes(free), human_bytes(weights), human_bytes(arena), human_bytes(kv),
      int64_t{kv_blocks} * block_tokens, block_tokens, human_bytes(free - weights - arena - kv));
}

MemoryPlan plan_memory(const EnginePlan& plan, uint64_t weight_bytes, uint64_t free_bytes,
                       uint64_t block_bytes, uint64_t act_bytes, const MemoryWish& wish) {
  MemoryPlan memory{.free = free_bytes,
                    .weights = weight_bytes,
                    .arena = arena_bytes(plan, act_bytes),
                    .block_tokens = plan.kv_block_tokens};
  const uint64_t needed = memory.weights + memory.arena;
  if (needed > free_bytes) {
    fail(ErrorKind::kMemory,
         "the device has {} free, {} too little for {} of weights and {} for steps of {} tokens; "
         "free memory on it, or build with a lower --max-num-tokens or --max-batch-size",
         human_bytes(free_bytes), human_bytes(needed - free_bytes), human_bytes(weight_bytes),
         human_bytes(memory.arena), plan.limits.max_num_tokens);
  }
  const uint64_t left = free_bytes - needed;
  const uint64_t wanted = wish.kv_bytes > 0
                              ? wish.kv_bytes
                              : static_cast<uint64_t>(static_cast<double>(left) * wish.kv_fraction);
  if (wanted > left) {
    fail(ErrorKind::kMemory,
         "a KV cache of {} is {} more than weights ({}) and steps ({}) leave of the {} free; lower "
         "--kv-cache-bytes to {} or less",
         human_bytes(wanted), human_bytes(wanted - left), human_bytes(weight_bytes),
         human_bytes(memory.arena), human_bytes(free_bytes), left);
  }
  const uint64_t tokens = static_cast<uint64_t>(plan.kv_block_tokens);
  const uint64_t per_sequence =
      (static_cast<uint64_t>(plan.limits.max_seq_len()) + tokens - 1) / tokens;
  const uint64_t blocks = std::min<uint64_t>(wanted / block_bytes, 1u << 30);
  if (blocks < per_sequence) {
    fail(ErrorKind::kMemory,
         "a KV cache of {} holds {} tokens, fewer than one sequence of {} (--max-input-len + "
         "--max-output-len); give it {} more, or build the engine for {} tokens fewer",
         human_bytes(wanted), blocks * tokens, plan.limits.max_seq_len(),
         human_bytes((per_sequence - blocks) * block_bytes),
         static_cast<uint64_t>(plan.limits.max_seq_len()) - blocks * tokens);
  }
  memory.kv_blocks = static_cast<int>(blocks);
  memory.kv = blocks * block_bytes;
  return memory;
}

}  // namespace nibble
