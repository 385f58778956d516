// What the grammar tests share. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "text/grammar.h"
#include "text/grammar_automaton.h"
#include "text/json_schema_grammar.h"

namespace nibble::testing {

/// kWhole: the text matches; kPrefix: it can become one that does; kNo: neither.
enum class Match { kNo, kPrefix, kWhole };

inline Match match(GrammarAutomaton& automaton, std::string_view text) {
  auto state = GrammarAutomaton::kStart;
  for (const char c : text) state = automaton.next(state, static_cast<unsigned char>(c));
  if (state == GrammarAutomaton::kDead) return Match::kNo;
  return automaton.can_end(state) ? Match::kWhole : Match::kPrefix;
}

inline bool matches(Grammar grammar, std::string_view text) {
  GrammarAutomaton automaton(std::move(grammar));
  return match(automaton, text) == Match::kWhole;
}

inline GrammarAutomaton schema_automaton(std::string_view schema) {
  return GrammarAutomaton(json_schema_grammar(parse_json(schema, "schema"), "schema"));
}

/// The message of the error that `make` throws; "accepted" when it throws none.
template <typename Make>
std::string error_of(Make make) {
  try {
    make();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

inline std::string schema_error(std::string_view schema) {
  return error_of([&] { schema_automaton(schema); });
}

}  // namespace nibble::testing
