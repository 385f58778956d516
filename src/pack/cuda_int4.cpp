// Writes layout.h's bytes word by word (its own pack() goes nibble by nibble; tests/ops compares
// the two) and on all cores.
// SPDX-License-Identifier: Apache-2.0
#include "pack/cuda_int4.h"

#include <algorithm>
#include <cstring>

#include "backends/cuda/layout.h"
#include "base/error.h"
#include "base/half.h"
#include "base/thread_pool.h"
#include "ops/cuda_int4_layout.h"

namespace nibble {
namespace {

using cuda_layout::kBlockNibbleBytes;
using cuda_layout::kBlockRows;
using cuda_layout::kGroup;
using cuda_layout::kTileRows;
using cuda_layout::Shape;

void check_shape(int out_features, int in_features, int group_size, bool gate_up) {
  NIBBLE_CHECK(out_features > 0 && in_features > 0 && in_features % kGroup == 0 &&
                   group_size == kGroup && (!gate_up || out_features % 16 == 0),
               "out {} in {} group {}", out_features, in_features, group_size);
}

// One 16 x 128 strip (m16) of a block. rows[r]: 128 weights + 8 of packed row r, or null
// for padding.
void pack_strip(const uint8_t* const (&rows)[16], uint32_t* words /*[k64 2][lane 32][k16 4]*/) {
  for (int k64 = 0; k64 < 2; ++k64) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int k16 = 0; k16 < 4; ++k16) {
        uint32_t word = 0;
        for (int hi = 0; hi < 2; ++hi) {
          const uint8_t* row = rows[g + 8 * hi];
          const int k = k64 * 64 + k16 * 16 + 2 * t;
          for (int i = 0; i < 4; ++i) {  // odd, then upper
            const int odd = i % 2, upper = i / 2;
            const uint32_t u = row == nullptr ? 8u : row[k + odd + 8 * upper];
            word |= u << (16 * odd + 8 * upper + 4 * hi);
          }
        }
        words[(k64 * 32 + lane) * 4 + k16] = word;
      }
    }
  }
}

}  // namespace

size_t cuda_int4_bytes(int out_features, int in_features) {
  const auto bytes = static_cast<size_t>(Shape{out_features, in_features}.packed_bytes());
  NIBBLE_CHECK(bytes == cuda_int4_packed_bytes(out_features, in_features));
  return bytes;
}

std::vector<std::byte> pack_cuda_int4(const Int4Matrix& m, bool gate_up) {
  NIBBLE_CHECK(m.group_size == kGroup && m.q.size() == static_cast<size_t>(m.out_features) *
                                                           static_cast<size_t>(m.in_features));
  NIBBLE_CHECK(std::ranges::all_of(m.q, [](int8_t q) { return q >= -8 && q <= 7; }),
               "a weight is outside -8..7");
  // Nibbles come in pairs of rows: an odd last row gets a partner, which the shape leaves out.
  std::vector<int8_t> q = m.q;
  q.resize(static_cast<size_t>((m.out_features + 1) / 2 * 2) * static_cast<size_t>(m.in_features));
  const std::vector<std::byte> nibbles =
      pack_nibbles(q, (m.out_features + 1) / 2 * 2, m.in_features);
  return pack_cuda_int4({PortableRows{m.out_features, nibbles.data(), m.scales}}, m.in_features,
                        gate_up);
}

std::vector<std::byte> pack_cuda_int4(std::span<const PortableRows> parts, int in_features,
                                      bool gate_up) {
  int64_t rows_of_all = 0;
  const int64_t groups = in_features / kGroup;
  for (const PortableRows& part : parts) {
    rows_of_all += part.out_features;
    NIBBLE_CHECK(static_cast<int64_t>(part.scales.size()) == part.out_features * groups);
  }
  check_shape(static_cast<int>(rows_of_all), in_features, kGroup, gate_up);
  const Shape shape{rows_of_all, in_features};
  // 128 weights of one row as u = q + 8; returns their scale.
  const auto read = [&](int64_t row, int64_t group, uint8_t* u) {
    const PortableRows* part = parts.data();
    for (; row >= part->out_features; ++part) row -= part->out_features;
    const std::byte* from = part->nibbles + row / 2 * in_features + group * kGroup;
    const int shift = row % 2 == 0 ? 0 : 4;
    for (int k = 0; k < kGroup; ++k) {
      u[k] = ((static_cast<uint8_t>(from[k]) >> shift) & 15) ^ 8;
    }
    return part->scales[static_cast<size_t>(row * groups + group)];
  };
  std::vector<std::byte> packed(static_cast<size_t>(shape.packed_bytes()));
  static_assert(kBlockNibbleBytes == 4 * 4 * 256);
  const auto pack_tile = [&](int64_t tile, int) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t half = 0; half < 2; ++half) {
        uint32_t words[4 * 256];
        uint16_t scales[kBlockRows] = {};
        for (int m16 = 0; m16 < 4; ++m16) {
          uint8_t weights[16][kGroup];
          const uint8_t* rows[16];
          for (int r = 0; r < 16; ++r) {
            const int in_block = m16 * 16 + r;
            const int64_t row = tile * kTileRows + half * kBlockRows + in_block;
            rows[r] = nullptr;
            if (row >= shape.rows) continue;
            const int64_t source = cuda_layout::source_row(shape, gate_up, row);
            rows[r] = weights[r];
            scales[cuda_layout::scale_place(in_block)] =
                float_to_bf16(read(source, group, weights[r]));
          }
          pack_strip(rows, words + m16 * 256);
        }
        std::byte* block = packed.data() + shape.block_offset(tile, group, half);
        std::memcpy(block, words, sizeof words);
        std::memcpy(block + kBlockNibbleBytes, scales, sizeof scales);
      }
    }
  };
  if (shape.rows * shape.k < int64_t{1} << 20) {
    for (int64_t tile = 0; tile < shape.num_tiles(); ++tile) pack_tile(tile, 0);
  } else {
    ThreadPool pool;
    pool.parallel_for(shape.num_tiles(), pack_tile);
  }
  return packed;
}

Int4Matrix unpack_cuda_int4(std::span<const std::byte> weight, int out_features, int in_features,
                            bool gate_up) {
  check_shape(out_features, in_features, kGroup, gate_up);
  NIBBLE_CHECK(weight.size() == cuda_int4_bytes(out_features, in_features), "{} bytes for {} x {}",
               weight.size(), out_features, in_features);
  const Shape shape{out_features, in_features};
  const auto count = static_cast<size_t>(shape.rows * shape.k);
  std::vector<uint8_t> nibbles(count / 2);
  std::vector<uint16_t> scales(static_cast<size_t>(shape.rows * shape.num_groups()));
  cuda_layout::unpack(shape, gate_up, reinterpret_cast<const uint8_t*>(weight.data()),
                      nibbles.data(), scales.data());
  Int4Matrix m{.out_features = out_features, .in_features = in_features, .group_size = kGroup};
  m.q.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const auto shifted = static_cast<int8_t>(i % 2 == 0 ? nibbles[i / 2] << 4 : nibbles[i / 2]);
    m.q[i] = static_cast<int8_t>(shifted >> 4);
  }
  for (const uint16_t bits : scales) m.scales.push_back(bf16_to_float(bits));
  return m;
}

}  // namespace nibble
