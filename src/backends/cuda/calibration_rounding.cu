// Rounding of weight rows to four bits. quantize/rounding.cpp is the specification; sums are added
// in another order here, so that a weight close to the middle of two steps may fall to the other.
//
// choose_scales: a group's errors under 24 ratios each meet the group's own square of G:
// 24 x 256 flops a weight, mma.sync in tf32. compensate_group and descend_group: one warp a row and
// group, its columns one after another; the square of G or R that they need is in shared memory,
// and a weight's chain is latency: many warps an SM hide it. What leaves the group is left to a
// matrix product (calibration_ops.cpp). The others are bound by bandwidth.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backends/cuda/calibration_kernels.h"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWarpRows = 8;  // of compensate and descend, one after another
constexpr unsigned kAll = 0xffffffffu;

struct Ratios {
  float values[kMaxRatios];
  int count;
};

// Half to even.
__device__ __forceinline__ float to_grid(float x) { return rintf(fminf(fmaxf(x, -8.0f), 7.0f)); }

__device__ __forceinline__ float stored_scale(float scale, bool bf16) {
  return bf16 ? __bfloat162float(__float2bfloat16_rn(scale)) : scale;
}

__device__ __forceinline__ float grid_scale(float ratio, float widest, bool bf16) {
  const float scale = stored_scale(ratio * widest, bf16);
  return scale > 0 ? scale : 1.0f;
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kAll, value, mask);
  return value;
}

// One warp a row and group.
template <int kGroup>
__global__ void __launch_bounds__(kThreads) widest_kernel(RoundingArgs a, float ratio) {
  const int64_t groups = a.features / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; i < a.rows * groups;
       i += stride) {
    const int64_t row = i / groups, first = i % groups * kGroup;
    float largest = 0;
    for (int j = lane; j < kGroup; j += 32) {
      largest = fmaxf(largest, fabsf(a.weight[row * a.features + first + j] / a.pre[first + j]));
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
    }
    if (lane == 0) a.scales[i] = grid_scale(ratio, largest / 7.0f, a.bf16_scales);
  }
}

// A warp has 16 rows: operand A of m16n8k8, its errors over pre; G with pre multiplied into both
// sides is B. The k of an mma is in any order as long as A and B agree: index t of a quad of lanes
// stands for column 2t and t + 4 for 2t + 1, so that a thread holds in A the columns that its part
// of the product belongs to, and the loss needs no exchange.
template <int kGroup>
struct ChooseShared {
  static constexpr int kStride = kGroup + 8;  // 8 mod 32 banks: float2 loads without conflicts
  uint32_t gram[kGroup * kStride];            // tf32
  int counts[kMaxRatios];
};

template <int kGroup>
__global__ void __launch_bounds__(kThreads, 1)
    choose_kernel(RoundingArgs a, const float* gram, Ratios ratios, unsigned long long* counts) {
  extern __shared__ __align__(16) uint8_t smem[];
  auto& s = *reinterpret_cast<ChooseShared<kGroup>*>(smem);
  constexpr int kTiles = kGroup / 8, kAtOnce = 4;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t first = blockIdx.y * int64_t{kGroup}, groups = a.features / kGroup;
  const int64_t offset = first % a.block;
  for (int i = thread; i < kGroup * kGroup; i += kThreads) {
    const int n = i / kGroup, k = i % kGroup;
    s.gram[n * s.kStride + k] = ptx::to_tf32(
        a.pre[first + n] * gram[(first + n) * a.block + offset + k] * a.pre[first + k]);
  }
  if (thread < kMaxRatios) s.counts[thread] = 0;
  __syncthreads();

  const int g = lane / 4, t = lane % 4;
  const int64_t row[2] = {(blockIdx.x * int64_t{kWarps} + thread / 32) * 16 + g,
                          (blockIdx.x * int64_t{kWarps} + thread / 32) * 16 + g + 8};
  float u[2][2 * kTiles], widest[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    widest[h] = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int64_t column = first + 8 * i + 2 * t;
      const float2 w =
          row[h] < a.rows
              ? *reinterpret_cast<const float2*>(a.weight + row[h] * a.features + column)
              : make_float2(0.0f, 0.0f);
      u[h][2 * i] = w.x / a.pre[column];
      u[h][2 * i + 1] = w.y / a.pre[column + 1];
      widest[h] = fmaxf(widest[h], fmaxf(fabsf(u[h][2 * i]), fabsf(u[h][2 * i + 1])));
    }
    widest[h] = fmaxf(widest[h], __shfl_xor_sync(kAll, widest[h], 1));
    widest[h] = fmaxf(widest[h], __shfl_xor_sync(kAll, widest[h], 2)) / 7.0f;
  }
  float best[2] = {0, 0};
  int best_ratio[2] = {0, 0};
  for (int c = 0; c < ratios.count; ++c) {
    uint32_t d[kTiles][4];  // (row 0, 2t), (row 1, 2t), (row 0, 2t + 1), (row 1, 2t + 1)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scale = grid_scale(ratios.values[c], widest[h], a.bf16_scales);
      const float inverse = 1.0f / scale;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        d[i][h] = ptx::to_tf32(u[h][2 * i] - to_grid(u[h][2 * i] * inverse) * scale);
        d[i][h + 2] = ptx::to_tf32(u[h][2 * i + 1] - to_grid(u[h][2 * i + 1] * inverse) * scale);
      }
    }
    float loss[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kTiles; n += kAtOnce) {
      float sum[kAtOnce][4] = {};
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const uint2 b = *reinterpret_cast<const uint2*>(s.gram + (8 * (n + i) + g) * s.kStride +
                                                          8 * k + 2 * t);
          ptx::mma_tf32(sum[i], d[k], b.x, b.y);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        loss[0] +=
            sum[i][0] * __uint_as_float(d[n + i][0]) + sum[i][1] * __uint_as_float(d[n + i][2]);
        loss[1] +=
            sum[i][2] * __uint_as_float(d[n + i][1]) + sum[i][3] * __uint_as_float(d[n + i][3]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      loss[h] += __shfl_xor_sync(kAll, loss[h], 1);
      loss[h] += __shfl_xor_sync(kAll, loss[h], 2);
      if (c == 0 || loss[h] < best[h]) {
        best[h] = loss[h];
        best_ratio[h] = c;
      }
    }
  }
  if (t == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row[h] >= a.rows) continue;
      a.scales[row[h] * groups + blockIdx.y] =
          grid_scale(ratios.values[best_ratio[h]], widest[h], a.bf16_scales);
      atomicAdd(&s.counts[best_ratio[h]], 1);
    }
  }
  __syncthreads();
  if (thread < ratios.count && s.counts[thread] > 0) {
    atomicAdd(&counts[thread], static_cast<unsigned long long>(s.counts[thread]));
  }
}

// One thread four columns.
template <typename Body>
__device__ __forceinline__ void for_quads(const RoundingArgs& a, const Body& body) {
  const int64_t quads = a.rows * a.features / 4, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < quads; i += stride) {
    const float4 pre = *reinterpret_cast<const float4*>(a.pre + 4 * i % a.features);
    body(i, a.scales[4 * i / a.group], pre);
  }
}

__global__ void __launch_bounds__(kThreads) round_nearest_kernel(RoundingArgs a) {
  for_quads(a, [&](int64_t i, float scale, const float4& pre) {
    const float4 w = reinterpret_cast<const float4*>(a.weight)[i];
    const float4 q = make_float4(to_grid(w.x / pre.x / scale), to_grid(w.y / pre.y / scale),
                                 to_grid(w.z / pre.z / scale), to_grid(w.w / pre.w / scale));
    reinterpret_cast<float4*>(a.q)[i] = q;
    reinterpret_cast<float4*>(a.error)[i] =
        make_float4(w.x - q.x * (scale * pre.x), w.y - q.y * (scale * pre.y),
                    w.z - q.z * (scale * pre.z), w.w - q.w * (scale * pre.w));
  });
}

__global__ void __launch_bounds__(kThreads) restate_error_kernel(RoundingArgs a) {
  for_quads(a, [&](int64_t i, float scale, const float4& pre) {
    const float4 w = reinterpret_cast<const float4*>(a.weight)[i];
    const float4 q = reinterpret_cast<const float4*>(a.q)[i];
    reinterpret_cast<float4*>(a.error)[i] =
        make_float4(w.x - q.x * (scale * pre.x), w.y - q.y * (scale * pre.y),
                    w.z - q.z * (scale * pre.z), w.w - q.w * (scale * pre.w));
  });
}

__global__ void __launch_bounds__(kThreads)
    results_kernel(RoundingArgs a, char4* ints, uint2* dense) {
  for_quads(a, [&](int64_t i, float scale, const float4& pre) {
    const float4 q = reinterpret_cast<const float4*>(a.q)[i];
    ints[i] = make_char4(static_cast<signed char>(q.x), static_cast<signed char>(q.y),
                         static_cast<signed char>(q.z), static_cast<signed char>(q.w));
    dense[i] = make_uint2(ptx::pack_bf16(q.x * (scale * pre.x), q.y * (scale * pre.y)),
                          ptx::pack_bf16(q.z * (scale * pre.z), q.w * (scale * pre.w)));
  });
}

// blockIdx.y is the block, blockIdx.x its rows. A lane has the columns lane, lane + 32, ...
template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    compensate_kernel(RoundingArgs a, const float* factor, const float* feedback, int64_t group) {
  extern __shared__ __align__(16) uint8_t smem[];
  constexpr int kPer = kGroup / 32, kStride = kGroup + 1;
  float* below = reinterpret_cast<float*>(smem);  // [j, i] = R[i, j] where i < j, else 0
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t offset = group * kGroup, first = blockIdx.y * a.block + offset;
  const int64_t groups = a.features / kGroup;
  for (int i = thread; i < kGroup * kGroup; i += kThreads) {
    const int row = i / kGroup, column = i % kGroup;
    below[column * kStride + row] =
        row < column ? factor[(first + row) * a.block + offset + column] : 0.0f;
  }
  __syncthreads();
  const int64_t begin = (blockIdx.x * int64_t{kWarps} + thread / 32) * kWarpRows;
  const int64_t end = begin + kWarpRows < a.rows ? begin + kWarpRows : a.rows;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.features + first + lane;
    const float scale = a.scales[row * groups + first / kGroup];
    float w[kPer], wanted[kPer], step[kPer], inverse[kPer], q[kPer], e[kPer];
#pragma unroll
    for (int c = 0; c < kPer; ++c) {
      w[c] = wanted[c] = a.weight[at + 32 * c];
      if (feedback != nullptr) {
        wanted[c] += feedback[(blockIdx.y * a.rows + row) * kGroup + lane + 32 * c];
      }
      step[c] = scale * a.pre[first + lane + 32 * c];
      inverse[c] = 1.0f / step[c];
    }
#pragma unroll
    for (int c = kPer - 1; c >= 0; --c) {
      for (int l = 31; l >= 0; --l) {  // every lane rounds; only column 32 c + l is asked
        const float rounded = to_grid(wanted[c] * inverse[c]);
        const float mine = w[c] - rounded * step[c];
        const float error = __shfl_sync(kAll, mine, l);
        if (lane == l) {
          q[c] = rounded;
          e[c] = mine;
        }
        const float* r = below + (32 * c + l) * kStride + lane;
#pragma unroll
        for (int i = 0; i <= c; ++i) wanted[i] += r[32 * i] * error;
      }
    }
#pragma unroll
    for (int c = 0; c < kPer; ++c) {
      a.q[at + 32 * c] = q[c];
      a.error[at + 32 * c] = e[c];
    }
  }
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    descend_kernel(RoundingArgs a, const float* gram, const float* product, float* change,
                   int64_t group) {
  extern __shared__ __align__(16) uint8_t smem[];
  constexpr int kPer = kGroup / 32;
  float* square = reinterpret_cast<float*>(smem);  // [kGroup, kGroup] of G
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t offset = group * kGroup, first = blockIdx.y * a.block + offset;
  const int64_t groups = a.features / kGroup;
  for (int i = thread; i < kGroup * kGroup; i += kThreads) {
    square[i] = gram[(first + i / kGroup) * a.block + offset + i % kGroup];
  }
  __syncthreads();
  const int64_t begin = (blockIdx.x * int64_t{kWarps} + thread / 32) * kWarpRows;
  const int64_t end = begin + kWarpRows < a.rows ? begin + kWarpRows : a.rows;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.features + first + lane;
    float scale = a.scales[row * groups + first / kGroup];
    float w[kPer], pre[kPer], q[kPer], e[kPer], p[kPer], unit[kPer], curve[kPer];
    float moved_error[kPer] = {}, unit_product[kPer] = {};
#pragma unroll
    for (int c = 0; c < kPer; ++c) {
      w[c] = a.weight[at + 32 * c];
      pre[c] = a.pre[first + lane + 32 * c];
      q[c] = a.q[at + 32 * c];
      e[c] = a.error[at + 32 * c];
      p[c] = product[at + 32 * c];
      unit[c] = q[c] * pre[c];
      curve[c] = square[(lane + 32 * c) * (kGroup + 1)];
    }
#pragma unroll
    for (int c = 0; c < kPer; ++c) {
      for (int l = 0; l < 32; ++l) {
        const float other = __shfl_sync(kAll, unit[c], l);
        const float* g = square + (32 * c + l) * kGroup + lane;
#pragma unroll
        for (int i = 0; i < kPer; ++i) unit_product[i] += other * g[32 * i];
      }
    }
    float slope = 0, curvature = 0;
#pragma unroll
    for (int c = 0; c < kPer; ++c) {
      slope += unit[c] * p[c];
      curvature += unit[c] * unit_product[c];
    }
    slope = warp_sum(slope);
    curvature = warp_sum(curvature);
    if (curvature > 0) {
      const float refitted = stored_scale(scale + slope / curvature, a.bf16_scales);
      const float moved = refitted - scale;
      // Rounding the scale to its type may undo the gain: moving by m changes the loss by m^2 c -
      // 2 m s.
      if (refitted > 0 && moved != 0 && moved * (moved * curvature - 2 * slope) < 0) {
#pragma unroll
        for (int c = 0; c < kPer; ++c) {
          moved_error[c] = -moved * unit[c];
          p[c] -= moved * unit_product[c];
          e[c] += moved_error[c];
        }
        scale = refitted;
      }
    }
#pragma unroll
    for (int c = kPer - 1; c >= 0; --c) {
      const float step = scale * pre[c], inverse = 1.0f / step;
      const float per_curve = curve[c] > 0 ? 1.0f / curve[c] : 0.0f;
      for (int l = 31; l >= 0; --l) {  // every lane looks; only column 32 c + l moves
        const float best = to_grid((w[c] - e[c] + p[c] * per_curve) * inverse);
        const float mine = curve[c] > 0 ? (q[c] - best) * step : 0.0f;
        const float delta = __shfl_sync(kAll, mine, l);
        if (delta == 0) continue;
        if (lane == l) {
          q[c] = best;
          e[c] += delta;
          moved_error[c] += delta;
        }
        const float* g = square + (32 * c + l) * kGroup + lane;
#pragma unroll
        for (int i = 0; i < kPer; ++i) p[i] += delta * g[32 * i];
      }
    }
    if (lane == 0) a.scales[row * groups + first / kGroup] = scale;
#pragma unroll
    for (int c = 0; c < kPer; ++c) {
      a.q[at + 32 * c] = q[c];
      a.error[at + 32 * c] = e[c];
      change[(blockIdx.y * a.rows + row) * kGroup + lane + 32 * c] = moved_error[c];
    }
  }
}

bool usable(const RoundingArgs& a) {
  return (a.group == 64 || a.group == 128) && a.features % a.block == 0 && a.block % a.group == 0;
}

unsigned quad_blocks(const RoundingArgs& a) {
  return static_cast<unsigned>(
      std::min<int64_t>((a.rows * a.features / 4 + kThreads - 1) / kThreads, 16384));
}

dim3 row_blocks(const RoundingArgs& a) {
  constexpr int64_t kRows = int64_t{kWarps} * kWarpRows;
  return dim3(static_cast<unsigned>((a.rows + kRows - 1) / kRows),
              static_cast<unsigned>(a.features / a.block));
}

template <int kGroup>
int choose(const RoundingArgs& args, const float* gram, const Ratios& ratios,
           unsigned long long* counts, void* stream) {
  constexpr int kBytes = sizeof(ChooseShared<kGroup>);
  const auto kernel = &choose_kernel<kGroup>;
  const int status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  constexpr int64_t kRows = int64_t{16} * kWarps;
  const dim3 grid(static_cast<unsigned>((args.rows + kRows - 1) / kRows),
                  static_cast<unsigned>(args.features / kGroup));
  kernel<<<grid, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(args, gram, ratios, counts);
  return cudaGetLastError();
}

template <int kGroup>
int compensate(const RoundingArgs& args, const float* factor, const float* feedback,
               int64_t group_idx, void* stream) {
  constexpr int kBytes = kGroup * (kGroup + 1) * static_cast<int>(sizeof(float));
  const auto kernel = &compensate_kernel<kGroup>;
  const int status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid = row_blocks(args);
  kernel<<<grid, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(args, factor, feedback,
                                                                        group_idx);
  return cudaGetLastError();
}

template <int kGroup>
int descend(const RoundingArgs& args, const float* gram, const float* product, float* change,
            int64_t group_idx, void* stream) {
  constexpr int kBytes = kGroup * kGroup * static_cast<int>(sizeof(float));
  const auto kernel = &descend_kernel<kGroup>;
  const int status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid = row_blocks(args);
  kernel<<<grid, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(args, gram, product, change,
                                                                        group_idx);
  return cudaGetLastError();
}

}  // namespace

int choose_scales(const RoundingArgs& args, const float* gram, const float* ratios, int num_ratios,
                  unsigned long long* counts, void* stream) {
  if (!usable(args) || num_ratios < 1 || num_ratios > kMaxRatios) return cudaErrorInvalidValue;
  if (num_ratios == 1) {
    const auto grid = static_cast<unsigned>(
        std::min<int64_t>((args.rows * args.features / args.group + kWarps - 1) / kWarps, 16384));
    const auto kernel = args.group == 64 ? &widest_kernel<64> : &widest_kernel<128>;
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, ratios[0]);
    return cudaGetLastError();
  }
  Ratios copy{};
  std::copy(ratios, ratios + num_ratios, copy.values);
  copy.count = num_ratios;
  return args.group == 64 ? choose<64>(args, gram, copy, counts, stream)
                          : choose<128>(args, gram, copy, counts, stream);
}

int round_nearest(const RoundingArgs& args, void* stream) {
  if (!usable(args)) return cudaErrorInvalidValue;
  round_nearest_kernel<<<quad_blocks(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

int restate_error(const RoundingArgs& args, void* stream) {
  if (!usable(args)) return cudaErrorInvalidValue;
  restate_error_kernel<<<quad_blocks(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

int compensate_group(const RoundingArgs& args, const float* factor, const float* feedback,
                     int64_t group_idx, void* stream) {
  if (!usable(args)) return cudaErrorInvalidValue;
  return args.group == 64 ? compensate<64>(args, factor, feedback, group_idx, stream)
                          : compensate<128>(args, factor, feedback, group_idx, stream);
}

int descend_group(const RoundingArgs& args, const float* gram, const float* product, float* change,
                  int64_t group_idx, void* stream) {
  if (!usable(args)) return cudaErrorInvalidValue;
  return args.group == 64 ? descend<64>(args, gram, product, change, group_idx, stream)
                          : descend<128>(args, gram, product, change, group_idx, stream);
}

int write_results(const RoundingArgs& args, int8_t* ints, void* dense, void* stream) {
  if (!usable(args)) return cudaErrorInvalidValue;
  results_kernel<<<quad_blocks(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args, reinterpret_cast<char4*>(ints), static_cast<uint2*>(dense));
  return cudaGetLastError();
}

}  // namespace nibble::cuda
