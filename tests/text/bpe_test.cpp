// SPDX-License-Identifier: Apache-2.0
#include "text/bpe.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "text/tokenizer_file.h"
#include "tokenizer_test_util.h"

namespace nibble::testing {
namespace {

BytePairEncoder encoder_of(const TokenizerFile& file) {
  std::vector<BytePairEncoder::Token> tokens;
  for (const int32_t id : file.vocab_ids)
    tokens.push_back({id, file.token_bytes[static_cast<size_t>(id)]});
  return BytePairEncoder(tokens, file.merges, file.token_bytes.size(), file.ignore_merges);
}

// The definition: merge the pair of lowest rank, leftmost first, until none is left.
std::vector<int32_t> by_definition(const TokenizerFile& file, std::string_view piece) {
  std::vector<int32_t> ids;
  for (const char byte : piece) {
    for (const int32_t id : file.vocab_ids) {
      if (file.token_bytes[static_cast<size_t>(id)] == std::string_view(&byte, 1))
        ids.push_back(id);
    }
  }
  for (;;) {
    size_t best = file.merges.size(), at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t rank = 0; rank < best; ++rank) {
        if (file.merges[rank].left == ids[i] && file.merges[rank].right == ids[i + 1]) {
          best = rank;
          at = i;
        }
      }
    }
    if (best == file.merges.size()) return ids;
    ids[at] = file.merges[best].result;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(BytePairEncoder, BothAlgorithmsFollowTheDefinition) {
  const TokenizerFile file =
      parse_tokenizer_file(read_file(nano_dir() / "tokenizer.json"), "tokenizer.json");
  const BytePairEncoder encoder = encoder_of(file);
  BytePairEncoder::Scratch scratch;
  std::mt19937 random(11);
  const std::string letters = "etaoinshrdlu  aaaa\xc3\xa9";
  for (int round = 0; round < 3000; ++round) {
    std::string piece;
    for (size_t n = 1 + random() % (round % 10 == 0 ? 120 : 14); n > 0; --n)
      piece += letters[random() % letters.size()];
    std::vector<int32_t> whole, by_scan, by_heap;
    encoder.encode(piece, whole, scratch);
    encoder.merge_short(piece, by_scan, scratch);
    encoder.merge_long(piece, by_heap, scratch);
    ASSERT_EQ(by_scan, by_heap) << piece;
    ASSERT_EQ(whole, by_heap) << piece;
    if (round < 300) {
      ASSERT_EQ(by_heap, by_definition(file, piece)) << piece;
    }
  }
}

TEST(BytePairEncoder, MillionLettersWithoutASpace) {
  const TokenizerFile file =
      parse_tokenizer_file(read_file(nano_dir() / "tokenizer.json"), "tokenizer.json");
  const BytePairEncoder encoder = encoder_of(file);
  BytePairEncoder::Scratch scratch;
  std::mt19937 random(3);
  for (const bool one_letter : {false, true}) {
    std::string piece(1'000'000, 'a');
    if (!one_letter) {
      for (char& c : piece) c = static_cast<char>('a' + random() % 26);
    }
    std::vector<int32_t> ids;
    const auto begin = std::chrono::steady_clock::now();
    encoder.encode(piece, ids, scratch);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    RecordProperty(one_letter ? "one_letter_ms" : "random_letters_ms",
                   static_cast<int>(seconds.count() * 1000));
    EXPECT_LT(seconds.count(), 3);  // quadratic would be minutes; slack for sanitizers
    std::string joined;
    for (const int32_t id : ids) joined += file.token_bytes[static_cast<size_t>(id)];
    EXPECT_TRUE(joined == piece);
  }
}

}  // namespace
}  // namespace nibble::testing
