// Hopper warpgroup MMA: operand A (64 x 16 bf16, 64 x 32 e4m3 or u8) from registers, B [N][K] of
// the same type (of u8: s8) in shared memory with the 128-byte swizzle; accumulators f32, of e4m3
// f16, of u8 s32. Order of use: wgmma_fence after ordinary code wrote A or D, the wgmma,
// wgmma_commit, wgmma_wait<n> before reading D or rewriting A. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble::ptx {

// Descriptor of a K-major operand of 128-byte swizzled rows, 1024-byte aligned: 8-row groups are
// 1024 bytes apart. Addresses count 16 bytes: one k step (32 bytes) inside the row is +2.
__device__ __forceinline__ uint32_t descriptor_address(uint32_t smem) {
  return (smem & 0x3ffffu) >> 4;
}
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) {
  return uint64_t{0x40000040u} << 32 | (0x10000u + address);
}
// Of bf16 rows of 16 bytes without a swizzle, eight of them 128 bytes together: the first eight of
// a k16 step at `address`, the others `second` further (both in units of 16 bytes).
__device__ __forceinline__ uint64_t descriptor_16_bytes(uint32_t address, uint32_t second) {
  return uint64_t{8} << 32 | second << 16 | address;
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// How many registers an accumulator has: its part of an instruction's text, of its operands, and
// what comes after it in the text, operand A in registers and B's descriptor.
#define NIBBLE_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NIBBLE_TEXT_16 \
  NIBBLE_TEXT_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NIBBLE_TEXT_24 \
  NIBBLE_TEXT_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NIBBLE_TEXT_32 \
  NIBBLE_TEXT_24       \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NIBBLE_TEXT_40 \
  NIBBLE_TEXT_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NIBBLE_TEXT_48 \
  NIBBLE_TEXT_40       \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NIBBLE_TEXT_56 \
  NIBBLE_TEXT_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NIBBLE_TEXT_64 \
  NIBBLE_TEXT_56       \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NIBBLE_D(c, i) c(d[i]), c(d[(i) + 1]), c(d[(i) + 2]), c(d[(i) + 3])
#define NIBBLE_D_8(c) NIBBLE_D(c, 0), NIBBLE_D(c, 4)
#define NIBBLE_D_16(c) NIBBLE_D_8(c), NIBBLE_D(c, 8), NIBBLE_D(c, 12)
#define NIBBLE_D_24(c) NIBBLE_D_16(c), NIBBLE_D(c, 16), NIBBLE_D(c, 20)
#define NIBBLE_D_32(c) NIBBLE_D_24(c), NIBBLE_D(c, 24), NIBBLE_D(c, 28)
#define NIBBLE_D_40(c) NIBBLE_D_32(c), NIBBLE_D(c, 32), NIBBLE_D(c, 36)
#define NIBBLE_D_48(c) NIBBLE_D_40(c), NIBBLE_D(c, 40), NIBBLE_D(c, 44)
#define NIBBLE_D_56(c) NIBBLE_D_48(c), NIBBLE_D(c, 48), NIBBLE_D(c, 52)
#define NIBBLE_D_64(c) NIBBLE_D_56(c), NIBBLE_D(c, 56), NIBBLE_D(c, 60)
#define NIBBLE_A_8 "{%8, %9, %10, %11}, %12"
#define NIBBLE_A_16 "{%16, %17, %18, %19}, %20"
#define NIBBLE_A_24 "{%24, %25, %26, %27}, %28"
#define NIBBLE_A_32 "{%32, %33, %34, %35}, %36"
#define NIBBLE_A_40 "{%40, %41, %42, %43}, %44"
#define NIBBLE_A_48 "{%48, %49, %50, %51}, %52"
#define NIBBLE_A_56 "{%56, %57, %58, %59}, %60"
#define NIBBLE_A_64 "{%64, %65, %66, %67}, %68"
// A function for d += a * b, a in registers; `flags` are the scale of d (0: d = a * b), the signs
// of a and b, and whether b is transposed, as far as the types have them.
#define NIBBLE_WGMMA(name, Type, count, constraint, instruction, flags)               \
  static __device__ __forceinline__ void name(Type(&d)[count], const uint32_t(&a)[4], \
                                              uint64_t b) {                           \
    asm volatile("wgmma.mma_async.sync.aligned." instruction " {" NIBBLE_TEXT_##count \
                 "}, " NIBBLE_A_##count ", " flags ";"                                \
                 : NIBBLE_D_##count(constraint)                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));               \
  }

// Operand A in registers, B [kN rows]. rs_bf16: f32 += bf16. rs_u8: s32 += u8 * s8, k32. rs_e4m3:
// pairs of f16 (tokens 2t and 2t + 1 of a row) += e4m3, k32. _first: d = a * b.
template <int kN>
struct Wgmma;
template <>
struct Wgmma<16> {
  NIBBLE_WGMMA(rs_bf16, float, 8, "+f", "m64n16k16.f32.bf16.bf16", "1, 1, 1, 0")
  NIBBLE_WGMMA(rs_u8, int, 8, "+r", "m64n16k32.s32.u8.s8", "1")
  NIBBLE_WGMMA(rs_u8_first, int, 8, "=r", "m64n16k32.s32.u8.s8", "0")
};
template <>
struct Wgmma<32> {
  NIBBLE_WGMMA(rs_bf16, float, 16, "+f", "m64n32k16.f32.bf16.bf16", "1, 1, 1, 0")
  NIBBLE_WGMMA(rs_u8, int, 16, "+r", "m64n32k32.s32.u8.s8", "1")
  NIBBLE_WGMMA(rs_u8_first, int, 16, "=r", "m64n32k32.s32.u8.s8", "0")
};
template <>
struct Wgmma<48> {
  NIBBLE_WGMMA(rs_bf16, float, 24, "+f", "m64n48k16.f32.bf16.bf16", "1, 1, 1, 0")
};
template <>
struct Wgmma<64> {
  NIBBLE_WGMMA(rs_bf16, float, 32, "+f", "m64n64k16.f32.bf16.bf16", "1, 1, 1, 0")
  NIBBLE_WGMMA(rs_e4m3, uint32_t, 16, "+r", "m64n64k32.f16.e4m3.e4m3", "1, 1, 1")
  NIBBLE_WGMMA(rs_e4m3_first, uint32_t, 16, "=r", "m64n64k32.f16.e4m3.e4m3", "0, 1, 1")
};
template <>
struct Wgmma<80> {
  NIBBLE_WGMMA(rs_bf16, float, 40, "+f", "m64n80k16.f32.bf16.bf16", "1, 1, 1, 0")
};
template <>
struct Wgmma<96> {
  NIBBLE_WGMMA(rs_bf16, float, 48, "+f", "m64n96k16.f32.bf16.bf16", "1, 1, 1, 0")
};
template <>
struct Wgmma<112> {
  NIBBLE_WGMMA(rs_bf16, float, 56, "+f", "m64n112k16.f32.bf16.bf16", "1, 1, 1, 0")
};
template <>
struct Wgmma<128> {
  NIBBLE_WGMMA(rs_bf16, float, 64, "+f", "m64n128k16.f32.bf16.bf16", "1, 1, 1, 0")
  NIBBLE_WGMMA(rs_u8, int, 64, "+r", "m64n128k32.s32.u8.s8", "1")
  NIBBLE_WGMMA(rs_e4m3, uint32_t, 32, "+r", "m64n128k32.f16.e4m3.e4m3", "1, 1, 1")
  NIBBLE_WGMMA(rs_e4m3_first, uint32_t, 32, "=r", "m64n128k32.f16.e4m3.e4m3", "0, 1, 1")
};

// d [64 x 128] (+)= a [64 x 16] * b [128 x 16]^T, both f16 in shared memory (K-major); kAdd = 0
// starts from zero.
template <int kAdd>
__device__ __forceinline__ void wgmma_ss_f16_n128(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NIBBLE_TEXT_64
               "}, %64, %65, %66, 1, 1, 0, 0;"
               : NIBBLE_D_64("+f")
               : "l"(a), "l"(b), "n"(kAdd));
}

// d [64 x 128] += a [64 x 16] * b [128 x 16]^T, a f16 in registers, b f16 in shared memory
// (K-major).
NIBBLE_WGMMA(wgmma_rs_f16_n128, float, 64, "+f", "m64n128k16.f32.f16.f16", "1, 1, 1, 0")

}  // namespace nibble::ptx
