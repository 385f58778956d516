// One JSON line per request: who, what, how long, how many tokens. Never a prompt, an answer, a
// query string or a key. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace nibble {

struct AccessRecord {
  std::string request_id, remote, method, path;
  int status = 0;
  bool complete = false;  // the reply left whole
  uint64_t bytes = 0;
  double ms = 0;
  // Generations only.
  std::string model;
  bool is_generation = false, stream = false;
  int choices = 0;
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  std::optional<double> first_token_ms;
  std::string finish;  // of choice 0: "stop", "length", "abort", "error"

  /// The line without its newline.
  std::string to_json() const;
};

/// Writes lines on a thread of its own: a terminal or pipe that does not take them never holds up
/// the server. Thread-safe.
class AccessLog {
 public:
  /// "-": standard error; else a file to append to. Throws Error{kIo}.
  static std::unique_ptr<AccessLog> open(const std::string& path);
  ~AccessLog();
  /// Opens the file's name again, for logrotate; nothing for standard error. Throws Error{kIo} and
  /// goes on with the old file.
  void reopen();
  void write(std::string line);  // dropped (and counted in the log) when 10,000 lines wait

 private:
  explicit AccessLog(std::FILE* file, std::string path);
  void run();

  std::string path_;  // empty: standard error
  std::mutex mutex_;
  std::FILE* file_;                 // the writer's
  std::FILE* next_file_ = nullptr;  // what the writer goes on with
  std::condition_variable arrived_;
  std::vector<std::string> lines_;
  uint64_t dropped_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace nibble
