// What linear_fp8.cu writes for the linear behind it, in e4m3 (x_layout.h): of steps of up to 64
// tokens.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "backends/cuda/linear_common.cuh"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/mma.cuh"
#include "backends/cuda/x_layout.h"
#include "backends/cuda/x_store.cuh"

namespace nibble::cuda {

// What the next norm and linear get of the residual stream (LinearArgs::next): a thread has rows
// `column` ... + 15 of a token, eight neighbouring lanes the 128 rows of group `group`.
class NextGroup {
 public:
  NextGroup() = default;
  __device__ __forceinline__ NextGroup(const LinearParams& p, int column) {
    if (!p.next) return;
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      if (column + i >= p.out_stride) continue;
      const float4 w = *reinterpret_cast<const float4*>(p.next_weight + column + i);
      weight_[i] = w.x, weight_[i + 1] = w.y, weight_[i + 2] = w.z, weight_[i + 3] = w.w;
    }
  }
  // By whole warps. first, second: what was written to p.out, or 0.
  __device__ __forceinline__ void store(const LinearParams& p, int token, int group, int chunk,
                                        const uint4& first, const uint4& second, bool mine) const {
    float v[16], squares = 0.0f;
    unpack_bf16(v, first, second);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      squares = fmaf(v[i], v[i], squares);
      v[i] *= weight_[i];
    }
    static_assert(kNormTileRows == 4 * 16);
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    mine = mine && token < p.tokens;
    const int tile = group * 2 + (chunk >> 2);
    if (mine && chunk % 4 == 0 && tile < norm_tiles(p.out_stride)) {
      p.next_squares[tile * norm_stride(p.tokens) + token] = squares;
    }
    store_group(reinterpret_cast<uint8_t*>(p.next), cuda_x::Shape{p.tokens, p.out_stride}, token,
                group, chunk, v, mine);
  }

 private:
  float weight_[16] = {};
};

// store_silu() for the 256 packed rows of a CTA with two blocks a warpgroup: 128 columns of out, a
// group of the next linear, which also go to p.rounded. The rounded bf16 of 32 tokens at a time
// meet at `staging` (8 KB): 256 bytes a token, 16-byte chunks swizzled.
template <int kOctets, int kConsumerWarps, typename Four, typename Factors>
__device__ __forceinline__ void store_silu_rounded(const LinearParams& p, uint32_t staging, int id,
                                                   int group, int own, int own_end, Four four,
                                                   Factors factors) {
  constexpr int kPassOctets = 4;
  const int wg = id >> 7, m16 = id >> 5 & 3, lane = id & 31;
  float scale[2] = {1.0f, 1.0f};
  if (p.out_scale) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int column = group * 128 + wg * 64 + b * 32 + m16 * 8 + (lane >> 2);
      if (column < p.out_stride) scale[b] = p.out_scale[column];
    }
  }
  auto at = [&](int token, int chunk) {  // of the pass
    return staging + token * 256 + ((chunk ^ (token & 7)) << 4);
  };
  const int in = id >> 3, chunk = id & 7, column = group * 128 + chunk * 16;
#pragma unroll
  for (int first = 0; first < kOctets; first += kPassOctets) {
    if (first + kPassOctets <= own || first >= own_end) continue;
    ptx::named_barrier(1, kConsumerWarps * 32);  // the pass before has been read
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      uint32_t packed[kPassOctets];
#pragma unroll
      for (int i = 0; i < kPassOctets; ++i) {
        const float(&v)[4] = four(b, first + i);
        const float2 f = factors(first + i);
        packed[i] = ptx::pack_bf16(silu_times(v[0] * f.x, v[2] * f.x) * scale[b],
                                   silu_times(v[1] * f.y, v[3] * f.y) * scale[b]);
      }
      ptx::store_matrix_transposed_x4(at(lane, wg * 8 + b * 4 + m16), packed[0], packed[1],
                                      packed[2], packed[3]);
    }
    ptx::named_barrier(1, kConsumerWarps * 32);
    const int token = 8 * first + in, octet = token / 8;
    const bool mine = octet >= own && octet < own_end && token < p.tokens;
    uint4 halves[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t words[4];
      ptx::load_shared_16(words, at(in, chunk * 2 + h));
      const bool exists = column + 8 * h < p.out_stride;
      halves[h] =
          exists ? make_uint4(words[0], words[1], words[2], words[3]) : make_uint4(0, 0, 0, 0);
      if (mine && exists) {
        *reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(token) * p.out_stride + column +
                                  8 * h) = halves[h];
      }
    }
    float v[16];
    unpack_bf16(v, halves[0], halves[1]);
    store_group(p.rounded, cuda_x::Shape{p.tokens, p.out_stride}, token, group, chunk, v, mine);
  }
}

}  // namespace nibble::cuda
