// WeightLayout::kCudaInt4: the bytes are described in backends/cuda/layout.h, which the kernels
// read. One layout serves every kernel; scales lie inline, rounded to bf16; groups are 128.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>

#include "pack/pack.h"

namespace nibble {

/// `gate_up`: the matrix is [gate; up] (out_features counts both) and its rows are interleaved by
/// eights, as the fused SiLU epilogue wants them. out_features must then be a multiple of 16.
std::vector<std::byte> pack_cuda_int4(const Int4Matrix& matrix, bool gate_up = false);
/// Rows in the portable layout, as checkpoints hold them.
struct PortableRows {
  int64_t out_features = 0;            // even
  const std::byte* nibbles = nullptr;  // [out/2, in]: low nibble = even row
  std::span<const float> scales;       // [out, in/128]
};
/// The same matrix from portable rows, `parts` below one another. On all cores: a 24B model has 22
/// billion nibbles.
std::vector<std::byte> pack_cuda_int4(std::span<const PortableRows> parts, int in_features,
                                      bool gate_up);
inline std::vector<std::byte> pack_cuda_int4(std::initializer_list<PortableRows> parts,
                                             int in_features, bool gate_up) {
  return pack_cuda_int4(std::span(parts.begin(), parts.size()), in_features, gate_up);
}
size_t cuda_int4_bytes(int out_features, int in_features);
Int4Matrix unpack_cuda_int4(std::span<const std::byte> weight, int out_features, int in_features,
                            bool gate_up = false);

}  // namespace nibble
