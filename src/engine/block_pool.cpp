// SPDX-License-Identifier: Apache-2.0
#include "engine/block_pool.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "base/hash.h"

namespace nibble {

uint64_t BlockPool::default_hash(uint64_t parent_key, std::span<const int32_t> tokens) {
  return xxh3_64(std::as_bytes(tokens), parent_key);
}

BlockPool::BlockPool(int num_blocks, int block_tokens, HashFn hash)
    : block_tokens_(block_tokens), hash_(hash) {
  NIBBLE_CHECK(num_blocks > 0 && block_tokens > 0, "{} blocks of {} tokens", num_blocks,
               block_tokens);
  nodes_.resize(num_blocks);
  tokens_.resize(size_t(num_blocks) * block_tokens);
  buckets_.assign(std::bit_ceil(size_t(num_blocks) * 2), -1);
  for (int32_t block = 0; block < num_blocks; ++block) lru_push_back(block);
  num_available_ = num_blocks;
  (void)intern_salt("");  // root -1, kept for good
}

// Salts
// -----------------------------------------------------------------------------------------------

int32_t BlockPool::intern_salt(std::string_view salt) {
  const auto found = salt_ids_.find(salt);
  int32_t id;
  if (found != salt_ids_.end()) {
    id = found->second;
  } else {
    if (!free_salts_.empty()) {
      id = free_salts_.back();
      free_salts_.pop_back();
    } else {
      id = static_cast<int32_t>(salts_.size());
      salts_.emplace_back();
      free_salts_.reserve(salts_.size());  // so that dropping a salt never allocates
    }
    salts_[id] = Salt{.name = std::string(salt)};
    salts_[id].key = xxh3_64(std::as_bytes(std::span(salt)), 0x6e6962626c65);
    salt_ids_.emplace(std::string(salt), id);
  }
  ++salts_[id].num_refs;
  return -1 - id;
}

void BlockPool::release_salt(int32_t root) { drop_salt_ref(root); }

void BlockPool::drop_salt_ref(int32_t root) {
  Salt& salt = salts_[-1 - root];
  NIBBLE_CHECK(salt.num_refs > 0);
  if (--salt.num_refs > 0) return;
  salt_ids_.erase(salt.name);
  salt.name.clear();
  free_salts_.push_back(-1 - root);
}

// Tree
// ------------------------------------------------------------------------------------------------

uint64_t BlockPool::key_of(int32_t parent) const {
  return parent < 0 ? salts_[-1 - parent].key : nodes_[parent].key;
}

int32_t& BlockPool::first_child(int32_t parent) {
  return parent < 0 ? salts_[-1 - parent].first_child : nodes_[parent].first_child;
}

void BlockPool::link_child(int32_t block, int32_t parent) {
  Node& node = nodes_[block];
  int32_t& first = first_child(parent);
  node.parent = parent;
  node.prev_sibling = -1;
  node.next_sibling = first;
  if (first >= 0) nodes_[first].prev_sibling = block;
  first = block;
}

void BlockPool::unlink_child(int32_t block) {
  Node& node = nodes_[block];
  if (node.prev_sibling >= 0) {
    nodes_[node.prev_sibling].next_sibling = node.next_sibling;
  } else {
    first_child(node.parent) = node.next_sibling;
  }
  if (node.next_sibling >= 0) nodes_[node.next_sibling].prev_sibling = node.prev_sibling;
  node.prev_sibling = node.next_sibling = -1;
}

void BlockPool::unlink_hash(int32_t block) {
  int32_t* link = &buckets_[nodes_[block].key & (buckets_.size() - 1)];
  while (*link != block) {
    NIBBLE_CHECK(*link >= 0, "block {} is not in its hash bucket", block);
    link = &nodes_[*link].hash_next;
  }
  *link = nodes_[block].hash_next;
  nodes_[block].hash_next = -1;
}

int32_t BlockPool::find_full(uint64_t key, int32_t parent, std::span<const int32_t> tokens) const {
  for (int32_t block = buckets_[key & (buckets_.size() - 1)]; block >= 0;
       block = nodes_[block].hash_next) {
    const Node& node = nodes_[block];
    // The key only narrows the search: parent and tokens decide. By induction over the parents the
    // whole prefix is equal then.
    if (node.key == key && node.parent == parent && std::ranges::equal(content(block), tokens)) {
      return block;
    }
  }
  return -1;
}

void BlockPool::forget(int32_t block) {
  Node& node = nodes_[block];
  if (node.num_tokens == 0) return;
  NIBBLE_CHECK(node.first_child < 0, "block {} is forgotten before its children", block);
  if (node.num_tokens == block_tokens_) unlink_hash(block);
  unlink_child(block);
  if (node.parent < 0) drop_salt_ref(node.parent);
  node.num_tokens = 0;
}

// Least recently used list
// ----------------------------------------------------------------------------

void BlockPool::lru_push_back(int32_t block) {
  Node& node = nodes_[block];
  node.lru_prev = lru_last_;
  node.lru_next = -1;
  (lru_last_ >= 0 ? nodes_[lru_last_].lru_next : lru_first_) = block;
  lru_last_ = block;
}

void BlockPool::lru_push_front(int32_t block) {
  Node& node = nodes_[block];
  node.lru_prev = -1;
  node.lru_next = lru_first_;
  (lru_first_ >= 0 ? nodes_[lru_first_].lru_prev : lru_last_) = block;
  lru_first_ = block;
}

void BlockPool::lru_unlink(int32_t block) {
  Node& node = nodes_[block];
  (node.lru_prev >= 0 ? nodes_[node.lru_prev].lru_next : lru_first_) = node.lru_next;
  (node.lru_next >= 0 ? nodes_[node.lru_next].lru_prev : lru_last_) = node.lru_prev;
  node.lru_prev = node.lru_next = -1;
}

void BlockPool::take(int32_t block) {
  Node& node = nodes_[block];
  if (node.ref_count++ > 0) return;
  lru_unlink(block);
  --num_available_;
  if (node.num_tokens > 0) --num_cached_;
}

void BlockPool::release(int32_t block) {
  Node& node = nodes_[block];
  NIBBLE_CHECK(node.ref_count > 0, "block {} is released too often", block);
  if (--node.ref_count > 0) return;
  ++num_available_;
  if (node.num_tokens > 0) {
    ++num_cached_;
    lru_push_back(block);
  } else {
    lru_push_front(block);
  }
}

// Finding and filling
// ---------------------------------------------------------------------------------

int BlockPool::acquire_prefix(int32_t parent, std::span<const int32_t> tokens,
                              std::vector<int32_t>& blocks) {
  int num_found = 0;
  uint64_t key = key_of(parent);
  while (tokens.size() >= static_cast<size_t>(block_tokens_)) {
    const auto wanted = tokens.first(block_tokens_);
    key = hash_(key, wanted);
    const int32_t block = find_full(key, parent, wanted);
    if (block < 0) break;
    take(block);
    blocks.push_back(block);
    ++num_found;
    parent = block;
    tokens = tokens.subspan(block_tokens_);
  }
  return num_found;
}

BlockPool::Partial BlockPool::find_partial(int32_t parent, std::span<const int32_t> tokens) {
  Partial best;
  int num_probes = 0;
  for (int32_t block = first_child(parent); block >= 0 && num_probes < kMaxProbes;
       block = nodes_[block].next_sibling, ++num_probes) {
    const auto have = content(block);
    const size_t limit = std::min(have.size(), tokens.size());
    int matched = 0;
    while (static_cast<size_t>(matched) < limit && have[matched] == tokens[matched]) ++matched;
    if (matched > best.num_tokens) best = {block, matched};
  }
  if (best.block >= 0) {  // used: youngest child, youngest unheld block
    unlink_child(best.block);
    link_child(best.block, parent);
    // Moving past the parent would break "children before their parents", but the caller holds the
    // parent.
    NIBBLE_CHECK(parent < 0 || nodes_[parent].ref_count > 0);
    if (nodes_[best.block].ref_count == 0) {
      lru_unlink(best.block);
      lru_push_back(best.block);
    }
  }
  return best;
}

bool BlockPool::adopt(int32_t block, int num_tokens) {
  const Node& node = nodes_[block];
  if (node.ref_count > 0 || node.num_tokens != num_tokens || num_tokens == block_tokens_) {
    return false;
  }
  take(block);
  return true;
}

std::optional<int32_t> BlockPool::allocate() {
  if (lru_first_ < 0) return std::nullopt;
  const int32_t block = lru_first_;
  take(block);
  forget(block);
  return block;
}

int32_t BlockPool::publish(int32_t block, int32_t parent, std::span<const int32_t> tokens) {
  Node& node = nodes_[block];
  const int num_tokens = static_cast<int>(tokens.size());
  NIBBLE_CHECK(node.ref_count == 1, "block {} is written with {} holders", block, node.ref_count);
  NIBBLE_CHECK(num_tokens > node.num_tokens && num_tokens <= block_tokens_,
               "block {} goes from {} to {} tokens", block, node.num_tokens, num_tokens);
  const bool is_new = node.num_tokens == 0;
  NIBBLE_CHECK(is_new || node.parent == parent, "block {} changes its parent", block);

  if (num_tokens == block_tokens_) {
    const uint64_t key = hash_(key_of(parent), tokens);
    const int32_t twin = find_full(key, parent, tokens);
    if (twin >= 0) {
      forget(block);
      take(twin);
      release(block);
      return twin;
    }
    node.key = key;
    int32_t& bucket = buckets_[key & (buckets_.size() - 1)];
    node.hash_next = bucket;
    bucket = block;
  }
  const int old_tokens = node.num_tokens;
  node.num_tokens = num_tokens;
  std::ranges::copy(tokens.subspan(old_tokens), content(block).begin() + old_tokens);
  if (is_new) {
    link_child(block, parent);
    if (parent < 0) ++salts_[-1 - parent].num_refs;
  }
  return block;
}

// Invariants
// ------------------------------------------------------------------------------------------

void BlockPool::check_invariants() const {
  // Every unheld block is in the list exactly once, blank ones first; children before their
  // parents.
  std::vector<int> place(nodes_.size(), -1);
  int count = 0, cached = 0;
  int32_t previous = -1;
  for (int32_t block = lru_first_; block >= 0; block = nodes_[block].lru_next) {
    const Node& node = nodes_[block];
    NIBBLE_CHECK(node.ref_count == 0, "held block {} is in the list", block);
    NIBBLE_CHECK(node.lru_prev == previous && place[block] < 0);
    NIBBLE_CHECK(node.num_tokens > 0 || cached == 0, "blank block {} after cached ones", block);
    cached += node.num_tokens > 0;
    place[block] = count++;
    previous = block;
  }
  NIBBLE_CHECK(lru_last_ == previous);
  NIBBLE_CHECK(count == num_available_ && cached == num_cached_);

  std::vector<int> num_children(nodes_.size(), 0), seen(nodes_.size(), 0);
  for (int32_t block = 0; block < num_blocks(); ++block) {
    const Node& node = nodes_[block];
    NIBBLE_CHECK(node.ref_count >= 0 && (node.ref_count == 0) == (place[block] >= 0));
    if (node.num_tokens == 0) {
      NIBBLE_CHECK(node.first_child < 0);
      continue;
    }
    if (node.num_tokens < block_tokens_) {
      NIBBLE_CHECK(node.first_child < 0, "partly written block {} has children", block);
      NIBBLE_CHECK(node.ref_count <= 1, "partly written block {} is shared", block);
    }
    if (node.parent < 0) continue;
    const Node& parent = nodes_[node.parent];
    NIBBLE_CHECK(parent.num_tokens == block_tokens_, "block {} has a parent without content",
                 block);
    if (node.ref_count > 0)
      NIBBLE_CHECK(parent.ref_count > 0, "block {}: parent is not held", block);
    if (parent.ref_count == 0) NIBBLE_CHECK(place[block] < place[node.parent]);
    ++num_children[node.parent];
  }
  const auto walk = [&](int32_t parent, int32_t first) {
    int32_t previous_child = -1;
    int length = 0;
    for (int32_t block = first; block >= 0; block = nodes_[block].next_sibling) {
      NIBBLE_CHECK(nodes_[block].num_tokens > 0 && nodes_[block].parent == parent);
      NIBBLE_CHECK(nodes_[block].prev_sibling == previous_child && ++seen[block] == 1);
      previous_child = block;
      ++length;
    }
    return length;
  };
  for (int32_t block = 0; block < num_blocks(); ++block) {
    NIBBLE_CHECK(walk(block, nodes_[block].first_child) == num_children[block]);
  }
  for (const auto& [name, id] : salt_ids_) {
    NIBBLE_CHECK(salts_[id].name == name);
    NIBBLE_CHECK(walk(-1 - id, salts_[id].first_child) <= salts_[id].num_refs);
  }
  for (int32_t block = 0; block < num_blocks(); ++block) {
    NIBBLE_CHECK(seen[block] == (nodes_[block].num_tokens > 0));
  }

  // The hash index holds exactly the full blocks, each (parent, tokens) once.
  int num_hashed = 0, num_full = 0;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    for (int32_t block = buckets_[bucket]; block >= 0; block = nodes_[block].hash_next) {
      const Node& node = nodes_[block];
      NIBBLE_CHECK(node.num_tokens == block_tokens_ &&
                   (node.key & (buckets_.size() - 1)) == bucket);
      NIBBLE_CHECK(node.key == hash_(key_of(node.parent), content(block)));
      NIBBLE_CHECK(find_full(node.key, node.parent, content(block)) == block, "a twin of {}",
                   block);
      ++num_hashed;
    }
  }
  for (const Node& node : nodes_) num_full += node.num_tokens == block_tokens_;
  NIBBLE_CHECK(num_hashed == num_full);
}

}  // namespace nibble
