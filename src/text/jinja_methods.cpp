// Methods of str, dict, list, tuple and cycler that templates may call. What would change a list or
// a dict is refused, as by Jinja's immutable sandbox. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "text/jinja_eval.h"
#include "text/jinja_filters.h"
#include "text/jinja_text_ops.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {
namespace {

using Values = std::vector<Value>;
using Method = Value (*)(Evaluator& eval, const Value& self, Arguments& args);

struct NamedMethod {
  std::string_view name;
  Method call;
};

const Text& want_text(const Value& value, std::string_view what) {
  if (!value.is_string()) {
    if (value.is_undefined() && value.object()) {
      raise(value.undefined_info().type, value.undefined_info().message);
    }
    raise("TypeError", fmt::format("{} must be str, not {}", what, type_name(value)));
  }
  return value.text();
}

bool given(const Value& value) { return !value.is_undefined() && !value.is_none(); }

// ---- str

template <std::string (*convert)(std::string_view)>
Value convert_method(Evaluator& eval, const Value& self, Arguments&) {
  return eval.make_string(convert_text(self.text(), convert));
}

template <bool left, bool right>
Value strip_method(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("strip", args, {"chars"}, v);
  if (!given(v[0])) return eval.make_string(trim_text(self.text(), left, right, nullptr));
  return eval.make_string(trim_text(self.text(), left, right, &want_text(v[0], "strip arg").str()));
}

/// Byte range of self[start:end] for methods that take both.
void sub_range(const Value& self, const Value& start, const Value& end, size_t& from, size_t& to) {
  const std::string& s = self.str();
  from = 0;
  to = s.size();
  if (!given(start) && !given(end)) return;
  const auto length = static_cast<int64_t>(count_code_points(s));
  const auto clamp = [&](const Value& bound, int64_t absent) {
    if (!given(bound)) return absent;
    int64_t at = want_int(bound);
    if (at < 0) at += length;
    return std::clamp<int64_t>(at, 0, length);
  };
  const int64_t first = clamp(start, 0), last = clamp(end, length);
  from = byte_offset(s, static_cast<size_t>(first));
  to = std::max(from, byte_offset(s, static_cast<size_t>(last)));
}

Value affix_method(Evaluator& eval, const Value& self, Arguments& args, bool at_start) {
  Values v;
  const std::string_view name = at_start ? "startswith" : "endswith";
  bind_arguments(name, args, {"prefix", "start", "end"}, v, 1);
  size_t from = 0, to = 0;
  sub_range(self, v[1], v[2], from, to);
  const std::string_view s = std::string_view(self.str()).substr(from, to - from);
  const auto matches = [&](const Value& affix) {
    const std::string& a = affix.str();
    eval.step(a.size() / 64);
    return at_start ? s.starts_with(a) : s.ends_with(a);
  };
  if (v[0].is_string()) return Value::boolean(matches(v[0]));
  if (v[0].is_undefined()) raise(v[0].undefined_info().type, v[0].undefined_info().message);
  if (v[0].kind() != Kind::kTuple) {
    raise("TypeError",
          fmt::format("{} first arg must be str or a tuple of str, not {}", name, type_name(v[0])));
  }
  for (const Value& affix : v[0].items()) {
    if (!affix.is_string()) {
      raise("TypeError",
            fmt::format("tuple for {} must only contain str, not {}", name, type_name(affix)));
    }
    if (matches(affix)) return Value::boolean(true);
  }
  return Value::boolean(false);
}

Value str_startswith(Evaluator& e, const Value& s, Arguments& a) {
  return affix_method(e, s, a, true);
}
Value str_endswith(Evaluator& e, const Value& s, Arguments& a) {
  return affix_method(e, s, a, false);
}

Value split_spaces(Evaluator& eval, const Text& text, int64_t max_split, bool from_right) {
  Values parts;
  const std::string& s = text.str();
  const auto push = [&](size_t begin, size_t end) {
    parts.push_back(eval.make_string(text.sub(begin, end)));
  };
  size_t begin = 0, end = 0;
  trim_range(s, true, true, nullptr, begin, end);
  if (!from_right) {
    while (begin < end) {
      if (max_split >= 0 && static_cast<int64_t>(parts.size()) >= max_split) {
        size_t a = 0, b = 0;  // the rest keeps its trailing blanks, as in Python
        trim_range(std::string_view(s).substr(begin), true, false, nullptr, a, b);
        push(begin, s.size());
        break;
      }
      size_t word_end = begin;
      while (word_end < end) {
        size_t next = word_end;
        if (is_space(next_code_point(s, next))) break;
        word_end = next;
      }
      push(begin, word_end);
      size_t a = 0, b = 0;
      trim_range(std::string_view(s).substr(word_end, end - word_end), true, false, nullptr, a, b);
      begin = word_end + a;
    }
  } else {
    while (begin < end) {
      if (max_split >= 0 && static_cast<int64_t>(parts.size()) >= max_split) {
        push(0, end);
        break;
      }
      size_t word_begin = end;
      while (word_begin > begin) {
        size_t previous = word_begin - 1;
        while (previous > begin && (static_cast<unsigned char>(s[previous]) & 0xc0) == 0x80)
          --previous;
        size_t next = previous;
        if (is_space(next_code_point(s, next))) break;
        word_begin = previous;
      }
      push(word_begin, end);
      size_t a = 0, b = 0;
      trim_range(std::string_view(s).substr(begin, word_begin - begin), false, true, nullptr, a, b);
      end = begin + b;
    }
    std::reverse(parts.begin(), parts.end());
  }
  return eval.make_list(std::move(parts));
}

Value split_method(Evaluator& eval, const Value& self, Arguments& args, bool from_right) {
  Values v;
  bind_arguments(from_right ? "rsplit" : "split", args, {"sep", "maxsplit"}, v);
  const int64_t max_split = v[1].is_undefined() ? -1 : want_int(v[1]);
  const Text& text = self.text();
  const std::string& s = text.str();
  eval.step(s.size() / 64);
  if (!given(v[0])) return split_spaces(eval, text, max_split, from_right);
  const std::string& separator = want_text(v[0], "separator").str();
  if (separator.empty()) raise("ValueError", "empty separator");
  Values parts;
  if (from_right) {
    size_t end = s.size();
    while (max_split < 0 || static_cast<int64_t>(parts.size()) < max_split) {
      if (end < separator.size()) break;
      const size_t hit = s.rfind(separator, end - separator.size());
      if (hit == s.npos) break;
      eval.step(1 + (end - hit) * separator.size() / 4096);
      parts.push_back(eval.make_string(text.sub(hit + separator.size(), end)));
      end = hit;
    }
    parts.push_back(eval.make_string(text.sub(0, end)));
    std::reverse(parts.begin(), parts.end());
    return eval.make_list(std::move(parts));
  }
  size_t begin = 0;
  while (max_split < 0 || static_cast<int64_t>(parts.size()) < max_split) {
    const void* hit =
        memmem(s.data() + begin, s.size() - begin, separator.data(), separator.size());
    if (hit == nullptr) break;
    const auto at = static_cast<size_t>(static_cast<const char*>(hit) - s.data());
    eval.step();
    parts.push_back(eval.make_string(text.sub(begin, at)));
    begin = at + separator.size();
  }
  parts.push_back(eval.make_string(text.sub(begin, s.size())));
  return eval.make_list(std::move(parts));
}

Value str_split(Evaluator& e, const Value& s, Arguments& a) { return split_method(e, s, a, false); }
Value str_rsplit(Evaluator& e, const Value& s, Arguments& a) { return split_method(e, s, a, true); }

Value str_splitlines(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("splitlines", args, {"keepends"}, v);
  Values lines;
  for (Text& line : split_lines(eval, self.text(), truthy(v[0]))) {
    lines.push_back(eval.make_string(std::move(line)));
  }
  return eval.make_list(std::move(lines));
}

Value str_replace(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("replace", args, {"old", "new", "count"}, v, 2);
  const Text& old = want_text(v[0], "replace() argument 1");
  const Text& fresh = want_text(v[1], "replace() argument 2");
  return eval.make_string(
      replace_text(eval, self.text(), old, fresh, v[2].is_undefined() ? -1 : want_int(v[2])));
}

/// find, rfind, index, rindex: code point index or -1.
int64_t find_text(Evaluator& eval, const Value& self, Arguments& args, bool from_right) {
  Values v;
  bind_arguments("find", args, {"sub", "start", "end"}, v, 1);
  const std::string& needle = want_text(v[0], "find() argument 1").str();
  size_t from = 0, to = 0;
  sub_range(self, v[1], v[2], from, to);
  const std::string_view s = std::string_view(self.str()).substr(from, to - from);
  eval.step(s.size() / 64);
  size_t at = s.npos;
  if (from_right) {
    eval.step(s.size() * std::min<size_t>(needle.size(), 4096) / 4096);
    at = s.rfind(needle);
  } else if (needle.empty()) {
    at = 0;
  } else if (const void* hit = memmem(s.data(), s.size(), needle.data(), needle.size())) {
    at = static_cast<size_t>(static_cast<const char*>(hit) - s.data());
  }
  if (at == s.npos) return -1;
  return static_cast<int64_t>(count_code_points(std::string_view(self.str()).substr(0, from + at)));
}

Value str_find(Evaluator& e, const Value& s, Arguments& a) {
  return Value::integer(find_text(e, s, a, false));
}
Value str_rfind(Evaluator& e, const Value& s, Arguments& a) {
  return Value::integer(find_text(e, s, a, true));
}
Value found_or_raise(int64_t at) {
  if (at < 0) raise("ValueError", "substring not found");
  return Value::integer(at);
}
Value str_index(Evaluator& e, const Value& s, Arguments& a) {
  return found_or_raise(find_text(e, s, a, false));
}
Value str_rindex(Evaluator& e, const Value& s, Arguments& a) {
  return found_or_raise(find_text(e, s, a, true));
}

Value str_count(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("count", args, {"sub", "start", "end"}, v, 1);
  const std::string& needle = want_text(v[0], "count() argument 1").str();
  size_t from = 0, to = 0;
  sub_range(self, v[1], v[2], from, to);
  const std::string_view s = std::string_view(self.str()).substr(from, to - from);
  eval.step(s.size() / 64);
  if (needle.empty()) return Value::integer(static_cast<int64_t>(count_code_points(s)) + 1);
  int64_t count = 0;
  for (size_t at = 0;;) {
    const void* hit = memmem(s.data() + at, s.size() - at, needle.data(), needle.size());
    if (hit == nullptr) return Value::integer(count);
    ++count;
    at = static_cast<size_t>(static_cast<const char*>(hit) - s.data()) + needle.size();
  }
}

Value str_join(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("join", args, {"iterable"}, v, 1);
  Text out;
  size_t index = 0;
  for (const Value& item : eval.iterate(v[0])) {
    if (!item.is_string()) {
      raise("TypeError", fmt::format("sequence item {}: expected str instance, {} found", index,
                                     type_name(item)));
    }
    if (index++ > 0) {
      eval.charge(self.str().size());
      out.append(self.text());
    }
    eval.charge(item.str().size());
    out.append(item.text());
  }
  return eval.make_string(std::move(out));
}

Value str_format(Evaluator& eval, const Value& self, Arguments& args) {
  return brace_format(eval, self.text(), args);
}

template <bool (*predicate)(char32_t)>
Value all_method(Evaluator& eval, const Value& self, Arguments&) {
  const std::string& s = self.str();
  eval.step(s.size() / 64);
  for (size_t i = 0; i < s.size();) {
    if (!predicate(next_code_point(s, i))) return Value::boolean(false);
  }
  return Value::boolean(!s.empty());
}

bool is_alnum(char32_t c) { return is_alpha(c) || is_numeric(c); }

template <bool upper>
Value case_method(Evaluator& eval, const Value& self, Arguments& args) {
  return Value::boolean(apply_test(eval, upper ? "upper" : "lower", self, args));
}

Value str_isascii(Evaluator&, const Value& self, Arguments&) {
  return Value::boolean(std::all_of(self.str().begin(), self.str().end(),
                                    [](char c) { return static_cast<unsigned char>(c) < 0x80; }));
}

Value partition_method(Evaluator& eval, const Value& self, Arguments& args, bool from_right) {
  Values v;
  bind_arguments("partition", args, {"sep"}, v, 1);
  const Text& separator = want_text(v[0], "partition() argument");
  if (separator.empty()) raise("ValueError", "empty separator");
  const Text& text = self.text();
  eval.step(text.size() * std::min<size_t>(separator.size(), 4096) / 4096);
  const size_t at =
      from_right ? text.str().rfind(separator.str()) : text.str().find(separator.str());
  Values parts;
  if (at == std::string::npos) {
    parts = {self, eval.make_string(Text()), eval.make_string(Text())};
    if (from_right) std::swap(parts[0], parts[2]);
  } else {
    parts = {eval.make_string(text.sub(0, at)),
             eval.make_string(text.sub(at, at + separator.size())),
             eval.make_string(text.sub(at + separator.size(), text.size()))};
  }
  return eval.make_list(std::move(parts), Kind::kTuple);
}

Value str_partition(Evaluator& e, const Value& s, Arguments& a) {
  return partition_method(e, s, a, false);
}
Value str_rpartition(Evaluator& e, const Value& s, Arguments& a) {
  return partition_method(e, s, a, true);
}

template <int side>
Value pad_method(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("center", args, {"width", "fillchar"}, v, 1);
  const Text fill = v[1].is_undefined() ? Text(" ", false) : want_text(v[1], "The fill character");
  if (count_code_points(fill.str()) != 1) {
    raise("TypeError", "The fill character must be exactly one character long");
  }
  return eval.make_string(pad_text(eval, self.text(), want_int(v[0]), side, fill));
}

Value str_zfill(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("zfill", args, {"width"}, v, 1);
  const Text& text = self.text();
  const bool has_sign = !text.empty() && (text.str()[0] == '+' || text.str()[0] == '-');
  const Text digits = text.sub(has_sign ? 1 : 0, text.size());
  const Text padded =
      pad_text(eval, digits, want_int(v[0]) - (has_sign ? 1 : 0), 1, Text("0", false));
  Text out = text.sub(0, has_sign ? 1 : 0);
  out.append(padded);
  return eval.make_string(std::move(out));
}

Value str_removeprefix(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("removeprefix", args, {"prefix"}, v, 1);
  const std::string& prefix = want_text(v[0], "removeprefix() argument").str();
  if (!self.str().starts_with(prefix)) return self;
  return eval.make_string(self.text().sub(prefix.size(), self.str().size()));
}

Value str_removesuffix(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("removesuffix", args, {"suffix"}, v, 1);
  const std::string& suffix = want_text(v[0], "removesuffix() argument").str();
  if (!self.str().ends_with(suffix)) return self;
  return eval.make_string(self.text().sub(0, self.str().size() - suffix.size()));
}

constexpr auto kStrMethods = std::to_array<NamedMethod>({
    {"capitalize", convert_method<to_capitalized>},
    {"casefold", convert_method<to_lower>},
    {"center", pad_method<0>},
    {"count", str_count},
    {"endswith", str_endswith},
    {"find", str_find},
    {"format", str_format},
    {"index", str_index},
    {"isalnum", all_method<is_alnum>},
    {"isalpha", all_method<is_alpha>},
    {"isascii", str_isascii},
    {"isdecimal", all_method<is_decimal>},
    {"isdigit", all_method<is_digit>},
    {"islower", case_method<false>},
    {"isnumeric", all_method<is_numeric>},
    {"isspace", all_method<is_space>},
    {"isupper", case_method<true>},
    {"join", str_join},
    {"ljust", pad_method<-1>},
    {"lower", convert_method<to_lower>},
    {"lstrip", strip_method<true, false>},
    {"partition", str_partition},
    {"removeprefix", str_removeprefix},
    {"removesuffix", str_removesuffix},
    {"replace", str_replace},
    {"rfind", str_rfind},
    {"rindex", str_rindex},
    {"rjust", pad_method<1>},
    {"rpartition", str_rpartition},
    {"rsplit", str_rsplit},
    {"rstrip", strip_method<false, true>},
    {"split", str_split},
    {"splitlines", str_splitlines},
    {"startswith", str_startswith},
    {"strip", strip_method<true, true>},
    {"swapcase", convert_method<to_swapped>},
    {"title", convert_method<to_title>},
    {"upper", convert_method<to_upper>},
    {"zfill", str_zfill},
});

// ---- dict

Value dict_get(Evaluator&, const Value& self, Arguments& args) {
  if (!args.keyword.empty()) raise("TypeError", "dict.get() takes no keyword arguments");
  if (args.positional.empty() || args.positional.size() > 2) {
    raise("TypeError",
          args.positional.empty()
              ? "get expected at least 1 argument, got 0"
              : fmt::format("get expected at most 2 arguments, got {}", args.positional.size()));
  }
  if (const Value* value = self.dict().find(args.positional[0])) return *value;
  return args.positional.size() > 1 ? args.positional[1] : Value::none();
}

Value make_view(Evaluator& eval, Values items, std::string_view name) {
  const Value view = eval.make_list(std::move(items), Kind::kDictView);
  std::static_pointer_cast<ListObject>(view.object())->view = name;
  return view;
}

Value dict_items(Evaluator& eval, const Value& self, Arguments&) {
  Values items;
  for (const auto& [key, value] : self.dict().entries) {
    items.push_back(eval.make_list({key, value}, Kind::kTuple));
  }
  return make_view(eval, std::move(items), "dict_items");
}

Value dict_keys(Evaluator& eval, const Value& self, Arguments&) {
  return make_view(eval, eval.iterate(self), "dict_keys");
}

Value dict_values(Evaluator& eval, const Value& self, Arguments&) {
  Values items;
  for (const auto& [key, value] : self.dict().entries) items.push_back(value);
  return make_view(eval, std::move(items), "dict_values");
}

Value return_self(Evaluator&, const Value& self, Arguments&) { return self; }

constexpr auto kDictMethods = std::to_array<NamedMethod>({
    {"copy", return_self},
    {"get", dict_get},
    {"items", dict_items},
    {"keys", dict_keys},
    {"values", dict_values},
});
constexpr std::array<std::string_view, 6> kDictMutators = {"clear",      "pop",    "popitem",
                                                           "setdefault", "update", "fromkeys"};

// ---- list, tuple

Value list_index(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("index", args, {"value"}, v, 1);
  for (size_t i = 0; i < self.items().size(); ++i) {
    if (eval.compare("==", self.items()[i], v[0])) return Value::integer(static_cast<int64_t>(i));
  }
  raise("ValueError", fmt::format("{} is not in list", repr(v[0])));
}

Value list_count(Evaluator& eval, const Value& self, Arguments& args) {
  Values v;
  bind_arguments("count", args, {"value"}, v, 1);
  int64_t count = 0;
  for (const Value& item : self.items()) count += eval.compare("==", item, v[0]) ? 1 : 0;
  return Value::integer(count);
}

constexpr auto kListMethods = std::to_array<NamedMethod>({
    {"copy", return_self},
    {"count", list_count},
    {"index", list_index},
});
constexpr std::array<std::string_view, 8> kListMutators = {"append", "clear",  "extend",  "insert",
                                                           "pop",    "remove", "reverse", "sort"};

// ---- cycler

Value cycler_next(Evaluator&, const Value& self, Arguments&) {
  auto& cycler = static_cast<CyclerObject&>(*self.object());
  const Value item = cycler.items[cycler.position];
  cycler.position = (cycler.position + 1) % cycler.items.size();
  return item;
}
Value cycler_reset(Evaluator&, const Value& self, Arguments&) {
  static_cast<CyclerObject&>(*self.object()).position = 0;
  return Value::none();
}
constexpr auto kCyclerMethods =
    std::to_array<NamedMethod>({{"next", cycler_next}, {"reset", cycler_reset}});

template <size_t N>
bool bind_method(const std::array<NamedMethod, N>& table, const Value& self, std::string_view name,
                 Value& out) {
  for (const NamedMethod& method : table) {
    if (method.name != name) continue;
    auto bound = std::make_shared<Callable>();
    bound->name = std::string(name);
    bound->type_name = "builtin_function_or_method";
    bound->depth = self.depth();
    bound->weight = self.weight();
    bound->call = [call = method.call, self](Evaluator& eval, Arguments& args) {
      return call(eval, self, args);
    };
    out = Value::object(Kind::kCallable, std::move(bound));
    return true;
  }
  return false;
}

template <size_t N>
bool is_mutator(const std::array<std::string_view, N>& names, const Value& self,
                std::string_view name, Value& out) {
  if (std::find(names.begin(), names.end(), name) == names.end()) return false;
  out = Value::undefined_because("SecurityError",
                                 fmt::format("access to attribute {} of '{}' object is unsafe.",
                                             repr_string(name), type_name(self)));
  return true;
}

}  // namespace

bool find_method(const Value& self, std::string_view name, Value& out) {
  switch (self.kind()) {
    case Kind::kString: return bind_method(kStrMethods, self, name, out);
    case Kind::kDict:
      return bind_method(kDictMethods, self, name, out) ||
             is_mutator(kDictMutators, self, name, out);
    case Kind::kList:
      return bind_method(kListMethods, self, name, out) ||
             is_mutator(kListMutators, self, name, out);
    case Kind::kTuple:
    case Kind::kRange: return name != "copy" && bind_method(kListMethods, self, name, out);
    case Kind::kCycler:
      if (name == "current") {
        const auto& cycler = static_cast<const CyclerObject&>(*self.object());
        out = cycler.items[cycler.position];
        return true;
      }
      return bind_method(kCyclerMethods, self, name, out);
    default: return false;
  }
}

}  // namespace nibble::jinja
