// SPDX-License-Identifier: Apache-2.0
#include "engine/sampling_params.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace nibble {
namespace {

void check_tokens(std::span<const int32_t> tokens, int vocab_size, const char* what) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size) {
      fail(ErrorKind::kInput, "{}[{}] is {}, but token ids run from 0 to {}", what, i, tokens[i],
           vocab_size - 1);
    }
  }
}

void check_range(const char* what, double value, double low, double high) {
  if (!(value >= low && value <= high)) {  // NaN fails too
    fail(ErrorKind::kInput, "{} is {}, but must be from {} to {}", what, value, low, high);
  }
}

void check_lengths(const Request& request, const RequestLimits& limits) {
  const int64_t num_prompt = static_cast<int64_t>(request.prompt_tokens.size());
  if (num_prompt == 0) fail(ErrorKind::kInput, "the prompt has no tokens; give at least one");
  if (num_prompt > limits.max_input_len) {
    fail(ErrorKind::kLimit,
         "This model's maximum context length is {} tokens, of which {} may be prompt "
         "(max_input_len) "
         "and {} output (max_output_len), but the prompt has {} tokens. Shorten the prompt, or "
         "build "
         "the engine with a larger --max-input-len.",
         limits.max_seq_len, limits.max_input_len, limits.max_output_len, num_prompt);
  }
  if (request.max_tokens && *request.max_tokens < 0) {
    fail(ErrorKind::kInput, "max_tokens is {}, but must be 0 or more", *request.max_tokens);
  }
  if (request.max_tokens && *request.max_tokens > limits.max_output_len) {
    fail(
        ErrorKind::kLimit,
        "max_tokens is {}, but this engine generates at most {} tokens a request (max_output_len). "
        "This model's maximum context length is {} tokens. Ask for fewer, or build the engine with "
        "a "
        "larger --max-output-len.",
        *request.max_tokens, limits.max_output_len, limits.max_seq_len);
  }
  const int64_t num_output = request.max_tokens.value_or(1);
  if (num_prompt + num_output > limits.max_seq_len) {
    fail(
        ErrorKind::kLimit,
        "This model's maximum context length is {} tokens (the KV cache holds {}), but the request "
        "needs {}: {} in the prompt and {} to generate. Shorten either, or give the KV cache more "
        "memory.",
        limits.max_seq_len, limits.kv_cache_tokens, num_prompt + num_output, num_prompt,
        num_output);
  }
}

int64_t num_drawable(const RequestLimits& limits) {
  if (limits.allowed_tokens.empty()) return limits.vocab_size;
  int64_t count = 0;
  for (const uint64_t word : limits.allowed_tokens) count += std::popcount(word);
  return count;
}

// A bias of -infinity bans an id for good, min_tokens what would end the answer. With nothing left
// the sampler would have to draw something banned.
void check_something_is_drawable(const Request& request, const RequestLimits& limits) {
  if (resolve_max_tokens(request, limits) == 0) return;
  const SamplingParams& p = request.params;
  std::vector<int32_t> stops;
  if (p.min_tokens > 0) {
    stops = p.stop_token_ids;
    if (!p.ignore_eos) stops.insert(stops.end(), limits.eos_ids.begin(), limits.eos_ids.end());
  }
  const int64_t drawable = num_drawable(limits);
  if (static_cast<int64_t>(p.logit_bias.size() + stops.size()) < drawable) return;
  std::vector<bool> banned(static_cast<size_t>(limits.vocab_size));
  for (const TokenBias& entry : make_bias(p, stops)) {
    banned[static_cast<size_t>(entry.token)] = std::isinf(entry.bias);
  }
  for (int32_t token = 0; token < limits.vocab_size; ++token) {
    const auto word = static_cast<size_t>(token) / 64;
    const bool allowed =
        limits.allowed_tokens.empty() || (limits.allowed_tokens[word] >> (token % 64) & 1) != 0;
    if (allowed && !banned[static_cast<size_t>(token)]) return;
  }
  fail(ErrorKind::kInput,
       "logit_bias{} bans all {} tokens that this model can draw; leave at least one with a bias "
       "above -infinity",
       stops.empty() ? "" : ", with the stop ids that min_tokens holds back,", drawable);
}

}  // namespace

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEos: return "eos";
    case FinishReason::kStopToken: return "stop_token";
    case FinishReason::kLength: return "length";
    case FinishReason::kCancelled: return "cancelled";
    case FinishReason::kError: return "error";
  }
  return "unknown";
}

void check_request(const Request& request, const RequestLimits& limits) {
  if (!request.sink) fail(ErrorKind::kInput, "the request has no sink");
  check_lengths(request, limits);
  check_tokens(request.prompt_tokens, limits.vocab_size, "prompt_tokens");
  const SamplingParams& p = request.params;
  check_tokens(p.stop_token_ids, limits.vocab_size, "stop_token_ids");
  if (p.stop_token_ids.size() > kMaxStopTokenIds) {
    fail(ErrorKind::kInput, "stop_token_ids has {} ids, but at most {} are supported",
         p.stop_token_ids.size(), kMaxStopTokenIds);
  }
  if (p.logit_bias.size() > kMaxLogitBias) {
    fail(ErrorKind::kInput, "logit_bias has {} entries, but at most {} are supported",
         p.logit_bias.size(), kMaxLogitBias);
  }
  for (const auto& [token, bias] : p.logit_bias) {
    check_tokens(std::span(&token, 1), limits.vocab_size, "logit_bias");
    if (std::isnan(bias) || bias == std::numeric_limits<float>::infinity()) {
      fail(ErrorKind::kInput, "logit_bias of token {} is {}, but must be a number below infinity",
           token, bias);
    }
  }
  const float max_float = std::numeric_limits<float>::max();
  check_range("temperature", p.temperature, 0, 100);
  check_range("top_k", p.top_k, 0, std::numeric_limits<int>::max());
  check_range("top_p", p.top_p, 0, 1);
  if (p.top_p == 0) fail(ErrorKind::kInput, "top_p is 0, but must be above 0 and at most 1");
  check_range("min_p", p.min_p, 0, 1);
  check_range("repetition_penalty", p.repetition_penalty, 0, max_float);
  if (p.repetition_penalty == 0) {
    fail(ErrorKind::kInput, "repetition_penalty is 0, but must be above 0");
  }
  check_range("presence_penalty", p.presence_penalty, -100, 100);
  check_range("frequency_penalty", p.frequency_penalty, -100, 100);
  check_range("min_tokens", p.min_tokens, 0, resolve_max_tokens(request, limits));
  check_range("logprobs", p.logprobs, -1, kMaxTopLogprobs);
  check_range("prompt_logprobs", p.prompt_logprobs, -1, kMaxTopLogprobs);
  check_range("n", p.n, 1, kMaxChoices);
  check_something_is_drawable(request, limits);
}

int resolve_max_tokens(const Request& request, const RequestLimits& limits) {
  if (request.max_tokens) return *request.max_tokens;
  return std::min(limits.max_output_len,
                  limits.max_seq_len - static_cast<int>(request.prompt_tokens.size()));
}

uint64_t choice_seed(uint64_t seed, int index) {
  if (index == 0) return seed;
  uint64_t x = seed + static_cast<uint64_t>(index) * 0x9E3779B97F4A7C15u;  // splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

SampleRow make_sample_row(const SamplingParams& params, uint64_t seed) {
  return {.temperature = params.temperature,
          .top_p = params.top_p,
          .min_p = params.min_p,
          .top_k = params.top_k,
          .repetition_penalty = params.repetition_penalty,
          .presence_penalty = params.presence_penalty,
          .frequency_penalty = params.frequency_penalty,
          .seed = seed,
          .num_logprobs = params.logprobs};
}

bool needs_history(const SamplingParams& params) {
  return params.repetition_penalty != 1 || params.presence_penalty != 0 ||
         params.frequency_penalty != 0;
}

std::vector<TokenBias> make_bias(const SamplingParams& params, std::span<const int32_t> banned) {
  std::vector<TokenBias> bias;
  const auto set = [&](int32_t token, float value) {
    for (TokenBias& entry : bias) {
      if (entry.token == token) {
        entry.bias = value;
        return;
      }
    }
    bias.push_back({token, value});
  };
  for (const auto& [token, value] : params.logit_bias) set(token, value);
  for (const int32_t token : banned) set(token, -std::numeric_limits<float>::infinity());
  return bias;
}

}  // namespace nibble
