// Template source to tokens, with Jinja's whitespace rules as Hugging Face sets them: trim_blocks,
// lstrip_blocks, one final newline dropped, "\r\n" and "\r" read as "\n".
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace nibble::jinja {

enum class TokenKind : uint8_t {
  kData,  // template text
  kBlockBegin,
  kBlockEnd,
  kVariableBegin,
  kVariableEnd,
  kName,
  kString,   // text: unescaped
  kInteger,  // text: decimal digits
  kFloat,
  kOperator,
  kEnd,
  kError,  // lexing failed here; raised when the parser arrives
};

struct Token {
  TokenKind kind;
  int line;
  std::string text;
};

/// Never throws for bad input: the failure is the last token, so that an earlier syntax error is
/// reported first, as Jinja's lazy lexer does.
std::vector<Token> tokenize(std::string_view source);

/// How Jinja names a token in messages ("end of print statement").
std::string describe_token(const Token& token);

}  // namespace nibble::jinja
