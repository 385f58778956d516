// SPDX-License-Identifier: Apache-2.0
#include "base/json.h"

#include <algorithm>
#include <boost/json/parse.hpp>
#include <boost/json/stream_parser.hpp>
#include <charconv>
#include <cmath>
#include <vector>

#include "base/error.h"

namespace nibble {
namespace {

int hex4(std::string_view text, size_t at) {
  if (at + 4 > text.size()) return -1;
  int value = 0;
  const auto [end, ec] = std::from_chars(text.data() + at, text.data() + at + 4, value, 16);
  return ec == std::errc() && end == text.data() + at + 4 ? value : -1;
}

// Boost refuses "\ud800" alone; Python and JavaScript clients can send it. Same length, so that
// error columns stay right.
std::string replace_lone_surrogates(std::string_view text) {
  std::string out(text);
  bool in_string = false;
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] == '"') in_string = !in_string;
    if (!in_string || out[i] != '\\') continue;
    if (i + 1 < out.size() && out[i + 1] == 'u') {
      const int unit = hex4(out, i + 2);
      if (unit >= 0xd800 && unit < 0xdc00 && i + 7 < out.size() && out[i + 6] == '\\' &&
          out[i + 7] == 'u') {
        const int low = hex4(out, i + 8);
        if (low >= 0xdc00 && low < 0xe000) {
          i += 11;
          continue;
        }
      }
      if (unit >= 0xd800 && unit < 0xe000) out.replace(i + 2, 4, "fffd");
      if (unit >= 0) {
        i += 5;
        continue;
      }
    }
    ++i;  // the escaped character
  }
  return out;
}

void append_newline_indent(std::string& out, int indent, int depth) {
  out += '\n';
  out.append(static_cast<size_t>(indent) * static_cast<size_t>(depth), ' ');
}

std::string_view trim_right(std::string_view text) {
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

void append_value(std::string& out, const json::value& value, const JsonStyle& style, int depth);

void append_object(std::string& out, const json::object& object, const JsonStyle& style,
                   int depth) {
  if (object.empty()) {
    out += "{}";
    return;
  }
  std::vector<const json::key_value_pair*> members;
  members.reserve(object.size());
  for (const auto& member : object) members.push_back(&member);
  if (style.sort_keys) {
    std::stable_sort(members.begin(), members.end(),
                     [](const auto* a, const auto* b) { return a->key() < b->key(); });
  }
  out += '{';
  bool first = true;
  for (const auto* member : members) {
    if (!first) out += style.indent >= 0 ? trim_right(style.item_separator) : style.item_separator;
    first = false;
    if (style.indent >= 0) append_newline_indent(out, style.indent, depth + 1);
    append_json_string(out, member->key(), style.ensure_ascii);
    out += style.key_separator;
    append_value(out, member->value(), style, depth + 1);
  }
  if (style.indent >= 0) append_newline_indent(out, style.indent, depth);
  out += '}';
}

void append_array(std::string& out, const json::array& array, const JsonStyle& style, int depth) {
  if (array.empty()) {
    out += "[]";
    return;
  }
  out += '[';
  bool first = true;
  for (const auto& item : array) {
    if (!first) out += style.indent >= 0 ? trim_right(style.item_separator) : style.item_separator;
    first = false;
    if (style.indent >= 0) append_newline_indent(out, style.indent, depth + 1);
    append_value(out, item, style, depth + 1);
  }
  if (style.indent >= 0) append_newline_indent(out, style.indent, depth);
  out += ']';
}

void append_value(std::string& out, const json::value& value, const JsonStyle& style, int depth) {
  switch (value.kind()) {
    case json::kind::null: out += "null"; break;
    case json::kind::bool_: out += value.get_bool() ? "true" : "false"; break;
    case json::kind::int64: fmt::format_to(std::back_inserter(out), "{}", value.get_int64()); break;
    case json::kind::uint64:
      fmt::format_to(std::back_inserter(out), "{}", value.get_uint64());
      break;
    case json::kind::double_: out += python_float_repr(value.get_double()); break;
    case json::kind::string: append_json_string(out, value.get_string(), style.ensure_ascii); break;
    case json::kind::array: append_array(out, value.get_array(), style, depth); break;
    case json::kind::object: append_object(out, value.get_object(), style, depth); break;
  }
}

}  // namespace

json::value parse_json(std::string_view text, std::string_view what, int max_depth) {
  json::parse_options options;
  options.max_depth = static_cast<size_t>(max_depth);
  std::string fixed;
  // Only documents that spell a surrogate escape pay for the rewriting pass.
  if (text.find("\\ud") != text.npos || text.find("\\uD") != text.npos) {
    fixed = replace_lone_surrogates(text);
    text = fixed;
  }
  json::stream_parser parser({}, options);
  json::error_code code;
  const size_t consumed = parser.write_some(text.data(), text.size(), code);
  if (!code && consumed < text.size() && text.find_first_not_of(" \t\r\n", consumed) != text.npos) {
    code = json::error::extra_data;
  }
  if (!code) parser.finish(code);
  if (code) {
    const std::string_view before = text.substr(0, std::min(consumed, text.size()));
    const auto line = std::count(before.begin(), before.end(), '\n') + 1;
    const size_t line_start = before.rfind('\n');
    const size_t column = before.size() - (line_start == before.npos ? 0 : line_start + 1) + 1;
    fail(ErrorKind::kInput, "{} is not valid JSON: {} at line {} column {}", what, code.message(),
         line, column);
  }
  return parser.release();
}

std::string python_float_repr(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
  char buffer[64];
  const auto [end, ec] =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  NIBBLE_CHECK(ec == std::errc());
  const std::string_view text(buffer, static_cast<size_t>(end - buffer));
  const size_t e = text.find('e');
  int exponent = 0;
  const char* digits = text.data() + e + 1 + (text[e + 1] == '+' ? 1 : 0);
  std::from_chars(digits, end, exponent);
  if (exponent < -4 || exponent >= 16) return std::string(text);
  const auto fixed = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed);
  std::string out(buffer, fixed.ptr);
  if (out.find('.') == out.npos) out += ".0";
  return out;
}

void append_json_string(std::string& out, std::string_view text, bool ensure_ascii) {
  out += '"';
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      case '\b': out += "\\b"; break;
      case '\f': out += "\\f"; break;
      default:
        if (c < 0x20 || (c == 0x7f && ensure_ascii)) {
          fmt::format_to(std::back_inserter(out), "\\u{:04x}", c);
        } else if (c < 0x80 || !ensure_ascii) {
          out += static_cast<char>(c);
        } else {
          const int length = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
          uint32_t point = c & (0xffu >> (length + 1));
          for (int k = 1; k < length && i + 1 < text.size(); ++k) {
            point = (point << 6) | (static_cast<unsigned char>(text[++i]) & 0x3fu);
          }
          if (point >= 0x10000) {
            fmt::format_to(std::back_inserter(out), "\\u{:04x}\\u{:04x}",
                           0xd800 + ((point - 0x10000) >> 10),
                           0xdc00 + ((point - 0x10000) & 0x3ff));
          } else {
            fmt::format_to(std::back_inserter(out), "\\u{:04x}", point);
          }
        }
    }
  }
  out += '"';
}

void append_json(std::string& out, const json::value& value, const JsonStyle& style) {
  append_value(out, value, style, 0);
}

std::string dump_json(const json::value& value, const JsonStyle& style) {
  std::string out;
  append_json(out, value, style);
  return out;
}

}  // namespace nibble
