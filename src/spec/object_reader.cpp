// SPDX-License-Identifier: Apache-2.0
#include "spec/object_reader.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/nearest.h"

namespace nibble {

std::string show_json(const json::value& value) {
  std::string text = dump_json(value);
  if (text.size() > 80) {
    size_t cut = 77;
    while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xc0u) == 0x80u) --cut;
    text.resize(cut);
    text += "...";
  }
  return text;
}

const json::value* ObjectReader::find(std::string_view key) {
  if (std::find(asked_.begin(), asked_.end(), key) == asked_.end()) asked_.emplace_back(key);
  const json::value* value = object_.if_contains(key);
  return value == nullptr || value->is_null() ? nullptr : value;
}

void ObjectReader::wrong(std::string_view key, const json::value& value,
                         std::string_view wanted) const {
  fail(ErrorKind::kInput, "{}: {} is {}; wanted {}", where_, key, show_json(value), wanted);
}

const json::value& ObjectReader::require(std::string_view key, std::string_view wanted) {
  const json::value* value = find(key);
  if (value == nullptr)
    fail(ErrorKind::kInput, "{}: {} is missing; wanted {}", where_, key, wanted);
  return *value;
}

int ObjectReader::to_integer(std::string_view key, const json::value& value, int min,
                             int max) const {
  int64_t number = 0;
  bool whole = true;
  if (value.is_int64()) {
    number = value.get_int64();
  } else if (value.is_double() && std::floor(value.get_double()) == value.get_double() &&
             std::fabs(value.get_double()) < 1e15) {
    number = static_cast<int64_t>(value.get_double());  // 4096.0, as some tools write it
  } else {
    whole = false;
  }
  if (!whole || number < min || number > max) {
    wrong(key, value, fmt::format("a whole number from {} to {}", min, max));
  }
  return static_cast<int>(number);
}

int ObjectReader::integer(std::string_view key, int min, int max) {
  const json::value& value = require(key, fmt::format("a whole number from {} to {}", min, max));
  return to_integer(key, value, min, max);
}

int ObjectReader::integer_or(std::string_view key, int fallback, int min, int max) {
  const json::value* value = find(key);
  return value == nullptr ? fallback : to_integer(key, *value, min, max);
}

double ObjectReader::number(std::string_view key) {
  const json::value& value = require(key, "a number");
  if (!value.is_number()) wrong(key, value, "a number");
  return value.to_number<double>();
}

double ObjectReader::number_or(std::string_view key, double fallback) {
  return has(key) ? number(key) : fallback;
}

bool ObjectReader::boolean_or(std::string_view key, bool fallback) {
  const json::value* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_bool()) wrong(key, *value, "true or false");
  return value->get_bool();
}

std::string ObjectReader::string(std::string_view key) {
  const json::value& value = require(key, "a string");
  if (!value.is_string()) wrong(key, value, "a string");
  return std::string(value.get_string());
}

std::string ObjectReader::string_or(std::string_view key, std::string_view fallback) {
  return has(key) ? string(key) : std::string(fallback);
}

const json::object* ObjectReader::object(std::string_view key) {
  const json::value* value = find(key);
  if (value == nullptr) return nullptr;
  if (!value->is_object()) wrong(key, *value, "an object");
  return &value->get_object();
}

std::vector<int> ObjectReader::integers(std::string_view key, int min, int max) {
  const json::value* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) return {to_integer(key, *value, min, max)};
  std::vector<int> numbers;
  for (const json::value& item : value->get_array())
    numbers.push_back(to_integer(key, item, min, max));
  return numbers;
}

void ObjectReader::refuse_unknown_keys() const {
  for (const auto& member : object_) {
    const std::string_view key = member.key();
    if (std::find(asked_.begin(), asked_.end(), key) != asked_.end()) continue;
    fail(ErrorKind::kInput, "{}: unknown key \"{}\"; the nearest known one is \"{}\"", where_, key,
         nearest_name(key, asked_));
  }
}

}  // namespace nibble
