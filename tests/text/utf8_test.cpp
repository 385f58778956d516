// SPDX-License-Identifier: Apache-2.0
#include "text/utf8.h"

#include <gtest/gtest.h>

namespace nibble {
namespace {

std::string lossy(std::string_view bytes) {
  std::string out;
  utf8::append_lossy(out, bytes);
  return out;
}
#define FFFD "\xef\xbf\xbd"

TEST(Utf8, EveryCodePointIsValidAndSurrogatesAreNot) {
  for (uint32_t point = 0; point < 0x110000; ++point) {
    std::string text;
    utf8::append_code_point(text, point);
    const bool surrogate = point >= 0xd800 && point < 0xe000;
    ASSERT_EQ(utf8::is_valid(text), !surrogate) << point;
    if (surrogate) continue;
    const auto back = utf8::decode_valid(reinterpret_cast<const unsigned char*>(text.data()));
    ASSERT_EQ(back.value, point);
    ASSERT_EQ(back.length_bytes, text.size());
    for (size_t n = 1; n < text.size(); ++n) {
      ASSERT_EQ(utf8::incomplete_tail("abc" + text.substr(0, n)), n);
      ASSERT_EQ(lossy(text.substr(0, n) + "x"), FFFD "x");
    }
    ASSERT_EQ(utf8::incomplete_tail(text), 0u);
  }
}

// Unicode 16, section 3.9, tables 3-8 to 3-11.
TEST(Utf8, MaximalSubpartsBecomeOneReplacementEach) {
  EXPECT_EQ(lossy("\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41"),
            FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
  EXPECT_EQ(lossy("\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41"),
            FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
  EXPECT_EQ(lossy("\xf4\x91\x92\x93\xff\x41\x80\xbf\x42"),
            FFFD FFFD FFFD FFFD FFFD "A" FFFD FFFD "B");
  EXPECT_EQ(lossy("\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41"), FFFD FFFD FFFD FFFD "A");
}

TEST(Utf8, ValidPrefixStopsAtTheBadByte) {
  EXPECT_EQ(utf8::valid_prefix(""), 0u);
  EXPECT_EQ(utf8::valid_prefix("0123456789abcdef\x80"), 16u);
  EXPECT_EQ(utf8::valid_prefix("01234567\xe4\xb8"), 8u);
  EXPECT_EQ(utf8::valid_prefix(std::string_view("a\0b", 3)), 3u);
}

TEST(Utf8, TailsThatCannotContinueAreNotHeld) {
  EXPECT_EQ(utf8::incomplete_tail("\xc0"), 0u);
  EXPECT_EQ(utf8::incomplete_tail("\xe0\x80"), 0u);
  EXPECT_EQ(utf8::incomplete_tail("\xed\xa0"), 0u);
  EXPECT_EQ(utf8::incomplete_tail("\x80\x80\x80"), 0u);
  EXPECT_EQ(utf8::incomplete_tail("\xf0\x9f\x98"), 3u);
}

}  // namespace
}  // namespace nibble
