// Statistics of activations and weights, and the small pieces of the Cholesky factorisation. All
// but factor_diagonal are bound by bandwidth. Every sum is added in one order, so the same inputs
// give the same bits. SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backends/cuda/calibration_kernels.h"
#include "backends/cuda/ptx/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumnWarps = 32, kColumns = 64;  // of a CTA of column_abs_kernel: 2 columns a lane

using ptx::high_bf16;
using ptx::low_bf16;

unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(std::min<int64_t>((items + kThreads - 1) / kThreads, 8192));
}

__device__ __forceinline__ int64_t first_item() {
  return blockIdx.x * int64_t{kThreads} + threadIdx.x;
}
__device__ __forceinline__ int64_t item_stride() { return int64_t{kThreads} * gridDim.x; }

// Bits of non-negative floats are ordered as the floats are.
__device__ __forceinline__ void raise(float* maximum, float value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, mask));
  }
  if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<int*>(maximum), __float_as_int(value));
}

// A CTA owns kColumns columns; its warps take the rows in turn.
template <bool kBf16>
__global__ void __launch_bounds__(kColumnWarps * 32)
    column_abs_kernel(const void* x, int64_t rows, int64_t columns, double* sums, float* maximum) {
  __shared__ double partial[kColumnWarps][kColumns];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t column = blockIdx.x * int64_t{kColumns} + 2 * lane;
  double sum0 = 0, sum1 = 0;
  float largest = 0;
  if (column < columns) {
    for (int64_t r = warp; r < rows; r += kColumnWarps) {
      float a, b;
      if constexpr (kBf16) {
        const uint32_t pair = static_cast<const uint32_t*>(x)[(r * columns + column) / 2];
        a = fabsf(low_bf16(pair));
        b = fabsf(high_bf16(pair));
      } else {
        const float2 pair = static_cast<const float2*>(x)[(r * columns + column) / 2];
        a = fabsf(pair.x);
        b = fabsf(pair.y);
      }
      sum0 += double{a};
      sum1 += double{b};
      largest = fmaxf(largest, fmaxf(a, b));
    }
  }
  partial[warp][2 * lane] = sum0;
  partial[warp][2 * lane + 1] = sum1;
  if (maximum != nullptr) raise(maximum, largest);
  __syncthreads();
  const int64_t mine = blockIdx.x * int64_t{kColumns} + threadIdx.x;
  if (threadIdx.x < kColumns && mine < columns) {
    double sum = sums[mine];
    for (int w = 0; w < kColumnWarps; ++w) sum += partial[w][threadIdx.x];
    sums[mine] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    range_kernel(const __nv_bfloat16* x, int64_t rows, int64_t stride, int64_t count,
                 float* maximum) {
  float largest = 0;
  for (int64_t i = first_item(); i < rows * count; i += item_stride()) {
    largest = fmaxf(largest, fabsf(__bfloat162float(x[i / count * stride + i % count])));
  }
  raise(maximum, largest);
}

__global__ void __launch_bounds__(kThreads)
    subtract_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, int64_t count,
                    __nv_bfloat16* out) {
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    out[i] = __float2bfloat16_rn(__bfloat162float(a[i]) - __bfloat162float(b[i]));
  }
}

__global__ void __launch_bounds__(kThreads)
    combine_kernel(float alpha, float* y, float beta, const float* x, int64_t count) {
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    y[i] = alpha * y[i] + (x != nullptr ? beta * x[i] : 0.0f);
  }
}

__global__ void __launch_bounds__(kThreads)
    widen_kernel(const uint32_t* from, float2* to, int64_t pairs) {
  for (int64_t i = first_item(); i < pairs; i += item_stride()) {
    to[i] = make_float2(low_bf16(from[i]), high_bf16(from[i]));
  }
}

__global__ void __launch_bounds__(kThreads)
    divide_columns_kernel(float* b, const float* divisor, int64_t count, int64_t columns) {
  for (int64_t i = first_item(); i < count; i += item_stride()) b[i] /= divisor[i % columns];
}

// The sum of a CTA's values, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  return parts[0];
}

__global__ void __launch_bounds__(kThreads)
    dot_kernel(const float4* a, const float4* b, int64_t quads, double* partial) {
  double sum = 0;
  for (int64_t i = first_item(); i < quads; i += item_stride()) {
    const float4 x = a[i], y = b[i];
    sum += double{x.x * y.x + x.y * y.y + (x.z * y.z + x.w * y.w)};
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    diagonal_kernel(const float* values, int64_t features, int64_t block, double* partial) {
  double sum = 0;
  for (int64_t j = first_item(); j < features; j += item_stride()) {
    sum += double{values[j * block + j % block]};
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    damp_kernel(float* h, int64_t features, int64_t block, float damping, float floor) {
  for (int64_t j = first_item(); j < features; j += item_stride()) {
    float& value = h[j * block + j % block];
    value = value * (1 + damping) + floor;
  }
}

constexpr int kFactorThreads = 1024, kFactorStride = kFactorPanel + 1;

// One CTA a block: the square in shared memory, one row of R a turn.
__global__ void __launch_bounds__(kFactorThreads)
    factor_diagonal_kernel(float* h, int64_t block, int64_t first, int size, int* failed) {
  extern __shared__ __align__(16) uint8_t smem[];
  float* s = reinterpret_cast<float*>(smem);  // [size, kFactorStride]
  const int thread = static_cast<int>(threadIdx.x);
  float* square = h + blockIdx.x * block * block + first * block + first;
  for (int i = thread; i < size * size; i += kFactorThreads) {
    s[i / size * kFactorStride + i % size] = square[i / size * block + i % size];
  }
  __syncthreads();
  for (int k = 0; k < size; ++k) {
    const float pivot = s[k * kFactorStride + k];
    if (!(pivot > 0) && thread == 0) *failed = 1;  // what follows is NaN and not used
    const float inverse = 1.0f / sqrtf(pivot);
    __syncthreads();
    for (int j = k + thread; j < size; j += kFactorThreads) s[k * kFactorStride + j] *= inverse;
    __syncthreads();
    const int rest = size - k - 1;
    for (int i = thread; i < rest * rest; i += kFactorThreads) {
      const int row = k + 1 + i / rest, column = k + 1 + i % rest;
      if (column >= row) {
        s[row * kFactorStride + column] -=
            s[k * kFactorStride + row] * s[k * kFactorStride + column];
      }
    }
    __syncthreads();
  }
  for (int i = thread; i < size * size; i += kFactorThreads) {
    square[i / size * block + i % size] = s[i / size * kFactorStride + i % size];
  }
}

// One CTA a row.
__global__ void __launch_bounds__(kThreads)
    unit_diagonal_kernel(float* r, int64_t block, float* diagonal) {
  const int64_t j = blockIdx.x;
  float* row = r + j * block;
  const float pivot = row[j % block];
  __syncthreads();
  if (threadIdx.x == 0) diagonal[j] = pivot * pivot;
  const float inverse = 1.0f / pivot;
  for (int64_t i = j % block + threadIdx.x; i < block; i += kThreads) row[i] *= inverse;
}

}  // namespace

int add_column_abs(const void* x, bool is_bf16, int64_t rows, int64_t columns, double* sums,
                   float* maximum, void* stream) {
  if (columns % 2) return cudaErrorInvalidValue;
  const auto grid = static_cast<unsigned>((columns + kColumns - 1) / kColumns);
  const auto kernel = is_bf16 ? &column_abs_kernel<true> : &column_abs_kernel<false>;
  kernel<<<grid, kColumnWarps * 32, 0, static_cast<cudaStream_t>(stream)>>>(x, rows, columns, sums,
                                                                            maximum);
  return cudaGetLastError();
}

int add_range(const void* x, int64_t rows, int64_t stride, int64_t count, float* maximum,
              void* stream) {
  range_kernel<<<blocks_for(rows * count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(x), rows, stride, count, maximum);
  return cudaGetLastError();
}

int subtract_bf16(const void* a, const void* b, int64_t count, void* out, void* stream) {
  subtract_kernel<<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), count,
      static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}

int combine(float alpha, float* y, float beta, const float* x, int64_t count, void* stream) {
  combine_kernel<<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      alpha, y, beta, x, count);
  return cudaGetLastError();
}

int widen_bf16(const void* from, float* to, int64_t count, void* stream) {
  if (count % 2) return cudaErrorInvalidValue;
  widen_kernel<<<blocks_for(count / 2), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint32_t*>(from), reinterpret_cast<float2*>(to), count / 2);
  return cudaGetLastError();
}

int divide_columns(float* b, const float* divisor, int64_t rows, int64_t columns, void* stream) {
  divide_columns_kernel<<<blocks_for(rows * columns), kThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(b, divisor, rows * columns, columns);
  return cudaGetLastError();
}

int dot(const float* a, const float* b, int64_t count, double* partial, void* stream) {
  if (count % 4) return cudaErrorInvalidValue;
  dot_kernel<<<kDotParts, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const float4*>(a), reinterpret_cast<const float4*>(b), count / 4, partial);
  return cudaGetLastError();
}

int diagonal_sum(const float* values, int64_t features, int64_t block, double* partial,
                 void* stream) {
  diagonal_kernel<<<kDotParts, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(values, features,
                                                                                 block, partial);
  return cudaGetLastError();
}

int damp_diagonal(float* h, int64_t features, int64_t block, float damping, float floor,
                  void* stream) {
  damp_kernel<<<blocks_for(features), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      h, features, block, damping, floor);
  return cudaGetLastError();
}

int factor_diagonal(float* h, int64_t num_blocks, int64_t block, int64_t first, int64_t size,
                    int* failed, void* stream) {
  constexpr int kSharedBytes = kFactorPanel * kFactorStride * static_cast<int>(sizeof(float));
  const int status = cudaFuncSetAttribute(
      factor_diagonal_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const auto grid = static_cast<unsigned>(num_blocks);
  factor_diagonal_kernel<<<grid, kFactorThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      h, block, first, static_cast<int>(size), failed);
  return cudaGetLastError();
}

int unit_diagonal(float* r, int64_t features, int64_t block, float* diagonal, void* stream) {
  const auto grid = static_cast<unsigned>(features);
  unit_diagonal_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(r, block,
                                                                                 diagonal);
  return cudaGetLastError();
}

}  // namespace nibble::cuda
