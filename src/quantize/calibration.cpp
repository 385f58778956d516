// SPDX-License-Identifier: Apache-2.0
#include "quantize/calibration.h"

#include <algorithm>
#include <cmath>
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

// Sequences of each file: by weight, at least one each, largest remainders first.
std::vector<int> split_sequences(std::span<const CalibrationText> texts, int size) {
  double total = 0;
  for (const CalibrationText& text : texts) {
    if (!(text.weight > 0) || !std::isfinite(text.weight)) {
      fail(ErrorKind::kUsage, "calibration file {} has weight {}; wanted a number above 0",
           text.name, text.weight);
    }
    total += text.weight;
  }
  if (static_cast<size_t>(size) < texts.size()) {
    fail(ErrorKind::kUsage,
         "{} calibration files, but only {} sequences to share; raise --calib-size", texts.size(),
         size);
  }
  std::vector<int> counts;
  std::vector<std::pair<double, size_t>> remainders;
  int left = size;
  for (size_t i = 0; i < texts.size(); ++i) {
    const double share = texts[i].weight / total * size;
    counts.push_back(std::max(1, static_cast<int>(share)));
    remainders.emplace_back(counts.back() - share, i);  // the most shortchanged first
    left -= counts.back();
  }
  std::stable_sort(remainders.begin(), remainders.end());
  for (size_t i = 0; left > 0; i = (i + 1) % texts.size(), --left) ++counts[remainders[i].second];
  while (left < 0) {  // tiny weights were lifted to one: the largest gives way
    --*std::max_element(counts.begin(), counts.end());
    ++left;
  }
  return counts;
}

void add_source(CalibrationData& data, const CalibrationText& input, int size,
                const CalibrationEncoder& encoder) {
  const bool is_jsonl = input.name.ends_with(".jsonl");
  if (!is_jsonl && !input.name.ends_with(".txt")) {
    fail(ErrorKind::kUsage,
         "calibration file {}: wanted a .jsonl file (a line each: {{\"messages\": [...]}} or "
         "{{\"text\": \"...\"}}) or a .txt file",
         input.name);
  }
  std::vector<Sample> samples = is_jsonl ? split_jsonl(input.content) : split_text(input.content);
  CalibrationSource& source = data.sources.emplace_back();
  source.file = fs::path(input.name).filename().string();
  source.hash =
      hex64(xxh3_64(std::as_bytes(std::span(input.content.data(), input.content.size()))));
  source.weight = input.weight;
  source.samples_in_file = static_cast<int64_t>(samples.size());
  source.tokens_wanted = int64_t{size} * data.seq_len;
  shuffle(samples, data.seed);

  const size_t seq_len = static_cast<size_t>(data.seq_len), first = data.sequences.size();
  for (const Sample& sample : samples) {
    if (source.tokens >= source.tokens_wanted) break;
    throw_if_interrupted();
    std::vector<int32_t> ids;
    if (!is_jsonl) {
      ids = encoder.text(sample.source);
    } else {
      const std::string what = fmt::format("{} line {}", source.file, sample.line);
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
          if (source.samples_unusable++ == 0)
            source.first_refusal = fmt::format("{}: {}", what, error.what());
          continue;
        }
      } else if (text != nullptr && text->is_string()) {
        ids = encoder.text(std::string_view(text->get_string()));
      } else {
        fail(ErrorKind::kInput,
             "{}: wanted an object with \"messages\" (an array) or \"text\" (a string)", what);
      }
    }
    ++source.samples_used;
    source.longest_sample_tokens =
        std::max(source.longest_sample_tokens, static_cast<int64_t>(ids.size()));
    const int64_t kept =
        std::min(static_cast<int64_t>(ids.size()), source.tokens_wanted - source.tokens);
    source.tokens_cut += static_cast<int64_t>(ids.size()) - kept;
    if (kept > 0 && source.tokens / data.seq_len != (source.tokens + kept - 1) / data.seq_len)
      ++source.samples_split;
    for (int64_t i = 0; i < kept; ++i) {
      if (data.sequences.size() == first || data.sequences.back().size() == seq_len)
        data.sequences.emplace_back();
      data.sequences.back().push_back(ids[static_cast<size_t>(i)]);
    }
    source.tokens += kept;
  }
  if (source.tokens == 0) {
    fail(ErrorKind::kInput, "calibration file {} gave no token{}{}", input.name,
         source.first_refusal.empty() ? "" : "; ", source.first_refusal);
  }
  data.tokens += source.tokens;
  data.tokens_wanted += source.tokens_wanted;
}

}  // namespace

CalibrationData make_calibration(std::span<const CalibrationText> texts,
                                 const CalibrationOptions& options,
                                 const CalibrationEncoder& encoder) {
  if (options.size < 1 || options.seq_len < 2) {
    fail(ErrorKind::kUsage, "calibration needs at least 1 sequence of 2 tokens, got {} of {}",
         options.size, options.seq_len);
  }
  CalibrationData data;
  data.seed = options.seed;
  data.seq_len = options.seq_len;
  const std::vector<int> counts = split_sequences(texts, options.size);
  for (size_t i = 0; i < texts.size(); ++i) add_source(data, texts[i], counts[i], encoder);
  return data;
}

json::object CalibrationData::to_json() const {
  json::array list;
  for (const CalibrationSource& source : sources) {
    list.push_back({{"file", source.file},
                    {"xxh3", source.hash},
                    {"weight", source.weight},
                    {"samples_in_file", source.samples_in_file},
                    {"samples_used", source.samples_used},
                    {"samples_unusable", source.samples_unusable},
                    {"samples_split", source.samples_split},
                    {"tokens", source.tokens},
                    {"tokens_wanted", source.tokens_wanted},
                    {"tokens_cut", source.tokens_cut},
                    {"longest_sample_tokens", source.longest_sample_tokens}});
  }
  return {{"sources", std::move(list)},    {"seed", seed},     {"seq_len", seq_len},
          {"sequences", sequences.size()}, {"tokens", tokens}, {"tokens_wanted", tokens_wanted}};
}

std::string CalibrationData::checksum() const {
  std::vector<int32_t> all;
  for (const std::vector<int32_t>& sequence : sequences) {
    all.push_back(static_cast<int32_t>(sequence.size()));
    all.insert(all.end(), sequence.begin(), sequence.end());
  }
  return hex64(xxh3_64(std::as_bytes(std::span(all))));
}

std::vector<std::string> CalibrationData::notices() const {
  std::vector<std::string> sentences;
  for (const CalibrationSource& source : sources) {
    if (source.tokens < source.tokens_wanted) {
      sentences.push_back(fmt::format("{} holds {} tokens, {} were asked for; all of it is used",
                                      source.file, source.tokens, source.tokens_wanted));
    }
    if (source.samples_unusable > 0) {
      sentences.push_back(fmt::format(
          "{}: {} of {} calibration samples could not be rendered and were left out; the first: {}",
          source.file, source.samples_unusable, source.samples_in_file, source.first_refusal));
    }
  }
  return sentences;
}

}  // namespace nibble
