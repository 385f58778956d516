// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_text_ops.h"

#include <cstring>

#include "text/jinja_eval.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {

Text convert_text(const Text& text, std::string (*convert)(std::string_view)) {
  Text out(convert(text.str()), text.all_template());
  out.markup = text.markup;
  return out;
}

Text trim_text(const Text& text, bool left, bool right, const std::string* chars) {
  size_t begin = 0, end = 0;
  const std::string_view set = chars != nullptr ? std::string_view(*chars) : std::string_view();
  trim_range(text.str(), left, right, chars != nullptr ? &set : nullptr, begin, end);
  Text out = text.sub(begin, end);
  out.markup = text.markup;
  return out;
}

Text replace_text(Evaluator& eval, const Text& text, const Text& old, const Text& fresh,
                  int64_t count) {
  Text out;
  const std::string& s = text.str();
  eval.step(s.size() / 64);
  size_t at = 0;
  if (old.empty()) {  // between all characters
    while (count != 0) {
      eval.step();
      eval.charge(fresh.size());
      out.append(fresh);
      --count;
      if (at >= s.size()) return out;
      const size_t begin = at;
      next_code_point(s, at);
      out.append_range(text, begin, at);
    }
    out.append_range(text, at, s.size());
    return out;
  }
  while (count != 0) {
    const void* hit = memmem(s.data() + at, s.size() - at, old.str().data(), old.size());
    if (hit == nullptr) break;
    eval.step();
    eval.charge(fresh.size());
    const auto begin = static_cast<size_t>(static_cast<const char*>(hit) - s.data());
    out.append_range(text, at, begin);
    out.append(fresh);
    at = begin + old.size();
    --count;
  }
  out.append_range(text, at, s.size());
  out.markup = text.markup;
  return out;
}

std::vector<Text> split_lines(Evaluator& eval, const Text& text, bool keep_ends) {
  std::vector<Text> lines;
  const std::string& s = text.str();
  size_t begin = 0;
  for (size_t i = 0; i < s.size();) {
    const size_t at = i;
    const char32_t c = next_code_point(s, i);
    const bool is_break =
        (c >= 10 && c <= 13) || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 || c == 0x2029;
    if (!is_break) continue;
    if (c == '\r' && i < s.size() && s[i] == '\n') ++i;
    eval.charge(128 + (at - begin));
    lines.push_back(text.sub(begin, keep_ends ? i : at));
    begin = i;
  }
  if (begin < s.size()) lines.push_back(text.sub(begin, s.size()));
  return lines;
}

Text escape_html(const Text& text) {
  Text out;
  text.for_each_run([&](size_t begin, size_t end, bool is_template) {
    std::string piece;
    for (size_t i = begin; i < end; ++i) {
      switch (text.str()[i]) {
        case '&': piece += "&amp;"; break;
        case '<': piece += "&lt;"; break;
        case '>': piece += "&gt;"; break;
        case '\'': piece += "&#39;"; break;
        case '"': piece += "&#34;"; break;
        default: piece += text.str()[i];
      }
    }
    out.append(piece, is_template);
  });
  return out;
}

Text pad_text(Evaluator& eval, const Text& text, int64_t width, int side, const Text& fill) {
  const auto length = static_cast<int64_t>(count_code_points(text.str()));
  if (width <= length) return text;
  if (width > static_cast<int64_t>(eval.limits().max_string_bytes)) {
    raise_limit(fmt::format("a string padded to {} characters is longer than allowed", width));
  }
  const int64_t pad = width - length;
  // str.center puts the odd character left when both pad and width are odd.
  const int64_t left = side > 0 ? pad : side < 0 ? 0 : pad / 2 + (pad & width & 1);
  eval.charge(static_cast<size_t>(pad) * fill.size());
  Text out;
  for (int64_t i = 0; i < left; ++i) out.append(fill);
  out.append(text);
  for (int64_t i = left; i < pad; ++i) out.append(fill);
  return out;
}

}  // namespace nibble::jinja
