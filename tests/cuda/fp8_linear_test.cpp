// The e4m3 int4 linear on the CPU: one row block times one slab of x, with the loads, the unpacking
// and the wgmma (e4m3 for the product, bf16 for taking off the offset) done element by element as
// the PTX ISA describes them. Small integers, so that every sum is exact.
// SPDX-License-Identifier: Apache-2.0
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
// Byte of element `k` (bf16) of row `n` without a swizzle: 8-row groups 128 bytes apart, the second
// eight elements `second` bytes further.
int sum_operand_byte(int n, int k, int second) {
  return k / 8 * second + n / 8 * 128 + n % 8 * 16 + k % 8 * 2;
}

uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  }
  return out;
}
// collects() and collect_scales() of ptx/dequant.cuh.
bool collects(int group, int lane) { return ((group ^ lane << 1) & 6) == 0; }
void collect(uint32_t (&scales)[2], uint32_t pair, int group, int lane) {
  if (!collects(group, lane)) return;
  scales[0] = byte_perm(scales[0], pair, 0x5432);
  scales[1] = byte_perm(scales[1], pair, 0x7632);
}

// 128 rows, of which the first block is used.
struct Weights {
  int k, groups;
  std::vector<uint8_t> nibbles;
  std::vector<float> scales;  // [128, groups]
  std::vector<uint8_t> packed;
};

Weights make_weights(int k) {
  Weights w{.k = k, .groups = (k + 127) / 128, .nibbles = {}, .scales = {}, .packed = {}};
  std::mt19937 rng(static_cast<unsigned>(k));
  w.nibbles.resize(static_cast<size_t>(128 * k / 2));
  for (auto& byte : w.nibbles) byte = static_cast<uint8_t>(rng());
  w.scales.resize(static_cast<size_t>(128 * w.groups));
  for (auto& scale : w.scales) scale = std::ldexp(1.0f, static_cast<int>(rng() % 3) - 8);
  const cuda_layout::Shape shape{128, k};
  w.packed.resize(static_cast<size_t>(shape.packed_bytes()));
  cuda_layout::pack(shape, false, w.nibbles.data(), w.scales.data(), w.packed.data());
  return w;
}

// A scale, exact in bf16 with every sum.
float factor_of(int row, int group) { return std::ldexp(1.0f, (row * 7 + group) % 5 - 2); }

// x [64, k] in e4m3 already and to be multiplied by factor_of(), as quantize_x.cu writes it: slabs,
// sums and scales.
std::vector<uint8_t> make_slabs(const std::vector<float>& x, int k) {
  const cuda_x::Shape shape{64, k};
  std::vector<uint8_t> out(static_cast<size_t>(shape.bytes()));
  for (int row = 0; row < 64; ++row) {
    for (int group = 0; group < shape.groups(); ++group) {
      float sum = 0;
      for (int chunk = 0; chunk < 8; ++chunk)
        for (int i = 0; i < 16; ++i) {
          const int c = group * 128 + cuda_x::channel_of(chunk, i);
          const float value = c < k ? x[static_cast<size_t>(row * k + c)] : 0.0f;
          out[static_cast<size_t>(shape.slab_offset(0, group) + cuda_x::chunk_byte(row, chunk) +
                                  i)] = float_to_e4m3(value);
          sum += value;
        }
      const float factor = factor_of(row, group);
      std::memcpy(out.data() + shape.factors_offset(group) + cuda_x::factor_byte(row), &factor, 4);
      sum *= cuda_x::kSumUnit * factor;
      const uint16_t high = float_to_bf16(sum), low = float_to_bf16(sum - bf16_to_float(high));
      uint8_t* sums = out.data() + shape.sums_offset(0, group);
      std::memcpy(sums + cuda_x::sum_byte(0, row, group), &high, 2);
      std::memcpy(sums + cuda_x::sum_byte(1, row, group), &low, 2);
    }
  }
  return out;
}

void expect_product(int k) {
  const Weights w = make_weights(k);
  std::mt19937 rng(7);
  std::vector<float> x(static_cast<size_t>(64 * k));
  for (auto& v : x) v = static_cast<float>(static_cast<int>(rng() % 31) - 15);
  for (int c = 0; c < k; ++c) {
    x[static_cast<size_t>(5 * k + c)] = 0;     // a token of zeros
    x[static_cast<size_t>(6 * k + c)] = -448;  // the largest sum there is
  }
  const std::vector<uint8_t> slabs = make_slabs(x, k);
  const cuda_x::Shape shape{64, k};
  const cuda_layout::Shape packed{128, k};
  for (int warp = 0; warp < 4; ++warp) {
    double sums[32][32] = {};  // [lane][register]: m64n64, this warp's 16 rows
    uint32_t collected[32][2] = {};
    auto row_of = [](int lane, int r) { return lane / 4 + 8 * (r / 2 % 2); };
    auto token_of = [](int lane, int r) { return 8 * (r / 4) + 2 * (lane % 4) + r % 2; };
    for (int group = 0; group < w.groups; ++group) {
      const uint8_t* block = w.packed.data() + packed.block_offset(0, group, 0);
      const uint8_t* slab = slabs.data() + shape.slab_offset(0, group);
      double temp[32][32] = {};
      for (int step = 0; step < 4; ++step) {
        double a[16][32];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          uint32_t words[4], registers[4];
          std::memcpy(words, block + warp * 1024 + lane * 16 + step / 2 * 512, 16);
          unpack(registers, words[step % 2 * 2], words[step % 2 * 2 + 1]);
          for (int i = 0; i < 4; ++i)  // a0: (g, 4t ..), a1: (g + 8, same), a2: (g, 16 + 4t ..), a3
            for (int byte = 0; byte < 4; ++byte)
              a[g + 8 * (i & 1)][16 * (i >> 1) + 4 * t + byte] =
                  double{e4m3_to_float(static_cast<uint8_t>(registers[i] >> (8 * byte)))};
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int r = 0; r < 32; ++r)
            for (int i = 0; i < 32; ++i)
              temp[lane][r] +=
                  a[row_of(lane, r)][i] *
                  double{e4m3_to_float(slab[operand_b_byte(token_of(lane, r), i, step * 32)])};
      }
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t pair;
        std::memcpy(&pair, block + kBlockNibbleBytes + lane / 4 * 16 + warp * 4, 4);
        collect(collected[lane], pair, group, lane);
        for (int r = 0; r < 32; ++r) {
          const auto bits = static_cast<uint16_t>(r / 2 % 2 ? pair >> 16 : pair);
          // The thread's 16 factors: four loads of 16 bytes, 64 bytes apart.
          const int i = r / 4 * 2 + r % 2;
          float factor;
          std::memcpy(&factor, slab + cuda_x::kSlabBytes + i / 4 * 64 + lane % 4 * 16 + i % 4 * 4,
                      4);
          sums[lane][r] += temp[lane][r] * double{factor} * double{bf16_to_float(bits)};
        }
      }
      if (group % cuda_x::kSumGroups != cuda_x::kSumGroups - 1 && group + 1 < w.groups) continue;
      // The k16 step: scales_operand() of ptx/dequant.cuh times the block of sums.
      double a[16][16];
      for (int lane = 0; lane < 32; ++lane) {
        const int down = group % 2 == 0 && collects(group, lane) ? 16 : 0;
        for (uint32_t& scales : collected[lane]) scales >>= down;
        for (int i = 0; i < 4; ++i)  // a0: (g, 2t ..), a1: (g + 8, same), a2: (g, 8 + 2t ..), a3
          for (int half = 0; half < 2; ++half)
            a[lane / 4 + 8 * (i & 1)][8 * (i >> 1) + 2 * (lane % 4) + half] =
                double{bf16_to_float(static_cast<uint16_t>(collected[lane][i & 1] >> (16 * half)))};
        collected[lane][0] = collected[lane][1] = 0;
      }
      const uint8_t* block_of_sums = slabs.data() + shape.sums_offset(0, group);
      for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 32; ++r)
          for (int i = 0; i < 16; ++i) {
            uint16_t bits;
            std::memcpy(
                &bits,
                block_of_sums + sum_operand_byte(token_of(lane, r), i, cuda_x::kSumPartBytes), 2);
            sums[lane][r] += a[row_of(lane, r)][i] * double{bf16_to_float(bits)};
          }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 32; ++r) {
        const int token = token_of(lane, r), row = warp * 16 + row_of(lane, r);
        double want = 0;
        for (int c = 0; c < k; ++c) {
          const int u = w.nibbles[static_cast<size_t>(row * (k / 2) + c / 2)] >> (c % 2 * 4) & 15;
          want += double{x[static_cast<size_t>(token * k + c)]} *
                  double{factor_of(token, c / 128)} * ((u ^ 8) - 8) *
                  double{w.scales[static_cast<size_t>(row * w.groups + c / 128)]};
        }
        ASSERT_EQ(sums[lane][r] * 512, want) << "row " << row << " token " << token;
      }
    }
  }
}

TEST(Fp8Linear, BlockTimesSlab) {
  expect_product(128);
  expect_product(72);       // k ends within a group
  expect_product(9 * 128);  // one group more than a block of sums
  expect_product(350);
}

TEST(Fp8Linear, PlacesAreEachUsedOnce) {
  std::set<int64_t> bytes;
  const cuda_x::Shape shape{64, 16 * 128};
  for (int row = 0; row < 64; ++row) {
    for (int group = 0; group < 16; ++group) {
      std::set<int> channels;
      for (int chunk = 0; chunk < 8; ++chunk)
        for (int i = 0; i < 16; ++i) {
          channels.insert(cuda_x::channel_of(chunk, i));
          bytes.insert(shape.slab_offset(0, group) + cuda_x::chunk_byte(row, chunk) + i);
        }
      EXPECT_EQ(channels.size(), 128u);
      for (int part = 0; part < 2; ++part)
        for (int i = 0; i < 2; ++i)
          bytes.insert(shape.sums_offset(0, group) + cuda_x::sum_byte(part, row, group) + i);
    }
    for (int group = 0; group < 16; ++group)
      for (int i = 0; i < 4; ++i)
        bytes.insert(shape.factors_offset(group) + cuda_x::factor_byte(row) + i);
  }
  EXPECT_EQ(bytes.size(), static_cast<size_t>(shape.bytes()));
  EXPECT_EQ(*bytes.rbegin(), shape.bytes() - 1);
  EXPECT_EQ((cuda_x::Shape{65, 129}.bytes()),
            4 * cuda_x::kSlabBytes + 2 * cuda_x::kSumBytes + 128 * 4);
}

// A lane of prepare_scales() reads two neighbouring scales and writes them side by side; a thread
// of wgmma finds those of its tokens in 32 bytes.
TEST(Fp8Linear, PairsOfScales) {
  for (int lane = 0; lane < 32; ++lane) {
    const int row = cuda_x::factor_row(lane * 8);
    EXPECT_EQ(row % 2, 0);
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(cuda_x::factor_byte(row + i), lane * 8 + 4 * i);
      EXPECT_EQ(cuda_x::factor_row(lane * 8 + 4 * i), row + i);
      EXPECT_EQ(cuda_x::pair_byte(row + i), cuda_x::pair_byte(row) + 2 * i);
    }
  }
  for (int t4 = 0; t4 < 4; ++t4)
    for (int octet = 0; octet < 8; ++octet)
      EXPECT_EQ(cuda_x::pair_byte(8 * octet + 2 * t4), t4 * 32 + octet * 4);
}

TEST(Fp8Linear, CodesAreTheOffsetWeights) {
  for (int u = 0; u < 16; ++u) {
    EXPECT_EQ(e4m3_to_float(static_cast<uint8_t>(u)), std::ldexp(static_cast<float>(u), -9));
  }
}

}  // namespace
}  // namespace nibble
