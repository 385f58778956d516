// lm_head in 8 bits, for the backends: integers -119..119 with one scale per row and group.
//   kInt8Portable  int8 [out, in] as the checkpoint holds it, scales beside it
//   kCpuInt8       two matrices in the layout of pack/cpu_int4.h, one behind the other: first hi
//   with
//                  scales 16 s, then lo with scales s, where q = 16 hi + lo and both lie in -8..7.
//                  The int4 kernels run one after the other and add, so 8 bits need no kernel of
//                  their own.
//   kCudaInt8      one kCudaInt4 matrix [out, 2 in]: a row is its hi, then its lo, for inputs that
//                  come twice. Scales are rounded to bf16 there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "pack/pack.h"

namespace nibble {

struct Int8Matrix {
  int out_features = 0, in_features = 0, group_size = 128;
  std::vector<int8_t> q;      // [out, in], -kMaxInt8..kMaxInt8
  std::vector<float> scales;  // [out, in/group]
};

PackedLinear pack_int8(const Int8Matrix& matrix, WeightLayout layout);
size_t packed_int8_bytes(int out_features, int in_features, int group_size, WeightLayout layout);
Int8Matrix unpack_int8(std::span<const std::byte> weight, std::span<const float> scales,
                       int out_features, int in_features, int group_size, WeightLayout layout);

}  // namespace nibble
