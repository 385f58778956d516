// SPDX-License-Identifier: Apache-2.0
#include "quantize/report.h"

namespace nibble {

json::object to_json(const LinearReport& linear) {
  const awq::GroupReport& search = linear.search;
  return {{"name", linear.name},
          {"alpha", search.alpha},
          {"beta", search.beta},
          {"error_rtn", search.error_rtn},
          {"error_scaled", search.error_scaled},
          {"error", search.error},
          {"mean_clip", search.mean_clip},
          {"pre_scale_min", linear.pre_scale_min},
          {"pre_scale_max", linear.pre_scale_max},
          {"input_max_abs", linear.input.max_abs},
          {"input_median_channel", linear.input.median_channel},
          {"input_loudest_channel", linear.input.loudest_channel},
          {"input_loudest_channel_mean", linear.input.loudest_channel_mean}};
}

LinearReport linear_report_from_json(const json::object& object) {
  const auto number = [&](const char* key) { return object.at(key).to_number<double>(); };
  const auto single = [&](const char* key) { return static_cast<float>(number(key)); };
  LinearReport linear;
  linear.name = std::string_view(object.at("name").as_string());
  linear.search = {.alpha = number("alpha"),
                   .beta = number("beta"),
                   .error_rtn = number("error_rtn"),
                   .error_scaled = number("error_scaled"),
                   .error = number("error"),
                   .mean_clip = number("mean_clip")};
  linear.pre_scale_min = single("pre_scale_min");
  linear.pre_scale_max = single("pre_scale_max");
  linear.input = {.max_abs = single("input_max_abs"),
                  .median_channel = single("input_median_channel"),
                  .loudest_channel_mean = single("input_loudest_channel_mean"),
                  .loudest_channel = object.at("input_loudest_channel").to_number<int64_t>()};
  return linear;
}

json::object QuantizeReport::to_json() const {
  json::array list;
  for (const LinearReport& linear : linears) list.push_back(nibble::to_json(linear));
  json::array k(kv_scales.k.begin(), kv_scales.k.end()), v(kv_scales.v.begin(), kv_scales.v.end());
  return {{"linears", std::move(list)},
          {"kv_scales", {{"k", std::move(k)}, {"v", std::move(v)}}},
          {"calibration_tokens", num_calibration_tokens},
          {"layers_continued", layers_continued},
          {"seconds", seconds()},
          {"forward_seconds", forward_seconds},
          {"search_seconds", search_seconds},
          {"write_seconds", write_seconds}};
}

}  // namespace nibble
