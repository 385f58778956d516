// One rotation for every kernel that rotates: the same bits wherever a token is computed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace nibble::ptx {

// Half-split RoPE of (x[d], x[d + 64]).
__device__ __forceinline__ float rope_first(float first, float second, float c, float s) {
  return fmaf(first, c, -__fmul_rn(second, s));
}
__device__ __forceinline__ float rope_second(float first, float second, float c, float s) {
  return fmaf(second, c, __fmul_rn(first, s));
}

}  // namespace nibble::ptx
