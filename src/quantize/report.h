// What a quantization did, as values: filled by quantizer.cpp, kept in the artifacts of a run that
// can be continued, shown by report_html.cpp and the model card. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "formats/weight_source.h"
#include "quantize/awq.h"

namespace nibble {

/// Loudness of the channels of a linear's input on the calibration set.
struct InputReport {
  float max_abs = 0;               // largest |x|
  float median_channel = 0;        // of the channels' mean |x|
  float loudest_channel_mean = 0;  // largest mean |x|
  int64_t loudest_channel = 0;
};

struct LinearReport {
  std::string name;         // weight table row: "layers.3.qkv"
  awq::GroupReport search;  // gate and up share one, except by awq-lite
  InputReport input;
  float pre_scale_min = 1, pre_scale_max = 1;
};

struct QuantizeReport {
  std::vector<LinearReport> linears;  // empty for kRtn
  KvScales kv_scales;                 // empty without int8_kv
  int64_t num_calibration_tokens = 0;
  // Wall time of all runs together when one was continued.
  double forward_seconds = 0;  // passes over the calibration tokens
  double search_seconds = 0;   // scales, clips and rounding
  double write_seconds = 0;    // everything else: reading weights, writing files
  int layers_continued = 0;    // taken from an earlier, interrupted run

  double seconds() const { return forward_seconds + search_seconds + write_seconds; }
  json::object to_json() const;
};

json::object to_json(const LinearReport& linear);
LinearReport linear_report_from_json(const json::object& object);

}  // namespace nibble
