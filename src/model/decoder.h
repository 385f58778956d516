// The one decoder: a straight line of seam ops for every backend, every step kind, eval and
// calibration. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>

#include "model/weights.h"

namespace nibble {

/// What the quantizer listens to. `act` is a device pointer of the backend's activation type.
enum class Tap : uint8_t {
  kQkvInput,
  kOInput,
  kGateUpInput,
  kDownInput,
  kRotatedQkv /* after RoPE */,
  kAttnResidual,  // x before o adds to it
  kMlpResidual,   // x before down adds to it
  kHeadInput  // after the final norm: of the model, not of a layer; Decoder::layer() never says it
};
using TapFn = std::function<void(int layer, Tap tap, const void* act, int rows, int cols)>;

class Decoder {
 public:
  /// Allocates every activation buffer for `max_tokens` rows. `backend` and `weights` must outlive
  /// it.
  Decoder(Backend& backend, const EnginePlan& plan, const ModelWeights& weights, int max_tokens,
          int max_logit_rows);

  /// One step: embeds, runs every layer, leaves logits [R, vocab] of batch.logit_rows in logits().
  void forward(const StepBatch& batch, std::span<const KvLayer> kv);
  float* logits() const { return logits_.as<float>(); }

  // Pieces of forward(), for the layer-streaming quantizer: x is [T, hidden] activations.
  void embed(const StepBatch& batch, void* x);
  void layer(int layer, const LayerWeights& weights, const StepBatch& batch, const KvLayer& kv,
             void* x, const TapFn& tap = {});
  void head(const StepBatch& batch, const void* x);
  void* x() const { return x_.data(); }

 private:
  Backend& backend_;
  const EnginePlan plan_;
  const ModelWeights& weights_;
  Buffer x_, normed_, qkv_, attn_, ffn_, logits_, rope_;
  RopeTable rope_table_;
};

}  // namespace nibble
