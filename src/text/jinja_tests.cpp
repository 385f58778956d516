// Jinja's tests (`is defined`, `is mapping`, ...) and its globals (range, namespace, ...).
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cmath>

#include "text/jinja_eval.h"
#include "text/jinja_filters.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {
namespace {

const Value& argument(std::string_view test, const Arguments& args) {
  if (args.positional.empty()) {
    raise("TypeError", fmt::format("test '{}' misses its argument", test));
  }
  return args.positional[0];
}

bool is_defined(Evaluator&, const Value& v, Arguments&) { return !v.is_undefined(); }
bool is_undefined(Evaluator&, const Value& v, Arguments&) { return v.is_undefined(); }
bool is_none(Evaluator&, const Value& v, Arguments&) { return v.is_none(); }
bool is_string(Evaluator&, const Value& v, Arguments&) { return v.is_string(); }
bool is_boolean(Evaluator&, const Value& v, Arguments&) { return v.kind() == Kind::kBool; }
bool is_integer(Evaluator&, const Value& v, Arguments&) {
  return v.kind() == Kind::kInt || v.kind() == Kind::kBigInt;
}
bool is_float(Evaluator&, const Value& v, Arguments&) { return v.kind() == Kind::kFloat; }
bool is_number(Evaluator&, const Value& v, Arguments&) {
  return v.is_number() || v.kind() == Kind::kBigInt;
}
bool is_mapping(Evaluator&, const Value& v, Arguments&) { return v.is_dict(); }
bool is_true(Evaluator&, const Value& v, Arguments&) {
  return v.kind() == Kind::kBool && v.as_bool();
}
bool is_false(Evaluator&, const Value& v, Arguments&) {
  return v.kind() == Kind::kBool && !v.as_bool();
}
bool is_iterable(Evaluator&, const Value& v, Arguments&) {
  return v.is_undefined() || v.is_string() || v.is_list_like() || v.is_dict() ||
         v.kind() == Kind::kLoop;
}
bool is_sequence(Evaluator&, const Value& v, Arguments&) {
  return v.is_undefined() || v.is_string() || v.is_dict() || v.kind() == Kind::kList ||
         v.kind() == Kind::kTuple || v.kind() == Kind::kRange;
}
bool is_callable(Evaluator&, const Value& v, Arguments&) {
  return v.kind() == Kind::kCallable || v.kind() == Kind::kLoop || v.kind() == Kind::kJoiner ||
         v.is_undefined();
}
bool is_escaped(Evaluator&, const Value& v, Arguments&) { return v.is_string() && v.text().markup; }
bool is_lower_text(Evaluator& eval, const Value& v, Arguments&) {
  const std::string text = eval.text_of(v).str();
  bool cased = false;
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_code_point(text, i);
    if (is_upper(c) || is_title(c)) return false;
    cased = cased || is_lower(c);
  }
  return cased;
}
bool is_upper_text(Evaluator& eval, const Value& v, Arguments&) {
  const std::string text = eval.text_of(v).str();
  bool cased = false;
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_code_point(text, i);
    if (is_lower(c) || is_title(c)) return false;
    cased = cased || is_upper(c);
  }
  return cased;
}
bool divides(Evaluator& eval, const Value& v, const Value& by, int64_t wanted) {
  return equal(eval.binary("%", v, by), Value::integer(wanted));
}
bool is_divisibleby(Evaluator& eval, const Value& v, Arguments& args) {
  return divides(eval, v, argument("divisibleby", args), 0);
}
bool is_even(Evaluator& eval, const Value& v, Arguments&) {
  return divides(eval, v, Value::integer(2), 0);
}
bool is_odd(Evaluator& eval, const Value& v, Arguments&) {
  return divides(eval, v, Value::integer(2), 1);
}
bool is_eq(Evaluator& e, const Value& v, Arguments& a) {
  return e.compare("==", v, argument("eq", a));
}
bool is_ne(Evaluator& e, const Value& v, Arguments& a) {
  return e.compare("!=", v, argument("ne", a));
}
bool is_lt(Evaluator& e, const Value& v, Arguments& a) {
  return e.compare("<", v, argument("lt", a));
}
bool is_le(Evaluator& e, const Value& v, Arguments& a) {
  return e.compare("<=", v, argument("le", a));
}
bool is_gt(Evaluator& e, const Value& v, Arguments& a) {
  return e.compare(">", v, argument("gt", a));
}
bool is_ge(Evaluator& e, const Value& v, Arguments& a) {
  return e.compare(">=", v, argument("ge", a));
}
bool is_in(Evaluator& e, const Value& v, Arguments& a) { return e.contains(argument("in", a), v); }
bool is_sameas(Evaluator&, const Value& v, Arguments& a) {
  const Value& other = argument("sameas", a);
  if (v.kind() != other.kind()) return false;
  if (v.object() || other.object()) {
    return v.object() == other.object() || (v.is_string() && v.str() == other.str());
  }
  return equal(v, other);
}
bool is_filter_name(Evaluator&, const Value& v, Arguments&) {
  return v.is_string() && find_filter(v.str()) != nullptr;
}
bool is_test_name(Evaluator&, const Value& v, Arguments&) {
  return v.is_string() && find_test(v.str()) != nullptr;
}

constexpr auto kTests = std::to_array<Test>({
    {"boolean", is_boolean},
    {"callable", is_callable},
    {"defined", is_defined},
    {"divisibleby", is_divisibleby},
    {"eq", is_eq},
    {"equalto", is_eq},
    {"==", is_eq},
    {"escaped", is_escaped},
    {"even", is_even},
    {"false", is_false},
    {"filter", is_filter_name},
    {"float", is_float},
    {"ge", is_ge},
    {">=", is_ge},
    {"gt", is_gt},
    {"greaterthan", is_gt},
    {">", is_gt},
    {"in", is_in},
    {"integer", is_integer},
    {"iterable", is_iterable},
    {"le", is_le},
    {"<=", is_le},
    {"lower", is_lower_text},
    {"lt", is_lt},
    {"lessthan", is_lt},
    {"<", is_lt},
    {"mapping", is_mapping},
    {"ne", is_ne},
    {"!=", is_ne},
    {"none", is_none},
    {"number", is_number},
    {"odd", is_odd},
    {"sameas", is_sameas},
    {"sequence", is_sequence},
    {"string", is_string},
    {"test", is_test_name},
    {"true", is_true},
    {"undefined", is_undefined},
    {"upper", is_upper_text},
});

// ---- globals

Value function(std::string_view name, std::function<Value(Evaluator&, Arguments&)> call,
               std::string type = "function") {
  auto object = std::make_shared<Callable>();
  object->name = std::string(name);
  object->type_name = std::move(type);
  object->call = std::move(call);
  return Value::object(Kind::kCallable, std::move(object));
}

Value make_range(Evaluator& eval, Arguments& args) {
  if (args.positional.empty() || args.positional.size() > 3 || !args.keyword.empty()) {
    raise("TypeError", fmt::format("range expected {} argument{}, got {}",
                                   args.positional.empty() ? "at least 1" : "at most 3",
                                   args.positional.empty() ? "" : "s", args.positional.size()));
  }
  for (const Value& v : args.positional) {
    if (!v.is_int_like()) {
      raise("TypeError",
            fmt::format("'{}' object cannot be interpreted as an integer", type_name(v)));
    }
  }
  const size_t n = args.positional.size();
  const int64_t start = n == 1 ? 0 : args.positional[0].as_int();
  const int64_t stop = args.positional[n == 1 ? 0 : 1].as_int();
  const int64_t step = n == 3 ? args.positional[2].as_int() : 1;
  if (step == 0) raise("ValueError", "range() arg 3 must not be zero");
  constexpr uint64_t kMaxRange = 100'000;
  uint64_t length = 0;
  if (step > 0 && start < stop) {
    length = (static_cast<uint64_t>(stop) - static_cast<uint64_t>(start) - 1) /
                 static_cast<uint64_t>(step) +
             1;
  } else if (step < 0 && start > stop) {
    length = (static_cast<uint64_t>(start) - static_cast<uint64_t>(stop) - 1) /
                 (0 - static_cast<uint64_t>(step)) +
             1;
  }
  if (length > kMaxRange) {
    raise("OverflowError", fmt::format("Range too big. The sandbox blocks ranges larger than "
                                       "MAX_RANGE ({}).",
                                       kMaxRange));
  }
  std::vector<Value> items;
  items.reserve(length);
  for (uint64_t i = 0; i < length; ++i) {
    items.push_back(Value::integer(
        static_cast<int64_t>(static_cast<uint64_t>(start) + i * static_cast<uint64_t>(step))));
  }
  eval.step(length / 8);
  Value range = eval.make_list(std::move(items), Kind::kRange);
  const auto object = std::static_pointer_cast<ListObject>(range.object());
  object->start = start;
  object->stop = stop;
  object->step = step;
  return range;
}

std::shared_ptr<DictObject> dict_from(Evaluator& eval, Arguments& args, std::string_view what) {
  auto dict = std::make_shared<DictObject>();
  if (args.positional.size() > 1) {
    raise("TypeError",
          fmt::format("{} expected at most 1 argument, got {}", what, args.positional.size()));
  }
  if (!args.positional.empty()) {
    const Value& source = args.positional[0];
    if (source.is_dict()) {
      for (const auto& [key, value] : source.dict().entries) dict->set(key, value);
    } else {
      for (const Value& pair : eval.iterate(source)) {
        const std::vector<Value> parts = eval.iterate(pair);
        if (parts.size() != 2) {
          raise("ValueError",
                fmt::format("dictionary update sequence element #{} has length {}; 2 is "
                            "required",
                            dict->entries.size(), parts.size()));
        }
        dict->set(parts[0], parts[1]);
      }
    }
  }
  for (const auto& [key, value] : args.keyword) dict->set(key, value);
  return dict;
}

Value make_cycler(Evaluator& eval, Arguments& args) {
  if (args.positional.empty()) raise("RuntimeError", "at least one item has to be provided");
  const Value items = eval.make_list(args.positional);
  auto cycler = std::make_shared<CyclerObject>();
  cycler->items = items.items();
  cycler->depth = items.depth();
  cycler->weight = items.weight();
  return Value::object(Kind::kCycler, std::move(cycler));
}

Value make_joiner(Evaluator& eval, Arguments& args) {
  std::vector<Value> v;
  bind_arguments("joiner", args, {"sep"}, v);
  auto joiner = std::make_shared<JoinerObject>();
  joiner->separator = v[0].is_undefined() ? Value::data(", ") : v[0];
  const Value holder = eval.make_list({joiner->separator});
  joiner->depth = holder.depth();
  joiner->weight = holder.weight();
  return Value::object(Kind::kJoiner, std::move(joiner));
}

Value strftime_now(Evaluator& eval, Arguments& args) {
  std::vector<Value> v;
  bind_arguments("strftime_now", args, {"format"}, v, 1);
  if (!v[0].is_string()) {
    raise("TypeError", fmt::format("strftime() argument 1 must be str, not {}", type_name(v[0])));
  }
  const std::string& format = v[0].str();
  if (format.size() > 1000) raise_limit("a date format is longer than 1000 bytes");
  const std::tm now = eval.now();
  // One directive at a time, without glibc's width extensions ("%999999d").
  std::string out;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%' || i + 1 >= format.size()) {
      out += format[i];
      continue;
    }
    std::string directive = "%";
    ++i;
    if (format[i] == '-' && i + 1 < format.size()) directive += format[i++];
    directive += format[i];
    char buffer[128];
    if (directive == "%f") {
      out += "000000";
    } else if (isalpha(static_cast<unsigned char>(format[i])) != 0) {
      const size_t length = std::strftime(buffer, sizeof buffer, directive.c_str(), &now);
      out.append(buffer, length);
    } else {
      out += format[i] == '%' ? "%" : directive;
    }
  }
  return eval.make_string(Text(out, false));
}

}  // namespace

const Test* find_test(std::string_view name) {
  for (const Test& test : kTests) {
    if (test.name == name) return &test;
  }
  return nullptr;
}

bool apply_test(Evaluator& eval, std::string_view name, const Value& input, Arguments& args) {
  const Test* test = find_test(name);
  if (test == nullptr) {
    raise("TemplateRuntimeError", fmt::format("No test named {}.", repr_string(name)));
  }
  return test->apply(eval, input, args);
}

Value find_global(Evaluator&, std::string_view name, bool& found) {
  found = true;
  if (name == "range") return function(name, make_range);
  if (name == "namespace") {
    return function(
        name,
        [](Evaluator& eval, Arguments& args) {
          return eval.make_namespace(dict_from(eval, args, "dict"));
        },
        "type");
  }
  if (name == "dict") {
    return function(
        name,
        [](Evaluator& eval, Arguments& args) {
          return eval.make_dict(dict_from(eval, args, "dict"));
        },
        "type");
  }
  if (name == "raise_exception") {
    return function(name, [](Evaluator& eval, Arguments& args) -> Value {
      std::vector<Value> v;
      bind_arguments("raise_exception", args, {"message"}, v, 1);
      raise("TemplateError", eval.text_of(v[0]).str());
    });
  }
  if (name == "strftime_now") return function(name, strftime_now);
  if (name == "cycler") return function(name, make_cycler, "type");
  if (name == "joiner") return function(name, make_joiner, "type");
  if (name == "lipsum") {
    return function(name, [](Evaluator&, Arguments&) -> Value {
      throw Raise{"TemplateRuntimeError", "lipsum() is not supported", ErrorKind::kUnsupported};
    });
  }
  found = false;
  return {};
}

}  // namespace nibble::jinja
