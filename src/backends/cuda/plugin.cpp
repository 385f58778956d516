// What both plugins export (variant.h). SPDX-License-Identifier: Apache-2.0
#include "ops/plugin_abi.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "backends/cuda/cuda_backend.h"
#include "backends/cuda/runtime.h"
#include "backends/cuda/variant.h"
#include "base/error.h"

namespace nibble {
namespace {

void write_message(std::string_view text, char* message, size_t message_bytes) {
  const size_t length = std::min(text.size(), message_bytes - 1);
  std::memcpy(message, text.data(), length);
  message[length] = '\0';
}

}  // namespace
}  // namespace nibble

extern "C" __attribute__((visibility("default"))) nibble::Backend* nibble_plugin_open(
    const char* abi, const char* target, nibble::ActivationPrecision precision, char* message,
    size_t message_bytes) {
  using namespace nibble;
  try {
    if (std::string_view(abi) != kPluginAbi) {
      fail(
          ErrorKind::kDevice,
          "the plugin for {} is \"{}\", this program wants \"{}\"; build both from one source tree",
          cuda::kTarget, kPluginAbi, abi);
    }
    if (std::string_view(target) != cuda::kTarget) {
      fail(ErrorKind::kDevice, "this plugin has code for {}, not for {}", cuda::kTarget, target);
    }
    if (cuda::kPortable && precision == ActivationPrecision::kE4m3) {
      fail(ErrorKind::kDevice, "{} has no e4m3 linears (--activations fp8)", cuda::kTarget);
    }
    return cuda::make_cuda_backend(precision).release();
  } catch (const std::exception& error) {
    write_message(error.what(), message, message_bytes);
    return nullptr;
  }
}

extern "C" __attribute__((visibility("default"))) int nibble_plugin_cuda_major() {
  return nibble::cuda::runtime_major();
}
