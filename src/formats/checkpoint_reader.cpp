// A TensorRT-LLM checkpoint of any tensor and pipeline parallel size, seen whole. With one rank the
// int4 weights are views into the map; otherwise the ranks' slices are put together on demand.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <set>
#include <unordered_map>

#include "base/error.h"
#include "formats/checkpoint_config.h"
#include "formats/model_directory.h"
#include "formats/safetensors.h"
#include "formats/shard.h"
#include "formats/weight_source.h"
#include "formats/widen.h"

namespace nibble {
namespace {

class CheckpointSource final : public WeightSource {
 public:
  explicit CheckpointSource(const fs::path& given) : directory_(checkpoint_directory(given)) {
    const fs::path path = directory_ / "config.json";
    config_ = parse_checkpoint_config(read_json_object(path), path.string());
    apply_generation_config(given, config_.spec);
    if (given != directory_) apply_generation_config(directory_, config_.spec);
    check_tp();
    const int world = config_.tp_size * config_.pp_size;
    for (int rank = 0; rank < world; ++rank) {
      const fs::path file = directory_ / fmt::format("rank{}.safetensors", rank);
      if (!file_exists(file)) {
        fail(ErrorKind::kInput, "{} wants {} rank files (tp_size {} x pp_size {}); {} is missing",
             path.string(), world, config_.tp_size, config_.pp_size, file.filename().string());
      }
      files_.push_back(SafetensorsFile::open(file));
    }
    consumed_.resize(files_.size());
    resolve_head();
    for (const WeightRow& row : weight_table(config_.spec)) rows_.emplace(row.name, resolve(row));
    read_kv_scales();
    note_leftovers();
    consumed_.clear();
  }

  const ModelSpec& spec() const override { return config_.spec; }
  bool is_quantized(const WeightRow& row) const override { return located(row).bits != 0; }
  int bits(const WeightRow& row) const override { return located(row).bits; }

  std::vector<float> load_dense(const WeightRow& row) const override {
    std::vector<std::byte> storage;
    return widen(view_dense(row, storage));
  }

  TensorView view_dense(const WeightRow& row, std::vector<std::byte>& storage) const override {
    const Located& at = located(row);
    NIBBLE_CHECK(at.bits == 0, "{} is quantized", row.name);
    const TensorView first = weight(at, row, 0);
    const int64_t out = row.shape.size() == 2 ? row.shape[0] : 1, in = row.shape.back();
    const int64_t element = dtype_bits(first.dtype) / 8;
    const size_t bytes = static_cast<size_t>(out * in * element);
    // One rank, or every rank the same: the first rows of the first file (less a padded
    // vocabulary's tail).
    if (config_.tp_size == 1 || at.slices[0].num_rows() * at.slices[0].num_cols() * element ==
                                    static_cast<int64_t>(bytes)) {
      return {first.dtype, row.shape, first.bytes.first(bytes)};
    }
    storage.assign(bytes, std::byte{});
    for (int r = 0; r < config_.tp_size; ++r) {
      place_slice(weight(at, row, r).bytes.data(), at.slices[static_cast<size_t>(r)],
                  {.col_bytes = element}, out, in, storage.data());
    }
    return {first.dtype, row.shape, storage};
  }

  Int4Weight load_int4(const WeightRow& row) const override {
    const Located& at = located(row);
    NIBBLE_CHECK(at.bits == 4, "{} has {} bits", row.name, at.bits);
    Int4Weight result{.out_features = row.shape[0], .in_features = row.shape[1]};
    result.nibbles = join(row, at, result);
    return result;
  }

  Int8Weight load_int8(const WeightRow& row) const override {
    const Located& at = located(row);
    NIBBLE_CHECK(at.bits == 8, "{} has {} bits", row.name, at.bits);
    Int8Weight result{.out_features = row.shape[0], .in_features = row.shape[1]};
    result.values = join(row, at, result);
    const auto* q = reinterpret_cast<const int8_t*>(result.values);
    const int64_t count = row.shape[0] * row.shape[1];
    const auto* bad =
        std::find_if(q, q + count, [](int8_t v) { return v < -kMaxInt8 || v > kMaxInt8; });
    if (bad != q + count) {
      fail(ErrorKind::kInput, "{}: value {} of {} is {}; wanted -{}..{}",
           rank_file(at.stage, 0).file().path().parent_path().string(), bad - q, at.name, *bad,
           kMaxInt8, kMaxInt8);
    }
    return result;
  }

  std::optional<KvScales> kv_scales() const override { return kv_scales_; }

  void release(const WeightRow& row) const override {
    const Located& at = located(row);
    for (int r = 0; r < config_.tp_size; ++r) {
      const SafetensorsFile& file = rank_file(at.stage, r);
      for (const char* suffix :
           {".weight", ".weights_scaling_factor", ".prequant_scaling_factor"}) {
        if (!file.contains(at.name + suffix)) continue;
        const TensorView view = file.tensor(at.name + suffix);
        file.file().advise(static_cast<size_t>(view.bytes.data() - file.file().bytes().data()),
                           view.bytes.size(), false);
      }
    }
  }

  std::vector<std::string> notices() const override { return notices_; }

 private:
  struct Located {
    int stage = 0;
    std::string name;  // in the stage's files, with the local layer's number
    int bits = 0;      // of its integers; 0: dense
    bool has_pre_scale = false;
    int group_size = 0;
    std::vector<ShardSlice> slices;  // one per tensor-parallel rank
  };

  const Located& located(const WeightRow& row) const {
    const auto found = rows_.find(row.name);
    NIBBLE_CHECK(found != rows_.end(), "{} is not a weight of this model", row.name);
    return found->second;
  }

  // Scales, pre-scale and integers of all ranks into `result`; returns where the integers are.
  template <typename Weight>
  const std::byte* join(const WeightRow& row, const Located& at, Weight& result) const {
    const int64_t out = row.shape[0], in = row.shape[1], rows_a_byte = 8 / at.bits;
    // A vocabulary may be odd; what is stored is padded, so the last byte's other row is there.
    const int64_t whole = (out + rows_a_byte - 1) / rows_a_byte * rows_a_byte;
    result.group_size = at.group_size;
    result.scales.resize(static_cast<size_t>(out * (in / at.group_size)));
    if (config_.tp_size > 1) result.owned.resize(static_cast<size_t>(whole / rows_a_byte * in));
    if (at.has_pre_scale) result.pre_scale.resize(static_cast<size_t>(in));
    for (int r = 0; r < config_.tp_size; ++r) {
      const ShardSlice& slice = at.slices[static_cast<size_t>(r)];
      const std::vector<float> scales =
          finite(tensor(at, row, r, ".weights_scaling_factor"), row, r, "scale");
      place_slice(reinterpret_cast<const std::byte*>(scales.data()), slice,
                  {.col_bytes = sizeof(float), .col_divide = at.group_size}, out, in,
                  reinterpret_cast<std::byte*>(result.scales.data()));
      if (config_.tp_size > 1) {
        place_slice(weight(at, row, r).bytes.data(), slice, {.divide_rows = rows_a_byte}, whole, in,
                    result.owned.data());
      }
      if (at.has_pre_scale) {
        const std::vector<float> part =
            finite(tensor(at, row, r, ".prequant_scaling_factor"), row, r, "prequant scale");
        std::copy(part.begin(), part.end(), result.pre_scale.begin() + slice.col_begin);
      }
    }
    return config_.tp_size > 1 ? result.owned.data() : weight(at, row, 0).bytes.data();
  }

  const SafetensorsFile& rank_file(int stage, int tp_rank) const {
    return files_[static_cast<size_t>(stage * config_.tp_size + tp_rank)];
  }
  TensorView tensor(const Located& at, const WeightRow&, int tp_rank,
                    std::string_view suffix) const {
    return rank_file(at.stage, tp_rank).tensor(at.name + std::string(suffix));
  }
  TensorView weight(const Located& at, const WeightRow& row, int tp_rank) const {
    return tensor(at, row, tp_rank, ".weight");
  }

  std::vector<float> finite(const TensorView& view, const WeightRow& row, int tp_rank,
                            std::string_view what) const {
    std::vector<float> values = widen(view);
    for (size_t i = 0; i < values.size(); ++i) {
      if (std::isfinite(values[i])) continue;
      fail(ErrorKind::kInput, "{}: {} {} of {} is {}; wanted a finite number",
           rank_file(located(row).stage, tp_rank).file().path().string(), what, i,
           located(row).name, values[i]);
    }
    return values;
  }

  void check_tp() const {
    const ModelSpec& spec = config_.spec;
    const std::string what = (directory_ / "config.json").string();
    if (config_.quantized) {
      check_shardable(spec, config_.tp_size, std::max(1, config_.group_size), what);
    } else if (spec.num_heads % config_.tp_size != 0 || spec.ffn_size % config_.tp_size != 0 ||
               (spec.num_kv_heads % config_.tp_size != 0 &&
                config_.tp_size % spec.num_kv_heads != 0)) {
      fail(ErrorKind::kInput,
           "{}: {} heads, {} key/value heads or ffn size {} cannot be split over tp_size {}", what,
           spec.num_heads, spec.num_kv_heads, spec.ffn_size, config_.tp_size);
    }
  }

  int stage_of(const WeightRow& row) const {
    if (row.layer >= 0) return row.layer / (config_.spec.num_layers / config_.pp_size);
    return row.role == WeightRole::kEmbedding ? 0 : config_.pp_size - 1;
  }

  // Layers are numbered within their pipeline stage.
  std::string local_name(int layer, std::string_view global) const {
    if (layer < 0) return std::string(global);
    const std::string prefix = fmt::format("transformer.layers.{}.", layer);
    NIBBLE_CHECK(global.starts_with(prefix), "{}", global);
    const int local = layer % (config_.spec.num_layers / config_.pp_size);
    return fmt::format("transformer.layers.{}.{}", local, global.substr(prefix.size()));
  }

  void resolve_head() {
    const bool has_head = rank_file(config_.pp_size - 1, 0).contains("lm_head.weight");
    if (has_head && config_.spec.tied_embeddings) {
      notices_.push_back(
          "config.json shares the embedding table but lm_head.weight is there; the tensor is used");
      config_.spec.tied_embeddings = false;
    }
  }

  [[noreturn]] void wrong_shape(const std::string& file, const std::string& name,
                                const TensorView& view, std::vector<int64_t> wanted,
                                std::string_view hint) const {
    fail(ErrorKind::kInput, "{}: the tensor \"{}\" is {} [{}]; wanted [{}] {}", file, name,
         dtype_name(view.dtype), fmt::join(view.shape, ", "), fmt::join(wanted, ", "), hint);
  }

  Located resolve(const WeightRow& row) {
    Located at{.stage = stage_of(row), .name = local_name(row.layer, row.trtllm_name)};
    const std::string weight_name = at.name + ".weight";
    WeightRow cut = row;
    if (row.role == WeightRole::kEmbedding) {
      using Split = CheckpointConfig::EmbeddingSplit;
      cut.shard = config_.embedding == Split::kReplicated ? ShardRule::kReplicated
                  : config_.embedding == Split::kHidden   ? ShardRule::kColumns
                                                          : ShardRule::kVocab;
      if (cut.shard == ShardRule::kColumns && config_.spec.hidden_size % config_.tp_size != 0) {
        fail(ErrorKind::kInput,
             "{}: embedding_sharding_dim is 1 and hidden_size {} is no multiple of tp_size {}",
             (directory_ / "config.json").string(), config_.spec.hidden_size, config_.tp_size);
      }
    }
    for (int r = 0; r < config_.tp_size; ++r) {
      const SafetensorsFile& file = rank_file(at.stage, r);
      const std::string where = file.file().path().string();
      const TensorView view = file.tensor(weight_name);
      consume(at.stage, r, weight_name);
      const bool packed = view.dtype == DType::kI8 || view.dtype == DType::kU8;
      if (!packed && !is_dense_dtype(view.dtype)) {
        fail(ErrorKind::kUnsupported,
             "{}: the tensor \"{}\" is {}; supported are I8 and U8 (two int4 a byte), BF16, F16 "
             "and F32",
             where, weight_name, dtype_name(view.dtype));
      }
      const int bits = packed ? quantized_bits(row, config_.lm_head) : 0;
      if (packed && (bits == 0 || !config_.quantized)) {
        fail(ErrorKind::kUnsupported, "{}: the tensor \"{}\" is {}, but {}", where, weight_name,
             dtype_name(view.dtype),
             !row.quantizable     ? "only linears may be quantized"
             : !config_.quantized ? "config.json says that nothing is quantized "
                                    "(quantization.quant_algo)"
                                  : "config.json says that lm_head is not quantized "
                                    "(quantization.exclude_modules)");
      }
      if (r > 0 && (bits != at.bits || (!packed && view.dtype != dense_dtype_))) {
        fail(ErrorKind::kInput, "{}: the tensor \"{}\" is {}, unlike rank 0's", where, weight_name,
             dtype_name(view.dtype));
      }
      at.bits = bits;
      dense_dtype_ = view.dtype;
      at.slices.push_back(slice_of(cut, row, r, view, bits == 4 ? 2 : 1, where, weight_name));
      if (packed) {
        check_packed(row, at, r, view, where);
      } else {
        std::vector<int64_t> wanted = {at.slices.back().num_cols()};
        if (row.shape.size() == 2) wanted.insert(wanted.begin(), at.slices.back().num_rows());
        if (view.shape != wanted) wrong_shape(where, weight_name, view, wanted, "by config.json");
      }
    }
    return at;
  }

  ShardSlice slice_of(const WeightRow& cut, const WeightRow& row, int tp_rank,
                      const TensorView& view, int rows_a_byte, const std::string& where,
                      const std::string& name) const {
    const bool vocab_rows = row.role == WeightRole::kEmbedding || row.role == WeightRole::kLmHead;
    if (!vocab_rows || view.shape.empty())
      return shard_slice(cut, config_.spec, tp_rank, config_.tp_size);
    // The vocabulary may be padded, to a multiple of 64 and of tp: the file knows.
    const int64_t parts = cut.shard == ShardRule::kVocab ? config_.tp_size : 1;
    const int64_t vocab = config_.spec.vocab_size, rows = view.shape[0] * rows_a_byte;
    if (rows < (vocab + parts - 1) / parts || rows > (vocab + 64 * parts) / parts + 1) {
      fail(
          ErrorKind::kInput,
          "{}: the tensor \"{}\" has {} rows; wanted {} for a vocabulary of {} over {} ranks, or a "
          "padding of it",
          where, name, rows, (vocab + parts - 1) / parts, vocab, parts);
    }
    ShardSlice slice = shard_slice(cut, config_.spec, tp_rank, config_.tp_size, rows);
    if (cut.shard != ShardRule::kVocab) slice.rows = {{0, rows}};
    return slice;
  }

  void check_packed(const WeightRow& row, Located& at, int tp_rank, const TensorView& view,
                    const std::string& where) {
    const ShardSlice& slice = at.slices.back();
    const int64_t rows = slice.num_rows(), cols = slice.num_cols(), rows_a_byte = 8 / at.bits;
    for (const RowRange& range : slice.rows) {
      if (at.bits == 8) break;
      if (range.begin % 2 != 0 || range.end % 2 != 0) {
        fail(ErrorKind::kUnsupported, "{}: the tensor \"{}.weight\" would hold half a byte's row",
             where, at.name);
      }
    }
    if (view.shape != std::vector<int64_t>{rows / rows_a_byte, cols}) {
      wrong_shape(
          where, at.name + ".weight", view, {rows / rows_a_byte, cols},
          at.bits == 4 ? "(two output rows a byte) by config.json" : "(one a byte) by config.json");
    }
    const SafetensorsFile& file = rank_file(at.stage, tp_rank);
    const std::string scale_name = at.name + ".weights_scaling_factor";
    const TensorView scales = file.tensor(scale_name);
    consume(at.stage, tp_rank, scale_name);
    const int64_t groups = scales.shape.size() == 2 ? scales.shape[1] : 0;
    const int64_t group = groups > 0 && cols % groups == 0 ? cols / groups : 0;
    if (group == 0 || scales.shape[0] != rows || !is_dense_dtype(scales.dtype)) {
      wrong_shape(where, scale_name, scales, {rows, cols / std::max(1, config_.group_size)},
                  "in F32, F16 or BF16");
    }
    if ((config_.group_size > 0 && group != config_.group_size) ||
        (tp_rank > 0 && group != at.group_size)) {
      fail(ErrorKind::kInput, "{}: \"{}\" has groups of {}; wanted {}", where, scale_name, group,
           tp_rank > 0 ? at.group_size : config_.group_size);
    }
    at.group_size = static_cast<int>(group);
    const std::string pre_name = at.name + ".prequant_scaling_factor";
    const bool has_pre = file.contains(pre_name);
    if (tp_rank > 0 && has_pre != at.has_pre_scale) {
      fail(ErrorKind::kInput, "{}: \"{}\" is {}, unlike in rank 0", where, pre_name,
           has_pre ? "present" : "missing");
    }
    at.has_pre_scale = has_pre;
    if (!has_pre) return;
    const TensorView pre = file.tensor(pre_name);
    consume(at.stage, tp_rank, pre_name);
    if (pre.shape != std::vector<int64_t>{cols} || !is_dense_dtype(pre.dtype)) {
      wrong_shape(where, pre_name, pre, {cols}, "in F32, F16 or BF16");
    }
    (void)row;
  }

  std::optional<float> scalar(int stage, const std::string& name) {
    const SafetensorsFile& file = rank_file(stage, 0);
    if (!file.contains(name)) return std::nullopt;
    for (int r = 0; r < config_.tp_size; ++r) consume(stage, r, name);
    const TensorView view = file.tensor(name);
    const std::string where = file.file().path().string();
    if (view.num_elements() != 1 || !is_dense_dtype(view.dtype))
      wrong_shape(where, name, view, {1}, "in F32");
    const float value = widen(view)[0];
    if (!(std::isfinite(value) && value > 0)) {
      fail(ErrorKind::kInput, "{}: \"{}\" is {}; wanted a positive number", where, name, value);
    }
    return value;
  }

  void read_kv_scales() {
    using KvQuant = CheckpointConfig::KvQuant;
    KvScales scales;
    int with = 0;
    const int layers = config_.spec.num_layers;
    for (int layer = 0; layer < layers; ++layer) {
      const int stage = layer / (layers / config_.pp_size);
      const auto read = [&](std::string_view suffix) {
        return scalar(stage, local_name(layer, fmt::format("transformer.layers.{}.attention.{}",
                                                           layer, suffix)));
      };
      const std::optional<float> both = read("kv_cache_scaling_factor");
      std::optional<float> k = read("k_cache_scaling_factor"), v = read("v_cache_scaling_factor");
      read("kv_cache_rcp_scaling_factor");  // 1 / kv_cache_scaling_factor; nothing new
      if (!k) k = both;
      if (!v) v = both;
      if (k.has_value() != v.has_value()) {
        fail(ErrorKind::kInput, "{}: layer {} has a KV scale for {} only", directory_.string(),
             layer, k ? "K" : "V");
      }
      if (!k) continue;
      ++with;
      scales.k.push_back(*k);
      scales.v.push_back(*v);
    }
    if (with != 0 && with != layers) {
      fail(ErrorKind::kInput, "{}: {} of {} layers have KV scales; wanted all or none",
           directory_.string(), with, layers);
    }
    if (config_.kv == KvQuant::kInt8) {
      if (with > 0) {
        kv_scales_ = std::move(scales);
      } else {
        notices_.push_back(
            "config.json says INT8 KV cache but the files hold no scales; int8 with dynamic scales "
            "serves");
      }
    } else if (with > 0) {
      notices_.push_back(
          config_.kv == KvQuant::kFp8
              ? "FP8 KV scales are not used; the KV cache is int8 with dynamic scales"
              : "the files hold KV scales but kv_cache_quant_algo is null; they are not used");
    }
  }

  void consume(int stage, int tp_rank, const std::string& name) {
    consumed_[static_cast<size_t>(stage * config_.tp_size + tp_rank)].insert(name);
  }

  void note_leftovers() {
    std::vector<std::string> left;
    for (size_t i = 0; i < files_.size(); ++i) {
      for (const auto& entry : files_[i].entries()) {
        if (!consumed_[i].contains(entry.name))
          left.push_back(fmt::format("rank{} {}", i, entry.name));
      }
    }
    if (left.empty()) return;
    const size_t total = left.size();
    left.resize(std::min<size_t>(total, 4));
    notices_.push_back(fmt::format("{} tensors of the checkpoint are not used: {}{}", total,
                                   fmt::join(left, ", "), total > left.size() ? ", ..." : ""));
  }

  fs::path directory_;
  CheckpointConfig config_;
  std::vector<SafetensorsFile> files_;  // rank = tp_rank + pp_rank * tp_size
  std::vector<std::set<std::string, std::less<>>> consumed_;
  std::unordered_map<std::string, Located> rows_;
  DType dense_dtype_ = DType::kBF16;  // while resolving one row: rank 0's
  std::optional<KvScales> kv_scales_;
  std::vector<std::string> notices_;
};

}  // namespace

std::unique_ptr<WeightSource> open_checkpoint(const fs::path& directory) {
  return std::make_unique<CheckpointSource>(directory);
}

}  // namespace nibble
