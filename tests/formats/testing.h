// Temporary directories and safetensors made by hand, for the tests of this floor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"

namespace nibble::testing_ {

/// A fresh directory, removed with everything in it at the end of the test.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (fs::temp_directory_path() / "nibble-formats-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }
  fs::path operator/(std::string_view name) const { return path_ / name; }

 private:
  fs::path path_;
};

/// Length, header, data: exactly as given, valid or not.
inline std::string raw_safetensors(std::string_view header, std::string_view data) {
  const uint64_t length = header.size();
  std::string out(reinterpret_cast<const char*>(&length), 8);
  out += header;
  out += data;
  return out;
}

inline void write_text(const fs::path& path, std::string_view text) {
  write_file_atomically(path, text);
}

/// Runs `body` and gives back the Error it threw; a test failure when it threw none.
struct Caught {
  bool thrown = false;
  ErrorKind kind = ErrorKind::kInternal;
  std::string message;
};
inline Caught catch_error(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return {true, error.kind(), error.what()};
  }
  ADD_FAILURE() << "no Error was thrown";
  return {};
}

}  // namespace nibble::testing_
