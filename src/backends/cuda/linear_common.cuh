// What the linear kernels share: parameters, the epilogue, the last-arriver test, the launch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/ptx/dequant.cuh"

namespace nibble::cuda {

inline constexpr size_t kCounterBytes = 64 << 10;  // at the start of the workspace

struct LinearParams {
  const uint8_t* weights;
  int num_tiles;  // row tiles, as the kernel cuts them
  int groups;     // K / 128
  int tokens, rows, out_stride;
  __nv_bfloat16* out;
  const __nv_bfloat16* residual;
  const float* out_scale;
  float* partials;
  int64_t partial_stride;  // floats per partial
  int* counters;           // [row tiles], zero between calls
  long long* trace;        // [CTAs][8] clock stamps of a NIBBLE_TRACE build, or null
};

// Partial tiles: two per CTA, at most 256 rows x 128 tokens.
inline constexpr int64_t kPartialFloats = 256 * 128;

inline LinearParams make_linear_params(const LinearArgs& args, int tile_rows) {
  LinearParams p{};
  p.weights = static_cast<const uint8_t*>(args.weights);
  const cuda_layout::Shape shape{args.rows, args.k};
  p.num_tiles = static_cast<int>(shape.num_tiles() * cuda_layout::kTileRows / tile_rows);
  p.groups = static_cast<int>(shape.num_groups());
  p.tokens = args.tokens;
  p.rows = static_cast<int>(args.rows);
  p.out_stride = static_cast<int>(args.epilogue == Epilogue::kSiluMul ? args.rows / 2 : args.rows);
  p.out = static_cast<__nv_bfloat16*>(args.out);
  p.residual = static_cast<const __nv_bfloat16*>(args.residual);
  p.out_scale = args.out_scale;
  p.counters = static_cast<int*>(args.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + kCounterBytes);
  p.partial_stride = kPartialFloats;
  p.trace = static_cast<long long*>(args.trace);
  return p;
}

template <typename Kernel>
int launch_linear(Kernel* kernel, const LinearArgs& args, const LinearParams& params, int grid,
                  int threads, int smem_bytes, void* stream, int cluster = 1) {
  // NOTE: once per kernel would do; the call is cheap and captures fine in a graph.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (args.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  config.attrs = attributes;
  config.numAttrs = count;
  CUtensorMap map;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  std::memcpy(&map, args.x, sizeof map);
  return cudaLaunchKernelEx(&config, kernel, map, params);
}

// Undo the dequantizer's 2^-13, apply the epilogue and store kPer consecutive packed rows
// (tile_row + row ...) of one token. Called by whole warps: lane l holds rows kPer * l ...
template <Epilogue kEpilogue, int kPer>
__device__ __forceinline__ void store_rows(const LinearParams& p, int token, int tile_row, int row,
                                           float (&value)[kPer]) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) value[i] *= ptx::kDequantUndo;
  if constexpr (kEpilogue == Epilogue::kSiluMul) {
    // Packed rows 16b..16b+7 are gate 8b.., 16b+8.. are up 8b..: the partner is 8/kPer lanes on.
    float up[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) up[i] = __shfl_down_sync(0xffffffffu, value[i], 8 / kPer);
    if ((row & 8) || token >= p.tokens) return;
    const int column = (tile_row + row) / 16 * 8 + (row & 7);
    if (column >= p.out_stride) return;
    __nv_bfloat16* to = p.out + static_cast<int64_t>(token) * p.out_stride + column;
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      float v[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        v[j] = value[i + j] / (1.0f + __expf(-value[i + j])) * up[i + j];
        if (p.out_scale) v[j] *= p.out_scale[column + i + j];
      }
      *reinterpret_cast<__nv_bfloat162*>(to + i) = __floats2bfloat162_rn(v[0], v[1]);
    }
  } else {
    if (token >= p.tokens || tile_row + row >= p.rows) return;
    const int64_t at = static_cast<int64_t>(token) * p.out_stride + tile_row + row;
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      float v0 = value[i], v1 = value[i + 1];
      if constexpr (kEpilogue == Epilogue::kResidual) {
        const __nv_bfloat162 r = *reinterpret_cast<const __nv_bfloat162*>(p.residual + at + i);
        v0 += __low2float(r);
        v1 += __high2float(r);
      }
      *reinterpret_cast<__nv_bfloat162*>(p.out + at + i) = __floats2bfloat162_rn(v0, v1);
    }
  }
}

// All threads of the CTA; earlier global writes of the CTA are visible to whoever sees true.
// The counter returns to zero for the next call.
__device__ __forceinline__ bool arrive_last(int* counter, int others, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const bool is_last = atomicAdd(counter, 1) == others;
    if (is_last) *counter = 0;
    __threadfence();
    *flag = is_last;
  }
  __syncthreads();
  return *flag;
}

}  // namespace nibble::cuda
