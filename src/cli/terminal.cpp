// SPDX-License-Identifier: Apache-2.0
#include "cli/terminal.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/interrupt.h"

namespace nibble::cli {
namespace {

extern "C" void on_signal(int signal) {
  if (interrupt_requested()) {
    ::signal(signal, SIG_DFL);
    ::raise(signal);
  }
  request_interrupt();
}

extern "C" void on_hangup(int) { request_reload(); }

std::string human_count(double count) {
  if (count >= 1e9) return fmt::format("{:.2f}G", count / 1e9);
  if (count >= 1e6) return fmt::format("{:.2f}M", count / 1e6);
  if (count >= 1e4) return fmt::format("{:.1f}k", count / 1e3);
  if (count >= 100 || count == std::floor(count)) return fmt::format("{:.0f}", count);
  return fmt::format("{:.2f}", count);
}

}  // namespace

void install_interrupt_handler() {
  struct sigaction action{};
  action.sa_handler = on_signal;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  // Beyond `ulimit -f` write() then fails as it does on a full disk, and cleaning up can follow.
  ::signal(SIGXFSZ, SIG_IGN);
}

void install_reload_handler() {
  struct sigaction action{};
  action.sa_handler = on_hangup;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGHUP, &action, nullptr);
}

std::string human_duration(double seconds) {
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<int64_t>(seconds + 0.5);
  if (whole < 3600) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  return fmt::format("{} h {:02} min", whole / 3600, whole % 3600 / 60);
}

TerminalProgress::TerminalProgress() : is_terminal_(::isatty(STDERR_FILENO) == 1) {}
TerminalProgress::~TerminalProgress() {
  if (active_ && is_terminal_) print_stderr("\n");
}

void TerminalProgress::begin(std::string_view stage, int64_t total, std::string_view unit) {
  if (active_) end();
  stage_ = stage;
  unit_ = unit;
  total_ = total;
  done_ = 0;
  active_ = true;
  start_ = last_shown_ = std::chrono::steady_clock::now();
  if (is_terminal_) show(false);
}

void TerminalProgress::advance(int64_t done) {
  done_ = done;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_shown_ < std::chrono::milliseconds(is_terminal_ ? 100 : 10000)) return;
  last_shown_ = now;
  show(false);
}

void TerminalProgress::end() {
  if (!active_) return;
  if (total_ > 0) done_ = std::max(done_, total_);
  show(true);
  active_ = false;
}

void TerminalProgress::note(std::string_view message) {
  print_stderr("{}{}\n", active_ && is_terminal_ ? "\r\033[K" : "", message);
  if (active_ && is_terminal_) show(false);
}

void TerminalProgress::show(bool final) {
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const double rate = seconds > 0 ? static_cast<double>(done_) / seconds : 0;
  std::string line = stage_;
  if (final) {
    line += fmt::format(": {} {} in {}", human_count(static_cast<double>(done_)), unit_,
                        human_duration(seconds));
    if (rate > 0) line += fmt::format(" ({} {}/s)", human_count(rate), unit_);
  } else {
    line += fmt::format(": {}", human_count(static_cast<double>(done_)));
    if (total_ > 0) {
      line += fmt::format("/{} {} ({:.0f}%)", human_count(static_cast<double>(total_)), unit_,
                          100.0 * static_cast<double>(done_) / static_cast<double>(total_));
    }
    if (rate > 0) {
      line += fmt::format(", {} {}/s", human_count(rate), unit_);
      if (total_ > done_)
        line +=
            fmt::format(", {} left", human_duration(static_cast<double>(total_ - done_) / rate));
    }
  }
  if (is_terminal_) {
    print_stderr("\r\033[K{}{}", line, final ? "\n" : "");
    std::fflush(stderr);
  } else {
    print_stderr("{}\n", line);
  }
}

}  // namespace nibble::cli
