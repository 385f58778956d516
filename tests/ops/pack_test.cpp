// Every int4 layout: unpack(pack(x)) == x, and the bytes are where the header says.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "backends/cuda/layout.h"
#include "base/error.h"
#include "base/half.h"
#include "bench/op_cases.h"
#include "ops/cpu_int4_layout.h"
#include "pack/cpu_int4.h"
#include "pack/cuda_int4.h"
#include "pack/int8.h"
#include "spec/weight_table.h"

namespace nibble {
namespace {

Int4Matrix random_matrix(int n, int k, int group, uint64_t seed) {
  Int4Matrix m{.out_features = n, .in_features = k, .group_size = group};
  m.q.resize(static_cast<size_t>(n) * static_cast<size_t>(k));
  for (size_t i = 0; i < m.q.size(); ++i) {
    m.q[i] =
        static_cast<int8_t>(static_cast<int>(std::abs(ops::normal_value(seed, i)) * 1000) % 16 - 8);
  }
  m.scales.resize(m.q.size() / static_cast<size_t>(group));
  ops::fill_normal(m.scales, seed + 1);  // any sign, any bits
  return m;
}

TEST(Pack, RoundTripsEveryLayoutBitForBit) {
  const int shapes[][3] = {
      {2, 64, 64}, {16, 128, 128}, {18, 128, 64}, {34, 256, 32}, {66, 512, 256}};
  for (const WeightLayout layout : {WeightLayout::kInt4Portable, WeightLayout::kCpuInt4}) {
    for (const auto& [n, k, group] : shapes) {
      const Int4Matrix m = random_matrix(n, k, group, static_cast<uint64_t>(n));
      const PackedLinear packed = pack_int4(m, layout);
      const Int4Matrix back = unpack_int4(packed.weight, packed.scales, n, k, group, layout);
      EXPECT_EQ(back.q, m.q) << weight_layout_name(layout) << ' ' << n;
      EXPECT_EQ(back.scales, m.scales) << weight_layout_name(layout) << ' ' << n;
    }
  }
}

TEST(Pack, AnOddRowHasNoPair) {
  const Int4Matrix m = random_matrix(5, 64, 32, 3);
  const PackedLinear packed = pack_int4(m, WeightLayout::kInt4Portable);
  EXPECT_EQ(packed.weight.size(), 3u * 64);
  EXPECT_EQ(unpack_int4(packed.weight, packed.scales, 5, 64, 32, WeightLayout::kInt4Portable).q,
            m.q);
  for (size_t i = 2 * 64; i < 3 * 64; ++i)
    EXPECT_EQ(std::to_integer<int>(packed.weight[i]) >> 4, 0);
}

TEST(Pack, Int8RoundTripsBitForBit) {
  for (const WeightLayout layout :
       {WeightLayout::kInt8Portable, WeightLayout::kCpuInt8, WeightLayout::kCudaInt8}) {
    for (const auto& [n, k, group] :
         {std::array{1, 64, 64}, {17, 128, 128}, {34, 256, 32}, {200, 384, 128}}) {
      const bool cuda = layout == WeightLayout::kCudaInt8;
      if (cuda && group != 128) continue;
      const Int4Matrix four = random_matrix(n, k, group, static_cast<uint64_t>(n));
      Int8Matrix m{n, k, group, four.q, four.scales};
      for (size_t i = 0; i < m.q.size(); ++i)  // every value there is
        m.q[i] = static_cast<int8_t>(static_cast<int>(i % (2 * kMaxInt8 + 1)) - kMaxInt8);
      if (cuda) ops::round_to_bf16(m.scales);
      const PackedLinear packed = pack_int8(m, layout);
      EXPECT_EQ(packed.weight.size(), packed_int8_bytes(n, k, group, layout));
      const Int8Matrix back = unpack_int8(packed.weight, packed.scales, n, k, group, layout);
      EXPECT_EQ(back.q, m.q) << weight_layout_name(layout) << ' ' << n;
      EXPECT_EQ(back.scales, m.scales) << weight_layout_name(layout) << ' ' << n;
    }
  }
}

TEST(Pack, CpuLayoutIsWhatItsHeaderSays) {
  const int n = 19, k = 256, group = 128;
  const Int4Matrix m = random_matrix(n, k, group, 9);
  const std::vector<std::byte> bytes = pack_cpu_int4(m);
  ASSERT_EQ(bytes.size(), 2u * 2u * (64 + 1024));
  const auto at = [&](int row, int channel) {  // straight from the words of pack/cpu_int4.h
    const size_t begin = static_cast<size_t>(row / 16 * 2 + channel / 128) * (64 + 1024);
    const int c = channel % 128;
    const int byte = std::to_integer<int>(
        bytes[begin + 64 + static_cast<size_t>(c / 8 * 64 + 4 * (row % 16) + c % 4)]);
    return (c % 8 < 4 ? byte & 15 : byte >> 4) - 8;
  };
  for (int row = 0; row < n; ++row) {
    for (int c = 0; c < k; ++c)
      ASSERT_EQ(at(row, c), m.q[static_cast<size_t>(row * k + c)]) << row << ' ' << c;
  }
  for (int row = n; row < 32; ++row) EXPECT_EQ(at(row, 5), 0);  // padding rows
}

TEST(Pack, CudaLayoutIsThatOfTheKernelsHeader) {
  const int shapes[][2] = {{8, 128}, {128, 256}, {200, 384}, {272, 128}, {2048, 1024}};
  for (const auto& [n, k] : shapes) {
    for (const bool gate_up : {false, true}) {
      if (gate_up && n % 16 != 0) continue;
      const Int4Matrix m = random_matrix(n, k, 128, static_cast<uint64_t>(n + gate_up));
      std::vector<uint8_t> nibbles(m.q.size() / 2);
      for (size_t i = 0; i < m.q.size(); ++i) {
        nibbles[i / 2] |= static_cast<uint8_t>((m.q[i] & 15) << (i % 2 * 4));
      }
      const cuda_layout::Shape shape{n, k};
      std::vector<uint8_t> want(static_cast<size_t>(shape.packed_bytes()));
      cuda_layout::pack(shape, gate_up, nibbles.data(), m.scales.data(), want.data());
      const std::vector<std::byte> got = pack_cuda_int4(m, gate_up);
      ASSERT_EQ(got.size(), want.size());
      ASSERT_EQ(std::memcmp(got.data(), want.data(), want.size()), 0) << n << 'x' << k << gate_up;
      const Int4Matrix back = unpack_cuda_int4(got, n, k, gate_up);
      EXPECT_EQ(back.q, m.q);
      for (size_t i = 0; i < m.scales.size(); ++i) {
        ASSERT_EQ(back.scales[i], bf16_to_float(float_to_bf16(m.scales[i])));
      }
    }
  }
}

TEST(Pack, RefusesValuesOutsideFourBits) {
  Int4Matrix m = random_matrix(16, 64, 64, 1);
  m.q[77] = 8;
  EXPECT_THROW(pack_cpu_int4(m), Error);
  Int4Matrix wide = random_matrix(16, 128, 128, 1);
  wide.q[77] = -9;
  EXPECT_THROW(pack_cuda_int4(wide), Error);
  m.q[77] = -9;
  EXPECT_THROW(pack_cpu_int4(m), Error);
}

TEST(Pack, RefusesAWrongByteCount) {
  const std::vector<std::byte> bytes(100);
  EXPECT_THROW(unpack_cpu_int4(bytes, 16, 64, 64), Error);
}

}  // namespace
}  // namespace nibble
