// What quantizing takes of a device's memory, known before anything is allocated there. Internal to
// quantize/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "quantize/quantizer.h"

namespace nibble {

/// Bytes; upper bounds of what is alive at once.
struct DevicePlan {
  uint64_t states = 0;   // of all tokens, of the unquantized model too where drift is corrected
  uint64_t weights = 0;  // of a layer, or of a lm_head in four bits
  uint64_t statistics = 0;
  uint64_t steps = 0;     // activations of one step
  uint64_t rounding = 0;  // the largest group of linears in f32, with integers and errors
  uint64_t total() const { return states + weights + statistics + steps + rounding; }
  std::string sentence() const;
};

/// `act_bytes`: Backend::act_bytes(). Of the phases the one that takes most.
DevicePlan plan_device(const ModelSpec& spec, const QuantizeOptions& options, int64_t tokens,
                       size_t act_bytes);

}  // namespace nibble
