// Byte-pair encoding of one piece: bytes in, token ids out, exactly as Hugging Face's BPE model
// does it (lowest merge rank first, leftmost among equals; with ignore_merges a piece that is a
// token is that token). Knows nothing of regexes, special tokens or files.
//
// Merges run from the file's own merge table, keyed by the id pair. Tekken's table could be derived
// from the vocabulary and dropped, but checking that costs more load time than the 4 MB it saves,
// and one path is exact for every file. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

/// Immutable after construction, thread-safe.
class BytePairEncoder {
 public:
  static constexpr size_t kMaxIds = 1 << 21;
  static constexpr size_t kMaxMerges = (1 << 22) - 1;

  struct Merge {
    int32_t left, right, result;  // in rank order
  };
  struct Token {
    int32_t id;
    std::string_view bytes;  // copied
  };

  /// `tokens` must hold each single byte (NIBBLE_CHECKed: the file reader refuses such files by
  /// name). Ids are below `num_ids`, at most kMaxIds of them and kMaxMerges merges. A later merge
  /// of the same pair replaces the earlier one, as in HF.
  BytePairEncoder(std::span<const Token> tokens, std::span<const Merge> merges, size_t num_ids,
                  bool ignore_merges);

  /// Scratch memory of encode(), reusable from call to call by one thread.
  class Scratch {
    friend class BytePairEncoder;
    std::vector<int32_t> ids;
    std::vector<uint32_t> ranks, next, previous;
    std::vector<uint64_t> buckets[33], early;
  };

  /// Appends the ids of `piece`. O(n log n) in its length.
  void encode(std::string_view piece, std::vector<int32_t>& out, Scratch& scratch) const;

  /// For tests: the same by one algorithm only, without the whole-piece look-up.
  void merge_short(std::string_view piece, std::vector<int32_t>& out, Scratch& scratch) const;
  void merge_long(std::string_view piece, std::vector<int32_t>& out, Scratch& scratch) const;

 private:
  static constexpr uint32_t kNoRank = UINT32_MAX;
  static constexpr size_t kShortBytes = 48;  // up to here a linear scan beats the queue

  // Most pieces are short, so their bytes stand in the slot: one cache line per look-up.
  struct PieceSlot {
    uint64_t key = 0;     // up to 8 bytes: the bytes, zero-padded; longer: their hash
    uint32_t length = 0;  // in bytes; 0: empty slot
    int32_t id = -1;
  };
  // left << 43 | right << 22 | rank: eight slots per cache line. All ones: empty slot.
  using MergeSlot = uint64_t;
  static constexpr MergeSlot kNoMerge = UINT64_MAX;

  std::string_view bytes_of(int32_t id) const {
    const size_t i = static_cast<size_t>(id);
    return {pool_.data() + offsets_[i], offsets_[i + 1] - offsets_[i]};
  }
  int32_t find_piece(std::string_view piece) const;     // -1: not a token that stands for itself
  uint32_t rank_of(int32_t left, int32_t right) const;  // kNoRank: the pair does not merge
  uint32_t rank_of_bytes(char left, char right) const {
    return byte_ranks_[static_cast<uint8_t>(left) << 8 | static_cast<uint8_t>(right)];
  }
  void insert_piece(int32_t id);

  std::string pool_;               // all token bytes, by id
  std::vector<uint32_t> offsets_;  // [num_ids + 1]
  int32_t byte_ids_[256];
  std::vector<PieceSlot> pieces_;     // open addressing; only tokens that encode to themselves
  std::vector<MergeSlot> merges_;     // open addressing
  std::vector<uint32_t> byte_ranks_;  // [256 * 256]: every piece starts with these pairs
  std::vector<int32_t> result_of_rank_;
};

}  // namespace nibble
