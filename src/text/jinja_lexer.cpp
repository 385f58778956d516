// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_lexer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "text/jinja_unicode.h"
#include "text/jinja_value.h"

namespace nibble::jinja {
namespace {

bool is_digit_char(char c) { return c >= '0' && c <= '9'; }
bool is_hex(char c) { return is_digit_char(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

std::string normalize_newlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

struct LexFailure {
  std::string message;
};

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalize_newlines(source)) {}

  std::vector<Token> run() {
    try {
      while (at_ < source_.size()) lex_root();
      push(TokenKind::kEnd, "");
    } catch (const LexFailure& failure) {
      push(TokenKind::kError, failure.message);
    }
    return std::move(tokens_);
  }

 private:
  bool starts_with(size_t at, std::string_view what) const {
    return std::string_view(source_).substr(at, what.size()) == what;
  }

  void push(TokenKind kind, std::string text) { tokens_.push_back({kind, line_, std::move(text)}); }

  void advance_to(size_t to) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(at_),
                                         source_.begin() + static_cast<ptrdiff_t>(to), '\n'));
    if (to > at_) line_starting_ = source_[to - 1] == '\n';
    at_ = to;
  }

  size_t skip_spaces(size_t at) const {
    while (at < source_.size()) {
      size_t next = at;
      if (!is_space(next_code_point(source_, next))) break;
      at = next;
    }
    return at;
  }

  /// Text before a tag: '-' strips it, otherwise lstrip_blocks drops the tag's own indentation.
  void push_data(size_t begin, size_t end, char sign, bool is_variable) {
    std::string_view text = std::string_view(source_).substr(begin, end - begin);
    if (sign == '-') {
      size_t from = 0, to = 0;
      trim_range(text, false, true, nullptr, from, to);
      text = text.substr(0, to);
    } else if (sign != '+' && !is_variable) {
      const size_t newline = text.rfind('\n');
      const size_t line_begin = newline == text.npos ? 0 : newline + 1;
      if (line_begin > 0 || line_starting_) {
        size_t from = 0, to = 0;
        const std::string_view indent = text.substr(line_begin);
        trim_range(indent, true, false, nullptr, from, to);
        if (from == indent.size()) text = text.substr(0, line_begin);
      }
    }
    if (!text.empty()) push(TokenKind::kData, std::string(text));
  }

  /// `{% raw %}` at `tag`: offset after its end, or 0 when it is another tag.
  size_t match_raw_begin(size_t tag) const {
    size_t at = tag + 2;
    if (at < source_.size() && (source_[at] == '-' || source_[at] == '+')) ++at;
    at = skip_spaces(at);
    if (!starts_with(at, "raw")) return 0;
    at = skip_spaces(at + 3);
    if (starts_with(at, "-%}")) return skip_spaces(at + 3);
    return starts_with(at, "%}") ? at + 2 : 0;
  }

  size_t block_end_suffix(size_t at) const {  // after "%}" or "#}": trim_blocks
    return at < source_.size() && source_[at] == '\n' ? at + 1 : at;
  }

  void lex_root() {
    size_t tag = at_;
    for (;; ++tag) {
      tag = source_.find('{', tag);
      if (tag == source_.npos || tag + 1 >= source_.size()) {
        push(TokenKind::kData, source_.substr(at_));
        advance_to(source_.size());
        return;
      }
      if (source_[tag + 1] == '%' || source_[tag + 1] == '{' || source_[tag + 1] == '#') break;
    }
    const char type = source_[tag + 1];
    char sign = 0;
    if (tag + 2 < source_.size() && (source_[tag + 2] == '-' || source_[tag + 2] == '+')) {
      sign = source_[tag + 2];
    }
    if (type == '{' && sign == '+') sign = 0;  // "{{+" is not a sign
    const size_t begin = at_;
    push_data(begin, tag, sign, type == '{');
    const size_t inside = tag + 2 + (sign != 0 ? 1 : 0);
    if (type == '#') {
      advance_to(inside);
      lex_comment();
    } else if (type == '%') {
      if (const size_t end = match_raw_begin(tag); end != 0) {
        advance_to(end);
        lex_raw();
      } else {
        advance_to(inside);
        push(TokenKind::kBlockBegin, "{%");
        lex_tag(true);
      }
    } else {
      advance_to(inside);
      push(TokenKind::kVariableBegin, "{{");
      lex_tag(false);
    }
  }

  void lex_comment() {
    const size_t end = source_.find("#}", at_);
    if (end == source_.npos) throw LexFailure{"Missing end of comment tag"};
    const char before = end > at_ ? source_[end - 1] : ' ';
    size_t to = end + 2;
    if (before == '-') {
      to = skip_spaces(to);
    } else if (before != '+') {
      to = block_end_suffix(to);
    }
    advance_to(to);
  }

  void lex_raw() {
    for (size_t tag = source_.find("{%", at_); tag != source_.npos;
         tag = source_.find("{%", tag + 2)) {
      size_t at = tag + 2;
      char sign = 0;
      if (at < source_.size() && (source_[at] == '-' || source_[at] == '+')) sign = source_[at++];
      at = skip_spaces(at);
      if (!starts_with(at, "endraw")) continue;
      at = skip_spaces(at + 6);
      size_t to = 0;
      if (starts_with(at, "-%}")) {
        to = skip_spaces(at + 3);
      } else if (starts_with(at, "+%}")) {
        to = at + 3;
      } else if (starts_with(at, "%}")) {
        to = block_end_suffix(at + 2);
      } else {
        continue;
      }
      push_data(at_, tag, sign, false);
      advance_to(to);
      return;
    }
    throw LexFailure{"Missing end of raw directive"};
  }

  /// Inside `{% ... %}` or `{{ ... }}` up to and with its end.
  void lex_tag(bool is_block) {
    std::string closers;  // brackets still open
    const std::string_view end = is_block ? "%}" : "}}";
    for (;;) {
      if (at_ >= source_.size()) return;  // the parser meets the end of the template
      if (closers.empty()) {
        size_t to = 0;
        if (source_[at_] == '-' && starts_with(at_ + 1, end)) {
          to = skip_spaces(at_ + 3);
        } else if (is_block && source_[at_] == '+' && starts_with(at_ + 1, end)) {
          to = at_ + 3;
        } else if (starts_with(at_, end)) {
          to = is_block ? block_end_suffix(at_ + 2) : at_ + 2;
        }
        if (to != 0) {
          push(is_block ? TokenKind::kBlockEnd : TokenKind::kVariableEnd, std::string(end));
          advance_to(to);
          return;
        }
      }
      const size_t spaces = skip_spaces(at_);
      if (spaces > at_) {
        advance_to(spaces);
        continue;
      }
      if (lex_number() || lex_name() || lex_string()) continue;
      lex_operator(closers);
    }
  }

  size_t match_digits(size_t at) const {  // \d+(_\d+)*, or at itself
    if (at >= source_.size() || !is_digit_char(source_[at])) return at;
    while (at < source_.size() &&
           (is_digit_char(source_[at]) ||
            (source_[at] == '_' && at + 1 < source_.size() && is_digit_char(source_[at + 1])))) {
      ++at;
    }
    return at;
  }

  bool lex_number() {
    if (!is_digit_char(source_[at_])) return false;
    const bool after_dot = at_ > 0 && source_[at_ - 1] == '.';
    const size_t whole = match_digits(at_);
    if (!after_dot) {
      size_t to = whole;
      if (to < source_.size() && source_[to] == '.') {
        const size_t fraction = match_digits(to + 1);
        if (fraction > to + 1) to = fraction;
      }
      if (to < source_.size() && (source_[to] == 'e' || source_[to] == 'E')) {
        size_t exponent = to + 1;
        if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) {
          ++exponent;
        }
        const size_t digits = match_digits(exponent);
        if (digits > exponent) to = digits;
      }
      if (to > whole) {
        std::string text = source_.substr(at_, to - at_);
        std::erase(text, '_');
        push(TokenKind::kFloat, std::move(text));
        advance_to(to);
        return true;
      }
    }
    if (source_[at_] == '0' && at_ + 1 < source_.size()) {
      const char mark = static_cast<char>(source_[at_ + 1] | 0x20);
      const int base = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 0;
      if (base != 0) {
        size_t to = at_ + 2;
        std::string digits;
        while (to < source_.size()) {
          size_t next = to;
          if (source_[next] == '_') ++next;
          if (next >= source_.size() || !is_hex(source_[next])) break;
          const char c = source_[next];
          const int digit = is_digit_char(c) ? c - '0' : (c | 0x20) - 'a' + 10;
          if (digit >= base) break;
          digits += c;
          to = next + 1;
        }
        if (!digits.empty()) {
          push(TokenKind::kInteger, to_decimal(digits, base));
          advance_to(to);
          return true;
        }
      }
    }
    size_t to = whole;
    if (source_[at_] == '0') {  // 0(_?0)*
      to = at_ + 1;
      while (to < source_.size() &&
             (source_[to] == '0' ||
              (source_[to] == '_' && to + 1 < source_.size() && source_[to + 1] == '0'))) {
        ++to;
      }
    }
    std::string text = source_.substr(at_, to - at_);
    std::erase(text, '_');
    if (text.find_first_not_of('0') == text.npos) text.assign(1, '0');
    push(TokenKind::kInteger, std::move(text));
    advance_to(to);
    return true;
  }

  static std::string to_decimal(std::string_view digits, int base) {
    if (digits.size() > 64) throw LexFailure{"integer literal is too long"};
    std::vector<int> decimal{0};  // little-endian
    for (const char c : digits) {
      int carry = is_digit_char(c) ? c - '0' : (c | 0x20) - 'a' + 10;
      for (int& d : decimal) {
        carry += d * base;
        d = carry % 10;
        carry /= 10;
      }
      while (carry > 0) {
        decimal.push_back(carry % 10);
        carry /= 10;
      }
    }
    std::string out;
    for (auto it = decimal.rbegin(); it != decimal.rend(); ++it)
      out += static_cast<char>('0' + *it);
    return out;
  }

  bool lex_name() {
    size_t to = at_;
    while (to < source_.size()) {
      size_t next = to;
      if (!is_word(next_code_point(source_, next))) break;
      to = next;
    }
    if (to == at_) return false;
    push(TokenKind::kName, source_.substr(at_, to - at_));
    advance_to(to);
    return true;
  }

  bool lex_string() {
    const char quote = source_[at_];
    if (quote != '\'' && quote != '"') return false;
    size_t to = at_ + 1;
    while (to < source_.size() && source_[to] != quote) to += source_[to] == '\\' ? 2 : 1;
    if (to >= source_.size()) return false;  // reported as an unexpected character
    std::string text = unescape(std::string_view(source_).substr(at_ + 1, to - at_ - 1));
    push(TokenKind::kString, std::move(text));
    advance_to(to + 1);
    return true;
  }

  /// Python's unicode_escape. A surrogate pair becomes one character, a lone one U+FFFD.
  static std::string unescape(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    char32_t high = 0;
    const auto flush = [&] {
      if (high != 0) append_utf8(out, 0xfffd);
      high = 0;
    };
    for (size_t i = 0; i < text.size();) {
      if (text[i] != '\\' || i + 1 >= text.size()) {
        flush();
        out += text[i++];
        continue;
      }
      const char c = text[i + 1];
      const auto simple = std::string_view("abfnrtv\\'\"").find(c);
      if (simple != std::string_view::npos) {
        flush();
        out += "\a\b\f\n\r\t\v\\'\""[simple];
        i += 2;
      } else if (c == '\n') {
        i += 2;
      } else if (c >= '0' && c <= '7') {
        flush();
        char32_t value = 0;
        size_t k = i + 1;
        for (int n = 0; n < 3 && k < text.size() && text[k] >= '0' && text[k] <= '7'; ++n, ++k) {
          value = value * 8 + static_cast<char32_t>(text[k] - '0');
        }
        append_utf8(out, value);
        i = k;
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const size_t length = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        uint64_t value = 0;
        size_t k = i + 2;
        while (k < text.size() && k < i + 2 + length && is_hex(text[k])) {
          value = value * 16 + static_cast<uint64_t>(is_digit_char(text[k])
                                                         ? text[k] - '0'
                                                         : (text[k] | 0x20) - 'a' + 10);
          ++k;
        }
        if (k != i + 2 + length) {
          throw LexFailure{fmt::format("truncated \\{}{} escape", c, std::string(length, 'X'))};
        }
        if (value > 0x10ffff) throw LexFailure{"illegal Unicode character"};
        const auto point = static_cast<char32_t>(value);
        if (high != 0 && point >= 0xdc00 && point < 0xe000) {
          append_utf8(out, 0x10000 + ((high - 0xd800) << 10) + (point - 0xdc00));
          high = 0;
        } else {
          flush();
          if (point >= 0xd800 && point < 0xdc00) {
            high = point;
          } else {
            append_utf8(out, point);
          }
        }
        i = k;
      } else if (c == 'N') {
        throw LexFailure{"\\N{...} escapes are not supported"};
      } else {
        flush();
        out += '\\';
        ++i;
      }
    }
    flush();
    return out;
  }

  void lex_operator(std::string& closers) {
    static constexpr std::array<std::string_view, 26> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};
    for (const std::string_view op : kOperators) {
      if (!starts_with(at_, op)) continue;
      const char c = op[0];
      if (c == '{') closers += '}';
      if (c == '(') closers += ')';
      if (c == '[') closers += ']';
      if (c == '}' || c == ')' || c == ']') {
        if (closers.empty()) throw LexFailure{fmt::format("unexpected '{}'", c)};
        const char expected = closers.back();
        closers.pop_back();
        if (expected != c)
          throw LexFailure{fmt::format("unexpected '{}', expected '{}'", c, expected)};
      }
      push(TokenKind::kOperator, std::string(op));
      advance_to(at_ + op.size());
      return;
    }
    size_t next = at_;
    next_code_point(source_, next);
    throw LexFailure{fmt::format("unexpected char {} at {}",
                                 repr_string(std::string_view(source_).substr(at_, next - at_)),
                                 count_code_points(std::string_view(source_).substr(0, at_)))};
  }

  std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

std::string describe_token(const Token& token) {
  switch (token.kind) {
    case TokenKind::kData: return "template data / text";
    case TokenKind::kBlockBegin: return "begin of statement block";
    case TokenKind::kBlockEnd: return "end of statement block";
    case TokenKind::kVariableBegin: return "begin of print statement";
    case TokenKind::kVariableEnd: return "end of print statement";
    case TokenKind::kName:
    case TokenKind::kOperator: return token.text;
    case TokenKind::kString: return "string";
    case TokenKind::kInteger: return "integer";
    case TokenKind::kFloat: return "float";
    case TokenKind::kEnd: return "end of template";
    case TokenKind::kError: break;
  }
  return token.text;
}

}  // namespace nibble::jinja
