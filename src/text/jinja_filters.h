// Filters, tests, str/dict/list methods and globals of the Jinja engine: tables of named functions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string_view>

#include "text/jinja_value.h"

namespace nibble::jinja {

struct Filter {
  std::string_view name;
  Value (*apply)(Evaluator& eval, const Value& input, Arguments& args);
};

struct Test {
  std::string_view name;
  bool (*apply)(Evaluator& eval, const Value& input, Arguments& args);
};

/// The part of the filters that jinja_sequence_filters.cpp holds.
std::span<const Filter> sequence_filters();
const Filter* find_filter(std::string_view name);
/// Filters that Jinja has and this engine does not.
bool is_unsupported_filter(std::string_view name);
const Test* find_test(std::string_view name);
Value apply_filter(Evaluator& eval, std::string_view name, const Value& input, Arguments& args);
bool apply_test(Evaluator& eval, std::string_view name, const Value& input, Arguments& args);

/// Bound method of a str, dict, list, tuple, loop, cycler or namespace; nullopt-like: returns false
/// when Python's type has no such attribute. Mutating methods come back as an undefined value that
/// raises SecurityError when used.
bool find_method(const Value& self, std::string_view name, Value& out);
Value find_global(Evaluator& eval, std::string_view name, bool& found);

/// "%s-%d" % args and "{} {}".format(...).
Value percent_format(Evaluator& eval, const Value& format, const Value& args);
Value brace_format(Evaluator& eval, const Text& format, Arguments& args);

/// Python call binding: values of `names` in order from positional and keyword arguments; absent
/// ones keep `values`' defaults. Raises TypeError for unknown, repeated or surplus arguments.
void bind_arguments(std::string_view function, Arguments& args,
                    std::initializer_list<std::string_view> names, std::vector<Value>& values,
                    size_t num_required = 0);
/// What Python calls an index: an int or a bool; raises TypeError for anything else.
int64_t want_int(const Value& value);

}  // namespace nibble::jinja
