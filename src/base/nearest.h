// "Did you mean": the nearest known name to a misspelt one (flags, JSON keys, tensor names).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

/// Levenshtein distance in bytes; a swap of two neighbours counts one.
int edit_distance(std::string_view a, std::string_view b);

/// The candidate with the least edit distance ('-' and '_' are the same letter here), the first of
/// equals; empty only when there are no candidates. The view points into `candidates`.
std::string_view nearest_name(std::string_view name, std::span<const std::string_view> candidates);
std::string_view nearest_name(std::string_view name, const std::vector<std::string>& candidates);

}  // namespace nibble
