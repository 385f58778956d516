// Jinja's built-in filters of texts, numbers and JSON, and the lookup of all filters. Texts keep
// their provenance wherever bytes are copied; computed text (JSON, numbers, escapes of escapes) is
// data. SPDX-License-Identifier: Apache-2.0
#include "text/jinja_filters.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "text/jinja_eval.h"
#include "text/jinja_text_ops.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {

void bind_arguments(std::string_view function, Arguments& args,
                    std::initializer_list<std::string_view> names, std::vector<Value>& values,
                    size_t num_required) {
  if (args.positional.size() > names.size()) {
    raise("TypeError", fmt::format("{}() takes at most {} arguments ({} given)", function,
                                   names.size(), args.positional.size()));
  }
  values.resize(names.size());
  std::vector<bool> given(names.size());
  for (size_t i = 0; i < args.positional.size(); ++i) {
    values[i] = args.positional[i];
    given[i] = true;
  }
  for (auto& [name, value] : args.keyword) {
    const auto at =
        static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin());
    if (at == names.size()) {
      raise("TypeError",
            fmt::format("{}() got an unexpected keyword argument {}", function, repr_string(name)));
    }
    if (given[at]) {
      raise("TypeError",
            fmt::format("{}() got multiple values for argument {}", function, repr_string(name)));
    }
    values[at] = value;
    given[at] = true;
  }
  for (size_t i = 0; i < num_required; ++i) {
    if (!given[i]) {
      raise("TypeError", fmt::format("{}() missing 1 required positional argument: '{}'", function,
                                     *(names.begin() + i)));
    }
  }
}

int64_t want_int(const Value& value) {
  if (!value.is_int_like()) {
    raise("TypeError",
          fmt::format("'{}' object cannot be interpreted as an integer", type_name(value)));
  }
  return value.as_int();
}

namespace {

using Values = std::vector<Value>;

Value text_filter(Evaluator& eval, const Value& input, std::string (*convert)(std::string_view)) {
  Text text = eval.text_of(input);
  Text out = convert_text(text, convert);
  return eval.make_string(std::move(out));
}

std::string jinja_title(std::string_view text) {
  // Words begin after runs of - ( { [ < or white space; unlike str.title(), apostrophes do not
  // count.
  std::string out;
  size_t i = 0;
  while (i < text.size()) {
    const size_t begin = i;
    bool separators = false;
    while (i < text.size()) {
      size_t next = i;
      const char32_t c = next_code_point(text, next);
      const bool is_separator =
          c == '-' || c == '(' || c == '{' || c == '[' || c == '<' || is_space(c);
      if (i == begin) separators = is_separator;
      if (is_separator != separators) break;
      i = next;
    }
    const std::string_view piece = text.substr(begin, i - begin);
    size_t first = 0;
    next_code_point(piece, first);
    out += to_upper(piece.substr(0, first));
    out += to_lower(piece.substr(first));
  }
  return out;
}

// ---- attribute access for map, sort, selectattr, ...

// ---- the filters

Value filter_length(Evaluator&, const Value& input, Arguments&) {
  switch (input.kind()) {
    case Kind::kUndefined: return Value::integer(0);
    case Kind::kString: return Value::integer(static_cast<int64_t>(count_code_points(input.str())));
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
    case Kind::kDictView: return Value::integer(static_cast<int64_t>(input.items().size()));
    case Kind::kDict: return Value::integer(static_cast<int64_t>(input.dict().entries.size()));
    case Kind::kLoop:
      return Value::integer(static_cast<int64_t>(
          static_cast<const LoopObject&>(*input.object()).items->items.size()));
    default: raise("TypeError", fmt::format("object of type '{}' has no len()", type_name(input)));
  }
}

Value filter_list(Evaluator& eval, const Value& input, Arguments&) {
  return eval.make_list(eval.iterate(input));
}

Value filter_string(Evaluator& eval, const Value& input, Arguments&) {
  return input.is_string() ? input : eval.make_string(eval.text_of(input));
}

Value filter_tojson(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("tojson", args, {"ensure_ascii", "indent", "separators", "sort_keys"}, v);
  TojsonStyle style;
  style.ensure_ascii = truthy(v[0]);
  style.sort_keys = truthy(v[3]);
  if (!v[1].is_undefined() && !v[1].is_none()) {
    style.has_indent = true;
    style.item_separator = ",";
    if (v[1].is_string()) {
      style.indent = v[1].str();
    } else {
      style.indent =
          std::string(static_cast<size_t>(std::clamp<int64_t>(want_int(v[1]), 0, 64)), ' ');
    }
  }
  if (!v[2].is_undefined() && !v[2].is_none()) {
    const Values pair = eval.iterate(v[2]);
    if (pair.size() != 2) {
      raise("ValueError", fmt::format("{} values to unpack (expected 2{})",
                                      pair.size() > 2 ? "too many" : "not enough",
                                      pair.size() > 2 ? "" : fmt::format(", got {}", pair.size())));
    }
    style.item_separator = eval.text_of(pair[0]).str();
    style.key_separator = eval.text_of(pair[1]).str();
  }
  eval.step(input.weight());
  return eval.make_string(Text(to_json(input, style), false));
}

Value filter_safe(Evaluator& eval, const Value& input, Arguments&) {
  Text text = eval.text_of(input);
  text.markup = true;
  return eval.make_string(std::move(text));
}

Value filter_escape(Evaluator& eval, const Value& input, Arguments&) {
  Text text = eval.text_of(input);
  if (!text.markup) text = escape_html(text);
  text.markup = true;
  return eval.make_string(std::move(text));
}

Value filter_forceescape(Evaluator& eval, const Value& input, Arguments&) {
  Text text = escape_html(eval.text_of(input));
  text.markup = true;
  return eval.make_string(std::move(text));
}

bool parse_python_int(std::string_view text, int base, int64_t& out, bool& too_big) {
  size_t begin = 0, end = 0;
  trim_range(text, true, true, nullptr, begin, end);
  text = text.substr(begin, end - begin);
  bool negative = false;
  if (!text.empty() && (text[0] == '+' || text[0] == '-')) {
    negative = text[0] == '-';
    text.remove_prefix(1);
  }
  if (text.size() > 2 && text[0] == '0') {
    const char mark = static_cast<char>(text[1] | 0x20);
    const int marked = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 0;
    if (marked != 0 && (base == marked || base == 0)) {
      base = marked;
      text.remove_prefix(2);
    }
  }
  if (base == 0) base = 10;
  std::string digits(negative ? "-" : "");
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '_' && i > 0 && i + 1 < text.size() && text[i - 1] != '_') continue;
    digits += text[i];
  }
  if (digits.empty() || digits == "-" || text[0] == '-') return false;
  const auto [stop, ec] = std::from_chars(digits.data(), digits.data() + digits.size(), out, base);
  if (stop != digits.data() + digits.size()) return false;
  too_big = ec == std::errc::result_out_of_range;
  return ec == std::errc() || too_big;
}

bool parse_python_float(std::string_view text, double& out) {
  size_t begin = 0, end = 0;
  trim_range(text, true, true, nullptr, begin, end);
  std::string digits(text.substr(begin, end - begin));
  std::string lower = to_lower(digits);
  const std::string_view unsigned_part = std::string_view(lower).substr(
      !lower.empty() && (lower[0] == '-' || lower[0] == '+') ? 1 : 0);
  const double sign = !lower.empty() && lower[0] == '-' ? -1 : 1;
  if (unsigned_part == "inf" || unsigned_part == "infinity") {
    out = sign * HUGE_VAL;
    return true;
  }
  if (unsigned_part == "nan") {
    out = std::nan("");
    return true;
  }
  if (unsigned_part.find_first_not_of("0123456789.e+-_") != std::string_view::npos) return false;
  std::erase(digits, '_');
  const char* first = digits.data() + (digits.starts_with('+') ? 1 : 0);
  const char* last = digits.data() + digits.size();
  const auto [stop, ec] = std::from_chars(first, last, out);
  if (ec == std::errc::result_out_of_range && stop == last) out = strtod(digits.c_str(), nullptr);
  return first != last && stop == last && ec != std::errc::invalid_argument;
}

Value filter_int(Evaluator&, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_int", args, {"default", "base"}, v);
  const Value fallback = v[0].is_undefined() ? Value::integer(0) : v[0];
  const auto from_float = [&](double d) {
    if (std::isnan(d)) return fallback;
    if (std::isinf(d)) raise("OverflowError", "cannot convert float infinity to integer");
    if (std::fabs(d) >= 9.2e18) raise_limit("integers beyond 64 bits are not supported");
    return Value::integer(static_cast<int64_t>(d));
  };
  if (input.is_string()) {
    int64_t number = 0;
    bool too_big = false;
    if (parse_python_int(input.str(), v[1].is_undefined() ? 10 : static_cast<int>(want_int(v[1])),
                         number, too_big)) {
      if (too_big) raise_limit("integers beyond 64 bits are not supported");
      return Value::integer(number);
    }
    double real = 0;
    return parse_python_float(input.str(), real) ? from_float(real) : fallback;
  }
  if (input.kind() == Kind::kFloat) return from_float(input.as_float());
  if (input.is_int_like()) return Value::integer(input.as_int());
  if (input.kind() == Kind::kBigInt) return input;
  return input.is_undefined()
             ? (raise(input.undefined_info().type, input.undefined_info().message), input)
             : fallback;
}

Value filter_float(Evaluator&, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_float", args, {"default"}, v);
  const Value fallback = v[0].is_undefined() ? Value::number(0.0) : v[0];
  double real = 0;
  if (input.is_number()) return Value::number(input.as_float());
  if (input.is_string() && parse_python_float(input.str(), real)) return Value::number(real);
  if (input.is_undefined()) raise(input.undefined_info().type, input.undefined_info().message);
  return fallback;
}

Value filter_trim(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_trim", args, {"chars"}, v);
  const bool has_chars = !v[0].is_undefined() && !v[0].is_none();
  const std::string chars = has_chars ? eval.text_of(v[0]).str() : "";
  return eval.make_string(trim_text(eval.text_of(input), true, true, has_chars ? &chars : nullptr));
}

Value filter_default(Evaluator&, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_default", args, {"default_value", "boolean"}, v);
  if (input.is_undefined() || (truthy(v[1]) && !truthy(input))) {
    return args.positional.empty() && v[0].is_undefined() ? Value::data("") : v[0];
  }
  return input;
}

Value filter_upper(Evaluator& e, const Value& v, Arguments&) { return text_filter(e, v, to_upper); }
Value filter_lower(Evaluator& e, const Value& v, Arguments&) { return text_filter(e, v, to_lower); }
Value filter_title(Evaluator& e, const Value& v, Arguments&) {
  return text_filter(e, v, jinja_title);
}
Value filter_capitalize(Evaluator& e, const Value& v, Arguments&) {
  return text_filter(e, v, to_capitalized);
}

Value filter_replace(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_replace", args, {"old", "new", "count"}, v, 2);
  const int64_t count = v[2].is_undefined() || v[2].is_none() ? -1 : want_int(v[2]);
  return eval.make_string(
      replace_text(eval, eval.text_of(input), eval.text_of(v[0]), eval.text_of(v[1]), count));
}

double round_half_even(double value, int precision) {
  if (!std::isfinite(value) || precision > 300) return value;
  if (precision >= 0) {
    // printf rounds the exact binary value, as Python's round() does.
    return strtod(fmt::format("{:.{}f}", value, precision).c_str(), nullptr);
  }
  const double scale = std::pow(10.0, -precision);
  return std::nearbyint(value / scale) * scale;
}

Value filter_round(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_round", args, {"precision", "method"}, v);
  const auto precision =
      static_cast<int>(std::clamp<int64_t>(v[0].is_undefined() ? 0 : want_int(v[0]), -320, 320));
  const std::string method = v[1].is_undefined() ? "common" : eval.text_of(v[1]).str();
  if (method != "common" && method != "ceil" && method != "floor") {
    raise("FilterArgumentError", "method must be common, ceil or floor");
  }
  if (!input.is_number()) {
    if (input.is_undefined()) raise(input.undefined_info().type, input.undefined_info().message);
    raise("TypeError", fmt::format("type {} doesn't define __round__ method", type_name(input)));
  }
  if (method == "common") {
    if (input.is_int_like()) {
      if (precision >= 0) return Value::integer(input.as_int());
      return Value::integer(static_cast<int64_t>(round_half_even(input.as_float(), precision)));
    }
    return Value::number(round_half_even(input.as_float(), precision));
  }
  const double scale = std::pow(10.0, precision);
  const double scaled = input.as_float() * scale;
  return Value::number((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / scale);
}

Value filter_abs(Evaluator&, const Value& input, Arguments&) {
  if (input.kind() == Kind::kFloat) return Value::number(std::fabs(input.as_float()));
  if (input.is_int_like() && input.as_int() != INT64_MIN)
    return Value::integer(std::abs(input.as_int()));
  if (input.is_undefined()) raise(input.undefined_info().type, input.undefined_info().message);
  raise("TypeError", fmt::format("bad operand type for abs(): '{}'", type_name(input)));
}

Value filter_wordcount(Evaluator& eval, const Value& input, Arguments&) {
  const Text text = eval.text_of(input);
  int64_t words = 0;
  bool inside = false;
  for (size_t i = 0; i < text.str().size();) {
    const bool word = is_word(next_code_point(text.str(), i));
    if (word && !inside) ++words;
    inside = word;
  }
  return Value::integer(words);
}

Value filter_indent(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_indent", args, {"width", "first", "blank"}, v);
  Text indent;
  if (v[0].is_string()) {
    indent = v[0].text();
  } else {
    const int64_t width = v[0].is_undefined() ? 4 : want_int(v[0]);
    if (width > 10000) raise_limit("indent is wider than 10000");
    indent = Text(std::string(static_cast<size_t>(std::max<int64_t>(0, width)), ' '), false);
  }
  Text text = eval.text_of(input);
  text.append("\n", text.empty() ? false : text.is_template_at(text.size() - 1));
  Text out;
  bool first_line = true;
  for (const Text& line : split_lines(eval, text)) {
    eval.charge(indent.size());
    if (first_line) {
      if (truthy(v[1])) out.append(indent);
    } else {
      out.append("\n", false);
      if (!line.empty() || truthy(v[2])) out.append(indent);
    }
    first_line = false;
    out.append(line);
  }
  return eval.make_string(std::move(out));
}

Value filter_format(Evaluator& eval, const Value& input, Arguments& args) {
  if (!args.positional.empty() && !args.keyword.empty()) {
    raise("FilterArgumentError", "can't handle positional and keyword arguments at the same time");
  }
  const Value format = eval.make_string(eval.text_of(input));
  if (!args.keyword.empty()) {
    auto dict = std::make_shared<DictObject>();
    for (const auto& [key, value] : args.keyword) dict->set(key, value);
    return percent_format(eval, format, eval.make_dict(std::move(dict)));
  }
  return percent_format(eval, format, eval.make_list(args.positional, Kind::kTuple));
}

Value filter_attr(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_attr", args, {"name"}, v, 1);
  if (input.is_undefined()) raise(input.undefined_info().type, input.undefined_info().message);
  const std::string name = eval.text_of(v[0]).str();
  // Attributes only, never items.
  if (input.is_dict()) {
    Value method;
    return find_method(input, name, method) ? method : Value::undefined_attribute(input, name);
  }
  return eval.get_attribute(input, name);
}

Value filter_center(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_center", args, {"width"}, v);
  const int64_t width = v[0].is_undefined() ? 80 : want_int(v[0]);
  return eval.make_string(pad_text(eval, eval.text_of(input), width, 0, Text(" ", false)));
}

Value filter_truncate(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_truncate", args, {"length", "killwords", "end", "leeway"}, v);
  const Text text = eval.text_of(input);
  const Text end = v[2].is_undefined() ? Text("...", false) : eval.text_of(v[2]);
  const int64_t length = v[0].is_undefined() ? 255 : want_int(v[0]);
  const int64_t leeway = v[3].is_undefined() || v[3].is_none() ? 5 : want_int(v[3]);
  const auto end_length = static_cast<int64_t>(count_code_points(end.str()));
  if (length < end_length) {
    raise("AssertionError", fmt::format("expected length >= {}, got {}", end_length, length));
  }
  if (leeway < 0) raise("AssertionError", fmt::format("expected leeway >= 0, got {}", leeway));
  if (static_cast<int64_t>(count_code_points(text.str())) <= length + leeway) {
    return eval.make_string(text);
  }
  size_t cut = byte_offset(text.str(), static_cast<size_t>(length - end_length));
  if (!truthy(v[1])) {
    const size_t space = text.str().substr(0, cut).rfind(' ');
    if (space != std::string::npos) cut = space;
  }
  Text out = text.sub(0, cut);
  out.append(end);
  return eval.make_string(std::move(out));
}

Value filter_urlencode(Evaluator& eval, const Value& input, Arguments&) {
  const auto quote = [](std::string_view text, std::string_view safe) {
    std::string out;
    for (const char c : text) {
      if (isalnum(static_cast<unsigned char>(c)) ||
          std::string_view("_.-~").find(c) != std::string_view::npos || safe.find(c) != safe.npos) {
        out += c;
      } else if (c == ' ' && safe.empty()) {
        out += '+';  // query strings
      } else {
        out += fmt::format("%{:02X}", static_cast<unsigned char>(c));
      }
    }
    return out;
  };
  if (input.is_string() || !(input.is_dict() || input.is_list_like())) {
    return eval.make_string(Text(quote(eval.text_of(input).str(), "/"), false));
  }
  std::string out;
  Arguments none;
  const Value pairs = input.is_dict() ? apply_filter(eval, "items", input, none) : input;
  for (const Value& pair : eval.iterate(pairs)) {
    const Values parts = eval.iterate(pair);
    if (parts.size() != 2) raise("ValueError", "urlencode needs pairs");
    if (!out.empty()) out += '&';
    out += quote(eval.text_of(parts[0]).str(), "") + "=" + quote(eval.text_of(parts[1]).str(), "");
  }
  return eval.make_string(Text(out, false));
}

constexpr auto kFilters = std::to_array<Filter>({
    {"abs", filter_abs},
    {"attr", filter_attr},
    {"capitalize", filter_capitalize},
    {"center", filter_center},
    {"count", filter_length},
    {"d", filter_default},
    {"default", filter_default},
    {"e", filter_escape},
    {"escape", filter_escape},
    {"float", filter_float},
    {"forceescape", filter_forceescape},
    {"format", filter_format},
    {"indent", filter_indent},
    {"int", filter_int},
    {"length", filter_length},
    {"list", filter_list},
    {"lower", filter_lower},
    {"replace", filter_replace},
    {"round", filter_round},
    {"safe", filter_safe},
    {"string", filter_string},
    {"title", filter_title},
    {"tojson", filter_tojson},
    {"trim", filter_trim},
    {"truncate", filter_truncate},
    {"upper", filter_upper},
    {"urlencode", filter_urlencode},
    {"wordcount", filter_wordcount},
});

}  // namespace

const Filter* find_filter(std::string_view name) {
  for (const Filter& filter : kFilters) {
    if (filter.name == name) return &filter;
  }
  for (const Filter& filter : sequence_filters()) {
    if (filter.name == name) return &filter;
  }
  return nullptr;
}

bool is_unsupported_filter(std::string_view name) {
  return name == "urlize" || name == "xmlattr" || name == "pprint" || name == "filesizeformat" ||
         name == "striptags" || name == "wordwrap";
}

Value apply_filter(Evaluator& eval, std::string_view name, const Value& input, Arguments& args) {
  const Filter* filter = find_filter(name);
  if (filter == nullptr) {
    raise("TemplateRuntimeError", fmt::format("No filter named {}.", repr_string(name)));
  }
  return filter->apply(eval, input, args);
}

}  // namespace nibble::jinja
