// JSON schemas as grammars. What a grammar lets through is always valid under the schema; the other
// way round some spellings are left out (docs/http-api.md, "Structured output"): properties come in
// the schema's order, and an object with `properties` has no others unless additionalProperties
// says so. A keyword that would constrain and is not honoured is an error that names it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "base/json.h"
#include "text/grammar.h"

namespace nibble {

/// `what` names the schema in messages. Throw Error{kInput} for what is no schema or matches
/// nothing, Error{kUnsupported} for keywords, Error{kLimit} for what gets too large.
Grammar json_schema_grammar(const json::value& schema, std::string_view what);
/// Any JSON object.
Grammar json_object_grammar();
/// One of these texts.
Grammar choice_grammar(std::span<const std::string> choices, std::string_view what);
/// A text that the whole expression matches.
Grammar regex_grammar(std::string_view regex, std::string_view what);

}  // namespace nibble
