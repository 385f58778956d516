// The generated model card, README.md: written by quantize, completed by build, in the layout in
// which quantized models are published. It says what was done and measured, and "not measured"
// elsewhere. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "build/hf_card.h"
#include "spec/engine_plan.h"
#include "spec/model_spec.h"
#include "spec/weight_table.h"

namespace nibble {

struct ModelCard {
  std::string name;        // of the quantized model: the directory's name
  std::string base_name;   // of the original model's directory
  std::string base_model;  // its id ("org/name"); empty: not known
  HfCard base;             // what its card says
  ModelSpec spec;
  json::object report;  // as render_report_html() takes it
  int tp_size = 1, group_size = 128;
  std::string dtype;
  LmHeadFormat lm_head = LmHeadFormat::kDense;
  uint64_t parameters = 0, base_bytes = 0, checkpoint_bytes = 0;
};

std::string render_model_card(const ModelCard& card);

/// The card with a row for an engine. Building the same directory again replaces its row; a text
/// that is no generated card comes back as it was.
std::string add_engine_to_card(const std::string& card, const fs::path& engine,
                               const EnginePlan& plan, uint64_t engine_bytes);

/// What `bench latency` measured of an engine.
struct SpeedRow {
  std::string engine, target;  // the engine's directory name
  int batch = 1, prompt_tokens = 0, output_tokens = 0;
  double prefill_tokens_per_s = 0, decode_tokens_per_s = 0;
  double weight_gb_per_s = 0, read_gb_per_s = 0;  // of the machine, measured in the same run
};

/// The card with a row of speed; one of the same engine, batch and lengths is replaced. A text
/// without a place for it comes back as it was.
std::string add_speed_to_card(const std::string& card, const SpeedRow& row);

/// The cards that tell of an engine: its own, and the one of the published layout that holds it.
/// Throws Error{kUsage} when the directory has no generated card.
std::vector<fs::path> cards_of_engine(const fs::path& engine);

/// After `build`: the engine gets a copy of the checkpoint's card with its own row, and the card of
/// the published layout that holds both (ROOT/trt-llm/engines/...) gets the row too.
void update_cards(const fs::path& checkpoint, const fs::path& engine, const EnginePlan& plan);

}  // namespace nibble
