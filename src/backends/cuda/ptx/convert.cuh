// Number conversions that kernels share. The e4m3 ones need sm_89.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace nibble::ptx {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four offset-binary bytes -> two half2 of (byte - 128), exact.
__device__ __forceinline__ void bytes_to_half(uint32_t bytes, uint32_t& low, uint32_t& high) {
  const uint32_t magic = 0x64646464u, bias = 0xe480e480u;  // 1024 + u; -1152
  const uint32_t a = __byte_perm(bytes, magic, 0x4140), b = __byte_perm(bytes, magic, 0x4342);
  asm("add.f16x2 %0, %1, %2;" : "=r"(low) : "r"(a), "r"(bias));
  asm("add.f16x2 %0, %1, %2;" : "=r"(high) : "r"(b), "r"(bias));
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float2 unpack_f16(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ uint32_t f16x2_mul(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t f16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Two f32 -> two e4m3 (low byte first), nearest even, finite overflow to +-448.
__device__ __forceinline__ uint32_t e4m3x2(float low, float high) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// Two e4m3 -> two f16, exact.
__device__ __forceinline__ uint32_t e4m3x2_to_half2(uint32_t pair) {
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<uint16_t>(pair)));
  return r;
}

}  // namespace nibble::ptx
