// Finds and opens the CUDA backend, which is a plugin so that one nibble runs with and without a
// GPU. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "base/file.h"
#include "ops/backend.h"

namespace nibble {

/// "cuda:sm_90" or "cuda:portable" itself. Throws Error{kUnsupported} naming any other cuda target.
/// Asks for no GPU: engines can be built elsewhere.
std::string resolve_cuda_target(const std::string& target);

/// Looks for the plugin beside the running program, then in ../lib, then on the library path.
/// Throws Error{kDevice} that says what is missing: plugin, driver, GPU, or the right GPU.
/// precision: kBf16, or for cuda:sm_90 kE4m3.
std::unique_ptr<Backend> open_cuda_backend(const std::string& target,
                                           ActivationPrecision precision);

/// The CUDA version (13) that the target's plugin was built with; 0: the plugin is not here. Asks
/// for no GPU.
int cuda_plugin_major(const std::string& target);

/// What to say where a CPU target runs on a machine with an NVIDIA GPU; nothing elsewhere. `gpus`:
/// the driver's directory of them, so that no GPU is woken up.
std::optional<std::string> unused_gpu(const std::string& target,
                                      const fs::path& gpus = "/proc/driver/nvidia/gpus");

/// The target that runs on this machine's GPU, cuda:sm_90 before cuda:portable. Throws
/// Error{kDevice} with what each lacks.
std::unique_ptr<Backend> open_any_cuda_backend();

}  // namespace nibble
