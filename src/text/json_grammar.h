// The pieces of JSON as grammars: strings, numbers, whole values, and the blanks between them,
// which are bounded so that no model prints blanks for ever. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/json.h"
#include "text/grammar.h"

namespace nibble {

/// Whole-number bounds of a number; none: unbounded.
struct NumberRange {
  std::optional<int64_t> min, max;
  bool min_is_open = false, max_is_open = false;  // the bound itself is outside
  /// Numbers beyond have too many digits (JsonGrammar::kMaxDigits).
  static constexpr int64_t kMaxBound = 999'999'999'999'999'999;
};

/// Rules are made when they are first needed. Lives no longer than the builder.
class JsonGrammar {
 public:
  using StateId = GrammarBuilder::StateId;
  static constexpr int kMaxDigits = 18;    // of an integer, so that 64 bits hold it
  static constexpr int kMaxFraction = 16;  // digits
  static constexpr int kMaxExponent = 2;   // digits: no double overflows
  static constexpr int kMaxIndent = 32;    // blanks after a line end

  explicit JsonGrammar(GrammarBuilder& builder) : builder_(builder) {}

  /// Between tokens: nothing, a blank, or a line end with an indent.
  StateId gap(StateId next);
  /// A key's colon.
  StateId colon(StateId next);

  StateId value(StateId next);   // any
  StateId object(StateId next);  // any
  StateId array(StateId next);   // any
  StateId string(StateId next);  // any
  /// `min` to `max` characters; max -1: without end.
  StateId string_of_length(int min, int max, StateId next);
  /// A string whose value the expression matches somewhere.
  StateId string_matching(std::string_view regex, std::string_view what, StateId next);
  /// A string that is none of these.
  StateId string_except(std::span<const std::string> texts, StateId next);
  StateId integer(const NumberRange& range, StateId next);
  StateId number(const NumberRange& range, StateId next);
  /// This value and no other; its members in their order.
  StateId constant(const json::value& value, StateId next);
  StateId string_constant(std::string_view text, StateId next);

 private:
  StateId end_of_string(StateId next);  // any characters, then the quote
  StateId character(StateId next);      // one, in any spelling
  StateId escape(StateId next);
  /// One character of the set in its one spelling: raw, or escaped where it must be.
  StateId plain_character(const CodePoints& points, StateId next);
  StateId digits(int min, int max, StateId next);
  StateId whole(uint64_t min, uint64_t max, StateId next);
  StateId magnitude(uint64_t min, bool min_is_open, std::optional<uint64_t> max, bool max_is_open,
                    StateId next);
  StateId fraction(StateId next);  // or none
  StateId exponent(StateId next);  // or none
  template <typename Make>
  StateId shared(std::optional<GrammarBuilder::RuleId>& rule, Make make, StateId next);

  GrammarBuilder& builder_;
  std::optional<GrammarBuilder::RuleId> value_, object_, array_, end_of_string_, character_,
      number_, integer_, gap_;
};

}  // namespace nibble
