// Fuzzes tokenizer.json and the text it encodes. Input: one line of text, then the document.
// A document either is refused with an Error or gives a tokenizer that round-trips what it encodes.
// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace nibble;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t line_end = input.find('\n');
  if (line_end == input.npos) return 0;
  const std::string_view line = input.substr(0, line_end), document = input.substr(line_end + 1);
  try {
    const Tokenizer tokenizer = Tokenizer::from_json(document);
    std::string text;
    utf8::append_lossy(text, line);
    for (const bool parse_special : {false, true}) {
      const auto ids = tokenizer.encode(text, parse_special, true);
      for (const int32_t id : ids) {
        if (!tokenizer.has_token(id)) std::abort();
      }
      Detokenizer detokenizer(tokenizer, {.skip_special = parse_special});
      std::string streamed;
      for (const int32_t id : ids) detokenizer.push(id, streamed);
      detokenizer.flush(streamed);
      if (streamed != tokenizer.decode(ids, parse_special)) std::abort();
    }
    const Tokenizer::Segment segments[] = {{text, true}, {text, false}, {"<s>", true}};
    tokenizer.encode_segments(segments);
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::kInternal) std::abort();
  }
  return 0;
}
