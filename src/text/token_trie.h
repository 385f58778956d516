// A vocabulary as a tree by byte, in one array in depth-first order: which tokens fit a grammar is
// one walk that skips whole subtrees. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace nibble {

/// Immutable, thread-safe.
class TokenTrie {
 public:
  struct Node {
    uint32_t end = 0;    // where the subtree does, in nodes()
    int32_t token = -1;  // whose bytes end here; tokens of equal bytes have a node each
    uint16_t depth = 0;  // 0: a first byte
    unsigned char byte = 0;
  };

  /// Control tokens and tokens without bytes are left out: no text is made of them.
  explicit TokenTrie(const Tokenizer& tokenizer);

  const std::vector<Node>& nodes() const { return nodes_; }
  int max_depth() const { return max_depth_; }
  /// The bytes of a token that is in here; empty for others.
  std::string_view bytes(int32_t token) const;

 private:
  Tokenizer tokenizer_;
  std::vector<Node> nodes_;
  int max_depth_ = 0;
};

}  // namespace nibble
