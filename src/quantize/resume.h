// What a quantization keeps on disk so that one that was killed can go on: each finished layer's
// integers, scales and report, and the calibration tokens' states after the last of them. A layer
// is either there whole or not at all. Lies beside the checkpoint that is being written and goes
// with it. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <span>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "formats/checkpoint_writer.h"
#include "quantize/report.h"
#include "spec/weight_table.h"

namespace nibble {

struct LayerResult {
  std::map<WeightRole, CheckpointLinear> linears;
  std::vector<LinearReport> reports;  // empty for kRtn
  float k_scale = 0, v_scale = 0;     // with int8_kv
  double forward_seconds = 0, search_seconds = 0;
};

class ResumeFolder {
 public:
  /// Opens `directory`, or makes it. `fingerprint` says everything the result depends on; a folder
  /// that was begun with another one is Error{kUsage} naming the first difference, because hours of
  /// work may be in it.
  static ResumeFolder open(const fs::path& directory, const json::object& fingerprint);

  int layers_done() const { return layers_done_; }
  /// Layer `layer` < layers_done(). Throws Error{kInput} for a damaged file.
  LayerResult load(int layer) const;
  /// The states after layers_done() layers into `states`, of the size that was saved.
  void load_states(const std::vector<std::span<std::byte>>& states) const;
  /// Layer layers_done(), and the states after it (none where nothing flows through the layers).
  void save(const LayerResult& result, const std::vector<std::span<std::byte>>& states);

 private:
  fs::path layer_file(int layer) const;
  fs::path states_file(int layer) const;
  fs::path directory_;
  int layers_done_ = 0;
};

}  // namespace nibble
