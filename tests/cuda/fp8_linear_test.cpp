// The e4m3 int4 linear on the CPU: one row block times one slab of x, with the loads, the unpacking
// and wgmma.m64n64k32 done element by element as the PTX ISA describes them. Small integers, so
// that every sum is exact. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "backends/cuda/layout.h"
#include "backends/cuda/x_layout.h"
#include "base/half.h"

namespace nibble {
namespace {

using cuda_layout::kBlockNibbleBytes;

// What dequant_e4m3() of ptx/dequant.cuh makes of two words: the four registers of operand A.
void unpack(uint32_t (&a)[4], uint32_t first, uint32_t second) {
  a[0] = first & 0x0f0f0f0fu;
  a[1] = first >> 4 & 0x0f0f0f0fu;
  a[2] = second & 0x0f0f0f0fu;
  a[3] = second >> 4 & 0x0f0f0f0fu;
}

// Byte `k` of row `n` of operand B, as a descriptor with the 128-byte swizzle finds it: 8-row
// groups 1024 bytes apart, address bits 4 .. 6 xor bits 7 .. 9. `step` is the offset of the k step.
int operand_b_byte(int n, int k, int step) {
  const int address = n / 8 * 1024 + n % 8 * 128 + step + k;
  return address ^ ((address >> 7 & 7) << 4);
}

struct Block {
  int k = 128;
  std::vector<uint8_t> nibbles;
  std::vector<float> scales;    // [64]
  std::vector<uint8_t> packed;  // of 128 rows, of which the first block is used
};

Block make_block(int k) {
  Block b;
  b.k = k;
  std::mt19937 rng(static_cast<unsigned>(k));
  b.nibbles.resize(static_cast<size_t>(128 * k / 2));
  for (auto& byte : b.nibbles) byte = static_cast<uint8_t>(rng());
  b.scales.resize(128);
  for (auto& scale : b.scales) scale = std::ldexp(1.0f, static_cast<int>(rng() % 3) - 8);
  const cuda_layout::Shape shape{128, k};
  b.packed.resize(static_cast<size_t>(shape.packed_bytes()));
  cuda_layout::pack(shape, false, b.nibbles.data(), b.scales.data(), b.packed.data());
  return b;
}

// The slab of x [64, k] as quantize_x.cu writes it, of values that e4m3 holds as they are.
std::vector<uint8_t> make_slab(const std::vector<float>& x, int k) {
  std::vector<uint8_t> slab(cuda_x::kSlabBytes, 0xee);
  for (int row = 0; row < 64; ++row) {
    float most = 0, sum = 0;
    for (int c = 0; c < k; ++c)
      most = std::max(most, std::fabs(x[static_cast<size_t>(row * k + c)]));
    const float inverse = most > 0 ? 448.0f / most : 0.0f, scale = most / 448.0f;
    for (int chunk = 0; chunk < 8; ++chunk)
      for (int i = 0; i < 16; ++i) {
        const int c = cuda_x::channel_of(chunk, i);
        const uint8_t byte =
            c < k ? float_to_e4m3(x[static_cast<size_t>(row * k + c)] * inverse) : uint8_t{0};
        slab[static_cast<size_t>(cuda_x::chunk_byte(row, chunk) + i)] = byte;
        sum += e4m3_to_float(byte);
      }
    const float factor = scale * 512.0f, addend = -8.0f * scale * sum;
    std::memcpy(slab.data() + cuda_x::factor_byte(row), &factor, 4);
    std::memcpy(slab.data() + cuda_x::factor_byte(row) + 8, &addend, 4);
  }
  return slab;
}

void expect_product(int k) {
  const Block b = make_block(k);
  std::mt19937 rng(7);
  std::vector<float> x(static_cast<size_t>(64 * k));
  // 448 / 7 is a power of two: the values are exact in e4m3 where some |x| of the row is 7.
  for (auto& v : x) v = static_cast<float>(static_cast<int>(rng() % 15) - 7);
  for (int row = 0; row < 64; ++row) x[static_cast<size_t>(row * k)] = 7;
  for (int c = 0; c < k; ++c) x[static_cast<size_t>(5 * k + c)] = 0;  // a token of zeros
  const std::vector<uint8_t> slab = make_slab(x, k);
  for (int warp = 0; warp < 4; ++warp) {
    double d[32][32] = {};  // [lane][register]: m64n64, this warp's 16 rows
    for (int step = 0; step < 4; ++step) {
      double a[16][32];
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4, k64 = step / 2;
        uint32_t words[4], registers[4];
        std::memcpy(words, b.packed.data() + warp * 1024 + lane * 16 + k64 * 512, 16);
        unpack(registers, words[step % 2 * 2], words[step % 2 * 2 + 1]);
        for (int i = 0; i < 4; ++i)  // a0: (g, 4t ..), a1: (g + 8, same), a2: (g, 16 + 4t ..), a3
          for (int byte = 0; byte < 4; ++byte)
            a[g + 8 * (i & 1)][16 * (i >> 1) + 4 * t + byte] =
                double{e4m3_to_float(static_cast<uint8_t>(registers[i] >> (8 * byte)))};
      }
      for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 32; ++r) {
          const int row = lane / 4 + 8 * (r / 2 % 2), n = 8 * (r / 4) + 2 * (lane % 4) + r % 2;
          for (int i = 0; i < 32; ++i)
            d[lane][r] +=
                a[row][i] *
                double{e4m3_to_float(slab[static_cast<size_t>(operand_b_byte(n, i, step * 32))])};
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint16_t pair[2];
      std::memcpy(pair, b.packed.data() + kBlockNibbleBytes + g * 16 + warp * 4, 4);
      for (int r = 0; r < 32; ++r) {
        float s[4];  // promote(): eight j's factors and addends
        std::memcpy(s, slab.data() + cuda_x::kSlabXBytes + r / 4 * 64 + t * 16, 16);
        const int e = r % 4, token = 8 * (r / 4) + 2 * t + (e & 1);
        const int row = warp * 16 + g + 8 * (e / 2);
        const double got = (d[lane][r] * double{s[e & 1]} + double{s[2 + (e & 1)]}) *
                           double{bf16_to_float(pair[e / 2])};
        double want = 0;
        for (int c = 0; c < k; ++c) {
          const int u = b.nibbles[static_cast<size_t>(row * (k / 2) + c / 2)] >> (c % 2 * 4) & 15;
          want += double{x[static_cast<size_t>(token * k + c)]} * ((u ^ 8) - 8);
        }
        want *= double{b.scales[static_cast<size_t>(row)]};
        ASSERT_NEAR(got, want, 1e-4) << "row " << row << " token " << token;
      }
    }
  }
}

TEST(Fp8Linear, BlockTimesSlab) {
  expect_product(128);
  expect_product(72);  // k ends within a group
}

TEST(Fp8Linear, SlabPlacesAreEachUsedOnce) {
  std::set<int> bytes;
  for (int row = 0; row < 64; ++row) {
    std::set<int> channels;
    for (int chunk = 0; chunk < 8; ++chunk)
      for (int i = 0; i < 16; ++i) {
        channels.insert(cuda_x::channel_of(chunk, i));
        bytes.insert(cuda_x::chunk_byte(row, chunk) + i);
      }
    EXPECT_EQ(channels.size(), 128u);
    for (int i = 0; i < 4; ++i) {
      bytes.insert(cuda_x::factor_byte(row) + i);
      bytes.insert(cuda_x::factor_byte(row) + 8 + i);
    }
  }
  EXPECT_EQ(bytes.size(), static_cast<size_t>(cuda_x::kSlabBytes));
  EXPECT_EQ(*bytes.rbegin(), cuda_x::kSlabBytes - 1);
  EXPECT_EQ(cuda_x::packed_bytes(65, 129), size_t{4} * cuda_x::kSlabBytes);
}

TEST(Fp8Linear, CodesAreTheOffsetWeights) {
  for (int u = 0; u < 16; ++u) {
    EXPECT_EQ(e4m3_to_float(static_cast<uint8_t>(u)), std::ldexp(static_cast<float>(u), -9));
  }
}

}  // namespace
}  // namespace nibble
