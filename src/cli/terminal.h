// How the CLI talks: progress with rate and ETA on a terminal, plain lines elsewhere; Ctrl-C;
// numbers for people. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <utility>

#include "base/progress.h"

namespace nibble::cli {

/// A message on stderr. Whether anybody can read it (closed, full) must not change what happens.
template <typename... Args>
void print_stderr(fmt::format_string<Args...> format, Args&&... args) {
  const std::string text = fmt::format(format, std::forward<Args>(args)...);
  std::fwrite(text.data(), 1, text.size(), stderr);
}

/// Progress on stderr. On a terminal one line is redrawn at most ten times a second; elsewhere a
/// line every ten seconds and one at the end of a stage.
class TerminalProgress final : public Progress {
 public:
  TerminalProgress();
  ~TerminalProgress() override;
  void begin(std::string_view stage, int64_t total, std::string_view unit) override;
  void advance(int64_t done) override;
  void end() override;
  void note(std::string_view message) override;

 private:
  void show(bool final);
  bool is_terminal_;
  std::string stage_, unit_;
  int64_t total_ = 0, done_ = 0;
  bool active_ = false;
  std::chrono::steady_clock::time_point start_, last_shown_;
};

/// Installs the SIGINT and SIGTERM handlers that set the interrupt flag; a second signal ends the
/// process.
void install_interrupt_handler();
void install_reload_handler();  // SIGHUP

std::string human_duration(double seconds);  // "1 min 05 s"

}  // namespace nibble::cli
