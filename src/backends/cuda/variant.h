// Which of the two plugins this file is compiled for. libnibble_cuda.so: kernels for sm_90a.
// libnibble_cuda_portable.so (NIBBLE_CUDA_PORTABLE): the same seam on kernels that need sm_80 only,
// portable/ in place of the files that use Hopper's instructions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace nibble::cuda {

#ifdef NIBBLE_CUDA_PORTABLE
inline constexpr bool kPortable = true;
inline constexpr const char* kTarget = "cuda:portable";
#else
inline constexpr bool kPortable = false;
inline constexpr const char* kTarget = "cuda:sm_90";
#endif

}  // namespace nibble::cuda
