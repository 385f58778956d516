// From a portable weight to the bits a backend's kernels read. Pure functions of host memory; every
// layout has its inverse: unpack(pack(x)) == x. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "spec/engine_plan.h"

namespace nibble {

/// An int4 linear, unpacked: what every int4 layout is packed from and unpacked to.
struct Int4Matrix {
  int out_features = 0, in_features = 0, group_size = 128;
  std::vector<int8_t> q;      // [out, in], -8..7
  std::vector<float> scales;  // [out, in/group]
};

struct PackedLinear {
  std::vector<std::byte> weight;  // "<name>.weight"
  std::vector<float> scales;      // "<name>.scales"; empty when inline
};

PackedLinear pack_int4(const Int4Matrix& matrix, WeightLayout layout);
/// Bytes of PackedLinear::weight for these dimensions.
size_t packed_int4_bytes(int out_features, int in_features, int group_size, WeightLayout layout);
Int4Matrix unpack_int4(std::span<const std::byte> weight, std::span<const float> scales,
                       int out_features, int in_features, int group_size, WeightLayout layout);

/// Portable nibbles [out/2, in] <-> int8 [out, in]. With an odd number of rows (a vocabulary) the
/// last byte row's high nibbles are zero.
std::vector<int8_t> unpack_nibbles(const std::byte* nibbles, int64_t out_features,
                                   int64_t in_features);
std::vector<std::byte> pack_nibbles(std::span<const int8_t> q, int64_t out_features,
                                    int64_t in_features);

}  // namespace nibble
