// SPDX-License-Identifier: Apache-2.0
#include "build/hf_card.h"

namespace nibble {
namespace {

std::string_view trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\"'");
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\"'") - begin + 1);
}

}  // namespace

HfCard read_hf_card(const fs::path& model_dir) {
  HfCard card;
  const fs::path file = model_dir / "README.md";
  std::error_code ignored;
  if (!fs::is_regular_file(file, ignored)) return card;
  const std::string content = read_file(file);
  if (!content.starts_with("---")) return card;
  std::string key;
  const auto add = [&](std::string_view value) {
    value = trim(value);
    if (value.empty()) return;
    if (key == "license") card.license = value;
    if (key == "license_name") card.license_name = value;
    if (key == "license_link") card.license_link = value;
    if (key == "language") card.languages.emplace_back(value);
    if (key == "base_model") card.base_models.emplace_back(value);
  };
  for (size_t at = content.find('\n'); at != content.npos;) {
    const size_t end = std::min(content.find('\n', at + 1), content.size());
    const std::string_view line = std::string_view(content).substr(at + 1, end - at - 1);
    if (line.starts_with("---")) break;
    const std::string_view bare = trim(line);
    const size_t colon = line.find(':');
    if (bare.starts_with("- ")) {
      add(bare.substr(2));
    } else if (colon != line.npos && !line.starts_with(" ")) {
      key = trim(line.substr(0, colon));
      std::string_view value = trim(line.substr(colon + 1));
      if (value.starts_with("[")) {
        value = value.substr(1, value.find(']') - 1);
        while (!value.empty()) {
          const size_t comma = std::min(value.find(','), value.size());
          add(value.substr(0, comma));
          value.remove_prefix(std::min(comma + 1, value.size()));
        }
      } else {
        add(value);
      }
    }
    at = end < content.size() ? end : content.npos;
  }
  return card;
}

}  // namespace nibble
