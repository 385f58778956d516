// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_unicode.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace nibble::jinja {
namespace {

struct Range {
  uint32_t first, last;
};
struct CaseRange {
  uint32_t first, last;
  int step;
  int delta;
};
struct CaseSpecial {
  uint32_t point;
  const char* text;
};

#include "text/jinja_unicode_tables.inc"

template <size_t N>
bool in_ranges(const Range (&table)[N], char32_t c) {
  const auto* it = std::upper_bound(std::begin(table), std::end(table), c,
                                    [](char32_t point, const Range& r) { return point < r.first; });
  return it != std::begin(table) && c <= std::prev(it)->last;
}

template <size_t N, size_t M>
void append_mapped(std::string& out, char32_t c, const CaseRange (&table)[N],
                   const CaseSpecial (&special)[M]) {
  const auto* exact =
      std::lower_bound(std::begin(special), std::end(special), c,
                       [](const CaseSpecial& s, char32_t point) { return s.point < point; });
  if (exact != std::end(special) && exact->point == c) {
    out += exact->text;
    return;
  }
  const auto* it =
      std::upper_bound(std::begin(table), std::end(table), c,
                       [](char32_t point, const CaseRange& r) { return point < r.first; });
  // Ranges with step 2 interleave with their neighbours, so look back over a few.
  for (int back = 0; back < 4 && it != std::begin(table); ++back) {
    --it;
    if (c <= it->last && (c - it->first) % static_cast<uint32_t>(it->step) == 0) {
      append_utf8(out, static_cast<char32_t>(static_cast<int64_t>(c) + it->delta));
      return;
    }
  }
  append_utf8(out, c);
}

void append_upper(std::string& out, char32_t c) { append_mapped(out, c, kUpper, kUpperSpecial); }
void append_title(std::string& out, char32_t c) { append_mapped(out, c, kTitle, kTitleSpecial); }

bool is_cased(char32_t c) { return is_upper(c) || is_lower(c) || is_title(c); }

// Capital sigma at the end of a word is written with the final form. (Python also skips
// "case-ignorable" points such as combining marks between; that refinement is left out.)
void append_lower(std::string& out, std::string_view text, size_t begin, size_t end, char32_t c) {
  if (c == 0x3a3) {
    bool before = false;
    if (begin > 0) {
      size_t at = begin - 1;
      while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
      before = is_cased(next_code_point(text, at));
    }
    size_t next = end;
    const bool after = next < text.size() && is_cased(next_code_point(text, next));
    append_utf8(out, before && !after ? 0x3c2 : 0x3c3);
    return;
  }
  append_mapped(out, c, kLower, kLowerSpecial);
}

}  // namespace

char32_t next_code_point(std::string_view text, size_t& i) {
  const auto byte = static_cast<unsigned char>(text[i]);
  int length = byte < 0x80 ? 1 : byte >= 0xf0 && byte < 0xf5 ? 4 : byte >= 0xe0 ? 3 : 2;
  if (byte >= 0x80 &&
      (byte < 0xc2 || byte >= 0xf5 || i + static_cast<size_t>(length) > text.size())) {
    ++i;
    return 0xfffd;
  }
  if (length == 1) {
    ++i;
    return byte;
  }
  char32_t point = byte & (0xffu >> (length + 1));
  for (int k = 1; k < length; ++k) {
    const auto next = static_cast<unsigned char>(text[i + static_cast<size_t>(k)]);
    if ((next & 0xc0) != 0x80) {
      ++i;
      return 0xfffd;
    }
    point = (point << 6) | (next & 0x3f);
  }
  if (point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) {
    ++i;
    return 0xfffd;
  }
  i += static_cast<size_t>(length);
  return point;
}

void append_utf8(std::string& out, char32_t c) {
  if (c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) c = 0xfffd;
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xc0 | (c >> 6));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xe0 | (c >> 12));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | (c >> 18));
    out += static_cast<char>(0x80 | ((c >> 12) & 0x3f));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  }
}

size_t count_code_points(std::string_view text) {
  size_t count = 0;
  for (size_t i = 0; i < text.size(); ++count) next_code_point(text, i);
  return count;
}

size_t byte_offset(std::string_view text, size_t index) {
  size_t i = 0;
  for (; index > 0 && i < text.size(); --index) next_code_point(text, i);
  return i;
}

bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool is_printable(char32_t c) { return !in_ranges(kNotPrintable, c); }
bool is_alpha(char32_t c) { return in_ranges(kAlpha, c); }
bool is_decimal(char32_t c) { return in_ranges(kDecimal, c); }
bool is_digit(char32_t c) { return in_ranges(kDigit, c); }
bool is_numeric(char32_t c) { return in_ranges(kNumeric, c); }
bool is_upper(char32_t c) { return in_ranges(kUppercase, c); }
bool is_lower(char32_t c) { return in_ranges(kLowercase, c); }
bool is_title(char32_t c) { return in_ranges(kTitlecase, c); }
bool is_word(char32_t c) { return c == '_' || is_alpha(c) || is_numeric(c); }

std::string to_upper(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) append_upper(out, next_code_point(text, i));
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_code_point(text, i);
    append_lower(out, text, begin, i, c);
  }
  return out;
}

std::string to_title(std::string_view text) {
  std::string out;
  bool inside = false;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_code_point(text, i);
    if (inside) {
      append_lower(out, text, begin, i, c);
    } else {
      append_title(out, c);
    }
    inside = is_cased(c);
  }
  return out;
}

std::string to_capitalized(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_code_point(text, i);
    if (begin == 0) {
      append_title(out, c);
    } else {
      append_lower(out, text, begin, i, c);
    }
  }
  return out;
}

std::string to_swapped(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_code_point(text, i);
    if (is_upper(c)) {
      append_lower(out, text, begin, i, c);
    } else if (is_lower(c)) {
      append_upper(out, c);
    } else {
      append_utf8(out, c);
    }
  }
  return out;
}

void trim_range(std::string_view text, bool left, bool right, const std::string_view* chars,
                size_t& begin, size_t& end) {
  const auto drop = [&](size_t from, size_t to, char32_t c) {
    if (chars == nullptr) return is_space(c);
    // Code points never overlap in UTF-8, so a substring search is exact.
    return chars->find(text.substr(from, to - from)) != chars->npos;
  };
  begin = 0;
  end = text.size();
  while (left && begin < end) {
    size_t next = begin;
    const char32_t c = next_code_point(text, next);
    if (!drop(begin, next, c)) break;
    begin = next;
  }
  while (right && end > begin) {
    size_t from = end - 1;
    while (from > begin && (static_cast<unsigned char>(text[from]) & 0xc0) == 0x80) --from;
    size_t next = from;
    const char32_t c = next_code_point(text, next);
    if (!drop(from, end, c)) break;
    end = from;
  }
}

}  // namespace nibble::jinja
