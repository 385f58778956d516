// Jinja's filters of sequences and mappings: picking, sorting, grouping, reducing.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <charconv>

#include "text/jinja_eval.h"
#include "text/jinja_filters.h"
#include "text/jinja_text_ops.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {
namespace {

using Values = std::vector<Value>;

Value get_path(Evaluator& eval, Value item, const Value& attribute, const Value* fallback) {
  std::vector<Value> parts;
  if (attribute.is_string()) {
    std::string_view rest = attribute.str();
    for (;;) {
      const size_t dot = rest.find('.');
      const std::string_view part = rest.substr(0, dot);
      int64_t number = 0;
      const auto [end, ec] = std::from_chars(part.data(), part.data() + part.size(), number);
      if (!part.empty() && ec == std::errc() && end == part.data() + part.size() &&
          part[0] != '-') {
        parts.push_back(Value::integer(number));
      } else {
        parts.push_back(Value::data(part));
      }
      if (dot == rest.npos) break;
      rest.remove_prefix(dot + 1);
    }
  } else {
    parts.push_back(attribute);
  }
  for (const Value& part : parts) {
    item = eval.get_item(item, part);
    if (item.is_undefined() && fallback != nullptr) item = *fallback;
  }
  return item;
}

Value fold_case(const Value& value) {
  return value.is_string() ? Value::data(to_lower(value.str())) : value;
}

Value sort_key(Evaluator& eval, const Value& item, const Value& attribute, bool case_sensitive) {
  if (attribute.is_undefined() || attribute.is_none())
    return case_sensitive ? item : fold_case(item);
  if (attribute.is_string() && attribute.str().find(',') != std::string::npos) {
    Values keys;
    std::string_view rest = attribute.str();
    for (;;) {
      const size_t comma = rest.find(',');
      const Value key = get_path(eval, item, Value::data(rest.substr(0, comma)), nullptr);
      keys.push_back(case_sensitive ? key : fold_case(key));
      if (comma == rest.npos) break;
      rest.remove_prefix(comma + 1);
    }
    return eval.make_list(std::move(keys));
  }
  const Value key = get_path(eval, item, attribute, nullptr);
  return case_sensitive ? key : fold_case(key);
}

Values sorted(Evaluator& eval, const Values& items, const Values& keys, bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    eval.step();
    return reverse ? eval.compare("<", keys[b], keys[a]) : eval.compare("<", keys[a], keys[b]);
  });
  Values out;
  out.reserve(items.size());
  for (const size_t i : order) out.push_back(items[i]);
  return out;
}

Value filter_join(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_join", args, {"d", "attribute"}, v);
  const Text separator = v[0].is_undefined() ? Text() : eval.text_of(v[0]);
  Text out;
  bool first = true;
  for (const Value& item : eval.iterate(input)) {
    if (!first) {
      eval.charge(separator.size());
      out.append(separator);
    }
    first = false;
    out.append(eval.text_of(
        v[1].is_undefined() || v[1].is_none() ? item : get_path(eval, item, v[1], nullptr)));
  }
  return eval.make_string(std::move(out));
}

Value no_item(std::string_view what) {
  return Value::undefined_because("UndefinedError",
                                  fmt::format("No {} item, sequence was empty.", what));
}

Value filter_first(Evaluator& eval, const Value& input, Arguments&) {
  const Values items = eval.iterate(input);
  return items.empty() ? no_item("first") : items.front();
}

Value filter_last(Evaluator& eval, const Value& input, Arguments&) {
  if (input.kind() == Kind::kGenerator) raise("TypeError", "'generator' object is not reversible");
  const Values items = eval.iterate(input);
  return items.empty() ? no_item("last") : items.back();
}

/// map("filter", ...) and map(attribute=...): calls fn(item) for each.
Value filter_map(Evaluator& eval, const Value& input, Arguments& args) {
  Values out;
  const Values items = eval.iterate(input);
  if (args.positional.empty()) {
    Value attribute, fallback;
    bool has_attribute = false, has_fallback = false;
    for (auto& [name, value] : args.keyword) {
      if (name == "attribute") {
        attribute = value;
        has_attribute = true;
      } else if (name == "default") {
        fallback = value;
        has_fallback = true;
      }
    }
    if (!has_attribute) raise("FilterArgumentError", "map requires a filter argument");
    for (auto& [name, value] : args.keyword) {
      if (name != "attribute" && name != "default") {
        raise("FilterArgumentError",
              fmt::format("Unexpected keyword argument {}", repr_string(name)));
      }
    }
    for (const Value& item : items) {
      eval.step();
      out.push_back(get_path(eval, item, attribute, has_fallback ? &fallback : nullptr));
    }
  } else {
    const std::string name = eval.text_of(args.positional[0]).str();
    for (const Value& item : items) {
      eval.step();
      Arguments inner{{args.positional.begin() + 1, args.positional.end()}, args.keyword};
      out.push_back(apply_filter(eval, name, item, inner));
    }
  }
  return eval.make_list(std::move(out), Kind::kGenerator);
}

Value select_or_reject(Evaluator& eval, const Value& input, Arguments& args, bool keep,
                       bool by_attribute) {
  size_t next = 0;
  Value attribute;
  if (by_attribute) {
    if (args.positional.empty())
      raise("FilterArgumentError", "Missing parameter for attribute name");
    attribute = args.positional[next++];
  }
  std::string test;
  if (next < args.positional.size()) test = eval.text_of(args.positional[next++]).str();
  const bool has_test = next > (by_attribute ? 1u : 0u);
  Values out;
  for (const Value& item : eval.iterate(input)) {
    eval.step();
    const Value subject = by_attribute ? get_path(eval, item, attribute, nullptr) : item;
    bool passes = false;
    if (has_test) {
      Arguments inner{
          {args.positional.begin() + static_cast<ptrdiff_t>(next), args.positional.end()},
          args.keyword};
      passes = apply_test(eval, test, subject, inner);
    } else {
      passes = truthy(subject);
    }
    if (passes == keep) out.push_back(item);
  }
  return eval.make_list(std::move(out), Kind::kGenerator);
}

Value filter_select(Evaluator& e, const Value& v, Arguments& a) {
  return select_or_reject(e, v, a, true, false);
}
Value filter_reject(Evaluator& e, const Value& v, Arguments& a) {
  return select_or_reject(e, v, a, false, false);
}
Value filter_selectattr(Evaluator& e, const Value& v, Arguments& a) {
  return select_or_reject(e, v, a, true, true);
}
Value filter_rejectattr(Evaluator& e, const Value& v, Arguments& a) {
  return select_or_reject(e, v, a, false, true);
}

Value filter_sort(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_sort", args, {"reverse", "case_sensitive", "attribute"}, v);
  const Values items = eval.iterate(input);
  Values keys;
  for (const Value& item : items) keys.push_back(sort_key(eval, item, v[2], truthy(v[1])));
  return eval.make_list(sorted(eval, items, keys, truthy(v[0])));
}

Value filter_unique(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_unique", args, {"case_sensitive", "attribute"}, v);
  DictObject seen;
  Values out;
  for (const Value& item : eval.iterate(input)) {
    eval.step(item.weight());
    const Value key = sort_key(eval, item, v[1], truthy(v[0]));
    if (seen.find(key) != nullptr) continue;
    seen.set(key, Value::none());
    out.push_back(item);
  }
  return eval.make_list(std::move(out), Kind::kGenerator);
}

Value extreme(Evaluator& eval, const Value& input, Arguments& args, bool largest) {
  Values v;
  bind_arguments(largest ? "do_max" : "do_min", args, {"case_sensitive", "attribute"}, v);
  const Values items = eval.iterate(input);
  if (items.empty()) {
    return Value::undefined_because("UndefinedError", "No aggregated item, sequence was empty.");
  }
  size_t best = 0;
  Value best_key = sort_key(eval, items[0], v[1], truthy(v[0]));
  for (size_t i = 1; i < items.size(); ++i) {
    const Value key = sort_key(eval, items[i], v[1], truthy(v[0]));
    if (eval.compare(largest ? ">" : "<", key, best_key)) {
      best = i;
      best_key = key;
    }
  }
  return items[best];
}

Value filter_min(Evaluator& e, const Value& v, Arguments& a) { return extreme(e, v, a, false); }
Value filter_max(Evaluator& e, const Value& v, Arguments& a) { return extreme(e, v, a, true); }

Value filter_sum(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("sum", args, {"attribute", "start"}, v);
  Value total = v[1].is_undefined() ? Value::integer(0) : v[1];
  if (total.is_string()) raise("TypeError", "sum() can't sum strings [use ''.join(seq) instead]");
  for (const Value& item : eval.iterate(input)) {
    eval.step();
    total = eval.add(
        total, v[0].is_undefined() || v[0].is_none() ? item : get_path(eval, item, v[0], nullptr));
  }
  return total;
}

Value pair_of(Evaluator& eval, const Value& a, const Value& b) {
  return eval.make_list({a, b}, Kind::kTuple);
}

Value filter_items(Evaluator& eval, const Value& input, Arguments&) {
  if (input.is_undefined()) return eval.make_list({}, Kind::kGenerator);
  if (!input.is_dict()) raise("TypeError", "Can only get item pairs from a mapping.");
  Values out;
  for (const auto& [key, value] : input.dict().entries) out.push_back(pair_of(eval, key, value));
  return eval.make_list(std::move(out), Kind::kGenerator);
}

Value filter_dictsort(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_dictsort", args, {"case_sensitive", "by", "reverse"}, v);
  const std::string by = v[1].is_undefined() ? "key" : eval.text_of(v[1]).str();
  if (by != "key" && by != "value") {
    raise("FilterArgumentError", "You can only sort by either \"key\" or \"value\"");
  }
  if (!input.is_dict()) {
    if (input.is_undefined()) raise(input.undefined_info().type, input.undefined_info().message);
    raise("AttributeError", fmt::format("'{}' object has no attribute 'items'", type_name(input)));
  }
  Values pairs, keys;
  for (const auto& [key, value] : input.dict().entries) {
    pairs.push_back(pair_of(eval, key, value));
    const Value& chosen = by == "key" ? key : value;
    keys.push_back(truthy(v[0]) ? chosen : fold_case(chosen));
  }
  return eval.make_list(sorted(eval, pairs, keys, truthy(v[2])));
}

Value filter_groupby(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_groupby", args, {"attribute", "default", "case_sensitive"}, v, 1);
  const bool case_sensitive = truthy(v[2]);
  const Values items = eval.iterate(input);
  Values keys, raw;
  for (const Value& item : items) {
    raw.push_back(get_path(eval, item, v[0], v[1].is_undefined() ? nullptr : &v[1]));
    keys.push_back(case_sensitive ? raw.back() : fold_case(raw.back()));
  }
  Values order;
  for (size_t i = 0; i < items.size(); ++i)
    order.push_back(Value::integer(static_cast<int64_t>(i)));
  order = sorted(eval, order, keys, false);
  Values out;
  for (size_t i = 0; i < order.size();) {
    const auto first = static_cast<size_t>(order[i].as_int());
    Values members;
    for (; i < order.size() && equal(keys[static_cast<size_t>(order[i].as_int())], keys[first]);
         ++i) {
      members.push_back(items[static_cast<size_t>(order[i].as_int())]);
    }
    if (members.empty()) {  // NaN is not equal to itself
      members.push_back(items[first]);
      ++i;
    }
    const Value group = pair_of(eval, raw[first], eval.make_list(std::move(members)));
    std::static_pointer_cast<ListObject>(group.object())->is_group = true;
    out.push_back(group);
  }
  return eval.make_list(std::move(out));
}

Value filter_reverse(Evaluator& eval, const Value& input, Arguments&) {
  if (input.is_string()) {
    return eval.slice(input, Value::none(), Value::none(), Value::integer(-1));
  }
  if (input.kind() == Kind::kGenerator || !(input.is_list_like() || input.is_dict())) {
    const Values checked = eval.iterate(input);  // raises for what cannot be iterated
    return eval.make_list({checked.rbegin(), checked.rend()});
  }
  const Values items = eval.iterate(input);
  return eval.make_list({items.rbegin(), items.rend()}, Kind::kGenerator);
}

Value filter_batch(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_batch", args, {"linecount", "fill_with"}, v, 1);
  const int64_t size = std::max<int64_t>(1, want_int(v[0]));
  Values out, row;
  for (const Value& item : eval.iterate(input)) {
    if (static_cast<int64_t>(row.size()) == size)
      out.push_back(eval.make_list(std::exchange(row, {})));
    row.push_back(item);
  }
  if (!row.empty()) {
    if (!v[1].is_undefined() && !v[1].is_none()) {
      eval.charge(static_cast<size_t>(std::min<int64_t>(size, INT32_MAX)) * sizeof(Value));
      while (static_cast<int64_t>(row.size()) < size) row.push_back(v[1]);
    }
    out.push_back(eval.make_list(std::move(row)));
  }
  return eval.make_list(std::move(out), Kind::kGenerator);
}

Value filter_slice(Evaluator& eval, const Value& input, Arguments& args) {
  Values v;
  bind_arguments("do_slice", args, {"slices", "fill_with"}, v, 1);
  const Values items = eval.iterate(input);
  const int64_t slices = want_int(v[0]);
  if (slices <= 0) raise("ZeroDivisionError", "integer division or modulo by zero");
  eval.charge(static_cast<size_t>(std::min<int64_t>(slices, INT32_MAX)) * 128);
  const int64_t size = static_cast<int64_t>(items.size());
  const int64_t per = size / slices, extra = size % slices;
  Values out;
  int64_t offset = 0;
  for (int64_t i = 0; i < slices; ++i) {
    const int64_t begin = offset + i * per;
    if (i < extra) ++offset;
    const int64_t end = offset + (i + 1) * per;
    Values part(items.begin() + begin, items.begin() + end);
    if (!v[1].is_undefined() && !v[1].is_none() && i >= extra) part.push_back(v[1]);
    out.push_back(eval.make_list(std::move(part)));
  }
  return eval.make_list(std::move(out), Kind::kGenerator);
}

Value filter_random(Evaluator& eval, const Value& input, Arguments&) {
  const Values items = eval.iterate(input);
  if (items.empty()) return no_item("random");
  return items[eval.random() % items.size()];
}

constexpr auto kFilters = std::to_array<Filter>({
    {"batch", filter_batch},
    {"dictsort", filter_dictsort},
    {"first", filter_first},
    {"groupby", filter_groupby},
    {"items", filter_items},
    {"join", filter_join},
    {"last", filter_last},
    {"map", filter_map},
    {"max", filter_max},
    {"min", filter_min},
    {"random", filter_random},
    {"reject", filter_reject},
    {"rejectattr", filter_rejectattr},
    {"reverse", filter_reverse},
    {"select", filter_select},
    {"selectattr", filter_selectattr},
    {"slice", filter_slice},
    {"sort", filter_sort},
    {"sum", filter_sum},
    {"unique", filter_unique},
});

}  // namespace

std::span<const Filter> sequence_filters() { return kFilters; }

}  // namespace nibble::jinja
