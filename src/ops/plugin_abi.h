// The border between nibble and a backend plugin (a shared library opened at run time): two
// exported C functions. Both sides are C++ built from one source tree; the string says which, so
// that a stale plugin is refused instead of called.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "ops/backend.h"

namespace nibble {

// NIBBLE_SEAM_HASH: of the headers whose layout both sides share (cmake/cuda.cmake).
inline constexpr const char* kPluginAbi = "nibble " NIBBLE_VERSION " seam " NIBBLE_SEAM_HASH;

inline constexpr const char* kCudaPluginFile = "libnibble_cuda.so";  // cuda:sm_90
inline constexpr const char* kCudaPortablePluginFile =
    "libnibble_cuda_portable.so";  // cuda:portable
inline constexpr const char* kPluginOpenSymbol = "nibble_plugin_open";

/// Returns a backend, to be deleted by the caller, or null with a sentence in `message`. Does not
/// throw. `target` is "cuda:sm_90" or "cuda:portable"; `precision` kBf16, or for cuda:sm_90
/// kE4m3.
using PluginOpenFn = Backend*(const char* abi, const char* target, ActivationPrecision precision,
                              char* message, size_t message_bytes);

inline constexpr const char* kPluginCudaMajorSymbol = "nibble_plugin_cuda_major";
/// The CUDA version the plugin was built with: 13. Needs neither driver nor GPU.
using PluginCudaMajorFn = int();

}  // namespace nibble
