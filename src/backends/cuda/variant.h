// Which of the two plugins this file is compiled for. libnibble_cuda.so: kernels for sm_90a.
// libnibble_cuda_portable.so (NIBBLE_CUDA_PORTABLE): the same seam on kernels that need sm_80 only,
// portable/ in place of the files that use Hopper's instructions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/generic.h"
#include "backends/cuda/kernels.h"

namespace nibble::cuda {

#ifdef NIBBLE_CUDA_PORTABLE
inline constexpr bool kPortable = true;
inline constexpr const char* kTarget = "cuda:portable";
#else
inline constexpr bool kPortable = false;
inline constexpr const char* kTarget = "cuda:sm_90";
#endif

inline size_t int4_workspace_bytes(int num_sms) {
  if constexpr (kPortable) {
    return portable_linear_workspace_bytes(num_sms);
  } else {
    return linear_workspace_bytes(num_sms);
  }
}
inline size_t attention_workspace_bytes(int num_sms) {
  if constexpr (kPortable) {
    return portable_attention_workspace_bytes(num_sms);
  } else {
    return decode_attention_workspace_bytes(num_sms);
  }
}

}  // namespace nibble::cuda
