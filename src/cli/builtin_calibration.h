// The calibration texts shipped inside the binary (models/texts/calib.jsonl; sources and licences
// in models/PROVENANCE.md). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace nibble::cli {

std::string_view builtin_calibration();

}  // namespace nibble::cli
