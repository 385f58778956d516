// SPDX-License-Identifier: Apache-2.0
#include "quantize/resume.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/hash.h"
#include "formats/safetensors.h"

namespace nibble {
namespace {

const std::pair<WeightRole, const char*> kLinears[] = {{WeightRole::kQkv, "qkv"},
                                                       {WeightRole::kO, "o"},
                                                       {WeightRole::kGate, "gate"},
                                                       {WeightRole::kUp, "up"},
                                                       {WeightRole::kDown, "down"}};

template <typename T>
std::vector<T> values(const SafetensorsFile& file, const std::string& name) {
  const TensorView view = file.tensor(name);
  std::vector<T> out(view.bytes.size() / sizeof(T));
  std::memcpy(out.data(), view.bytes.data(), out.size() * sizeof(T));
  return out;
}

void check_same(const fs::path& directory, const json::object& have, const json::object& want) {
  for (const auto& member : want) {
    const json::value* other = have.if_contains(member.key());
    if (other != nullptr && *other == member.value()) continue;
    fail(
        ErrorKind::kUsage,
        "{} holds an unfinished quantization begun with {} {}, now it is {}; repeat the command it "
        "was begun with to continue it, or remove {} to begin anew",
        directory.parent_path().string(), std::string_view(member.key()),
        other == nullptr ? "unknown" : dump_json(*other), dump_json(member.value()),
        directory.parent_path().string());
  }
}

}  // namespace

ResumeFolder ResumeFolder::open(const fs::path& directory, const json::object& fingerprint) {
  ResumeFolder folder;
  folder.directory_ = directory;
  const fs::path file = directory / "arguments.json";
  // Through text and back, so that both sides had the same journey.
  const json::object want = parse_json(dump_json(fingerprint), "arguments").as_object();
  if (!fs::exists(file)) {
    fs::create_directories(directory);
    write_file_atomically(file, dump_json(want, {.indent = 2}) + "\n");
    return folder;
  }
  const json::value have = parse_json(read_file(file), file.string());
  check_same(directory, have.is_object() ? have.get_object() : json::object(), want);
  while (fs::exists(folder.layer_file(folder.layers_done_))) ++folder.layers_done_;
  // A layer's states are written before its file: with the file there, they are.
  return folder;
}

fs::path ResumeFolder::layer_file(int layer) const {
  return directory_ / fmt::format("layer-{}.safetensors", layer);
}
fs::path ResumeFolder::states_file(int layer) const {
  return directory_ / fmt::format("states-{}.safetensors", layer);
}

LayerResult ResumeFolder::load(int layer) const {
  const SafetensorsFile file = SafetensorsFile::open(layer_file(layer));
  LayerResult result;
  for (const auto& [role, name] : kLinears) {
    const std::string prefix = name;
    result.linears[role] = {values<int8_t>(file, prefix + ".q"),
                            values<float>(file, prefix + ".scales"),
                            values<float>(file, prefix + ".pre_scale")};
  }
  for (const auto& [key, text] : file.metadata()) {
    if (key != "report") continue;
    const json::object report = parse_json(text, layer_file(layer).string()).as_object();
    for (const json::value& linear : report.at("linears").as_array())
      result.reports.push_back(linear_report_from_json(linear.as_object()));
    const auto number = [&](const char* name) { return report.at(name).to_number<double>(); };
    result.k_scale = static_cast<float>(number("k_scale"));
    result.v_scale = static_cast<float>(number("v_scale"));
    result.forward_seconds = number("forward_seconds");
    result.search_seconds = number("search_seconds");
  }
  return result;
}

void ResumeFolder::load_states(const std::vector<std::span<std::byte>>& states) const {
  if (states.empty()) return;
  const fs::path path = states_file(layers_done_ - 1);
  const SafetensorsFile file = SafetensorsFile::open(path);
  for (size_t i = 0; i < states.size(); ++i) {
    const TensorView view = file.tensor(std::to_string(i));
    const std::pair<std::string, std::string> sum = {std::to_string(i), hex64(xxh3_64(view.bytes))};
    const auto& sums = file.metadata();
    if (view.bytes.size() != states[i].size() ||
        std::find(sums.begin(), sums.end(), sum) == sums.end()) {
      fail(ErrorKind::kInput,
           "{} is damaged ({} bytes, wanted {}, or another checksum); remove {} to begin anew",
           path.string(), view.bytes.size(), states[i].size(), directory_.parent_path().string());
    }
    std::memcpy(states[i].data(), view.bytes.data(), states[i].size());
  }
}

void ResumeFolder::save(const LayerResult& result,
                        const std::vector<std::span<std::byte>>& states) {
  if (!states.empty()) {
    std::vector<SafetensorsWriter::Declaration> parts;
    std::vector<std::pair<std::string, std::string>> sums;
    for (size_t i = 0; i < states.size(); ++i) {
      parts.push_back({std::to_string(i), DType::kU8, {static_cast<int64_t>(states[i].size())}});
      sums.emplace_back(std::to_string(i), hex64(xxh3_64(states[i])));
    }
    SafetensorsWriter writer = SafetensorsWriter::create(states_file(layers_done_), parts, sums);
    for (const std::span<std::byte> part : states) writer.write(part);
    writer.commit();
  }
  std::vector<SafetensorsWriter::Declaration> tensors;
  for (const auto& [role, name] : kLinears) {
    const std::string prefix = name;
    const CheckpointLinear& linear = result.linears.at(role);
    tensors.push_back({prefix + ".q", DType::kI8, {static_cast<int64_t>(linear.q.size())}});
    tensors.push_back(
        {prefix + ".scales", DType::kF32, {static_cast<int64_t>(linear.scales.size())}});
    tensors.push_back(
        {prefix + ".pre_scale", DType::kF32, {static_cast<int64_t>(linear.pre_scale.size())}});
  }
  json::array linears;
  for (const LinearReport& report : result.reports) linears.push_back(to_json(report));
  const json::object report = {{"linears", std::move(linears)},
                               {"k_scale", result.k_scale},
                               {"v_scale", result.v_scale},
                               {"forward_seconds", result.forward_seconds},
                               {"search_seconds", result.search_seconds}};
  SafetensorsWriter writer =
      SafetensorsWriter::create(layer_file(layers_done_), tensors, {{"report", dump_json(report)}});
  for (const auto& [role, name] : kLinears) {
    const CheckpointLinear& linear = result.linears.at(role);
    writer.write(std::as_bytes(std::span(linear.q)));
    writer.write(std::as_bytes(std::span(linear.scales)));
    writer.write(std::as_bytes(std::span(linear.pre_scale)));
  }
  writer.commit();
  if (layers_done_ > 0) {
    std::error_code ignored;
    fs::remove(states_file(layers_done_ - 1), ignored);
  }
  ++layers_done_;
}

}  // namespace nibble
