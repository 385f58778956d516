// SPDX-License-Identifier: Apache-2.0
#include "text/detokenizer.h"

#include <algorithm>

#include "base/error.h"
#include "text/utf8.h"

namespace nibble {

Detokenizer::Detokenizer(Tokenizer tokenizer, DetokenizerOptions options)
    : tokenizer_(std::move(tokenizer)), options_(std::move(options)) {
  for (size_t i = 0; i < options_.stop.size(); ++i) {
    const std::string& text = options_.stop[i];
    if (text.empty() || !utf8::is_valid(text)) {
      fail(ErrorKind::kInput, "stop[{}] is {}; nibble wants UTF-8 text of at least one character",
           i, text.empty() ? "empty" : "not UTF-8");
    }
    Stop stop{.text = text, .failure = std::vector<uint32_t>(text.size())};
    for (size_t k = 1; k < text.size(); ++k) {
      uint32_t border = stop.failure[k - 1];
      while (border > 0 && text[border] != text[k]) border = stop.failure[border - 1];
      stop.failure[k] = border + (text[border] == text[k]);
    }
    stops_.push_back(std::move(stop));
  }
}

bool Detokenizer::feed(unsigned char byte) {
  for (size_t i = 0; i < stops_.size(); ++i) {
    Stop& stop = stops_[i];
    while (stop.matched > 0 && static_cast<unsigned char>(stop.text[stop.matched]) != byte) {
      stop.matched = stop.failure[stop.matched - 1];
    }
    stop.matched += static_cast<unsigned char>(stop.text[stop.matched]) == byte;
    if (stop.matched < stop.text.size()) continue;
    if (!stop_idx_ || stop.text.size() > stops_[*stop_idx_].text.size()) stop_idx_ = i;
  }
  return stop_idx_.has_value();
}

void Detokenizer::emit(size_t num_bytes, std::string& out) {
  utf8::append_lossy(out, std::string_view(pending_).substr(0, num_bytes));
  pending_.erase(0, num_bytes);
}

void Detokenizer::push(int32_t id, std::string& out) {
  if (stopped()) return;
  if (options_.skip_special && tokenizer_.is_special(id)) return;
  for (const char byte : tokenizer_.token_bytes(id)) {
    pending_ += byte;
    if (!feed(static_cast<unsigned char>(byte))) continue;
    const size_t stop_bytes = stops_[*stop_idx_].text.size();
    emit(options_.include_stop ? pending_.size() : pending_.size() - stop_bytes, out);
    pending_.clear();
    return;
  }
  size_t held = 0;
  for (const Stop& stop : stops_) held = std::max<size_t>(held, stop.matched);
  const size_t free = pending_.size() - held;
  emit(free - utf8::incomplete_tail(std::string_view(pending_).substr(0, free)), out);
}

void Detokenizer::flush(std::string& out) {
  emit(pending_.size(), out);
  for (Stop& stop : stops_) stop.matched = 0;
}

}  // namespace nibble
