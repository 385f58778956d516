// SPDX-License-Identifier: Apache-2.0
#include "quantize/outlier_model.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "base/json.h"
#include "build/tokenizer_files.h"
#include "formats/safetensors.h"
#include "formats/weight_source.h"

namespace nibble::testing_ {
namespace {

// Factor of each channel: 1 but for a few.
std::vector<float> loud_channels(int64_t hidden, std::mt19937& random) {
  std::vector<float> factors(static_cast<size_t>(hidden), 1.0f);
  const int64_t count = std::max<int64_t>(1, std::lround(0.015 * static_cast<double>(hidden)));
  for (int64_t i = 0; i < count; ++i) {
    const double octave = static_cast<double>(random()) / 4294967296.0;
    factors[random() % static_cast<uint32_t>(hidden)] =
        static_cast<float>(5.0 * std::pow(10.0, octave));
  }
  return factors;
}

}  // namespace

void write_outlier_model(const fs::path& model, const fs::path& out, uint64_t seed) {
  const auto source = open_hf(model);
  const ModelSpec& spec = source->spec();
  std::mt19937 random(static_cast<unsigned>(seed));
  std::vector<SafetensorsWriter::Declaration> declared;
  std::vector<std::vector<float>> tensors;
  std::vector<float> attention, mlp;
  for (const WeightRow& row : weight_table(spec)) {
    std::vector<float> weight = source->load_dense(row);
    if (row.role == WeightRole::kAttnNorm || row.role == WeightRole::kMlpNorm) {
      std::vector<float>& factors = row.role == WeightRole::kAttnNorm ? attention : mlp;
      factors = loud_channels(spec.hidden_size, random);
      for (size_t c = 0; c < weight.size(); ++c) weight[c] *= factors[c];
    }
    const bool reads_mlp = row.role == WeightRole::kGate || row.role == WeightRole::kUp;
    if (row.role == WeightRole::kQkv || reads_mlp) {
      const std::vector<float>& factors = reads_mlp ? mlp : attention;
      for (size_t i = 0; i < weight.size(); ++i) weight[i] /= factors[i % factors.size()];
    }
    std::vector<int64_t> rows = {row.shape[0]};
    if (row.role == WeightRole::kQkv) rows = {spec.q_size(), spec.kv_size(), spec.kv_size()};
    const int64_t columns = row.shape.size() == 2 ? row.shape[1] : 1;
    auto at = weight.begin();
    for (size_t part = 0; part < row.hf_names.size(); ++part) {
      std::vector<int64_t> shape = row.shape;
      shape[0] = rows[part];
      declared.push_back({row.hf_names[part], DType::kF32, shape});
      tensors.emplace_back(at, at + rows[part] * columns);
      at += rows[part] * columns;
    }
  }
  fs::create_directories(out);
  SafetensorsWriter writer = SafetensorsWriter::create(out / "model.safetensors", declared, {});
  for (const std::vector<float>& tensor : tensors) writer.write(std::as_bytes(std::span(tensor)));
  writer.commit();
  json::object config = parse_json(read_file(model / "config.json"), "config.json").as_object();
  config[config.contains("dtype") ? "dtype" : "torch_dtype"] = "float32";
  write_file_atomically(out / "config.json", dump_json(config, {.indent = 2}) + "\n");
  copy_tokenizer_files(model, out);
}

}  // namespace nibble::testing_
