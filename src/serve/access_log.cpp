// SPDX-License-Identifier: Apache-2.0
#include "serve/access_log.h"

#include <fmt/format.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <ctime>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "text/utf8.h"

namespace nibble {
namespace {

constexpr size_t kMaxWaiting = 10'000;

std::string utc_now() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm parts{};
  gmtime_r(&seconds, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &parts);
  return fmt::format("{}.{:03}Z", text, ms);
}

json::string text_of(std::string_view bytes) {
  std::string out;
  utf8::append_lossy(out, bytes);
  return json::string(out);
}

double tenths(double value) { return std::round(value * 10) / 10; }

std::FILE* open_to_append(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "ae");
  if (file == nullptr) {
    fail(ErrorKind::kIo, "--access-log {}: cannot be opened for appending: {}", path,
         std::strerror(errno));
  }
  return file;
}

}  // namespace

std::string AccessRecord::to_json() const {
  json::object line{{"time", utc_now()},     {"request_id", text_of(request_id)},
                    {"remote", remote},      {"method", text_of(method)},
                    {"path", text_of(path)}, {"status", status},
                    {"complete", complete},  {"ms", tenths(ms)},
                    {"bytes", bytes}};
  if (is_generation) {
    line["model"] = text_of(model);
    line["stream"] = stream;
    line["choices"] = choices;
    line["prompt_tokens"] = prompt_tokens;
    line["cached_tokens"] = cached_tokens;
    line["completion_tokens"] = completion_tokens;
    if (first_token_ms) line["first_token_ms"] = tenths(*first_token_ms);
    line["finish"] = finish;
  }
  return dump_json(line, {.item_separator = ",", .key_separator = ":"});
}

std::unique_ptr<AccessLog> AccessLog::open(const std::string& path) {
  if (path == "-") return std::unique_ptr<AccessLog>(new AccessLog(stderr, ""));
  return std::unique_ptr<AccessLog>(new AccessLog(open_to_append(path), path));
}

AccessLog::AccessLog(std::FILE* file, std::string path) : path_(std::move(path)), file_(file) {
  thread_ = std::thread([this] { run(); });
}

AccessLog::~AccessLog() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  arrived_.notify_one();
  thread_.join();
  if (!path_.empty()) std::fclose(file_);
}

void AccessLog::reopen() {
  if (path_.empty()) return;
  std::FILE* file = open_to_append(path_);
  const std::lock_guard lock(mutex_);
  if (next_file_ != nullptr) std::fclose(next_file_);
  next_file_ = file;
  arrived_.notify_one();
}

void AccessLog::write(std::string line) {
  {
    const std::lock_guard lock(mutex_);
    if (lines_.size() >= kMaxWaiting) {
      ++dropped_;
      return;
    }
    lines_.push_back(std::move(line));
  }
  arrived_.notify_one();
}

void AccessLog::run() {
  std::vector<std::string> taken;
  for (bool more = true; more;) {
    uint64_t dropped;
    {
      std::unique_lock lock(mutex_);
      arrived_.wait(lock, [&] { return !lines_.empty() || next_file_ != nullptr || stopping_; });
      taken.clear();
      std::swap(taken, lines_);
      if (next_file_ != nullptr) {
        std::fclose(file_);
        file_ = std::exchange(next_file_, nullptr);
      }
      dropped = std::exchange(dropped_, 0);
      more = !stopping_ || !taken.empty();
    }
    std::string text;
    for (const std::string& line : taken) text += line + "\n";
    if (dropped > 0) text += fmt::format("{{\"lines_dropped\":{}}}\n", dropped);
    std::fwrite(text.data(), 1, text.size(), file_);
    std::fflush(file_);
  }
}

}  // namespace nibble
