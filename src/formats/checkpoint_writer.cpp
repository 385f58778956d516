// SPDX-License-Identifier: Apache-2.0
#include "formats/checkpoint_writer.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "base/interrupt.h"
#include "formats/checkpoint_config.h"
#include "formats/safetensors.h"
#include "formats/shard.h"
#include "formats/widen.h"

namespace nibble {
namespace {

const char* torch_name(DType dtype) {
  return dtype == DType::kBF16 ? "bfloat16" : dtype == DType::kF16 ? "float16" : "float32";
}

int64_t padded_vocab(int64_t vocab, int tp_size) {
  const int64_t multiple = std::lcm<int64_t>(64, tp_size);
  return (vocab + multiple - 1) / multiple * multiple;
}

class Writer {
 public:
  Writer(const fs::path& directory, const WeightSource& source, const CheckpointOptions& options)
      : directory_(directory),
        source_(source),
        options_(options),
        spec_(source.spec()),
        table_(weight_table(spec_)) {
    NIBBLE_CHECK(is_dense_dtype(options.dtype), "dtype {}", dtype_name(options.dtype));
    check_shardable(spec_, options.tp_size, options.group_size, "cannot write a checkpoint");
    NIBBLE_CHECK(options.lm_head == LmHeadFormat::kDense || !spec_.tied_embeddings,
                 "a quantized lm_head that is the embedding");
    vocab_ = padded_vocab(spec_.vocab_size, options.tp_size);
    ranks_.reserve(static_cast<size_t>(options.tp_size));
    for (int rank = 0; rank < options.tp_size; ++rank) {
      ranks_.push_back(SafetensorsWriter::create(
          directory / fmt::format("rank{}.safetensors", rank), declare(rank), {}));
    }
  }

  void write(const CheckpointContent& content) {
    for (const WeightRow& row : table_) {
      throw_if_interrupted();
      if (bits(row) != 0) {
        write_linear(row, content.linear(row));
      } else {
        write_dense(row);
      }
    }
    if (options_.int8_kv) write_kv_scales(content.kv_scales());
    for (SafetensorsWriter& rank : ranks_) rank.commit();
    write_file_atomically(directory_ / "config.json", dump_json(config(), {.indent = 4}) + "\n");
  }

 private:
  int bits(const WeightRow& row) const { return quantized_bits(row, options_.lm_head); }

  ShardSlice slice(const WeightRow& row, int rank) const {
    return shard_slice(row, spec_, rank, options_.tp_size, vocab_ / options_.tp_size);
  }

  std::vector<SafetensorsWriter::Declaration> declare(int rank) const {
    std::vector<SafetensorsWriter::Declaration> tensors;
    for (const WeightRow& row : table_) {
      const ShardSlice part = slice(row, rank);
      const int64_t rows = part.num_rows(), cols = part.num_cols();
      if (bits(row) != 0) {
        tensors.push_back({row.trtllm_name + ".weight", DType::kI8, {rows * bits(row) / 8, cols}});
        tensors.push_back({row.trtllm_name + ".weights_scaling_factor",
                           DType::kF32,
                           {rows, cols / options_.group_size}});
        if (bits(row) == 4) {
          tensors.push_back({row.trtllm_name + ".prequant_scaling_factor", options_.dtype, {cols}});
        }
      } else if (row.shape.size() == 2) {
        tensors.push_back({row.trtllm_name + ".weight", options_.dtype, {rows, cols}});
      } else {
        tensors.push_back({row.trtllm_name + ".weight", options_.dtype, {cols}});
      }
    }
    if (options_.int8_kv) {
      for (int layer = 0; layer < spec_.num_layers; ++layer) {
        for (const char* which : {"k", "v", "kv"}) {
          tensors.push_back(
              {fmt::format("transformer.layers.{}.attention.{}_cache_scaling_factor", layer, which),
               DType::kF32,
               {1}});
        }
      }
    }
    return tensors;
  }

  // Copies through a buffer of a few megabytes: the embedding alone may be larger than memory
  // allows.
  void write_slice(int rank, const std::byte* whole, int64_t whole_rows, int64_t whole_cols,
                   const ShardSlice& part, SliceScale scale) {
    const int64_t row_bytes = part.num_cols() / scale.col_divide * scale.col_bytes;
    const int64_t step =
        std::max<int64_t>(2, (int64_t{8} << 20) / std::max<int64_t>(1, row_bytes) / 2 * 2);
    std::vector<std::byte> buffer;
    for (const RowRange& range : part.rows) {
      for (int64_t begin = range.begin; begin < range.end; begin += step) {
        const ShardSlice piece{
            {{begin, std::min(begin + step, range.end)}}, part.col_begin, part.col_end};
        buffer.resize(static_cast<size_t>(piece.num_rows() / scale.divide_rows * row_bytes));
        copy_slice(whole, whole_rows, whole_cols, piece, scale, buffer.data());
        ranks_[static_cast<size_t>(rank)].write(buffer);
      }
    }
  }

  void write_dense(const WeightRow& row) {
    std::vector<std::byte> storage;
    TensorView view = source_.view_dense(row, storage);
    const int64_t out = row.shape.size() == 2 ? row.shape[0] : 1, in = row.shape.back();
    NIBBLE_CHECK(view.num_elements() == out * in, "{} has {} elements", row.name,
                 view.num_elements());
    const int64_t element = dtype_bits(options_.dtype) / 8;
    if (view.dtype == options_.dtype) {
      for (int rank = 0; rank < options_.tp_size; ++rank) {
        write_slice(rank, view.bytes.data(), out, in, slice(row, rank), {.col_bytes = element});
      }
    } else {
      const std::vector<std::byte> converted = narrow(widen(view), options_.dtype);
      for (int rank = 0; rank < options_.tp_size; ++rank) {
        write_slice(rank, converted.data(), out, in, slice(row, rank), {.col_bytes = element});
      }
    }
    source_.release(row);
  }

  // Two rows a byte.
  static std::vector<std::byte> pack_int4(const WeightRow& row, const CheckpointLinear& linear,
                                          int64_t out, int64_t in) {
    std::vector<std::byte> packed(static_cast<size_t>(out / 2 * in));
    for (int64_t pair = 0; pair < out / 2; ++pair) {
      const int8_t* even = linear.q.data() + 2 * pair * in;
      const int8_t* odd = even + in;
      std::byte* to = packed.data() + pair * in;
      int bad = 0;
      for (int64_t c = 0; c < in; ++c) {
        bad |= (even[c] + 8) | (odd[c] + 8);
        to[c] = static_cast<std::byte>((even[c] & 15) | ((odd[c] & 15) << 4));
      }
      NIBBLE_CHECK((bad & ~15) == 0, "{}: a value outside -8..7 in rows {} and {}", row.name,
                   2 * pair, 2 * pair + 1);
    }
    return packed;
  }

  void write_linear(const WeightRow& row, CheckpointLinear linear) {
    int64_t out = row.shape[0];
    const int64_t in = row.shape[1], groups = in / options_.group_size;
    NIBBLE_CHECK(linear.q.size() == static_cast<size_t>(out * in), "{}: {} values", row.name,
                 linear.q.size());
    NIBBLE_CHECK(linear.scales.size() == static_cast<size_t>(out * groups), "{}: {} scales",
                 row.name, linear.scales.size());
    if (row.shard == ShardRule::kVocab) {  // padding rows: zeros with a scale of one
      out = vocab_;
      linear.q.resize(static_cast<size_t>(out * in));
      linear.scales.resize(static_cast<size_t>(out * groups), 1.0f);
    }
    NIBBLE_CHECK(linear.pre_scale.empty() || linear.pre_scale.size() == static_cast<size_t>(in),
                 "{}: {} pre-scales", row.name, linear.pre_scale.size());
    const int64_t rows_a_byte = 8 / bits(row);
    std::vector<std::byte> packed;
    const std::byte* integers = reinterpret_cast<const std::byte*>(linear.q.data());
    if (rows_a_byte == 2) {
      packed = pack_int4(row, linear, out, in);
      integers = packed.data();
    }
    // A vector of ones where there is none: TensorRT-LLM wants one for each of the five linears.
    const std::vector<std::byte> pre_scale =
        narrow(linear.pre_scale.empty() ? std::vector<float>(static_cast<size_t>(in), 1.0f)
                                        : linear.pre_scale,
               options_.dtype);
    const int64_t element = dtype_bits(options_.dtype) / 8;
    for (int rank = 0; rank < options_.tp_size; ++rank) {
      const ShardSlice part = slice(row, rank);
      write_slice(rank, integers, out, in, part, {.divide_rows = rows_a_byte});
      write_slice(rank, reinterpret_cast<const std::byte*>(linear.scales.data()), out, in, part,
                  {.col_bytes = sizeof(float), .col_divide = options_.group_size});
      if (bits(row) == 8) continue;
      write_slice(rank, pre_scale.data(), 1, in, {{{0, 1}}, part.col_begin, part.col_end},
                  {.col_bytes = element});
    }
  }

  void write_kv_scales(const KvScales& scales) {
    const size_t layers = static_cast<size_t>(spec_.num_layers);
    NIBBLE_CHECK(scales.k.size() == layers && scales.v.size() == layers, "{} and {} KV scales",
                 scales.k.size(), scales.v.size());
    for (size_t layer = 0; layer < layers; ++layer) {
      const float values[3] = {scales.k[layer], scales.v[layer],
                               std::max(scales.k[layer], scales.v[layer])};
      for (SafetensorsWriter& rank : ranks_) rank.write(std::as_bytes(std::span(values)));
    }
  }

  json::object config() const {
    json::value rope_scaling = nullptr;
    if (spec_.rope_factor != 0) {
      rope_scaling = {{"factor", spec_.rope_factor},
                      {"low_freq_factor", spec_.rope_low_freq_factor},
                      {"high_freq_factor", spec_.rope_high_freq_factor},
                      {"original_max_position_embeddings", spec_.rope_original_max_position},
                      {"rope_type", "llama3"},
                      {"type", "llama3"}};
    }
    json::value kv_algo = nullptr;
    if (options_.int8_kv) kv_algo = "INT8";
    json::object config = {
        {"producer", {{"name", "nibble"}, {"version", options_.producer_version}}},
        {"architecture", spec_.architecture},
        {"model_type", "llama"},
        {"dtype", torch_name(options_.dtype)},
        {"logits_dtype", "float16"},
        {"num_hidden_layers", spec_.num_layers},
        {"num_attention_heads", spec_.num_heads},
        {"num_key_value_heads", spec_.num_kv_heads},
        {"hidden_size", spec_.hidden_size},
        {"intermediate_size", spec_.ffn_size},
        {"head_size", spec_.head_dim},
        {"norm_epsilon", spec_.norm_eps},
        {"vocab_size", vocab_},
        {"max_position_embeddings", spec_.max_position},
        {"hidden_act", "silu"},
        {"position_embedding_type", "rope_gpt_neox"},
        {"rotary_base", spec_.rope_theta},
        {"rotary_pct", 1.0},
        {"rotary_embedding_dim", spec_.head_dim},
        {"rotary_scaling", std::move(rope_scaling)},
        {"use_parallel_embedding", true},
        {"embedding_sharding_dim", 0},
        {"share_embedding_table", spec_.tied_embeddings},
        {"decoder", "llama"},
        {"rmsnorm", true},
        {"bias", false},
        {"lm_head_bias", false},
        {"residual_mlp", false},
        {"rank", options_.tp_size - 1},
        // An unknown key in these two is a TypeError in TensorRT-LLM.
        {"mapping",
         {{"world_size", options_.tp_size}, {"tp_size", options_.tp_size}, {"pp_size", 1}}},
        {"quantization",
         {{"quant_algo", "W4A16_AWQ"},
          {"kv_cache_quant_algo", std::move(kv_algo)},
          {"group_size", options_.group_size},
          {"has_zero_point", false},
          {"pre_quant_scale", true},
          // Left empty it would stand for a list with lm_head in it.
          {"exclude_modules", options_.lm_head == LmHeadFormat::kDense
                                  ? json::array{"lm_head"}
                                  : json::array{"transformer.vocab_embedding"}}}},
    };
    // No key of TensorRT-LLM's, so that it stops instead of reading the tensor as int4.
    if (options_.lm_head == LmHeadFormat::kInt8)
      config["quantization"].as_object()["lm_head_quant_algo"] = kInt8LmHeadAlgo;
    // What TensorRT-LLM has no key for and nibble reads back.
    json::object own;
    if (const json::value* given = options_.extra_config.if_contains("nibble");
        given != nullptr && given->is_object()) {
      own = given->get_object();
    }
    own["vocab_size"] = spec_.vocab_size;
    own["bos_token_id"] = spec_.bos_token_id;
    own["eos_token_ids"] = json::array(spec_.eos_token_ids.begin(), spec_.eos_token_ids.end());
    for (const auto& member : options_.extra_config) {
      NIBBLE_CHECK(!config.contains(member.key()), "extra_config would overwrite {}",
                   std::string_view(member.key()));
      if (member.key() != "nibble") config[member.key()] = member.value();
    }
    config["nibble"] = std::move(own);
    return config;
  }

  fs::path directory_;
  const WeightSource& source_;
  const CheckpointOptions& options_;
  const ModelSpec& spec_;
  const std::vector<WeightRow> table_;
  int64_t vocab_ = 0;
  std::vector<SafetensorsWriter> ranks_;
};

}  // namespace

void write_checkpoint(const fs::path& directory, const WeightSource& source,
                      const CheckpointOptions& options, const CheckpointContent& content) {
  Writer(directory, source, options).write(content);
}

}  // namespace nibble
