// SPDX-License-Identifier: Apache-2.0
#include "cli/texts.h"

#include "base/error.h"
#include "base/json.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace nibble::cli {

std::vector<int32_t> encode_text_file(const fs::path& model_dir, const fs::path& file,
                                      const std::string& regex) {
  const Tokenizer tokenizer = Tokenizer::load(model_dir, {parse_tokenizer_regex(regex)});
  const std::string content = read_file(file);
  std::vector<int32_t> ids;
  const auto append_document = [&](std::string_view text) {
    const std::vector<int32_t> encoded = tokenizer.encode(text, false, false);
    if (tokenizer.bos_id()) ids.push_back(*tokenizer.bos_id());
    ids.insert(ids.end(), encoded.begin(), encoded.end());
    if (tokenizer.eos_id()) ids.push_back(*tokenizer.eos_id());
  };
  if (file.extension() != ".jsonl") {
    append_document(content);
    return ids;
  }
  std::optional<ChatTemplate> chat;
  int64_t number = 0;
  for (size_t at = 0; at < content.size();) {
    const size_t end = std::min(content.find('\n', at), content.size());
    const std::string_view line = std::string_view(content).substr(at, end - at);
    at = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    const std::string what = fmt::format("{} line {}", file.string(), number);
    const json::value row = parse_json(line, what);
    const json::value* messages =
        row.is_object() ? row.get_object().if_contains("messages") : nullptr;
    const json::value* text = row.is_object() ? row.get_object().if_contains("text") : nullptr;
    if (messages != nullptr && messages->is_array()) {
      if (!chat) chat = ChatTemplate::load(model_dir);
      ChatRequest request;
      request.messages = messages->get_array();
      if (const json::value* tools = row.get_object().if_contains("tools")) request.tools = *tools;
      request.add_generation_prompt = false;
      const RenderedSegments rendered = chat->render(request);
      std::vector<Tokenizer::Segment> segments;
      for (const RenderedSegment& segment : rendered)
        segments.push_back({segment.text, segment.is_template});
      const std::vector<int32_t> encoded = tokenizer.encode_segments(segments);
      ids.insert(ids.end(), encoded.begin(), encoded.end());
    } else if (text != nullptr && text->is_string()) {
      append_document(text->get_string());
    } else {
      fail(ErrorKind::kInput, "{} has neither \"messages\" (an array) nor \"text\" (a string)",
           what);
    }
  }
  return ids;
}

std::vector<int32_t> read_ids_file(const fs::path& path) {
  const std::string bytes = read_file(path);
  const size_t width = path.extension() == ".u32" ? 4 : 2;
  if (path.extension() != ".u16" && path.extension() != ".u32") {
    fail(ErrorKind::kUsage, "--ids {}: wanted a .u16 or .u32 file of little-endian token ids",
         path.string());
  }
  if (bytes.size() % width != 0) {
    fail(ErrorKind::kInput, "{} has {} bytes, not a multiple of {}", path.string(), bytes.size(),
         width);
  }
  std::vector<int32_t> ids;
  for (size_t i = 0; i < bytes.size(); i += width) {
    uint32_t id = 0;
    for (size_t b = 0; b < width; ++b)
      id |= uint32_t{static_cast<uint8_t>(bytes[i + b])} << (8 * b);
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

std::vector<int32_t> eval_ids(const fs::path& model_dir, const fs::path& file,
                              const std::string& regex) {
  if (file.extension() == ".u16" || file.extension() == ".u32") return read_ids_file(file);
  return encode_text_file(model_dir, file, regex);
}

}  // namespace nibble::cli
