// One token's K or V head to int8: the same bytes whichever kernel appends it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace nibble::cuda {

// A warp holds one head of one token, four values a lane. fixed_scale 0: from the head's largest
// magnitude. u: offset binary.
__device__ __forceinline__ __half quantize_head(const float (&x)[4], float fixed_scale,
                                                uint32_t (&u)[4]) {
  __half scale = __float2half_rn(fixed_scale);
  if (fixed_scale == 0.0f) {
    float peak = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
    }
    scale = __float2half_rn(peak / 127.0f);
  }
  if (!(__half2float(scale) > 0.0f)) scale = __float2half_rn(1.0f);  // all zero, or nearly
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float q = rintf(x[i] / __half2float(scale));
    u[i] = static_cast<uint32_t>(static_cast<int>(fminf(fmaxf(q, -127.0f), 127.0f)) + 128);
  }
  return scale;
}

}  // namespace nibble::cuda
