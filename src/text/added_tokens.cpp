// SPDX-License-Identifier: Apache-2.0
#include "text/added_tokens.h"

#include <algorithm>

#include "text/unicode_tables.h"
#include "text/utf8.h"

namespace nibble {
namespace {

uint8_t bits_at(std::string_view text, size_t at, size_t* length = nullptr) {
  const auto c = utf8::decode_valid(reinterpret_cast<const unsigned char*>(text.data()) + at);
  if (length) *length = c.length_bytes;
  return unicode::class_bits(c.value);
}

size_t previous_start(std::string_view text, size_t at) {
  do {
    --at;
  } while ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80);
  return at;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) {
  std::vector<AddedToken> raw, normalized;
  for (AddedToken& token : tokens) {
    only_special_ = only_special_ && token.special;
    if (!token.content.empty()) (token.normalized ? normalized : raw).push_back(std::move(token));
  }
  raw_ = make_set(std::move(raw));
  normalized_ = make_set(std::move(normalized));
}

AddedTokenMatcher::Set AddedTokenMatcher::make_set(std::vector<AddedToken> tokens) {
  Set set{.tokens = std::move(tokens)};
  std::sort(set.tokens.begin(), set.tokens.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.content < b.content; });
  for (const AddedToken& token : set.tokens) {
    set.starts[static_cast<unsigned char>(token.content[0])] = true;
  }
  return set;
}

void AddedTokenMatcher::split_one(const Set& set, std::string_view text, TextSpan within,
                                  std::span<const TextRegion> regions, std::vector<TextSpan>& out) {
  size_t done = within.begin;
  size_t region = 0;
  for (size_t at = within.begin; at < within.end;) {
    if (!set.starts[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    while (regions[region].end <= at) ++region;
    const size_t special_end = std::min(within.end, regions[region].end);

    // Tokens sharing text[at, at + depth) are a range of the sorted list; narrow it byte by byte.
    const AddedToken* found = nullptr;
    auto low = set.tokens.begin(), high = set.tokens.end();
    for (size_t depth = 0; low != high; ++depth) {
      if (low->content.size() == depth) {
        if (at + depth <= (low->special ? special_end : within.end)) found = &*low;
        ++low;
      }
      if (at + depth >= within.end) break;
      const auto byte = static_cast<unsigned char>(text[at + depth]);
      const auto key = [depth](const AddedToken& t) {
        return static_cast<unsigned char>(t.content[depth]);
      };
      low = std::partition_point(low, high, [&](const AddedToken& t) { return key(t) < byte; });
      high = std::partition_point(low, high, [&](const AddedToken& t) { return key(t) == byte; });
    }
    if (!found) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + found->content.size();
    at = end;
    if (found->special && !regions[region].parse_special) continue;
    if (found->single_word) {
      const bool word_before =
          begin > within.begin && (bits_at(text, previous_start(text, begin)) & unicode::kWord);
      const bool word_after = end < within.end && (bits_at(text, end) & unicode::kWord);
      if (word_before || word_after) continue;
    }
    if (found->lstrip) {
      while (begin > done) {
        const size_t start = previous_start(text, begin);
        if (start < done || !(bits_at(text, start) & unicode::kSpace)) break;
        begin = start;
      }
    }
    if (found->rstrip) {
      size_t length = 0;
      while (end < within.end && (bits_at(text, end, &length) & unicode::kSpace)) end += length;
    }
    if (done < begin) out.push_back({-1, done, begin});
    out.push_back({found->id, begin, end});
    done = std::max(done, end);
  }
  if (done < within.end) out.push_back({-1, done, within.end});
}

std::vector<TextSpan> AddedTokenMatcher::split(std::string_view text,
                                               std::span<const TextRegion> regions) const {
  std::vector<TextSpan> spans;
  if (only_special_ && std::none_of(regions.begin(), regions.end(),
                                    [](const TextRegion& r) { return r.parse_special; })) {
    if (!text.empty()) spans.push_back({-1, 0, text.size()});
    return spans;
  }
  split_one(raw_, text, {-1, 0, text.size()}, regions, spans);
  if (normalized_.tokens.empty()) return spans;
  std::vector<TextSpan> out;
  for (const TextSpan& span : spans) {
    if (span.id >= 0) {
      out.push_back(span);
    } else {
      split_one(normalized_, text, span, regions, out);
    }
  }
  return out;
}

}  // namespace nibble
