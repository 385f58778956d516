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

}  // namespace nibble::cli
