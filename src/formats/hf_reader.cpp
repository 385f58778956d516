// A Hugging Face directory through the weight table: config.json, the shards that the index names
// (never a glob: Mistral's repositories hold a second copy of the weights), three generations of
// name prefixes. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>

#include "base/error.h"
#include "formats/model_directory.h"
#include "formats/safetensors.h"
#include "formats/weight_source.h"
#include "formats/widen.h"
#include "spec/object_reader.h"

namespace nibble {
namespace {

struct PrefixStyle {
  const char* model;  // stands for "model." of the weight table
  const char* head;   // before "lm_head"
  const char* who;
};
constexpr std::array<PrefixStyle, 3> kStyles = {{
    {"model.", "", "text-only class"},
    {"language_model.model.", "language_model.", "Mistral3 saved by transformers < 4.52"},
    {"model.language_model.", "", "Mistral3 saved by transformers >= 4.52"},
}};

std::string styled_name(const PrefixStyle& style, std::string_view name) {
  if (name.starts_with("model.")) return style.model + std::string(name.substr(6));
  return style.head + std::string(name);
}

bool is_vision(std::string_view name) {
  for (const std::string_view prefix :
       {"vision_tower.", "multi_modal_projector.", "model.vision_tower.",
        "model.multi_modal_projector.", "vision_encoder.", "vision_language_adapter.",
        "patch_merger.", "pre_mm_projector_norm."}) {
    if (name.starts_with(prefix)) return true;
  }
  return false;
}

const char* quantized_suffix_title(std::string_view name) {
  const auto ends = [&](std::string_view suffix) { return name.ends_with(suffix); };
  if (ends(".qweight") || ends(".qzeros") || ends(".g_idx")) return "GPTQ or AWQ";
  if (ends(".weight_packed") || ends(".weight_shape")) return "compressed-tensors";
  if (ends(".trellis") || ends(".suh") || ends(".svh")) return "EXL3";
  if (ends(".q_weight") || ends(".q_scale") || ends(".q_invperm")) return "EXL2";
  if (name.find(".quant_state") != name.npos || ends(".absmax") || ends(".quant_map"))
    return "bitsandbytes";
  if (ends(".weight_scale") || ends(".weight_scale_inv") || ends(".pre_quant_scale"))
    return "FP8 or ModelOpt";
  return nullptr;
}

class HfSource final : public WeightSource {
 public:
  explicit HfSource(const fs::path& directory) : directory_(directory) {
    const fs::path config_path = directory / "config.json";
    if (file_exists(directory / "hf_quant_config.json")) {
      fail(ErrorKind::kUnsupported,
           "{} holds hf_quant_config.json: its weights are quantized already (ModelOpt), which "
           "nibble does not read yet. Give it the original 16-bit checkpoint",
           directory.string());
    }
    const json::object config = read_json_object(config_path);
    if (config.contains("architecture") && !config.contains("architectures")) {
      fail(ErrorKind::kInput, "{} is a TensorRT-LLM checkpoint's, not a Hugging Face model's",
           config_path.string());
    }
    spec_ = ModelSpec::from_hf(config, config_path.string());
    apply_generation_config(directory, spec_);
    open_files();
    resolve();
  }

  const ModelSpec& spec() const override { return spec_; }
  bool is_quantized(const WeightRow&) const override { return false; }

  std::vector<float> load_dense(const WeightRow& row) const override {
    std::vector<float> out;
    size_t done = 0;
    const auto& parts = parts_of(row);
    int64_t total = 0;
    for (const TensorView& part : parts) total += part.num_elements();
    out.resize(static_cast<size_t>(total));
    for (const TensorView& part : parts) {
      widen(part, out.data() + done);
      done += static_cast<size_t>(part.num_elements());
    }
    return out;
  }

  TensorView view_dense(const WeightRow& row, std::vector<std::byte>& storage) const override {
    const auto& parts = parts_of(row);
    if (parts.size() == 1) return parts[0];
    storage.clear();
    DType dtype = parts[0].dtype;
    for (const TensorView& part : parts) {
      if (part.dtype != dtype) dtype = DType::kF32;
    }
    for (const TensorView& part : parts) {
      if (part.dtype == dtype) {
        storage.insert(storage.end(), part.bytes.begin(), part.bytes.end());
      } else {
        const std::vector<std::byte> wide = narrow(widen(part), DType::kF32);
        storage.insert(storage.end(), wide.begin(), wide.end());
      }
    }
    return {dtype, row.shape, storage};
  }

  Int4Weight load_int4(const WeightRow& row) const override {
    NIBBLE_CHECK(false, "{} is dense: Hugging Face models hold no int4 weights", row.name);
  }
  std::optional<KvScales> kv_scales() const override { return std::nullopt; }

  void release(const WeightRow& row) const override {
    for (const TensorView& part : parts_of(row)) {
      for (const auto& [name, file] : files_) {
        const std::span<const std::byte> all = file.file().bytes();
        if (part.bytes.data() >= all.data() && part.bytes.data() < all.data() + all.size()) {
          file.file().advise(static_cast<size_t>(part.bytes.data() - all.data()), part.bytes.size(),
                             false);
          break;
        }
      }
    }
  }

  std::vector<std::string> notices() const override { return notices_; }

 private:
  const std::vector<TensorView>& parts_of(const WeightRow& row) const {
    const auto found = parts_.find(row.name);
    NIBBLE_CHECK(found != parts_.end(), "{} is not a weight of this model", row.name);
    return found->second;
  }

  void open_file(const std::string& name) {
    const fs::path path = directory_ / name;
    if (!file_exists(path)) {
      fail(ErrorKind::kInput,
           "{} names the shard {}, which is not in {} (is the download complete?)", index_name_,
           name, directory_.string());
    }
    files_.emplace(name, SafetensorsFile::open(path));
  }

  void open_files() {
    const fs::path index_path = directory_ / "model.safetensors.index.json";
    if (!file_exists(index_path)) {
      if (!file_exists(directory_ / "model.safetensors")) refuse_missing_weights();
      index_name_ = (directory_ / "model.safetensors").string();
      open_file("model.safetensors");
      const SafetensorsFile& file = files_.begin()->second;
      for (const auto& entry : file.entries())
        tensors_.emplace(entry.name, file.tensor(entry.name));
      return;
    }
    index_name_ = index_path.string();
    const json::object index = read_json_object(index_path, 256u << 20);
    ObjectReader in(index, index_name_);
    const json::object* map = in.object("weight_map");
    if (map == nullptr || map->empty())
      fail(ErrorKind::kInput, "{}: weight_map is missing or empty", index_name_);
    for (const auto& member : *map) {
      const std::string_view tensor = member.key();
      const std::string file =
          member.value().is_string() ? std::string(member.value().get_string()) : std::string();
      // A plain name in the same folder: the index may come from anywhere.
      if (file.empty() || file.find('/') != file.npos || file.find('\\') != file.npos ||
          file == "." || file == ".." || file.find('\0') != file.npos) {
        fail(ErrorKind::kInput,
             "{}: the tensor \"{}\" is said to lie in {}; wanted a file's plain name in the same "
             "folder",
             index_name_, tensor, show_json(member.value()));
      }
      if (!files_.contains(file)) open_file(file);
      const SafetensorsFile& shard = files_.at(file);
      if (!shard.contains(tensor)) {
        fail(ErrorKind::kInput,
             "{}: the tensor \"{}\" is said to lie in {}, which does not hold it", index_name_,
             tensor, file);
      }
      tensors_.emplace(tensor, shard.tensor(tensor));
    }
    check_total_size(in);
  }

  // Some re-savers get it wrong, so this only warns.
  void check_total_size(ObjectReader& index) {
    const json::object* metadata = index.object("metadata");
    if (metadata == nullptr) return;
    const json::value* total = metadata->if_contains("total_size");
    if (total == nullptr || !total->is_number()) return;
    uint64_t sum = 0;
    for (const auto& [name, view] : tensors_) sum += view.bytes.size();
    if (total->to_number<double>() != static_cast<double>(sum)) {
      notices_.push_back(fmt::format("{} says total_size {}, but its tensors have {} bytes",
                                     index_name_, show_json(*total), sum));
    }
  }

  [[noreturn]] void refuse_missing_weights() const {
    std::error_code ignored;
    for (fs::directory_iterator it(directory_, ignored), end; it != end; it.increment(ignored)) {
      const std::string name = it->path().filename().string();
      if (name.ends_with(".gguf")) {
        fail(ErrorKind::kUnsupported,
             "{} holds a GGUF file ({}), which nibble does not read yet. Give it the original "
             "Hugging Face checkpoint",
             directory_.string(), name);
      }
      if (name.starts_with("consolidated")) {
        fail(ErrorKind::kUnsupported,
             "{} holds Mistral's own layout ({}) and no model.safetensors; give nibble the Hugging "
             "Face layout of the same model",
             directory_.string(), name);
      }
      if (name.starts_with("pytorch_model") && name.ends_with(".bin")) {
        fail(ErrorKind::kUnsupported, "{} holds pickled weights ({}); convert them to safetensors",
             directory_.string(), name);
      }
    }
    fail(ErrorKind::kInput, "{} has neither model.safetensors nor model.safetensors.index.json",
         directory_.string());
  }

  const PrefixStyle& find_style() const {
    const PrefixStyle* found = nullptr;
    for (const PrefixStyle& style : kStyles) {
      if (!tensors_.contains(styled_name(style, "model.embed_tokens.weight"))) continue;
      if (found != nullptr) {
        fail(ErrorKind::kInput,
             "{}: the embedding is there twice, as \"{}embed_tokens.weight\" and as "
             "\"{}embed_tokens.weight\"",
             index_name_, found->model, style.model);
      }
      found = &style;
    }
    if (found == nullptr) {
      refuse_quantized_tensors();
      fail(ErrorKind::kInput,
           "{}: no embedding under any known name (model.embed_tokens.weight, "
           "language_model.model.embed_tokens.weight, model.language_model.embed_tokens.weight)",
           index_name_);
    }
    return *found;
  }

  void refuse_quantized_tensors() const {
    for (const auto& [name, view] : tensors_) {
      if (const char* title = quantized_suffix_title(name); title != nullptr && !is_vision(name)) {
        fail(ErrorKind::kUnsupported,
             "{}: the tensor \"{}\" says that the weights are quantized already ({}), which nibble "
             "does not read yet. Give it the original 16-bit checkpoint",
             index_name_, name, title);
      }
    }
  }

  void resolve() {
    const PrefixStyle& style = find_style();
    refuse_quantized_tensors();
    // The tensor decides, not the flag: re-saves of the wrapper say "tied" and hold a head of their
    // own.
    const bool has_head = tensors_.contains(styled_name(style, "lm_head.weight"));
    if (has_head && spec_.tied_embeddings) {
      notices_.push_back(
          "config.json ties the embeddings but an lm_head tensor is there; the tensor is used");
      spec_.tied_embeddings = false;
    }
    std::set<std::string, std::less<>> consumed;
    for (const WeightRow& row : weight_table(spec_)) {
      std::vector<TensorView> parts;
      for (size_t i = 0; i < row.hf_names.size(); ++i) {
        const std::string name = styled_name(style, row.hf_names[i]);
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) {
          fail(ErrorKind::kInput, "{}: the tensor \"{}\" is missing ({})", index_name_, name,
               row.role == WeightRole::kLmHead ? "and config.json does not tie it to the embedding"
                                               : "is the download complete?");
        }
        consumed.insert(name);
        check(row, i, name, found->second);
        parts.push_back(found->second);
      }
      parts_.emplace(row.name, std::move(parts));
    }
    check_leftovers(consumed);
  }

  void check(const WeightRow& row, size_t part, const std::string& name,
             const TensorView& view) const {
    std::vector<int64_t> wanted = row.shape;
    std::string hint = "config.json and the weights disagree";
    if (row.role == WeightRole::kQkv) {
      wanted[0] = part == 0 ? spec_.q_size() : spec_.kv_size();
      hint =
          fmt::format("head_dim is {} {}: {} heads x {} rows", spec_.head_dim,
                      "by config.json (hidden_size / num_attention_heads where it has no head_dim)",
                      part == 0 ? spec_.num_heads : spec_.num_kv_heads, spec_.head_dim);
    }
    if (view.shape != wanted) {
      fail(ErrorKind::kInput, "{}: the tensor \"{}\" has shape [{}]; wanted [{}] ({})", index_name_,
           name, fmt::join(view.shape, ", "), fmt::join(wanted, ", "), hint);
    }
    if (!is_dense_dtype(view.dtype)) {
      fail(ErrorKind::kUnsupported, "{}: the tensor \"{}\" is {}; supported are BF16, F16 and F32",
           index_name_, name, dtype_name(view.dtype));
    }
  }

  void check_leftovers(const std::set<std::string, std::less<>>& consumed) {
    size_t num_vision = 0, num_buffers = 0;
    std::vector<std::string> left;
    for (const auto& [name, view] : tensors_) {
      if (consumed.contains(name)) continue;
      if (is_vision(name)) {
        ++num_vision;
      } else if (name.ends_with(".rotary_emb.inv_freq")) {
        ++num_buffers;
      } else {
        left.push_back(name);
      }
    }
    if (!left.empty()) {
      std::sort(left.begin(), left.end());
      const size_t total = left.size();
      left.resize(std::min<size_t>(total, 4));
      fail(ErrorKind::kInput,
           "{}: {} tensor{} of the file would be left unused: {}{}. The model is not what its "
           "config.json says",
           index_name_, total, total == 1 ? "" : "s", fmt::join(left, ", "),
           total > left.size() ? ", ..." : "");
    }
    if (num_vision > 0) {
      notices_.push_back(
          fmt::format("vision tower and projector skipped ({} tensors): text only", num_vision));
    }
    if (num_buffers > 0)
      notices_.push_back(fmt::format("rotary inv_freq buffers skipped ({} tensors)", num_buffers));
  }

  fs::path directory_;
  std::string index_name_;  // the file that says which tensors there are
  ModelSpec spec_;
  std::map<std::string, SafetensorsFile>
      files_;  // a map closes its descriptor: any number of shards
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::unordered_map<std::string, std::vector<TensorView>> parts_;  // by row name
  std::vector<std::string> notices_;
};

}  // namespace

std::unique_ptr<WeightSource> open_hf(const fs::path& directory) {
  return std::make_unique<HfSource>(directory);
}

}  // namespace nibble
