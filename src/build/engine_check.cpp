// SPDX-License-Identifier: Apache-2.0
#include "build/engine_check.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/hash.h"
#include "base/interrupt.h"
#include "build/engine_builder.h"
#include "build/model_loader.h"

namespace nibble {
namespace {

constexpr std::string_view kFilePrefix = "xxh3:";

const std::string* find_metadata(const SafetensorsFile& file, std::string_view wanted) {
  for (const auto& [key, value] : file.metadata()) {
    if (key == wanted) return &value;
  }
  return nullptr;
}

std::string shell_quoted(const std::string& text) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=:,@";
  if (!text.empty() && text.find_first_not_of(kPlain) == text.npos) return text;
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

bool runs_here(const std::string& target) {
  try {
    return resolve_target(target) == target;
  } catch (const Error&) {
    return false;
  }
}

std::string text_of(const json::object& object, std::string_view key) {
  const json::value* value = object.if_contains(key);
  return value != nullptr && value->is_string() ? std::string(value->get_string()) : std::string();
}
int64_t number_of(const json::object& object, std::string_view key) {
  const json::value* value = object.if_contains(key);
  return value != nullptr && value->is_int64() ? value->get_int64() : 0;
}
json::object object_of(const json::object& object, std::string_view key) {
  const json::value* value = object.if_contains(key);
  return value != nullptr && value->is_object() ? value->get_object() : json::object();
}

// What the engine was built from, as `nibble build` takes it; `note` says what a placeholder in it
// stands for.
std::string source_argument(const json::object& source, std::string& note) {
  if (const std::string shape = text_of(source, "synthetic"); !shape.empty()) {
    const std::string lm_head = text_of(source, "quantize_lm_head");
    return "--synthetic " + shell_quoted(shape) +
           (lm_head.empty() ? "" : " --quantize-lm-head " + shell_quoted(lm_head));
  }
  const std::string checkpoint = text_of(source, "checkpoint");
  std::error_code ignored;
  if (!checkpoint.empty() && fs::is_directory(checkpoint, ignored)) return shell_quoted(checkpoint);
  note = checkpoint.empty()
             ? " (CHECKPOINT: what it was built from; the engine does not say)"
             : fmt::format(" (CHECKPOINT: it was built from {}, which is not there any more)",
                           checkpoint);
  return "CHECKPOINT";
}

// The flags that gave `plan`, as far as they differ from the defaults; another `target` than the
// plan's keeps those that it knows.
std::string build_flags(const json::object& plan, std::string_view other_target) {
  std::string flags;
  const std::string planned = text_of(plan, "target");
  const std::string target = other_target.empty() ? planned : std::string(other_target);
  if (runs_here(target) && resolve_target(target) != resolve_target("cpu:native")) {
    flags += " --target " + target;
  }
  const json::object limits = object_of(plan, "limits");
  const EngineLimits defaults;
  const auto limit = [&](const char* flag, std::string_view key, int64_t by_default) {
    const int64_t wanted = number_of(limits, key);
    if (wanted > 0 && wanted != by_default) flags += fmt::format(" {} {}", flag, wanted);
  };
  limit("--max-batch-size", "max_batch_size", defaults.max_batch_size);
  limit("--max-input-len", "max_input_len", defaults.max_input_len);
  limit("--max-output-len", "max_output_len", defaults.max_output_len);
  const int64_t batch = std::clamp<int64_t>(number_of(limits, "max_batch_size"), 1, 1 << 20);
  limit("--max-num-tokens", "max_num_tokens",
        default_max_num_tokens(planned, static_cast<int>(batch)));
  const std::string kv = text_of(plan, "kv_format");
  for (const KvFormat format : {KvFormat::kInt8Static, KvFormat::kF16}) {
    if (kv == kv_format_name(format)) flags += " --kv-cache " + kv;
  }
  const std::string activations = text_of(plan, "activation_precision");
  for (const ActivationPrecision precision :
       {ActivationPrecision::kF32, ActivationPrecision::kInt8Group, ActivationPrecision::kE4m3}) {
    if (target == planned && activations == activation_precision_name(precision) &&
        precision != default_activation_precision(target)) {
      flags += " --activations " + activations;
    }
  }
  const json::object source = object_of(plan, "source");
  if (const std::string tokenizer = text_of(source, "tokenizer"); !tokenizer.empty()) {
    flags += " --tokenizer " + shell_quoted(tokenizer);
  }
  const json::value* no_tune = source.if_contains("no_tune");
  if (target == planned && no_tune != nullptr && no_tune->is_bool() && no_tune->get_bool()) {
    flags += " --no-tune";
  }
  return flags;
}

// The plan may come from another version or be damaged: whatever is not as expected is left out.
std::string rebuild(const fs::path& engine_dir, const json::object& plan = {},
                    std::string_view other_target = {}) {
  std::string note;
  const std::string source = source_argument(object_of(plan, "source"), note);
  return fmt::format("remove it and build it again: nibble build {} --out {}{}{}", source,
                     shell_quoted(engine_dir.string()), build_flags(plan, other_target), note);
}

// For the messages: never throws; a damaged plan tells no flags.
std::string rebuild_by(const std::string& plan_text, const fs::path& engine_dir) {
  try {
    const json::value plan = parse_json(plan_text, "plan");
    return rebuild(engine_dir, plan.is_object() ? plan.get_object() : json::object());
  } catch (const Error&) {
    return rebuild(engine_dir);
  }
}
std::string rebuild(const SafetensorsFile& file, const fs::path& engine_dir) {
  const std::string* text = find_metadata(file, "plan");
  return rebuild_by(text != nullptr ? *text : std::string(), engine_dir);
}

std::vector<uint64_t> stored_checksums(const SafetensorsFile& file, const fs::path& engine_dir) {
  size_t count = 1;
  for (const auto& entry : file.entries()) {
    if (!entry.name.starts_with("pad.") && entry.name != kEngineChecksums) ++count;
  }
  const std::string what = file.file().path().string();
  if (!file.contains(kEngineChecksums)) {
    fail(ErrorKind::kInput, "{} has no tensor {}; {}", what, kEngineChecksums,
         rebuild(file, engine_dir));
  }
  const TensorView view = file.tensor(kEngineChecksums);
  std::vector<uint64_t> sums(count);
  if (view.dtype != DType::kU64 || view.bytes.size() != count * sizeof(uint64_t)) {
    fail(ErrorKind::kInput,
         "{}: {} is {} of {} bytes, wanted U64 of {} (one a tensor, one for the "
         "header); {}",
         what, kEngineChecksums, dtype_name(view.dtype), view.bytes.size(),
         count * sizeof(uint64_t), rebuild(file, engine_dir));
  }
  std::memcpy(sums.data(), view.bytes.data(), view.bytes.size());
  return sums;
}

[[noreturn]] void refuse_damaged(std::string_view what, uint64_t actual, std::string_view expected,
                                 const std::string& how) {
  fail(ErrorKind::kInput, "{} is damaged (checksum {}, built with {}); {}", what, hex64(actual),
       expected, how);
}

void check_header(const SafetensorsFile& file, const fs::path& engine_dir) {
  const MappedFile& mapped = file.file();
  const uint64_t actual = xxh3_64(mapped.bytes().first(file.data_start()));
  const uint64_t expected = stored_checksums(file, engine_dir).back();
  if (actual != expected) {
    refuse_damaged(fmt::format("{}: its header (with the plan)", mapped.path().string()), actual,
                   hex64(expected), rebuild(file, engine_dir));
  }
}

}  // namespace

std::string rebuild_command(const EnginePlan& plan, const fs::path& engine_dir,
                            std::string_view target) {
  return rebuild(engine_dir, plan.to_json(), target);
}

std::string check_cuda(const EnginePlan& plan, const CudaPlatform& here,
                       const fs::path& engine_dir) {
  if (!plan.target.starts_with("cuda:")) return {};
  const CudaPlatform& built = plan.cuda;
  const std::string what = (engine_dir / "rank0.engine").string();
  if (built.major != 0 && built.major != here.major) {
    fail(ErrorKind::kUnsupported,
         "{} was built with a plugin of CUDA {}, this nibble's plugin for {} is of CUDA {}; {}",
         what, built.major, plan.target, here.major, rebuild_command(plan, engine_dir));
  }
  if (built.gpu.empty() || built.gpu == here.gpu) return {};
  return fmt::format(
      "{}: its kernels were measured on {}, this is {}. The choice stays in use: all of them are "
      "right here, but others may be faster. To measure here, {}",
      what, built.gpu, here.gpu, rebuild_command(plan, engine_dir));
}

SafetensorsFile open_engine(const fs::path& engine_dir) {
  const fs::path path = engine_dir / "rank0.engine", config = engine_dir / "config.json";
  try {
    std::error_code ignored;
    if (!fs::exists(path, ignored)) {
      fail(ErrorKind::kInput,
           "{} is an engine without its rank0.engine (config.json is an engine's plan)",
           engine_dir.string());
    }
    return SafetensorsFile::open(path);
  } catch (const Error& error) {
    std::string plan;  // the copy beside it
    try {
      plan = read_file(config);
    } catch (const Error&) {
      plan.clear();
    }
    throw Error(error.kind(), fmt::format("{}; {}", error.what(), rebuild_by(plan, engine_dir)));
  }
}

void add_file_checksums(const fs::path& directory,
                        std::vector<std::pair<std::string, std::string>>& metadata) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    const std::string content = read_file(directory / name);
    metadata.emplace_back(std::string(kFilePrefix) + name,
                          hex64(xxh3_64(std::as_bytes(std::span(content)))));
  }
}

EnginePlan read_engine_plan(const SafetensorsFile& file, const fs::path& engine_dir) {
  const std::string what = file.file().path().string();
  const std::string* text = find_metadata(file, "plan");
  if (text == nullptr) {
    fail(ErrorKind::kInput, "{} has no plan in its metadata, so it is not a nibble engine; {}",
         what, rebuild(engine_dir));
  }
  const std::string how = rebuild(file, engine_dir);
  EnginePlan plan;
  try {
    const json::value parsed = parse_json(*text, what + " (plan)");
    if (!parsed.is_object()) fail(ErrorKind::kInput, "{}: the plan is not an object", what);
    // The version comes first: another one's plan may hold keys this binary does not know.
    const json::value* version = parsed.get_object().if_contains("nibble_version");
    const bool has_version = version != nullptr && version->is_string();
    if (!has_version || version->get_string() != NIBBLE_VERSION) {
      fail(ErrorKind::kInput, "{} was built by nibble {}, this is nibble {}", what,
           has_version ? std::string_view(version->get_string()) : "(unknown)", NIBBLE_VERSION);
    }
    plan = EnginePlan::from_json(parsed.get_object(), what);
  } catch (const Error& error) {
    const std::string_view why = error.what();
    fail(error.kind(), "{}{}; {}", why.starts_with(what) ? "" : what + ": ", why, how);
  }
  check_header(file, engine_dir);
  if (plan.tp_size != 1) {
    fail(ErrorKind::kUnsupported,
         "{} was built for tensor-parallel size {}, this process runs 1; {}", what, plan.tp_size,
         how);
  }
  std::string here;
  try {
    here = resolve_target(plan.target);
  } catch (const Error& error) {
    fail(ErrorKind::kDevice, "{} was built for {}, which cannot run here ({}); {}", what,
         plan.target, error.what(), how);
  }
  if (here != plan.target) {
    fail(ErrorKind::kInput,
         "{}: target is {}, wanted the name of one instruction set such as {}; {}", what,
         plan.target, here, how);
  }
  const WeightLayout int4 = int4_layout_of(plan.target);
  if (is_int4(plan.linear_layout) && plan.linear_layout != int4) {
    fail(ErrorKind::kInput, "{}: its weights lie as {}, but target {} reads {}; {}", what,
         weight_layout_name(plan.linear_layout), plan.target, weight_layout_name(int4), how);
  }
  const WeightLayout int8 = int8_layout_of(plan.target);
  if ((is_int4(plan.lm_head_layout) && plan.lm_head_layout != int4) ||
      (is_int8(plan.lm_head_layout) && plan.lm_head_layout != int8)) {
    fail(ErrorKind::kInput, "{}: its lm_head lies as {}, but target {} reads {} or {}; {}", what,
         weight_layout_name(plan.lm_head_layout), plan.target, weight_layout_name(int4),
         weight_layout_name(int8), how);
  }
  if (is_int8(plan.linear_layout)) {
    fail(ErrorKind::kInput, "{}: linear_layout is {}, wanted an int4 or dense one; {}", what,
         weight_layout_name(plan.linear_layout), how);
  }
  if (is_int4(plan.dense_layout) || is_int8(plan.dense_layout)) {
    fail(ErrorKind::kInput, "{}: dense_layout is {}, wanted f32-rows, bf16-rows or f16-rows; {}",
         what, weight_layout_name(plan.dense_layout), how);
  }
  return plan;
}

void verify_engine(const SafetensorsFile& file, const fs::path& engine_dir) {
  const std::string what = file.file().path().string();
  check_header(file, engine_dir);
  const std::vector<uint64_t> expected = stored_checksums(file, engine_dir);
  size_t i = 0;
  for (const auto& entry : file.entries()) {
    if (entry.name == kEngineChecksums) continue;
    throw_if_interrupted();
    const std::span<const std::byte> bytes = file.tensor(entry.name).bytes;
    if (entry.name.starts_with("pad.")) {
      if (std::ranges::any_of(bytes, [](std::byte b) { return b != std::byte{0}; })) {
        fail(ErrorKind::kInput, "{}: {} is damaged (padding that is not zero); {}", what,
             entry.name, rebuild(file, engine_dir));
      }
      continue;
    }
    const uint64_t actual = xxh3_64(bytes);
    if (actual != expected[i]) {
      refuse_damaged(fmt::format("{}: tensor {}", what, entry.name), actual, hex64(expected[i]),
                     rebuild(file, engine_dir));
    }
    ++i;
  }
  for (const auto& [key, checksum] : file.metadata()) {
    if (!key.starts_with(kFilePrefix)) continue;
    const fs::path name = key.substr(kFilePrefix.size());
    if (name != name.filename()) {
      fail(ErrorKind::kInput, "{}: {} is no file name; {}", what, key, rebuild(file, engine_dir));
    }
    const fs::path path = engine_dir / name;
    const std::string content = read_file(path);
    const uint64_t actual = xxh3_64(std::as_bytes(std::span(content)));
    if (hex64(actual) != checksum) {
      refuse_damaged(path.string(), actual, checksum,
                     "it was edited, or the disk lost it: " + rebuild(file, engine_dir));
    }
  }
}

}  // namespace nibble
