// Token ids to text while they are generated: never splits a character, never shows any part of a
// stop string. Works on the byte stream, so how text falls into tokens does not matter.
//
// A stop string ends the text at the first byte that completes one; if several complete at the same
// byte, the one that began first (the longest) wins. Bytes that may still become one are held back.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace nibble {

struct DetokenizerOptions {
  std::vector<std::string> stop;  // UTF-8; empty strings are refused
  bool include_stop = false;      // the emitted text ends with the stop string
  bool skip_special = true;       // control tokens give no text (and no bytes to match)
};

/// State of one sequence. Not thread-safe. What push() and flush() append, joined, is what
/// Tokenizer::decode gives for the same ids, up to the stop string.
class Detokenizer {
 public:
  /// Throws Error{kInput} on a stop string that is empty or not UTF-8.
  Detokenizer(Tokenizer tokenizer, DetokenizerOptions options = {});

  /// Appends to `out` what is now safe to show: whole characters only. Nothing after a stop.
  void push(int32_t id, std::string& out);
  std::string push(int32_t id) {
    std::string out;
    push(id, out);
    return out;
  }

  /// End of generation: appends everything held back; an unfinished character becomes U+FFFD.
  void flush(std::string& out);
  std::string flush() {
    std::string out;
    flush(out);
    return out;
  }

  bool stopped() const { return stop_idx_.has_value(); }
  /// Index into options.stop of the string that ended the text.
  std::optional<size_t> stop_idx() const { return stop_idx_; }

 private:
  struct Stop {
    std::string text;
    std::vector<uint32_t> failure;  // Knuth-Morris-Pratt: longest border of each prefix
    uint32_t matched = 0;           // longest prefix of `text` that ends the stream
  };
  bool feed(unsigned char byte);  // true: a stop string is complete
  void emit(size_t num_bytes, std::string& out);

  Tokenizer tokenizer_;
  DetokenizerOptions options_;
  std::vector<Stop> stops_;
  std::string pending_;  // bytes not yet shown
  std::optional<size_t> stop_idx_;
};

}  // namespace nibble
