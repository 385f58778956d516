// The one exported function of libnibble_cuda.so. SPDX-License-Identifier: Apache-2.0
#include "ops/plugin_abi.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "backends/cuda/cuda_backend.h"
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
    const char* abi, const char* target, char* message, size_t message_bytes) {
  using namespace nibble;
  try {
    if (std::string_view(abi) != kPluginAbi) {
      fail(ErrorKind::kDevice,
           "{} is \"{}\", this program wants \"{}\"; build both from one source tree",
           kCudaPluginFile, kPluginAbi, abi);
    }
    if (std::string_view(target) != "cuda:sm_90") {
      fail(ErrorKind::kDevice, "{} has code for cuda:sm_90, not for {}", kCudaPluginFile, target);
    }
    return cuda::make_cuda_backend().release();
  } catch (const std::exception& error) {
    write_message(error.what(), message, message_bytes);
    return nullptr;
  }
}
