// SPDX-License-Identifier: Apache-2.0
#include "build/cuda_plugin.h"

#include <dlfcn.h>

#include <array>
#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "ops/plugin_abi.h"

namespace nibble {
namespace {

// Which plugin has a target's code; null: none.
const char* plugin_file(const std::string& target) {
  if (target == "cuda:sm_90") return kCudaPluginFile;
  if (target == "cuda:portable") return kCudaPortablePluginFile;
  return nullptr;
}

// Never closed: the backend's code lives in it, and so do the exceptions it throws.
void* open_library(const char* file) {
  std::error_code ignored;
  const fs::path program = fs::read_symlink("/proc/self/exe", ignored).parent_path();
  std::string tried;
  for (const fs::path& candidate :
       {program / file, program / ".." / "lib" / file, fs::path(file)}) {
    const bool by_path = candidate.has_parent_path();
    if (by_path && !fs::exists(candidate, ignored)) {
      tried += fmt::format("\n  {}: no such file", candidate.string());
      continue;
    }
    void* library = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return library;
    const char* reason = dlerror();
    tried += fmt::format("\n  {}{}: {}", candidate.string(), by_path ? "" : " on the library path",
                         reason != nullptr ? reason : "unknown error");
  }
  fail(ErrorKind::kDevice,
       "the CUDA backend is not here: {} could not be opened. It is built where nvcc >= 12.8 is "
       "found (cmake -DNIBBLE_CUDA=ON); put it beside the nibble binary. Tried:{}",
       file, tried);
}

template <typename Function>
Function* function_of(void* library, const char* file, const char* name) {
  auto* function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) {
    fail(ErrorKind::kDevice, "{} has no function {}: it is not this nibble's plugin; rebuild it",
         file, name);
  }
  return function;
}

}  // namespace

std::string resolve_cuda_target(const std::string& target) {
  if (plugin_file(target) != nullptr) return target;
  fail(
      ErrorKind::kUnsupported,
      "target {}: this build of nibble has CUDA code for cuda:sm_90 (H100, H200) and cuda:portable "
      "(any GPU from compute capability 8.0); use --target cuda:sm_90, --target cuda:portable or "
      "--target cpu:native",
      target);
}

std::unique_ptr<Backend> open_cuda_backend(const std::string& target,
                                           ActivationPrecision precision) {
  const std::string resolved = resolve_cuda_target(target);
  const char* file = plugin_file(resolved);
  auto* open = function_of<PluginOpenFn>(open_library(file), file, kPluginOpenSymbol);
  std::array<char, 2048> message{};
  std::unique_ptr<Backend> backend(
      open(kPluginAbi, resolved.c_str(), precision, message.data(), message.size()));
  if (!backend) fail(ErrorKind::kDevice, "target {}: {}", resolved, message.data());
  return backend;
}

int cuda_plugin_major(const std::string& target) {
  const char* file = plugin_file(resolve_cuda_target(target));
  try {
    return function_of<PluginCudaMajorFn>(open_library(file), file, kPluginCudaMajorSymbol)();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kDevice) throw;
    return 0;
  }
}

std::optional<std::string> unused_gpu(const std::string& target, const fs::path& gpus) {
  if (!target.starts_with("cpu:")) return std::nullopt;
  std::error_code ignored;
  for (const auto& gpu : fs::directory_iterator(gpus, ignored)) {
    std::ifstream information(gpu.path() / "information");
    for (std::string line; std::getline(information, line);) {
      constexpr std::string_view kKey = "Model:";
      if (!line.starts_with(kKey)) continue;
      const size_t begin = line.find_first_not_of(" \t", kKey.size());
      return fmt::format(
          "a GPU is here and target {} does not use it: {}; --target cuda:sm_90 (H100, H200) "
          "or cuda:portable (any from compute capability 8.0) does",
          target, begin == std::string::npos ? "of unknown model" : line.substr(begin));
    }
  }
  return std::nullopt;
}

std::unique_ptr<Backend> open_any_cuda_backend() {
  std::string reasons;
  for (const char* target : {"cuda:sm_90", "cuda:portable"}) {
    try {
      return open_cuda_backend(target, ActivationPrecision::kBf16);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kDevice) throw;
      reasons += fmt::format("\n  {}", error.what());
    }
  }
  fail(ErrorKind::kDevice, "no GPU can be used:{}", reasons);
}

}  // namespace nibble
