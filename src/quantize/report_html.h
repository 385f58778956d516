// report.html: what a quantization did, for a person to look at. One file without scripts or
// outside references; inline SVG; readable in light and dark. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "base/json.h"

namespace nibble {

/// `report` is report.json: QuantizeReport::to_json() with "model", "settings" {name: value},
/// "calibration" (CalibrationData::to_json()), "quality" [{text, windows, perplexity,
/// perplexity_parent, kl_divergence, top1_agreement}] and "stages" {name: seconds} beside it. What
/// is missing is shown as not measured.
std::string render_report_html(const json::object& report);

}  // namespace nibble
