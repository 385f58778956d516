// int4 -> bf16 in 9 instructions per 8 weights (4 LOP3, 1 SHF, 4 HFMA2.BF16), exact up to the one
// rounding of (u - 8) * scale.
//
// A word's nibbles masked in place are subnormal bf16 numbers (layout.h): u * 2^-133 in the low
// slots (row g), u * 2^-129 in the high ones (row g+8). With S = scale * 2^120 (row g+8: * 2^116)
// and C = -scale * 2^-10, fma(bits, S, C) = (u - 8) * scale * 2^-13, rounded once: both S and C are
// exact. The epilogue multiplies by kDequantUndo = 2^13. Limits: scale < 2^7.
// No magic number to OR in, no subtraction, no second rounding; the usual 0x4300 form for bf16
// costs 15. fma.rn.bf16x2 takes subnormal inputs at full speed (measured, docs/kernels.md).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble::ptx {

inline constexpr float kDequantUndo = 8192.0f;

__device__ __forceinline__ uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t bf16x2_mul(uint32_t a, uint32_t b) {
  // -0 as the addend keeps it a plain product.
  return bf16x2_fma(a, b, 0x80008000u);
}

// Per (row g, row g+8) and group: duplicated multiplier and addend.
struct RowScales {
  uint32_t s_lo, s_hi, c_lo, c_hi;
};
// pair: bf16 scale of row g (low half) and of row g+8 (high half).
__device__ __forceinline__ RowScales row_scales(uint32_t pair) {
  const uint32_t s = bf16x2_mul(pair, 0x79807b80u);  // 2^116 : 2^120
  const uint32_t c = bf16x2_mul(pair, 0xba80ba80u);  // -2^-10
  return {__byte_perm(s, s, 0x1010), __byte_perm(s, s, 0x3232), __byte_perm(c, c, 0x1010),
          __byte_perm(c, c, 0x3232)};
}

// One word -> operand A registers of a 16x16 tile.
__device__ __forceinline__ void dequant(uint32_t (&a)[4], uint32_t word, const RowScales& r) {
  const uint32_t upper = word >> 8;
  a[0] = bf16x2_fma(word & 0x000f000fu, r.s_lo, r.c_lo);
  a[1] = bf16x2_fma(word & 0x00f000f0u, r.s_hi, r.c_hi);
  a[2] = bf16x2_fma(upper & 0x000f000fu, r.s_lo, r.c_lo);
  a[3] = bf16x2_fma(upper & 0x00f000f0u, r.s_hi, r.c_hi);
}

// int4 -> bf16 in 4 instructions per 8 weights (3 LOP3, 1 PRMT), exact, scales left to the sums: a
// word's bytes as they lie are subnormal bf16 numbers too, (u + 16 * u') * 2^-133 with u of row g
// and u' of row g + 8. Rows g get them whole, rows g + 8 the upper nibble, and add_pairs() takes
// the latter's sums off the former's. x must be multiplied by kPairsX first, or products are
// subnormal; sums are kPairsUndo times too small, and begin with what offset_pairs() gives for the
// same x: -8 times its sum, in both rows' units. Limits: |x| < 2^63; results below 2^-57 lose
// precision.
inline constexpr uint32_t kPairsX = 0x5f805f80u;  // 2^64, twice
inline constexpr float kPairsUndo = 0x1p69f;
__device__ __forceinline__ void mask_pairs(uint32_t (&a)[4], uint32_t word) {
  a[0] = word & 0x00ff00ffu;
  a[1] = word & 0x00f000f0u;
  a[2] = __byte_perm(word, 0, 0x4341);
  a[3] = a[2] & 0x00f000f0u;
}
__device__ __forceinline__ void offset_pairs(uint32_t (&a)[4]) {
  a[0] = a[2] = 0x80888088u;  // -(8 + 128) * 2^-133
  a[1] = a[3] = 0x80808080u;  // -128 * 2^-133
}
// pair: the bf16 scale of row g (low half) and of row g + 8. d, sums: as mma.m16n8k16 has them.
__device__ __forceinline__ void add_pairs(float (&sums)[4], const float (&d)[4], uint32_t pair) {
  const float scale = __uint_as_float(pair << 16);
  const float scale8 = __uint_as_float(pair & 0xffff0000u) * 0.0625f;
  sums[0] = fmaf(scale, d[0] - d[2], sums[0]);
  sums[1] = fmaf(scale, d[1] - d[3], sums[1]);
  sums[2] = fmaf(scale8, d[2], sums[2]);
  sums[3] = fmaf(scale8, d[3], sums[3]);
}

// int4 -> e4m3 in 3 instructions per 8 weights (2 LOP3, 1 SHF), exact: a byte 0 .. 15 read as e4m3
// is u * 2^-9 (below 8 a subnormal, from 8 on the first normal binade, which has the same step). So
// the product is with u = q + 8, and 8 times the sum of x has to come off (collect_scales() below).
// Two words (the k16 steps of one k32 step) -> operand A of wgmma.m64nNk32: slot 4t + i of each 16
// is k = 2t
// + {0, 8, 1, 9}[i], the order in which quantize_x.cu stores x.
__device__ __forceinline__ void dequant_e4m3(uint32_t (&a)[4], uint32_t first, uint32_t second) {
  a[0] = first & 0x0f0f0f0fu;
  a[1] = first >> 4 & 0x0f0f0f0fu;
  a[2] = second & 0x0f0f0f0fu;
  a[3] = second >> 4 & 0x0f0f0f0fu;
  // NOTE: or the compiler sinks the masks below the wgmma_fence() that must come after them.
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));
}

// int4 -> operand A (u8) of a group's four steps of wgmma.m64nNk32 in 2 instructions per 8 weights:
// u in the rows g, 16 * u in the rows g + 8, both as they lie in a lane's words. The order of k is
// dequant_e4m3()'s, in which digits_layout.h stores x.
__device__ __forceinline__ void mask_digits(uint32_t (&a)[4][4], const uint32_t (&words)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t &low = a[i / 2][i % 2 * 2], &high = a[i / 2][i % 2 * 2 + 1];
    low = words[i / 4][i % 4] & 0x0f0f0f0fu;
    high = words[i / 4][i % 4] & 0xf0f0f0f0u;
    asm volatile("" : "+r"(low), "+r"(high));  // as above
  }
}
// Adds a group's products of eight tokens, as two wgmma eights of columns leave them, to a thread's
// sums: rows g and g + 8, tokens 2t and 2t + 1. d: of a token's two digits, row g then row g + 8,
// token 2t then 2t + 1. pair: the rows' scales, bf16; factors: of the tokens (digits_layout.h).
__device__ __forceinline__ void add_digits(float (&sums)[4], const int (&d)[8], uint32_t pair,
                                           const float (&factors)[4]) {
  const float scale = __uint_as_float(pair << 16), scale8 = __uint_as_float(pair & 0xffff0000u);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const auto sum = static_cast<float>(d[4 * e] * 256 + d[4 * e + 1]);
    const auto sum8 = static_cast<float>(d[4 * e + 2] * 256 + d[4 * e + 3]);
    const float by = factors[2 * e], offset = factors[2 * e + 1];
    sums[e] = fmaf(scale, fmaf(sum, by, offset), sums[e]);
    sums[2 + e] = fmaf(scale8, fmaf(sum8, by * 0.0625f, offset), sums[2 + e]);
  }
}

// Operand A (bf16, 64 x 16) of the k16 step that takes off what the offset adds: the scales of
// eight groups, twice. Lane t of four holds those of groups 2t and 2t + 1, of row g in scales[0]
// and row g + 8 in [1], from zeros on; `pair` are the two rows' scales of `group` (bf16, row g in
// the low half). Groups come in order: the second of two moves the first down.
__device__ __forceinline__ bool collects(int group, int lane) {
  return ((group ^ lane << 1) & 6) == 0;
}
__device__ __forceinline__ void collect_scales(uint32_t (&scales)[2], uint32_t pair, int group,
                                               int lane) {
  if (!collects(group, lane)) return;
  scales[0] = __byte_perm(scales[0], pair, 0x5432);
  scales[1] = __byte_perm(scales[1], pair, 0x7632);
}
// `last`: the last group that was collected.
__device__ __forceinline__ void scales_operand(uint32_t (&a)[4], const uint32_t (&scales)[2],
                                               int last, int lane) {
  const int down = last % 2 == 0 && collects(last, lane) ? 16 : 0;
  a[0] = a[2] = scales[0] >> down;
  a[1] = a[3] = scales[1] >> down;
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));  // as above
}

}  // namespace nibble::ptx
