// Progress of long work. The library reports through this interface and never prints; the CLI shows
// a bar with rate and ETA on a terminal and plain lines elsewhere. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

namespace nibble {

class Progress {
 public:
  virtual ~Progress() = default;
  /// A stage begins: "quantizing layers", with `total` units ("layers", "B" for bytes); 0 when
  /// unknown.
  virtual void begin(std::string_view stage, int64_t total, std::string_view unit) = 0;
  virtual void advance(int64_t done) = 0;  // absolute count of units done
  virtual void end() = 0;
  virtual void note(std::string_view message) = 0;  // one line a person should read
};

class SilentProgress final : public Progress {
 public:
  void begin(std::string_view, int64_t, std::string_view) override {}
  void advance(int64_t) override {}
  void end() override {}
  void note(std::string_view) override {}
};

}  // namespace nibble
