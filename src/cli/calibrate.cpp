// SPDX-License-Identifier: Apache-2.0
#include "cli/calibrate.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "base/error.h"
#include "build/hf_card.h"
#include "cli/builtin_calibration.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace nibble::cli {
namespace {

// English takes 3.5 to 5 bytes a token in vocabularies made for it, also in small ones.
constexpr double kFewBytesPerToken = 2.2;

// Says plainly why the texts shipped with nibble may be the wrong ones for this model.
void warn_of_mismatch(const fs::path& model, const ChatTemplate& chat,
                      std::optional<double> bytes_per_token, Progress& progress) {
  const auto warn = [&](const std::string& why) {
    progress.note("warning: the built-in calibration texts may not suit this model: " + why +
                  "; give texts of your own with --calib");
  };
  const HfCard card = read_hf_card(model);
  const bool has_english =
      std::any_of(card.languages.begin(), card.languages.end(), [](const std::string& language) {
        return language == "en" || language == "english" || language == "multilingual";
      });
  if (!card.languages.empty() && !has_english) {
    warn(fmt::format("they are English, and its card names {}", fmt::join(card.languages, ", ")));
  } else if (bytes_per_token && *bytes_per_token < kFewBytesPerToken) {
    warn(
        fmt::format("they are English, and its tokenizer cuts them into pieces of {:.1f} bytes, as "
                    "one made for another language does",
                    *bytes_per_token));
  }
  if (chat.is_built_in()) {
    warn(fmt::format("it has no chat template, so their chats are written in the {} format",
                     chat.origin()));
  }
}

}  // namespace

std::pair<std::string, double> parse_calibration_flag(const std::string& flag) {
  const size_t colon = flag.rfind(':');
  if (colon == std::string::npos || fs::exists(flag)) return {flag, 1.0};
  double weight = 0;
  const char* end = flag.data() + flag.size();
  const auto [rest, error] = std::from_chars(flag.data() + colon + 1, end, weight);
  if (error != std::errc() || rest != end) return {flag, 1.0};
  return {flag.substr(0, colon), weight};
}

CalibrationData calibrate(const QuantizeFlags& flags, Progress& progress) {
  const fs::path model = flags.model;
  if (!fs::exists(model / "tokenizer.json")) {
    fail(ErrorKind::kInput,
         "{} has no tokenizer.json, which calibration needs (--method rtn --kv-cache none does "
         "without)",
         flags.model);
  }
  const Tokenizer tokenizer =
      Tokenizer::load(model, {parse_tokenizer_regex(flags.tokenizer_regex)});
  for (const std::string& notice : tokenizer.notices()) progress.note(notice);
  const ChatTemplate chat = ChatTemplate::load(model);
  int64_t text_bytes = 0, text_tokens = 0;
  CalibrationEncoder encoder;
  encoder.chat = [&](const json::object& row) {
    ChatRequest request;
    request.messages = row.at("messages").as_array();
    if (const json::value* tools = row.if_contains("tools")) request.tools = *tools;
    request.add_generation_prompt = false;
    const RenderedSegments rendered = chat.render(request);
    std::vector<Tokenizer::Segment> segments;
    for (const RenderedSegment& segment : rendered)
      segments.push_back({segment.text, segment.is_template});
    return tokenizer.encode_segments(segments);
  };
  encoder.text = [&](std::string_view text) {
    std::vector<int32_t> ids = tokenizer.encode(text);
    text_bytes += static_cast<int64_t>(text.size());
    text_tokens += static_cast<int64_t>(ids.size());
    if (tokenizer.bos_id()) ids.insert(ids.begin(), *tokenizer.bos_id());
    if (tokenizer.eos_id()) ids.push_back(*tokenizer.eos_id());
    return ids;
  };
  std::vector<CalibrationText> texts;
  std::vector<std::string> names;
  for (const std::string& flag : flags.calib) {
    const auto [file, weight] = parse_calibration_flag(flag);
    texts.push_back({file, read_file(file), weight});
    names.push_back(flag);
  }
  if (texts.empty()) {
    texts.push_back({"builtin.jsonl", std::string(builtin_calibration())});
    names.emplace_back("the texts shipped with nibble");
  }
  CalibrationData data = make_calibration(
      texts, {.size = flags.calib_size, .seq_len = flags.calib_seq_len, .seed = flags.seed},
      encoder);
  if (flags.calib.empty()) {
    std::optional<double> bytes_per_token;  // a small set may hold chats only
    if (text_tokens > 0)
      bytes_per_token = static_cast<double>(text_bytes) / static_cast<double>(text_tokens);
    warn_of_mismatch(model, chat, bytes_per_token, progress);
  }
  progress.note(fmt::format("calibrating on {} tokens in {} sequences from {}", data.tokens,
                            data.sequences.size(), fmt::join(names, ", ")));
  return data;
}

}  // namespace nibble::cli
