// JSON for every floor: Boost.JSON's value and parser (keeps key order, keeps int and double
// apart), and one writer in Python's json.dumps style, because chat templates must print what
// Hugging Face prints and Boost 1.81 writes 0.7 as "7E-1". SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/value.hpp>
#include <string>
#include <string_view>

namespace nibble {

namespace json = boost::json;

/// Parses one JSON document. Lone surrogate escapes become U+FFFD; a duplicate key's last value
/// wins, as in Python. `what` names the document in messages ("config.json", "request body").
/// Throws Error{kInput} with line and column of the problem; nesting deeper than `max_depth` is
/// refused.
json::value parse_json(std::string_view text, std::string_view what, int max_depth = 64);

struct JsonStyle {
  int indent = -1;  // -1: one line
  std::string_view item_separator = ", ";
  std::string_view key_separator = ": ";
  bool ensure_ascii = false;
  bool sort_keys = false;
};

/// json.dumps: floats as Python's repr (0.7, 1e+20, 1.0), NaN and Infinity as Python spells them.
std::string dump_json(const json::value& value, const JsonStyle& style = {});
void append_json(std::string& out, const json::value& value, const JsonStyle& style = {});

/// A JSON string literal with quotes. Text must be UTF-8.
void append_json_string(std::string& out, std::string_view text, bool ensure_ascii = false);

/// Python's repr(float): shortest round-trip digits, exponent form outside [1e-4, 1e16).
std::string python_float_repr(double value);

}  // namespace nibble
