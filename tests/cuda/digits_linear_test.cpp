// The int4 linear in integers on the CPU: one row block times one slab of digits, with the loads,
// the masks and the wgmma (u8 x s8) done element by element as the PTX ISA describes them.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "backends/cuda/digits_layout.h"
#include "backends/cuda/layout.h"

namespace nibble {
namespace {

// Byte `k` of row `n` of operand B, as a descriptor with the 128-byte swizzle finds it: 8-row
// groups 1024 bytes apart, address bits 4 .. 6 xor bits 7 .. 9. `step` is the offset of the k step.
int operand_b_byte(int n, int k, int step) {
  const int address = n / 8 * 1024 + n % 8 * 128 + step + k;
  return address ^ ((address >> 7 & 7) << 4);
}

// Byte of a row's channel in the slab, as digits_layout.h says.
int channel_byte(int row, int channel) {
  return cuda_digits::chunk_byte(row, channel / 16) + channel % 8 * 2 + channel / 8 % 2;
}

TEST(DigitsLayout, RowsAndBytesAreEachOnce) {
  for (const int tokens : {1, 8, 9, 16}) {
    const cuda_digits::Shape shape{tokens, 300};
    EXPECT_EQ(shape.groups(), 3);
    std::set<int> bytes;
    for (int token = 0; token < shape.tile_tokens(); ++token)
      for (const int digit : {0, 1})
        for (int channel = 0; channel < 128; ++channel) {
          bytes.insert(channel_byte(cuda_digits::row_of(token, digit), channel));
        }
    EXPECT_EQ(static_cast<int>(bytes.size()), shape.factors_offset());
    EXPECT_EQ(*bytes.rbegin(), shape.factors_offset() - 1);
    EXPECT_EQ(shape.slab_bytes() % 16, 0);  // bulk copies
  }
}

TEST(DigitsLinear, IntegersAreExact) {
  constexpr int kTokens = 16, kColumns = 2 * kTokens;
  std::mt19937 rng(5);
  std::vector<uint8_t> nibbles(128 * 64);
  for (auto& byte : nibbles) byte = static_cast<uint8_t>(rng());
  const std::vector<float> scales(128, 1.0f);
  const cuda_layout::Shape weights{128, 128};
  std::vector<uint8_t> packed(static_cast<size_t>(weights.packed_bytes()));
  cuda_layout::pack(weights, false, nibbles.data(), scales.data(), packed.data());

  // The largest and the smallest integers are among them.
  std::vector<int> q(kTokens * 128);
  for (int& value : q) {
    value = static_cast<int>(rng() % (2 * cuda_digits::kLargest + 1)) - cuda_digits::kLargest;
  }
  for (int i = 0; i < 128; ++i) {
    q[static_cast<size_t>(i)] = cuda_digits::kLargest, q[static_cast<size_t>(128 + i)] = -q[0];
  }
  const cuda_digits::Shape shape{kTokens, 128};
  std::vector<int8_t> slab(static_cast<size_t>(shape.slab_bytes()));
  for (int token = 0; token < kTokens; ++token)
    for (int channel = 0; channel < 128; ++channel) {
      const int value = q[static_cast<size_t>(token * 128 + channel)], high = (value + 128) >> 8;
      ASSERT_GE(high, -128);
      ASSERT_LE(high, 127);
      const auto put = [&](int digit, int of_digit) {
        const int byte = channel_byte(cuda_digits::row_of(token, digit), channel);
        slab[static_cast<size_t>(byte)] = static_cast<int8_t>(of_digit);
      };
      put(0, high);
      put(1, value - 256 * high);
    }

  for (int half = 0; half < 2; ++half) {
    const uint8_t* block = packed.data() + weights.block_offset(0, 0, half);
    for (int m16 = 0; m16 < 4; ++m16)
      for (int lane = 0; lane < 32; ++lane) {
        const int g8 = lane / 4, t4 = lane % 4;
        // D of rows g8 and g8 + 8 of the warp's 16: every lane of the quad gives its part of k.
        std::vector<int64_t> digits(2 * kColumns);
        for (int of_quad = 0; of_quad < 4; ++of_quad)
          for (int k32 = 0; k32 < 4; ++k32) {
            uint32_t words[4];  // of this lane's 16 bytes: [k64 2][k16 4]
            std::memcpy(words, block + m16 * 1024 + (4 * g8 + of_quad) * 16 + k32 / 2 * 512,
                        sizeof words);
            const uint32_t first = words[k32 % 2 * 2], second = words[k32 % 2 * 2 + 1];
            const uint32_t a[4] = {first & 0x0f0f0f0fu, first & 0xf0f0f0f0u, second & 0x0f0f0f0fu,
                                   second & 0xf0f0f0f0u};
            for (int n = 0; n < kColumns; ++n)
              for (int r = 0; r < 4; ++r)  // r & 1: row g8 + 8; r / 2: k 16 ... 31 of the step
                for (int i = 0; i < 4; ++i) {
                  const int k = r / 2 * 16 + of_quad * 4 + i;
                  digits[static_cast<size_t>((r & 1) * kColumns + n)] +=
                      int64_t{a[r] >> (8 * i) & 255} *
                      slab[static_cast<size_t>(operand_b_byte(n, k, k32 * 32))];
                }
          }
        // What this thread has: of each eight columns 2 t4 and the next, a token's two digits.
        for (int octet = 0; octet < kTokens / 8; ++octet)
          for (int e = 0; e < 2; ++e)
            for (int hi = 0; hi < 2; ++hi) {
              const int column = (octet * 2 + e) * 8 + 2 * t4, token = 8 * octet + 2 * t4 + e;
              const int64_t* d = &digits[static_cast<size_t>(hi * kColumns + column)];
              const int64_t sum = d[0] * 256 + d[1];
              EXPECT_LT(std::abs(sum), int64_t{1} << 30);
              int64_t want = 0;
              const int row = half * 64 + m16 * 16 + g8 + 8 * hi;
              for (int k = 0; k < 128; ++k) {
                const uint8_t byte = nibbles[static_cast<size_t>(row * 64 + k / 2)];
                const int64_t u = ((k % 2 ? byte >> 4 : byte) & 15) ^ 8;  // q + 8
                want += u * q[static_cast<size_t>(token * 128 + k)];
              }
              ASSERT_EQ(sum, hi ? 16 * want : want) << row << " " << token;
            }
      }
  }
}

}  // namespace
}  // namespace nibble
