// Files: read whole, map, and write so that a crash or a full disk never leaves a half-written
// artifact under its final name (name.tmp, fsync, rename, fsync of the directory).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace nibble {

namespace fs = std::filesystem;

/// Whole content of a regular file. Throws Error{kIo} (cannot open or read) or Error{kLimit}
/// (larger than `max_bytes`).
std::string read_file(const fs::path& path, uint64_t max_bytes = uint64_t{1} << 31);

/// Read-only memory map of a regular file. Move-only; spans into it live as long as it does.
class MappedFile {
 public:
  static MappedFile open(const fs::path& path);  // throws Error{kIo}
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const fs::path& path() const { return path_; }
  /// Tells the kernel the range is needed soon (true) or will not be needed again (false).
  void advise(size_t offset, size_t length, bool will_need) const;

 private:
  MappedFile() = default;
  fs::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Writes `final_path` atomically. Nothing is visible under the final name before commit(); without
/// commit() (an exception, Ctrl-C) the temporary is removed. Not thread-safe.
class AtomicFile {
 public:
  static AtomicFile create(const fs::path& final_path);  // throws Error{kIo}
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile();

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  uint64_t bytes_written() const { return bytes_written_; }
  void commit();

 private:
  AtomicFile() = default;
  fs::path final_path_;
  fs::path temporary_path_;
  int fd_ = -1;
  uint64_t bytes_written_ = 0;
};

void write_file_atomically(const fs::path& path, std::string_view content);

/// A directory that appears under its final name complete or not at all: files are made in
/// `final.tmp`, commit() renames. An existing destination is refused unless it is empty.
class AtomicDirectory {
 public:
  static AtomicDirectory create(const fs::path& final_path);
  /// The same, but what an earlier run left in `final.tmp` is still there.
  static AtomicDirectory open_or_create(const fs::path& final_path);
  AtomicDirectory(AtomicDirectory&& other) noexcept;
  AtomicDirectory& operator=(AtomicDirectory&&) = delete;
  ~AtomicDirectory();

  const fs::path& path() const { return temporary_path_; }
  void commit();
  /// Without commit(), leaves `final.tmp` for open_or_create() instead of removing it.
  void keep() { keep_ = true; }

 private:
  AtomicDirectory() = default;
  static AtomicDirectory make(const fs::path& final_path, bool clear);
  fs::path final_path_;
  fs::path temporary_path_;
  bool keep_ = false;
};

}  // namespace nibble
