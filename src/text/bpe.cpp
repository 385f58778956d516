// SPDX-License-Identifier: Apache-2.0
#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "base/error.h"

namespace nibble {
namespace {

inline uint64_t load64(const char* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}
inline uint32_t load32(const char* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
inline uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

constexpr uint64_t kSeed0 = 0xa0761d6478bd642full, kSeed1 = 0xe7037ed1a0b428dbull;

// Up to 8 bytes, zero-padded.
inline uint64_t load_short(const char* p, size_t n) {
  if (n == 8) return load64(p);
  if (n >= 4) return load32(p) | static_cast<uint64_t>(load32(p + n - 4)) << (8 * (n - 4));
  const auto byte = [p](size_t i) {
    return static_cast<uint64_t>(static_cast<uint8_t>(p[i])) << (8 * i);
  };
  return byte(0) | byte(n / 2) | byte(n - 1);
}

// 9 bytes and more: 16 at a time, then the last 16 or fewer as two overlapping words.
inline uint64_t hash_long(std::string_view s) {
  const char* p = s.data();
  const char* const last = p + s.size();
  uint64_t hash = kSeed0 ^ s.size();
  for (; last - p > 16; p += 16) hash = mix(load64(p) ^ kSeed1, load64(p + 8) ^ hash);
  const uint64_t first = last - p >= 8 ? load64(p) : 0;
  return mix(first ^ kSeed1 ^ hash, load64(last - 8) ^ kSeed0);
}

inline uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 21 | static_cast<uint32_t>(right);
}
inline uint64_t hash_pair(uint64_t key) { return mix(key ^ kSeed0, kSeed1); }
constexpr int kRankBits = 22;

size_t table_size(size_t num_entries) {
  return std::bit_ceil(std::max<size_t>(16, num_entries * 3 / 2));
}

}  // namespace

inline uint32_t BytePairEncoder::rank_of(int32_t left, int32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (size_t at = hash_pair(key) & (merges_.size() - 1);; at = (at + 1) & (merges_.size() - 1)) {
    const MergeSlot slot = merges_[at];
    if (slot == kNoMerge) return kNoRank;
    if (slot >> kRankBits == key) return static_cast<uint32_t>(slot & kMaxMerges);
  }
}

BytePairEncoder::BytePairEncoder(std::span<const Token> tokens, std::span<const Merge> merges,
                                 size_t num_ids, bool ignore_merges) {
  std::vector<std::string_view> by_id(num_ids);
  for (const Token& token : tokens) {
    NIBBLE_CHECK(token.id >= 0 && static_cast<size_t>(token.id) < num_ids);
    by_id[static_cast<size_t>(token.id)] = token.bytes;
  }
  offsets_.reserve(num_ids + 1);
  for (const std::string_view bytes : by_id) {
    offsets_.push_back(static_cast<uint32_t>(pool_.size()));
    pool_ += bytes;
  }
  offsets_.push_back(static_cast<uint32_t>(pool_.size()));

  std::fill(std::begin(byte_ids_), std::end(byte_ids_), -1);
  for (const Token& token : tokens) {
    if (token.bytes.size() == 1) byte_ids_[static_cast<uint8_t>(token.bytes[0])] = token.id;
  }
  for (const int32_t id : byte_ids_) NIBBLE_CHECK(id >= 0);

  NIBBLE_CHECK(num_ids <= kMaxIds && merges.size() <= kMaxMerges);
  merges_.resize(table_size(merges.size()), kNoMerge);
  result_of_rank_.reserve(merges.size());
  for (const Merge& merge : merges) {
    const uint64_t key = pair_key(merge.left, merge.right);
    size_t at = hash_pair(key) & (merges_.size() - 1);
    while (merges_[at] != kNoMerge && merges_[at] >> kRankBits != key) {
      at = (at + 1) & (merges_.size() - 1);
    }
    merges_[at] = key << kRankBits | result_of_rank_.size();
    result_of_rank_.push_back(merge.result);
  }
  byte_ranks_.resize(1 << 16);
  for (size_t pair = 0; pair < byte_ranks_.size(); ++pair) {
    byte_ranks_[pair] = rank_of(byte_ids_[pair >> 8], byte_ids_[pair & 0xff]);
  }

  pieces_.resize(table_size(tokens.size()));
  Scratch scratch;
  std::vector<int32_t> ids;
  for (const Token& token : tokens) {
    if (token.bytes.empty()) continue;
    if (!ignore_merges) {
      // Only a token that merging would produce anyway may short-cut the merging.
      ids.clear();
      encode(token.bytes, ids, scratch);
      if (ids.size() != 1 || ids[0] != token.id) continue;
    }
    insert_piece(token.id);
  }
}

void BytePairEncoder::insert_piece(int32_t id) {
  const std::string_view bytes = bytes_of(id);
  const bool is_short = bytes.size() <= 8;
  const uint64_t key = is_short ? load_short(bytes.data(), bytes.size()) : hash_long(bytes);
  const uint64_t hash = is_short ? mix(key ^ kSeed1, bytes.size() ^ kSeed0) : key;
  size_t at = hash & (pieces_.size() - 1);
  while (pieces_[at].length != 0 && bytes_of(pieces_[at].id) != bytes) {
    at = (at + 1) & (pieces_.size() - 1);
  }
  pieces_[at] = {key, static_cast<uint32_t>(bytes.size()), id};
}

int32_t BytePairEncoder::find_piece(std::string_view piece) const {
  const size_t mask = pieces_.size() - 1;
  if (piece.size() <= 8) {
    const uint64_t key = load_short(piece.data(), piece.size());
    for (size_t at = mix(key ^ kSeed1, piece.size() ^ kSeed0) & mask;; at = (at + 1) & mask) {
      const PieceSlot& slot = pieces_[at];
      if (slot.key == key && slot.length == piece.size()) return slot.id;
      if (slot.length == 0) return -1;
    }
  }
  const uint64_t key = hash_long(piece);
  for (size_t at = key & mask;; at = (at + 1) & mask) {
    const PieceSlot& slot = pieces_[at];
    if (slot.key == key && slot.length == piece.size() && bytes_of(slot.id) == piece)
      return slot.id;
    if (slot.length == 0) return -1;
  }
}

void BytePairEncoder::encode(std::string_view piece, std::vector<int32_t>& out,
                             Scratch& scratch) const {
  if (piece.size() == 1) {
    out.push_back(byte_ids_[static_cast<uint8_t>(piece[0])]);
    return;
  }
  if (const int32_t id = find_piece(piece); id >= 0) {
    out.push_back(id);
  } else if (piece.size() <= kShortBytes) {
    merge_short(piece, out, scratch);
  } else {
    merge_long(piece, out, scratch);
  }
}

void BytePairEncoder::merge_short(std::string_view piece, std::vector<int32_t>& out,
                                  Scratch& scratch) const {
  size_t n = piece.size();
  if (n == 0) return;
  scratch.ids.resize(std::max(scratch.ids.size(), n));
  scratch.ranks.resize(std::max(scratch.ranks.size(), n));
  int32_t* ids = scratch.ids.data();
  uint32_t* ranks = scratch.ranks.data();  // of the pair (i, i + 1)
  for (size_t i = 0; i < n; ++i) ids[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank_of_bytes(piece[i], piece[i + 1]);
  ranks[n - 1] = kNoRank;
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (ranks[i] < ranks[best]) best = i;
    }
    if (ranks[best] == kNoRank) break;
    ids[best] = result_of_rank_[ranks[best]];
    std::memmove(ids + best + 1, ids + best + 2, (n - best - 2) * sizeof *ids);
    std::memmove(ranks + best, ranks + best + 1, (n - best - 1) * sizeof *ranks);
    --n;
    if (best + 1 < n) ranks[best] = rank_of(ids[best], ids[best + 1]);
    if (best > 0) ranks[best - 1] = rank_of(ids[best - 1], ids[best]);
  }
  out.insert(out.end(), ids, ids + n);
}

namespace {

// Priority queue of (rank, position) for a mostly rising sequence of minimal ranks: a radix heap on
// the rank. An entry waits in the bucket of the highest bit in which its rank differs from the
// current one and moves down a few times in all, in sequential memory, where a binary heap of 10^6
// entries misses the cache at every level. The entries of the current rank are sorted by position,
// which they nearly are. A merge list may also bring back a rank not above the current one: such
// entries wait in `early`, a plain heap, and are compared with the rest.
class MergeQueue {
 public:
  MergeQueue(std::vector<uint64_t> (&buckets)[33], std::vector<uint64_t>& early)
      : buckets_(buckets), early_(early) {
    for (auto& bucket : buckets_) bucket.clear();
    early_.clear();
  }

  /// Ranks are below 2^32 - 1.
  void push(uint32_t rank, uint32_t position) {
    const uint64_t entry = (uint64_t{rank} + 1) << 32 | position;
    if (rank + 1 <= current_) {
      early_.push_back(entry);
      std::push_heap(early_.begin(), early_.end(), std::greater<>());
    } else {
      put(entry);
    }
  }

  /// The smallest entry; false if there is none.
  bool pop(uint32_t& rank, uint32_t& position) {
    uint64_t entry;
    if (!early_.empty() && (next_ == buckets_[0].size() || early_.front() < buckets_[0][next_])) {
      std::pop_heap(early_.begin(), early_.end(), std::greater<>());
      entry = early_.back();
      early_.pop_back();
    } else {
      if (next_ == buckets_[0].size() && !advance()) return false;
      entry = buckets_[0][next_++];
    }
    rank = static_cast<uint32_t>(entry >> 32) - 1;
    position = static_cast<uint32_t>(entry);
    return true;
  }

 private:
  void put(uint64_t entry) {
    const auto i =
        static_cast<size_t>(std::bit_width(static_cast<uint32_t>(entry >> 32) ^ current_));
    buckets_[i].push_back(entry);
    if (i > 0) occupied_ |= uint32_t{1} << (i - 1);
  }

  // Bucket i holds ranks whose highest difference from the current one is bit i - 1, so the lowest
  // bucket in use has the minimum, and all of it moves to lower buckets.
  bool advance() {
    buckets_[0].clear();
    next_ = 0;
    if (occupied_ == 0) return false;
    const auto i = static_cast<size_t>(std::countr_zero(occupied_)) + 1;
    auto& bucket = buckets_[i];
    current_ = static_cast<uint32_t>(*std::min_element(bucket.begin(), bucket.end()) >> 32);
    occupied_ &= ~(uint32_t{1} << (i - 1));
    for (const uint64_t entry : bucket) put(entry);
    bucket.clear();
    auto& first = buckets_[0];
    if (!std::is_sorted(first.begin(), first.end())) std::sort(first.begin(), first.end());
    return true;
  }

  std::vector<uint64_t> (&buckets_)[33];
  std::vector<uint64_t>& early_;
  size_t next_ = 0;        // into buckets_[0], the entries of the current rank
  uint32_t occupied_ = 0;  // bit i - 1: bucket i holds something
  uint32_t current_ = 0;   // the current rank + 1
};

}  // namespace

// Problem: n symbols in a linked list; repeatedly merge the pair of lowest (rank, position).
// A queue entry is stale unless ranks[position] is still its rank.
// Positions are those of the pair's left symbol, so order among equals is leftmost first.
void BytePairEncoder::merge_long(std::string_view piece, std::vector<int32_t>& out,
                                 Scratch& scratch) const {
  if (piece.size() >= kNoRank) {
    fail(ErrorKind::kLimit, "a piece of {} bytes without a split point is too long to encode",
         piece.size());
  }
  const auto n = static_cast<uint32_t>(piece.size());
  if (n == 0) return;
  auto& ids = scratch.ids;
  auto& ranks = scratch.ranks;
  auto& next = scratch.next;
  auto& previous = scratch.previous;
  MergeQueue queue(scratch.buckets, scratch.early);
  ids.resize(std::max<size_t>(ids.size(), n));
  ranks.resize(std::max<size_t>(ranks.size(), n));
  next.resize(std::max<size_t>(next.size(), n));
  previous.resize(std::max<size_t>(previous.size(), n));

  for (uint32_t i = 0; i < n; ++i) {
    ids[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
    next[i] = i + 1;
    previous[i] = i - 1;  // of 0: never read
  }
  for (uint32_t i = 0; i + 1 < n; ++i) {
    ranks[i] = rank_of_bytes(piece[i], piece[i + 1]);
    if (ranks[i] != kNoRank) queue.push(ranks[i], i);
  }
  ranks[n - 1] = kNoRank;

  const auto update = [&](uint32_t at) {
    const uint32_t rank = next[at] < n ? rank_of(ids[at], ids[next[at]]) : kNoRank;
    ranks[at] = rank;
    if (rank != kNoRank) queue.push(rank, at);
  };
  for (uint32_t rank, at; queue.pop(rank, at);) {
    if (ranks[at] != rank) continue;
    const uint32_t gone = next[at];
    ids[at] = result_of_rank_[rank];
    ranks[gone] = kNoRank;
    next[at] = next[gone];
    if (next[at] < n) previous[next[at]] = at;
    update(at);
    if (at > 0) update(previous[at]);
  }
  for (uint32_t i = 0; i < n; i = next[i]) out.push_back(ids[i]);
}

}  // namespace nibble
