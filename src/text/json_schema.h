// JSON schemas as data: references, conjunctions, and whether two schemas can be told apart. What
// json_schema_grammar.cpp needs to know before it makes a grammar of one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/json.h"

namespace nibble {

/// A set of JSON types.
struct JsonTypes {
  enum Bit : uint8_t {
    kNull = 1,
    kBoolean = 2,
    kInteger = 4,
    kNumber = 8,  // kInteger is part of it
    kString = 16,
    kArray = 32,
    kObject = 64,
  };
  static constexpr uint8_t kAll = 127;
  static uint8_t of_value(const json::value& value);
  /// 0 for a name that is none.
  static uint8_t of_name(std::string_view name);
};

class JsonSchema {
 public:
  /// `document` must outlive this; `what` names it in messages.
  JsonSchema(const json::value& document, std::string_view what)
      : document_(document), what_(what) {}

  [[noreturn]] void wrong(std::string_view path, std::string_view keyword, const json::value& value,
                          std::string_view wanted) const;
  [[noreturn]] void unsupported(std::string_view path, std::string_view problem) const;

  /// Throws for keywords that constrain and are not honoured, and unknown ones.
  void check_keywords(const json::object& schema, std::string_view path) const;
  /// Says something about values, unlike a title.
  static bool is_constraint(std::string_view keyword);
  static bool has_constraints(const json::object& schema);

  /// The schema a reference points to.
  const json::value& resolve(const json::value& ref, std::string_view path) const;
  /// What fits both, where that can be written as one schema; else it throws.
  json::value merge(const json::value& a, const json::value& b, std::string_view path,
                    int depth = 0) const;
  /// Types a value of this schema can have: by `type`, else by what the keywords speak of.
  uint8_t types(const json::object& schema, std::string_view path) const;
  /// No value fits both. False when in doubt.
  bool disjoint(const json::value& a, const json::value& b, std::string_view path,
                int depth = 0) const;

 private:
  json::value merge_keyword(std::string_view keyword, const json::value& a, const json::value& b,
                            std::string_view path) const;
  static void merge_properties(const json::object& a, const json::object& b, json::object& out);
  const json::value& follow(const json::value& schema, std::string_view path) const;

  const json::value& document_;
  const std::string what_;
  mutable int num_merges_ = 0;
};

}  // namespace nibble
