// Counter-based: element i of a tensor depends on the tensor's name, the seed and i only. One
// 64-bit hash gives four elements through a table of 4096 normal quantiles (largest 3.7 sigma),
// which is all that a bf16 can tell apart in the middle and keeps one core above 1 GB/s.
// SPDX-License-Identifier: Apache-2.0
#include "formats/synthetic.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/nearest.h"
#include "formats/safetensors.h"
#include "formats/widen.h"
#include "spec/weight_table.h"

namespace nibble {
namespace {

constexpr int64_t kChunk = 1 << 20;  // elements; a multiple of 4

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t tensor_key(std::string_view name, uint64_t seed) {
  return xxh3_64(std::as_bytes(std::span(name.data(), name.size())), seed);
}

double uniform(uint64_t key, int64_t index) {
  return static_cast<double>(mix(key + static_cast<uint64_t>(index)) >> 11) * 0x1p-53;
}

double normal_quantile(double p) {
  double low = -10, high = 10;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

const std::array<float, 4096>& normal_quantiles() {
  static const std::array<float, 4096> table = [] {
    std::array<float, 4096> quantiles;
    for (int i = 0; i < 4096; ++i)
      quantiles[static_cast<size_t>(i)] = static_cast<float>(normal_quantile((i + 0.5) / 4096));
    return quantiles;
  }();
  return table;
}

template <typename T>
void fill(uint64_t key, int64_t first, const std::array<T, 4096>& table, std::span<T> out) {
  const size_t whole = out.size() / 4 * 4;
  uint64_t counter = key + static_cast<uint64_t>(first / 4) * 0xd1342543de82ef95u;
  size_t i = 0;
  for (; i < whole; i += 4, counter += 0xd1342543de82ef95u) {
    const uint64_t bits = mix(counter);
    out[i] = table[(bits >> 4) & 4095];
    out[i + 1] = table[(bits >> 20) & 4095];
    out[i + 2] = table[(bits >> 36) & 4095];
    out[i + 3] = table[bits >> 52];
  }
  for (const uint64_t bits = mix(counter); i < out.size(); ++i)
    out[i] = table[(bits >> (4 + 16 * (i - whole))) & 4095];
}

struct HfTensor {
  std::string name;
  std::vector<int64_t> shape;
  const WeightRow* row;
  int64_t num_elements() const { return shape.size() == 2 ? shape[0] * shape[1] : shape[0]; }
};

std::vector<HfTensor> hf_tensors(const WeightRow& row, const ModelSpec& spec) {
  std::vector<HfTensor> tensors;
  for (size_t i = 0; i < row.hf_names.size(); ++i) {
    std::vector<int64_t> shape = row.shape;
    if (row.role == WeightRole::kQkv) shape[0] = i == 0 ? spec.q_size() : spec.kv_size();
    tensors.push_back({row.hf_names[i], shape, &row});
  }
  return tensors;
}

double standard_deviation(const WeightRow& row, const ModelSpec& spec) {
  if (row.role == WeightRole::kEmbedding) return 1.0;
  const double std = 1.0 / std::sqrt(static_cast<double>(row.shape.back()));
  // Both branches of every layer add to the residual stream.
  return row.shard == ShardRule::kColumns ? std / std::sqrt(2.0 * spec.num_layers) : std;
}

// Around 1, about one channel in 64 four to twelve times that: what makes quantization hard in real
// models.
void fill_norm(uint64_t key, std::span<uint16_t> out) {
  for (size_t i = 0; i < out.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    double value = 1 + 0.1 * normal_quantiles()[mix(key ^ (i * 2 + 1)) >> 52];
    if (uniform(key + 1, index) < 1.0 / 64) value *= 4 + 8 * uniform(key + 2, index);
    out[i] = float_to_bf16(static_cast<float>(value));
  }
}

// bf16 elements [first, first + out.size()) of one tensor; first is a multiple of 4.
class Generator {
 public:
  Generator(const HfTensor& tensor, const ModelSpec& spec, uint64_t seed)
      : tensor_(tensor), key_(tensor_key(tensor.name, seed)) {
    const double std = standard_deviation(*tensor.row, spec);
    for (size_t i = 0; i < table_.size(); ++i) {
      table_[i] = float_to_bf16(static_cast<float>(normal_quantiles()[i] * std));
    }
  }
  void make(int64_t first, std::span<uint16_t> out) const {
    if (tensor_.shape.size() == 1) {
      NIBBLE_CHECK(first == 0);
      fill_norm(key_, out);
    } else {
      fill(key_, first, table_, out);
    }
  }

 private:
  const HfTensor& tensor_;
  uint64_t key_;
  std::array<uint16_t, 4096> table_;
};

json::object hf_config(const ModelSpec& spec) {
  json::object config = {
      {"architectures", json::array{json::string(spec.architecture)}},
      {"model_type", spec.architecture == "LlamaForCausalLM" ? "llama" : "mistral"},
      {"attention_dropout", 0.0},
      {"bos_token_id", spec.bos_token_id},
      {"eos_token_id", json::array(spec.eos_token_ids.begin(), spec.eos_token_ids.end())},
      {"head_dim", spec.head_dim},
      {"hidden_act", "silu"},
      {"hidden_size", spec.hidden_size},
      {"intermediate_size", spec.ffn_size},
      {"max_position_embeddings", spec.max_position},
      {"num_attention_heads", spec.num_heads},
      {"num_hidden_layers", spec.num_layers},
      {"num_key_value_heads", spec.num_kv_heads},
      {"rms_norm_eps", spec.norm_eps},
      {"rope_theta", spec.rope_theta},
      {"sliding_window", nullptr},
      {"tie_word_embeddings", spec.tied_embeddings},
      {"torch_dtype", "bfloat16"},
      {"use_cache", true},
      {"vocab_size", spec.vocab_size},
  };
  if (spec.rope_factor != 0) {
    config["rope_scaling"] = {
        {"rope_type", "llama3"},
        {"factor", spec.rope_factor},
        {"low_freq_factor", spec.rope_low_freq_factor},
        {"high_freq_factor", spec.rope_high_freq_factor},
        {"original_max_position_embeddings", spec.rope_original_max_position}};
  }
  return config;
}

struct Int4Table {
  std::array<std::byte, 4096> bytes;  // two nibbles, each one of 64 quantiles
  double std = 0;
};
const Int4Table& int4_table() {
  static const Int4Table table = [] {
    Int4Table made;
    std::array<int, 64> q;
    double sum = 0;
    for (int i = 0; i < 64; ++i) {
      const double value = std::nearbyint(2.9 * normal_quantile((i + 0.5) / 64));
      q[static_cast<size_t>(i)] = static_cast<int>(std::clamp(value, -7.0, 7.0));
      sum += q[static_cast<size_t>(i)] * q[static_cast<size_t>(i)];
    }
    for (size_t i = 0; i < made.bytes.size(); ++i) {
      made.bytes[i] = static_cast<std::byte>((q[i & 63] & 15) | ((q[i >> 6] & 15) << 4));
    }
    made.std = std::sqrt(sum / 64);
    return made;
  }();
  return table;
}

class SyntheticSource final : public WeightSource {
 public:
  SyntheticSource(const ModelSpec& spec, uint64_t seed, bool int4, LmHeadFormat lm_head)
      : spec_(spec), seed_(seed), int4_(int4), lm_head_(lm_head) {
    spec_.dtype = DType::kBF16;
    NIBBLE_CHECK(lm_head == LmHeadFormat::kDense || (int4 && !spec.tied_embeddings));
  }
  const ModelSpec& spec() const override { return spec_; }
  bool is_quantized(const WeightRow& row) const override { return bits(row) != 0; }
  int bits(const WeightRow& row) const override {
    return int4_ ? quantized_bits(row, lm_head_) : 0;
  }

  std::vector<float> load_dense(const WeightRow& row) const override {
    std::vector<std::byte> storage;
    return widen(view_dense(row, storage));
  }

  TensorView view_dense(const WeightRow& row, std::vector<std::byte>& storage) const override {
    NIBBLE_CHECK(!is_quantized(row), "{} is quantized", row.name);
    return make_dense(row, storage);
  }

  TensorView make_dense(const WeightRow& row, std::vector<std::byte>& storage) const {
    const std::vector<HfTensor> tensors = hf_tensors(row, spec_);
    size_t total = 0;
    for (const HfTensor& tensor : tensors) total += static_cast<size_t>(tensor.num_elements());
    storage.resize(total * sizeof(uint16_t));
    uint16_t* out = reinterpret_cast<uint16_t*>(storage.data());
    for (const HfTensor& tensor : tensors) {
      const Generator generator(tensor, spec_, seed_);
      const int64_t count = tensor.num_elements();
      const int64_t step = tensor.shape.size() == 1 ? count : kChunk;
      pool_.parallel_for((count + step - 1) / step, [&](int64_t chunk, int) {
        const int64_t first = chunk * step;
        generator.make(first,
                       std::span(out + first, static_cast<size_t>(std::min(step, count - first))));
      });
      out += count;
    }
    return {DType::kBF16, row.shape, storage};
  }

  Int4Weight load_int4(const WeightRow& row) const override {
    NIBBLE_CHECK(is_quantized(row), "{} is dense", row.name);
    const int64_t out = row.shape[0], in = row.shape[1];
    const int group = in % 128 == 0 ? 128 : static_cast<int>(in);
    Int4Weight weight{.out_features = out, .in_features = in, .group_size = group};
    const uint64_t key = tensor_key(row.name, seed_);
    const Int4Table& table = int4_table();
    weight.owned.resize(static_cast<size_t>(out / 2 * in));
    const auto count = static_cast<int64_t>(weight.owned.size());
    pool_.parallel_for((count + kChunk - 1) / kChunk, [&](int64_t chunk, int) {
      const int64_t first = chunk * kChunk;
      fill(key, first, table.bytes,
           std::span(weight.owned)
               .subspan(static_cast<size_t>(first),
                        static_cast<size_t>(std::min(kChunk, count - first))));
    });
    weight.nibbles = weight.owned.data();
    // Scales vary by a quarter and prequant factors by a half either way; the root mean squares are
    // divided out.
    const double rms = std::sqrt((0.5625 + 0.375 + 0.25 / 3) * (0.25 + 0.5 + 1.0 / 3));
    const double base = standard_deviation(row, spec_) / (table.std * rms);
    weight.scales.resize(static_cast<size_t>(out * (in / group)));
    for (size_t i = 0; i < weight.scales.size(); ++i) {
      weight.scales[i] =
          static_cast<float>(base * (0.75 + 0.5 * uniform(key + 1, static_cast<int64_t>(i))));
    }
    weight.pre_scale = load_pre_scale(row);
    return weight;
  }

  Int8Weight load_int8(const WeightRow& row) const override {
    NIBBLE_CHECK(bits(row) == 8, "{} has {} bits", row.name, bits(row));
    const int64_t out = row.shape[0], in = row.shape[1];
    const int group = in % 128 == 0 ? 128 : static_cast<int>(in);
    Int8Weight weight{.out_features = out, .in_features = in, .group_size = group};
    std::vector<std::byte> storage;
    const std::vector<float> values = widen(make_dense(row, storage));
    weight.owned.resize(values.size());
    weight.scales.resize(static_cast<size_t>(out * (in / group)));
    pool_.parallel_for(static_cast<int64_t>(weight.scales.size()), [&](int64_t index, int) {
      const float* from = values.data() + index * group;
      float widest = 0;
      for (int i = 0; i < group; ++i) widest = std::max(widest, std::fabs(from[i]));
      const float scale = widest > 0 ? widest / kMaxInt8 : 1.0f;
      weight.scales[static_cast<size_t>(index)] = scale;
      for (int i = 0; i < group; ++i) {
        weight.owned[static_cast<size_t>(index * group + i)] =
            static_cast<std::byte>(static_cast<int8_t>(std::lround(from[i] / scale)));
      }
    });
    weight.values = weight.owned.data();
    return weight;
  }

  std::vector<float> load_pre_scale(const WeightRow& row) const override {
    if (bits(row) == 8) return {};
    const bool shared = row.role == WeightRole::kGate || row.role == WeightRole::kUp;
    const uint64_t key = tensor_key(
        shared ? fmt::format("layers.{}.mlp_input", row.layer) : row.name + ".pre", seed_);
    std::vector<float> pre_scale(static_cast<size_t>(row.shape[1]));
    for (size_t i = 0; i < pre_scale.size(); ++i) {
      pre_scale[i] = static_cast<float>(0.5 + uniform(key, static_cast<int64_t>(i)));
    }
    return pre_scale;
  }

  std::optional<KvScales> kv_scales() const override {
    if (!int4_) return std::nullopt;
    const std::vector<float> scales(static_cast<size_t>(spec_.num_layers), 8.0f / 127);
    return KvScales{scales, scales};
  }
  void release(const WeightRow&) const override {}
  std::vector<std::string> notices() const override {
    return {fmt::format("synthetic weights (seed {}): speed is real, text is not", seed_)};
  }

 private:
  ModelSpec spec_;
  uint64_t seed_;
  bool int4_;
  LmHeadFormat lm_head_;
  mutable ThreadPool pool_;
};

ModelSpec shape(int layers, int hidden, int heads, int kv_heads, int ffn, int vocab,
                int max_position, double theta) {
  ModelSpec spec;
  spec.num_layers = layers;
  spec.hidden_size = hidden;
  spec.num_heads = heads;
  spec.num_kv_heads = kv_heads;
  spec.head_dim = 128;
  spec.ffn_size = ffn;
  spec.vocab_size = vocab;
  spec.max_position = max_position;
  spec.rope_theta = theta;
  return spec;
}

}  // namespace

const std::vector<SyntheticShape>& synthetic_shapes() {
  static const std::vector<SyntheticShape> shapes = {
      {"nano-like", "tiny, for tests", shape(3, 256, 4, 2, 768, 512, 2048, 1e6), 2},
      {"bench-1.1b", "1.1 B parameters, fits anywhere",
       shape(16, 2048, 16, 4, 8192, 32768, 32768, 1e6), 1},
      {"mistral-7b", "Mistral-7B v0.3", shape(32, 4096, 32, 8, 14336, 32768, 32768, 1e6), 3},
      {"mistral-24b", "Mistral-Small-24B", shape(40, 5120, 32, 8, 32768, 131072, 131072, 1e9), 10},
  };
  return shapes;
}

const SyntheticShape& synthetic_shape(std::string_view name) {
  std::vector<std::string_view> names;
  for (const SyntheticShape& candidate : synthetic_shapes()) {
    if (name == candidate.name) return candidate;
    names.push_back(candidate.name);
  }
  fail(ErrorKind::kUsage, "no synthetic shape \"{}\"; the nearest is \"{}\" (known: {})", name,
       nearest_name(name, names), fmt::join(names, ", "));
}

void write_synthetic_hf(const fs::path& out, const ModelSpec& spec, uint64_t seed, int num_shards,
                        ThreadPool& pool) {
  NIBBLE_CHECK(num_shards >= 1, "{} shards", num_shards);
  AtomicDirectory directory = AtomicDirectory::create(out);
  const std::vector<WeightRow> table = weight_table(spec);
  std::vector<HfTensor> tensors;
  uint64_t total = 0;
  for (const WeightRow& row : table) {
    for (HfTensor& tensor : hf_tensors(row, spec)) {
      total += static_cast<uint64_t>(tensor.num_elements()) * 2;
      tensors.push_back(std::move(tensor));
    }
  }
  // Cut where the running size passes each shard's share; like real checkpoints, layers may
  // straddle.
  std::vector<std::vector<const HfTensor*>> shards(static_cast<size_t>(num_shards));
  uint64_t before = 0;
  for (const HfTensor& tensor : tensors) {
    const size_t shard = static_cast<size_t>(before * static_cast<uint64_t>(num_shards) / total);
    shards[shard].push_back(&tensor);
    before += static_cast<uint64_t>(tensor.num_elements()) * 2;
  }
  std::erase_if(shards, [](const auto& shard) { return shard.empty(); });
  const auto shard_name = [&](size_t shard) {
    return shards.size() == 1
               ? std::string("model.safetensors")
               : fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, shards.size());
  };
  pool.parallel_for(static_cast<int64_t>(shards.size()), [&](int64_t index, int) {
    const auto& shard = shards[static_cast<size_t>(index)];
    std::vector<SafetensorsWriter::Declaration> declared;
    for (const HfTensor* tensor : shard)
      declared.push_back({tensor->name, DType::kBF16, tensor->shape});
    SafetensorsWriter writer = SafetensorsWriter::create(
        directory.path() / shard_name(static_cast<size_t>(index)), declared, {{"format", "pt"}});
    std::vector<uint16_t> chunk;
    for (const HfTensor* tensor : shard) {
      const Generator generator(*tensor, spec, seed);
      const int64_t count = tensor->num_elements();
      const int64_t step = tensor->shape.size() == 1 ? count : kChunk;
      for (int64_t first = 0; first < count; first += step) {
        chunk.resize(static_cast<size_t>(std::min(step, count - first)));
        generator.make(first, chunk);
        writer.write(std::as_bytes(std::span(chunk)));
      }
    }
    writer.commit();
  });
  if (shards.size() > 1) {
    json::object map;
    for (size_t shard = 0; shard < shards.size(); ++shard) {
      for (const HfTensor* tensor : shards[shard]) map[tensor->name] = shard_name(shard);
    }
    const json::object index = {{"metadata", {{"total_size", total}}},
                                {"weight_map", std::move(map)}};
    write_file_atomically(directory.path() / "model.safetensors.index.json",
                          dump_json(index, {.indent = 2}) + "\n");
  }
  write_file_atomically(directory.path() / "config.json",
                        dump_json(hf_config(spec), {.indent = 2}) + "\n");
  const json::object generation = {
      {"bos_token_id", spec.bos_token_id},
      {"eos_token_id", json::array(spec.eos_token_ids.begin(), spec.eos_token_ids.end())}};
  write_file_atomically(directory.path() / "generation_config.json",
                        dump_json(generation, {.indent = 2}) + "\n");
  directory.commit();
}

std::unique_ptr<WeightSource> open_synthetic(const ModelSpec& spec, uint64_t seed, bool int4,
                                             LmHeadFormat lm_head) {
  return std::make_unique<SyntheticSource>(spec, seed, int4, lm_head);
}

}  // namespace nibble
