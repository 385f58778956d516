// SPDX-License-Identifier: Apache-2.0
#include "pack/cpu_int4.h"

#include <cstring>

#include "base/error.h"
#include "ops/cpu_int4_layout.h"

namespace nibble {
namespace {

void check_shape(int out_features, int in_features, int group_size) {
  NIBBLE_CHECK(out_features > 0 && in_features > 0 && group_size > 0 && group_size % 32 == 0 &&
                   in_features % group_size == 0,
               "out {} in {} group {}", out_features, in_features, group_size);
}

/// Calls visit(tile, group, row in tile, group's first byte) for every row that exists.
template <typename Visit>
void for_each_row(int out_features, int in_features, int group_size, Visit visit) {
  const size_t tile_bytes = cpu_int4_tile_bytes(in_features, group_size);
  const size_t group_bytes = cpu_int4_group_bytes(group_size);
  for (int n = 0; n < out_features; ++n) {
    for (int g = 0; g < in_features / group_size; ++g) {
      visit(n, g, n % kCpuTileRows,
            static_cast<size_t>(n / kCpuTileRows) * tile_bytes + g * group_bytes);
    }
  }
}

}  // namespace

std::vector<std::byte> pack_cpu_int4(const Int4Matrix& m) {
  check_shape(m.out_features, m.in_features, m.group_size);
  const int num_groups = m.in_features / m.group_size;
  NIBBLE_CHECK(m.q.size() == static_cast<size_t>(m.out_features) * m.in_features &&
               m.scales.size() == static_cast<size_t>(m.out_features) * num_groups);
  const size_t group_bytes = cpu_int4_group_bytes(m.group_size);
  const size_t total =
      cpu_int4_num_tiles(m.out_features) * cpu_int4_tile_bytes(m.in_features, m.group_size);
  std::vector<std::byte> packed(total, std::byte{0x88});
  for (size_t group = 0; group < total; group += group_bytes)
    std::memset(packed.data() + group, 0, 64);
  for_each_row(m.out_features, m.in_features, m.group_size, [&](int n, int g, int r, size_t at) {
    std::memcpy(packed.data() + at + r * sizeof(float),
                &m.scales[static_cast<size_t>(n) * num_groups + g], sizeof(float));
    const int8_t* q = m.q.data() + static_cast<size_t>(n) * m.in_features + g * m.group_size;
    for (int b = 0; b < m.group_size / 8; ++b, q += 8) {
      std::byte* block =
          packed.data() + at + 64 + static_cast<size_t>(b) * kCpuQuadBlockBytes + 4 * r;
      for (int j = 0; j < 4; ++j) {
        NIBBLE_CHECK(q[j] >= -8 && q[j] <= 7 && q[j + 4] >= -8 && q[j + 4] <= 7);
        block[j] = static_cast<std::byte>((q[j] + 8) | (q[j + 4] + 8) << 4);
      }
    }
  });
  return packed;
}

Int4Matrix unpack_cpu_int4(std::span<const std::byte> weight, int out_features, int in_features,
                           int group_size) {
  check_shape(out_features, in_features, group_size);
  NIBBLE_CHECK(weight.size() ==
                   cpu_int4_num_tiles(out_features) * cpu_int4_tile_bytes(in_features, group_size),
               "{} bytes", weight.size());
  const int num_groups = in_features / group_size;
  Int4Matrix m{.out_features = out_features, .in_features = in_features, .group_size = group_size};
  m.q.resize(static_cast<size_t>(out_features) * in_features);
  m.scales.resize(static_cast<size_t>(out_features) * num_groups);
  for_each_row(out_features, in_features, group_size, [&](int n, int g, int r, size_t at) {
    std::memcpy(&m.scales[static_cast<size_t>(n) * num_groups + g],
                weight.data() + at + r * sizeof(float), sizeof(float));
    int8_t* q = m.q.data() + static_cast<size_t>(n) * in_features + g * group_size;
    for (int b = 0; b < group_size / 8; ++b, q += 8) {
      const std::byte* block =
          weight.data() + at + 64 + static_cast<size_t>(b) * kCpuQuadBlockBytes + 4 * r;
      for (int j = 0; j < 4; ++j) {
        const int byte = std::to_integer<int>(block[j]);
        q[j] = static_cast<int8_t>((byte & 15) - 8);
        q[j + 4] = static_cast<int8_t>((byte >> 4) - 8);
      }
    }
  });
  return m;
}

}  // namespace nibble
