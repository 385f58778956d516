// Which part of a whole weight one tensor-parallel rank holds, and copies between the two. Groups
// never straddle a cut, so slicing a quantized weight equals quantizing the slice: any tp reads and
// writes any. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "spec/model_spec.h"
#include "spec/weight_table.h"

namespace nibble {

struct RowRange {
  int64_t begin = 0, end = 0;
  bool operator==(const RowRange&) const = default;
};

/// Rows of the whole in the rank's order (qkv: its q, its k, its v rows) and one range of columns.
/// Rows at or past the whole's end are padding (vocabulary) and read as zeros.
struct ShardSlice {
  std::vector<RowRange> rows;
  int64_t col_begin = 0, col_end = 0;

  int64_t num_rows() const;
  int64_t num_cols() const { return col_end - col_begin; }
};

/// Norms count as one row. `vocab_rows` is what each rank holds of a kVocab weight; 0: vocab / tp
/// rounded up.
ShardSlice shard_slice(const WeightRow& row, const ModelSpec& spec, int tp_rank, int tp_size,
                       int64_t vocab_rows = 0);

/// Throws Error{kUnsupported} saying what does not divide when `spec` cannot be cut in `tp_size`
/// parts with int4 groups of `group_size`. Key/value heads are duplicated when tp_size exceeds
/// them.
void check_shardable(const ModelSpec& spec, int tp_size, int group_size, std::string_view what);

/// A rank's part of a row-major matrix [whole_rows, whole_row_bytes]. `divide_rows` 2 for packed
/// nibbles (two rows a byte); columns are scaled by `col_bytes` / `col_divide` (1 byte a column; 4
/// bytes per 128).
struct SliceScale {
  int64_t divide_rows = 1;
  int64_t col_bytes = 1, col_divide = 1;
};
void copy_slice(const std::byte* whole, int64_t whole_rows, int64_t whole_cols,
                const ShardSlice& slice, SliceScale scale, std::byte* part);
void place_slice(const std::byte* part, const ShardSlice& slice, SliceScale scale,
                 int64_t whole_rows, int64_t whole_cols, std::byte* whole);

}  // namespace nibble
