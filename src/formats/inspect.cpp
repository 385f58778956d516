// SPDX-License-Identifier: Apache-2.0
#include "formats/inspect.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "base/nearest.h"
#include "formats/safetensors.h"
#include "formats/widen.h"
#include "spec/object_reader.h"

namespace nibble {
namespace {

const char* role_name(WeightRole role) {
  switch (role) {
    case WeightRole::kEmbedding: return "embedding";
    case WeightRole::kAttnNorm: return "attn_norm";
    case WeightRole::kQkv: return "qkv";
    case WeightRole::kO: return "o";
    case WeightRole::kMlpNorm: return "mlp_norm";
    case WeightRole::kGate: return "gate";
    case WeightRole::kUp: return "up";
    case WeightRole::kDown: return "down";
    case WeightRole::kFinalNorm: return "final_norm";
    case WeightRole::kLmHead: return "lm_head";
  }
  NIBBLE_CHECK(false, "role {}", static_cast<int>(role));
}

const char* kind_name(ModelKind kind) {
  switch (kind) {
    case ModelKind::kHuggingFace: return "hugging-face";
    case ModelKind::kCheckpoint: return "checkpoint";
    case ModelKind::kEngine: return "engine";
  }
  NIBBLE_CHECK(false, "kind {}", static_cast<int>(kind));
}

json::array shape_json(const std::vector<int64_t>& shape) {
  return json::array(shape.begin(), shape.end());
}

// Finite values only; how many are not is said.
void add_statistics(std::span<const float> values, json::object& out, const char* prefix = "") {
  double sum = 0, sum_squares = 0;
  float low = std::numeric_limits<float>::infinity(), high = -low;
  int64_t count = 0;
  for (const float value : values) {
    if (!std::isfinite(value)) continue;
    sum += value;
    sum_squares += static_cast<double>(value) * value;
    low = std::min(low, value);
    high = std::max(high, value);
    ++count;
  }
  const auto key = [&](const char* name) { return std::string(prefix) + name; };
  if (count > 0) {
    const double mean = sum / static_cast<double>(count);
    out[key("min")] = low;
    out[key("max")] = high;
    out[key("mean")] = mean;
    out[key("std")] =
        std::sqrt(std::max(0.0, sum_squares / static_cast<double>(count) - mean * mean));
  }
  out[key("nonfinite")] = static_cast<int64_t>(values.size()) - count;
}

json::array first_values(std::span<const float> values) {
  json::array first;
  for (size_t i = 0; i < std::min<size_t>(8, values.size()); ++i) {
    first.push_back(std::isfinite(values[i]) ? json::value(values[i])
                                             : json::value(fmt::format("{}", values[i])));
  }
  return first;
}

std::vector<float> as_floats(const TensorView& view) {
  if (is_dense_dtype(view.dtype)) return widen(view);
  std::vector<float> values;
  const auto read = [&]<typename T>(T) {
    values.resize(view.bytes.size() / sizeof(T));
    for (size_t i = 0; i < values.size(); ++i) {
      T value;
      std::memcpy(&value, view.bytes.data() + i * sizeof(T), sizeof(T));
      values[i] = static_cast<float>(value);
    }
  };
  switch (view.dtype) {
    case DType::kBool:
    case DType::kU8: read(uint8_t{}); break;
    case DType::kI8: read(int8_t{}); break;
    case DType::kI16: read(int16_t{}); break;
    case DType::kU16: read(uint16_t{}); break;
    case DType::kI32: read(int32_t{}); break;
    case DType::kU32: read(uint32_t{}); break;
    case DType::kI64: read(int64_t{}); break;
    case DType::kU64: read(uint64_t{}); break;
    case DType::kF64: read(double{}); break;
    default: break;  // 4-, 6- and 8-bit floats and complex: dtype and shape only
  }
  return values;
}

json::object inspect_row(const WeightSource& source, const WeightRow& row) {
  json::object out = {{"name", row.name}, {"shape", shape_json(row.shape)}};
  if (!source.is_quantized(row)) {
    std::vector<std::byte> storage;
    const TensorView view = source.view_dense(row, storage);
    const std::vector<float> values = widen(view);
    out["dtype"] = dtype_name(view.dtype);
    out["bytes"] = view.bytes.size();
    add_statistics(values, out);
    out["first"] = first_values(values);
    return out;
  }
  if (source.bits(row) == 8) {
    const Int8Weight weight = source.load_int8(row);
    const int64_t in = weight.in_features, groups = in / weight.group_size;
    out["dtype"] = "int8";
    out["group_size"] = weight.group_size;
    out["bytes"] = weight.out_features * in;
    std::vector<float> values(static_cast<size_t>(weight.out_features * in));
    for (int64_t i = 0; i < weight.out_features * in; ++i) {
      values[static_cast<size_t>(i)] =
          static_cast<float>(static_cast<int8_t>(weight.values[i])) *
          weight.scales[static_cast<size_t>(i / in * groups + i % in / weight.group_size)];
    }
    add_statistics(values, out);
    out["first"] = first_values(values);
    add_statistics(weight.scales, out, "scale_");
    return out;
  }
  const Int4Weight weight = source.load_int4(row);
  const int64_t in = weight.in_features, groups = in / weight.group_size;
  out["dtype"] = "int4";
  out["group_size"] = weight.group_size;
  out["bytes"] = weight.out_features / 2 * in;
  std::vector<float> values(static_cast<size_t>(weight.out_features * in));
  std::vector<int64_t> histogram(16);
  for (int64_t r = 0; r < weight.out_features; ++r) {
    for (int64_t c = 0; c < in; ++c) {
      const auto byte = static_cast<uint8_t>(weight.nibbles[r / 2 * in + c]);
      const int bits = r % 2 == 0 ? byte & 15 : byte >> 4;
      const int q = bits >= 8 ? bits - 16 : bits;
      ++histogram[static_cast<size_t>(q + 8)];
      values[static_cast<size_t>(r * in + c)] =
          static_cast<float>(q) *
          weight.scales[static_cast<size_t>(r * groups + c / weight.group_size)];
    }
  }
  add_statistics(values, out);
  out["first"] = first_values(values);
  out["q_histogram"] = json::array(histogram.begin(), histogram.end());  // of -8 .. 7
  add_statistics(weight.scales, out, "scale_");
  if (!weight.pre_scale.empty()) add_statistics(weight.pre_scale, out, "prequant_");
  return out;
}

std::vector<fs::path> tensor_files(const fs::path& directory) {
  std::vector<fs::path> files;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    const std::string extension = it->path().extension().string();
    if (extension == ".safetensors" || extension == ".engine") files.push_back(it->path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string text_of(const json::value& value) {
  return value.is_string() ? std::string(value.get_string()) : show_json(value);
}

}  // namespace

std::string human_bytes(uint64_t bytes) {
  if (bytes < 1000) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes);
  const char* unit = "B";
  for (const char* next : {"kB", "MB", "GB", "TB"}) {
    if (value < 999.5) break;
    value /= 1000;
    unit = next;
  }
  return fmt::format("{:.3g} {}", value, unit);
}

json::object inspect_source(const WeightSource& source, std::string_view kind) {
  const ModelSpec& spec = source.spec();
  struct Line {
    WeightRole role;
    std::string storage;
    int group_size = 0;
    json::array shape_list;
    int64_t count = 0, parameters = 0, bytes = 0;
  };
  std::vector<Line> lines;
  int64_t total = 0;
  const DType dense_dtype =
      [&] {  // of joined rows; reading every one only to learn its dtype would cost a pass
        std::vector<std::byte> storage;
        return source.view_dense(weight_table(spec)[1], storage).dtype;
      }();
  for (const WeightRow& row : weight_table(spec)) {
    int64_t parameters = 1;
    for (const int64_t dim : row.shape) parameters *= dim;
    Line line{.role = row.role, .shape_list = shape_json(row.shape)};
    if (source.bits(row) == 8) {
      const Int8Weight weight = source.load_int8(row);
      line.storage = "int8";
      line.group_size = weight.group_size;
      line.bytes = parameters + static_cast<int64_t>(weight.scales.size() * 4);
    } else if (source.is_quantized(row)) {
      const Int4Weight weight = source.load_int4(row);
      line.storage = "int4";
      line.group_size = weight.group_size;
      line.bytes = parameters / 2 +
                   static_cast<int64_t>(weight.scales.size() * 4 + weight.pre_scale.size() * 2);
    } else {
      DType dtype = dense_dtype;
      if (row.hf_names.size() == 1) {
        std::vector<std::byte> storage;
        dtype = source.view_dense(row, storage).dtype;
      }
      line.storage = dtype_name(dtype);
      line.bytes = parameters * dtype_bits(dtype) / 8;
    }
    total += line.bytes;
    auto found = std::find_if(lines.begin(), lines.end(), [&](const Line& other) {
      return other.role == line.role && other.storage == line.storage &&
             other.group_size == line.group_size;
    });
    if (found == lines.end()) {
      lines.push_back(std::move(line));
      found = lines.end() - 1;
      found->parameters = parameters;
    } else {
      found->bytes += line.bytes;
      found->parameters += parameters;
    }
    ++found->count;
  }
  json::array weights;
  for (Line& line : lines) {
    json::object one = {{"role", role_name(line.role)},
                        {"count", line.count},
                        {"shape", std::move(line.shape_list)},
                        {"storage", line.storage}};
    if (line.group_size > 0) one["group_size"] = line.group_size;
    one["parameters"] = line.parameters;
    one["bytes"] = line.bytes;
    weights.push_back(std::move(one));
  }
  json::array notices;
  for (const std::string& notice : source.notices()) notices.push_back(json::string(notice));
  const int64_t parameters = spec.num_parameters();
  return {
      {"kind", json::string(kind)},
      {"parameters", parameters},
      {"spec", spec.to_json()},
      {"weights", std::move(weights)},
      {"bytes", total},
      {"bits_per_parameter", 8.0 * static_cast<double>(total) / static_cast<double>(parameters)},
      {"kv_scales", source.kv_scales().has_value()},
      {"notices", std::move(notices)}};
}

json::object inspect_model(const fs::path& directory) {
  const ModelKind kind = model_kind(directory);
  json::object report;
  if (kind == ModelKind::kEngine) {
    json::object metadata;
    int64_t num_tensors = 0;
    uint64_t bytes = 0;
    for (const fs::path& path : tensor_files(directory)) {
      if (path.extension() != ".engine") continue;
      const SafetensorsFile file = SafetensorsFile::open(path);
      bytes += file.file().bytes().size();
      for (const auto& entry : file.entries())
        num_tensors += entry.name.starts_with("pad.") ? 0 : 1;
      json::object one;
      for (const auto& [key, value] : file.metadata()) {
        if (!key.starts_with("xxh3:")) one[key] = json::string(value);
      }
      metadata[path.filename().string()] = std::move(one);
    }
    report = {{"kind", kind_name(kind)},
              {"tensors", num_tensors},
              {"bytes", bytes},
              {"metadata", std::move(metadata)}};
  } else {
    const auto source = open_source(directory);
    report = inspect_source(*source, kind_name(kind));
  }
  report["directory"] = directory.string();
  return report;
}

json::object inspect_tensor(const fs::path& given, std::string_view name) {
  const ModelKind kind = model_kind(given);
  const fs::path directory = kind == ModelKind::kCheckpoint ? checkpoint_directory(given) : given;
  std::vector<std::string> names;
  if (kind != ModelKind::kEngine) {
    const auto source = open_source(given);
    for (const WeightRow& row : weight_table(source->spec())) {
      if (row.name == name) return inspect_row(*source, row);
      names.push_back(row.name);
    }
  }
  for (const fs::path& path : tensor_files(directory)) {
    const SafetensorsFile file = SafetensorsFile::open(path);
    if (!file.contains(name)) {
      for (const auto& entry : file.entries()) names.push_back(entry.name);
      continue;
    }
    const TensorView view = file.tensor(name);
    json::object out = {{"name", json::string(name)},
                        {"file", path.filename().string()},
                        {"dtype", dtype_name(view.dtype)},
                        {"shape", shape_json(view.shape)},
                        {"bytes", view.bytes.size()}};
    const std::vector<float> values = as_floats(view);
    if (!values.empty()) {
      add_statistics(values, out);
      out["first"] = first_values(values);
    }
    return out;
  }
  fail(ErrorKind::kInput, "{} has no weight or tensor \"{}\"; the nearest of {} names is \"{}\"",
       directory.string(), name, names.size(), nearest_name(name, names));
}

std::string describe_model(const json::object& report) {
  std::string out =
      fmt::format("{}: {}\n", text_of(report.at("kind")),
                  report.contains("directory") ? text_of(report.at("directory")) : "in memory");
  if (const json::value* spec = report.if_contains("spec")) {
    ObjectReader in(spec->as_object(), "report");
    const double parameters = report.at("parameters").to_number<double>();
    const bool billions = parameters >= 1e9;
    out +=
        fmt::format("{}, {:.4g} {} parameters, {} ({:.3g} bits each)\n", in.string("architecture"),
                    parameters / (billions ? 1e9 : 1e6), billions ? "billion" : "million",
                    human_bytes(report.at("bytes").to_number<uint64_t>()),
                    report.at("bits_per_parameter").to_number<double>());
    out += fmt::format(
        "layers {}, hidden {}, heads {} x {}, kv heads {}, ffn {}, vocabulary {}, positions {}, "
        "rope {}{}\n",
        show_json(spec->at("num_layers")), show_json(spec->at("hidden_size")),
        show_json(spec->at("num_heads")), show_json(spec->at("head_dim")),
        show_json(spec->at("num_kv_heads")), show_json(spec->at("ffn_size")),
        show_json(spec->at("vocab_size")), show_json(spec->at("max_position")),
        show_json(spec->at("rope_theta")),
        spec->at("rope_factor").to_number<double>() != 0 ? " (llama3 scaling)" : "");
    out += fmt::format("\n{:<12} {:>5}  {:<16} {:<12} {:>10}\n", "weights", "count", "shape",
                       "stored as", "bytes");
    for (const json::value& value : report.at("weights").as_array()) {
      const json::object& line = value.as_object();
      std::string storage = text_of(line.at("storage"));
      if (const json::value* group = line.if_contains("group_size"))
        storage += fmt::format(" / {}", show_json(*group));
      out += fmt::format("{:<12} {:>5}  {:<16} {:<12} {:>10}\n", text_of(line.at("role")),
                         show_json(line.at("count")), show_json(line.at("shape")), storage,
                         human_bytes(line.at("bytes").to_number<uint64_t>()));
    }
    out +=
        fmt::format("calibrated KV scales: {}\n", report.at("kv_scales").as_bool() ? "yes" : "no");
    for (const json::value& notice : report.at("notices").as_array())
      out += "note: " + text_of(notice) + "\n";
  } else {
    out += fmt::format("{} tensors, {}\n", show_json(report.at("tensors")),
                       human_bytes(report.at("bytes").to_number<uint64_t>()));
    for (const auto& file : report.at("metadata").as_object()) {
      out += fmt::format("{}:\n", std::string_view(file.key()));
      for (const auto& member : file.value().as_object()) {
        if (member.key() == "plan") continue;  // long, and shown by itself
        out += fmt::format("  {}: {}\n", std::string_view(member.key()), text_of(member.value()));
      }
    }
  }
  return out;
}

std::string describe_tensor(const json::object& report) {
  std::string out;
  for (const auto& member : report) {
    std::string value =
        member.value().is_string() ? text_of(member.value()) : dump_json(member.value());
    if (member.value().is_double()) value = fmt::format("{:.6g}", member.value().get_double());
    out += fmt::format("{:<18} {}\n", std::string_view(member.key()), value);
  }
  return out;
}

}  // namespace nibble
