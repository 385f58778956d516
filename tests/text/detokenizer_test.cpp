// SPDX-License-Identifier: Apache-2.0
#include "text/detokenizer.h"

#include <gtest/gtest.h>

#include <random>

#include "base/error.h"
#include "text/utf8.h"
#include "tokenizer_test_util.h"

namespace nibble::testing {
namespace {

// The nano vocabulary has a token for each byte; this spells text in single bytes.
std::vector<int32_t> byte_ids(std::string_view bytes) {
  static const std::vector<int32_t> ids = [] {
    std::vector<int32_t> out(256, -1);
    for (int32_t id = 0; id < nano_tokenizer().vocab_size(); ++id) {
      const std::string_view token = nano_tokenizer().token_bytes(id);
      if (token.size() == 1) out[static_cast<unsigned char>(token[0])] = id;
    }
    return out;
  }();
  std::vector<int32_t> out;
  for (const unsigned char byte : bytes) out.push_back(ids[byte]);
  return out;
}

struct Result {
  std::string text;
  std::optional<size_t> stop;
  size_t num_used = 0;  // tokens pushed before the stop
};

Result run(const std::vector<int32_t>& ids, DetokenizerOptions options) {
  Detokenizer detokenizer(nano_tokenizer(), std::move(options));
  Result result;
  for (const int32_t id : ids) {
    if (detokenizer.stopped()) break;
    const std::string part = detokenizer.push(id);
    EXPECT_TRUE(utf8::is_valid(part));
    result.text += part;
    ++result.num_used;
  }
  result.text += detokenizer.flush();
  result.stop = detokenizer.stop_idx();
  return result;
}

TEST(Detokenizer, StreamsWhatBatchDecodeGives) {
  std::mt19937 random(9);
  const Tokenizer& nano = nano_tokenizer();
  for (int round = 0; round < 3000; ++round) {
    std::vector<int32_t> ids;
    for (size_t n = random() % 30; n > 0; --n) {
      // Single bytes from the top half are where characters break.
      ids.push_back(
          random() % 3 ? byte_ids(std::string(1, static_cast<char>(128 + random() % 128)))[0]
                       : static_cast<int32_t>(random() % static_cast<uint32_t>(nano.vocab_size())));
    }
    for (const bool skip : {false, true}) {
      ASSERT_EQ(run(ids, {.skip_special = skip}).text, nano.decode(ids, skip));
      // A stop string that never completes changes nothing either.
      ASSERT_EQ(run(ids, {.stop = {"\xe4\xb8\xad\xe4\xb8\xad\xe4\xb8\xad", "qqqqqqqq"},
                          .skip_special = skip})
                    .text,
                nano.decode(ids, skip));
    }
  }
}

TEST(Detokenizer, ACharacterAppearsWithItsLastByte) {
  Detokenizer detokenizer(nano_tokenizer());
  const auto ids = byte_ids(
      "a\xf0\x9f\x98\x80"
      "b");
  EXPECT_EQ(detokenizer.push(ids[0]), "a");
  EXPECT_EQ(detokenizer.push(ids[1]), "");
  EXPECT_EQ(detokenizer.push(ids[2]), "");
  EXPECT_EQ(detokenizer.push(ids[3]), "");
  EXPECT_EQ(detokenizer.push(ids[4]), "\xf0\x9f\x98\x80");
  EXPECT_EQ(detokenizer.push(ids[5]), "b");
  EXPECT_EQ(detokenizer.flush(), "");
  EXPECT_EQ(detokenizer.push(ids[1]), "");
  EXPECT_EQ(detokenizer.flush(), "\xef\xbf\xbd");
  // A genuine U+FFFD is not held.
  const auto genuine = byte_ids("\xef\xbf\xbd");
  detokenizer.push(genuine[0]);
  detokenizer.push(genuine[1]);
  EXPECT_EQ(detokenizer.push(genuine[2]), "\xef\xbf\xbd");
}

TEST(Detokenizer, SkippedControlTokensDoNotBreakACharacter) {
  auto ids = byte_ids("\xe4\xb8\xad");
  ids.insert(ids.begin() + 1, *nano_tokenizer().token_id("[INST]"));
  EXPECT_EQ(run(ids, {}).text, "\xe4\xb8\xad");
  EXPECT_EQ(run(ids, {.skip_special = false}).text, "\xef\xbf\xbd[INST]\xef\xbf\xbd\xef\xbf\xbd");
}

TEST(Detokenizer, HoldsBackWhatMayBecomeAStopString) {
  Detokenizer detokenizer(nano_tokenizer(), {.stop = {"END"}});
  std::string shown;
  for (const int32_t id : byte_ids("a E ENE")) detokenizer.push(id, shown);
  EXPECT_EQ(shown, "a E EN");
  for (const int32_t id : byte_ids("N")) detokenizer.push(id, shown);
  EXPECT_EQ(shown, "a E EN");
  for (const int32_t id : byte_ids("Dxyz")) detokenizer.push(id, shown);
  detokenizer.flush(shown);
  EXPECT_EQ(shown, "a E EN");
  EXPECT_EQ(detokenizer.stop_idx(), 0u);
}

TEST(Detokenizer, StopRules) {
  const auto text = [](std::string_view bytes, std::vector<std::string> stop,
                       bool include = false) {
    return run(byte_ids(bytes), {.stop = std::move(stop), .include_stop = include}).text;
  };
  EXPECT_EQ(text("hello world", {"o w"}), "hell");
  EXPECT_EQ(text("hello world", {"o w"}, true), "hello w");
  EXPECT_EQ(text("hello", {"hello"}), "");
  EXPECT_EQ(text("hell", {"hello"}), "hell");        // flushed
  EXPECT_EQ(text("aaab", {"aab"}), "a");             // overlapping prefixes
  EXPECT_EQ(text("abcd", {"abcd", "bc"}), "a");      // the first to complete
  EXPECT_EQ(text("xabc", {"c", "abc", "bc"}), "x");  // of those, the one that began first
  EXPECT_EQ(run(byte_ids("xabc"), {.stop = {"c", "abc", "bc"}}).stop, 1u);
  EXPECT_EQ(text("\xe4\xb8\xad\xe6\x96\x87", {"\xe6\x96\x87"}), "\xe4\xb8\xad");
  EXPECT_EQ(text("\xe6\x96\xe6\x96\x87z", {"\xe6\x96\x87"}),
            "\xef\xbf\xbd");  // broken, then the stop
  EXPECT_EQ(run(byte_ids("stop here"), {.stop = {"op"}}).num_used, 4u);
}

// However the bytes fall into tokens, the text is the same: the definition is on the byte stream.
TEST(Detokenizer, TokenBordersDoNotMatter) {
  std::mt19937 random(21);
  const Tokenizer& nano = nano_tokenizer();
  const std::vector<std::string> pool = {"th",       "he ",   "\n\n", "e", " the",
                                         "\xc3\xa9", "a\xc3", "ing",  "zq"};
  int num_stopped = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<int32_t> ids;
    for (size_t n = random() % 20; n > 0; --n) {
      ids.push_back(
          static_cast<int32_t>(18 + random() % static_cast<uint32_t>(nano.vocab_size() - 18)));
    }
    std::string bytes;
    for (const int32_t id : ids) bytes += nano.token_bytes(id);
    std::vector<std::string> stop;
    for (size_t n = random() % 4; n > 0; --n) {
      const std::string& pick = pool[random() % pool.size()];
      if (utf8::is_valid(pick)) stop.push_back(pick);
    }
    // By definition: the shortest prefix of the stream that ends in a stop string; longest of
    // those.
    std::string want_bytes = bytes;
    std::optional<size_t> want_stop;
    for (size_t end = 1; end <= bytes.size() && !want_stop; ++end) {
      for (size_t i = 0; i < stop.size(); ++i) {
        if (end < stop[i].size() ||
            bytes.compare(end - stop[i].size(), stop[i].size(), stop[i]) != 0)
          continue;
        if (!want_stop || stop[i].size() > stop[*want_stop].size()) want_stop = i;
      }
      if (want_stop) want_bytes = bytes.substr(0, end - stop[*want_stop].size());
    }
    std::string want;
    utf8::append_lossy(want, want_bytes);
    const Result by_token = run(ids, {.stop = stop});
    const Result by_byte = run(byte_ids(bytes), {.stop = stop});
    ASSERT_EQ(by_token.text, want);
    ASSERT_EQ(by_byte.text, want);
    ASSERT_EQ(by_token.stop, want_stop);
    ASSERT_EQ(by_byte.stop, want_stop);
    num_stopped += want_stop.has_value();
  }
  EXPECT_GT(num_stopped, 200);
  EXPECT_LT(num_stopped, 1900);
}

TEST(Detokenizer, RefusesStopStringsThatCannotMatch) {
  EXPECT_THROW(Detokenizer(nano_tokenizer(), {.stop = {""}}), Error);
  EXPECT_THROW(Detokenizer(nano_tokenizer(), {.stop = {"ok", "\xff"}}), Error);
}

}  // namespace
}  // namespace nibble::testing
