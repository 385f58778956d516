// SPDX-License-Identifier: Apache-2.0
#include "pack/int8.h"

#include <cstring>

#include "base/error.h"
#include "pack/cpu_int4.h"
#include "spec/weight_table.h"

namespace nibble {
namespace {

[[noreturn]] void refuse(WeightLayout layout) {
  fail(ErrorKind::kUnsupported, "{} is not an int8 layout", weight_layout_name(layout));
}

// The nearest multiple of 16 that leaves a remainder in -8..7.
int high_nibble(int q) { return (q + 8) >> 4; }

}  // namespace

PackedLinear pack_int8(const Int8Matrix& m, WeightLayout layout) {
  for (const int8_t q : m.q) NIBBLE_CHECK(q >= -kMaxInt8 && q <= kMaxInt8, "{}", q);
  if (layout == WeightLayout::kInt8Portable) {
    PackedLinear packed{std::vector<std::byte>(m.q.size()), m.scales};
    std::memcpy(packed.weight.data(), m.q.data(), m.q.size());
    return packed;
  }
  if (layout != WeightLayout::kCpuInt8) refuse(layout);
  Int4Matrix plane{.out_features = m.out_features,
                   .in_features = m.in_features,
                   .group_size = m.group_size,
                   .q = m.q,
                   .scales = m.scales};
  for (int8_t& q : plane.q) q = static_cast<int8_t>(high_nibble(q));
  for (float& scale : plane.scales) scale *= 16;
  PackedLinear packed{pack_cpu_int4(plane), {}};
  for (size_t i = 0; i < m.q.size(); ++i)
    plane.q[i] = static_cast<int8_t>(m.q[i] - 16 * plane.q[i]);
  plane.scales = m.scales;
  const std::vector<std::byte> low = pack_cpu_int4(plane);
  packed.weight.insert(packed.weight.end(), low.begin(), low.end());
  return packed;
}

size_t packed_int8_bytes(int out_features, int in_features, int group_size, WeightLayout layout) {
  switch (layout) {
    case WeightLayout::kInt8Portable:
      return static_cast<size_t>(out_features) * static_cast<size_t>(in_features);
    case WeightLayout::kCpuInt8:
      return 2 * packed_int4_bytes(out_features, in_features, group_size, WeightLayout::kCpuInt4);
    default: refuse(layout);
  }
}

Int8Matrix unpack_int8(std::span<const std::byte> weight, std::span<const float> scales,
                       int out_features, int in_features, int group_size, WeightLayout layout) {
  NIBBLE_CHECK(weight.size() == packed_int8_bytes(out_features, in_features, group_size, layout),
               "{} bytes", weight.size());
  Int8Matrix m{.out_features = out_features, .in_features = in_features, .group_size = group_size};
  if (layout == WeightLayout::kInt8Portable) {
    m.q.resize(weight.size());
    std::memcpy(m.q.data(), weight.data(), weight.size());
    m.scales.assign(scales.begin(), scales.end());
    return m;
  }
  const size_t half = weight.size() / 2;
  const Int4Matrix high =
      unpack_cpu_int4(weight.first(half), out_features, in_features, group_size);
  Int4Matrix low = unpack_cpu_int4(weight.subspan(half), out_features, in_features, group_size);
  m.q = std::move(low.q);
  for (size_t i = 0; i < m.q.size(); ++i) m.q[i] = static_cast<int8_t>(m.q[i] + 16 * high.q[i]);
  m.scales = std::move(low.scales);
  return m;
}

}  // namespace nibble
