// String operations that keep provenance; shared by filters and str methods.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja_text.h"

namespace nibble::jinja {

class Evaluator;

/// upper(), title(), ...: provenance is kept when it is one throughout, else the result is data.
Text convert_text(const Text& text, std::string (*convert)(std::string_view));
Text trim_text(const Text& text, bool left, bool right, const std::string* chars);
Text replace_text(Evaluator& eval, const Text& text, const Text& old, const Text& fresh,
                  int64_t count);
std::vector<Text> split_lines(Evaluator& eval, const Text& text, bool keep_ends = false);
Text escape_html(const Text& text);
/// side: -1 ljust, 0 center, 1 rjust. `fill` is one character.
Text pad_text(Evaluator& eval, const Text& text, int64_t width, int side, const Text& fill);

}  // namespace nibble::jinja
