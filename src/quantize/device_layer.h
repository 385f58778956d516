// A layer of the quantizer where a device does the work: calibration passes, search and rounding
// without activations or Gram matrices ever on the host. Internal to quantize/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "quantize/device_group.h"
#include "quantize/input_groups.h"
#include "quantize/layer_stream.h"
#include "quantize/quantizer.h"
#include "quantize/resume.h"

namespace nibble {

class DeviceLayers {
 public:
  /// Of `options` the method is kAwq or kRtn. Everything given must outlive it.
  DeviceLayers(Backend& backend, const WeightSource& source, const CalibrationData& calibration,
               const QuantizeOptions& options);

  int64_t num_tokens() const { return stream_.num_tokens(); }
  /// pass 0: listening, 1: search, 2: the quantized layer's outputs; `done` of `total` units.
  using Tick = std::function<void(int pass, int64_t done, int64_t total)>;
  /// The next layer, 0 first. For kRtn only the ranges of K and V; the linears are not made.
  LayerResult next(const Tick& tick);
  /// lm_head in four bits, after the last layer; of the passes there is 0 and 1.
  LayerResult lm_head(const Tick& tick);

 private:
  bool searches() const { return options_.method != QuantizeMethod::kRtn; }
  const WeightRow& row(WeightRole role) const { return rows_.at({layer_, role}); }
  void listen(const StreamedLayer& layer, std::map<Tap, awq::DeviceStatistics>& statistics,
              LayerResult& result, const Tick& tick);
  void listen_after_layers(awq::DeviceStatistics& input, const Tick& tick);
  void finish(awq::DeviceStatistics& input) const;
  /// `layer` gets the dequantized rows where it goes on with them; null: none does.
  void search(const InputGroup& group, const awq::DeviceStatistics& input,
              std::span<const LinearOperand> linears, StreamedLayer* layer, LayerResult& result);

  Backend& backend_;
  CalibrationOps& ops_;
  const WeightSource& source_;
  const QuantizeOptions& options_;
  std::map<std::pair<int, WeightRole>, WeightRow> rows_;
  LayerStream stream_;
  std::unique_ptr<LayerStream> dense_stream_;  // the unquantized model, to correct drift
  int layer_ = -1;                             // lm_head is taken for a layer behind the last
};

}  // namespace nibble
