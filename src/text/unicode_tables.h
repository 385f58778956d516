// Unicode 16 character classes, as the regex engines behind Hugging Face tokenizers and tiktoken
// know them. Own tables because every packaged regex library is on another Unicode (PCRE2 10.42:
// 14). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble::unicode {

enum ClassBits : uint8_t {
  kLetter = 1,       // \p{L}
  kNumber = 2,       // \p{N}
  kSpace = 4,        // \s (White_Space, 25 code points)
  kUpperClass = 8,   // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
  kLowerClass = 16,  // [\p{Ll}\p{Lm}\p{Lo}\p{M}]
  kNewline = 32,     // [\r\n]
  kWord = 64,        // \w of the Rust regex crate
};

namespace internal {
inline constexpr int kBlockShift = 7;
extern const uint8_t kBlockIndex[0x110000 >> kBlockShift];
extern const uint8_t kBlocks[];
}  // namespace internal

/// Class bits of an ASCII character: the first block is block 0, because blocks are numbered as
/// they come.
inline uint8_t ascii_class_bits(unsigned char c) { return internal::kBlocks[c]; }

/// Class bits of a code point below 0x110000.
inline uint8_t class_bits(uint32_t point) {
  using namespace internal;
  constexpr uint32_t kMask = (1u << kBlockShift) - 1;
  return kBlocks[(static_cast<uint32_t>(kBlockIndex[point >> kBlockShift]) << kBlockShift) +
                 (point & kMask)];
}

}  // namespace nibble::unicode
