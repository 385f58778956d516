// SPDX-License-Identifier: Apache-2.0
#include "text/json_grammar.h"

#include <algorithm>
#include <map>
#include <vector>

#include "base/error.h"
#include "text/regex_grammar.h"
#include "text/utf8.h"

namespace nibble {
namespace {

using StateId = GrammarBuilder::StateId;
constexpr StateId kReturn = GrammarBuilder::kReturn;
constexpr uint64_t kMaxWhole = NumberRange::kMaxBound;

// Characters that a string may hold as they are.
const CodePoints kRaw = {{0x20, 0x21}, {0x23, 0x5b}, {0x5d, 0x10ffff}};

uint64_t distance(int64_t value) {  // from 0
  return static_cast<uint64_t>(value < 0 ? -value : value);
}

}  // namespace

template <typename Make>
StateId JsonGrammar::shared(std::optional<GrammarBuilder::RuleId>& rule, Make make, StateId next) {
  if (!rule) {
    rule = builder_.new_rule();  // first, for it may call itself
    builder_.define(*rule, make());
  }
  return builder_.call(*rule, next);
}

StateId JsonGrammar::gap(StateId next) {
  const auto blank = [&](StateId after) { return builder_.bytes(bytes_of(" \t"), after); };
  return shared(
      gap_,
      [&] {
        const StateId indent = builder_.repeat(blank, 0, kMaxIndent, kReturn);
        return builder_.any_of(
            {kReturn, builder_.literal(" ", kReturn), builder_.literal("\n", indent)});
      },
      next);
}

StateId JsonGrammar::colon(StateId next) {
  return builder_.literal(":", builder_.any_of({next, builder_.literal(" ", next)}));
}

StateId JsonGrammar::value(StateId next) {
  return shared(
      value_,
      [&] {
        return builder_.any_of({object(kReturn), array(kReturn), string(kReturn),
                                number({}, kReturn), builder_.literal("true", kReturn),
                                builder_.literal("false", kReturn),
                                builder_.literal("null", kReturn)});
      },
      next);
}

StateId JsonGrammar::object(StateId next) {
  return shared(
      object_,
      [&] {
        const StateId close = builder_.literal("}", kReturn);
        const auto member = [&](StateId after) { return string(colon(value(after))); };
        const StateId more =
            builder_.repeat([&](StateId loop) { return builder_.literal(",", gap(member(loop))); },
                            0, -1, gap(close));
        return builder_.literal("{", gap(builder_.any_of({close, member(more)})));
      },
      next);
}

StateId JsonGrammar::array(StateId next) {
  return shared(
      array_,
      [&] {
        const StateId close = builder_.literal("]", kReturn);
        const StateId more =
            builder_.repeat([&](StateId loop) { return builder_.literal(",", gap(value(loop))); },
                            0, -1, gap(close));
        return builder_.literal("[", gap(builder_.any_of({close, value(more)})));
      },
      next);
}

// Strings
// ---------------------------------------------------------------------------------------------

StateId JsonGrammar::escape(StateId next) {
  const auto hex = [&](const ByteSet& set, StateId after) { return builder_.bytes(set, after); };
  const ByteSet any = bytes_of("0123456789abcdefABCDEF");
  const StateId last2 = hex(any, hex(any, next));
  const StateId low = builder_.literal(
      "\\u", hex(bytes_of("dD"), hex(bytes_of("cdefCDEF"), last2)));  // of a surrogate pair
  const StateId unit = builder_.any_of(
      {hex(bytes_of("0123456789abcefABCEF"), hex(any, last2)),
       hex(bytes_of("dD"), builder_.any_of({hex(byte_range('0', '7'), last2),
                                            hex(bytes_of("89abAB"), hex(any, hex(any, low)))}))});
  return builder_.literal("\\", builder_.any_of({builder_.bytes(bytes_of("\"\\/bfnrt"), next),
                                                 builder_.literal("u", unit)}));
}

StateId JsonGrammar::end_of_string(StateId next) {
  return shared(
      end_of_string_,
      [&] {
        return builder_.repeat(
            [&](StateId loop) {
              return builder_.any_of({builder_.code_point(kRaw, loop), escape(loop)});
            },
            0, -1, builder_.literal("\"", kReturn));
      },
      next);
}

StateId JsonGrammar::character(StateId next) {
  return shared(
      character_,
      [&] { return builder_.any_of({builder_.code_point(kRaw, kReturn), escape(kReturn)}); }, next);
}

StateId JsonGrammar::string(StateId next) { return builder_.literal("\"", end_of_string(next)); }

StateId JsonGrammar::string_of_length(int min, int max, StateId next) {
  const auto one = [&](StateId after) { return character(after); };
  const StateId end = max < 0 ? end_of_string(next)
                              : builder_.repeat(one, 0, max - min, builder_.literal("\"", next));
  return builder_.literal("\"", builder_.repeat(one, min, min, end));
}

StateId JsonGrammar::plain_character(const CodePoints& points, StateId next) {
  constexpr std::string_view kShort = "\"\"\\\\\bb\ff\nn\rr\tt";  // character, its letter; ...
  ByteSet letters, digits_after_0, digits_after_1;                // of \n, \u000b, \u001f
  for (const auto& [first, last] : intersect(points, complement(kRaw))) {
    for (uint32_t point = first; point <= last; ++point) {
      size_t at = 0;
      while (at < kShort.size() && static_cast<unsigned char>(kShort[at]) != point) at += 2;
      if (at < kShort.size()) {
        letters.set(static_cast<unsigned char>(kShort[at + 1]));
      } else {
        const char digit = "0123456789abcdef"[point % 16];
        (point < 16 ? digits_after_0 : digits_after_1).set(static_cast<unsigned char>(digit));
      }
    }
  }
  const StateId unit =
      builder_.any_of({builder_.literal("0", builder_.bytes(digits_after_0, next)),
                       builder_.literal("1", builder_.bytes(digits_after_1, next))});
  return builder_.any_of(
      {builder_.code_point(intersect(points, kRaw), next),
       builder_.literal(
           "\\", builder_.any_of({builder_.bytes(letters, next), builder_.literal("u00", unit)}))});
}

StateId JsonGrammar::string_matching(std::string_view regex, std::string_view what, StateId next) {
  const RegexOptions options{.emit = [&](const CodePoints& points,
                                         StateId after) { return plain_character(points, after); },
                             .search = true};
  const StateId quote = builder_.literal("\"", next);
  return builder_.literal("\"", add_regex(builder_, regex, what, options, quote));
}

StateId JsonGrammar::string_except(std::span<const std::string> texts, StateId next) {
  // A tree of the texts by character; whoever leaves it may go on as they like. Its strings have
  // one spelling only, or "\u0061" would smuggle in an "a", and no control characters.
  const CodePoints usable = {{0x20, 0x10ffff}};
  const StateId quote = builder_.literal("\"", next);
  const StateId rest =
      builder_.repeat([&](StateId loop) { return plain_character(usable, loop); }, 0, -1, quote);
  const CodePoints not_ascii = {{0x80, 0x10ffff}};
  const StateId leaves_not_ascii = plain_character(not_ascii, rest);
  const auto node = [&](auto& self, const std::vector<std::string_view>& tails) -> StateId {
    std::map<uint32_t, std::vector<std::string_view>> children;
    bool is_text = false;
    for (const std::string_view tail : tails) {
      if (tail.empty()) {
        is_text = true;
        continue;
      }
      const auto point = utf8::decode_valid(reinterpret_cast<const unsigned char*>(tail.data()));
      if (point.value >= 0x20) children[point.value].push_back(tail.substr(point.length_bytes));
    }
    std::vector<StateId> states;
    CodePoints taken;
    for (const auto& [point, rests] : children) {
      states.push_back(plain_character({{point, point}}, self(self, rests)));
      taken.push_back({point, point});
    }
    const CodePoints leaves = intersect(usable, complement(taken));
    if (taken.empty() || taken.back().last < 0x80) {
      states.push_back(leaves_not_ascii);
      states.push_back(plain_character(intersect(leaves, {{0, 0x7f}}), rest));
    } else {
      states.push_back(plain_character(leaves, rest));
    }
    if (!is_text) states.push_back(quote);
    return builder_.any_of(states);
  };
  const std::vector<std::string_view> tails(texts.begin(), texts.end());
  return builder_.literal("\"", node(node, tails));
}

StateId JsonGrammar::string_constant(std::string_view text, StateId next) {
  std::string literal;
  append_json_string(literal, text);
  return builder_.literal(literal, next);
}

// Numbers
// ---------------------------------------------------------------------------------------------

StateId JsonGrammar::digits(int min, int max, StateId next) {
  return builder_.repeat([&](StateId after) { return builder_.bytes(byte_range('0', '9'), after); },
                         min, max, next);
}

/// A whole number from min to max, without leading zeros.
StateId JsonGrammar::whole(uint64_t min, uint64_t max, StateId next) {
  max = std::min(max, kMaxWhole);
  std::vector<StateId> states;
  uint64_t smallest = 0, largest = 9;  // of the length
  for (int length = 1; length <= kMaxDigits; ++length) {
    const uint64_t first = std::max(min, smallest), last = std::min(max, largest);
    if (first <= last) {
      states.push_back(
          builder_.between(std::to_string(first), std::to_string(last), '0', '9', next));
    }
    smallest = largest + 1;
    largest = largest * 10 + 9;
  }
  return builder_.any_of(states);
}

StateId JsonGrammar::fraction(StateId next) {
  return builder_.any_of({next, builder_.literal(".", digits(1, kMaxFraction, next))});
}

StateId JsonGrammar::exponent(StateId next) {
  const StateId value = digits(1, kMaxExponent, next);
  return builder_.any_of(
      {next, builder_.bytes(bytes_of("eE"),
                            builder_.any_of({value, builder_.bytes(bytes_of("+-"), value)}))});
}

StateId JsonGrammar::integer(const NumberRange& range, StateId next) {
  const auto make = [&](StateId after) {
    // Open bounds become closed ones.
    const int64_t most = static_cast<int64_t>(kMaxWhole);
    const int64_t min = range.min ? *range.min + range.min_is_open : -most;
    const int64_t max = range.max ? *range.max - range.max_is_open : most;
    if (min > max) return GrammarBuilder::kNone;
    StateId negative = GrammarBuilder::kNone, positive = GrammarBuilder::kNone;
    if (min < 0) {
      const uint64_t nearest = max < 0 ? distance(max) : 1;
      negative = builder_.literal("-", whole(nearest, distance(min), after));
    }
    if (max >= 0) {
      positive = whole(static_cast<uint64_t>(std::max<int64_t>(min, 0)), distance(max), after);
    }
    return builder_.any_of({negative, positive});
  };
  if (range.min || range.max) return make(next);
  return shared(integer_, [&] { return make(kReturn); }, next);
}

/// A number from min to max, both 0 or more; without a maximum and from 0 on also with an exponent.
StateId JsonGrammar::magnitude(uint64_t min, bool min_is_open, std::optional<uint64_t> max,
                               bool max_is_open, StateId next) {
  if (!max) {
    if (min == 0 && !min_is_open) return whole(0, kMaxWhole, fraction(exponent(next)));
    max = kMaxWhole;
  }
  std::vector<StateId> states;
  const uint64_t first = min + min_is_open;
  if (first < *max) states.push_back(whole(first, *max - 1, fraction(next)));
  if (min_is_open && min < *max) {  // a little more than min
    states.push_back(
        whole(min, min,
              builder_.literal(
                  ".", digits(0, kMaxFraction - 1, builder_.bytes(byte_range('1', '9'), next)))));
  }
  if (!max_is_open && (min < *max || (min == *max && !min_is_open))) {
    const auto zero = [&](StateId after) { return builder_.literal("0", after); };
    states.push_back(
        whole(*max, *max,
              builder_.any_of(
                  {next, builder_.literal(".", builder_.repeat(zero, 1, kMaxFraction, next))})));
  }
  return builder_.any_of(states);
}

StateId JsonGrammar::number(const NumberRange& range, StateId next) {
  const auto make = [&](StateId after) {
    StateId negative = GrammarBuilder::kNone, positive = GrammarBuilder::kNone;
    if (!range.min || *range.min < 0) {
      const bool bounded = range.max && *range.max < 0;
      const std::optional<uint64_t> farthest =
          range.min ? std::optional(distance(*range.min)) : std::nullopt;
      // -0 is 0 only where 0 is allowed.
      const bool is_open =
          bounded ? range.max_is_open : range.max && *range.max == 0 && range.max_is_open;
      negative = builder_.literal("-", magnitude(bounded ? distance(*range.max) : 0, is_open,
                                                 farthest, range.min_is_open, after));
    }
    if (!range.max || *range.max > 0 || (*range.max == 0 && !range.max_is_open)) {
      const bool bounded = range.min && *range.min >= 0;
      positive = magnitude(bounded ? distance(*range.min) : 0, bounded && range.min_is_open,
                           range.max ? std::optional(distance(*range.max)) : std::nullopt,
                           range.max_is_open, after);
    }
    return builder_.any_of({negative, positive});
  };
  if (range.min || range.max) return make(next);
  return shared(number_, [&] { return make(kReturn); }, next);
}

// Constants
// ---------------------------------------------------------------------------------------------

StateId JsonGrammar::constant(const json::value& value, StateId next) {
  if (value.is_string()) return string_constant(value.get_string(), next);
  if (value.is_array()) {
    const json::array& items = value.get_array();
    StateId state = builder_.literal("]", next);
    if (items.empty()) return builder_.literal("[", state);
    state = gap(state);
    for (size_t i = items.size(); i-- > 0;) {
      state = constant(items[i], state);
      if (i > 0) state = builder_.literal(",", gap(state));
    }
    return builder_.literal("[", gap(state));
  }
  if (value.is_object()) {
    const json::object& object = value.get_object();
    StateId state = builder_.literal("}", next);
    if (object.empty()) return builder_.literal("{", state);
    state = gap(state);
    for (size_t i = object.size(); i-- > 0;) {
      const auto member = object.begin() + static_cast<std::ptrdiff_t>(i);
      state = string_constant(member->key(), colon(constant(member->value(), state)));
      if (i > 0) state = builder_.literal(",", gap(state));
    }
    return builder_.literal("{", gap(state));
  }
  return builder_.literal(dump_json(value), next);
}

}  // namespace nibble
