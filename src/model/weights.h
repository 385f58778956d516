// A model's weights as the decoder reads them: operands of the seam pointing into device memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "ops/backend.h"
#include "spec/engine_plan.h"

namespace nibble {

/// Named blobs of an engine: a rank file, or memory (eval of a checkpoint or Hugging Face directory
/// without an engine on disk). Names: "<row name>.weight", ".scales", ".pre_scale" with <row name>
/// as in the weight table; norms are F32 "layers.3.attn_norm.weight"; "kv_scales" F32 [layers, 2]
/// when the plan is kInt8Static.
class EngineTensors {
 public:
  static EngineTensors from_file(SafetensorsFile file);
  EngineTensors() = default;
  void add(std::string name, DType dtype, std::vector<int64_t> shape, std::vector<std::byte> bytes);
  bool contains(std::string_view name) const;
  TensorView get(std::string_view name) const;  // throws Error{kInput}
  uint64_t total_bytes() const;

 private:
  struct Owned {
    DType dtype;
    std::vector<int64_t> shape;
    std::vector<std::byte> bytes;
  };
  std::unique_ptr<SafetensorsFile> file_;
  std::map<std::string, Owned, std::less<>> owned_;
};

struct LayerWeights {
  const float* attn_norm = nullptr;  // [hidden]; qkv's AWQ pre-scale is folded in
  LinearOperand qkv, o;
  const float* mlp_norm =
      nullptr;  // [hidden]; gate's and up's pre-scale is folded in when they share it
  LinearOperand gate, up, down;
  float k_scale = 0, v_scale = 0;  // kInt8Static
};

struct ModelWeights {
  LinearOperand embedding, lm_head;
  const float* final_norm = nullptr;
  std::vector<LayerWeights> layers;
  uint64_t bytes_per_decode_step =
      0;  // read once per step whatever the batch: linears, norms, lm_head

  /// Operands over `tensors` (kept alive by the caller), imported into `backend`.
  static ModelWeights load(Backend& backend, const EnginePlan& plan, const EngineTensors& tensors);
};

}  // namespace nibble
