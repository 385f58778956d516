// The header is read by a small state machine over Boost.JSON's event parser and not through a
// value: a value keeps only the last of two equal keys, and here a duplicate is an attack or a
// broken writer. SPDX-License-Identifier: Apache-2.0
#include "formats/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <boost/json/basic_parser_impl.hpp>
#include <cstring>
#include <optional>
#include <set>
#include <unordered_set>

#include "base/error.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/nearest.h"

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

namespace nibble {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;

class HeaderHandler {
 public:
  static constexpr std::size_t max_object_size = std::size_t(-1);
  static constexpr std::size_t max_array_size = std::size_t(-1);
  static constexpr std::size_t max_key_size = std::size_t(-1);
  static constexpr std::size_t max_string_size = std::size_t(-1);

  HeaderHandler(std::string_view what, SafetensorsHeader* header) : what_(what), header_(header) {}

  bool on_document_begin(json::error_code&) { return true; }
  bool on_document_end(json::error_code&) { return true; }

  bool on_object_begin(json::error_code&) {
    switch (state_) {
      case State::kStart: state_ = State::kTop; return true;
      case State::kTop:
        if (top_key_ == "__metadata__") {
          state_ = State::kMetadata;
        } else {
          state_ = State::kTensor;
          entry_ = {.name = top_key_, .dtype = DType::kU8};
          seen_ = 0;
        }
        return true;
      default: unexpected("an object");
    }
  }
  bool on_object_end(std::size_t, json::error_code&) {
    if (state_ == State::kTensor) {
      for (size_t i = 0; i < kFields.size(); ++i) {
        if ((seen_ & (1u << i)) == 0) {
          fail(ErrorKind::kInput, "{}: tensor \"{}\" has no {}", what_, entry_.name, kFields[i]);
        }
      }
      header_->entries.push_back(std::move(entry_));
    }
    state_ = state_ == State::kTop ? State::kDone : State::kTop;
    return true;
  }
  bool on_array_begin(json::error_code&) {
    if (state_ != State::kTensor || (field_ != 1 && field_ != 2)) unexpected("a list");
    state_ = State::kArray;
    numbers_.clear();
    return true;
  }
  bool on_array_end(std::size_t, json::error_code&) {
    state_ = State::kTensor;
    if (field_ == 1) {
      entry_.shape.assign(numbers_.begin(), numbers_.end());
    } else {
      if (numbers_.size() != 2 || numbers_[0] > numbers_[1]) {
        fail(ErrorKind::kInput,
             "{}: tensor \"{}\" has data_offsets [{}]; wanted [begin, end] with begin <= end",
             what_, entry_.name, fmt::join(numbers_, ", "));
      }
      entry_.begin = numbers_[0];
      entry_.end = numbers_[1];
    }
    return true;
  }

  bool on_key_part(json::string_view part, std::size_t, json::error_code&) {
    text_.append(part.data(), part.size());
    return true;
  }
  bool on_key(json::string_view part, std::size_t, json::error_code&) {
    text_.append(part.data(), part.size());
    const std::string key = std::exchange(text_, {});
    if (state_ == State::kTop) {
      if (!names_.insert(key).second)
        fail(ErrorKind::kInput, "{}: the key \"{}\" stands twice in the header", what_, key);
      top_key_ = key;
    } else if (state_ == State::kMetadata) {
      if (!metadata_names_.insert(key).second) {
        fail(ErrorKind::kInput, "{}: the key \"{}\" stands twice in __metadata__", what_, key);
      }
      metadata_key_ = key;
    } else {
      field_ =
          static_cast<size_t>(std::find(kFields.begin(), kFields.end(), key) - kFields.begin());
      if (field_ == kFields.size()) {
        fail(ErrorKind::kInput,
             "{}: tensor \"{}\" has an unknown key \"{}\"; known are dtype, shape, data_offsets",
             what_, entry_.name, key);
      }
      if ((seen_ & (1u << field_)) != 0) {
        fail(ErrorKind::kInput, "{}: the key \"{}\" stands twice in tensor \"{}\"", what_, key,
             entry_.name);
      }
      seen_ |= 1u << field_;
    }
    return true;
  }
  bool on_string_part(json::string_view part, std::size_t, json::error_code&) {
    text_.append(part.data(), part.size());
    return true;
  }
  bool on_string(json::string_view part, std::size_t, json::error_code&) {
    text_.append(part.data(), part.size());
    std::string value = std::exchange(text_, {});
    if (state_ == State::kMetadata) {
      header_->metadata.emplace_back(metadata_key_, std::move(value));
      return true;
    }
    if (state_ != State::kTensor || field_ != 0) unexpected("a string");
    const std::optional<DType> dtype = dtype_from_name(value);
    if (!dtype) {
      fail(ErrorKind::kInput, "{}: tensor \"{}\" has the unknown dtype \"{}\"", what_, entry_.name,
           value);
    }
    entry_.dtype = *dtype;
    return true;
  }
  bool on_number_part(json::string_view, json::error_code&) { return true; }
  bool on_int64(int64_t value, json::string_view, json::error_code&) {
    if (value < 0) {
      fail(ErrorKind::kInput, "{}: tensor \"{}\" has {} in its {}; wanted whole numbers from 0",
           what_, current(), value, field_name());
    }
    return number(static_cast<uint64_t>(value));
  }
  bool on_uint64(uint64_t value, json::string_view, json::error_code&) {
    fail(ErrorKind::kInput, "{}: tensor \"{}\" has {} in its {}, past 2^63", what_, current(),
         value, field_name());
  }
  bool on_double(double, json::string_view, json::error_code&) {
    unexpected("a fraction or too large a number");
  }
  bool on_bool(bool, json::error_code&) { unexpected("true or false"); }
  bool on_null(json::error_code&) { unexpected("null"); }
  bool on_comment_part(json::string_view, json::error_code&) { return true; }
  bool on_comment(json::string_view, json::error_code&) { return true; }

 private:
  enum class State { kStart, kTop, kMetadata, kTensor, kArray, kDone };
  static constexpr std::array<std::string_view, 3> kFields = {"dtype", "shape", "data_offsets"};

  bool number(uint64_t value) {
    if (state_ != State::kArray) unexpected("a number");
    if (numbers_.size() >= 64) {
      fail(ErrorKind::kInput, "{}: tensor \"{}\" has more than 64 numbers in its {}", what_,
           current(), field_name());
    }
    numbers_.push_back(value);
    return true;
  }
  const std::string& current() const { return state_ == State::kTop ? top_key_ : entry_.name; }
  std::string_view field_name() const {
    return field_ < kFields.size() ? kFields[field_] : "entry";
  }

  [[noreturn]] void unexpected(std::string_view seen) const {
    switch (state_) {
      case State::kTop:
        fail(ErrorKind::kInput, "{}: \"{}\" is {}; wanted an object", what_, top_key_, seen);
      case State::kMetadata:
        fail(ErrorKind::kInput, "{}: __metadata__ \"{}\" is {}; wanted a string", what_,
             metadata_key_, seen);
      case State::kTensor:
      case State::kArray:
        fail(ErrorKind::kInput, "{}: tensor \"{}\" has {} in its {}; wanted {}", what_, entry_.name,
             seen, field_name(), field_ == 0 ? "a dtype's name" : "a list of whole numbers from 0");
      default: fail(ErrorKind::kInput, "{}: the header is {}; wanted an object", what_, seen);
    }
  }

  std::string_view what_;
  SafetensorsHeader* header_;
  State state_ = State::kStart;
  std::string text_, top_key_, metadata_key_;
  std::unordered_set<std::string> names_, metadata_names_;
  SafetensorsHeader::Entry entry_;
  size_t field_ = 0;
  unsigned seen_ = 0;
  std::vector<uint64_t> numbers_;
};

// Bytes of shape x dtype, or nothing on overflow or when sub-byte elements leave a byte half
// filled.
std::optional<uint64_t> tensor_bytes(DType dtype, const std::vector<int64_t>& shape) {
  uint64_t count = 1;
  bool overflow = false, empty = false;
  for (const int64_t dim : shape) {
    if (dim == 0) empty = true;
    overflow |= __builtin_mul_overflow(count, static_cast<uint64_t>(dim), &count);
  }
  if (overflow && !empty) return std::nullopt;
  if (empty) return 0;
  uint64_t bits = 0;
  if (__builtin_mul_overflow(count, static_cast<uint64_t>(dtype_bits(dtype)), &bits) ||
      bits % 8 != 0) {
    return std::nullopt;
  }
  return bits / 8;
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file_bytes,
                                           std::string_view what) {
  const uint64_t size = file_bytes.size();
  if (size < 8) {
    fail(ErrorKind::kInput,
         "{} has {} bytes, too few for a safetensors file (is the download complete?)", what, size);
  }
  uint64_t length = 0;
  std::memcpy(&length, file_bytes.data(), sizeof length);
  if (length > kMaxHeaderBytes) {
    fail(
        ErrorKind::kInput,
        "{}: the header's length is {} bytes; at most {} are allowed (is this a safetensors file?)",
        what, length, kMaxHeaderBytes);
  }
  if (length > size - 8) {
    fail(ErrorKind::kInput,
         "{}: the header's length is {} bytes but only {} follow (is the download complete?)", what,
         length, size - 8);
  }
  const char* text = reinterpret_cast<const char*>(file_bytes.data()) + 8;
  if (length == 0 || text[0] != '{') {
    fail(ErrorKind::kInput, "{}: the header does not begin with '{{' (is this a safetensors file?)",
         what);
  }
  SafetensorsHeader header;
  header.data_start = 8 + length;
  json::parse_options options;
  options.max_depth = 4;
  json::basic_parser<HeaderHandler> parser(options, what, &header);
  json::error_code code;
  const size_t consumed = parser.write_some(false, text, length, code);
  if (code) {
    fail(ErrorKind::kInput, "{}: the header is not valid JSON: {} at byte {}", what, code.message(),
         8 + consumed);
  }
  for (size_t i = consumed; i < length; ++i) {
    if (text[i] != ' ' && text[i] != '\n' && text[i] != '\r' && text[i] != '\t') {
      fail(ErrorKind::kInput, "{}: byte {} follows the header's object; only spaces may", what,
           8 + i);
    }
  }

  auto& entries = header.entries;
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t position = 0;
  const std::string* previous = nullptr;
  for (const auto& entry : entries) {
    const std::optional<uint64_t> wanted = tensor_bytes(entry.dtype, entry.shape);
    if (!wanted) {
      fail(ErrorKind::kInput,
           "{}: tensor \"{}\" has shape [{}] of {}, which overflows or does not fill whole bytes",
           what, entry.name, fmt::join(entry.shape, ", "), dtype_name(entry.dtype));
    }
    if (entry.end - entry.begin != *wanted) {
      fail(ErrorKind::kInput,
           "{}: tensor \"{}\" has {} bytes (data_offsets {}..{}); {} [{}] wants {}", what,
           entry.name, entry.end - entry.begin, entry.begin, entry.end, dtype_name(entry.dtype),
           fmt::join(entry.shape, ", "), *wanted);
    }
    if (entry.begin != position) {
      fail(ErrorKind::kInput,
           "{}: tensor \"{}\" begins at {}, but {} ends at {}: tensors must touch without {}", what,
           entry.name, entry.begin,
           previous == nullptr ? std::string("the header") : fmt::format("\"{}\"", *previous),
           position, entry.begin < position ? "overlap" : "holes");
    }
    position = entry.end;
    previous = &entry.name;
  }
  if (position != size - header.data_start) {
    fail(
        ErrorKind::kInput,
        "{}: the last tensor{} ends at {} but the file has {} bytes of data ({})", what,
        previous == nullptr ? std::string() : fmt::format(" \"{}\"", *previous), position,
        size - header.data_start,
        position > size - header.data_start ? "is the download complete?" : "something follows it");
  }
  return header;
}

SafetensorsFile::SafetensorsFile(MappedFile file, SafetensorsHeader header)
    : file_(std::move(file)), header_(std::move(header)) {
  for (size_t i = 0; i < header_.entries.size(); ++i) index_.emplace(header_.entries[i].name, i);
}

SafetensorsFile SafetensorsFile::open(const fs::path& path) {
  MappedFile file = MappedFile::open(path);
  SafetensorsHeader header = parse_safetensors_header(file.bytes(), path.string());
  return SafetensorsFile(std::move(file), std::move(header));
}

bool SafetensorsFile::contains(std::string_view name) const {
  return index_.find(name) != index_.end();
}

TensorView SafetensorsFile::tensor(std::string_view name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    std::vector<std::string_view> names;
    for (const auto& entry : header_.entries) names.push_back(entry.name);
    if (names.empty()) {
      fail(ErrorKind::kInput, "{} has no tensor \"{}\"; it holds none at all",
           file_.path().string(), name);
    }
    fail(ErrorKind::kInput, "{} has no tensor \"{}\"; of its {} tensors the nearest name is \"{}\"",
         file_.path().string(), name, names.size(), nearest_name(name, names));
  }
  const auto& entry = header_.entries[found->second];
  return {entry.dtype, entry.shape,
          file_.bytes().subspan(header_.data_start + entry.begin, entry.end - entry.begin)};
}

SafetensorsWriter SafetensorsWriter::create(
    const fs::path& path, const std::vector<Declaration>& tensors,
    const std::vector<std::pair<std::string, std::string>>& metadata, uint64_t alignment) {
  NIBBLE_CHECK(std::has_single_bit(alignment) && alignment >= 8, "alignment is {}", alignment);
  std::string header = "{";
  const auto comma = [&] {
    if (header.size() > 1) header += ',';
  };
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (size_t i = 0; i < metadata.size(); ++i) {
      if (i > 0) header += ',';
      append_json_string(header, metadata[i].first);
      header += ':';
      append_json_string(header, metadata[i].second);
    }
    header += '}';
  }
  std::set<std::string> names;
  const auto declare = [&](const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                           uint64_t begin, uint64_t end) {
    NIBBLE_CHECK(name != "__metadata__" && names.insert(name).second,
                 "tensor {} declared twice in {}", name, path.string());
    comma();
    append_json_string(header, name);
    header += fmt::format(":{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                          dtype_name(dtype), fmt::join(shape, ","), begin, end);
  };
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  uint64_t position = 0;
  int num_pads = 0;
  for (const Declaration& tensor : tensors) {
    for (const int64_t dim : tensor.shape) {
      NIBBLE_CHECK(dim >= 0, "tensor {} has dimension {}", tensor.name, dim);
    }
    const std::optional<uint64_t> bytes = tensor_bytes(tensor.dtype, tensor.shape);
    NIBBLE_CHECK(bytes.has_value(), "tensor {} has a shape that overflows", tensor.name);
    const uint64_t gap = (alignment - position % alignment) % alignment;
    if (alignment > 8 && gap > 0 && *bytes > 0) {
      declare(fmt::format("pad.{}", num_pads++), DType::kU8, {static_cast<int64_t>(gap)}, position,
              position + gap);
      position += gap;
    }
    declare(tensor.name, tensor.dtype, tensor.shape, position, position + *bytes);
    ranges.emplace_back(position, position + *bytes);
    position += *bytes;
  }
  header += '}';
  header.append((alignment - (8 + header.size()) % alignment) % alignment, ' ');
  if (header.size() > kMaxHeaderBytes) {
    fail(ErrorKind::kLimit, "{}: the header would have {} bytes; at most {} are allowed",
         path.string(), header.size(), kMaxHeaderBytes);
  }
  SafetensorsWriter writer(AtomicFile::create(path));
  const uint64_t length = header.size();
  header.insert(0, reinterpret_cast<const char*>(&length), sizeof length);
  writer.file_.write(header);
  writer.header_checksum_ = xxh3_64(std::as_bytes(std::span(header)));
  writer.ranges_ = std::move(ranges);
  return writer;
}

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  static constexpr std::array<std::byte, 4096> kZeros = {};
  while (!bytes.empty()) {
    while (current_ < ranges_.size() && position_ >= ranges_[current_].second) ++current_;
    NIBBLE_CHECK(current_ < ranges_.size(), "{} bytes more than the declared tensors hold",
                 bytes.size());
    const auto [begin, end] = ranges_[current_];
    while (position_ < begin) {
      const size_t pad = std::min<uint64_t>(begin - position_, kZeros.size());
      file_.write(std::span(kZeros).first(pad));
      position_ += pad;
    }
    const size_t part = std::min<uint64_t>(bytes.size(), end - position_);
    file_.write(bytes.first(part));
    position_ += part;
    bytes = bytes.subspan(part);
  }
}

void SafetensorsWriter::commit() {
  const uint64_t end = ranges_.empty() ? 0 : ranges_.back().second;
  NIBBLE_CHECK(position_ == end, "{} bytes of {} were written", position_, end);
  file_.commit();
}

}  // namespace nibble
