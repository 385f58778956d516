// SPDX-License-Identifier: Apache-2.0
#include "text/token_trie.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace nibble {

TokenTrie::TokenTrie(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
  std::vector<std::pair<std::string_view, int32_t>> tokens;
  for (int32_t id = 0; id < tokenizer_.vocab_size(); ++id) {
    if (const std::string_view text = bytes(id); !text.empty()) tokens.emplace_back(text, id);
  }
  std::sort(tokens.begin(), tokens.end());

  std::vector<uint32_t> path;  // the nodes of the token before, by depth
  std::string_view before;
  const auto close = [&](size_t depth) {
    for (; path.size() > depth; path.pop_back()) {
      nodes_[path.back()].end = static_cast<uint32_t>(nodes_.size());
    }
  };
  for (const auto& [text, id] : tokens) {
    const auto shared = static_cast<size_t>(
        std::mismatch(before.begin(), before.end(), text.begin(), text.end()).second -
        text.begin());
    const size_t begin = std::min(shared, text.size() - 1);  // its last node is its own
    close(begin);
    for (size_t depth = begin; depth < text.size(); ++depth) {
      path.push_back(static_cast<uint32_t>(nodes_.size()));
      nodes_.push_back(
          {.depth = static_cast<uint16_t>(depth), .byte = static_cast<unsigned char>(text[depth])});
    }
    nodes_.back().token = id;
    max_depth_ = std::max(max_depth_, static_cast<int>(text.size()));
    before = text;
  }
  close(0);
}

std::string_view TokenTrie::bytes(int32_t token) const {
  if (!tokenizer_.has_token(token) || tokenizer_.is_special(token)) return {};
  const std::string_view text = tokenizer_.token_bytes(token);
  return text.size() <= std::numeric_limits<uint16_t>::max() ? text : std::string_view();
}

}  // namespace nibble
