// What a choice's tokens must obey (structured output), as the engine sees it: which ids may come
// next, and whether the answer may end here. text/grammar_constraint.h makes one from a grammar.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>

namespace nibble {

/// Where one choice stands. The engine thread calls it; one choice has one.
class TokenMatcher {
 public:
  virtual ~TokenMatcher() = default;
  struct Ending {
    bool can_end = false;   // what has been accepted is whole
    bool must_end = false;  // and nothing can be added to it
  };
  /// Sets the bit of every id that may come next and clears the others, end-of-sequence ids
  /// included: whether they may come is what is returned. allowed: [vocab/64].
  virtual Ending fill_mask(std::span<uint64_t> allowed) = 0;
  /// Takes an id that is no end of sequence; false, with nothing changed, when it does not fit.
  [[nodiscard]] virtual bool accept(int32_t token) = 0;
  /// Whether the answer may end after what has been accepted.
  virtual bool can_end() = 0;
};

/// Immutable as its users see it, thread-safe, shared by choices and requests.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;
  virtual std::unique_ptr<TokenMatcher> start() const = 0;
};

}  // namespace nibble
