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

// The flags that gave `plan`, as far as they differ from the defaults. The plan may come from
// another version or be damaged: whatever is not as expected is left out.
std::string build_flags(const json::object& plan, bool for_cpu = false) {
  std::string flags;
  const auto text = [](const json::object& object, std::string_view key) {
    const json::value* value = object.if_contains(key);
    return value != nullptr && value->is_string() ? std::string(value->get_string())
                                                  : std::string();
  };
  const auto number = [](const json::object& object, std::string_view key) -> int64_t {
    const json::value* value = object.if_contains(key);
    return value != nullptr && value->is_int64() ? value->get_int64() : 0;
  };
  const std::string target = text(plan, "target");
  const bool on_cpu = target.starts_with("cpu:");
  if (!for_cpu && runs_here(target) && resolve_target(target) != resolve_target("cpu:native")) {
    flags += " --target " + target;
  }
  if (const json::value* value = plan.if_contains("limits"); value && value->is_object()) {
    const json::object& limits = value->get_object();
    const EngineLimits defaults;
    const auto limit = [&](const char* flag, std::string_view key, int64_t by_default) {
      const int64_t wanted = number(limits, key);
      if (wanted > 0 && wanted != by_default) flags += fmt::format(" {} {}", flag, wanted);
    };
    limit("--max-batch-size", "max_batch_size", defaults.max_batch_size);
    limit("--max-input-len", "max_input_len", defaults.max_input_len);
    limit("--max-output-len", "max_output_len", defaults.max_output_len);
    const int64_t batch = std::clamp<int64_t>(number(limits, "max_batch_size"), 1, 1 << 20);
    limit("--max-num-tokens", "max_num_tokens",
          default_max_num_tokens(target, static_cast<int>(batch)));
  }
  const std::string kv = text(plan, "kv_format");
  for (const KvFormat format : {KvFormat::kInt8Static, KvFormat::kF16}) {
    if (kv == kv_format_name(format)) flags += " --kv-cache " + kv;
  }
  const std::string activations = text(plan, "activation_precision");
  for (const ActivationPrecision precision :
       {ActivationPrecision::kF32, ActivationPrecision::kInt8Group}) {
    if (on_cpu && precision != kDefaultCpuActivationPrecision &&
        activations == activation_precision_name(precision)) {
      flags += " --activations " + activations;
    }
  }
  if (!on_cpu && activations == activation_precision_name(ActivationPrecision::kE4m3)) {
    flags += " --activations " + activations;
  }
  return flags;
}

std::string rebuild(const fs::path& engine_dir, const json::object& plan = {},
                    bool for_cpu = false) {
  return fmt::format("remove it and build it again: nibble build CHECKPOINT --out {}{}",
                     shell_quoted(engine_dir.string()), build_flags(plan, for_cpu));
}

// For the messages: never throws.
std::string rebuild(const SafetensorsFile& file, const fs::path& engine_dir, bool for_cpu = false) {
  try {
    const std::string* text = find_metadata(file, "plan");
    const json::value plan = text != nullptr ? parse_json(*text, "plan") : json::value();
    return rebuild(engine_dir, plan.is_object() ? plan.get_object() : json::object(), for_cpu);
  } catch (const Error&) {
    return rebuild(engine_dir);  // a damaged plan tells no flags
  }
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

std::string rebuild_for_cpu(const SafetensorsFile& file, const fs::path& engine_dir) {
  return rebuild(file, engine_dir, /*for_cpu=*/true);
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
