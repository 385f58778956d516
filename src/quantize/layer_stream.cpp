// SPDX-License-Identifier: Apache-2.0
#include "quantize/layer_stream.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "base/interrupt.h"
#include "formats/widen.h"

namespace nibble {
namespace {

// bf16 rows of a dense tensor, for backends whose activations are bf16.
std::vector<std::byte> as_bf16(const TensorView& view) {
  const std::vector<float> values = widen(view);
  std::vector<std::byte> out(values.size() * sizeof(uint16_t));
  auto* to = reinterpret_cast<uint16_t*>(out.data());
  std::transform(values.begin(), values.end(), to, float_to_bf16);
  return out;
}

WeightLayout layout_of(DType dtype, const std::string& name) {
  switch (dtype) {
    case DType::kBF16: return WeightLayout::kBf16Rows;
    case DType::kF16: return WeightLayout::kF16Rows;
    case DType::kF32: return WeightLayout::kF32Rows;
    default:
      fail(ErrorKind::kUnsupported, "{} is {}; wanted BF16, F16 or F32", name, dtype_name(dtype));
  }
}

LinearOperand dense_operand(const WeightRow& row, WeightLayout layout, const void* weight) {
  return LinearOperand{.layout = layout,
                       .out_features = static_cast<int>(row.shape[0]),
                       .in_features = static_cast<int>(row.shape[1]),
                       .weight = weight};
}

int blocks_of(size_t tokens, int block_tokens) {
  return (static_cast<int>(tokens) + block_tokens - 1) / block_tokens;
}

}  // namespace

LinearOperand upload_dense(Backend& backend, const WeightSource& source, const WeightRow& row,
                           Buffer* buffer) {
  std::vector<std::byte> storage, converted;
  TensorView view = source.view_dense(row, storage);
  if (backend.act_bytes() == 2 && view.dtype != DType::kBF16) {
    converted = as_bf16(view);
    view = {DType::kBF16, view.shape, converted};
  }
  *buffer = backend.alloc(view.bytes.size());
  backend.upload(buffer->data(), view.bytes.data(), view.bytes.size());
  backend.sync();
  source.release(row);
  return dense_operand(row, layout_of(view.dtype, row.name), buffer->data());
}

StreamedLayer::StreamedLayer(Backend& backend, const WeightSource& source, int layer)
    : backend_(backend) {
  for (const WeightRow& row : weight_table(source.spec())) {
    if (row.layer != layer) continue;
    if (row.shape.size() == 1) {
      const std::vector<float> norm = source.load_dense(row);
      Buffer buffer = backend.alloc(norm.size() * sizeof(float));
      backend.upload(buffer.data(), norm.data(), norm.size() * sizeof(float));
      (row.role == WeightRole::kAttnNorm ? weights_.attn_norm : weights_.mlp_norm) =
          buffer.as<float>();
      buffers_.emplace_back(row.role, std::move(buffer));
    } else {
      Buffer buffer;
      operand(row.role) = upload_dense(backend, source, row, &buffer);
      buffers_.emplace_back(row.role, std::move(buffer));
    }
  }
  backend.sync();
}

void StreamedLayer::replace(WeightRole role, WeightLayout layout, Buffer weight) {
  LinearOperand& target = operand(role);
  target.layout = layout;
  target.weight = weight.data();
  const auto found = std::find_if(buffers_.begin(), buffers_.end(),
                                  [&](const auto& buffer) { return buffer.first == role; });
  NIBBLE_CHECK(found != buffers_.end());
  found->second = std::move(weight);
}

LinearOperand& StreamedLayer::operand(WeightRole role) {
  switch (role) {
    case WeightRole::kQkv: return weights_.qkv;
    case WeightRole::kO: return weights_.o;
    case WeightRole::kGate: return weights_.gate;
    case WeightRole::kUp: return weights_.up;
    case WeightRole::kDown: return weights_.down;
    default: fail(ErrorKind::kInternal, "not a linear of a layer");
  }
}

void StreamedLayer::replace(WeightRole role, std::span<const float> weight) {
  LinearOperand& target = operand(role);
  NIBBLE_CHECK(weight.size() ==
               static_cast<size_t>(target.out_features) * static_cast<size_t>(target.in_features));
  for (auto& [have, buffer] : buffers_) {
    if (have != role) continue;
    buffer = Buffer();
    buffer = backend_.alloc(weight.size_bytes());
    backend_.upload(buffer.data(), weight.data(), weight.size_bytes());
    backend_.sync();
    target.layout = WeightLayout::kF32Rows;
    target.weight = buffer.data();
  }
}

LayerStream::LayerStream(Backend& backend, const WeightSource& source,
                         std::span<const std::vector<int32_t>> sequences, int max_sequences,
                         int max_step_tokens)
    : backend_(backend), block_tokens_(backend.calibration_ops() == nullptr ? 32 : 64) {
  const ModelSpec& spec = source.spec();
  const bool wide = backend.act_bytes() == sizeof(float);
  NIBBLE_CHECK(wide || backend.calibration_ops() != nullptr, "{} activations of {} bytes",
               backend.name(), backend.act_bytes());
  int longest = 0;
  for (size_t first = 0; first < sequences.size();) {
    size_t count = 0, tokens = 0;
    while (first + count < sequences.size() && count < static_cast<size_t>(max_sequences) &&
           (count == 0 ||
            tokens + sequences[first + count].size() <= static_cast<size_t>(max_step_tokens))) {
      tokens += sequences[first + count].size();
      ++count;
    }
    for (size_t s = first; s < first + count; ++s)
      longest = std::max(longest, static_cast<int>(sequences[s].size()));
    const int length = static_cast<int>(tokens);
    if (count > 1) {
      add_step(sequences, first, count, 0, 0);
    } else {
      for (int begin = 0; begin < length; begin += max_step_tokens) {
        add_step(sequences, first, 1, begin, std::min(length, begin + max_step_tokens));
      }
    }
    first += count;
  }
  NIBBLE_CHECK(num_tokens_ > 0, "no calibration tokens");
  if (longest > spec.max_position) {
    fail(ErrorKind::kUnsupported,
         "calibration sequences of {} tokens, but the model has {} positions; lower "
         "--calib-seq-len",
         longest, spec.max_position);
  }

  plan_.target = backend.name();
  plan_.spec = spec;
  plan_.limits = {.max_batch_size = max_sequences,
                  .max_input_len = longest,
                  .max_output_len = 0,
                  .max_num_tokens = max_step_tokens};
  // Where activations are not f32 the cache is the one that serves: int8 costs next to nothing
  // (docs/quantization.md) and has the fast kernels.
  plan_.kv_format = wide ? KvFormat::kF32 : KvFormat::kInt8Dynamic;
  plan_.kv_block_tokens = block_tokens_;
  std::vector<std::byte> storage;
  Buffer embedding;  // a device's copy; both go when the tokens are embedded
  for (const WeightRow& row : weight_table(spec)) {
    if (row.role != WeightRole::kEmbedding) continue;
    if (backend.calibration_ops() != nullptr) {
      weights_.embedding = upload_dense(backend, source, row, &embedding);
      continue;
    }
    const TensorView view = source.view_dense(row, storage);
    weights_.embedding =
        dense_operand(row, layout_of(view.dtype, row.name),
                      backend.import_weights(view.bytes.data(), view.bytes.size()));
  }
  int step_tokens = 0, step_blocks = 0;
  size_t step_fields = 0;
  for (const Step& step : steps_) {
    step_tokens = std::max(step_tokens, step.num_tokens);
    step_blocks = std::max(step_blocks, step.num_seqs * step.blocks_per_seq);
    step_fields = std::max(step_fields, step.fields.size());
  }
  decoder_ = std::make_unique<Decoder>(backend, plan_, weights_, step_tokens, 1);
  device_step_ = backend.alloc(step_fields * sizeof(int32_t));
  kv_ = KvLayer{.format = plan_.kv_format,
                .num_blocks = step_blocks,
                .block_tokens = block_tokens_,
                .num_kv_heads = spec.num_kv_heads,
                .head_dim = spec.head_dim};
  kv_data_ = backend.alloc(
      static_cast<size_t>(step_blocks) *
      backend.kv_block_bytes(kv_.format, block_tokens_, spec.num_kv_heads, spec.head_dim));
  kv_.data = kv_data_.data();

  row_bytes_ = static_cast<size_t>(spec.hidden_size) * backend.act_bytes();
  states_ = backend.alloc(static_cast<size_t>(num_tokens_) * row_bytes_);
  for (const Step& step : steps_) {
    decoder_->embed(upload(step), state(step));
    backend.sync();
  }
  weights_.embedding = {};
}

void LayerStream::add_step(std::span<const std::vector<int32_t>> sequences, size_t first,
                           size_t count, int begin, int end) {
  Step step;
  step.num_seqs = static_cast<int>(count);
  step.first_token = num_tokens_;
  std::vector<int32_t> positions, starts = {0}, kv_lens, table;
  for (size_t s = first; s < first + count; ++s) {
    step.blocks_per_seq =
        std::max(step.blocks_per_seq, blocks_of(sequences[s].size(), block_tokens_));
  }
  for (size_t s = first; s < first + count; ++s) {
    const int to = end > 0 ? end : static_cast<int>(sequences[s].size());
    for (int position = begin; position < to; ++position) {
      step.fields.push_back(sequences[s][static_cast<size_t>(position)]);
      positions.push_back(position);
    }
    starts.push_back(static_cast<int32_t>(positions.size()));
    kv_lens.push_back(to);
    for (int b = 0; b < step.blocks_per_seq; ++b) {
      table.push_back(static_cast<int32_t>(s - first) * step.blocks_per_seq + b);
    }
  }
  step.num_tokens = static_cast<int>(positions.size());
  for (const auto* part : {&positions, &starts, &kv_lens, &table}) {
    step.fields.insert(step.fields.end(), part->begin(), part->end());
  }
  num_tokens_ += step.num_tokens;
  steps_.push_back(std::move(step));
}

StepBatch LayerStream::upload(const Step& step) {
  for (int i = 0; i < step.num_tokens; ++i) {
    const int32_t id = step.fields[static_cast<size_t>(i)];
    if (id < 0 || id >= plan_.spec.vocab_size) {
      fail(ErrorKind::kInput,
           "calibration token id {} is outside the model's vocabulary of {}; the tokenizer is not "
           "this model's",
           id, plan_.spec.vocab_size);
    }
  }
  backend_.upload(device_step_.data(), step.fields.data(), step.fields.size() * sizeof(int32_t));
  const int tokens = step.num_tokens, seqs = step.num_seqs;
  const int32_t* device = device_step_.as<int32_t>();
  const int32_t* host = step.fields.data();
  return StepBatch{.num_tokens = tokens,
                   .num_seqs = seqs,
                   .max_blocks_per_seq = step.blocks_per_seq,
                   .token_ids = device,
                   .positions = device + tokens,
                   .seq_starts = device + 2 * tokens,
                   .kv_lens = device + 2 * tokens + seqs + 1,
                   .block_tables = device + 2 * tokens + 2 * seqs + 1,
                   .host_seq_starts = host + 2 * tokens,
                   .host_kv_lens = host + 2 * tokens + seqs + 1};
}

void LayerStream::run(int layer, const LayerWeights& weights, const Listener& listen, bool keep,
                      const std::function<void(int64_t tokens)>& on_step) {
  for (size_t step = 0; step < steps_.size(); ++step) {
    run_step(step, layer, weights, listen, keep);
    on_step(tokens_after(step));
  }
}

void LayerStream::run_step(size_t index, int layer, const LayerWeights& weights,
                           const Listener& listen, bool keep) {
  throw_if_interrupted();
  const TapFn tap = [&](int, Tap what, const void* act, int rows, int cols) {
    listen(what, act, rows, cols);
  };
  const Step& step = steps_[index];
  void* x = state(step);
  if (!keep) {
    x = decoder_->x();
    backend_.copy(x, state(step), static_cast<size_t>(step.num_tokens) * row_bytes_);
  }
  decoder_->layer(layer, weights, upload(step), kv_, x, listen ? tap : TapFn());
  backend_.sync();
}

void LayerStream::final_norm_step(size_t index, std::span<const float> norm,
                                  const std::function<void(const void* act, int rows)>& listen) {
  throw_if_interrupted();
  const Step& step = steps_[index];
  const size_t bytes = static_cast<size_t>(step.num_tokens) * row_bytes_;
  if (normed_.bytes() < bytes + norm.size_bytes()) {
    normed_ = Buffer();
    normed_ = backend_.alloc(bytes + norm.size_bytes());  // the norm's weight, then the output
  }
  float* weight = normed_.as<float>();
  backend_.upload(weight, norm.data(), norm.size_bytes());
  backend_.rms_norm(state(step), weight, static_cast<float>(plan_.spec.norm_eps), step.num_tokens,
                    plan_.spec.hidden_size, weight + norm.size());
  backend_.sync();
  listen(weight + norm.size(), step.num_tokens);
}

}  // namespace nibble
