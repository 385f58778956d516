// Rounds values to e4m3 in the order linear_fp8.cu reads (x_layout.h), a scale per token and 128
// channels: by quantize_x.cu and by the kernels that make such values.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "backends/cuda/ptx/convert.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/x_layout.h"

namespace nibble::cuda {

inline constexpr float kMaxE4m3 = 448.0f, kLeastAbsmax = 0x1p-100f;

// Of a group or a token whose largest magnitude is `absmax` and is to become `largest`.
struct AbsmaxScale {
  float inverse, scale;
  bool usable;
  // Magnitudes compare as integers, and so a NaN is more than everything.
  __device__ __forceinline__ AbsmaxScale(uint32_t absmax_bits, float largest) {
    const float absmax = __uint_as_float(absmax_bits);
    const bool finite = absmax_bits < 0x7f800000u;
    usable = finite && absmax >= kLeastAbsmax;
    inverse = usable ? __fdiv_rn(largest, absmax) : 0.0f;
    scale = usable ? __fdiv_rn(absmax, largest) : finite ? 0.0f : __uint_as_float(0x7fffffffu);
  }
};

__device__ __forceinline__ uint32_t absmax_bits(const float (&v)[16]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  return most;
}

// 16 channels times `inverse` as the 16 bytes of a chunk; what they are exactly is added to `sum`.
__device__ __forceinline__ uint4 round_chunk(const float (&v)[16], float inverse, float& sum) {
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // bytes 4i ...: channels 2i, 8 + 2i, 2i + 1, 9 + 2i
    const uint32_t low = ptx::e4m3x2(v[2 * i] * inverse, v[8 + 2 * i] * inverse);
    const uint32_t high = ptx::e4m3x2(v[2 * i + 1] * inverse, v[9 + 2 * i] * inverse);
    packed[i] = low | high << 16;
#pragma unroll
    for (const uint32_t pair : {low, high}) {
      const float2 exact = ptx::unpack_f16(ptx::e4m3x2_to_half2(pair));
      sum += exact.x + exact.y;
    }
  }
  return make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// The digits of a row's sum of a group.
__device__ __forceinline__ void store_sum(uint8_t* out, const cuda_x::Shape& shape, int token,
                                          int group, float sum) {
  const int row = token % cuda_x::kSlabTokens;
  uint8_t* block = out + shape.sums_offset(token / cuda_x::kSlabTokens, group);
  const __nv_bfloat16 high = __float2bfloat16_rn(sum * cuda_x::kSumUnit);
  const __nv_bfloat16 low = __float2bfloat16_rn(sum * cuda_x::kSumUnit - __bfloat162float(high));
  *reinterpret_cast<__nv_bfloat16*>(block + cuda_x::sum_byte(0, row, group)) = high;
  *reinterpret_cast<__nv_bfloat16*>(block + cuda_x::sum_byte(1, row, group)) = low;
}

__device__ __forceinline__ void unpack_bf16(float (&v)[16], const uint4& first,
                                            const uint4& second) {
  const uint32_t words[8] = {first.x,  first.y,  first.z,  first.w,
                             second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[2 * i] = ptx::low_bf16(words[i]);
    v[2 * i + 1] = ptx::high_bf16(words[i]);
  }
}

// Group `group` of a token (< 64, of a shape that is grouped()): eight neighbouring lanes have 16
// channels each, lane & 7 is their chunk. By whole warps; `mine`: whether this token is stored.
__device__ __forceinline__ void store_group(uint8_t* out, const cuda_x::Shape& shape, int token,
                                            int group, int chunk, const float (&v)[16], bool mine) {
  uint32_t most = absmax_bits(v);
#pragma unroll
  for (int offset = 4; offset; offset /= 2) {
    most = max(most, __shfl_xor_sync(0xffffffffu, most, offset));
  }
  const AbsmaxScale by(most, kMaxE4m3);
  float sum = 0.0f;
  const uint4 packed = round_chunk(v, by.inverse, sum);
#pragma unroll
  for (int offset = 4; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (!mine) return;
  *reinterpret_cast<uint4*>(out + shape.slab_offset(0, group) + cuda_x::chunk_byte(token, chunk)) =
      packed;
  if (chunk == 0) {
    *reinterpret_cast<float*>(out + shape.factors_offset(group) + cuda_x::factor_byte(token)) =
        by.scale;
    store_sum(out, shape, token, group, sum * by.scale);
  } else if (group == shape.groups() - 1 &&
             group % cuda_x::kSumGroups + chunk < cuda_x::kSumGroups) {
    store_sum(out, shape, token, group + chunk, 0.0f);  // what the last block has past the end
  }
}

}  // namespace nibble::cuda
