// Calibration data: real texts and chats as token sequences. Rendering and encoding are the
// caller's (callbacks), so that this knows neither tokenizers nor templates.
//
// Each file gives whole sequences in proportion to its weight. Its samples are taken in an order
// shuffled by the seed, their tokens laid end to end and cut into sequences of `seq_len`; a file's
// last one may be shorter. No pad token exists anywhere, nothing is dropped within a sample but the
// end of the last, and a sample may go on in the next sequence, as in pre-training.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace nibble {

struct CalibrationOptions {
  int size = 64;       // sequences at most, of all files together
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

/// One file of a mixture. `name` decides the format: .jsonl, or .txt (cut at blank lines into
/// pieces of a few kilobytes).
struct CalibrationText {
  std::string name, content;
  double weight = 1;  // share of the sequences, relative to the other files'
};

/// What was used of one file, for the checkpoint's config, the report and the log.
struct CalibrationSource {
  std::string file, hash;  // file name without directories; XXH3 of the content
  double weight = 1;
  int64_t samples_in_file = 0, samples_used = 0;
  int64_t samples_unusable = 0;  // the template refused them
  int64_t samples_split = 0;     // used ones that lie in more than one sequence
  int64_t tokens = 0, tokens_wanted = 0, longest_sample_tokens = 0;
  int64_t tokens_cut = 0;     // the end of the last sample, for which there was no place
  std::string first_refusal;  // why the first unusable sample was refused
};

struct CalibrationData {
  std::vector<std::vector<int32_t>> sequences;  // none empty
  std::vector<CalibrationSource> sources;
  uint64_t seed = 0;
  int seq_len = 0;
  int64_t tokens = 0, tokens_wanted = 0;

  json::object to_json() const;
  /// XXH3 of all ids and lengths: two runs with the same saw the same tokens.
  std::string checksum() const;
  /// Sentences a person should read: fewer tokens than asked for, refused samples.
  std::vector<std::string> notices() const;
};

/// Throws Error{kInput} naming file and line of a malformed sample and what was wanted, or when a
/// file gives no token; Error{kUsage} for weights that are not positive and more files than
/// sequences.
CalibrationData make_calibration(std::span<const CalibrationText> texts,
                                 const CalibrationOptions& options,
                                 const CalibrationEncoder& encoder);

}  // namespace nibble
