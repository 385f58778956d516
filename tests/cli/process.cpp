// SPDX-License-Identifier: Apache-2.0
#include "cli/process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "base/file.h"
#include "formats/testing.h"

namespace nibble::cli_test {
namespace {

[[noreturn]] void become_nibble(const Command& run, const fs::path& in, const fs::path& out,
                                const fs::path& err) {
  const int input = ::open(in.c_str(), O_RDONLY);
  const int output = ::open(out.c_str(), O_WRONLY | O_CREAT, 0600);
  const int errors = ::open(err.c_str(), O_WRONLY | O_CREAT, 0600);
  ::dup2(input, STDIN_FILENO);
  ::dup2(output, STDOUT_FILENO);
  ::dup2(errors, STDERR_FILENO);
  if (run.max_file_bytes > 0) {
    const struct rlimit limit{run.max_file_bytes, run.max_file_bytes};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  std::vector<char*> argv = {const_cast<char*>(NIBBLE_BINARY)};
  for (const std::string& argument : run.arguments) {
    argv.push_back(const_cast<char*>(argument.c_str()));
  }
  argv.push_back(nullptr);
  ::execv(NIBBLE_BINARY, argv.data());
  ::_exit(127);
}

}  // namespace

Result run_nibble(const Command& run) {
  const testing_::TemporaryDirectory scratch;
  const fs::path in = scratch / "in", out = scratch / "out", err = scratch / "err";
  testing_::write_text(in, run.input);
  Result result;
  const pid_t child = ::fork();
  if (child == 0) become_nibble(run, in, out, err);
  const auto start = std::chrono::steady_clock::now();
  bool sent = false;
  for (;;) {
    int status = 0;
    const pid_t ended = ::waitpid(child, &status, WNOHANG);
    if (ended == child) {
      result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      break;
    }
    if (!sent && run.signal_when && run.signal_when()) {
      sent = true;
      result.was_signalled = ::kill(child, run.signal) == 0;
    }
    if (std::chrono::steady_clock::now() - start > std::chrono::minutes(5)) {
      ADD_FAILURE() << "nibble took more than five minutes";
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
      break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(run.signal_when ? 200 : 2000));
  }
  result.out = read_file(out);
  result.err = read_file(err);
  return result;
}

}  // namespace nibble::cli_test
