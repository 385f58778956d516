// SPDX-License-Identifier: Apache-2.0
#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/interrupt.h"

namespace nibble {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

uint64_t open_regular(const fs::path& path, int* fd) {
  *fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (*fd < 0) fail(ErrorKind::kIo, "cannot open {}: {}", path.string(), std::strerror(errno));
  struct stat status{};
  if (::fstat(*fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(*fd);
    fail(ErrorKind::kIo, "{} is not a regular file", path.string());
  }
  return static_cast<uint64_t>(status.st_size);
}

void sync_directory(const fs::path& directory) {
  const FileDescriptor fd(
      ::open(directory.empty() ? "." : directory.c_str(), O_RDONLY | O_DIRECTORY));
  if (fd.get() >= 0) ::fsync(fd.get());
}

}  // namespace

std::string read_file(const fs::path& path, uint64_t max_bytes) {
  int raw = -1;
  const uint64_t size = open_regular(path, &raw);
  const FileDescriptor fd(raw);
  if (size > max_bytes) {
    fail(ErrorKind::kLimit, "{} has {} bytes; at most {} are read", path.string(), size, max_bytes);
  }
  std::string content(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t got = ::read(fd.get(), content.data() + done, size - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      fail(ErrorKind::kIo, "cannot read {}: {}", path.string(),
           got < 0 ? std::strerror(errno) : "it shrank");
    }
    done += static_cast<size_t>(got);
  }
  return content;
}

MappedFile MappedFile::open(const fs::path& path) {
  int raw = -1;
  MappedFile file;
  file.size_ = open_regular(path, &raw);
  const FileDescriptor fd(raw);
  file.path_ = path;
  if (file.size_ == 0) return file;
  void* data = ::mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED)
    fail(ErrorKind::kIo, "cannot map {}: {}", path.string(), std::strerror(errno));
  file.data_ = static_cast<const std::byte*>(data);
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::advise(size_t offset, size_t length, bool will_need) const {
  if (data_ == nullptr || offset >= size_) return;
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t begin = offset / page * page;
  const size_t end = std::min(size_, offset + length);
  ::madvise(const_cast<std::byte*>(data_) + begin, end - begin,
            will_need ? MADV_WILLNEED : MADV_DONTNEED);
}

AtomicFile AtomicFile::create(const fs::path& final_path) {
  AtomicFile file;
  file.final_path_ = final_path;
  file.temporary_path_ = final_path;
  file.temporary_path_ += ".tmp";
  file.fd_ = ::open(file.temporary_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file.fd_ < 0) {
    fail(ErrorKind::kIo, "cannot create {}: {}", file.temporary_path_.string(),
         std::strerror(errno));
  }
  return file;
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : final_path_(std::move(other.final_path_)),
      temporary_path_(std::move(other.temporary_path_)),
      fd_(std::exchange(other.fd_, -1)),
      bytes_written_(other.bytes_written_) {}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_path_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  NIBBLE_CHECK(fd_ >= 0, "write after commit");
  while (!bytes.empty()) {
    throw_if_interrupted();
    const size_t chunk = std::min<size_t>(bytes.size(), size_t{16} << 20);
    const ssize_t written = ::write(fd_, bytes.data(), chunk);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      fail(ErrorKind::kIo, "cannot write {} after {} bytes: {}; nothing was left behind under {}",
           temporary_path_.string(), bytes_written_, std::strerror(errno), final_path_.string());
    }
    bytes_written_ += static_cast<uint64_t>(written);
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
}

void AtomicFile::commit() {
  NIBBLE_CHECK(fd_ >= 0, "commit called twice");
  const bool synced = ::fsync(fd_) == 0;
  const int sync_error = errno;
  const bool closed = ::close(std::exchange(fd_, -1)) == 0;
  if (!synced || !closed || ::rename(temporary_path_.c_str(), final_path_.c_str()) != 0) {
    const int error = synced ? errno : sync_error;
    ::unlink(temporary_path_.c_str());
    fail(ErrorKind::kIo, "cannot finish {}: {}", final_path_.string(), std::strerror(error));
  }
  sync_directory(final_path_.parent_path());
}

void write_file_atomically(const fs::path& path, std::string_view content) {
  AtomicFile file = AtomicFile::create(path);
  file.write(content);
  file.commit();
}

AtomicDirectory AtomicDirectory::create(const fs::path& final_path) {
  return make(final_path, /*clear=*/true);
}

AtomicDirectory AtomicDirectory::open_or_create(const fs::path& final_path) {
  return make(final_path, /*clear=*/false);
}

AtomicDirectory AtomicDirectory::make(const fs::path& final_path, bool clear) {
  std::error_code ignored;
  AtomicDirectory directory;
  directory.final_path_ = final_path.has_filename() ? final_path : final_path.parent_path();
  if (fs::exists(directory.final_path_, ignored) &&
      !(fs::is_directory(directory.final_path_, ignored) &&
        fs::is_empty(directory.final_path_, ignored))) {
    fail(ErrorKind::kIo, "{} exists already; remove it or choose another output directory",
         directory.final_path_.string());
  }
  directory.temporary_path_ = directory.final_path_;
  directory.temporary_path_ += ".tmp";
  if (clear) fs::remove_all(directory.temporary_path_, ignored);  // what a killed run left
  std::error_code error;
  fs::create_directories(directory.temporary_path_, error);
  if (error) {
    const std::string path = std::exchange(directory.temporary_path_, {}).string();
    fail(ErrorKind::kIo, "cannot create {}: {}", path, error.message());
  }
  return directory;
}

AtomicDirectory::AtomicDirectory(AtomicDirectory&& other) noexcept
    : final_path_(std::move(other.final_path_)),
      temporary_path_(std::exchange(other.temporary_path_, {})),
      keep_(other.keep_) {}

AtomicDirectory::~AtomicDirectory() {
  if (temporary_path_.empty() || keep_) return;
  std::error_code ignored;
  fs::remove_all(temporary_path_, ignored);
}

void AtomicDirectory::commit() {
  std::error_code error;
  fs::remove(final_path_, error);  // only an empty directory can be there
  fs::rename(temporary_path_, final_path_, error);
  if (error) {
    fail(ErrorKind::kIo, "cannot rename {} to {}: {}", temporary_path_.string(),
         final_path_.string(), error.message());
  }
  temporary_path_.clear();
  sync_directory(final_path_.parent_path());
}

}  // namespace nibble
