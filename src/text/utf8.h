// UTF-8: validation, decoding of text already known to be valid, and lossy decoding of token bytes
// (U+FFFD per maximal subpart, as Rust's from_utf8_lossy, Python's errors="replace" and WHATWG do).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nibble::utf8 {

inline constexpr std::string_view kReplacement = "\xef\xbf\xbd";

/// Offset of the first ill-formed sequence, or text.size() if there is none.
size_t valid_prefix(std::string_view text);
inline bool is_valid(std::string_view text) { return valid_prefix(text) == text.size(); }

/// Length of the longest tail that is the beginning of a well-formed sequence and not yet a whole
/// one (0 to 3). Appending bytes can still turn exactly this tail into a character.
size_t incomplete_tail(std::string_view bytes);

/// Appends `bytes` to `out`, each maximal ill-formed subpart replaced by U+FFFD.
void append_lossy(std::string& out, std::string_view bytes);

struct CodePoint {
  uint32_t value;
  uint32_t length_bytes;
};

/// The code point at `p`. The text must be valid UTF-8: this reads no further than the sequence.
inline CodePoint decode_valid(const unsigned char* p) {
  const uint32_t a = p[0];
  if (a < 0x80) return {a, 1};
  if (a < 0xe0) return {(a & 0x1f) << 6 | (p[1] & 0x3fu), 2};
  if (a < 0xf0) return {(a & 0x0f) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu), 3};
  return {(a & 0x07) << 18 | (p[1] & 0x3fu) << 12 | (p[2] & 0x3fu) << 6 | (p[3] & 0x3fu), 4};
}

void append_code_point(std::string& out, uint32_t point);

}  // namespace nibble::utf8
