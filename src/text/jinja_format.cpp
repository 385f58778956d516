// "%s" % x and "{}".format(x). Pieces of the format string and string arguments keep their
// provenance; formatted numbers are data. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "text/jinja_eval.h"
#include "text/jinja_filters.h"
#include "text/jinja_text_ops.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {
namespace {

struct Spec {
  char32_t fill = ' ';
  char align = 0;  // < > ^ =
  char sign = '-';
  bool alternate = false;
  bool comma = false;
  int64_t width = 0;
  int64_t precision = -1;
  char type = 0;
};

constexpr int64_t kMaxWidth = 10'000;

std::string group_thousands(std::string digits) {
  const size_t dot = std::min(digits.find('.'), digits.find('e'));
  size_t at = std::min(dot, digits.size());
  while (at > 3) {
    at -= 3;
    digits.insert(at, 1, ',');
  }
  return digits;
}

std::string format_float(double value, const Spec& spec) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return "inf";
  const int precision = static_cast<int>(spec.precision < 0 ? 6 : spec.precision);
  switch (spec.type) {
    case 'e': return fmt::format("{:.{}e}", value, precision);
    case 'E': return fmt::format("{:.{}E}", value, precision);
    case 'f':
    case 'F': return fmt::format("{:.{}f}", value, precision);
    case '%': return fmt::format("{:.{}f}", value * 100, precision) + "%";
    case 'G': return fmt::format("{:.{}G}", value, precision);
    default: return fmt::format("{:.{}g}", value, precision);
  }
}

/// A number with sign, grouping and zero padding; without its outer alignment.
std::string format_number(const Value& value, const Spec& spec) {
  std::string body;
  bool negative = false;
  const char type = spec.type;
  if (value.is_int_like() && type != 'e' && type != 'E' && type != 'f' && type != 'F' &&
      type != 'g' && type != 'G' && type != '%') {
    negative = value.as_int() < 0;
    const uint64_t magnitude = negative ? 0 - static_cast<uint64_t>(value.as_int())
                                        : static_cast<uint64_t>(value.as_int());
    switch (type) {
      case 'x': body = fmt::format("{}{:x}", spec.alternate ? "0x" : "", magnitude); break;
      case 'X': body = fmt::format("{}{:X}", spec.alternate ? "0X" : "", magnitude); break;
      case 'o': body = fmt::format("{}{:o}", spec.alternate ? "0o" : "", magnitude); break;
      case 'b': body = fmt::format("{}{:b}", spec.alternate ? "0b" : "", magnitude); break;
      default: body = fmt::format("{}", magnitude);
    }
  } else {
    const double real = value.as_float();
    negative = std::signbit(real) && !std::isnan(real);
    if (type == 0 && spec.precision < 0) {
      body = to_text(Value::number(std::fabs(real))).str();
    } else {
      body = format_float(std::fabs(real), spec);
    }
  }
  if (spec.comma) body = group_thousands(std::move(body));
  const std::string sign = negative ? "-" : spec.sign == '-' ? "" : std::string(1, spec.sign);
  if (spec.align == '=' && static_cast<int64_t>(body.size() + sign.size()) < spec.width) {
    std::string padding;
    for (auto i = static_cast<int64_t>(body.size() + sign.size()); i < spec.width; ++i) {
      append_utf8(padding, spec.fill);
    }
    body = padding + body;
  }
  return sign + body;
}

Text align_text(Evaluator& eval, const Text& text, const Spec& spec, char default_align) {
  const char align = spec.align == 0 ? default_align : spec.align;
  std::string fill;
  append_utf8(fill, spec.fill);
  if (align == '^') {  // format() centres with the odd character right
    const auto length = static_cast<int64_t>(count_code_points(text.str()));
    const int64_t left = std::max<int64_t>(0, spec.width - length) / 2;
    return pad_text(eval, pad_text(eval, text, length + left, 1, Text(fill, false)), spec.width, -1,
                    Text(fill, false));
  }
  return pad_text(eval, text, spec.width, align == '<' ? -1 : 1, Text(fill, false));
}

void check_width(int64_t width) {
  if (width > kMaxWidth) raise_limit(fmt::format("a field is wider than {}", kMaxWidth));
}

int64_t parse_number(std::string_view text, size_t& i) {
  int64_t number = 0;
  while (i < text.size() && text[i] >= '0' && text[i] <= '9') {
    number = std::min<int64_t>(number * 10 + (text[i++] - '0'), 1'000'000);
  }
  return number;
}

}  // namespace

Value percent_format(Evaluator& eval, const Value& format_value, const Value& args) {
  const Text& format = format_value.text();
  const std::string& s = format.str();
  const bool is_tuple = args.kind() == Kind::kTuple;
  size_t next = 0;
  const auto take = [&]() -> const Value& {
    if (is_tuple ? next >= args.items().size() : next > 0) {
      raise("TypeError", "not enough arguments for format string");
    }
    ++next;
    return is_tuple ? args.items()[next - 1] : args;
  };
  Text out;
  size_t i = 0;
  bool used_mapping = false;
  while (i < s.size()) {
    const size_t percent = std::min(s.find('%', i), s.size());
    out.append_range(format, i, percent);
    i = percent;
    if (i >= s.size()) break;
    const size_t begin = i++;
    Spec spec;
    Value mapped;
    bool has_key = false;
    if (i < s.size() && s[i] == '(') {
      const size_t close = s.find(')', i);
      if (close == s.npos) raise("ValueError", "incomplete format key");
      if (!args.is_dict()) raise("TypeError", "format requires a mapping");
      const std::string key = s.substr(i + 1, close - i - 1);
      const Value* value = args.dict().find(std::string_view(key));
      if (value == nullptr) raise("KeyError", repr_string(key));
      mapped = *value;
      has_key = used_mapping = true;
      i = close + 1;
    }
    bool zero = false;
    for (; i < s.size() && std::string_view("-+ 0#").find(s[i]) != std::string_view::npos; ++i) {
      if (s[i] == '-') spec.align = '<';
      if (s[i] == '+') spec.sign = '+';
      if (s[i] == ' ' && spec.sign == '-') spec.sign = ' ';
      if (s[i] == '0') zero = true;
      if (s[i] == '#') spec.alternate = true;
    }
    const auto number = [&]() -> int64_t {
      if (i < s.size() && s[i] == '*') {
        ++i;
        const Value& width = take();
        if (!width.is_int_like()) raise("TypeError", "* wants int");
        return std::clamp<int64_t>(width.as_int(), 0, 1'000'000);
      }
      return parse_number(s, i);
    };
    spec.width = number();
    if (i < s.size() && s[i] == '.') {
      ++i;
      spec.precision = number();
    }
    check_width(std::max(spec.width, spec.precision));
    if (i >= s.size()) raise("ValueError", "incomplete format");
    const char type = s[i++];
    if (type == '%') {
      out.append("%", format.is_template_at(begin));
      continue;
    }
    const Value value = has_key ? mapped : take();
    eval.step();
    Text piece;
    switch (type) {
      case 's':
      case 'r':
      case 'a':
        piece = type == 's' ? eval.text_of(value) : Text(repr(value), false);
        if (spec.precision >= 0) {
          piece = piece.sub(0, byte_offset(piece.str(), static_cast<size_t>(spec.precision)));
        }
        break;
      case 'c':
        if (value.is_string() && count_code_points(value.str()) == 1) {
          piece = value.text();
        } else if (value.is_int_like()) {
          std::string c;
          append_utf8(c, static_cast<char32_t>(std::clamp<int64_t>(value.as_int(), 0, 0x110000)));
          piece = Text(c, false);
        } else {
          raise("TypeError", "%c requires int or char");
        }
        break;
      case 'd':
      case 'i':
      case 'u':
      case 'x':
      case 'X':
      case 'o': {
        const bool decimal = type == 'd' || type == 'i' || type == 'u';
        if (!value.is_number() || (!decimal && value.kind() == Kind::kFloat)) {
          if (value.is_undefined())
            raise(value.undefined_info().type, value.undefined_info().message);
          raise("TypeError", decimal ? fmt::format("%{} format: a real number is required, not {}",
                                                   type, type_name(value))
                                     : fmt::format("%{} format: an integer is required, not {}",
                                                   type, type_name(value)));
        }
        spec.type = decimal ? 0 : type;
        if (zero && spec.align != '<') {
          spec.align = '=';
          spec.fill = '0';
        }
        if (value.kind() == Kind::kFloat && std::fabs(value.as_float()) >= 9.2e18) {
          raise_limit("integers beyond 64 bits are not supported");
        }
        const Value whole = value.kind() == Kind::kFloat && !std::isnan(value.as_float())
                                ? Value::integer(static_cast<int64_t>(value.as_float()))
                                : value;
        piece = Text(format_number(whole, spec), false);
        break;
      }
      case 'e':
      case 'E':
      case 'f':
      case 'F':
      case 'g':
      case 'G':
        if (!value.is_number()) {
          raise("TypeError", fmt::format("must be real number, not {}", type_name(value)));
        }
        spec.type = type;
        if (zero && spec.align != '<') {
          spec.align = '=';
          spec.fill = '0';
        }
        piece = Text(format_number(value, spec), false);
        break;
      default:
        raise("ValueError",
              fmt::format("unsupported format character '{}' ({:#x}) at index {}", type,
                          static_cast<int>(static_cast<unsigned char>(type)), i - 1));
    }
    out.append(spec.width > 0 ? align_text(eval, piece, spec, '>') : piece);
    eval.charge(piece.size());
  }
  const bool all_used =
      is_tuple ? next >= args.items().size()
               : next > 0 || used_mapping || args.is_dict() || args.kind() == Kind::kList;
  if (!all_used) raise("TypeError", "not all arguments converted during string formatting");
  return eval.make_string(std::move(out));
}

Value brace_format(Evaluator& eval, const Text& format, Arguments& args) {
  const std::string& s = format.str();
  Text out;
  size_t automatic = 0;
  bool used_automatic = false, used_manual = false;
  for (size_t i = 0; i < s.size();) {
    const char c = s[i];
    if (c != '{' && c != '}') {
      const size_t end = std::min(s.find_first_of("{}", i), s.size());
      out.append_range(format, i, end);
      i = end;
      continue;
    }
    if (i + 1 < s.size() && s[i + 1] == c) {
      out.append_range(format, i, i + 1);
      i += 2;
      continue;
    }
    if (c == '}') raise("ValueError", "Single '}' encountered in format string");
    const size_t close = s.find('}', i);
    if (close == s.npos) {
      raise("ValueError", i + 1 == s.size() ? "Single '{' encountered in format string"
                                            : "expected '}' before end of string");
    }
    std::string_view field = std::string_view(s).substr(i + 1, close - i - 1);
    i = close + 1;
    if (field.find('{') != field.npos) {
      throw Raise{"ValueError", "nested fields in str.format are not supported",
                  ErrorKind::kUnsupported};
    }
    std::string_view spec_text;
    if (const size_t colon = field.find(':'); colon != field.npos) {
      spec_text = field.substr(colon + 1);
      field = field.substr(0, colon);
    }
    char conversion = 0;
    if (const size_t bang = field.find('!'); bang != field.npos) {
      if (field.size() != bang + 2) raise("ValueError", "expected ':' after conversion specifier");
      conversion = field[bang + 1];
      field = field.substr(0, bang);
    }
    // name(.attribute | [item])*
    const size_t name_end = std::min(field.find_first_of(".["), field.size());
    const std::string_view name = field.substr(0, name_end);
    Value value;
    if (name.empty() || name.find_first_not_of("0123456789") == name.npos) {
      (name.empty() ? used_automatic : used_manual) = true;
      if (used_automatic && used_manual) {
        raise("ValueError", name.empty()
                                ? "cannot switch from manual field specification to automatic "
                                  "field numbering"
                                : "cannot switch from automatic field numbering to manual "
                                  "field specification");
      }
      size_t at = 0;
      const size_t index = name.empty() ? automatic++ : static_cast<size_t>(parse_number(name, at));
      if (index >= args.positional.size()) {
        raise("IndexError", "tuple index out of range");
      }
      value = args.positional[index];
    } else {
      const auto given = std::find_if(args.keyword.begin(), args.keyword.end(),
                                      [&](const auto& pair) { return pair.first == name; });
      if (given == args.keyword.end()) raise("KeyError", repr_string(name));
      value = given->second;
    }
    std::string_view path = field.substr(name_end);
    while (!path.empty()) {
      if (path[0] == '.') {
        path.remove_prefix(1);
        const size_t end = std::min(path.find_first_of(".["), path.size());
        value = eval.get_attribute(value, path.substr(0, end));
        path.remove_prefix(end);
      } else {
        const size_t end = path.find(']');
        if (path[0] != '[' || end == path.npos) raise("ValueError", "Missing ']' in format string");
        const std::string_view key = path.substr(1, end - 1);
        size_t at = 0;
        const bool number = !key.empty() && key.find_first_not_of("0123456789") == key.npos;
        value =
            eval.get_item(value, number ? Value::integer(parse_number(key, at)) : Value::data(key));
        path.remove_prefix(end + 1);
      }
    }
    if (conversion == 's') value = eval.make_string(eval.text_of(value));
    if (conversion == 'r' || conversion == 'a') value = eval.make_string(Text(repr(value), false));
    eval.step();
    Spec spec;
    bool is_default = spec_text.empty();
    size_t k = 0;
    if (!is_default) {
      size_t after = 0;
      const char32_t first = next_code_point(spec_text, after);
      if (after < spec_text.size() &&
          std::string_view("<>^=").find(spec_text[after]) != std::string_view::npos) {
        spec.fill = first;
        spec.align = spec_text[after];
        k = after + 1;
      } else if (std::string_view("<>^=").find(spec_text[0]) != std::string_view::npos) {
        spec.align = spec_text[0];
        k = 1;
      }
      if (k < spec_text.size() &&
          std::string_view("+- ").find(spec_text[k]) != std::string_view::npos) {
        spec.sign = spec_text[k++];
      }
      if (k < spec_text.size() && spec_text[k] == '#') {
        spec.alternate = true;
        ++k;
      }
      if (k < spec_text.size() && spec_text[k] == '0') {
        if (spec.align == 0) {
          spec.align = '=';
          spec.fill = '0';
        }
        ++k;
      }
      spec.width = parse_number(spec_text, k);
      if (k < spec_text.size() && spec_text[k] == ',') {
        spec.comma = true;
        ++k;
      }
      if (k < spec_text.size() && spec_text[k] == '.') {
        ++k;
        spec.precision = parse_number(spec_text, k);
      }
      check_width(std::max(spec.width, spec.precision));
      if (k < spec_text.size()) spec.type = spec_text[k++];
      if (k < spec_text.size()) raise("ValueError", "Invalid format specifier");
    }
    Text piece;
    if (is_default || value.is_string()) {
      piece = eval.text_of(value);
      if (!is_default) {
        if (spec.type != 0 && spec.type != 's') {
          raise("ValueError",
                fmt::format("Unknown format code '{}' for object of type 'str'", spec.type));
        }
        if (spec.precision >= 0) {
          piece = piece.sub(0, byte_offset(piece.str(), static_cast<size_t>(spec.precision)));
        }
        if (spec.align == '=') spec.align = '<';
        piece = align_text(eval, piece, spec, '<');
      }
    } else if (value.is_number()) {
      const bool is_int = value.is_int_like();
      const std::string_view known = is_int ? "dxXobeEfFgG%n" : "eEfFgG%n";
      if (spec.type != 0 && known.find(spec.type) == known.npos) {
        raise("ValueError", fmt::format("Unknown format code '{}' for object of type '{}'",
                                        spec.type, type_name(value)));
      }
      if (spec.type == 'd' || spec.type == 'n') spec.type = 0;
      piece = align_text(eval, Text(format_number(value, spec), false), spec, '>');
    } else {
      raise("TypeError",
            fmt::format("unsupported format string passed to {}.__format__", type_name(value)));
    }
    eval.charge(piece.size());
    out.append(piece);
  }
  return eval.make_string(std::move(out));
}

}  // namespace nibble::jinja
