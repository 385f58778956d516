// Driver entry points reached through the runtime: the plugin does not link libcuda.
// SPDX-License-Identifier: Apache-2.0
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "backends/cuda/kernels.h"
#include "backends/cuda/linear_common.cuh"

namespace nibble::cuda {

int make_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t columns,
                    int64_t row_stride_bytes, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<Encode>(entry);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride_bytes)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap encoded;
  const CUresult result =
      encode(&encoded, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), dims, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  std::memcpy(map, &encoded, sizeof encoded);
  return 0;
}

size_t linear_workspace_bytes(int num_sms) {
  return static_cast<size_t>(num_sms) * (kPieceFloats + kStashFloats) * sizeof(float);
}

// Measured on H100 and H200 (docs/performance.md). tune.cpp finds better ones for a device.
int linear(const LinearArgs& args, void* stream) {
  LinearArgs a = args;
  a.tactic = -1;
  if (args.tokens <= kMaxSmallTokens && !args.in_order) {
    // Half a ring is requested before the dependency is met: x would wait behind a whole one.
    a.early = 1;
    return linear_small(a, stream);
  }
  return linear_wgmma(a, stream);
}

}  // namespace nibble::cuda
