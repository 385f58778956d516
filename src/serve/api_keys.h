// API keys: read from a file, compared in constant time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"

namespace nibble {

class ApiKeys {
 public:
  ApiKeys() = default;
  /// One key a line; blank lines and lines that begin with # are skipped. Throws Error{kIo} and
  /// Error{kInput} (no key in it, a key with spaces or control characters).
  static ApiKeys load(const fs::path& file);
  explicit ApiKeys(const std::vector<std::string>& keys);

  bool empty() const { return digests_.empty(); }
  /// The time taken depends on the number of keys and the candidate's length only.
  bool accepts(std::string_view candidate) const;

 private:
  using Digest = std::array<uint8_t, 32>;
  static Digest digest_of(std::string_view text);
  std::vector<Digest> digests_;
};

}  // namespace nibble
