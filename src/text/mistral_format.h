// Mistral's own chat formats (Tekken generations V3, V7, V11, V13), written straight from their
// rules: validate, normalise, encode. Used when a model ships no chat template. Control tokens come
// out as template segments, message text as data. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "base/json.h"
#include "text/jinja.h"

namespace nibble {

enum class MistralVersion { kV3 = 3, kV7 = 7, kV11 = 11, kV13 = 13 };

enum class RolePolicy {
  kStrict,    // what the template or the format says; wrong role order is an error
  kTolerant,  // wrong role order is repaired, never an error
};

class MistralChatFormat {
 public:
  explicit MistralChatFormat(MistralVersion version, std::string bos = "<s>",
                             std::string eos = "</s>")
      : version_(version), bos_(std::move(bos)), eos_(std::move(eos)) {}

  MistralVersion version() const { return version_; }

  /// Strict: mistral-common's rules, Error{kInput} with its sentence where it raises. Tolerant:
  /// empty replies are dropped, reasoning a version cannot write is dropped, call ids are cut or
  /// padded to nine characters, any role order is written down as it comes.
  RenderedSegments render(const json::array& messages, const json::value& tools,
                          bool continue_final_message, RolePolicy policy) const;

 private:
  MistralVersion version_;
  std::string bos_, eos_;
};

/// Nine ASCII letters or digits.
bool is_mistral_call_id(std::string_view id);

/// V13 when the tokenizer has both [THINK] and [ARGS], else V7.
MistralVersion choose_mistral_version(std::span<const std::string> special_tokens);

}  // namespace nibble
