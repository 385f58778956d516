// Is this engine directory whole, and can this binary on this machine run it? Every refusal names
// the file, what is wrong with it and the command that builds it again. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "formats/safetensors.h"
#include "spec/engine_plan.h"

namespace nibble {

/// The engine tensor of XXH3s: one for every other tensor in file order (pads left out), then the
/// header's.
inline constexpr std::string_view kEngineChecksums = "checksums";

/// For every file beside the engine (config.json, tokenizer, ...) an "xxh3:NAME" with its checksum.
void add_file_checksums(const fs::path& directory,
                        std::vector<std::pair<std::string, std::string>>& metadata);

/// The engine file's plan, checked against its checksum and this binary: version, target available
/// here, tp, weight layouts.
EnginePlan read_engine_plan(const SafetensorsFile& file, const fs::path& engine_dir);

/// Opens the engine's file. What is missing or cut off is refused with the command of the plan
/// beside it (config.json).
SafetensorsFile open_engine(const fs::path& engine_dir);

/// The sentence with the command that builds the same engine again, for the plan's target or for
/// another one: for when its plugin, driver or GPU is not here.
std::string rebuild_command(const EnginePlan& plan, const fs::path& engine_dir,
                            std::string_view target = {});

/// Whether what a cuda engine's plan was built with is also `here` (Backend::cuda_platform()).
/// Throws Error{kUnsupported} for another CUDA major version. Returns a sentence for people where
/// kernels were measured on another model of GPU, else nothing. What the plan does not know (built
/// without plugin or GPU) does not matter.
std::string check_cuda(const EnginePlan& plan, const CudaPlatform& here,
                       const fs::path& engine_dir);

/// An engine that cannot run here, which building it again mends: damaged, of another version or
/// CUDA.
class EngineRefused : public Error {
 public:
  using Error::Error;
};

/// Reads everything: each tensor, the bytes between them and each file beside the engine must be
/// what was built. Throws Error{kInput} naming the tensor or file.
void verify_engine(const SafetensorsFile& file, const fs::path& engine_dir);

}  // namespace nibble
