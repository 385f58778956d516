// The one safetensors parser and writer (format: mistral.md facts 6.1; docs/formats.md). Hugging
// Face shards, portable checkpoints and engines are all read and written here.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/file.h"
#include "spec/dtype.h"

namespace nibble {

struct SafetensorsHeader {
  struct Entry {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
    uint64_t begin = 0, end = 0;  // bytes, relative to data_start
  };
  std::vector<Entry> entries;  // in order of offset
  std::vector<std::pair<std::string, std::string>> metadata;
  uint64_t data_start = 0;  // offset of the data in the file
};

/// Parses and checks the header of a safetensors file of `file_bytes` bytes (length <= 100 MB, JSON
/// object, no duplicate keys, known dtypes, offsets that start at 0, touch exactly, match shape x
/// dtype and end at the file's end). Pure: the fuzz target's entry. `what` names the file in
/// messages.
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file_bytes,
                                           std::string_view what);

/// A mapped safetensors file. Move-only; views live as long as it does. Thread-safe once opened.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const fs::path& path);  // throws Error{kIo, kInput}

  const std::vector<SafetensorsHeader::Entry>& entries() const { return header_.entries; }
  const std::vector<std::pair<std::string, std::string>>& metadata() const {
    return header_.metadata;
  }
  bool contains(std::string_view name) const;
  TensorView tensor(std::string_view name) const;  // throws Error{kInput} naming file and tensor
  const MappedFile& file() const { return file_; }
  uint64_t data_start() const { return header_.data_start; }  // bytes of the header

 private:
  SafetensorsFile(MappedFile file, SafetensorsHeader header);
  MappedFile file_;
  SafetensorsHeader header_;
  std::map<std::string, size_t, std::less<>> index_;
};

/// Writes one safetensors file atomically and streaming: declare every tensor, then write each
/// one's bytes in the declared order. The data section and every tensor whose size allows start at
/// `alignment` bytes (explicit "pad.N" U8 tensors fill the gaps when alignment > 8, as offsets must
/// touch).
class SafetensorsWriter {
 public:
  struct Declaration {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
  };
  static SafetensorsWriter create(const fs::path& path, const std::vector<Declaration>& tensors,
                                  const std::vector<std::pair<std::string, std::string>>& metadata,
                                  uint64_t alignment = 8);
  /// Appends to the current tensor; moves on to the next when it is full. Throws on too many bytes.
  void write(std::span<const std::byte> bytes);
  uint64_t header_checksum() const { return header_checksum_; }  // XXH3 of what precedes the data
  void commit();  // throws when a declared tensor is incomplete

 private:
  explicit SafetensorsWriter(AtomicFile file) : file_(std::move(file)) {}
  AtomicFile file_;
  std::vector<std::pair<uint64_t, uint64_t>>
      ranges_;  // bytes of each declared tensor, in file order
  size_t current_ = 0;
  uint64_t position_ = 0;  // bytes of data written
  uint64_t header_checksum_ = 0;
};

}  // namespace nibble
