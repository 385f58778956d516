// Calibration data: real texts and chats as token sequences. Rendering and encoding are the
// caller's (callbacks), so that this knows neither tokenizers nor templates.
//
// Samples are taken in an order shuffled by the seed, their tokens laid end to end and cut into
// sequences of `seq_len`; the last one may be shorter. No pad token exists anywhere, nothing is
// dropped within a sample, and a sample may go on in the next sequence, as in pre-training.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace nibble {

struct CalibrationOptions {
  int size = 64;       // sequences at most
  int seq_len = 5675;  // tokens of a sequence
  uint64_t seed = 1234;
};

struct CalibrationEncoder {
  /// A line with "messages" (and perhaps "tools"), rendered by the model's template. Whole
  /// conversations: no generation prompt at the end.
  std::function<std::vector<int32_t>(const json::object& chat)> chat;
  /// A plain document with whatever the model puts around one (BOS, EOS).
  std::function<std::vector<int32_t>(std::string_view text)> text;
};

struct CalibrationData {
  std::vector<std::vector<int32_t>> sequences;  // none empty
  // What was used, for the checkpoint's config, the report and the log.
  std::string file, hash;  // file name without directories; XXH3 of the content
  uint64_t seed = 0;
  int64_t samples_in_file = 0, samples_used = 0,
          samples_unusable = 0;  // unusable: the template refused them
  int64_t tokens = 0, tokens_wanted = 0, longest_sample_tokens = 0;
  std::string first_refusal;  // why the first unusable sample was refused

  json::object to_json() const;
  /// Sentences a person should read: fewer tokens than asked for, refused samples.
  std::vector<std::string> notices() const;
};

/// `name` decides the format: .jsonl, or .txt (cut at blank lines into pieces of a few kilobytes).
/// Throws Error{kInput} naming the line of a malformed sample and what was wanted, or when no token
/// remains.
CalibrationData make_calibration(std::string_view name, std::string_view content,
                                 const CalibrationOptions& options,
                                 const CalibrationEncoder& encoder);
CalibrationData load_calibration(const fs::path& file, const CalibrationOptions& options,
                                 const CalibrationEncoder& encoder);

}  // namespace nibble
