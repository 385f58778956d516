// SPDX-License-Identifier: Apache-2.0
#include "formats/model_directory.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "formats/weight_source.h"
#include "spec/object_reader.h"

namespace nibble {
namespace {

std::string list_files(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  std::string text;
  for (size_t i = 0; i < names.size() && i < 8; ++i) text += (i > 0 ? ", " : "") + names[i];
  if (names.size() > 8) text += fmt::format(" and {} more", names.size() - 8);
  return text.empty() ? "nothing" : text;
}

}  // namespace

bool file_exists(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

json::object read_json_object(const fs::path& path, uint64_t max_bytes) {
  json::value value = parse_json(read_file(path, max_bytes), path.string());
  if (!value.is_object())
    fail(ErrorKind::kInput, "{} holds {}; wanted an object", path.string(), show_json(value));
  return std::move(value.get_object());
}

void apply_generation_config(const fs::path& directory, ModelSpec& spec) {
  const fs::path path = directory / "generation_config.json";
  if (!file_exists(path)) return;
  constexpr int kMax = std::numeric_limits<int>::max();
  const json::object object = read_json_object(path);
  ObjectReader in(object, path.string());
  spec.bos_token_id = in.integer_or("bos_token_id", spec.bos_token_id, 0, kMax);
  const std::vector<int> eos = in.integers("eos_token_id", 0, kMax);
  if (!eos.empty()) spec.eos_token_ids = eos;
}

fs::path checkpoint_directory(const fs::path& directory) {
  const fs::path inner = directory / "trt-llm" / "checkpoints";
  return file_exists(inner / "config.json") && !file_exists(directory / "rank0.safetensors")
             ? inner
             : directory;
}

ModelKind model_kind(const fs::path& given) {
  std::error_code ignored;
  if (!fs::is_directory(given, ignored)) {
    fail(ErrorKind::kIo,
         "{} is not a directory; wanted a Hugging Face model, a checkpoint or an engine",
         given.string());
  }
  if (file_exists(given / "rank0.engine")) return ModelKind::kEngine;
  const fs::path directory = checkpoint_directory(given);
  if (file_exists(directory / "rank0.safetensors")) return ModelKind::kCheckpoint;
  if (file_exists(directory / "config.json")) {
    const json::object config = read_json_object(directory / "config.json");
    if (config.contains("architecture") || config.contains("pretrained_config"))
      return ModelKind::kCheckpoint;
    // An engine's plan: whoever opens it says that rank0.engine is missing.
    if (config.contains("nibble_version") && config.contains("target")) return ModelKind::kEngine;
    return ModelKind::kHuggingFace;
  }
  for (fs::directory_iterator it(directory, ignored), end; it != end; it.increment(ignored)) {
    if (it->path().extension() == ".gguf") {
      fail(ErrorKind::kUnsupported,
           "{} holds a GGUF file ({}), which nibble does not read yet. Give it the original "
           "Hugging Face checkpoint",
           directory.string(), it->path().filename().string());
    }
  }
  fail(ErrorKind::kInput,
       "{} is no model: no config.json (Hugging Face, checkpoint) and no rank0.engine (engine). It "
       "holds {}",
       directory.string(), list_files(directory));
}

std::unique_ptr<WeightSource> open_source(const fs::path& directory) {
  return model_kind(directory) == ModelKind::kCheckpoint ? open_checkpoint(directory)
                                                         : open_hf(directory);
}

}  // namespace nibble
