// The evaluator's operations on values: look-up, slices, operators, comparison, iteration.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>

#include "text/jinja_eval.h"
#include "text/jinja_filters.h"
#include "text/jinja_text_ops.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {
namespace {

[[noreturn]] void raise_undefined(const Value& value) {
  raise(value.undefined_info().type, value.undefined_info().message);
}

[[noreturn]] void raise_too_big() { raise_limit("integers beyond 64 bits are not supported"); }

bool to_index(const Value& value, int64_t& out) {
  if (!value.is_int_like()) return false;
  out = value.as_int();
  return true;
}

}  // namespace

std::vector<Value> Evaluator::iterate(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined: return {};
    case Kind::kGenerator: {
      auto& generator = const_cast<ListObject&>(value.list());  // using it up is its one mutation
      charge(generator.items.size() * sizeof(Value));
      if (std::exchange(generator.used_up, true)) return {};
      return generator.items;
    }
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
    case Kind::kDictView: charge(value.items().size() * sizeof(Value)); return value.items();
    case Kind::kDict: {
      std::vector<Value> keys;
      keys.reserve(value.dict().entries.size());
      charge(value.dict().entries.size() * sizeof(Value));
      for (const auto& [key, item] : value.dict().entries) keys.push_back(key);
      return keys;
    }
    case Kind::kString: {
      std::vector<Value> characters;
      const std::string& text = value.str();
      for (size_t i = 0; i < text.size();) {
        const size_t begin = i;
        next_code_point(text, i);
        characters.push_back(make_string(value.text().sub(begin, i)));
        step();
      }
      return characters;
    }
    case Kind::kLoop: {
      const auto& loop = static_cast<const LoopObject&>(*value.object());
      return {loop.items->items.begin() + static_cast<ptrdiff_t>(loop.index) + 1,
              loop.items->items.end()};
    }
    default: raise("TypeError", fmt::format("'{}' object is not iterable", type_name(value)));
  }
}

Value Evaluator::loop_attribute(const Value& value, std::string_view name) {
  const auto loop = std::static_pointer_cast<LoopObject>(value.object());
  const auto index = static_cast<int64_t>(loop->index);
  const auto length = static_cast<int64_t>(loop->items->items.size());
  if (name == "index") return Value::integer(index + 1);
  if (name == "index0") return Value::integer(index);
  if (name == "first") return Value::boolean(index == 0);
  if (name == "last") return Value::boolean(index + 1 == length);
  if (name == "length") return Value::integer(length);
  if (name == "revindex") return Value::integer(length - index);
  if (name == "revindex0") return Value::integer(length - index - 1);
  if (name == "depth") return Value::integer(loop->nesting + 1);
  if (name == "depth0") return Value::integer(loop->nesting);
  if (name == "previtem") {
    if (index == 0) return Value::undefined_because("UndefinedError", "there is no previous item");
    return loop->items->items[loop->index - 1];
  }
  if (name == "nextitem") {
    if (index + 1 == length)
      return Value::undefined_because("UndefinedError", "there is no next item");
    return loop->items->items[loop->index + 1];
  }
  if (name == "cycle" || name == "changed") {
    auto method = std::make_shared<Callable>();
    method->name = std::string(name);
    method->type_name = "method";
    method->depth = loop->depth + 1;
    // A weak reference: a loop may remember the method in `changed`.
    const std::weak_ptr<LoopObject> weak = loop;
    if (name == "cycle") {
      method->call = [weak](Evaluator&, Arguments& args) {
        if (args.positional.empty()) raise("TypeError", "no items for cycling given");
        const auto self = weak.lock();
        return args.positional[(self ? self->index : 0) % args.positional.size()];
      };
    } else {
      method->call = [weak](Evaluator&, Arguments& args) {
        const auto self = weak.lock();
        if (!self) return Value::boolean(true);
        const bool same = self->has_last_changed &&
                          self->last_changed.size() == args.positional.size() &&
                          std::equal(args.positional.begin(), args.positional.end(),
                                     self->last_changed.begin(), equal);
        // A loop that remembered itself would keep itself alive.
        for (const Value& item : args.positional) {
          if (item.kind() == Kind::kLoop || item.kind() == Kind::kNamespace ||
              item.depth() >= self->depth) {
            raise_limit("loop.changed() of this value is not supported");
          }
        }
        self->has_last_changed = true;
        self->last_changed = args.positional;
        return Value::boolean(!same);
      };
    }
    return Value::object(Kind::kCallable, std::move(method));
  }
  return Value::undefined_attribute(value, name);
}

Value Evaluator::get_attribute(const Value& owner, std::string_view name) {
  if (owner.is_undefined()) raise_undefined(owner);
  Value method;
  if (find_method(owner, name, method)) return method;
  switch (owner.kind()) {
    case Kind::kDict:
      if (const Value* value = owner.dict().find(name)) return *value;
      break;
    case Kind::kNamespace:
      if (const Value* value = owner.namespace_dict().find(name)) return *value;
      break;
    case Kind::kLoop: return loop_attribute(owner, name);
    case Kind::kTuple:
      if (owner.list().is_group && name == "grouper") return owner.items()[0];
      if (owner.list().is_group && name == "list") return owner.items()[1];
      break;
    case Kind::kCallable:
      if (name == "name" && owner.callable().type_name == "Macro") {
        return Value::data(owner.callable().name);
      }
      break;
    default: break;
  }
  if (name.size() > 4 && name.starts_with("__") && name.ends_with("__")) {
    return Value::undefined_because("SecurityError",
                                    fmt::format("access to attribute {} of '{}' object is unsafe.",
                                                repr_string(name), type_name(owner)));
  }
  return Value::undefined_attribute(owner, name);
}

Value Evaluator::get_item(const Value& owner, const Value& key) {
  if (owner.is_undefined()) raise_undefined(owner);
  int64_t index = 0;
  switch (owner.kind()) {
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
      if (to_index(key, index)) {
        const auto size = static_cast<int64_t>(owner.items().size());
        if (index < 0) index += size;
        if (index >= 0 && index < size) return owner.items()[static_cast<size_t>(index)];
        return Value::undefined_element(owner, key);
      }
      break;
    case Kind::kString:
      if (to_index(key, index)) {
        const std::string& text = owner.str();
        step(text.size() / 64);
        if (index < 0) index += static_cast<int64_t>(count_code_points(text));
        if (index >= 0 && index < static_cast<int64_t>(text.size())) {
          const size_t begin = byte_offset(text, static_cast<size_t>(index));
          if (begin < text.size()) {
            size_t end = begin;
            next_code_point(text, end);
            return make_string(owner.text().sub(begin, end));
          }
        }
        return Value::undefined_element(owner, key);
      }
      break;
    case Kind::kDict:
      if (key.kind() != Kind::kList && key.kind() != Kind::kDict && key.kind() != Kind::kDictView) {
        if (const Value* value = owner.dict().find(key)) return *value;
      }
      break;
    default: break;
  }
  if (key.is_string()) {
    // obj["name"] falls back to obj.name, without dict items (those were looked at above).
    if (owner.kind() == Kind::kNamespace || owner.kind() == Kind::kLoop ||
        owner.kind() == Kind::kTuple || owner.kind() == Kind::kCallable) {
      return get_attribute(owner, key.str());
    }
    Value method;
    if (find_method(owner, key.str(), method)) return method;
  }
  return Value::undefined_element(owner, key);
}

Value Evaluator::slice(const Value& owner, const Value& start, const Value& stop,
                       const Value& step_value) {
  if (owner.is_undefined()) raise_undefined(owner);
  if (!owner.is_string() && owner.kind() != Kind::kList && owner.kind() != Kind::kTuple &&
      owner.kind() != Kind::kRange) {
    raise("TypeError", owner.is_dict()
                           ? "unhashable type: 'slice'"
                           : fmt::format("'{}' object is not subscriptable", type_name(owner)));
  }
  for (const Value* bound : {&start, &stop, &step_value}) {
    if (!bound->is_none() && !bound->is_int_like()) {
      raise("TypeError", "slice indices must be integers or None or have an __index__ method");
    }
  }
  const int64_t stride = step_value.is_none() ? 1 : step_value.as_int();
  if (stride == 0) raise("ValueError", "slice step cannot be zero");
  const bool is_string = owner.is_string();
  if (is_string) step(owner.str().size() / 64);
  const auto size =
      static_cast<int64_t>(is_string ? count_code_points(owner.str()) : owner.items().size());
  const int64_t low = stride > 0 ? 0 : -1;
  const int64_t high = stride > 0 ? size : size - 1;
  const auto clamp = [&](const Value& bound, int64_t absent) {
    if (bound.is_none()) return absent;
    int64_t at = bound.as_int();
    if (at < 0) at = at < -size ? low : at + size;
    return std::clamp(at, low, std::max(low, high));
  };
  const int64_t from = clamp(start, stride > 0 ? low : high);
  const int64_t to = clamp(stop, stride > 0 ? high : low);
  if (is_string && stride == 1) {
    if (from >= to) return make_string(Text());
    const size_t begin = byte_offset(owner.str(), static_cast<size_t>(from));
    const std::string_view rest = std::string_view(owner.str()).substr(begin);
    const size_t length = byte_offset(rest, static_cast<size_t>(to - from));
    Text text = owner.text().sub(begin, begin + length);
    text.markup = owner.text().markup;
    return make_string(std::move(text));
  }
  std::vector<size_t> picks;
  const int64_t jump = std::clamp<int64_t>(stride, -size - 1, size + 1);
  for (int64_t i = from; stride > 0 ? i < to : i > to; i += jump) {
    picks.push_back(static_cast<size_t>(i));
  }
  step(picks.size() / 8);
  charge(picks.size() * sizeof(Value));
  if (is_string) {
    std::vector<size_t> offsets;
    charge(owner.str().size() * 8);
    for (size_t i = 0; i < owner.str().size();) {
      offsets.push_back(i);
      next_code_point(owner.str(), i);
    }
    offsets.push_back(owner.str().size());
    Text text;
    for (const size_t i : picks) text.append_range(owner.text(), offsets[i], offsets[i + 1]);
    return make_string(std::move(text));
  }
  std::vector<Value> items;
  items.reserve(picks.size());
  for (const size_t i : picks) items.push_back(owner.items()[i]);
  return make_list(std::move(items), owner.kind() == Kind::kTuple ? Kind::kTuple : Kind::kList);
}

Value Evaluator::add(const Value& left, const Value& right) {
  if (left.is_undefined()) raise_undefined(left);
  if (right.is_undefined()) raise_undefined(right);
  if (left.is_string() && right.is_string()) {
    const bool markup = left.text().markup || right.text().markup;
    Text text = markup && !left.text().markup ? escape_html(left.text()) : left.text();
    text.append(markup && !right.text().markup ? escape_html(right.text()) : right.text());
    text.markup = markup;
    return make_string(std::move(text));
  }
  if (left.kind() == right.kind() && (left.kind() == Kind::kList || left.kind() == Kind::kTuple)) {
    std::vector<Value> items = left.items();
    items.insert(items.end(), right.items().begin(), right.items().end());
    return make_list(std::move(items), left.kind());
  }
  if (left.is_string() || left.kind() == Kind::kList || left.kind() == Kind::kTuple) {
    const std::string type = left.is_string() ? "str" : type_name(left);
    raise("TypeError",
          fmt::format("can only concatenate {} (not \"{}\") to {}", type, type_name(right), type));
  }
  return arithmetic("+", left, right);
}

Value Evaluator::multiply(const Value& left, const Value& right) {
  const bool left_repeats =
      left.is_string() || left.kind() == Kind::kList || left.kind() == Kind::kTuple;
  const bool right_repeats =
      right.is_string() || right.kind() == Kind::kList || right.kind() == Kind::kTuple;
  if (!left_repeats && !right_repeats) return arithmetic("*", left, right);
  const Value& sequence = left_repeats ? left : right;
  const Value& times = left_repeats ? right : left;
  if (times.is_undefined()) raise_undefined(times);
  if (!times.is_int_like()) {
    raise("TypeError",
          fmt::format("can't multiply sequence by non-int of type '{}'", type_name(times)));
  }
  const auto count = static_cast<uint64_t>(std::max<int64_t>(0, times.as_int()));
  const size_t length = sequence.is_string() ? sequence.str().size() : sequence.items().size();
  const size_t unit = sequence.is_string() ? 1 : sizeof(Value);
  if (length > 0 && count > options_.limits.max_string_bytes / (length * unit)) {
    raise_limit(
        fmt::format("repeating a sequence of {} {} times is longer than allowed", length, count));
  }
  step(count);
  if (sequence.is_string()) {
    Text text;
    for (uint64_t i = 0; i < count; ++i) text.append(sequence.text());
    text.markup = sequence.text().markup;
    return make_string(std::move(text));
  }
  std::vector<Value> items;
  for (uint64_t i = 0; i < count && length > 0; ++i) {
    items.insert(items.end(), sequence.items().begin(), sequence.items().end());
  }
  return make_list(std::move(items), sequence.kind());
}

Value Evaluator::arithmetic(std::string_view op, const Value& left, const Value& right) {
  for (const Value* side : {&left, &right}) {
    if (side->is_undefined()) raise_undefined(*side);
  }
  if (left.kind() == Kind::kBigInt || right.kind() == Kind::kBigInt) raise_too_big();
  if (!left.is_number() || !right.is_number()) {
    raise("TypeError",
          fmt::format("unsupported operand type(s) for {}: '{}' and '{}'",
                      op == "**" ? "** or pow()" : op, type_name(left), type_name(right)));
  }
  if (left.is_int_like() && right.is_int_like() && op != "/") {
    const int64_t a = left.as_int();
    const int64_t b = right.as_int();
    int64_t out = 0;
    if (op == "+") {
      if (__builtin_add_overflow(a, b, &out)) raise_too_big();
      return Value::integer(out);
    }
    if (op == "-") {
      if (__builtin_sub_overflow(a, b, &out)) raise_too_big();
      return Value::integer(out);
    }
    if (op == "*") {
      if (__builtin_mul_overflow(a, b, &out)) raise_too_big();
      return Value::integer(out);
    }
    if (op == "//" || op == "%") {
      if (b == 0) {
        raise("ZeroDivisionError",
              op == "%" ? "integer modulo by zero" : "integer division or modulo by zero");
      }
      if (b == -1) {
        if (op == "%") return Value::integer(0);
        if (a == INT64_MIN) raise_too_big();
        return Value::integer(-a);
      }
      int64_t quotient = a / b;
      int64_t remainder = a % b;
      if (remainder != 0 && (remainder < 0) != (b < 0)) {
        --quotient;
        remainder += b;
      }
      return Value::integer(op == "%" ? remainder : quotient);
    }
    if (b >= 0) {  // **
      int64_t result = 1;
      int64_t base = a;
      for (int64_t exponent = b; exponent > 0; exponent >>= 1) {
        if ((exponent & 1) != 0 && __builtin_mul_overflow(result, base, &result)) raise_too_big();
        if (exponent > 1 && __builtin_mul_overflow(base, base, &base)) raise_too_big();
      }
      return Value::integer(result);
    }
    if (a == 0) {
      raise("ZeroDivisionError", "0.0 cannot be raised to a negative power");
    }
    return Value::number(std::pow(static_cast<double>(a), static_cast<double>(b)));
  }
  const double a = left.as_float();
  const double b = right.as_float();
  if (op == "+") return Value::number(a + b);
  if (op == "-") return Value::number(a - b);
  if (op == "*") return Value::number(a * b);
  if (op == "/") {
    if (b == 0) {
      raise("ZeroDivisionError", left.is_int_like() && right.is_int_like()
                                     ? "division by zero"
                                     : "float division by zero");
    }
    return Value::number(a / b);
  }
  if (op == "**") {
    if (a == 0 && b < 0) raise("ZeroDivisionError", "0.0 cannot be raised to a negative power");
    if (a < 0 && b != std::floor(b)) raise_limit("complex numbers are not supported");
    const double power = std::pow(a, b);
    if (std::isinf(power) && !std::isinf(a) && !std::isinf(b)) {
      raise("OverflowError", "(34, 'Numerical result out of range')");
    }
    return Value::number(power);
  }
  if (b == 0) {
    raise("ZeroDivisionError", op == "%" ? "float modulo" : "float floor division by zero");
  }
  double remainder = std::fmod(a, b);
  double quotient = (a - remainder) / b;
  if (remainder != 0) {
    if ((b < 0) != (remainder < 0)) {
      remainder += b;
      quotient -= 1.0;
    }
  } else {
    remainder = std::copysign(0.0, b);
  }
  if (op == "%") return Value::number(remainder);
  double whole = std::floor(quotient);
  if (quotient - whole > 0.5) whole += 1.0;
  if (quotient == 0) whole = std::copysign(0.0, a / b);
  return Value::number(whole);
}

Value Evaluator::binary(std::string_view op, const Value& left, const Value& right) {
  if (op == "+") return add(left, right);
  if (op == "*") return multiply(left, right);
  if (op == "%" && left.is_string()) return percent_format(*this, left, right);
  return arithmetic(op, left, right);
}

bool Evaluator::contains(const Value& container, const Value& item) {
  switch (container.kind()) {
    case Kind::kUndefined: return false;
    case Kind::kString: {
      if (!item.is_string()) {
        raise("TypeError", fmt::format("'in <string>' requires string as left operand, not {}",
                                       type_name(item)));
      }
      step((container.str().size() + item.str().size()) / 64);
      if (item.str().empty()) return true;
      return memmem(container.str().data(), container.str().size(), item.str().data(),
                    item.str().size()) != nullptr;
    }
    case Kind::kDict: return container.dict().find(item) != nullptr;
    case Kind::kNone:
    case Kind::kBool:
    case Kind::kInt:
    case Kind::kBigInt:
    case Kind::kFloat:
    case Kind::kNamespace:
    case Kind::kCallable:
    case Kind::kCycler:
    case Kind::kJoiner:
      raise("TypeError",
            fmt::format("argument of type '{}' is not iterable", type_name(container)));
    default: {
      for (const Value& candidate : iterate(container)) {
        if (compare("==", candidate, item)) return true;
      }
      return false;
    }
  }
}

bool Evaluator::compare(std::string_view op, const Value& left, const Value& right) {
  if (op == "in") return contains(right, left);
  if (op == "not in") return !contains(right, left);
  step(1 + std::min(left.weight(), right.weight()));
  if (op == "==") return equal(left, right);
  if (op == "!=") return !equal(left, right);
  const bool has_nan = (left.kind() == Kind::kFloat && std::isnan(left.as_float())) ||
                       (right.kind() == Kind::kFloat && std::isnan(right.as_float()));
  if (op == "<") return less(left, right, op);
  if (op == ">") return less(right, left, op, true);
  if (op == "<=") return !less(right, left, op, true) && !has_nan;
  return !less(left, right, op) && !has_nan;
}

}  // namespace nibble::jinja
