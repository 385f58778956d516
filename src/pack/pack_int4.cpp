// pack_int4 and its inverse: which file packs which layout.
// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "ops/cpu_int4_layout.h"
#include "pack/cpu_int4.h"
#include "pack/cuda_int4.h"
#include "pack/pack.h"

namespace nibble {
namespace {

[[noreturn]] void refuse(WeightLayout layout) {
  fail(ErrorKind::kUnsupported, "{} is not an int4 layout that this build can pack",
       weight_layout_name(layout));
}

}  // namespace

PackedLinear pack_int4(const Int4Matrix& matrix, WeightLayout layout) {
  switch (layout) {
    case WeightLayout::kInt4Portable:
      return {pack_nibbles(matrix.q, matrix.out_features, matrix.in_features), matrix.scales};
    case WeightLayout::kCpuInt4: return {pack_cpu_int4(matrix), {}};
    case WeightLayout::kCudaInt4: return {pack_cuda_int4(matrix), {}};
    default: refuse(layout);
  }
}

size_t packed_int4_bytes(int out_features, int in_features, int group_size, WeightLayout layout) {
  switch (layout) {
    case WeightLayout::kInt4Portable:
      return static_cast<size_t>((out_features + 1) / 2) * static_cast<size_t>(in_features);
    case WeightLayout::kCpuInt4:
      return static_cast<size_t>(cpu_int4_num_tiles(out_features)) *
             cpu_int4_tile_bytes(in_features, group_size);
    case WeightLayout::kCudaInt4: return cuda_int4_bytes(out_features, in_features);
    default: refuse(layout);
  }
}

Int4Matrix unpack_int4(std::span<const std::byte> weight, std::span<const float> scales,
                       int out_features, int in_features, int group_size, WeightLayout layout) {
  const int64_t elements = int64_t{out_features} * in_features;
  switch (layout) {
    case WeightLayout::kInt4Portable:
      NIBBLE_CHECK(weight.size() ==
                       packed_int4_bytes(out_features, in_features, group_size, layout) &&
                   static_cast<int64_t>(scales.size()) * group_size == elements);
      return {.out_features = out_features,
              .in_features = in_features,
              .group_size = group_size,
              .q = unpack_nibbles(weight.data(), out_features, in_features),
              .scales = {scales.begin(), scales.end()}};
    case WeightLayout::kCpuInt4:
      return unpack_cpu_int4(weight, out_features, in_features, group_size);
    case WeightLayout::kCudaInt4: return unpack_cuda_int4(weight, out_features, in_features);
    default: refuse(layout);
  }
}

}  // namespace nibble
