// Constants and addresses of WeightLayout::kCpuInt4, shared by its packer (pack/cpu_int4.h
// describes the bytes) and by the cpu kernels. Plain C++ without std headers, functions static:
// instruction-set files include it. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace nibble {

constexpr int kCpuTileRows = 16;        // out features of one tile: the 32-bit lanes of one zmm
constexpr int kCpuQuadBlockBytes = 64;  // 16 rows x 8 in features x 4 bits

/// Bytes of one (tile, group): 16 float scales, then group/8 blocks of 64 bytes.
static constexpr size_t cpu_int4_group_bytes(int group_size) {
  return kCpuTileRows * sizeof(float) + static_cast<size_t>(group_size) / 8 * kCpuQuadBlockBytes;
}
static constexpr size_t cpu_int4_tile_bytes(int in_features, int group_size) {
  return static_cast<size_t>(in_features / group_size) * cpu_int4_group_bytes(group_size);
}
static constexpr int cpu_int4_num_tiles(int out_features) {
  return (out_features + kCpuTileRows - 1) / kCpuTileRows;
}

}  // namespace nibble
