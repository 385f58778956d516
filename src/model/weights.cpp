// SPDX-License-Identifier: Apache-2.0
#include "model/weights.h"

#include "base/error.h"
#include "ops/cpu_int4_layout.h"
#include "ops/cuda_int4_layout.h"
#include "spec/weight_table.h"

namespace nibble {

EngineTensors EngineTensors::from_file(SafetensorsFile file) {
  EngineTensors tensors;
  tensors.file_ = std::make_unique<SafetensorsFile>(std::move(file));
  return tensors;
}

void EngineTensors::add(std::string name, DType dtype, std::vector<int64_t> shape,
                        std::vector<std::byte> bytes) {
  owned_.insert_or_assign(std::move(name), Owned{dtype, std::move(shape), std::move(bytes)});
}

bool EngineTensors::contains(std::string_view name) const {
  return owned_.find(name) != owned_.end() || (file_ && file_->contains(name));
}

uint64_t EngineTensors::total_bytes() const {
  uint64_t total = 0;
  for (const auto& [name, tensor] : owned_) total += tensor.bytes.size();
  if (file_) total += file_->file().bytes().size() - file_->data_start();
  return total;
}

TensorView EngineTensors::get(std::string_view name) const {
  if (const auto it = owned_.find(name); it != owned_.end()) {
    return TensorView{it->second.dtype, it->second.shape, it->second.bytes};
  }
  if (file_) return file_->tensor(name);
  fail(ErrorKind::kInput, "the engine has no tensor {}; rebuild it", name);
}

namespace {

class Loader {
 public:
  Loader(Backend& backend, const EnginePlan& plan, const EngineTensors& tensors)
      : backend_(backend), plan_(plan), tensors_(tensors) {}

  const float* floats(const std::string& name, int64_t count) {
    const TensorView view = tensors_.get(name);
    if (view.dtype != DType::kF32 || view.num_elements() != count) {
      fail(ErrorKind::kInput,
           "engine tensor {} is {} with {} elements, wanted F32 with {}; rebuild the engine", name,
           dtype_name(view.dtype), view.num_elements(), count);
    }
    return static_cast<const float*>(backend_.import_weights(view.bytes.data(), view.bytes.size()));
  }

  LinearOperand linear(const WeightRow& row) {
    LinearOperand operand;
    operand.layout = row.role == WeightRole::kEmbedding ? plan_.dense_layout
                     : row.role == WeightRole::kLmHead  ? plan_.lm_head_layout
                                                        : plan_.linear_layout;
    operand.out_features = static_cast<int>(row.shape[0]);
    operand.in_features = static_cast<int>(row.shape[1]);
    const TensorView view = tensors_.get(row.name + ".weight");
    const size_t wanted = weight_bytes(row, operand.layout);
    if (view.bytes.size() != wanted) {
      fail(ErrorKind::kInput,
           "engine tensor {}.weight has {} bytes, {} [{}, {}] wants {}; rebuild "
           "the engine",
           row.name, view.bytes.size(), weight_layout_name(operand.layout), row.shape[0],
           row.shape[1], wanted);
    }
    operand.weight = backend_.import_weights(view.bytes.data(), view.bytes.size());
    if (row.role != WeightRole::kEmbedding) bytes_ += view.bytes.size();
    if (is_int4(operand.layout) || is_int8(operand.layout)) operand.group_size = plan_.group_size;
    if (tensors_.contains(row.name + ".scales")) {
      const int64_t count = row.shape[0] * (row.shape[1] / plan_.group_size);
      operand.scales = floats(row.name + ".scales", count);
      bytes_ += static_cast<uint64_t>(count) * sizeof(float);
    }
    if (tensors_.contains(row.name + ".pre_scale")) {
      operand.pre_scale = floats(row.name + ".pre_scale", row.shape[1]);
    }
    return operand;
  }

  const float* norm(const WeightRow& row) { return floats(row.name + ".weight", row.shape[0]); }
  uint64_t bytes() const { return bytes_; }

 private:
  // What kernels will read without looking again.
  size_t weight_bytes(const WeightRow& row, WeightLayout layout) const {
    const int out = static_cast<int>(row.shape[0]), in = static_cast<int>(row.shape[1]);
    const size_t elements = static_cast<size_t>(out) * static_cast<size_t>(in);
    switch (layout) {
      case WeightLayout::kF32Rows: return elements * 4;
      case WeightLayout::kBf16Rows:
      case WeightLayout::kF16Rows: return elements * 2;
      default: break;
    }
    if (in % plan_.group_size != 0) {
      fail(ErrorKind::kInput,
           "group_size is {}, which does not divide the {} inputs of {}; rebuild "
           "the engine",
           plan_.group_size, in, row.name);
    }
    // gate's tensor holds up as well.
    if (layout == WeightLayout::kCudaInt4) {
      return cuda_int4_packed_bytes(row.role == WeightRole::kGate ? 2 * row.shape[0] : row.shape[0],
                                    in);
    }
    if (layout == WeightLayout::kCudaInt8)
      return cuda_int4_packed_bytes(row.shape[0], 2 * row.shape[1]);
    if (layout == WeightLayout::kInt4Portable)
      return static_cast<size_t>((out + 1) / 2) * static_cast<size_t>(in);
    if (layout == WeightLayout::kInt8Portable) return elements;
    const size_t plane =
        static_cast<size_t>(cpu_int4_num_tiles(out)) * cpu_int4_tile_bytes(in, plan_.group_size);
    return layout == WeightLayout::kCpuInt8 ? 2 * plane : plane;
  }

  Backend& backend_;
  const EnginePlan& plan_;
  const EngineTensors& tensors_;
  uint64_t bytes_ = 0;
};

}  // namespace

ModelWeights ModelWeights::load(Backend& backend, const EnginePlan& plan,
                                const EngineTensors& tensors) {
  ModelWeights weights;
  weights.layers.resize(static_cast<size_t>(plan.spec.num_layers));
  Loader loader(backend, plan, tensors);
  for (const WeightRow& row : weight_table(plan.spec)) {
    LayerWeights* layer =
        row.layer >= 0 ? &weights.layers[static_cast<size_t>(row.layer)] : nullptr;
    switch (row.role) {
      case WeightRole::kEmbedding: weights.embedding = loader.linear(row); break;
      case WeightRole::kAttnNorm: layer->attn_norm = loader.norm(row); break;
      case WeightRole::kQkv: layer->qkv = loader.linear(row); break;
      case WeightRole::kO: layer->o = loader.linear(row); break;
      case WeightRole::kMlpNorm: layer->mlp_norm = loader.norm(row); break;
      case WeightRole::kGate: layer->gate = loader.linear(row); break;
      case WeightRole::kUp:
        // cuda-int4 keeps both in gate's tensor; equal pointers say so to the backend.
        if (plan.linear_layout == WeightLayout::kCudaInt4) {
          layer->up = layer->gate;
        } else {
          layer->up = loader.linear(row);
        }
        break;
      case WeightRole::kDown: layer->down = loader.linear(row); break;
      case WeightRole::kFinalNorm: weights.final_norm = loader.norm(row); break;
      case WeightRole::kLmHead: weights.lm_head = loader.linear(row); break;
    }
  }
  weights.bytes_per_decode_step = loader.bytes();
  if (plan.spec.tied_embeddings) {
    weights.lm_head = weights.embedding;
    weights.bytes_per_decode_step += tensors.get("embedding.weight").bytes.size();
  }
  if (plan.kv_format == KvFormat::kInt8Static) {
    const TensorView scales = tensors.get("kv_scales");
    const int64_t count = int64_t{2} * plan.spec.num_layers;
    if (scales.dtype != DType::kF32 || scales.num_elements() != count) {
      fail(ErrorKind::kInput,
           "engine tensor kv_scales has {} elements, wanted {}; rebuild the engine",
           scales.num_elements(), count);
    }
    const float* values = reinterpret_cast<const float*>(scales.bytes.data());
    for (size_t i = 0; i < weights.layers.size(); ++i) {
      weights.layers[i].k_scale = values[2 * i];
      weights.layers[i].v_scale = values[2 * i + 1];
    }
  }
  return weights;
}

}  // namespace nibble
