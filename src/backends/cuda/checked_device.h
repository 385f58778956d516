// Opens the GPU, or says what is missing: driver, GPU, or the kind that this plugin has code for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "backends/cuda/runtime.h"
#include "backends/cuda/variant.h"
#include "base/error.h"

namespace nibble::cuda {

inline std::string version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

/// Throws Error{kDevice}.
inline Device open_checked_device() {
  int driver = 0, runtime = 0, count = 0;
  runtime_versions(&driver, &runtime);
  if (driver == 0) {
    fail(ErrorKind::kDevice,
         "no NVIDIA driver (libcuda.so.1 is missing or does not load); install one that supports "
         "CUDA {}",
         version_text(runtime));
  }
  Device device{};
  const int status = open_device(&device, &count);
  if (status != 0) {
    fail(ErrorKind::kDevice,
         "the NVIDIA driver (for CUDA {}, nibble is built with {}) does not give a GPU: {}",
         version_text(driver), version_text(runtime), error_text(status));
  }
  if (count == 0) fail(ErrorKind::kDevice, "there is an NVIDIA driver but no GPU it can use");
  if (kPortable && device.major < 8) {
    fail(ErrorKind::kDevice, "GPU 0 is a {}: compute capability >= 8.0 needed, found {}.{}",
         device.name, device.major, device.minor);
  }
  if (!kPortable && (device.major != 9 || device.minor != 0)) {
    fail(ErrorKind::kDevice, "GPU 0 is a {} (sm_{}{}), wanted sm_90 (H100, H200){}", device.name,
         device.major, device.minor,
         device.major >= 8 ? "; build the engine with --target cuda:portable for it" : "");
  }
  return device;
}

}  // namespace nibble::cuda
