// Code points as Python's str methods see them (Unicode 14): walking UTF-8, case mapping, classes.
// For the Jinja engine only; the tokenizer has its own, newer tables.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace nibble::jinja {

/// Code point at `i`, which moves past it. A byte that is not UTF-8 counts as one point (U+FFFD).
char32_t next_code_point(std::string_view text, size_t& i);
void append_utf8(std::string& out, char32_t point);
size_t count_code_points(std::string_view text);
/// Byte offset of code point `index`, or size() when beyond the end.
size_t byte_offset(std::string_view text, size_t index);

bool is_space(char32_t c);
bool is_printable(char32_t c);
bool is_alpha(char32_t c);
bool is_decimal(char32_t c);
bool is_digit(char32_t c);
bool is_numeric(char32_t c);
bool is_upper(char32_t c);
bool is_lower(char32_t c);
bool is_title(char32_t c);
bool is_word(char32_t c);  // \w of Python's re

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
std::string to_title(std::string_view text);        // str.title()
std::string to_capitalized(std::string_view text);  // str.capitalize()
std::string to_swapped(std::string_view text);      // str.swapcase()

/// Byte ranges left after trimming Python whitespace, or the code points of `chars`.
void trim_range(std::string_view text, bool left, bool right, const std::string_view* chars,
                size_t& begin, size_t& end);

}  // namespace nibble::jinja
