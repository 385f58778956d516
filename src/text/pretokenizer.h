// Cuts text into the pieces BPE works on. Mistral's Tekken pattern and Llama-3's run as
// hand-written scanners over Unicode 16 tables; any other pattern runs on PCRE2, whose Unicode is
// older (14). Knows nothing of vocabularies or special tokens. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

extern const std::string_view kTekkenPattern;
extern const std::string_view kLlama3Pattern;
extern const std::string_view kGpt2Pattern;  // what ByteLevel{use_regex: true} means

enum class SplitKind { kTekken, kLlama3, kPcre2 };

/// End of the piece that starts at `p` (p < end). Text must be valid UTF-8. Linear in the piece, or
/// in the run of one class around it.
const char* next_tekken_piece(const char* p, const char* end);
const char* next_llama3_piece(const char* p, const char* end);

/// One split pattern, "Isolated": matches and the gaps between them are pieces. Immutable,
/// thread-safe.
class SplitPattern {
 public:
  /// Recognises the two own patterns by exact string; `force_pcre2` (tests) skips that. Throws
  /// Error{kInput} if PCRE2 cannot compile the pattern; `what` names it.
  static SplitPattern compile(std::string_view pattern, std::string_view what,
                              bool force_pcre2 = false);

  SplitKind kind() const { return kind_; }

  /// Appends the end offsets of the pieces of `text` (valid UTF-8), ascending, last = text.size().
  /// Throws Error{kLimit} if a PCRE2 pattern backtracks without end.
  void split(std::string_view text, std::vector<size_t>& ends) const;

 private:
  struct Compiled;
  SplitKind kind_ = SplitKind::kTekken;
  std::shared_ptr<const Compiled> compiled_;  // kPcre2 only
};

}  // namespace nibble
