// SPDX-License-Identifier: Apache-2.0
#include "quantize/calibration.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/hash.h"
#include "base/interrupt.h"
#include "ops/sample_rng.h"

namespace nibble {
namespace {

constexpr size_t kTextPieceBytes =
    4096;  // a .txt file is shuffled in pieces of at least this, whole paragraphs

struct Sample {
  std::string_view source;  // a JSON line or a text
  int64_t line = 0;         // of the file, from 1; 0 for text
};

std::vector<Sample> split_jsonl(std::string_view content) {
  std::vector<Sample> samples;
  int64_t line = 0;
  while (!content.empty()) {
    const size_t end = std::min(content.find('\n'), content.size());
    std::string_view text = content.substr(0, end);
    content.remove_prefix(std::min(end + 1, content.size()));
    ++line;
    if (text.find_first_not_of(" \t\r") != std::string_view::npos) samples.push_back({text, line});
  }
  return samples;
}

std::vector<Sample> split_text(std::string_view content) {
  std::vector<Sample> samples;
  while (!content.empty()) {
    const size_t blank =
        content.size() > kTextPieceBytes ? content.find("\n\n", kTextPieceBytes) : content.npos;
    const size_t end = blank == content.npos ? content.size() : blank + 2;
    const std::string_view piece = content.substr(0, end);
    content.remove_prefix(end);
    if (piece.find_first_not_of(" \t\r\n") != std::string_view::npos) samples.push_back({piece, 0});
  }
  return samples;
}

void shuffle(std::vector<Sample>& samples, uint64_t seed) {
  for (size_t i = samples.size(); i > 1; --i) {
    const uint64_t random = philox4x32(seed, i)[0];
    std::swap(samples[i - 1], samples[static_cast<size_t>(random * i >> 32)]);
  }
}

}  // namespace

CalibrationData make_calibration(std::string_view name, std::string_view content,
                                 const CalibrationOptions& options,
                                 const CalibrationEncoder& encoder) {
  if (options.size < 1 || options.seq_len < 2) {
    fail(ErrorKind::kUsage, "calibration needs at least 1 sequence of 2 tokens, got {} of {}",
         options.size, options.seq_len);
  }
  const bool is_jsonl = name.ends_with(".jsonl");
  if (!is_jsonl && !name.ends_with(".txt")) {
    fail(ErrorKind::kUsage,
         "calibration file {}: wanted a .jsonl file (a line each: {{\"messages\": [...]}} or "
         "{{\"text\": \"...\"}}) or a .txt file",
         name);
  }
  std::vector<Sample> samples = is_jsonl ? split_jsonl(content) : split_text(content);
  CalibrationData data;
  data.file = fs::path(name).filename().string();
  data.hash = hex64(xxh3_64(std::as_bytes(std::span(content.data(), content.size()))));
  data.seed = options.seed;
  data.samples_in_file = static_cast<int64_t>(samples.size());
  data.tokens_wanted = int64_t{options.size} * options.seq_len;
  shuffle(samples, options.seed);

  const size_t seq_len = static_cast<size_t>(options.seq_len);
  for (const Sample& sample : samples) {
    if (data.tokens >= data.tokens_wanted) break;
    throw_if_interrupted();
    std::vector<int32_t> ids;
    if (!is_jsonl) {
      ids = encoder.text(sample.source);
    } else {
      const std::string what = fmt::format("{} line {}", data.file, sample.line);
      const json::value value = parse_json(sample.source, what);
      const json::object* object = value.if_object();
      const json::value* messages = object != nullptr ? object->if_contains("messages") : nullptr;
      const json::value* text = object != nullptr ? object->if_contains("text") : nullptr;
      if (messages != nullptr && messages->is_array()) {
        try {
          ids = encoder.chat(*object);
        } catch (const Error& error) {
          // One odd conversation (a role the template refuses) must not cost the whole run.
          if (error.kind() == ErrorKind::kInterrupted || error.kind() == ErrorKind::kInternal)
            throw;
          if (data.samples_unusable++ == 0)
            data.first_refusal = fmt::format("{}: {}", what, error.what());
          continue;
        }
      } else if (text != nullptr && text->is_string()) {
        ids = encoder.text(std::string_view(text->get_string()));
      } else {
        fail(ErrorKind::kInput,
             "{}: wanted an object with \"messages\" (an array) or \"text\" (a string)", what);
      }
    }
    ++data.samples_used;
    data.longest_sample_tokens =
        std::max(data.longest_sample_tokens, static_cast<int64_t>(ids.size()));
    for (const int32_t id : ids) {
      if (data.tokens >= data.tokens_wanted) break;
      if (data.sequences.empty() || data.sequences.back().size() == seq_len)
        data.sequences.emplace_back();
      data.sequences.back().push_back(id);
      ++data.tokens;
    }
  }
  if (data.tokens == 0) {
    fail(ErrorKind::kInput, "calibration file {} gave no token{}{}", name,
         data.first_refusal.empty() ? "" : "; ", data.first_refusal);
  }
  return data;
}

CalibrationData load_calibration(const fs::path& file, const CalibrationOptions& options,
                                 const CalibrationEncoder& encoder) {
  return make_calibration(file.string(), read_file(file), options, encoder);
}

json::object CalibrationData::to_json() const {
  return {{"file", file},
          {"xxh3", hash},
          {"seed", seed},
          {"samples_in_file", samples_in_file},
          {"samples_used", samples_used},
          {"samples_unusable", samples_unusable},
          {"sequences", sequences.size()},
          {"tokens", tokens},
          {"tokens_wanted", tokens_wanted}};
}

std::vector<std::string> CalibrationData::notices() const {
  std::vector<std::string> sentences;
  if (tokens < tokens_wanted) {
    sentences.push_back(fmt::format("{} holds {} tokens, {} were asked for; all of it is used",
                                    file, tokens, tokens_wanted));
  }
  if (samples_unusable > 0) {
    sentences.push_back(fmt::format(
        "{} of {} calibration samples could not be rendered and were left out; the first: {}",
        samples_unusable, samples_in_file, first_refusal));
  }
  return sentences;
}

}  // namespace nibble
