// What an answer must match (structured output): asked for in OpenAI's or vLLM's words, turned into
// a grammar. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"
#include "text/grammar.h"

namespace nibble {

struct OutputFormat {
  enum class Kind : uint8_t { kText, kJsonObject, kJsonSchema, kChoice, kRegex };
  Kind kind = Kind::kText;  // kText: anything
  std::string field;        // of the request, for messages
  json::value schema;       // kJsonSchema
  std::vector<std::string> choices;
  std::string regex;

  explicit operator bool() const { return kind != Kind::kText; }
  /// Equal for formats with the same grammar.
  std::string key() const;
  /// Throws Error{kInput}, {kUnsupported} or {kLimit} naming the field.
  Grammar grammar() const;
};

}  // namespace nibble
