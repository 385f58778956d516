// Finds added tokens ("[INST]", "</s>") in raw text, leftmost-longest, as Hugging Face's
// AddedVocabulary does: first those that are not `normalized`, then, between them, those that are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;
  bool normalized = false;
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // and after it
  bool single_word = false;  // only if no word character touches it
};

/// Text whose control strings are all read as control tokens, or all as plain text.
struct TextRegion {
  size_t end = 0;  // byte offset; regions lie back to back
  bool parse_special = false;
};

/// A stretch of text: an added token (id >= 0) or ordinary text (id -1).
struct TextSpan {
  int32_t id;
  size_t begin, end;
};

/// Immutable, thread-safe.
class AddedTokenMatcher {
 public:
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  /// Cuts `text` (valid UTF-8). A `special` token is found only where its bytes lie within one
  /// region that has parse_special; tokens that are not special are found everywhere, as in HF with
  /// encode_special_tokens. `regions` cover the text.
  std::vector<TextSpan> split(std::string_view text, std::span<const TextRegion> regions) const;

 private:
  struct Set {
    std::vector<AddedToken> tokens;  // sorted by content
    bool starts[256] = {};
  };
  static Set make_set(std::vector<AddedToken> tokens);
  static void split_one(const Set& set, std::string_view text, TextSpan within,
                        std::span<const TextRegion> regions, std::vector<TextSpan>& out);
  Set raw_, normalized_;
  bool only_special_ = true;
};

}  // namespace nibble
