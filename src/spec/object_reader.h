// Reads the members of one JSON object with type and range checks; every complaint names the
// document, the key, the value seen and the values wanted. Knows nothing of models.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace nibble {

/// Borrows the object. The *_or readers take an absent key and null for the fallback.
class ObjectReader {
 public:
  /// `where` names the object in messages: "config.json", "config.json, rope_scaling".
  ObjectReader(const json::object& object, std::string where)
      : object_(object), where_(std::move(where)) {}

  const std::string& where() const { return where_; }
  /// Null when the key is absent or null.
  const json::value* find(std::string_view key);
  bool has(std::string_view key) { return find(key) != nullptr; }

  int integer(std::string_view key, int min, int max);
  int integer_or(std::string_view key, int fallback, int min, int max);
  double number(std::string_view key);
  double number_or(std::string_view key, double fallback);
  bool boolean_or(std::string_view key, bool fallback);
  std::string string(std::string_view key);
  std::string string_or(std::string_view key, std::string_view fallback);
  const json::object* object(std::string_view key);                   // null when absent
  std::vector<int> integers(std::string_view key, int min, int max);  // an array or one number

  /// Throws Error{kInput} naming a key that was never asked for, and the nearest that was.
  void refuse_unknown_keys() const;

 private:
  [[noreturn]] void wrong(std::string_view key, const json::value& value,
                          std::string_view wanted) const;
  int to_integer(std::string_view key, const json::value& value, int min, int max) const;
  const json::value& require(std::string_view key, std::string_view wanted);

  const json::object& object_;
  std::string where_;
  std::vector<std::string> asked_;
};

/// A value as messages show it: JSON, shortened.
std::string show_json(const json::value& value);

}  // namespace nibble
