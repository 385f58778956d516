// The CUDA weight layout: packing is invertible and puts every nibble where the kernels expect it.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/layout.h"
#include "base/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>
#include <vector>

namespace nibble::cuda_layout {
namespace {

void round_trip(int64_t rows, int64_t k, bool interleave) {
  const Shape shape{rows, k};
  std::mt19937 rng(static_cast<unsigned>(rows * 31 + k));
  std::vector<uint8_t> nibbles(static_cast<size_t>(rows * k / 2));
  for (auto& byte : nibbles) byte = static_cast<uint8_t>(rng());
  std::vector<float> scales(static_cast<size_t>(rows * shape.num_groups()));
  for (auto& scale : scales)
    scale = std::ldexp(1.0f + (rng() % 128) / 128.0f, -8);  // on the bf16 grid
  std::vector<uint8_t> packed(static_cast<size_t>(shape.packed_bytes()), 0xee);
  pack(shape, interleave, nibbles.data(), scales.data(), packed.data());

  std::vector<uint8_t> nibbles_back(nibbles.size());
  std::vector<uint16_t> scales_back(scales.size());
  unpack(shape, interleave, packed.data(), nibbles_back.data(), scales_back.data());
  EXPECT_EQ(nibbles, nibbles_back);
  for (size_t i = 0; i < scales.size(); ++i) ASSERT_EQ(bf16_bits(scales[i]), scales_back[i]);
}

TEST(CudaLayout, RoundTrip) {
  round_trip(128, 128, false);
  round_trip(384, 640, false);
  round_trip(256, 256, true);
  round_trip(1024, 384, true);
}

TEST(CudaLayout, RoundTripPadded) {
  round_trip(200, 192, false);
  round_trip(16, 64, true);
  round_trip(1, 2, false);
}

TEST(CudaLayout, EveryNibbleHasItsOwnPlace) {
  std::set<std::pair<int, int>> places;
  std::set<int> scale_places;
  for (int row = 0; row < kBlockRows; ++row) {
    scale_places.insert(scale_place(row));
    for (int k = 0; k < kGroup; ++k) {
      const NibblePlace place = nibble_place(row, k);
      ASSERT_GE(place.word, 0);
      ASSERT_LT(place.word, kBlockNibbleBytes / 4);
      places.insert({place.word, place.shift});
    }
  }
  EXPECT_EQ(places.size(), static_cast<size_t>(kBlockRows * kGroup));
  EXPECT_EQ(scale_places.size(), static_cast<size_t>(kBlockRows));
  EXPECT_EQ(*scale_places.rbegin(), kBlockRows - 1);
}

TEST(CudaLayout, WordIsTheOperandAFragment) {
  // Lane 13 (g 3, t 1), tile m16 2, second k64, k16 step 1: registers a0..a3 of PTX's m16n8k16.
  const int row = 32 + 3, k = 64 + 16 + 2;
  const int word = ((2 * 2 + 1) * 32 + 13) * 4 + 1;
  const int expect[8][3] = {{row, k, 0},          {row, k + 1, 16},    {row + 8, k, 4},
                            {row + 8, k + 1, 20}, {row, k + 8, 8},     {row, k + 9, 24},
                            {row + 8, k + 8, 12}, {row + 8, k + 9, 28}};
  for (const auto& e : expect) {
    EXPECT_EQ(nibble_place(e[0], e[1]).word, word);
    EXPECT_EQ(nibble_place(e[0], e[1]).shift, e[2]);
  }
}

TEST(CudaLayout, GateAndUpShareAThread) {
  const Shape shape{256, 128};
  EXPECT_EQ(source_row(shape, true, 0), 0);
  EXPECT_EQ(source_row(shape, true, 8), 128);
  EXPECT_EQ(source_row(shape, true, 16), 8);
  EXPECT_EQ(source_row(shape, true, 31), 128 + 15);
}

// What linear_small.cu multiplies by: a byte of a word as it lies, and its upper nibble, are bf16
// numbers in units of 2^-133; the sums of the second come off those of the first (ptx/dequant.cuh).
TEST(CudaLayout, BytesAreBf16Numbers) {
  const auto value = [](uint32_t bits) {
    return std::ldexp(double{bf16_to_float(static_cast<uint16_t>(bits))}, 133);
  };
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const uint32_t u = byte & 15, u8 = byte >> 4;  // of rows g and g + 8
    EXPECT_EQ(value(byte & 0x00ff) - value(byte & 0x00f0), u);
    EXPECT_EQ(value(byte & 0x00f0), 16 * u8);
  }
  EXPECT_EQ(value(0x8088) - value(0x8080), -8);
  EXPECT_EQ(value(0x8080), 16 * -8);
}

}  // namespace
}  // namespace nibble::cuda_layout
