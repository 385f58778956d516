// SPDX-License-Identifier: Apache-2.0
#include "text/json_schema.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <set>
#include <utility>
#include <vector>

#include "base/error.h"

namespace nibble {
namespace {

constexpr int kMaxNesting = 64;   // of conjunctions and references within one another
constexpr int kMaxMerges = 2000;  // of a whole schema

constexpr std::string_view kHonoured[] = {"$ref",
                                          "additionalProperties",
                                          "allOf",
                                          "anyOf",
                                          "const",
                                          "enum",
                                          "exclusiveMaximum",
                                          "exclusiveMinimum",
                                          "format",
                                          "items",
                                          "maxItems",
                                          "maxLength",
                                          "maximum",
                                          "minItems",
                                          "minLength",
                                          "minimum",
                                          "oneOf",
                                          "pattern",
                                          "prefixItems",
                                          "properties",
                                          "required",
                                          "type"};

constexpr std::string_view kAnnotations[] = {
    "$comment", "$defs",       "$id",        "$schema",     "contentEncoding", "contentMediaType",
    "default",  "definitions", "deprecated", "description", "discriminator",   "example",
    "examples", "readOnly",    "title",      "writeOnly"};

struct TypeName {
  std::string_view name;
  uint8_t bits;
};
constexpr TypeName kTypes[] = {
    {"null", JsonTypes::kNull},       {"boolean", JsonTypes::kBoolean},
    {"integer", JsonTypes::kInteger}, {"number", JsonTypes::kNumber | JsonTypes::kInteger},
    {"string", JsonTypes::kString},   {"array", JsonTypes::kArray},
    {"object", JsonTypes::kObject}};

template <size_t N>
bool contains(const std::string_view (&list)[N], std::string_view word) {
  return std::find(std::begin(list), std::end(list), word) != std::end(list);
}

bool is_number(const json::value& value) { return value.is_number(); }
double to_double(const json::value& value) { return value.to_number<double>(); }

const json::value* find(const json::value& schema, std::string_view keyword) {
  return schema.is_object() ? schema.get_object().if_contains(keyword) : nullptr;
}

/// The values that `const` and `enum` leave; nothing when there are neither.
std::optional<json::array> listed_values(const json::value& schema) {
  if (const auto* constant = find(schema, "const")) return json::array{*constant};
  if (const auto* options = find(schema, "enum"); options != nullptr && options->is_array()) {
    return options->get_array();
  }
  return std::nullopt;
}

std::set<std::string> required_names(const json::value& schema) {
  std::set<std::string> names;
  if (const auto* required = find(schema, "required"); required && required->is_array()) {
    for (const auto& name : required->get_array()) {
      if (name.is_string()) names.emplace(name.get_string());
    }
  }
  return names;
}

}  // namespace

uint8_t JsonTypes::of_value(const json::value& value) {
  switch (value.kind()) {
    case json::kind::null: return kNull;
    case json::kind::bool_: return kBoolean;
    case json::kind::int64:
    case json::kind::uint64: return kInteger;
    case json::kind::double_: return kNumber;
    case json::kind::string: return kString;
    case json::kind::array: return kArray;
    case json::kind::object: return kObject;
  }
  return 0;
}

uint8_t JsonTypes::of_name(std::string_view name) {
  for (const TypeName& type : kTypes) {
    if (type.name == name) return type.bits;
  }
  return 0;
}

void JsonSchema::wrong(std::string_view path, std::string_view keyword, const json::value& value,
                       std::string_view wanted) const {
  std::string shown = dump_json(value, {.ensure_ascii = true});
  if (shown.size() > 80) shown = shown.substr(0, 77) + "...";
  fail(ErrorKind::kInput, "{}{}{}{} is {}, but must be {}", what_, path.empty() ? "" : " at ", path,
       keyword.empty() ? "" : fmt::format(": \"{}\"", keyword), shown, wanted);
}

void JsonSchema::unsupported(std::string_view path, std::string_view problem) const {
  fail(ErrorKind::kUnsupported, "{}{}{}: {}", what_, path.empty() ? "" : " at ", path, problem);
}

bool JsonSchema::is_constraint(std::string_view keyword) {
  return !contains(kAnnotations, keyword) && !keyword.starts_with("x-");
}

bool JsonSchema::has_constraints(const json::object& schema) {
  return std::any_of(schema.begin(), schema.end(),
                     [](const auto& member) { return is_constraint(member.key()); });
}

void JsonSchema::check_keywords(const json::object& schema, std::string_view path) const {
  for (const auto& member : schema) {
    const std::string_view keyword = member.key();
    if (!is_constraint(keyword) || contains(kHonoured, keyword)) continue;
    if (keyword == "uniqueItems" && member.value() == json::value(false)) continue;
    unsupported(path, fmt::format("the keyword \"{}\" is not supported; leave it out and check the "
                                  "answer yourself",
                                  keyword.substr(0, 60)));
  }
}

const json::value& JsonSchema::resolve(const json::value& ref, std::string_view path) const {
  if (!ref.is_string()) wrong(path, "$ref", ref, "a string");
  const std::string_view pointer = ref.get_string();
  if (!pointer.starts_with('#') || (pointer.size() > 1 && pointer[1] != '/')) {
    unsupported(path, fmt::format("\"$ref\" is \"{}\", but only references into the schema itself "
                                  "(\"#/$defs/NAME\") are supported",
                                  pointer.substr(0, 80)));
  }
  const json::value* at = &document_;
  for (size_t begin = 1; at != nullptr && begin < pointer.size();) {
    const size_t end = std::min(pointer.find('/', begin + 1), pointer.size());
    std::string step;
    for (size_t i = begin + 1; i < end; ++i) {
      int byte = 0;
      if (pointer[i] == '%' && i + 2 < end &&
          std::from_chars(pointer.data() + i + 1, pointer.data() + i + 3, byte, 16).ptr ==
              pointer.data() + i + 3) {
        step += static_cast<char>(byte);
        i += 2;
      } else if (pointer[i] == '~' && i + 1 < end &&
                 (pointer[i + 1] == '0' || pointer[i + 1] == '1')) {
        step += pointer[++i] == '0' ? '~' : '/';
      } else {
        step += pointer[i];
      }
    }
    if (at->is_array()) {
      size_t index = 0;
      const auto [stop, ec] = std::from_chars(step.data(), step.data() + step.size(), index);
      const bool good = ec == std::errc() && stop == step.data() + step.size();
      at = good ? at->get_array().if_contains(index) : nullptr;
    } else {
      at = find(*at, step);
    }
    begin = end;
  }
  if (at == nullptr) {
    fail(ErrorKind::kInput, "{}{}{}: \"$ref\" is \"{}\", but the schema has nothing there", what_,
         path.empty() ? "" : " at ", path, pointer.substr(0, 80));
  }
  return *at;
}

const json::value& JsonSchema::follow(const json::value& schema, std::string_view path) const {
  const json::value* at = &schema;
  for (int i = 0; i < kMaxNesting; ++i) {
    const auto* ref = find(*at, "$ref");
    const auto* all = find(*at, "allOf");
    if (ref != nullptr) {
      at = &resolve(*ref, path);
    } else if (all != nullptr && all->is_array() && all->get_array().size() == 1) {
      at = &all->get_array()[0];
    } else {
      break;
    }
  }
  return *at;
}

uint8_t JsonSchema::types(const json::object& schema, std::string_view path) const {
  constexpr std::string_view kWanted =
      "one of \"object\", \"array\", \"string\", \"number\", \"integer\", \"boolean\", \"null\", "
      "or "
      "an array of them";
  if (const auto* type = schema.if_contains("type")) {
    uint8_t bits = 0;
    const auto add = [&](const json::value& name) {
      const uint8_t bit = name.is_string() ? JsonTypes::of_name(name.get_string()) : 0;
      if (bit == 0) wrong(path, "type", *type, kWanted);
      bits |= bit;
    };
    if (type->is_array()) {
      for (const auto& name : type->get_array()) add(name);
    } else {
      add(*type);
    }
    if (bits == 0) wrong(path, "type", *type, kWanted);
    return bits;
  }
  uint8_t bits = 0;
  const auto speaks_of = [&](std::initializer_list<std::string_view> keywords, uint8_t bit) {
    for (const std::string_view keyword : keywords) {
      if (schema.contains(keyword)) bits |= bit;
    }
  };
  speaks_of({"properties", "required", "additionalProperties"}, JsonTypes::kObject);
  speaks_of({"items", "prefixItems", "minItems", "maxItems"}, JsonTypes::kArray);
  speaks_of({"pattern", "format", "minLength", "maxLength"}, JsonTypes::kString);
  speaks_of({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
            JsonTypes::kNumber | JsonTypes::kInteger);
  return bits == 0 ? JsonTypes::kAll : bits;
}

// Conjunctions
// ----------------------------------------------------------------------------------------------

void JsonSchema::merge_properties(const json::object& a, const json::object& b, json::object& out) {
  // A property that one side does not name falls under that side's additionalProperties.
  const json::object* sides[] = {&a, &b};
  json::object merged;
  for (const json::object* side : sides) {
    const auto* properties = side->if_contains("properties");
    if (properties == nullptr || !properties->is_object()) continue;
    for (const auto& member : properties->get_object()) {
      if (merged.contains(member.key())) continue;
      json::array parts;
      for (const json::object* each : sides) {
        const auto* own = each->if_contains("properties");
        const auto* schema = own != nullptr ? find(*own, member.key()) : nullptr;
        if (schema == nullptr) schema = each->if_contains("additionalProperties");
        if (schema != nullptr) parts.push_back(*schema);
      }
      if (parts.size() == 1) {
        merged[member.key()] = parts[0];
      } else {
        merged[member.key()] = json::object{{"allOf", std::move(parts)}};
      }
    }
  }
  if (!merged.empty()) out["properties"] = std::move(merged);
  const auto* more_a = a.if_contains("additionalProperties");
  const auto* more_b = b.if_contains("additionalProperties");
  if (more_a != nullptr && more_b != nullptr) {
    out["additionalProperties"] =
        *more_a == *more_b ? *more_a : json::value{{"allOf", json::array{*more_a, *more_b}}};
  } else if (more_a != nullptr || more_b != nullptr) {
    out["additionalProperties"] = more_a != nullptr ? *more_a : *more_b;
  }
}

json::value JsonSchema::merge_keyword(std::string_view keyword, const json::value& a,
                                      const json::value& b, std::string_view path) const {
  if (a == b) return a;
  if (keyword == "required" && a.is_array() && b.is_array()) {
    json::array names = a.get_array();
    for (const auto& name : b.get_array()) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
    return names;
  }
  if (keyword == "enum" && a.is_array() && b.is_array()) {
    json::array both;
    for (const auto& value : a.get_array()) {
      const json::array& others = b.get_array();
      if (std::find(others.begin(), others.end(), value) != others.end()) both.push_back(value);
    }
    return both;
  }
  const bool lower = keyword.starts_with("min") || keyword == "exclusiveMinimum";
  const bool upper = keyword.starts_with("max") || keyword == "exclusiveMaximum";
  if ((lower || upper) && is_number(a) && is_number(b)) {
    return (to_double(a) > to_double(b)) == lower ? a : b;
  }
  unsupported(
      path,
      fmt::format("\"{}\" is given twice, by parts that must all hold; write it as one", keyword));
}

json::value JsonSchema::merge(const json::value& a, const json::value& b, std::string_view path,
                              int depth) const {
  if (depth > kMaxNesting) unsupported(path, "a conjunction refers to itself");
  if (++num_merges_ > kMaxMerges) {
    fail(ErrorKind::kLimit, "{} has more than {} conjunctions (allOf, anyOf beside other keywords)",
         what_, kMaxMerges);
  }
  if (a == json::value(false) || b == json::value(false)) return false;
  if (a == json::value(true)) return b;
  if (b == json::value(true)) return a;
  for (const json::value* side : {&a, &b}) {
    if (!side->is_object()) wrong(path, "", *side, "a schema: an object, true or false");
  }
  // References and conjunctions on either side are written out first.
  const auto written_out = [&](const json::value& schema) -> json::value {
    json::object rest = schema.get_object();
    json::value all = true;
    if (const auto* ref = rest.if_contains("$ref")) {
      all = resolve(*ref, path);
      rest.erase("$ref");
      return merge(all, rest, path, depth + 1);
    }
    if (const auto* parts = rest.if_contains("allOf")) {
      if (!parts->is_array()) wrong(path, "allOf", *parts, "an array of schemas");
      for (const auto& part : parts->get_array()) all = merge(all, part, path, depth + 1);
      rest.erase("allOf");
      return merge(all, rest, path, depth + 1);
    }
    return rest;
  };
  const json::value left = written_out(a), right = written_out(b);
  if (!left.is_object() || !right.is_object()) return merge(left, right, path, depth + 1);
  const json::object &x = left.get_object(), &y = right.get_object();

  json::object out;
  merge_properties(x, y, out);
  for (const json::object* side : {&x, &y}) {
    const json::object& other = side == &x ? y : x;
    for (const auto& member : *side) {
      const std::string_view keyword = member.key();
      if (!is_constraint(keyword) || out.contains(keyword) || keyword == "type") continue;
      const auto* twin = other.if_contains(keyword);
      out[keyword] =
          twin == nullptr ? member.value() : merge_keyword(keyword, member.value(), *twin, path);
    }
  }
  if (x.contains("type") || y.contains("type")) {
    const auto given = [&](const json::object& side) {
      return side.contains("type") ? types(side, path) : JsonTypes::kAll;
    };
    const auto both = static_cast<uint8_t>(given(x) & given(y));
    if (both == 0) return false;
    json::array names;
    for (const TypeName& type : kTypes) {
      const bool is_part = type.name == "integer" && (both & JsonTypes::kNumber) != 0;
      if ((both & type.bits) == type.bits && !is_part) names.emplace_back(type.name);
    }
    out["type"] = std::move(names);
  }
  return out;
}

// Telling apart
// ---------------------------------------------------------------------------------------------

bool JsonSchema::disjoint(const json::value& a, const json::value& b, std::string_view path,
                          int depth) const {
  if (depth > 8) return false;
  const json::value &x = follow(a, path), &y = follow(b, path);
  if (x == json::value(false) || y == json::value(false)) return true;
  if (!x.is_object() || !y.is_object()) return false;
  const auto x_values = listed_values(x), y_values = listed_values(y);
  if (x_values && y_values) {
    const auto is_in_y = [&](const json::value& value) {
      return std::any_of(y_values->begin(), y_values->end(), [&](const json::value& other) {
        return value == other ||
               (is_number(value) && is_number(other) && to_double(value) == to_double(other));
      });
    };
    return std::none_of(x_values->begin(), x_values->end(), is_in_y);
  }
  const auto types_of = [&](const json::value& schema, const std::optional<json::array>& values) {
    uint8_t bits = 0;
    if (values) {
      for (const auto& value : *values) bits |= JsonTypes::of_value(value);
      // A whole number may be written with a fraction.
      return static_cast<uint8_t>((bits & JsonTypes::kNumber) != 0 ? bits | JsonTypes::kInteger
                                                                   : bits);
    }
    return schema.get_object().contains("type") ? types(schema.get_object(), path)
                                                : JsonTypes::kAll;
  };
  const uint8_t x_types = types_of(x, x_values), y_types = types_of(y, y_values);
  if ((x_types & y_types) == 0) return true;
  if ((x_types & y_types) != JsonTypes::kObject) return false;

  const auto x_required = required_names(x), y_required = required_names(y);
  const auto forbids = [](const json::value& schema, const std::string& name) {
    const auto* more = find(schema, "additionalProperties");
    const auto* properties = find(schema, "properties");
    return more != nullptr && *more == json::value(false) &&
           (properties == nullptr || find(*properties, name) == nullptr);
  };
  for (const std::string& name : x_required) {
    if (forbids(y, name)) return true;
    if (!y_required.contains(name)) continue;
    const auto* x_properties = find(x, "properties");
    const auto* y_properties = find(y, "properties");
    const auto* x_property = x_properties != nullptr ? find(*x_properties, name) : nullptr;
    const auto* y_property = y_properties != nullptr ? find(*y_properties, name) : nullptr;
    if (x_property != nullptr && y_property != nullptr &&
        disjoint(*x_property, *y_property, path, depth + 1)) {
      return true;
    }
  }
  return std::any_of(y_required.begin(), y_required.end(),
                     [&](const std::string& name) { return forbids(x, name); });
}

}  // namespace nibble
