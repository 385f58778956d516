// Reads Hugging Face's tokenizer.json into plain data: byte-level BPE files only. Whatever would
// change ids and is not understood is refused with a sentence that names the file, the field, the
// value seen and the value wanted. Knows the format, not how to encode. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"

namespace nibble {

struct TokenizerFile {
  std::vector<std::string> token_bytes;  // by id; added tokens included; empty: no such token
  std::vector<uint8_t> has_token;        // by id
  std::vector<int32_t> vocab_ids;        // ids BPE may give: model.vocab but special tokens
  std::vector<BytePairEncoder::Merge> merges;
  bool ignore_merges = false;
  std::vector<AddedToken> added_tokens;
  std::vector<std::string> split_patterns;        // applied in order
  std::vector<std::string> split_pattern_fields;  // their JSON paths, for messages
  std::vector<int32_t> template_prefix,
      template_suffix;               // what the post_processor puts around text
  std::vector<std::string> notices;  // read, and of no effect here
};

/// `what` names the document in messages. Throws Error{kInput} (malformed) or Error{kUnsupported}.
TokenizerFile parse_tokenizer_file(std::string_view text, std::string_view what);

}  // namespace nibble
