// Text that remembers where its bytes came from. A chat template's own literals may become control
// tokens; what a user typed never may. Every string of the Jinja engine is a Text: bytes plus the
// offsets at which provenance flips. Comparison ignores provenance. Where exact tracking is hard
// the result is data (false), never the reverse. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace nibble::jinja {

class Text {
 public:
  Text() = default;
  Text(std::string_view bytes, bool is_template) { append(bytes, is_template); }

  const std::string& str() const { return bytes_; }
  size_t size() const { return bytes_.size(); }
  bool empty() const { return bytes_.empty(); }

  void append(std::string_view bytes, bool is_template);
  void append(const Text& other) { append_range(other, 0, other.size()); }
  void append_range(const Text& other, size_t begin, size_t end);  // byte offsets
  Text sub(size_t begin, size_t end) const;

  bool is_template_at(size_t offset) const;
  /// True when every byte is the template's own (and there is at least one).
  bool all_template() const { return !bytes_.empty() && flips_.empty() && first_is_template_; }
  /// One provenance throughout; an empty text is uniform.
  bool uniform() const { return flips_.empty(); }

  /// Calls fn(begin, end, is_template) for each run, in order.
  template <typename Fn>
  void for_each_run(Fn&& fn) const {
    bool flag = first_is_template_;
    size_t begin = 0;
    for (const size_t flip : flips_) {
      fn(begin, flip, flag);
      begin = flip;
      flag = !flag;
    }
    if (begin < bytes_.size()) fn(begin, bytes_.size(), flag);
  }

  /// HTML-safe by the template's own word (`safe`, `escape`): shows only in `+` and `escape`.
  bool markup = false;

 private:
  std::string bytes_;
  bool first_is_template_ = false;
  std::vector<size_t> flips_;  // strictly increasing, inside (0, size)
};

}  // namespace nibble::jinja
