// Text to token ids and back, with exact parity to Hugging Face tokenizers on byte-level BPE files.
// Reads tokenizer.json, and tokenizer_config.json / special_tokens_map.json for the names of BOS
// and EOS. Knows nothing of chat templates (they hand in segments) or of the model.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"

namespace nibble {

struct TokenizerOptions {
  /// kShipped: the split regex of tokenizer.json, what Hugging Face and vLLM run. kTekken:
  /// Mistral's own, for the many Mistral checkpoints that ship Llama-3's by mistake
  /// (--tokenizer-regex).
  enum class Regex { kShipped, kTekken };
  Regex regex = Regex::kShipped;
};

/// "shipped" or "tekken"; anything else is Error{kUsage}.
TokenizerOptions::Regex parse_tokenizer_regex(std::string_view name);

/// Immutable after load, thread-safe. Copies share their tables.
class Tokenizer {
 public:
  /// Throws Error naming file and field: kIo, kInput (malformed), kUnsupported (other tokenizer
  /// kinds).
  static Tokenizer load(const fs::path& model_dir, const TokenizerOptions& options = {});

  /// The documents themselves; the last two may be empty. `what` names tokenizer.json in messages.
  static Tokenizer from_json(std::string_view tokenizer_json, const TokenizerOptions& options = {},
                             std::string_view tokenizer_config_json = {},
                             std::string_view special_tokens_map_json = {},
                             std::string_view what = "tokenizer.json");

  /// parse_special: control strings in the text become control tokens (completions, HF's default);
  /// otherwise they are plain text. Added tokens that are not `special` are found either way, as in
  /// HF. add_bos: put around the ids what the post_processor template says, unless the text already
  /// begins with that prefix. Throws Error{kInput} if the text is not UTF-8.
  std::vector<int32_t> encode(std::string_view text, bool parse_special = false,
                              bool add_bos = false) const;

  /// Part of a rendered chat: template literals parse control strings, what users wrote does not.
  struct Segment {
    std::string_view text;
    bool parse_special = false;
  };
  /// Encodes the concatenation. Pieces cross segment borders (as they do in HF) except at control
  /// tokens, and a control string counts only if it lies wholly in parsed text. No BOS is added.
  std::vector<int32_t> encode_segments(std::span<const Segment> segments) const;

  /// HF's decode: skipped control tokens are dropped before bytes are joined; ill-formed UTF-8
  /// becomes U+FFFD per maximal subpart. Ids without a token are dropped.
  std::string decode(std::span<const int32_t> ids, bool skip_special) const;

  /// Raw bytes of a token ("<s>" of BOS); empty for ids without one. Lives as long as any copy of
  /// this.
  std::string_view token_bytes(int32_t id) const;
  bool has_token(int32_t id) const;
  bool is_special(int32_t id) const;
  /// Id of an added token by its exact text.
  std::optional<int32_t> token_id(std::string_view added_token) const;
  /// Largest id + 1.
  int32_t vocab_size() const;
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  std::string_view bos_token() const;  // "" if there is none
  std::string_view eos_token() const;
  /// Ids the post_processor template puts before the text ({BOS} for Mistral).
  std::span<const int32_t> template_prefix() const;

  /// Sentences the user should see once: a wrong shipped regex, fields without effect.
  const std::vector<std::string>& notices() const;

 private:
  struct State;
  explicit Tokenizer(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

struct TokenizeOptions {
  bool bos = false;
  bool parse_special = false;
  bool decode = false;
};

/// `nibble tokenize`: one JSON line in, one out. A string becomes an array of ids; with `decode` an
/// array of ids becomes a string, control tokens shown only with parse_special. Throws
/// Error{kInput}.
std::string tokenize_json_line(const Tokenizer& tokenizer, std::string_view line,
                               const TokenizeOptions& options);

}  // namespace nibble
