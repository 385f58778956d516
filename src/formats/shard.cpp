// SPDX-License-Identifier: Apache-2.0
#include "formats/shard.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace nibble {

int64_t ShardSlice::num_rows() const {
  int64_t total = 0;
  for (const RowRange& range : rows) total += range.end - range.begin;
  return total;
}

ShardSlice shard_slice(const WeightRow& row, const ModelSpec& spec, int tp_rank, int tp_size,
                       int64_t vocab_rows) {
  NIBBLE_CHECK(tp_rank >= 0 && tp_rank < tp_size, "rank {} of {}", tp_rank, tp_size);
  const bool matrix = row.shape.size() == 2;
  const int64_t out = matrix ? row.shape[0] : 1, in = matrix ? row.shape[1] : row.shape[0];
  ShardSlice slice{.rows = {{0, out}}, .col_begin = 0, .col_end = in};
  const int64_t rank = tp_rank, tp = tp_size;
  switch (row.shard) {
    case ShardRule::kReplicated: break;
    case ShardRule::kRows:
      NIBBLE_CHECK(out % tp == 0, "{} rows of {} in {} parts", out, row.name, tp);
      slice.rows = {{rank * (out / tp), (rank + 1) * (out / tp)}};
      break;
    case ShardRule::kQkvRows: {
      const int64_t dim = spec.head_dim, heads = spec.num_heads, kv_heads = spec.num_kv_heads;
      NIBBLE_CHECK(heads % tp == 0 && (kv_heads % tp == 0 || tp % kv_heads == 0),
                   "{} and {} heads in {} parts", heads, kv_heads, tp);
      const int64_t kv_count = std::max<int64_t>(1, kv_heads / tp);
      const int64_t kv_first =
          rank * kv_heads / tp;  // shared by tp / kv_heads ranks when there are too few
      const int64_t q = heads * dim, kv = kv_heads * dim;
      slice.rows = {{rank * (q / tp), (rank + 1) * (q / tp)},
                    {q + kv_first * dim, q + (kv_first + kv_count) * dim},
                    {q + kv + kv_first * dim, q + kv + (kv_first + kv_count) * dim}};
      break;
    }
    case ShardRule::kColumns:
      NIBBLE_CHECK(in % tp == 0, "{} columns of {} in {} parts", in, row.name, tp);
      slice.col_begin = rank * (in / tp);
      slice.col_end = (rank + 1) * (in / tp);
      break;
    case ShardRule::kVocab: {
      const int64_t each = vocab_rows > 0 ? vocab_rows : (out + tp - 1) / tp;
      slice.rows = {{rank * each, (rank + 1) * each}};
      break;
    }
  }
  return slice;
}

void check_shardable(const ModelSpec& spec, int tp_size, int group_size, std::string_view what) {
  const int64_t tp = tp_size, group = group_size;
  NIBBLE_CHECK(tp >= 1 && group >= 1, "tp {} group {}", tp, group);
  const auto refuse = [&](std::string_view thing, int64_t value, std::string_view wanted) {
    fail(ErrorKind::kUnsupported, "{}: {} is {}; tensor parallelism {} with groups of {} wants {}",
         what, thing, value, tp, group, wanted);
  };
  if (spec.num_heads % tp != 0)
    refuse("the number of attention heads", spec.num_heads, "a multiple of tp");
  if (spec.num_kv_heads % tp != 0 && tp % spec.num_kv_heads != 0) {
    refuse("the number of key/value heads", spec.num_kv_heads, "a multiple or a divisor of tp");
  }
  if (spec.hidden_size % group != 0)
    refuse("hidden_size", spec.hidden_size, "a multiple of the group");
  if (spec.hidden_size % 2 != 0) refuse("hidden_size", spec.hidden_size, "an even number");
  if (spec.q_size() % (tp * group) != 0)
    refuse("heads x head_dim", spec.q_size(), "a multiple of tp x group");
  if (spec.ffn_size % (tp * group) != 0)
    refuse("the ffn size", spec.ffn_size, "a multiple of tp x group");
  if (spec.ffn_size / tp % 2 != 0)
    refuse("the ffn size", spec.ffn_size, "an even number for each rank");
}

namespace {

template <typename Copy>
void for_each_row(const ShardSlice& slice, SliceScale scale, int64_t whole_cols, Copy copy) {
  const auto bytes = [&](int64_t cols) {
    NIBBLE_CHECK(cols % scale.col_divide == 0, "column {} is no multiple of {}", cols,
                 scale.col_divide);
    return cols / scale.col_divide * scale.col_bytes;
  };
  const int64_t row_bytes = bytes(whole_cols);
  const int64_t offset = bytes(slice.col_begin), width = bytes(slice.col_end) - offset;
  int64_t part = 0;
  for (const RowRange& range : slice.rows) {
    NIBBLE_CHECK(range.begin % scale.divide_rows == 0 && range.end % scale.divide_rows == 0,
                 "rows {}..{}", range.begin, range.end);
    for (int64_t r = range.begin / scale.divide_rows; r < range.end / scale.divide_rows;
         ++r, part += width) {
      copy(r, r * row_bytes + offset, part, static_cast<size_t>(width));
    }
  }
}

}  // namespace

void copy_slice(const std::byte* whole, int64_t whole_rows, int64_t whole_cols,
                const ShardSlice& slice, SliceScale scale, std::byte* part) {
  for_each_row(slice, scale, whole_cols, [&](int64_t row, int64_t from, int64_t to, size_t width) {
    if (row < whole_rows / scale.divide_rows) {
      std::memcpy(part + to, whole + from, width);
    } else {
      std::memset(part + to, 0, width);
    }
  });
}

void place_slice(const std::byte* part, const ShardSlice& slice, SliceScale scale,
                 int64_t whole_rows, int64_t whole_cols, std::byte* whole) {
  for_each_row(slice, scale, whole_cols, [&](int64_t row, int64_t to, int64_t from, size_t width) {
    if (row < whole_rows / scale.divide_rows) std::memcpy(whole + to, part + from, width);
  });
}

}  // namespace nibble
