// SPDX-License-Identifier: Apache-2.0
#include "pack/int8.h"

#include <cstring>

#include "base/error.h"
#include "pack/cpu_int4.h"
#include "pack/cuda_int4.h"
#include "spec/weight_table.h"

namespace nibble {
namespace {

[[noreturn]] void refuse(WeightLayout layout) {
  fail(ErrorKind::kUnsupported, "{} is not an int8 layout", weight_layout_name(layout));
}

// The nearest multiple of 16 that leaves a remainder in -8..7.
int high_nibble(int q) { return (q + 8) >> 4; }

// Straight to the portable nibbles [out/2, 2 in], hi and lo of a row side by side: the lm_head of a
// 24B model has 0.7 billion weights, and these are the only copy.
std::vector<std::byte> pack_cuda_int8(const Int8Matrix& m) {
  const auto in = static_cast<size_t>(m.in_features), out = static_cast<size_t>(m.out_features),
             groups = static_cast<size_t>(m.in_features / m.group_size);
  std::vector<std::byte> nibbles((out + 1) / 2 * 2 * in);
  std::vector<float> scales(2 * m.scales.size());
  for (size_t row = 0; row < out; ++row) {
    std::byte* to = nibbles.data() + row / 2 * 2 * in;
    const int shift = row % 2 == 0 ? 0 : 4;
    for (size_t i = 0; i < in; ++i) {
      const int q = m.q[row * in + i], high = high_nibble(q), low = q - 16 * high;
      to[i] |= static_cast<std::byte>((high & 15) << shift);
      to[in + i] |= static_cast<std::byte>((low & 15) << shift);
    }
    for (size_t g = 0; g < groups; ++g) {
      const float scale = m.scales[row * groups + g];
      scales[2 * row * groups + g] = 16 * scale;
      scales[(2 * row + 1) * groups + g] = scale;
    }
  }
  return pack_cuda_int4({PortableRows{m.out_features, nibbles.data(), scales}}, 2 * m.in_features,
                        /*gate_up=*/false);
}

Int8Matrix unpack_cuda_int8(std::span<const std::byte> weight, Int8Matrix m) {
  const auto in = static_cast<size_t>(m.in_features), out = static_cast<size_t>(m.out_features),
             groups = static_cast<size_t>(m.in_features / m.group_size);
  const Int4Matrix both = unpack_cuda_int4(weight, m.out_features, 2 * m.in_features);
  m.q.resize(out * in);
  m.scales.resize(out * groups);
  for (size_t row = 0; row < out; ++row) {
    const int8_t* high = both.q.data() + 2 * row * in;
    for (size_t i = 0; i < in; ++i)
      m.q[row * in + i] = static_cast<int8_t>(16 * high[i] + high[in + i]);
    for (size_t g = 0; g < groups; ++g)
      m.scales[row * groups + g] = both.scales[(2 * row + 1) * groups + g];
  }
  return m;
}

}  // namespace

PackedLinear pack_int8(const Int8Matrix& m, WeightLayout layout) {
  for (const int8_t q : m.q) NIBBLE_CHECK(q >= -kMaxInt8 && q <= kMaxInt8, "{}", q);
  if (layout == WeightLayout::kInt8Portable) {
    PackedLinear packed{std::vector<std::byte>(m.q.size()), m.scales};
    std::memcpy(packed.weight.data(), m.q.data(), m.q.size());
    return packed;
  }
  if (layout == WeightLayout::kCudaInt8) return {pack_cuda_int8(m), {}};
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
    case WeightLayout::kCudaInt8: return cuda_int4_bytes(out_features, 2 * in_features);
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
  if (layout == WeightLayout::kCudaInt8) return unpack_cuda_int8(weight, std::move(m));
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
