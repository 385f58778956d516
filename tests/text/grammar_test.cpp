// Grammars over bytes, regular expressions and choices: what they let through and what not.
// SPDX-License-Identifier: Apache-2.0
#include "text/grammar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>
#include <string>
#include <vector>

#include "text/grammar_test_util.h"
#include "text/utf8.h"

namespace nibble {
namespace {

using testing::error_of;
using ::testing::HasSubstr;
using testing::match;
using testing::Match;
using testing::matches;

TEST(CodePoints, SetsAreSortedDisjointAndWithoutSurrogates) {
  const CodePoints set = normalize({{'x', 'z'}, {'a', 'c'}, {'b', 'd'}, {0xd000, 0xe001}, {5, 3}});
  ASSERT_EQ(set.size(), 4u);
  EXPECT_EQ(set[0].first, uint32_t{'a'});
  EXPECT_EQ(set[0].last, uint32_t{'d'});
  EXPECT_EQ(set[2].last, 0xd7ffu);
  EXPECT_EQ(set[3].first, 0xe000u);
  EXPECT_TRUE(complement(complement({})).empty());
  EXPECT_EQ(complement({})[0].last, 0xd7ffu);
  EXPECT_TRUE(intersect({{'a', 'f'}}, {{'g', 'z'}}).empty());
}

TEST(Grammar, CodePointsAreExactlyTheirUtf8) {
  const std::vector<uint32_t> edges = {0,        1,        0x7e,    0x7f,    0x80,    0x81,
                                       0x7ff,    0x800,    0x801,   0xfff,   0x1000,  0xd7ff,
                                       0xe000,   0xfffd,   0xffff,  0x10000, 0x3ffff, 0x40000,
                                       0x100000, 0x10fffe, 0x10ffff};
  for (size_t i = 0; i < edges.size(); ++i) {
    for (size_t k = i; k < edges.size(); ++k) {
      GrammarBuilder builder;
      GrammarAutomaton automaton(
          builder.finish(builder.code_point({{edges[i], edges[k]}}, GrammarBuilder::kReturn)));
      for (const uint32_t point : edges) {
        std::string text;
        utf8::append_code_point(text, point);
        EXPECT_EQ(match(automaton, text) == Match::kWhole, point >= edges[i] && point <= edges[k])
            << point << " in " << edges[i] << ".." << edges[k];
      }
      for (const char* bad : {"\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80", "\xff"}) {
        EXPECT_EQ(match(automaton, bad), Match::kNo);
      }
    }
  }
}

TEST(Grammar, WhatCannotBeCompletedIsNoPrefix) {
  GrammarBuilder builder;
  const auto endless = builder.new_rule();
  builder.define(endless, builder.literal("x", builder.call(endless, GrammarBuilder::kReturn)));
  GrammarAutomaton automaton(
      builder.finish(builder.any_of({builder.call(endless, GrammarBuilder::kReturn),
                                     builder.literal("xy", GrammarBuilder::kReturn)})));
  EXPECT_EQ(match(automaton, "x"), Match::kPrefix);
  EXPECT_EQ(match(automaton, "xx"), Match::kNo);
  EXPECT_EQ(match(automaton, "xy"), Match::kWhole);
  EXPECT_TRUE(GrammarBuilder().finish(GrammarBuilder::kNone).matches_nothing());
}

TEST(Grammar, RecursionIsCountedAndEndsAtItsDepth) {
  GrammarBuilder builder;
  const auto rule = builder.new_rule();
  builder.define(
      rule, builder.any_of(
                {GrammarBuilder::kReturn,
                 builder.literal(
                     "(", builder.call(rule, builder.literal(")", GrammarBuilder::kReturn)))}));
  GrammarAutomaton automaton(builder.finish(builder.call(rule, GrammarBuilder::kReturn)));
  const auto nested = [](size_t open, size_t close) {
    return std::string(open, '(') + std::string(close, ')');
  };
  EXPECT_EQ(match(automaton, ""), Match::kWhole);
  EXPECT_EQ(match(automaton, nested(3, 3)), Match::kWhole);
  EXPECT_EQ(match(automaton, nested(3, 2)), Match::kPrefix);
  EXPECT_EQ(match(automaton, nested(3, 4)), Match::kNo);
  // The deepest that is let in can be closed again.
  size_t deepest = 0;
  while (match(automaton, nested(deepest + 1, 0)) != Match::kNo) ++deepest;
  EXPECT_GE(deepest, 60u);
  EXPECT_LE(deepest, GrammarAutomaton::kMaxDepth);
  EXPECT_EQ(match(automaton, nested(deepest, deepest)), Match::kWhole);
}

TEST(Grammar, LeftRecursionEnds) {
  GrammarBuilder builder;
  const auto rule = builder.new_rule();
  builder.define(rule,
                 builder.any_of({builder.call(rule, builder.literal("+1", GrammarBuilder::kReturn)),
                                 builder.literal("1", GrammarBuilder::kReturn)}));
  GrammarAutomaton automaton(builder.finish(builder.call(rule, GrammarBuilder::kReturn)));
  EXPECT_EQ(match(automaton, "1+1+1"), Match::kWhole);
  EXPECT_EQ(match(automaton, "1+"), Match::kPrefix);
  EXPECT_EQ(match(automaton, "+1"), Match::kNo);
}

TEST(Grammar, StatesAreFoundAgainAfterClear) {
  GrammarAutomaton automaton = testing::schema_automaton(
      R"({"type":"object","properties":{"a":{"type":"array"},"b":{"type":"string"}}})");
  auto state = GrammarAutomaton::kStart;
  for (const char c : std::string_view(R"({"a":[[{"x":")")) {
    state = automaton.next(state, static_cast<unsigned char>(c));
  }
  const std::u32string content = automaton.content(state);
  automaton.clear();
  EXPECT_EQ(automaton.num_states(), 2u);
  state = automaton.find(content);
  for (const char c : std::string_view(R"(q"}]],"b":""})")) {
    state = automaton.next(state, static_cast<unsigned char>(c));
  }
  EXPECT_TRUE(automaton.can_end(state));
  EXPECT_TRUE(automaton.is_final(state));
}

// Regular expressions
// ---------------------------------------------------------------------------------------------

TEST(RegexGrammar, AgreesWithStdRegex) {
  const std::vector<std::string> regexes = {
      "abc",        "a*",         "a+b?c*", "(a|b)*c",   "(?:ab|a)(c|bcd)",
      "[a-c]{2,3}", "a{2}b{0,2}", "[^a]b",  "(a*)*b",    "(a|ab)(bc|c)?",
      "a{0}b",      "x?y+?z*?",   "a{,2}",  "(a{2}){2}", "\\d+\\.\\d",
      "[\\w.-]+",   "()a",        "a|",     "[a\\]]+",   "\\(a\\)",
      "[-a]+",      "[a-]+",      "a.c"};
  std::vector<std::string> texts = {""};
  const std::string letters = "abcd";
  for (size_t i = 0; i < texts.size() && texts[i].size() < 5; ++i) {
    for (const char c : letters) texts.push_back(texts[i] + c);
  }
  for (const char* more : {"yz", "xyyzz", "1.5", "12.3", ".5", "a.b-c", "a]", "(a)", "-", "a-",
                           "a{,2}", "a\nc", "y"}) {
    texts.emplace_back(more);
  }
  for (const std::string& regex : regexes) {
    GrammarAutomaton automaton(regex_grammar(regex, "regex"));
    const bool is_literal = regex == "a{,2}";  // which std::regex refuses
    const std::regex expected(is_literal ? "a\\{,2\\}" : regex);
    for (const std::string& text : texts) {
      EXPECT_EQ(match(automaton, text) == Match::kWhole, std::regex_match(text, expected))
          << regex << " on " << text;
    }
  }
}

TEST(RegexGrammar, UnicodeEscapesAndAnchors) {
  const auto is_match = [](std::string_view regex, std::string_view text) {
    return matches(regex_grammar(regex, "regex"), text);
  };
  EXPECT_TRUE(is_match("^a$", "a"));
  EXPECT_TRUE(is_match("^a$|^b$", "b"));
  EXPECT_TRUE(is_match(".", "\xc3\xa9"));
  EXPECT_TRUE(is_match(".", "\xf0\x9f\x98\x80"));
  EXPECT_FALSE(is_match(".", "\n"));
  EXPECT_FALSE(is_match(".", "\xc3"));
  EXPECT_TRUE(is_match("[\xc3\xa0-\xc3\xbf]+", "\xc3\xa9\xc3\xa0"));
  EXPECT_TRUE(is_match("\\u00e9\\x41",
                       "\xc3\xa9"
                       "A"));
  EXPECT_TRUE(is_match("\\u{1F600}|\\ud83d\\ude00", "\xf0\x9f\x98\x80"));
  EXPECT_TRUE(is_match("(?<name>a)(?P<other>b)", "ab"));
  EXPECT_TRUE(is_match("\\S\\s\\D\\W", "x a-"));
  EXPECT_TRUE(is_match("[^\\d]", "x"));
  EXPECT_FALSE(is_match("[^\\d]", "7"));
  EXPECT_TRUE(is_match("\\/\\-\\.", "/-."));
}

TEST(RegexGrammar, WhatItIsNotIsNamed) {
  const auto error = [](std::string_view regex) {
    return error_of([&] { GrammarAutomaton(regex_grammar(regex, "guided_regex")); });
  };
  EXPECT_THAT(error("a(?=b)"), HasSubstr("look-ahead"));
  EXPECT_THAT(error("(?<!b)a"), HasSubstr("look-behind"));
  EXPECT_THAT(error("(a)\\1"), HasSubstr("back-reference"));
  EXPECT_THAT(error("\\bword"), HasSubstr("\\b"));
  EXPECT_THAT(error("\\p{L}"), HasSubstr("\\p"));
  EXPECT_THAT(error("(?i)a"), HasSubstr("(?"));
  EXPECT_THAT(error("a^b"), HasSubstr("^ inside"));
  EXPECT_THAT(error("(a$)b"), HasSubstr("$ inside"));
  EXPECT_THAT(error("(a"), HasSubstr("not closed"));
  EXPECT_THAT(error("a)"), HasSubstr("closes nothing"));
  EXPECT_THAT(error("[a"), HasSubstr("not closed"));
  EXPECT_THAT(error("*a"), HasSubstr("repeats nothing"));
  EXPECT_THAT(error("a**"), HasSubstr("repeats a repeat"));
  EXPECT_THAT(error("a{3,2}"), HasSubstr("n below m"));
  EXPECT_THAT(error("[z-a]"), HasSubstr("range"));
  EXPECT_THAT(error("\\u12"), HasSubstr("hexadecimal"));
  EXPECT_THAT(error("\\ud83d"), HasSubstr("surrogate"));
  EXPECT_THAT(error("a\\"), HasSubstr("backslash"));
  EXPECT_THAT(error("\xff"), HasSubstr("UTF-8"));
  EXPECT_THAT(error("a{99999}"), HasSubstr("10000"));
  EXPECT_THAT(error("(((a{1000}){1000}){1000}){1000}"), HasSubstr("more than"));
  EXPECT_THAT(error("((((){1000}){1000}){1000}){1000}"), HasSubstr("repeats too much"));
  EXPECT_THAT(error(std::string(5000, '(')), HasSubstr("deeper than"));
  EXPECT_THAT(error("[]"), HasSubstr("matches no text"));
  EXPECT_THAT(error("a"), HasSubstr("accepted"));
}

TEST(RegexGrammar, AmbiguityIsBounded) {
  // As a table of states this one has a million.
  GrammarAutomaton automaton(regex_grammar("(a|b)*a(a|b){20}", "regex"));
  EXPECT_EQ(match(automaton, "ab" + std::string(20, 'b')), Match::kPrefix);
  EXPECT_EQ(match(automaton, "a" + std::string(20, 'b')), Match::kWhole);
  EXPECT_LT(automaton.num_states(), 100u);
}

TEST(ChoiceGrammar, OneOfThem) {
  const std::vector<std::string> choices = {"yes", "no", "not sure", "n\xc3\xa4h", "", "no"};
  GrammarAutomaton automaton(choice_grammar(choices, "choice"));
  for (const std::string& choice : choices) EXPECT_EQ(match(automaton, choice), Match::kWhole);
  EXPECT_EQ(match(automaton, "not"), Match::kPrefix);
  EXPECT_EQ(match(automaton, "nope"), Match::kNo);
  EXPECT_EQ(match(automaton, "yes!"), Match::kNo);
  const std::vector<std::string> bad = {"\xff"}, none;
  EXPECT_THAT(error_of([&] { choice_grammar(bad, "choice"); }), HasSubstr("UTF-8"));
  EXPECT_THAT(error_of([&] { choice_grammar(none, "choice"); }), HasSubstr("matches no text"));
}

}  // namespace
}  // namespace nibble
