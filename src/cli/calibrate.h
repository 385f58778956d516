// Calibration data for `quantize`: the files the user gave, or the built-in texts, encoded by the
// model's own tokenizer and chat template. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>

#include "cli/options.h"
#include "cli/terminal.h"
#include "quantize/calibration.h"

namespace nibble::cli {

/// Throws Error{kInput} without a tokenizer, and what make_calibration() throws.
CalibrationData calibrate(const QuantizeFlags& flags, Progress& progress);

/// "chat.jsonl:2.5" -> {"chat.jsonl", 2.5}; without a number after the last colon the weight is 1.
std::pair<std::string, double> parse_calibration_flag(const std::string& flag);

}  // namespace nibble::cli
