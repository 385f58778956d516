// What a model directory or one tensor is, as JSON for tools and as text for people. Reads, never
// judges. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "base/file.h"
#include "base/json.h"
#include "formats/weight_source.h"

namespace nibble {

/// {kind, directory, parameters, spec, weights: [{role, count, shape, storage, group_size?,
/// parameters, bytes}], bytes, bits_per_parameter, kv_scales, notices}. For an engine: {kind,
/// directory, tensors, bytes, metadata} (checksums left out).
json::object inspect_model(const fs::path& directory);
/// The same of an open source ("kind" is given).
json::object inspect_source(const WeightSource& source, std::string_view kind);

/// One tensor's {name, file, dtype, shape, bytes, min, max, mean, std, nonfinite, first}. `name` is
/// a row of the weight table ("layers.3.qkv"; int4 rows are dequantized and their scales described
/// too) or a tensor's name in any safetensors or engine file of the directory. Throws Error{kInput}
/// naming the nearest.
json::object inspect_tensor(const fs::path& directory, std::string_view name);

/// The text form of the two.
std::string describe_model(const json::object& report);
std::string describe_tensor(const json::object& report);

/// "14.5 GB", "640 B": powers of 1000.
std::string human_bytes(uint64_t bytes);

}  // namespace nibble
