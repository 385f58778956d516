// Regular expressions as grammars: JSON Schema's `pattern` (ECMAScript's syntax) and guided_regex.
// Literals, . classes \d \w \s, groups, |, * + ? {m,n} and lazy forms (the same language); ^ and $
// at the ends of an alternative. Look-around, back-references, \b, \p and flags are refused by
// name. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string_view>

#include "text/grammar.h"

namespace nibble {

struct RegexOptions {
  /// One code point out of a set; the default writes it as UTF-8.
  std::function<GrammarBuilder::StateId(const CodePoints&, GrammarBuilder::StateId next)> emit;
  /// A match anywhere in the text counts, as in JSON Schema; else the whole text has to match.
  bool search = false;
};

/// `what` names the expression in messages. Throws Error{kInput} for what is no regular expression,
/// Error{kUnsupported}, Error{kLimit}.
GrammarBuilder::StateId add_regex(GrammarBuilder& builder, std::string_view regex,
                                  std::string_view what, const RegexOptions& options,
                                  GrammarBuilder::StateId next);

}  // namespace nibble
