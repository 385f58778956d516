// Values of the Jinja engine: Python's types as far as templates can see them. Values are immutable
// and shared, except namespaces (the one thing a sandboxed template may change). Every container
// knows its depth, so that nesting stays bounded and recursion over values and their destruction
// stay safe. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "text/jinja_text.h"

namespace nibble::jinja {

/// What Python would have raised: `type` is the exception's class name, `message` its text. what()
/// adds the line. Limit overruns have type "LimitError" and kind kLimit.
class TemplateError : public Error {
 public:
  TemplateError(ErrorKind kind, std::string type, std::string message, int line);
  const std::string& type() const { return type_; }
  const std::string& message() const { return message_; }
  int line() const { return line_; }

 private:
  std::string type_;
  std::string message_;
  int line_;
};

/// Thrown by value code, which does not know the line; the evaluator rethrows it as TemplateError.
struct Raise {
  std::string type;
  std::string message;
  ErrorKind kind = ErrorKind::kInput;
};
[[noreturn]] void raise(std::string type, std::string message);
[[noreturn]] void raise_limit(std::string message);

enum class Kind : uint8_t {
  kUndefined,
  kNone,
  kBool,
  kInt,
  kBigInt,  // an integer beyond 64 bits: it can be printed and compared, not computed with
  kFloat,
  kString,
  kList,
  kTuple,
  kRange,
  kGenerator,  // computed eagerly, but used up by its first iteration, as in Python
  kDictView,   // items(), keys(), values()
  kDict,
  kNamespace,
  kCallable,
  kLoop,
  kCycler,
  kJoiner,
};

constexpr int kMaxValueDepth = 200;
constexpr uint64_t kMaxValueWeight = 4'000'000;

struct Object {
  virtual ~Object() = default;
  int depth = 0;        // 1 + the deepest element's, for containers
  uint64_t weight = 1;  // nodes of the value written out as a tree: what comparing it may cost
};

class Value;
struct Undefined;
struct ListObject;
struct DictObject;
struct Callable;
struct LoopObject;

class Value {
 public:
  Value() : kind_(Kind::kUndefined), int_(0) {}
  static Value none() { return Value(Kind::kNone, 0); }
  static Value boolean(bool value) { return Value(Kind::kBool, value ? 1 : 0); }
  static Value integer(int64_t value) { return Value(Kind::kInt, value); }
  static Value number(double value);
  static Value big_integer(std::string digits);
  static Value string(Text text);
  static Value data(std::string_view text) { return string(Text(text, false)); }
  static Value literal(std::string_view text) { return string(Text(text, true)); }
  static Value list(std::vector<Value> items, Kind kind = Kind::kList);
  static Value dict(std::shared_ptr<DictObject> dict);
  static Value object(Kind kind, std::shared_ptr<Object> object);
  /// Undefined as Jinja makes it: a missing name, or a missing attribute/item of `owner`.
  static Value undefined(std::string_view name);
  static Value undefined_attribute(const Value& owner, std::string_view name);
  static Value undefined_element(const Value& owner, const Value& key);
  static Value undefined_because(std::string type, std::string message);
  static Value from_json(const json::value& value, bool is_template = false);

  Kind kind() const { return kind_; }
  bool is_undefined() const { return kind_ == Kind::kUndefined; }
  bool is_none() const { return kind_ == Kind::kNone; }
  bool is_string() const { return kind_ == Kind::kString; }
  bool is_dict() const { return kind_ == Kind::kDict; }
  bool is_int_like() const { return kind_ == Kind::kInt || kind_ == Kind::kBool; }
  bool is_number() const { return is_int_like() || kind_ == Kind::kFloat; }
  bool is_list_like() const {  // anything held as a vector
    return kind_ >= Kind::kList && kind_ <= Kind::kDictView;
  }

  bool as_bool() const { return int_ != 0; }
  int64_t as_int() const { return int_; }
  double as_float() const { return kind_ == Kind::kFloat ? float_ : static_cast<double>(int_); }
  const Text& text() const;
  const std::string& str() const { return text().str(); }
  const ListObject& list() const;
  const std::vector<Value>& items() const;
  const DictObject& dict() const;
  DictObject& namespace_dict() const;
  const Undefined& undefined_info() const;
  Callable& callable() const;
  const std::shared_ptr<Object>& object() const { return object_; }
  int depth() const { return object_ ? object_->depth : 0; }
  uint64_t weight() const { return object_ ? object_->weight : 1; }

 private:
  Value(Kind kind, int64_t value) : kind_(kind), int_(value) {}
  Kind kind_;
  union {
    int64_t int_;
    double float_;
  };
  std::shared_ptr<Object> object_;
};

struct Undefined : Object {
  std::string type = "UndefinedError";
  std::string message;
};

struct StringObject : Object {
  Text text;
};

struct ListObject : Object {
  std::vector<Value> items;
  bool used_up = false;                   // generators
  bool is_group = false;                  // groupby's (grouper, list)
  std::string_view view;                  // "dict_items", ... for views
  int64_t start = 0, stop = 0, step = 1;  // ranges
};

size_t hash_value(const Value& value);  // raises TypeError for unhashable kinds
bool equal(const Value& a, const Value& b);

/// Insertion-ordered mapping with Python's key equality (1 == 1.0 == True).
struct DictObject : Object {
  std::vector<std::pair<Value, Value>> entries;

  const Value* find(const Value& key) const;
  const Value* find(std::string_view key) const;
  void set(const Value& key, Value value);
  void set(std::string_view key, Value value) { set(Value::data(key), std::move(value)); }

 private:
  size_t find_index(const Value& key, size_t hash) const;
  std::unordered_multimap<size_t, size_t> index_;  // hash -> entry
};

class Evaluator;

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keyword;
};

struct Callable : Object {
  std::string name;
  std::string type_name = "function";
  std::function<Value(Evaluator&, Arguments&)> call;
};

struct LoopObject : Object {
  std::shared_ptr<ListObject> items;
  size_t index = 0;  // 0-based
  int nesting = 0;
  bool has_last_changed = false;
  std::vector<Value> last_changed;
  std::function<Value(Evaluator&, const Value&)> recurse;  // `recursive` loops only
};

struct CyclerObject : Object {
  std::vector<Value> items;
  size_t position = 0;
};

struct JoinerObject : Object {
  Value separator;
  bool used = false;
};

/// "str", "int", "NoneType", ... as Python's type(value).__name__.
std::string type_name(const Value& value);
bool truthy(const Value& value);
/// str(value): text keeps its provenance, everything else is data.
Text to_text(const Value& value);
std::string repr(const Value& value);
std::string repr_string(std::string_view text);
/// a < b; raises TypeError for kinds that Python does not order, naming `op` and, when `swapped`, b
/// before a.
bool less(const Value& a, const Value& b, std::string_view op = "<", bool swapped = false);

struct TojsonStyle {
  bool ensure_ascii = false;
  bool has_indent = false;
  std::string indent;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};
std::string to_json(const Value& value, const TojsonStyle& style);

}  // namespace nibble::jinja
