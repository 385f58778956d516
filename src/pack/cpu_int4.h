// WeightLayout::kCpuInt4, byte by byte. One layout for generic, AVX2 and AVX-512: the kernels
// stream it front to back and never shuffle.
//
//   tile t     = out features 16 t .. 16 t + 15; ceil(N / 16) tiles, the last one padded with q =
//   0, scale = 0 tile       = K / group groups, one after the other group      = 16 float scales
//   (one a row), then group / 8 blocks of 64 bytes block b    = in features 8 b .. 8 b + 7 of the
//   group. Byte 4 r + j (row r, j in 0..3) holds in its low nibble
//                q[r][8 b + j] + 8 and in its high nibble q[r][8 b + 4 + j] + 8
//
// So a 64-byte load gives, after one AND and one shift, two registers whose 32-bit lane r is four
// consecutive in features of row r as unsigned bytes: the weight operand of vpdpbusd and
// vpmaddubsw. The offset 8 is undone by starting the accumulator at -8 * sum(x), so it costs
// nothing. Scales stay float (6 % of the bytes at group 128): unpack(pack(x)) == x bit for bit; f16
// would save 3 % of the traffic but round what the quantizer chose. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include "pack/pack.h"

namespace nibble {

/// group_size must be a multiple of 32, in_features a multiple of group_size; q in [-8, 7].
std::vector<std::byte> pack_cpu_int4(const Int4Matrix& matrix);
Int4Matrix unpack_cpu_int4(std::span<const std::byte> weight, int out_features, int in_features,
                           int group_size);

}  // namespace nibble
