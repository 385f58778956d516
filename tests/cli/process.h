// Runs the nibble binary as a user does: arguments, standard input, both outputs, exit status; with
// a limit on file sizes, or a signal at a chosen moment. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace nibble::cli_test {

struct Command {
  std::vector<std::string> arguments;
  std::string input = {};
  /// RLIMIT_FSIZE of the process in bytes; 0: none.
  uint64_t max_file_bytes = 0;
  /// Polled while the process runs; once it says true, `signal` is sent (once).
  std::function<bool()> signal_when = {};
  int signal = 0;
};

struct Result {
  int status = -1;             // exit status; 128 + signal when a signal ended it
  bool was_signalled = false;  // the process was still there when `signal_when` said true
  std::string out, err;
};

/// Gives up (a test failure, the process killed) after five minutes.
Result run_nibble(const Command& run);
inline Result nibble(std::vector<std::string> arguments, std::string input = {}) {
  return run_nibble({.arguments = std::move(arguments), .input = std::move(input)});
}

}  // namespace nibble::cli_test
