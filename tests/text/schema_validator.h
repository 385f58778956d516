// JSON Schema as the standard defines it, for the keywords that nibble honours: the judge of what
// grammars let through. Shares no code with them. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <regex>
#include <string>

#include "base/json.h"
#include "text/utf8.h"

namespace nibble::testing {

class SchemaValidator {
 public:
  explicit SchemaValidator(const json::value& document) : document_(document) {}

  bool accepts(const json::value& value) const { return check(value, document_); }

 private:
  static double number(const json::value& value) { return value.to_number<double>(); }

  static bool has_type(const json::value& value, std::string_view type) {
    if (type == "null") return value.is_null();
    if (type == "boolean") return value.is_bool();
    if (type == "string") return value.is_string();
    if (type == "array") return value.is_array();
    if (type == "object") return value.is_object();
    if (type == "number") return value.is_number();
    return type == "integer" && value.is_number() && number(value) == std::floor(number(value));
  }

  static bool equal(const json::value& a, const json::value& b) {
    return a.is_number() && b.is_number() ? number(a) == number(b) : a == b;
  }

  const json::value& resolve(std::string_view pointer) const {
    std::string text(pointer.substr(1));
    if (const size_t at = text.find("%20"); at != text.npos) text.replace(at, 3, " ");
    return document_.at_pointer(text);
  }

  static size_t length(std::string_view text) {
    return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
      return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
    }));
  }

  bool check(const json::value& value, const json::value& schema) const {
    if (schema.is_bool()) return schema.get_bool();
    for (const auto& member : schema.as_object()) {
      if (!holds(value, schema.get_object(), member.key(), member.value())) return false;
    }
    return true;
  }

  bool holds(const json::value& value, const json::object& schema, std::string_view keyword,
             const json::value& wanted) const {
    const auto fits = [&](const json::value& part) { return check(value, part); };
    if (keyword == "$ref") return check(value, resolve(wanted.as_string()));
    if (keyword == "allOf") return std::ranges::all_of(wanted.as_array(), fits);
    if (keyword == "anyOf") return std::ranges::any_of(wanted.as_array(), fits);
    if (keyword == "oneOf") return std::ranges::count_if(wanted.as_array(), fits) == 1;
    if (keyword == "const") return equal(value, wanted);
    if (keyword == "enum") {
      return std::ranges::any_of(wanted.as_array(),
                                 [&](const json::value& each) { return equal(value, each); });
    }
    if (keyword == "type") {
      if (wanted.is_string()) return has_type(value, wanted.get_string());
      return std::ranges::any_of(wanted.as_array(), [&](const json::value& type) {
        return has_type(value, type.as_string());
      });
    }
    if (value.is_number()) {
      if (keyword == "minimum") return number(value) >= number(wanted);
      if (keyword == "maximum") return number(value) <= number(wanted);
      if (keyword == "exclusiveMinimum") return number(value) > number(wanted);
      if (keyword == "exclusiveMaximum") return number(value) < number(wanted);
    }
    if (value.is_string()) {
      const std::string_view text = value.get_string();
      if (keyword == "minLength") return length(text) >= wanted.to_number<size_t>();
      if (keyword == "maxLength") return length(text) <= wanted.to_number<size_t>();
      if (keyword == "pattern") {
        return std::regex_search(std::string(text), std::regex(std::string(wanted.as_string())));
      }
    }
    if (value.is_array()) {
      const json::array& items = value.get_array();
      if (keyword == "minItems") return items.size() >= wanted.to_number<size_t>();
      if (keyword == "maxItems") return items.size() <= wanted.to_number<size_t>();
      const auto* prefix = schema.if_contains("prefixItems");
      const size_t num_first = prefix != nullptr ? prefix->as_array().size() : 0;
      for (size_t i = 0; i < items.size(); ++i) {
        if (keyword == "prefixItems" && i < num_first && !check(items[i], wanted.at(i)))
          return false;
        if (keyword == "items" && i >= num_first && !check(items[i], wanted)) return false;
      }
    }
    if (value.is_object()) {
      const json::object& object = value.get_object();
      if (keyword == "required") {
        return std::ranges::all_of(wanted.as_array(), [&](const json::value& name) {
          return object.contains(name.as_string());
        });
      }
      const auto* properties = schema.if_contains("properties");
      for (const auto& member : object) {
        const bool is_listed =
            properties != nullptr && properties->as_object().contains(member.key());
        if (keyword == "properties" && is_listed &&
            !check(member.value(), wanted.at(member.key()))) {
          return false;
        }
        if (keyword == "additionalProperties" && !is_listed && !check(member.value(), wanted)) {
          return false;
        }
      }
    }
    return true;
  }

  const json::value& document_;
};

}  // namespace nibble::testing
