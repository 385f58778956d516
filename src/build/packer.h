// From a WeightSource to the tensors of an engine: layouts by plan, AWQ pre-scales folded where the
// mathematics allows it (qkv's and a shared gate/up one into the norm before them; o's and down's
// stay beside the weights and are applied by the op that produces their input).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

#include "formats/weight_source.h"
#include "model/weights.h"
#include "spec/engine_plan.h"

namespace nibble {

struct PackedTensor {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};

/// Calls `emit` for every engine tensor, in the order of the forward pass, one weight in memory at
/// a time.
void pack_engine(const WeightSource& source, const EnginePlan& plan,
                 const std::function<void(PackedTensor)>& emit);

/// Names, dtypes and shapes that pack_engine() will emit, in its order, without packing.
void describe_engine(const WeightSource& source, const EnginePlan& plan,
                     const std::function<void(const std::string& name, DType dtype,
                                              const std::vector<int64_t>& shape)>& emit);

/// What pack_engine() will emit, in bytes.
uint64_t engine_bytes(const WeightSource& source, const EnginePlan& plan);

/// The same, held in memory: for eval and bench without an engine on disk.
EngineTensors pack_in_memory(const WeightSource& source, const EnginePlan& plan);

}  // namespace nibble
