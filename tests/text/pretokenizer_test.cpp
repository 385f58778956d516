// The hand-written scanners against PCRE2 running the very patterns, and on hostile lengths.
// SPDX-License-Identifier: Apache-2.0
#include "text/pretokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "base/error.h"
#include "text/unicode_tables.h"
#include "text/utf8.h"
#include "tokenizer_test_util.h"

namespace nibble::testing {
namespace {

std::vector<size_t> split(const SplitPattern& pattern, std::string_view text) {
  std::vector<size_t> ends;
  pattern.split(text, ends);
  return ends;
}

// PCRE2 10.42 knows Unicode 14 and takes U+180E for white space. A code point is comparable if
// every class the patterns use agrees between PCRE2 and the tables.
std::vector<uint32_t> comparable_points() {
  struct Class {
    SplitPattern pattern;
    uint8_t bits;
  };
  const Class classes[] = {
      {SplitPattern::compile(R"(\p{L})", "test"), unicode::kLetter},
      {SplitPattern::compile(R"(\p{N})", "test"), unicode::kNumber},
      {SplitPattern::compile(R"(\s)", "test"), unicode::kSpace},
      {SplitPattern::compile(R"([\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])", "test"), unicode::kUpperClass},
      {SplitPattern::compile(R"([\p{Ll}\p{Lm}\p{Lo}\p{M}])", "test"), unicode::kLowerClass}};
  std::vector<uint8_t> differs(0x110000);
  for (const Class& c : classes) {
    // All points in one text, with "." pieces between matches: a match is a piece that begins and
    // ends at its own offsets. Two neighbours in the class give two pieces, so gaps merge and
    // matches do not.
    for (uint32_t first = 0; first < 0x110000; first += 0x1000) {
      std::string text;
      std::vector<uint32_t> points;
      std::vector<size_t> starts;
      for (uint32_t p = first; p < first + 0x1000; ++p) {
        if (p >= 0xd800 && p < 0xe000) continue;
        points.push_back(p);
        starts.push_back(text.size());
        utf8::append_code_point(text, p);
        text += '-';  // in none of the classes
      }
      std::vector<uint8_t> is_end(text.size() + 1);
      for (const size_t end : split(c.pattern, text)) is_end[end] = 1;
      for (size_t i = 0; i < points.size(); ++i) {
        const size_t end = (i + 1 < points.size() ? starts[i + 1] : text.size()) - 1;
        const bool in_pcre2 = is_end[end];  // nothing else ends a piece before a '-'
        if (in_pcre2 != ((unicode::class_bits(points[i]) & c.bits) != 0)) differs[points[i]] = 1;
      }
    }
  }
  std::vector<uint32_t> out;
  for (uint32_t p = 0; p < 0x110000; ++p) {
    if (!differs[p] && !(p >= 0xd800 && p < 0xe000)) out.push_back(p);
  }
  return out;
}

TEST(UnicodeTables, DifferFromPcre2OnlyWhereUnicodeGrew) {
  // mistral.md §2.3: PCRE2 10.42 lacks 9,272 letters, 120 numbers, 93 marks, and adds U+180E to \s.
  const size_t num_points = 0x110000 - 0x800;
  const size_t num_different = num_points - comparable_points().size();
  EXPECT_GT(num_different, 0u);
  EXPECT_LE(num_different, 9272u + 120 + 93 + 1);
  EXPECT_FALSE(unicode::class_bits(0x180e) & unicode::kSpace);
  EXPECT_TRUE(unicode::class_bits(0x3000) & unicode::kSpace);
}

TEST(UnicodeTables, CountsAreUnicode16) {
  int letters = 0, numbers = 0, spaces = 0, upper = 0, lower = 0;
  for (uint32_t p = 0; p < 0x110000; ++p) {
    const uint8_t bits = unicode::class_bits(p);
    letters += (bits & unicode::kLetter) != 0;
    numbers += (bits & unicode::kNumber) != 0;
    spaces += (bits & unicode::kSpace) != 0;
    upper += (bits & unicode::kUpperClass) != 0;
    lower += (bits & unicode::kLowerClass) != 0;
  }
  EXPECT_EQ(letters, 141028);
  EXPECT_EQ(numbers, 1911);
  EXPECT_EQ(spaces, 25);
  EXPECT_EQ(upper, 1858 + 31 + 404 + 136477 + 2501);
  EXPECT_EQ(lower, 2258 + 404 + 136477 + 2501);
}

class Scanner : public ::testing::TestWithParam<std::string_view> {};

TEST_P(Scanner, AgreesWithPcre2OnRandomText) {
  const SplitPattern own = SplitPattern::compile(GetParam(), "test");
  const SplitPattern oracle = SplitPattern::compile(GetParam(), "test", /*force_pcre2=*/true);
  ASSERT_NE(own.kind(), SplitKind::kPcre2);
  ASSERT_EQ(oracle.kind(), SplitKind::kPcre2);
  const std::vector<uint32_t> points = comparable_points();
  std::vector<uint32_t> marks, both, spaces, wide;
  for (const uint32_t p : points) {
    const uint8_t bits = unicode::class_bits(p);
    if ((bits & unicode::kUpperClass) && !(bits & unicode::kLetter)) marks.push_back(p);
    if ((bits & unicode::kUpperClass) && (bits & unicode::kLowerClass)) both.push_back(p);
    if (bits & unicode::kSpace) spaces.push_back(p);
    wide.push_back(p);
  }
  const std::u32string ascii = U"aAbBzZsStTrReEvVlLmMdD01 29 '''/.,!-_\n\r\t  ";
  std::mt19937 random(7);
  const auto any = [&](const auto& from) {
    return static_cast<uint32_t>(from[random() % from.size()]);
  };
  int num_pieces = 0;
  for (int round = 0; round < 60000; ++round) {
    std::string text;
    for (size_t n = 1 + random() % 16; n > 0; --n) {
      uint32_t point = 0;
      switch (random() % 12) {
        case 0: point = any(marks); break;
        case 1: point = any(both); break;
        case 2: point = any(spaces); break;
        case 3: point = any(wide); break;
        case 4: point = any(std::u32string(U"ſKéÉǅʰªßİıΣσ²½Ⅷ١\u0301")); break;
        default: point = any(ascii); break;
      }
      for (size_t repeat = random() % 8 == 0 ? 3 : 1; repeat > 0; --repeat) {
        utf8::append_code_point(text, point);
      }
    }
    const auto got = split(own, text);
    num_pieces += static_cast<int>(got.size());
    ASSERT_EQ(got, split(oracle, text)) << ::testing::PrintToString(text);
  }
  EXPECT_GT(num_pieces, 250000);
}

TEST_P(Scanner, HostileLengthsAreLinear) {
  const SplitPattern own = SplitPattern::compile(GetParam(), "test");
  for (const std::string_view unit :
       {"a", "A", " ", "\n", " \n", "!", "\xf0\x9f\x98\x80", "\xcc\x81", "\xc2\xaa",
        "\xc2\xaa"
        "A",
        "7", "/", "\xe3\x80\x80", "'s", "'", "aA"}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    text += "A.";
    const auto begin = std::chrono::steady_clock::now();
    const auto ends = split(own, text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    EXPECT_EQ(ends.back(), text.size());
    EXPECT_LT(seconds.count(), 2) << ::testing::PrintToString(
        std::string(unit));  // quadratic: hours
  }
}

INSTANTIATE_TEST_SUITE_P(Patterns, Scanner, ::testing::Values(kTekkenPattern, kLlama3Pattern),
                         [](const auto& info) { return info.index == 0 ? "Tekken" : "Llama3"; });

TEST(SplitPattern, BadPatternIsNamed) {
  try {
    SplitPattern::compile("a(b", "tokenizer.json: pre_tokenizer.pattern.Regex");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInput);
    EXPECT_NE(std::string(error.what())
                  .find("tokenizer.json: pre_tokenizer.pattern.Regex does not compile"),
              std::string::npos)
        << error.what();
  }
}

TEST(SplitPattern, EndlessBacktrackingIsAnError) {
  const SplitPattern pattern = SplitPattern::compile("(a+)+$", "the pattern");
  std::vector<size_t> ends;
  try {
    pattern.split(std::string(60, 'a') + "b", ends);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kLimit);
  }
}

}  // namespace
}  // namespace nibble::testing
