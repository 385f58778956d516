// SPDX-License-Identifier: Apache-2.0
#include "text/utf8.h"

#include <cstring>

namespace nibble::utf8 {
namespace {

struct Lead {
  int length;                       // of the whole sequence; 0: cannot start one
  uint8_t low = 0x80, high = 0xbf;  // range of the second byte
};

Lead lead_of(uint8_t a) {
  if (a < 0x80) return {1};
  if (a < 0xc2) return {0};
  if (a < 0xe0) return {2};
  if (a == 0xe0) return {3, 0xa0, 0xbf};
  if (a == 0xed) return {3, 0x80, 0x9f};  // no surrogates
  if (a < 0xf0) return {3};
  if (a == 0xf0) return {4, 0x90, 0xbf};
  if (a < 0xf4) return {4};
  if (a == 0xf4) return {4, 0x80, 0x8f};
  return {0};
}

// Bytes at `p` that agree with one well-formed sequence (at least 1 even for a bad lead), and
// whether they complete it.
struct Scan {
  size_t num_bytes;
  bool complete;
  bool could_continue;  // ran into the end of the input, not into a wrong byte
};

Scan scan(const unsigned char* p, const unsigned char* end) {
  const Lead lead = lead_of(*p);
  if (lead.length == 1) return {1, true, false};
  if (lead.length == 0) return {1, false, false};
  size_t n = 1;
  for (; n < static_cast<size_t>(lead.length); ++n) {
    if (p + n == end) return {n, false, true};
    const uint8_t low = n == 1 ? lead.low : 0x80, high = n == 1 ? lead.high : 0xbf;
    if (p[n] < low || p[n] > high) return {n, false, false};
  }
  return {n, true, false};
}

}  // namespace

size_t valid_prefix(std::string_view text) {
  const auto* begin = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = begin + text.size();
  const auto* p = begin;
  while (p < end) {
    uint64_t word;
    while (end - p >= 8) {
      std::memcpy(&word, p, 8);
      if (word & 0x8080808080808080ull) break;
      p += 8;
    }
    if (p == end) break;
    if (*p < 0x80) {
      ++p;
      continue;
    }
    const Scan s = scan(p, end);
    if (!s.complete) break;
    p += s.num_bytes;
  }
  return static_cast<size_t>(p - begin);
}

size_t incomplete_tail(std::string_view bytes) {
  const auto* begin = reinterpret_cast<const unsigned char*>(bytes.data());
  const auto* end = begin + bytes.size();
  for (size_t n = 1; n <= 3 && n <= bytes.size(); ++n) {
    const auto* p = end - n;
    if ((*p & 0xc0) == 0x80) continue;
    const Scan s = scan(p, end);
    return s.could_continue ? n : 0;
  }
  return 0;
}

void append_lossy(std::string& out, std::string_view bytes) {
  while (!bytes.empty()) {
    const size_t good = valid_prefix(bytes);
    out.append(bytes.substr(0, good));
    bytes.remove_prefix(good);
    if (bytes.empty()) return;
    const auto* p = reinterpret_cast<const unsigned char*>(bytes.data());
    const Scan s = scan(p, p + bytes.size());
    out.append(kReplacement);
    bytes.remove_prefix(s.num_bytes);
  }
}

void append_code_point(std::string& out, uint32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xc0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xe0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  }
}

}  // namespace nibble::utf8
