// SPDX-License-Identifier: Apache-2.0
#include "text/pretokenizer.h"

#include <algorithm>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/error.h"
#include "text/unicode_tables.h"
#include "text/utf8.h"

namespace nibble {

const std::string_view kTekkenPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

using namespace unicode;
using Byte = const unsigned char*;

struct Char {
  uint8_t bits = 0;
  uint8_t length_bytes = 0;
};

inline Char char_at(Byte p) {
  if (*p < 0x80) return {ascii_class_bits(*p), 1};
  const auto [value, length] = utf8::decode_valid(p);
  return {class_bits(value), static_cast<uint8_t>(length)};
}

// Class tests. Optional word prefix [^\r\n\p{L}\p{N}]; punctuation [^\s\p{L}\p{N}] (marks
// included).
inline bool is_prefix(uint8_t bits) { return !(bits & (kNewline | kLetter | kNumber)); }
inline bool is_punctuation(uint8_t bits) { return !(bits & (kSpace | kLetter | kNumber)); }

inline Byte run_of(Byte p, Byte end, uint8_t mask) {
  while (p < end) {
    const Char c = char_at(p);
    if (!(c.bits & mask)) break;
    p += c.length_bytes;
  }
  return p;
}

inline Byte run_of_punctuation(Byte p, Byte end) {
  while (p < end) {
    const Char c = char_at(p);
    if (!is_punctuation(c.bits)) break;
    p += c.length_bytes;
  }
  return p;
}

// Both Tekken word alternatives at `p`, without the optional prefix.
//   word1 = UPPER* LOWER+: the longest upper run, given back to its last character that is also
//   LOWER
//           (Lm, Lo, M) when no lower character follows. word2 = UPPER+ LOWER*.
struct Words {
  Byte word1 = nullptr;  // end, or null: no match
  Byte word2 = nullptr;
};

inline Words match_words(Byte p, Byte end) {
  Byte q = p;
  Byte last_both = nullptr;
  Char c;
  while (q < end) {
    c = char_at(q);
    if (!(c.bits & kUpperClass)) break;
    q += c.length_bytes;
    if (c.bits & kLowerClass) last_both = q;
  }
  if (q < end && (c.bits & kLowerClass)) {
    const Byte e = run_of(q, end, kLowerClass);
    return {e, q > p ? e : nullptr};
  }
  return {last_both, q > p ? q : nullptr};
}

// \s*[\r\n]+ | \s+(?!\S) | \s+ at a space character.
inline Byte match_spaces(Byte p, Byte end) {
  Byte q = p;
  Byte last_newline_end = nullptr;
  Byte last_start = p;
  while (q < end) {
    const Char c = char_at(q);
    if (!(c.bits & kSpace)) break;
    last_start = q;
    q += c.length_bytes;
    if (c.bits & kNewline) last_newline_end = q;
  }
  if (last_newline_end) return last_newline_end;
  if (q == end || last_start == p) return q;
  return last_start;  // leave one space for the word that follows
}

Byte next_tekken(Byte p, Byte end) {
  const Char first = char_at(p);
  const Byte after = p + first.length_bytes;
  Words prefixed, bare;
  if (is_prefix(first.bits)) {
    if (after < end) prefixed = match_words(after, end);
    if (prefixed.word1) return prefixed.word1;
  }
  if (first.bits & (kUpperClass | kLowerClass)) {
    bare = match_words(p, end);
    if (bare.word1) return bare.word1;
  }
  if (prefixed.word2) return prefixed.word2;
  if (bare.word2) return bare.word2;
  if (first.bits & kNumber) return after;
  const Byte start = *p == ' ' ? after : p;
  Byte q = run_of_punctuation(start, end);
  if (q > start) {
    while (q < end && (*q == '\r' || *q == '\n' || *q == '/')) ++q;
    return q;
  }
  return match_spaces(p, end);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d) at an apostrophe; U+017F folds to s. Null: no match.
inline Byte match_contraction(Byte p, Byte end) {
  const auto lower = [&](Byte q) { return q < end ? *q | 0x20 : 0; };
  const int a = lower(p + 1);
  switch (a) {
    case 's':
    case 't':
    case 'm':
    case 'd': return p + 2;
    case 'r':
    case 'v': return lower(p + 2) == 'e' ? p + 3 : nullptr;
    case 'l': return lower(p + 2) == 'l' ? p + 3 : nullptr;
    default: break;
  }
  if (end - p >= 3 && p[1] == 0xc5 && p[2] == 0xbf) return p + 3;
  return nullptr;
}

Byte next_llama3(Byte p, Byte end) {
  if (*p == '\'') {
    if (const Byte e = match_contraction(p, end)) return e;
  }
  const Char first = char_at(p);
  const Byte after = p + first.length_bytes;
  if (first.bits & kLetter) return run_of(after, end, kLetter);
  if (is_prefix(first.bits)) {
    const Byte e = run_of(after, end, kLetter);
    if (e > after) return e;
  }
  if (first.bits & kNumber) {
    Byte q = after;
    for (int n = 1; n < 3 && q < end; ++n) {
      const Char c = char_at(q);
      if (!(c.bits & kNumber)) break;
      q += c.length_bytes;
    }
    return q;
  }
  const Byte start = *p == ' ' ? after : p;
  Byte q = run_of_punctuation(start, end);
  if (q > start) {
    while (q < end && (*q == '\r' || *q == '\n')) ++q;
    return q;
  }
  return match_spaces(p, end);
}

inline Byte bytes(const char* p) { return reinterpret_cast<Byte>(p); }
inline const char* chars(Byte p) { return reinterpret_cast<const char*>(p); }

}  // namespace

const char* next_tekken_piece(const char* p, const char* end) {
  return chars(next_tekken(bytes(p), bytes(end)));
}
const char* next_llama3_piece(const char* p, const char* end) {
  return chars(next_llama3(bytes(p), bytes(end)));
}

struct SplitPattern::Compiled {
  pcre2_code* code = nullptr;
  pcre2_match_context* context = nullptr;
  std::string what;
  ~Compiled() {
    pcre2_match_context_free(context);
    pcre2_code_free(code);
  }
};

SplitPattern SplitPattern::compile(std::string_view pattern, std::string_view what,
                                   bool force_pcre2) {
  SplitPattern out;
  if (!force_pcre2 && pattern == kTekkenPattern) return out;
  if (!force_pcre2 && pattern == kLlama3Pattern) {
    out.kind_ = SplitKind::kLlama3;
    return out;
  }
  constexpr size_t kMaxPatternBytes = 1 << 14;
  if (pattern.size() > kMaxPatternBytes) {
    fail(ErrorKind::kUnsupported, "{} is a pattern of {} bytes; nibble compiles up to {}", what,
         pattern.size(), kMaxPatternBytes);
  }
  if (!utf8::is_valid(pattern)) fail(ErrorKind::kInput, "{} is not valid UTF-8", what);
  auto compiled = std::make_shared<Compiled>();
  compiled->what = what;
  int code = 0;
  PCRE2_SIZE offset = 0;
  // MULTILINE and LF: what ^, $ and . mean in Oniguruma, which Hugging Face runs.
  std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  compiled->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &code, &offset, context.get());
  if (!compiled->code) {
    PCRE2_UCHAR message[256] = {};
    pcre2_get_error_message(code, message, sizeof message);
    fail(ErrorKind::kInput, "{} does not compile: {} at byte {} of \"{}\"", what,
         reinterpret_cast<const char*>(message), offset, pattern);
  }
  pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);  // without JIT the interpreter runs
  compiled->context = pcre2_match_context_create(nullptr);
  pcre2_set_match_limit(compiled->context, 10'000'000);
  pcre2_set_heap_limit(compiled->context, 1 << 20);  // KiB
  out.kind_ = SplitKind::kPcre2;
  out.compiled_ = std::move(compiled);
  return out;
}

namespace {

struct Pcre2MatchState {
  explicit Pcre2MatchState(const pcre2_code* code, pcre2_match_context* shared)
      : data(pcre2_match_data_create_from_pattern(code, nullptr)),
        context(pcre2_match_context_copy(shared)),
        stack(pcre2_jit_stack_create(32 << 10, 64 << 20, nullptr)) {
    if (!data || !context) fail(ErrorKind::kMemory, "no memory for a PCRE2 match");
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  Pcre2MatchState(const Pcre2MatchState&) = delete;
  Pcre2MatchState& operator=(const Pcre2MatchState&) = delete;
  ~Pcre2MatchState() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
  pcre2_match_data* data;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

}  // namespace

void SplitPattern::split(std::string_view text, std::vector<size_t>& ends) const {
  const char* const begin = text.data();
  const char* const end = begin + text.size();
  if (kind_ != SplitKind::kPcre2) {
    for (Byte p = bytes(begin); p < bytes(end);) {
      p = kind_ == SplitKind::kTekken ? next_tekken(p, bytes(end)) : next_llama3(p, bytes(end));
      ends.push_back(static_cast<size_t>(chars(p) - begin));
    }
    return;
  }
  if (text.empty()) return;
  const Pcre2MatchState state(compiled_->code, compiled_->context);
  size_t done = 0;  // everything before is in `ends`
  const auto cut = [&](size_t at) {
    if (at > done) ends.push_back(done = at);
  };
  for (size_t at = 0; at <= text.size();) {
    const int rc = pcre2_match(compiled_->code, reinterpret_cast<PCRE2_SPTR>(begin), text.size(),
                               at, PCRE2_NO_UTF_CHECK, state.data, state.context);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      PCRE2_UCHAR message[256] = {};
      pcre2_get_error_message(rc, message, sizeof message);
      fail(ErrorKind::kLimit, "{} gives up on a text of {} bytes: {}", compiled_->what, text.size(),
           reinterpret_cast<const char*>(message));
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(state.data);
    // \K inside a look-ahead can start a match after its end; treat it as empty.
    const size_t match_end = span[1], match_start = std::min(span[0], span[1]);
    cut(match_start);
    cut(match_end);
    if (match_end > at || match_end > match_start) {
      at = match_end;
      if (match_start == match_end) continue;
    }
    if (match_start == match_end) {  // an empty match cuts; go on one character later
      if (at >= text.size()) break;
      at += utf8::decode_valid(bytes(begin) + at).length_bytes;
    }
  }
  cut(text.size());
}

}  // namespace nibble
