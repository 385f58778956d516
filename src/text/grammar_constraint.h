// A grammar over a vocabulary: which tokens may come next. Their masks are kept by where the
// grammar stands, so that the inside of a string costs one walk of the vocabulary, whoever writes
// the string (any choice of any request with the same constraint). SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "nibble/constraint.h"
#include "text/grammar.h"
#include "text/token_trie.h"

namespace nibble {

struct GrammarConstraintStats {
  uint64_t num_masks_made = 0, num_masks_found = 0;
  size_t num_states = 0;
};

/// Thread-safe: what its matchers share is behind a mutex.
class GrammarConstraint final : public TokenConstraint {
 public:
  /// Throws Error{kLimit} for a grammar that is too ambiguous from the start.
  GrammarConstraint(Grammar grammar, std::shared_ptr<const TokenTrie> vocabulary);
  ~GrammarConstraint() override;

  std::unique_ptr<TokenMatcher> start() const override;
  GrammarConstraintStats stats() const;

 private:
  class Shared;
  class Matcher;
  std::shared_ptr<Shared> shared_;
};

}  // namespace nibble
