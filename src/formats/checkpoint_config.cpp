// SPDX-License-Identifier: Apache-2.0
#include "formats/checkpoint_config.h"

#include <fnmatch.h>

#include <string>

#include "base/error.h"
#include "spec/object_reader.h"

namespace nibble {
namespace {

void read_mapping(ObjectReader& in, CheckpointConfig& config) {
  const json::object* object = in.object("mapping");
  if (object == nullptr) return;
  ObjectReader mapping(*object, in.where() + ", mapping");
  constexpr int kMax = 1024;
  config.pp_size = mapping.integer_or("pp_size", 1, 1, kMax);
  const int world = mapping.integer_or("world_size", 0, 0, kMax * kMax);
  config.tp_size =
      mapping.integer_or("tp_size", world > 0 ? std::max(1, world / config.pp_size) : 1, 1, kMax);
  if (world > 0 && world != config.tp_size * config.pp_size) {
    fail(ErrorKind::kInput, "{}: world_size is {} but tp_size x pp_size is {} x {}",
         mapping.where(), world, config.tp_size, config.pp_size);
  }
  if (mapping.integer_or("cp_size", 1, 1, kMax) != 1) {
    fail(ErrorKind::kUnsupported, "{}: cp_size is {}; only 1 is supported", mapping.where(),
         mapping.integer("cp_size", 1, kMax));
  }
  if (config.spec.num_layers % config.pp_size != 0) {
    fail(ErrorKind::kInput, "{}: {} layers cannot be split evenly over pp_size {}", mapping.where(),
         config.spec.num_layers, config.pp_size);
  }
}

// TensorRT-LLM leaves out what a pattern of exclude_modules names, and lm_head also where the list
// is missing or empty. `lm_head_quant_algo` is nibble's own; TensorRT-LLM refuses a key it does not
// know in this object, and must, because it would take the tensor for int4.
void read_lm_head(const json::object& object, ObjectReader& quant, CheckpointConfig& config) {
  const std::string algo = quant.string_or("lm_head_quant_algo", "");
  if (!algo.empty() && algo != kInt8LmHeadAlgo) {
    fail(ErrorKind::kUnsupported, "{}: lm_head_quant_algo is \"{}\"; known is \"{}\"",
         quant.where(), algo, kInt8LmHeadAlgo);
  }
  if (!config.quantized) return;
  const json::value* value = object.if_contains("exclude_modules");
  if (value != nullptr && !value->is_null() && !value->is_array()) {
    fail(ErrorKind::kInput, "{}: exclude_modules is {}; wanted a list of names or null",
         quant.where(), show_json(*value));
  }
  const json::array patterns =
      value != nullptr && value->is_array() ? value->get_array() : json::array();
  bool excluded = patterns.empty();
  for (const json::value& pattern : patterns) {
    if (!pattern.is_string()) {
      fail(ErrorKind::kInput, "{}: exclude_modules holds {}; wanted strings", quant.where(),
           show_json(pattern));
    }
    excluded |= ::fnmatch(std::string(pattern.get_string()).c_str(), "lm_head", 0) == 0;
  }
  if (!algo.empty() && excluded) {
    fail(ErrorKind::kInput,
         "{}: lm_head_quant_algo is \"{}\" but exclude_modules says that lm_head is not quantized",
         quant.where(), algo);
  }
  config.lm_head = excluded       ? LmHeadFormat::kDense
                   : algo.empty() ? LmHeadFormat::kInt4
                                  : LmHeadFormat::kInt8;
}

void read_quantization(ObjectReader& in, CheckpointConfig& config) {
  const json::object* object = in.object("quantization");
  if (object == nullptr) return;
  ObjectReader quant(*object, in.where() + ", quantization");
  const std::string algo = quant.string_or("quant_algo", "");
  if (!algo.empty() && algo != "W4A16_AWQ") {
    fail(ErrorKind::kUnsupported,
         "{}: quant_algo is \"{}\"; nibble reads W4A16_AWQ checkpoints and unquantized ones. Make "
         "one from the original 16-bit model with `nibble quantize`",
         quant.where(), algo);
  }
  config.quantized = !algo.empty();
  config.group_size = quant.integer_or("group_size", 0, 0, 1 << 20);
  if (quant.boolean_or("has_zero_point", false)) {
    fail(ErrorKind::kUnsupported, "{}: has_zero_point is true; only symmetric int4 is supported",
         quant.where());
  }
  read_lm_head(*object, quant, config);
  const std::string kv = quant.string_or("kv_cache_quant_algo", "");
  if (kv == "INT8") {
    config.kv = CheckpointConfig::KvQuant::kInt8;
  } else if (kv == "FP8") {
    config.kv = CheckpointConfig::KvQuant::kFp8;
  } else if (!kv.empty()) {
    fail(ErrorKind::kUnsupported,
         "{}: kv_cache_quant_algo is \"{}\"; known are null, \"INT8\" and \"FP8\"", quant.where(),
         kv);
  }
}

}  // namespace

CheckpointConfig parse_checkpoint_config(const json::object& object, std::string_view what) {
  CheckpointConfig config;
  config.spec = ModelSpec::from_trtllm(object, what);
  std::string where(what);
  ObjectReader outer(object, where);
  const json::object* inner = outer.object("pretrained_config");
  if (inner != nullptr) where += ", pretrained_config";
  ObjectReader in(inner == nullptr ? object : *inner, where);
  read_mapping(in, config);
  read_quantization(in, config);
  if (in.boolean_or("use_parallel_embedding", false)) {
    const int dim = in.integer_or("embedding_sharding_dim", 0, 0, 1);
    config.embedding = dim == 0 ? CheckpointConfig::EmbeddingSplit::kVocab
                                : CheckpointConfig::EmbeddingSplit::kHidden;
  }
  return config;
}

}  // namespace nibble
