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

uint64_t arena_bytes(const EnginePlan& plan, const EngineLimits& limits, uint64_t act_bytes) {
  const ModelSpec& spec = plan.spec;
  const auto rows = static_cast<uint64_t>(limits.max_num_tokens);
  const auto row = static_cast<uint64_t>(3 * spec.hidden_size + spec.qkv_size() + spec.q_size() +
                                         2 * spec.ffn_size);
  // f32 logits; the portable sampling op keeps a copy.
  const uint64_t logits = (static_cast<uint64_t>(limits.max_batch_size) + kMaxLogitRows) *
                          static_cast<uint64_t>(spec.vocab_size) *
                          (plan.target == "cuda:portable" ? 8 : 4);
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

uint64_t blocks_of_a_sequence(const EnginePlan& plan, const EngineLimits& limits) {
  const auto tokens = static_cast<uint64_t>(plan.kv_block_tokens);
  return (static_cast<uint64_t>(limits.max_seq_len()) + tokens - 1) / tokens;
}

/// Of what weights and steps leave.
uint64_t cache_bytes(uint64_t left, const MemoryWish& wish) {
  if (wish.kv_bytes > 0) return wish.kv_bytes;
  const auto share = static_cast<uint64_t>(static_cast<double>(left) * wish.kv_fraction);
  return wish.kv_at_most > 0 ? std::min(share, wish.kv_at_most) : share;
}

/// Whether an engine of these limits fits, with a cache that holds one sequence of full length.
bool fits(const EnginePlan& plan, const EngineLimits& limits, const MemoryFacts& facts,
          const MemoryWish& wish) {
  const uint64_t needed = facts.weights + arena_bytes(plan, limits, facts.act_element);
  if (needed > facts.free) return false;
  const uint64_t left = facts.free - needed, cache = cache_bytes(left, wish);
  return cache <= left && cache / facts.kv_block >= blocks_of_a_sequence(plan, limits);
}

/// The largest in [low, high) of which `ok` holds, given that it holds up to some value only; 0:
/// of none.
int largest(int low, int high, const auto& ok) {
  if (low >= high || !ok(low)) return 0;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (ok(middle) ? low : high) = middle;
  }
  return low;
}

/// "--max-num-tokens 512 or less, or --max-input-len 3000 or less": each alone makes it fit; where
/// none does, several together. Empty: nothing does.
std::string lower_limits(const EnginePlan& plan, const MemoryFacts& facts, const MemoryWish& wish) {
  const EngineLimits& now = plan.limits;
  std::string out;
  const auto alone = [&](const char* flag, int EngineLimits::* field, int least) {
    const int value = largest(least, now.*field, [&](int candidate) {
      EngineLimits limits = now;
      limits.*field = candidate;
      return fits(plan, limits, facts, wish);
    });
    if (value > 0) {
      out += fmt::format("{}{} {} or less", out.empty() ? "" : ", or with ", flag, value);
    }
  };
  alone("--max-num-tokens", &EngineLimits::max_num_tokens, now.max_batch_size);
  alone("--max-batch-size", &EngineLimits::max_batch_size, 1);
  alone("--max-input-len", &EngineLimits::max_input_len, 1);
  if (!out.empty()) return out;
  // All in one proportion, in thousandths.
  const auto scaled = [&](int thousandths) {
    const auto scale = [&](int value) {
      return static_cast<int>(std::max<int64_t>(1, int64_t{value} * thousandths / 1000));
    };
    return EngineLimits{.max_batch_size = scale(now.max_batch_size),
                        .max_input_len = scale(now.max_input_len),
                        .max_output_len = scale(now.max_output_len),
                        .max_num_tokens = scale(now.max_num_tokens)};
  };
  const auto ok = [&](int thousandths) { return fits(plan, scaled(thousandths), facts, wish); };
  if (!ok(0)) return {};
  const EngineLimits limits = scaled(largest(0, 1000, ok));
  return fmt::format(
      "--max-num-tokens {}, --max-batch-size {}, --max-input-len {} and --max-output-len {} "
      "together, or less",
      limits.max_num_tokens, limits.max_batch_size, limits.max_input_len, limits.max_output_len);
}

}  // namespace

std::string MemoryPlan::text() const {
  return fmt::format(
      "device memory: {} free on {}; weights {}, steps {}, KV cache {} ({} tokens in blocks of "
      "{}), {} left",
      human_bytes(free), device, human_bytes(weights), human_bytes(arena), human_bytes(kv),
      int64_t{kv_blocks} * block_tokens, block_tokens, human_bytes(free - weights - arena - kv));
}

MemoryPlan plan_memory(const EnginePlan& plan, const MemoryFacts& facts, const MemoryWish& wish) {
  MemoryPlan memory{.device = facts.device,
                    .free = facts.free,
                    .weights = facts.weights,
                    .arena = arena_bytes(plan, plan.limits, facts.act_element),
                    .block_tokens = plan.kv_block_tokens};
  const uint64_t blocks_needed = blocks_of_a_sequence(plan, plan.limits);
  const uint64_t cache_needed = blocks_needed * facts.kv_block;
  const uint64_t needed = memory.weights + memory.arena + cache_needed;
  if (needed > facts.free) {
    // A wish of bytes is about a cache of one size; here no cache has room.
    const MemoryWish any{.kv_fraction = wish.kv_bytes > 0 ? 1 : wish.kv_fraction};
    const std::string lower = lower_limits(plan, facts, any);
    const std::string gap = fmt::format(
        "{} has {} free, {} too little for {} of weights, {} for steps of {} tokens and {} "
        "sequences and {} of KV cache for one sequence of {} tokens",
        facts.device, human_bytes(facts.free), human_bytes(needed - facts.free),
        human_bytes(memory.weights), human_bytes(memory.arena), plan.limits.max_num_tokens,
        plan.limits.max_batch_size, human_bytes(cache_needed), plan.limits.max_seq_len());
    if (lower.empty()) {
      const EngineLimits least{
          .max_batch_size = 1, .max_input_len = 1, .max_output_len = 1, .max_num_tokens = 1};
      const uint64_t smallest =
          memory.weights + arena_bytes(plan, least, facts.act_element) + facts.kv_block;
      fail(ErrorKind::kMemory,
           "{}. No limit helps: the weights alone are {}, and with the smallest limits the engine "
           "needs {}; free {} on the device, or take a larger one or a smaller model{}",
           gap, human_bytes(memory.weights), human_bytes(smallest),
           human_bytes(smallest > facts.free ? smallest - facts.free : facts.kv_block),
           is_int4(plan.linear_layout) ? "" : " (its weights are not quantized: nibble quantize)");
    }
    fail(ErrorKind::kMemory, "{}; free memory on it, or build the engine with {}{}", gap, lower,
         wish.kv_bytes > 0 ? " (and set --kv-cache-bytes to what is left then)" : "");
  }
  const uint64_t left = facts.free - memory.weights - memory.arena;
  const uint64_t wanted = cache_bytes(left, wish);
  if (wanted > left) {
    fail(ErrorKind::kMemory,
         "a KV cache of {} is {} more than weights ({}) and steps ({}) leave of the {} free on {}; "
         "lower --kv-cache-bytes to {} or less",
         human_bytes(wanted), human_bytes(wanted - left), human_bytes(memory.weights),
         human_bytes(memory.arena), human_bytes(facts.free), facts.device, left);
  }
  const uint64_t blocks = std::min<uint64_t>(wanted / facts.kv_block, 1u << 30);
  if (blocks < blocks_needed) {
    const std::string lower = lower_limits(plan, facts, wish);
    fail(ErrorKind::kMemory,
         "a KV cache of {} holds {} tokens, fewer than one sequence of {} (--max-input-len + "
         "--max-output-len); give it --kv-cache-bytes {} or more, of the {} that are left{}{}",
         human_bytes(wanted), blocks * static_cast<uint64_t>(plan.kv_block_tokens),
         plan.limits.max_seq_len(), cache_needed, left,
         lower.empty() ? "" : ", or build the engine with ", lower);
  }
  memory.kv_blocks = static_cast<int>(blocks);
  memory.kv = blocks * facts.kv_block;
  return memory;
}

}  // namespace nibble
