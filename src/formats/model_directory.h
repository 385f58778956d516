// What the files of a model directory say before any weight is read. Shared by the readers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"
#include "base/json.h"
#include "spec/model_spec.h"

namespace nibble {

constexpr uint64_t kMaxConfigBytes = 16u << 20;

/// False for what cannot be looked at either; opening it then says why.
bool file_exists(const fs::path& path);

/// The JSON object in `path`; anything else is an Error{kIo, kInput, kLimit}.
json::object read_json_object(const fs::path& path, uint64_t max_bytes = kMaxConfigBytes);

/// bos and eos of generation_config.json, when `directory` has one, over those of config.json.
void apply_generation_config(const fs::path& directory, ModelSpec& spec);

}  // namespace nibble
