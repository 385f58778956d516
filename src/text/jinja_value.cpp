// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_value.h"

#include <algorithm>
#include <cmath>

#include "text/jinja_unicode.h"

namespace nibble::jinja {

TemplateError::TemplateError(ErrorKind kind, std::string type, std::string message, int line)
    : Error(kind, line > 0 ? fmt::format("chat template, line {}: {}: {}", line, type, message)
                           : fmt::format("chat template: {}: {}", type, message)),
      type_(std::move(type)),
      message_(std::move(message)),
      line_(line) {}

void raise(std::string type, std::string message) {
  throw Raise{std::move(type), std::move(message), ErrorKind::kInput};
}

void raise_limit(std::string message) {
  throw Raise{"LimitError", std::move(message), ErrorKind::kLimit};
}

namespace {

void check_depth(int depth) {
  if (depth > kMaxValueDepth) raise_limit("values are nested too deeply");
}

// Values share parts, so a small program can build one that is enormous when written out.
void check_weight(uint64_t weight) {
  if (weight > kMaxValueWeight) raise_limit("a value has too many parts");
}

// object_type_repr of Jinja: "None", "dict object", "jinja2.utils.Namespace object".
std::string object_type_repr(const Value& value) {
  switch (value.kind()) {
    case Kind::kNone: return "None";
    case Kind::kNamespace: return "jinja2.utils.Namespace object";
    case Kind::kCycler: return "jinja2.utils.Cycler object";
    case Kind::kJoiner: return "jinja2.utils.Joiner object";
    case Kind::kLoop: return "jinja2.runtime.LoopContext object";
    case Kind::kString: return value.text().markup ? "markupsafe.Markup object" : "str object";
    case Kind::kCallable:
      if (value.callable().type_name == "Macro") return "jinja2.runtime.Macro object";
      return value.callable().type_name + " object";
    default: return type_name(value) + " object";
  }
}

}  // namespace

Value Value::number(double value) {
  Value out(Kind::kFloat, 0);
  out.float_ = value;
  return out;
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): callers hand temporaries over
Value Value::big_integer(std::string digits) {
  auto object = std::make_shared<StringObject>();
  object->text = Text(digits, false);
  return Value::object(Kind::kBigInt, std::move(object));
}

Value Value::string(Text text) {
  auto object = std::make_shared<StringObject>();
  object->text = std::move(text);
  object->weight = 1 + object->text.size() / 64;
  return Value::object(Kind::kString, std::move(object));
}

Value Value::list(std::vector<Value> items, Kind kind) {
  auto object = std::make_shared<ListObject>();
  int depth = 0;
  uint64_t weight = 1;
  for (const Value& item : items) {
    depth = std::max(depth, item.depth());
    weight += item.weight();
  }
  check_depth(depth + 1);
  check_weight(weight);
  object->depth = depth + 1;
  object->weight = weight;
  object->items = std::move(items);
  return Value::object(kind, std::move(object));
}

Value Value::dict(std::shared_ptr<DictObject> dict) {
  int depth = 0;
  uint64_t weight = 1;
  for (const auto& [key, value] : dict->entries) {
    depth = std::max({depth, key.depth(), value.depth()});
    weight += key.weight() + value.weight();
  }
  check_depth(depth + 1);
  check_weight(weight);
  dict->depth = depth + 1;
  dict->weight = weight;
  return Value::object(Kind::kDict, std::move(dict));
}

Value Value::object(Kind kind, std::shared_ptr<Object> object) {
  Value out(kind, 0);
  out.object_ = std::move(object);
  return out;
}

Value Value::undefined(std::string_view name) {
  return undefined_because("UndefinedError", fmt::format("{} is undefined", repr_string(name)));
}

Value Value::undefined_attribute(const Value& owner, std::string_view name) {
  return undefined_because(
      "UndefinedError", fmt::format("{} has no attribute {}", repr_string(object_type_repr(owner)),
                                    repr_string(name)));
}

Value Value::undefined_element(const Value& owner, const Value& key) {
  if (key.is_string()) return undefined_attribute(owner, key.str());
  return undefined_because("UndefinedError",
                           fmt::format("{} has no element {}", object_type_repr(owner), repr(key)));
}

Value Value::undefined_because(std::string type, std::string message) {
  auto object = std::make_shared<Undefined>();
  object->type = std::move(type);
  object->message = std::move(message);
  return Value::object(Kind::kUndefined, std::move(object));
}

Value Value::from_json(const json::value& value, bool is_template) {
  switch (value.kind()) {
    case json::kind::null: return none();
    case json::kind::bool_: return boolean(value.get_bool());
    case json::kind::int64: return integer(value.get_int64());
    case json::kind::uint64:
      if (value.get_uint64() > static_cast<uint64_t>(INT64_MAX)) {
        return big_integer(std::to_string(value.get_uint64()));
      }
      return integer(static_cast<int64_t>(value.get_uint64()));
    case json::kind::double_: return number(value.get_double());
    case json::kind::string: return string(Text(value.get_string(), is_template));
    case json::kind::array: {
      std::vector<Value> items;
      items.reserve(value.get_array().size());
      for (const auto& item : value.get_array()) items.push_back(from_json(item, is_template));
      return list(std::move(items));
    }
    case json::kind::object: break;
  }
  auto object = std::make_shared<DictObject>();
  object->entries.reserve(value.get_object().size());
  for (const auto& member : value.get_object()) {
    object->set(member.key(), from_json(member.value(), is_template));
  }
  return dict(std::move(object));
}

const Text& Value::text() const { return static_cast<const StringObject&>(*object_).text; }
const ListObject& Value::list() const { return static_cast<const ListObject&>(*object_); }
const std::vector<Value>& Value::items() const { return list().items; }
const DictObject& Value::dict() const { return static_cast<const DictObject&>(*object_); }
DictObject& Value::namespace_dict() const { return static_cast<DictObject&>(*object_); }
Callable& Value::callable() const { return static_cast<Callable&>(*object_); }
const Undefined& Value::undefined_info() const {
  static const Undefined kUnknown = [] {
    Undefined unknown;
    unknown.message = "value is undefined";
    return unknown;
  }();
  return object_ ? static_cast<const Undefined&>(*object_) : kUnknown;
}

// ---- equality, order, hashing

size_t hash_value(const Value& value) {
  switch (value.kind()) {
    case Kind::kBool:
    case Kind::kInt: return std::hash<int64_t>()(value.as_int());
    case Kind::kFloat: {
      const double d = value.as_float();
      if (d >= -9.2e18 && d <= 9.2e18 && d == std::floor(d)) {
        return std::hash<int64_t>()(static_cast<int64_t>(d));
      }
      return std::hash<double>()(d);
    }
    case Kind::kString:
    case Kind::kBigInt: return std::hash<std::string>()(value.str());
    case Kind::kNone: return 0x6e6f6e65;
    case Kind::kTuple: {
      size_t hash = 0x7475706c;
      for (const Value& item : value.items()) hash = hash * 1000003 ^ hash_value(item);
      return hash;
    }
    case Kind::kList:
    case Kind::kDict:
    case Kind::kDictView:
      raise("TypeError", fmt::format("unhashable type: '{}'", type_name(value)));
    case Kind::kUndefined: return 0x756e6465;
    default: return std::hash<const void*>()(value.object().get());
  }
}

bool equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    if (a.is_int_like() && b.is_int_like()) return a.as_int() == b.as_int();
    if (a.kind() == Kind::kFloat && b.kind() == Kind::kFloat) return a.as_float() == b.as_float();
    const double real = a.kind() == Kind::kFloat ? a.as_float() : b.as_float();
    const int64_t whole = a.kind() == Kind::kFloat ? b.as_int() : a.as_int();
    return real >= -9.3e18 && real < 9223372036854775808.0 && real == std::floor(real) &&
           static_cast<int64_t>(real) == whole;
  }
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kUndefined:
    case Kind::kNone: return true;
    case Kind::kString:
    case Kind::kBigInt: return a.object() == b.object() || a.str() == b.str();
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange: {
      if (a.object() == b.object()) return true;
      const auto& left = a.items();
      const auto& right = b.items();
      return left.size() == right.size() &&
             std::equal(left.begin(), left.end(), right.begin(), equal);
    }
    case Kind::kDict: {
      if (a.object() == b.object()) return true;
      if (a.dict().entries.size() != b.dict().entries.size()) return false;
      for (const auto& [key, value] : a.dict().entries) {
        const Value* other = b.dict().find(key);
        if (other == nullptr || !equal(value, *other)) return false;
      }
      return true;
    }
    default: return a.object() == b.object();
  }
}

bool less(const Value& a, const Value& b, std::string_view op, bool swapped) {
  for (const Value* side : {&a, &b}) {
    if (side->is_undefined()) {
      raise(side->undefined_info().type, side->undefined_info().message);
    }
  }
  if (a.is_number() && b.is_number()) {
    if (a.is_int_like() && b.is_int_like()) return a.as_int() < b.as_int();
    return a.as_float() < b.as_float();
  }
  if (a.is_string() && b.is_string()) return a.str() < b.str();  // UTF-8 keeps code point order
  if (a.kind() == b.kind() && (a.kind() == Kind::kList || a.kind() == Kind::kTuple)) {
    const size_t n = std::min(a.items().size(), b.items().size());
    for (size_t i = 0; i < n; ++i) {
      if (!equal(a.items()[i], b.items()[i])) return less(a.items()[i], b.items()[i], op, swapped);
    }
    return a.items().size() < b.items().size();
  }
  if (a.kind() == Kind::kBigInt || b.kind() == Kind::kBigInt) {
    raise_limit("integers beyond 64 bits are not supported");
  }
  raise("TypeError", fmt::format("'{}' not supported between instances of '{}' and '{}'", op,
                                 type_name(swapped ? b : a), type_name(swapped ? a : b)));
}

// ---- dict

size_t DictObject::find_index(const Value& key, size_t hash) const {
  const auto [begin, end] = index_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    if (equal(entries[it->second].first, key)) return it->second;
  }
  return entries.size();
}

const Value* DictObject::find(const Value& key) const {
  const size_t at = find_index(key, hash_value(key));
  return at < entries.size() ? &entries[at].second : nullptr;
}

const Value* DictObject::find(std::string_view key) const {
  const auto [begin, end] = index_.equal_range(std::hash<std::string_view>()(key));
  for (auto it = begin; it != end; ++it) {
    const Value& candidate = entries[it->second].first;
    if (candidate.is_string() && candidate.str() == key) return &entries[it->second].second;
  }
  return nullptr;
}

void DictObject::set(const Value& key, Value value) {
  const size_t hash = hash_value(key);
  const size_t at = find_index(key, hash);
  if (at < entries.size()) {
    entries[at].second = std::move(value);
    return;
  }
  index_.emplace(hash, entries.size());
  entries.emplace_back(key, std::move(value));
}

// ---- names, truth, text

std::string type_name(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined: return "Undefined";
    case Kind::kNone: return "NoneType";
    case Kind::kBool: return "bool";
    case Kind::kInt:
    case Kind::kBigInt: return "int";
    case Kind::kFloat: return "float";
    case Kind::kString: return value.text().markup ? "Markup" : "str";
    case Kind::kList: return "list";
    case Kind::kTuple: return value.list().is_group ? "_GroupTuple" : "tuple";
    case Kind::kRange: return "range";
    case Kind::kGenerator: return "generator";
    case Kind::kDictView: return std::string(value.list().view);
    case Kind::kDict: return "dict";
    case Kind::kNamespace: return "Namespace";
    case Kind::kCallable: return value.callable().type_name;
    case Kind::kLoop: return "LoopContext";
    case Kind::kCycler: return "Cycler";
    case Kind::kJoiner: return "Joiner";
  }
  return "object";
}

bool truthy(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kNone: return false;
    case Kind::kBool:
    case Kind::kInt: return value.as_int() != 0;
    case Kind::kFloat: return value.as_float() != 0.0;
    case Kind::kString: return !value.str().empty();
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
    case Kind::kDictView: return !value.items().empty();
    case Kind::kDict: return !value.dict().entries.empty();
    default: return true;
  }
}

namespace {

std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  return python_float_repr(value);
}

void append_repr(std::string& out, const Value& value, int depth);

void append_items(std::string& out, const std::vector<Value>& items, int depth) {
  bool first = true;
  for (const Value& item : items) {
    if (!first) out += ", ";
    first = false;
    append_repr(out, item, depth + 1);
  }
}

void append_dict(std::string& out, const DictObject& dict, int depth) {
  out += '{';
  bool first = true;
  for (const auto& [key, value] : dict.entries) {
    if (!first) out += ", ";
    first = false;
    append_repr(out, key, depth + 1);
    out += ": ";
    append_repr(out, value, depth + 1);
  }
  out += '}';
}

constexpr size_t kMaxReprBytes = size_t{64} << 20;

void append_repr(std::string& out, const Value& value, int depth) {
  check_depth(depth);
  if (out.size() > kMaxReprBytes) raise_limit("a value's printed form is too long");
  switch (value.kind()) {
    case Kind::kUndefined: out += "Undefined"; break;
    case Kind::kNone: out += "None"; break;
    case Kind::kBool: out += value.as_bool() ? "True" : "False"; break;
    case Kind::kInt: out += std::to_string(value.as_int()); break;
    case Kind::kBigInt: out += value.str(); break;
    case Kind::kFloat: out += float_text(value.as_float()); break;
    case Kind::kString:
      if (value.text().markup) {
        out += "Markup(" + repr_string(value.str()) + ")";
      } else {
        out += repr_string(value.str());
      }
      break;
    case Kind::kList:
      out += '[';
      append_items(out, value.items(), depth);
      out += ']';
      break;
    case Kind::kTuple:
      out += '(';
      append_items(out, value.items(), depth);
      out += value.items().size() == 1 ? ",)" : ")";
      break;
    case Kind::kRange: {
      const ListObject& range = value.list();
      out += range.step == 1
                 ? fmt::format("range({}, {})", range.start, range.stop)
                 : fmt::format("range({}, {}, {})", range.start, range.stop, range.step);
      break;
    }
    case Kind::kDictView:
      out += value.list().view;
      out += "([";
      append_items(out, value.items(), depth);
      out += "])";
      break;
    case Kind::kDict: append_dict(out, value.dict(), depth); break;
    case Kind::kNamespace:
      out += "<Namespace ";
      append_dict(out, value.namespace_dict(), depth);
      out += '>';
      break;
    case Kind::kLoop: {
      const auto& loop = static_cast<const LoopObject&>(*value.object());
      out += fmt::format("<LoopContext {}/{}>", loop.index + 1, loop.items->items.size());
      break;
    }
    case Kind::kCallable:
      if (value.callable().type_name == "Macro") {
        out += fmt::format("<Macro {}>", repr_string(value.callable().name));
      } else {
        out += fmt::format("<{} {}>", value.callable().type_name, value.callable().name);
      }
      break;
    case Kind::kGenerator: out += "<generator object>"; break;
    case Kind::kCycler: out += "<jinja2.utils.Cycler object>"; break;
    case Kind::kJoiner: out += "<jinja2.utils.Joiner object>"; break;
  }
}

}  // namespace

std::string repr_string(std::string_view text) {
  const bool has_single = text.find('\'') != text.npos;
  const char quote = has_single && text.find('"') == text.npos ? '"' : '\'';
  std::string out(1, quote);
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_code_point(text, i);
    if (c == static_cast<unsigned char>(quote) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (is_printable(c)) {
      out += text.substr(begin, i - begin);
    } else if (c < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c));
    } else if (c < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<uint32_t>(c));
    }
  }
  out += quote;
  return out;
}

std::string repr(const Value& value) {
  std::string out;
  append_repr(out, value, 0);
  return out;
}

Text to_text(const Value& value) {
  if (value.is_string()) return value.text();
  if (value.is_undefined()) return {};
  return Text(repr(value), false);
}

// ---- json.dumps

namespace {

struct JsonWriter {
  const TojsonStyle& style;
  std::string out;

  void newline(int depth) {
    out += '\n';
    for (int i = 0; i < depth; ++i) out += style.indent;
  }

  static std::string key_text(const Value& key) {
    switch (key.kind()) {
      case Kind::kString: return key.str();
      case Kind::kNone: return "null";
      case Kind::kBool: return key.as_bool() ? "true" : "false";
      case Kind::kInt: return std::to_string(key.as_int());
      case Kind::kBigInt: return key.str();
      case Kind::kFloat: return python_float_repr(key.as_float());
      default:
        raise("TypeError",
              fmt::format("keys must be str, int, float, bool or None, not {}", type_name(key)));
    }
  }

  void write_dict(const DictObject& dict, int depth) {
    if (dict.entries.empty()) {
      out += "{}";
      return;
    }
    std::vector<const std::pair<Value, Value>*> entries;
    entries.reserve(dict.entries.size());
    for (const auto& entry : dict.entries) entries.push_back(&entry);
    if (style.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(),
                       [](const auto* a, const auto* b) { return less(a->first, b->first); });
    }
    out += '{';
    for (size_t i = 0; i < entries.size(); ++i) {
      if (i > 0) out += style.item_separator;
      if (style.has_indent) newline(depth + 1);
      append_json_string(out, key_text(entries[i]->first), style.ensure_ascii);
      out += style.key_separator;
      write(entries[i]->second, depth + 1);
    }
    if (style.has_indent) newline(depth);
    out += '}';
  }

  void write_items(const std::vector<Value>& items, int depth) {
    if (items.empty()) {
      out += "[]";
      return;
    }
    out += '[';
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out += style.item_separator;
      if (style.has_indent) newline(depth + 1);
      write(items[i], depth + 1);
    }
    if (style.has_indent) newline(depth);
    out += ']';
  }

  void write(const Value& value, int depth) {
    check_depth(depth);
    if (out.size() > kMaxReprBytes) raise_limit("a value's JSON form is too long");
    switch (value.kind()) {
      case Kind::kNone: out += "null"; break;
      case Kind::kBool: out += value.as_bool() ? "true" : "false"; break;
      case Kind::kInt: out += std::to_string(value.as_int()); break;
      case Kind::kBigInt: out += value.str(); break;
      case Kind::kFloat: out += python_float_repr(value.as_float()); break;
      case Kind::kString: append_json_string(out, value.str(), style.ensure_ascii); break;
      case Kind::kList:
      case Kind::kTuple: write_items(value.items(), depth); break;
      case Kind::kDict: write_dict(value.dict(), depth); break;
      default:
        raise("TypeError",
              fmt::format("Object of type {} is not JSON serializable", type_name(value)));
    }
  }
};

}  // namespace

std::string to_json(const Value& value, const TojsonStyle& style) {
  JsonWriter writer{style, {}};
  writer.write(value, 0);
  return std::move(writer.out);
}

}  // namespace nibble::jinja
