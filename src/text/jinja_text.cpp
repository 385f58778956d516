// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_text.h"

#include <algorithm>

namespace nibble::jinja {

void Text::append(std::string_view bytes, bool is_template) {
  if (bytes.empty()) return;
  if (bytes_.empty()) {
    first_is_template_ = is_template;
    flips_.clear();
  } else {
    const bool last = first_is_template_ != (flips_.size() % 2 == 1);
    if (last != is_template) flips_.push_back(bytes_.size());
  }
  bytes_.append(bytes);
}

void Text::append_range(const Text& other, size_t begin, size_t end) {
  if (begin >= end) return;
  if (&other == this) {
    // NOLINTNEXTLINE(performance-unnecessary-copy-initialization): appending changes `other`
    const Text copy = other;
    append_range(copy, begin, end);
    return;
  }
  const std::string_view bytes = other.bytes_;
  size_t next = static_cast<size_t>(
      std::upper_bound(other.flips_.begin(), other.flips_.end(), begin) - other.flips_.begin());
  bool flag = other.first_is_template_ != (next % 2 == 1);
  while (begin < end) {
    const size_t stop = next < other.flips_.size() ? std::min(end, other.flips_[next]) : end;
    append(bytes.substr(begin, stop - begin), flag);
    begin = stop;
    flag = !flag;
    ++next;
  }
}

Text Text::sub(size_t begin, size_t end) const {
  Text out;
  out.append_range(*this, begin, end);
  return out;
}

bool Text::is_template_at(size_t offset) const {
  const auto flips = std::upper_bound(flips_.begin(), flips_.end(), offset) - flips_.begin();
  return first_is_template_ != (flips % 2 == 1);
}

}  // namespace nibble::jinja
