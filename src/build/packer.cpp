// SPDX-License-Identifier: Apache-2.0
#include "build/packer.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "pack/cuda_int4.h"
#include "pack/int8.h"
#include "pack/pack.h"

namespace nibble {
namespace {

std::vector<std::byte> to_bytes(std::span<const float> values) {
  std::vector<std::byte> bytes(values.size_bytes());
  std::memcpy(bytes.data(), values.data(), values.size_bytes());
  return bytes;
}

DType dense_dtype(WeightLayout layout) {
  switch (layout) {
    case WeightLayout::kBf16Rows: return DType::kBF16;
    case WeightLayout::kF16Rows: return DType::kF16;
    default: return DType::kF32;
  }
}

// Emits name, dtype and shape, and a function that makes the bytes; describing a model never calls
// the latter.
using MakeBytes = std::function<std::vector<std::byte>()>;
using Emit = std::function<void(std::string name, DType dtype, std::vector<int64_t> shape,
                                const MakeBytes& make)>;

class Packer {
 public:
  Packer(const WeightSource& source, const EnginePlan& plan, const Emit& emit)
      : source_(source), plan_(plan), emit_(emit) {}

  void run() {
    const std::vector<WeightRow> table = weight_table(plan_.spec);
    for (size_t i = 0; i < table.size(); ++i) {
      const WeightRow& row = table[i];
      switch (row.role) {
        case WeightRole::kAttnNorm: norm(row, pre_scale_of(table, i, WeightRole::kQkv)); break;
        case WeightRole::kMlpNorm: {
          const std::vector<float> gate = pre_scale_of(table, i, WeightRole::kGate);
          shared_gate_up_ = gate == pre_scale_of(table, i, WeightRole::kUp);
          if (!shared_gate_up_ && plan_.target.starts_with("cuda")) {
            fail(ErrorKind::kUnsupported,
                 "layer {}: gate and up have different pre-scales (as ModelOpt's awq_lite makes "
                 "them), which the cuda target cannot run; build for cpu:native, or quantize with "
                 "nibble's --method awq, whose gate and up share one",
                 row.layer);
          }
          norm(row, shared_gate_up_ ? gate : std::vector<float>());
          break;
        }
        case WeightRole::kFinalNorm:
          norm(row, plan_.spec.tied_embeddings ? std::vector<float>()
                                               : pre_scale_of(table, i, WeightRole::kLmHead));
          break;
        case WeightRole::kQkv: linear(row, plan_.linear_layout, /*keep_pre_scale=*/false); break;
        case WeightRole::kO:
        case WeightRole::kDown: linear(row, plan_.linear_layout, true); break;
        case WeightRole::kGate:
          if (fuses_gate_up(row)) {
            gate_up(row, table[i + 1]);
          } else {
            linear(row, plan_.linear_layout, !shared_gate_up_);
          }
          break;
        case WeightRole::kUp:
          if (!fuses_gate_up(row)) linear(row, plan_.linear_layout, !shared_gate_up_);
          break;
        case WeightRole::kEmbedding: dense(row, plan_.dense_layout); break;
        case WeightRole::kLmHead: linear(row, plan_.lm_head_layout, false); break;
      }
      source_.release(row);
    }
    if (plan_.kv_format == KvFormat::kInt8Static) {
      const std::optional<KvScales> scales = source_.kv_scales();
      NIBBLE_CHECK(scales.has_value(), "plan_engine() lets int8-static through only with scales");
      std::vector<float> values;
      for (size_t layer = 0; layer < scales->k.size(); ++layer) {
        values.push_back(scales->k[layer]);
        values.push_back(scales->v[layer]);
      }
      emit_("kv_scales", DType::kF32, {plan_.spec.num_layers, 2}, [&] { return to_bytes(values); });
    }
  }

 private:
  std::vector<float> pre_scale_of(const std::vector<WeightRow>& table, size_t from,
                                  WeightRole role) {
    for (size_t i = from; i < table.size(); ++i) {
      if (table[i].role != role) continue;
      return source_.is_quantized(table[i]) ? source_.load_pre_scale(table[i])
                                            : std::vector<float>();
    }
    NIBBLE_CHECK(false, "the weight table lost a row");
    return {};
  }

  void norm(const WeightRow& row, const std::vector<float>& pre_scale) {
    emit_(row.name + ".weight", DType::kF32, row.shape, [&] {
      std::vector<float> weight = source_.load_dense(row);
      for (size_t i = 0; i < pre_scale.size(); ++i) weight[i] *= pre_scale[i];
      return to_bytes(weight);
    });
  }

  void dense(const WeightRow& row, WeightLayout layout) {
    const DType wanted = dense_dtype(layout);
    emit_(row.name + ".weight", wanted, row.shape, [&] {
      std::vector<std::byte> storage;
      const TensorView view = source_.view_dense(row, storage);
      if (view.dtype == wanted) return std::vector<std::byte>(view.bytes.begin(), view.bytes.end());
      const std::vector<float> values = source_.load_dense(row);
      if (wanted == DType::kF32) return to_bytes(values);
      std::vector<std::byte> narrowed(values.size() * sizeof(uint16_t));
      for (size_t i = 0; i < values.size(); ++i) {
        const uint16_t bits =
            wanted == DType::kF16 ? float_to_f16(values[i]) : float_to_bf16(values[i]);
        std::memcpy(narrowed.data() + i * sizeof bits, &bits, sizeof bits);
      }
      return narrowed;
    });
  }

  bool fuses_gate_up(const WeightRow& row) const {
    return plan_.linear_layout == WeightLayout::kCudaInt4 && source_.is_quantized(row);
  }

  // cuda: one matrix of both, rows interleaved, under gate's name; up has no tensor.
  void gate_up(const WeightRow& gate_row, const WeightRow& up_row) {
    NIBBLE_CHECK(up_row.role == WeightRole::kUp);
    if (!shared_gate_up_) {
      fail(ErrorKind::kUnsupported,
           "{} and {} have different AWQ pre-scales, wanted one for both (nibble quantize makes "
           "them so): the cuda backend multiplies both by one activation",
           gate_row.name, up_row.name);
    }
    const int out = static_cast<int>(gate_row.shape[0] + up_row.shape[0]),
              in = static_cast<int>(gate_row.shape[1]);
    const auto size = static_cast<int64_t>(cuda_int4_bytes(out, in));
    emit_(gate_row.name + ".weight", DType::kU8, {size}, [&] {
      const Int4Weight gate = load_int4(gate_row), up = load_int4(up_row);
      return pack_cuda_int4({rows_of(gate), rows_of(up)}, in, /*gate_up=*/true);
    });
  }

  static PortableRows rows_of(const Int4Weight& weight) {
    return {weight.out_features, weight.nibbles, weight.scales};
  }

  Int4Weight load_int4(const WeightRow& row) const {
    Int4Weight weight = source_.load_int4(row);
    check_group(row, weight.group_size);
    return weight;
  }
  Int8Weight load_int8(const WeightRow& row) const {
    Int8Weight weight = source_.load_int8(row);
    check_group(row, weight.group_size);
    return weight;
  }
  void check_group(const WeightRow& row, int group_size) const {
    if (group_size == plan_.group_size) return;
    fail(ErrorKind::kUnsupported,
         "{} is quantized in groups of {}, the layers before it in groups of {}; one size a model",
         row.name, group_size, plan_.group_size);
  }

  void linear(const WeightRow& row, WeightLayout layout, bool keep_pre_scale) {
    const int bits = source_.bits(row);
    if (bits == 0) {
      dense(row, layout);
      return;
    }
    const int out = static_cast<int>(row.shape[0]), in = static_cast<int>(row.shape[1]),
              group = plan_.group_size;
    const size_t size = bits == 8 ? packed_int8_bytes(out, in, group, layout)
                                  : packed_int4_bytes(out, in, group, layout);
    emit_(row.name + ".weight", DType::kU8, {static_cast<int64_t>(size)}, [&] {
      if (bits == 8) {
        const Int8Weight weight = load_int8(row);
        const auto* q = reinterpret_cast<const int8_t*>(weight.values);
        return pack_int8({out, in, group, {q, q + int64_t{out} * in}, weight.scales}, layout)
            .weight;
      }
      const Int4Weight weight = load_int4(row);
      if (layout == WeightLayout::kCudaInt4) {
        return pack_cuda_int4({rows_of(weight)}, in, /*gate_up=*/false);
      }
      const Int4Matrix matrix{out, in, group, unpack_nibbles(weight.nibbles, out, in),
                              weight.scales};
      return pack_int4(matrix, layout).weight;
    });
    // The other layouts hold their scales inline.
    if (layout == WeightLayout::kInt4Portable || layout == WeightLayout::kInt8Portable) {
      emit_(row.name + ".scales", DType::kF32, {out, in / group},
            [&] { return to_bytes(bits == 8 ? load_int8(row).scales : load_int4(row).scales); });
    }
    if (!keep_pre_scale) return;
    const std::vector<float> pre_scale = source_.load_pre_scale(row);
    if (std::ranges::all_of(pre_scale, [](float s) { return s == 1; })) return;
    emit_(row.name + ".pre_scale", DType::kF32, {in}, [&] { return to_bytes(pre_scale); });
  }

  const WeightSource& source_;
  const EnginePlan& plan_;
  const Emit& emit_;
  bool shared_gate_up_ = true;
};

}  // namespace

void pack_engine(const WeightSource& source, const EnginePlan& plan,
                 const std::function<void(PackedTensor)>& emit) {
  const Emit make_and_emit = [&](std::string name, DType dtype, std::vector<int64_t> shape,
                                 const MakeBytes& make) {
    emit(PackedTensor{std::move(name), dtype, std::move(shape), make()});
  };
  Packer(source, plan, make_and_emit).run();
}

void describe_engine(
    const WeightSource& source, const EnginePlan& plan,
    const std::function<void(const std::string&, DType, const std::vector<int64_t>&)>& emit) {
  const Emit describe = [&](const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                            const MakeBytes&) { emit(name, dtype, shape); };
  Packer(source, plan, describe).run();
}

uint64_t engine_bytes(const WeightSource& source, const EnginePlan& plan) {
  uint64_t total = 0;
  describe_engine(source, plan,
                  [&](const std::string&, DType dtype, const std::vector<int64_t>& shape) {
                    int64_t bits = dtype_bits(dtype);
                    for (const int64_t size : shape) bits *= size;
                    total += static_cast<uint64_t>(bits) / 8;
                  });
  return total;
}

EngineTensors pack_in_memory(const WeightSource& source, const EnginePlan& plan) {
  EngineTensors tensors;
  pack_engine(source, plan, [&](PackedTensor tensor) {
    tensors.add(std::move(tensor.name), tensor.dtype, std::move(tensor.shape),
                std::move(tensor.bytes));
  });
  return tensors;
}

}  // namespace nibble
