// Request bodies of every endpoint: whatever comes is either accepted within the limits or refused
// with an error that is itself a proper reply. The first byte picks the endpoint.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "serve/api_error.h"
#include "serve/api_request.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void check_generation(const nibble::GenerationBody& body, const nibble::BodyLimits& limits) {
  const auto choices = (body.is_chat ? 1 : body.prompts.size()) * size_t(body.params.n);
  require(body.params.n >= 1 && choices <= size_t(limits.max_choices));
  require(body.is_chat ? !body.chat.messages.empty() : !body.prompts.empty());
  require(body.stop.size() <= 64);
  for (const auto& stop : body.stop) require(!stop.empty() && stop.size() <= 1024);
  require(body.params.logprobs >= -1 && body.params.logprobs <= nibble::kMaxTopLogprobs);
  for (const int32_t id : body.params.stop_token_ids) require(id >= 0);
  for (const auto& [id, bias] : body.params.logit_bias) require(id >= 0 && bias <= 100);
  require(!body.max_tokens || *body.max_tokens >= (body.is_chat ? 1 : 0));
  require(!(body.chat.continue_final_message && body.chat.add_generation_prompt));
  require(body.stream ||
          !(body.stream_options.include_usage || body.stream_options.continuous_usage_stats));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);
  const nibble::BodyLimits limits{.max_choices = 16};
  try {
    switch (data[0]) {
      case 'c': check_generation(nibble::parse_chat_body(text, {}, limits), limits); break;
      case 't': check_generation(nibble::parse_completion_body(text, {}, limits), limits); break;
      case 'k': nibble::parse_tokenize_body(text); break;
      case 'd':
        for (const int32_t id : nibble::parse_detokenize_body(text).tokens) require(id >= 0);
        break;
      default: break;
    }
  } catch (const nibble::ApiError& error) {
    require(error.status == 400);
    const auto body = nibble::parse_json(error.body(), "error body");
    require(body.at("error").at("message").is_string());
  }
  return 0;
}
