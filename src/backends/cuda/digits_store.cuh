// Rounds values to what linear_digits.cu reads (digits_layout.h): by quantize_x.cu and by the
// kernels that make such values.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backends/cuda/digits_layout.h"
#include "backends/cuda/x_store.cuh"

namespace nibble::cuda {

// The low bytes of four integers, one after the other; of their second bytes.
__device__ __forceinline__ uint32_t low_bytes(const int (&q)[4]) {
  return __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
}
__device__ __forceinline__ uint32_t second_bytes(const int (&q)[4]) {
  return __byte_perm(__byte_perm(q[0], q[1], 0x0051), __byte_perm(q[2], q[3], 0x0051), 0x5410);
}

// Group `group` of a token: 16 neighbouring lanes have 8 channels each, `part` (lane & 15) is
// which. By whole warps; `mine`: whether this token is stored.
__device__ __forceinline__ void store_digits(uint8_t* out, const cuda_digits::Shape& shape,
                                             int token, int group, int part, const float (&v)[8],
                                             bool mine) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
  for (int offset = 8; offset; offset /= 2) {
    most = max(most, __shfl_xor_sync(0xffffffffu, most, offset));
  }
  const AbsmaxScale by(most, cuda_digits::kLargest);
  int q[2][4], above[2][4], sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int value = by.usable ? __float2int_rn(v[i] * by.inverse) : 0;
    q[i / 4][i % 4] = value;
    above[i / 4][i % 4] = value + 128;
    sum += value;
  }
#pragma unroll
  for (int offset = 8; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  // The even lane of a pair (channels 0 ... 7 of a chunk) stores the chunk's high digits, the odd
  // one the low.
  const bool odd = part & 1;
  uint32_t low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t l = low_bytes(q[i]), h = second_bytes(above[i]);
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? h : l, 1);
    low[i] = odd ? got : h;  // of channels 0 ... 7
    high[i] = odd ? l : got;
  }
  if (!mine) return;
  uint8_t* slab = out + shape.slab_offset(group);
  *reinterpret_cast<uint4*>(slab +
                            cuda_digits::chunk_byte(cuda_digits::row_of(token, odd), part >> 1)) =
      make_uint4(__byte_perm(low[0], high[0], 0x5140), __byte_perm(low[0], high[0], 0x7362),
                 __byte_perm(low[1], high[1], 0x5140), __byte_perm(low[1], high[1], 0x7362));
  if (part == 0) {
    *reinterpret_cast<float2*>(slab + shape.factors_offset() + token * cuda_digits::kFactorBytes) =
        make_float2(by.scale, -8.0f * by.scale * static_cast<float>(sum));
  }
}

}  // namespace nibble::cuda
