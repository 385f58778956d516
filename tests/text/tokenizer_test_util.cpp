// SPDX-License-Identifier: Apache-2.0
#include "tokenizer_test_util.h"

#include <cstdio>
#include <memory>
#include <stdexcept>

#include "text/pretokenizer.h"

namespace nibble::testing {

std::vector<std::string> read_lines(const fs::path& path) {
  const std::string text = read_file(path);
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    if (end > begin) lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

std::string read_gzip(const fs::path& path) {
  const std::string command = "gzip -dc '" + path.string() + "'";
  std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen(command.c_str(), "r"), ::pclose);
  if (!pipe) throw std::runtime_error("cannot run gzip");
  std::string out;
  char buffer[1 << 16];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe.get())) > 0;) out.append(buffer, n);
  return out;
}

std::string read_nemo_file(const std::string& name) {
  const fs::path stem = shared_dir() / "text" / (name + "_nemo_2407.json");
  if (fs::exists(stem)) return read_file(stem);
  if (fs::exists(stem.string() + ".gz")) return read_gzip(stem.string() + ".gz");
  const fs::path fetched = source_dir() / "build/tekken" / (name + ".json");
  return fs::exists(fetched) ? read_file(fetched) : std::string();
}

bool tekken_available() {
  static const bool available = !read_nemo_file("tokenizer").empty();
  return available;
}

const std::string& tekken_tokenizer_json(bool llama3_regex) {
  static std::string made[2];
  std::string& out = made[llama3_regex];
  if (!out.empty()) return out;
  json::value document = parse_json(read_nemo_file("tokenizer"), "tokenizer.json");
  const json::value special = parse_json(
      read_file(source_dir() / "tests/data/text/special_tokens.json"), "special_tokens.json");
  std::vector<std::string> names;
  for (const auto& name : special.at("versions").at("v13").as_array()) {
    names.emplace_back(name.as_string());
  }
  while (names.size() < 1000) names.push_back("<SPECIAL_" + std::to_string(names.size()) + ">");
  json::object vocab;
  vocab.reserve(131072);
  for (size_t i = 0; i < names.size(); ++i) vocab[names[i]] = i;
  for (const auto& entry : document.at("model").at("vocab").as_object()) {
    if (entry.value().as_int64() >= 1000) vocab[entry.key()] = entry.value();
  }
  document.as_object()["model"].as_object()["vocab"] = std::move(vocab);
  for (auto& token : document.as_object()["added_tokens"].as_array()) {
    token.as_object()["content"] = names[static_cast<size_t>(token.at("id").as_int64())];
  }
  if (llama3_regex) {
    document.as_object()["pre_tokenizer"]
        .as_object()["pretokenizers"]
        .as_array()[0]
        .as_object()["pattern"]
        .as_object()["Regex"] = json::string_view(kLlama3Pattern);
  }
  return out = dump_json(document);
}

const Tokenizer& tekken_tokenizer() {
  static const Tokenizer tokenizer = Tokenizer::from_json(
      tekken_tokenizer_json(), {}, R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}})");
  return tokenizer;
}

const Tokenizer& nano_tokenizer() {
  static const Tokenizer tokenizer = Tokenizer::load(nano_dir());
  return tokenizer;
}

std::vector<int32_t> ids_of(const json::value& array) {
  std::vector<int32_t> ids;
  for (const auto& id : array.as_array()) ids.push_back(static_cast<int32_t>(id.as_int64()));
  return ids;
}

}  // namespace nibble::testing
