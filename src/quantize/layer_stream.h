// The calibration set's hidden states, carried through the model one layer at a time. Everything is
// in the backend's memory: all states, one layer's weights and one step's activations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "formats/weight_source.h"
#include "model/decoder.h"

namespace nibble {

/// Copies the rows of a dense linear to the backend, in the type the source stores or, where
/// activations have 16 bits, in bf16. The source's pages may be dropped afterwards.
LinearOperand upload_dense(Backend& backend, const WeightSource& source, const WeightRow& row,
                           Buffer* buffer);

/// One layer's weights on a backend, in the type the source stores; replaceable by dequantized
/// ones.
class StreamedLayer {
 public:
  /// Copies the rows of `layer` as upload_dense() does.
  StreamedLayer(Backend& backend, const WeightSource& source, int layer);
  const LayerWeights& weights() const { return weights_; }
  /// Puts floats [out, in] in the place of a quantizable row.
  void replace(WeightRole role, std::span<const float> weight);
  /// The same with rows that are on the backend already.
  void replace(WeightRole role, WeightLayout layout, Buffer weight);
  const LinearOperand& linear(WeightRole role) { return operand(role); }

 private:
  LinearOperand& operand(WeightRole role);
  Backend& backend_;
  LayerWeights weights_;
  std::vector<std::pair<WeightRole, Buffer>> buffers_;
};

class LayerStream {
 public:
  /// Listens to the tap's activation [rows, cols] in the backend's memory and type.
  using Listener = std::function<void(Tap tap, const void* act, int rows, int cols)>;

  /// Embeds `sequences`. A step takes up to `max_sequences` whole sequences, or a part of one long
  /// one, and at most `max_step_tokens` tokens. Throws Error{kInput} for ids outside the
  /// vocabulary, Error{kUnsupported} for sequences past the model's positions.
  LayerStream(Backend& backend, const WeightSource& source,
              std::span<const std::vector<int32_t>> sequences, int max_sequences,
              int max_step_tokens);

  int64_t num_tokens() const { return num_tokens_; }
  /// Runs one layer over all tokens. `listen` may be empty. With `keep` the states become the
  /// layer's outputs, otherwise they stay what they were. `on_step` hears the tokens done so far.
  void run(int layer, const LayerWeights& weights, const Listener& listen, bool keep,
           const std::function<void(int64_t tokens)>& on_step);
  /// One step of it; two streams of the same sequences have the same steps.
  void run_step(size_t step, int layer, const LayerWeights& weights, const Listener& listen,
                bool keep);
  /// One step's states after the model's last norm: [rows, hidden] activations in the backend's
  /// memory, valid until the next step. The states stay as they are.
  void final_norm_step(size_t step, std::span<const float> norm /*[hidden]*/,
                       const std::function<void(const void* act, int rows)>& listen);
  size_t num_steps() const { return steps_.size(); }
  int64_t tokens_after(size_t step) const {
    return steps_[step].first_token + steps_[step].num_tokens;
  }

  /// [tokens, hidden] activations: what the next layer will read. In the backend's memory, so only
  /// a host backend's can be kept for a run that continues this one.
  std::span<std::byte> states() {
    return {states_.as<std::byte>(), static_cast<size_t>(num_tokens_) * row_bytes_};
  }

 private:
  struct Step {
    std::vector<int32_t> fields;  // ids, positions, seq_starts, kv_lens, block table
    int num_tokens = 0, num_seqs = 0, blocks_per_seq = 0;
    int64_t first_token = 0;
  };
  void add_step(std::span<const std::vector<int32_t>> sequences, size_t first, size_t count,
                int begin, int end);
  StepBatch upload(const Step& step);
  std::byte* state(const Step& step) {
    return states_.as<std::byte>() + static_cast<size_t>(step.first_token) * row_bytes_;
  }

  Backend& backend_;
  const int block_tokens_;
  EnginePlan plan_;
  ModelWeights weights_;  // the embedding only
  std::unique_ptr<Decoder> decoder_;
  std::vector<Step> steps_;
  int64_t num_tokens_ = 0;
  size_t row_bytes_ = 0;
  Buffer states_;                          // [tokens, hidden] activations
  Buffer device_step_, kv_data_, normed_;  // normed_: of final_norm_step()
  KvLayer kv_;
};

}  // namespace nibble
