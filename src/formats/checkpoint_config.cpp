// SPDX-License-Identifier: Apache-2.0
#include "formats/checkpoint_config.h"

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
