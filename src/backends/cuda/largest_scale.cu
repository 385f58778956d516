// The largest scale of packed int4 weights, in whose terms linear_fp8.cu fits scales into f16. Once
// a matrix: reads 1/33 of its bytes.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256, kBlockWarps = kThreads / 32;

// A warp a block of 64 rows x 128 k at a time: 32 words of two bf16.
__global__ void __launch_bounds__(kThreads)
    largest_scale_kernel(const uint8_t* weights, int64_t blocks, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  uint32_t most = 0;
  for (int64_t i = blockIdx.x * int64_t{kBlockWarps} + threadIdx.x / 32; i < blocks;
       i += int64_t{gridDim.x} * kBlockWarps) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(
        weights + i * cuda_layout::kBlockBytes + cuda_layout::kBlockNibbleBytes + lane * 4);
    most = max(most, max(pair << 16 & 0x7fffffffu, pair & 0x7fff0000u));  // f32 bits
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (lane == 0) atomicMax(out, most);
}

}  // namespace

int largest_scale(const void* weights, int64_t rows, int64_t k, void* scratch, float* out,
                  void* stream) {
  const cuda_layout::Shape shape{rows, k};
  const int64_t blocks = shape.packed_bytes() / cuda_layout::kBlockBytes;
  const auto grid = static_cast<unsigned>(std::clamp<int64_t>(blocks / kBlockWarps, 1, 1024));
  auto* on = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaMemsetAsync(scratch, 0, 4, on);
  if (status != cudaSuccess) return status;
  largest_scale_kernel<<<grid, kThreads, 0, on>>>(static_cast<const uint8_t*>(weights), blocks,
                                                  static_cast<uint32_t*>(scratch));
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  status = cudaMemcpyAsync(out, scratch, 4, cudaMemcpyDeviceToHost, on);
  return status != cudaSuccess ? status : cudaStreamSynchronize(on);
}

}  // namespace nibble::cuda
