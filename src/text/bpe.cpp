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

inline uint64_t hash_bytes(std::string_view s) {
  const char* p = s.data();
  const size_t n = s.size();
  uint64_t a = 0, b = 0;
  if (n >= 8) {
    uint64_t h = kSeed0 ^ n;
    for (size_t i = 16; i < n; i += 16, p += 16) h = mix(load64(p) ^ kSeed1, load64(p + 8) ^ h);
    const size_t rest = static_cast<size_t>(s.data() + n - p);  // 8..16, or more read twice
    a = rest >= 8 ? load64(p) : 0;
    b = load64(s.data() + n - 8);
    return mix(a ^ kSeed1 ^ h, b ^ kSeed0);
  }
  if (n >= 4) {
    a = load32(p);
    b = load32(p + n - 4);
  } else if (n > 0) {
    a = static_cast<uint8_t>(p[0]) | static_cast<uint64_t>(static_cast<uint8_t>(p[n / 2])) << 8 |
        static_cast<uint64_t>(static_cast<uint8_t>(p[n - 1])) << 16;
  }
  return mix(a ^ kSeed1 ^ n, b ^ kSeed0);
}

inline uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}
inline uint64_t hash_pair(uint64_t key) { return mix(key ^ kSeed0, kSeed1); }

size_t table_size(size_t num_entries) { return std::bit_ceil(std::max<size_t>(16, num_entries * 3 / 2)); }

}  // namespace

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

  merges_.resize(table_size(merges.size()));
  result_of_rank_.reserve(merges.size());
  for (const Merge& merge : merges) {
    const uint64_t key = pair_key(merge.left, merge.right);
    size_t at = hash_pair(key) & (merges_.size() - 1);
    while (merges_[at].pair != UINT64_MAX && merges_[at].pair != key) {
      at = (at + 1) & (merges_.size() - 1);
    }
    merges_[at] = {key, static_cast<uint32_t>(result_of_rank_.size())};
    result_of_rank_.push_back(merge.result);
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
  const uint64_t hash = hash_bytes(bytes_of(id));
  size_t at = hash & (pieces_.size() - 1);
  while (pieces_[at].id >= 0) {
    if (bytes_of(pieces_[at].id) == bytes_of(id)) break;
    at = (at + 1) & (pieces_.size() - 1);
  }
  pieces_[at] = {static_cast<uint32_t>(hash >> 32), id};
}

int32_t BytePairEncoder::find_piece(std::string_view piece) const {
  const uint64_t hash = hash_bytes(piece);
  const auto tag = static_cast<uint32_t>(hash >> 32);
  for (size_t at = hash & (pieces_.size() - 1);; at = (at + 1) & (pieces_.size() - 1)) {
    const PieceSlot slot = pieces_[at];
    if (slot.id < 0) return -1;
    if (slot.tag == tag && bytes_of(slot.id) == piece) return slot.id;
  }
}

const BytePairEncoder::MergeSlot* BytePairEncoder::find_merge(int32_t left, int32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (size_t at = hash_pair(key) & (merges_.size() - 1);; at = (at + 1) & (merges_.size() - 1)) {
    const MergeSlot& slot = merges_[at];
    if (slot.pair == key) return &slot;
    if (slot.pair == UINT64_MAX) return nullptr;
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
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank_of(ids[i], ids[i + 1]);
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

// Problem: n symbols in a linked list; repeatedly merge the pair of lowest (rank, position).
// The heap holds rank << 32 | position; an entry is stale unless ranks[position] is still its rank.
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
  auto& heap = scratch.heap;
  ids.resize(std::max<size_t>(ids.size(), n));
  ranks.resize(std::max<size_t>(ranks.size(), n));
  next.resize(std::max<size_t>(next.size(), n));
  previous.resize(std::max<size_t>(previous.size(), n));
  heap.clear();
  constexpr auto later = std::greater<uint64_t>();
  const auto entry = [](uint32_t rank, uint32_t at) { return static_cast<uint64_t>(rank) << 32 | at; };

  for (uint32_t i = 0; i < n; ++i) {
    ids[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
    next[i] = i + 1;
    previous[i] = i - 1;  // of 0: never read
  }
  for (uint32_t i = 0; i + 1 < n; ++i) {
    ranks[i] = rank_of(ids[i], ids[i + 1]);
    if (ranks[i] != kNoRank) heap.push_back(entry(ranks[i], i));
  }
  ranks[n - 1] = kNoRank;
  std::make_heap(heap.begin(), heap.end(), later);

  const auto update = [&](uint32_t at) {
    const uint32_t rank = next[at] < n ? rank_of(ids[at], ids[next[at]]) : kNoRank;
    ranks[at] = rank;
    if (rank == kNoRank) return;
    heap.push_back(entry(rank, at));
    std::push_heap(heap.begin(), heap.end(), later);
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const uint64_t top = heap.back();
    heap.pop_back();
    const auto at = static_cast<uint32_t>(top);
    const auto rank = static_cast<uint32_t>(top >> 32);
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
