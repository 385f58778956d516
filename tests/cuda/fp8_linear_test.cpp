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
// The same without a swizzle, 8-row groups 128 bytes apart, both halves of k at the same place.
int digit_byte(int n, int k) { return n / 8 * 128 + n % 8 * 16 + k % 16; }

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

// A token's digits as quantize_x.cu makes them.
void make_digits(float sum, uint8_t* digits) {
  float rest = -sum;
  for (int i = 0; i < 8; ++i) {
    const float unit = i < 4 ? cuda_x::kDigitBase : 1.0f;
    digits[i] = float_to_e4m3(rest / unit);
    rest -= e4m3_to_float(digits[i]) * unit;
  }
}

// The slab of x [64, k] in e4m3 already, as quantize_x.cu writes it.
std::vector<uint8_t> make_slab(const std::vector<float>& x, int k) {
  std::vector<uint8_t> slab(cuda_x::kSlabBytes);
  for (int row = 0; row < 64; ++row) {
    float sum = 0;
    for (int chunk = 0; chunk < 8; ++chunk)
      for (int i = 0; i < 16; ++i) {
        const int c = cuda_x::channel_of(chunk, i);
        const float value = c < k ? x[static_cast<size_t>(row * k + c)] : 0.0f;
        slab[static_cast<size_t>(cuda_x::chunk_byte(row, chunk) + i)] = float_to_e4m3(value);
        sum += value;
      }
    make_digits(sum, slab.data() + cuda_x::digits_byte(row));
  }
  return slab;
}

void expect_product(int k) {
  const Block b = make_block(k);
  std::mt19937 rng(7);
  std::vector<float> x(static_cast<size_t>(64 * k));
  for (auto& v : x) v = static_cast<float>(static_cast<int>(rng() % 31) - 15);
  for (int c = 0; c < k; ++c) {
    x[static_cast<size_t>(5 * k + c)] = 0;     // a token of zeros
    x[static_cast<size_t>(6 * k + c)] = -448;  // the largest sum there is
  }
  const std::vector<uint8_t> slab = make_slab(x, k);
  const auto value = [&](int at) { return double{e4m3_to_float(slab[static_cast<size_t>(at)])}; };
  for (int warp = 0; warp < 4; ++warp) {
    double d[32][32] = {};  // [lane][register]: m64n64, this warp's 16 rows
    for (int step = 0; step < 5; ++step) {
      double a[16][32];
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4, k64 = step / 2;
        uint32_t words[4], registers[4] = {};
        if (step < 4) {
          std::memcpy(words, b.packed.data() + warp * 1024 + lane * 16 + k64 * 512, 16);
          unpack(registers, words[step % 2 * 2], words[step % 2 * 2 + 1]);
        } else {  // offset_operand() of ptx/dequant.cuh
          registers[0] = registers[1] = t == 0 ? 0x30303030u : t == 1 ? 0x08080808u : 0u;
        }
        for (int i = 0; i < 4; ++i)  // a0: (g, 4t ..), a1: (g + 8, same), a2: (g, 16 + 4t ..), a3
          for (int byte = 0; byte < 4; ++byte)
            a[g + 8 * (i & 1)][16 * (i >> 1) + 4 * t + byte] =
                double{e4m3_to_float(static_cast<uint8_t>(registers[i] >> (8 * byte)))};
      }
      for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 32; ++r) {
          const int row = lane / 4 + 8 * (r / 2 % 2), n = 8 * (r / 4) + 2 * (lane % 4) + r % 2;
          for (int i = 0; i < 32; ++i)
            d[lane][r] += a[row][i] * (step < 4 ? value(operand_b_byte(n, i, step * 32))
                                                : value(cuda_x::kSlabXBytes + digit_byte(n, i)));
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t pair[2];
      std::memcpy(pair, b.packed.data() + kBlockNibbleBytes + lane / 4 * 16 + warp * 4, 4);
      for (int r = 0; r < 32; ++r) {
        const int token = 8 * (r / 4) + 2 * (lane % 4) + r % 2, high = r / 2 % 2;
        const int row = warp * 16 + lane / 4 + 8 * high;
        const double got = d[lane][r] * 512 * double{bf16_to_float(pair[high])};
        double want = 0;
        for (int c = 0; c < k; ++c) {
          const int u = b.nibbles[static_cast<size_t>(row * (k / 2) + c / 2)] >> (c % 2 * 4) & 15;
          want += double{x[static_cast<size_t>(token * k + c)]} * ((u ^ 8) - 8);
        }
        want *= double{b.scales[static_cast<size_t>(row)]};
        ASSERT_EQ(got, want) << "row " << row << " token " << token;
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
    for (int i = 0; i < 16; ++i) {
      bytes.insert(cuda_x::digits_byte(row) + i);
    }
  }
  EXPECT_EQ(bytes.size(), static_cast<size_t>(cuda_x::kSlabBytes));
  EXPECT_EQ(*bytes.rbegin(), cuda_x::kSlabBytes - 1);
  EXPECT_EQ((cuda_x::Shape{65, 129}.bytes()), 4 * cuda_x::kSlabBytes + 128 * 4);
}

TEST(Fp8Linear, DigitsMakeAnySum) {
  for (const float sum : {57344.0f, -57344.0f, 50000.25f, 1700.0f, 3 * 0x1p-9f, -0.7421875f}) {
    uint8_t digits[8];
    make_digits(sum, digits);
    float back = 0;
    for (int i = 0; i < 8; ++i) back += e4m3_to_float(digits[i]) * (i < 4 ? 32.0f : 1.0f);
    EXPECT_NEAR(back, -sum, std::max(0x1p-10f, std::fabs(sum) * 0x1p-14f)) << sum;
  }
}

TEST(Fp8Linear, CodesAreTheOffsetWeights) {
  for (int u = 0; u < 16; ++u) {
    EXPECT_EQ(e4m3_to_float(static_cast<uint8_t>(u)), std::ldexp(static_cast<float>(u), -9));
  }
}

}  // namespace
}  // namespace nibble
