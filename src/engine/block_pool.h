// The paged KV cache's book-keeping: which block is held by whom, what a block contains, which one
// is reused next. Knows token ids and block numbers, no device memory, no sequences, no clock.
//
// A block that has content is a node of a tree: its parent is the block before it (for the first
// block of a prefix, the root of its salt). The tree is the prefix index. Full blocks are found by
// the chained hash of (parent, tokens), every hit confirmed by comparing the parent and the tokens;
// blocks that agree with only the next few tokens (partly written ones too) are found among the
// parent's children, to be copied from. A block enters the tree when its content has been computed
// (publish), never before.
//
// A sequence that holds a block holds all its ancestors, and gives them back leaf first; so the
// least recently used unheld block never has children, and eviction is O(1) and keeps every prefix
// whole.
//
// Not thread-safe: the engine thread owns it. No function but intern_salt allocates memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

class BlockPool {
 public:
  /// Chained: the key of a full block is hash(key of its parent, its tokens).
  using HashFn = uint64_t (*)(uint64_t parent_key, std::span<const int32_t> tokens);
  static uint64_t default_hash(uint64_t parent_key, std::span<const int32_t> tokens);

  BlockPool(int num_blocks, int block_tokens, HashFn hash = default_hash);

  int num_blocks() const { return static_cast<int>(nodes_.size()); }
  int block_tokens() const { return block_tokens_; }
  int num_available() const { return num_available_; }  // unheld: blank or cached
  int num_cached() const { return num_cached_; }        // unheld with content
  int num_used() const { return num_blocks() - num_available_; }
  int ref_count(int block) const { return nodes_[block].ref_count; }

  // Salts
  // ---------------------------------------------------------------------------------------------
  /// The root of a salt's tree: a negative number that serves as a parent. Held until
  /// release_salt().
  int32_t intern_salt(std::string_view salt);
  void release_salt(int32_t root);
  size_t num_salts() const { return salt_ids_.size(); }

  // Finding
  // -------------------------------------------------------------------------------------------
  /// Takes a reference on every cached full block that continues `parent` with the leading tokens
  /// of `tokens` and appends it to `blocks`. Returns their number.
  int acquire_prefix(int32_t parent, std::span<const int32_t> tokens, std::vector<int32_t>& blocks);

  struct Partial {
    int32_t block = -1;
    int num_tokens = 0;  // leading tokens of the block that match
  };
  /// The child of `parent` that agrees with the most leading tokens of `tokens`, among the
  /// kMaxProbes children used last. The caller holds the parent. Takes no reference: the next
  /// allocate() may hand the very block out (then its content is already where it is wanted).
  Partial find_partial(int32_t parent, std::span<const int32_t> tokens);
  static constexpr int kMaxProbes = 64;

  /// Makes an unheld, partly written block whose whole content matched the caller's, to write on.
  /// False when it is held by a sequence, or has more content than `num_tokens`: then it must be
  /// copied.
  [[nodiscard]] bool adopt(int32_t block, int num_tokens);

  // Holding
  // -------------------------------------------------------------------------------------------
  /// A blank block with one reference; forgets the least recently used content if it must. Empty
  /// when every block is held.
  [[nodiscard]] std::optional<int32_t> allocate();
  /// Drops one reference. Give a sequence's blocks back last first.
  void release(int32_t block);

  /// The content of `block`, held by the caller alone, is now `tokens` (what it was before,
  /// continued) after `parent`. When another block already has the same full content, the caller's
  /// reference moves to that one: use the block returned from now on.
  [[nodiscard]] int32_t publish(int32_t block, int32_t parent, std::span<const int32_t> tokens);

  /// Throws Error{kInternal} unless every invariant holds. For tests: walks everything.
  void check_invariants() const;

 private:
  struct Node {
    int32_t ref_count = 0;
    int32_t num_tokens = 0;  // content; > 0 exactly when the block is in the tree
    int32_t parent = 0;
    int32_t first_child = -1, next_sibling = -1, prev_sibling = -1;
    int32_t hash_next = -1;  // chain of the bucket; full blocks only
    int32_t lru_prev = -1, lru_next = -1;
    uint64_t key = 0;  // full blocks only
  };
  struct Salt {
    std::string name;
    int32_t first_child = -1;
    int32_t num_refs = 0;  // holders and children
    uint64_t key = 0;
  };

  std::span<int32_t> content(int32_t block) {
    return {tokens_.data() + size_t(block) * block_tokens_, size_t(nodes_[block].num_tokens)};
  }
  std::span<const int32_t> content(int32_t block) const {
    return {tokens_.data() + size_t(block) * block_tokens_, size_t(nodes_[block].num_tokens)};
  }
  uint64_t key_of(int32_t parent) const;
  int32_t& first_child(int32_t parent);
  void link_child(int32_t block, int32_t parent);
  void unlink_child(int32_t block);
  void unlink_hash(int32_t block);
  int32_t find_full(uint64_t key, int32_t parent, std::span<const int32_t> tokens) const;
  void forget(int32_t block);  // takes the block out of the tree
  void lru_push_back(int32_t block);
  void lru_push_front(int32_t block);
  void lru_unlink(int32_t block);
  void take(int32_t block);  // one more reference
  void drop_salt_ref(int32_t root);

  int block_tokens_;
  HashFn hash_;
  std::vector<Node> nodes_;
  std::vector<int32_t> tokens_;   // [blocks, block_tokens]
  std::vector<int32_t> buckets_;  // power of two
  std::vector<Salt> salts_;
  std::map<std::string, int32_t, std::less<>> salt_ids_;
  std::vector<int32_t> free_salts_;
  int32_t lru_first_ = -1, lru_last_ = -1;  // first: next to be reused. Blank blocks come first.
  int num_available_ = 0, num_cached_ = 0;
};

}  // namespace nibble
