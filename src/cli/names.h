// Flag values to enums. CLI11 has already refused unknown spellings.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>

#include "base/error.h"
#include "spec/engine_plan.h"

namespace nibble::cli {

inline KvFormat kv_format_from_name(const std::string& name) {
  for (const KvFormat format :
       {KvFormat::kInt8Dynamic, KvFormat::kInt8Static, KvFormat::kF16, KvFormat::kF32}) {
    if (name == kv_format_name(format)) return format;
  }
  fail(ErrorKind::kUsage, "--kv-cache {}: known are int8, int8-static, f16, f32", name);
}

inline std::optional<ActivationPrecision> activation_precision_from_flag(const std::string& name) {
  if (name.empty()) return std::nullopt;
  return activation_precision_from_name(name);
}

}  // namespace nibble::cli
