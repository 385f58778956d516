// SPDX-License-Identifier: Apache-2.0
#include "model/decoder.h"

#include <cmath>
#include <numbers>

#include "base/error.h"

namespace nibble {
namespace {

// cos and sin of position * theta^(-2d/D) for d in [0, D/2), in double, rounded once; Hugging Face
// computes the angle in fp32, which this matches to the last bits that matter. Llama-3 scaling
// stretches low frequencies.
Buffer make_rope_table(Backend& backend, const ModelSpec& spec, int max_position,
                       RopeTable* table) {
  const int half = spec.head_dim / 2;
  std::vector<float> values(2 * static_cast<size_t>(max_position) * static_cast<size_t>(half));
  float* sin_begin = values.data() + static_cast<size_t>(max_position) * static_cast<size_t>(half);
  for (int d = 0; d < half; ++d) {
    double frequency = std::pow(spec.rope_theta, -2.0 * d / spec.head_dim);
    if (spec.rope_factor > 0) {
      const double wavelength = 2 * std::numbers::pi / frequency;
      const double low = spec.rope_original_max_position / spec.rope_low_freq_factor;
      const double high = spec.rope_original_max_position / spec.rope_high_freq_factor;
      if (wavelength > low) {
        frequency /= spec.rope_factor;
      } else if (wavelength > high) {
        const double smooth =
            (spec.rope_original_max_position / wavelength - spec.rope_low_freq_factor) /
            (spec.rope_high_freq_factor - spec.rope_low_freq_factor);
        frequency = (1 - smooth) * frequency / spec.rope_factor + smooth * frequency;
      }
    }
    // Hugging Face keeps inverse frequencies in fp32 and multiplies there.
    const float inverse_frequency = static_cast<float>(frequency);
    for (int position = 0; position < max_position; ++position) {
      const float angle = static_cast<float>(position) * inverse_frequency;
      const size_t at =
          static_cast<size_t>(position) * static_cast<size_t>(half) + static_cast<size_t>(d);
      values[at] = static_cast<float>(std::cos(double{angle}));
      sin_begin[at] = static_cast<float>(std::sin(double{angle}));
    }
  }
  Buffer buffer = backend.alloc(values.size() * sizeof(float));
  backend.upload(buffer.data(), values.data(), values.size() * sizeof(float));
  backend.sync();
  table->cos = buffer.as<float>();
  table->sin = buffer.as<float>() + values.size() / 2;
  table->max_position = max_position;
  return buffer;
}

}  // namespace

Decoder::Decoder(Backend& backend, const EnginePlan& plan, const ModelWeights& weights,
                 int max_tokens, int max_logit_rows)
    : backend_(backend), plan_(plan), weights_(weights) {
  const ModelSpec& spec = plan_.spec;
  EngineLimits limits = plan_.limits;
  limits.max_num_tokens = max_tokens;
  backend_.reserve(spec, limits, max_logit_rows);
  const size_t rows = static_cast<size_t>(max_tokens) * backend_.act_bytes();
  x_ = backend_.alloc(rows * static_cast<size_t>(spec.hidden_size));
  normed_ = backend_.alloc(rows * static_cast<size_t>(spec.hidden_size));
  qkv_ = backend_.alloc(rows * static_cast<size_t>(spec.qkv_size()));
  attn_ = backend_.alloc(rows * static_cast<size_t>(spec.q_size()));
  ffn_ = backend_.alloc(rows * static_cast<size_t>(spec.ffn_size));
  logits_ = backend_.alloc(static_cast<size_t>(max_logit_rows) *
                           static_cast<size_t>(spec.vocab_size) * sizeof(float));
  rope_ = make_rope_table(backend_, spec, limits.max_seq_len(), &rope_table_);
}

void Decoder::embed(const StepBatch& batch, void* x) {
  backend_.embed(batch, weights_.embedding, x);
}

void Decoder::layer(int layer, const LayerWeights& weights, const StepBatch& batch,
                    const KvLayer& kv, void* x, const TapFn& tap) {
  const ModelSpec& spec = plan_.spec;
  const int rows = batch.num_tokens;
  const float eps = static_cast<float>(spec.norm_eps);
  const auto listen = [&](Tap what, const void* act, int cols) {
    if (tap) tap(layer, what, act, rows, cols);
  };

  listen(Tap::kAttnResidual, x, spec.hidden_size);
  backend_.rms_norm(x, weights.attn_norm, eps, rows, spec.hidden_size, normed_.data());
  listen(Tap::kQkvInput, normed_.data(), spec.hidden_size);
  backend_.linear(normed_.data(), weights.qkv, rows, false, qkv_.data());
  backend_.rope_store_kv(batch, qkv_.data(), spec.num_heads, rope_table_, kv);
  listen(Tap::kRotatedQkv, qkv_.data(), spec.qkv_size());
  backend_.attention(batch, qkv_.data(), spec.num_heads, kv, weights.o.pre_scale, attn_.data());
  listen(Tap::kOInput, attn_.data(), spec.q_size());
  // attention and gate_up have already applied the pre-scale of the linear that follows.
  LinearOperand o = weights.o;
  o.pre_scale = nullptr;
  backend_.linear(attn_.data(), o, rows, true, x);

  listen(Tap::kMlpResidual, x, spec.hidden_size);
  backend_.rms_norm(x, weights.mlp_norm, eps, rows, spec.hidden_size, normed_.data());
  listen(Tap::kGateUpInput, normed_.data(), spec.hidden_size);
  backend_.gate_up(normed_.data(), weights.gate, weights.up, rows, weights.down.pre_scale,
                   ffn_.data());
  listen(Tap::kDownInput, ffn_.data(), spec.ffn_size);
  LinearOperand down = weights.down;
  down.pre_scale = nullptr;
  backend_.linear(ffn_.data(), down, rows, true, x);
}

void Decoder::head(const StepBatch& batch, const void* x) {
  backend_.lm_head(batch, x, weights_.final_norm, static_cast<float>(plan_.spec.norm_eps),
                   weights_.lm_head, logits_.as<float>());
}

void Decoder::forward(const StepBatch& batch, std::span<const KvLayer> kv) {
  backend_.begin_step(batch);
  embed(batch, x_.data());
  for (size_t layer = 0; layer < weights_.layers.size(); ++layer) {
    this->layer(static_cast<int>(layer), weights_.layers[layer], batch, kv[layer], x_.data());
  }
  if (batch.num_logit_rows > 0) head(batch, x_.data());
}

}  // namespace nibble
