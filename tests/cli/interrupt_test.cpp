// Ctrl-C and a full disk in the middle of long work: no artifact, no temporary, a sentence.
// SPDX-License-Identifier: Apache-2.0
#include <signal.h>
#include <sys/mount.h>

#include "cli/process.h"
#include "formats/testing.h"

namespace nibble::cli_test {
namespace {

using testing::AnyOf;
using testing::HasSubstr;
using testing_::TemporaryDirectory;

const std::string kNano = NIBBLE_SOURCE_DIR "/models/nano";

std::vector<std::string> everything_under(const fs::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    names.push_back(entry.path().string());
  }
  return names;
}

/// Runs `arguments` (whose output is `out`) again and again, interrupting later each time, until it
/// was caught at work at least `wanted` times. A run that won the race must be whole.
void interrupt(const std::vector<std::string>& arguments, const fs::path& directory,
               const fs::path& out, const fs::path& final_file, int signal) {
  const fs::path temporary = out.string() + ".tmp";
  int caught = 0;
  for (int attempt = 0; attempt < 20 && caught < 3; ++attempt) {
    int polls = 0;
    const Result result =
        run_nibble({.arguments = arguments,
                    .signal_when = [&] { return fs::exists(temporary) && polls++ >= 4 * attempt; },
                    .signal = signal});
    if (result.status == 0) {
      EXPECT_TRUE(fs::exists(final_file)) << result.err;
      EXPECT_FALSE(fs::exists(temporary));
      fs::remove_all(out);
      continue;
    }
    ++caught;
    EXPECT_TRUE(result.was_signalled) << result.err;
    EXPECT_EQ(result.status, 130) << result.err;
    EXPECT_THAT(result.err, HasSubstr("interrupted"));
    EXPECT_THAT(everything_under(directory), testing::IsEmpty());
  }
  EXPECT_GT(caught, 0) << "every run ended before the signal came";
}

TEST(Interrupt, QuantizeLeavesNothing) {
  const TemporaryDirectory scratch;
  const fs::path out = scratch / "model";
  interrupt({"quantize", kNano, "--out", out, "--method", "rtn", "--kv-cache", "none"},
            scratch.path(), out, out / "trt-llm/checkpoints/config.json", SIGINT);
}

// Whoever ended it, the same command goes on after the last finished layer and writes what a run in
// one go writes.
TEST(Interrupt, QuantizeGoesOnAfterBeingKilledOrInterrupted) {
  const TemporaryDirectory scratch;
  const auto arguments = [&](const fs::path& out) {
    return std::vector<std::string>{"quantize",     kNano, "--out",           out,
                                    "--calib-size", "4",   "--calib-seq-len", "128"};
  };
  const fs::path whole = scratch / "whole", out = scratch / "model";
  ASSERT_EQ(nibble(arguments(whole)).status, 0);
  const fs::path kept = out.string() + ".tmp/unfinished";
  int layer = 1;
  for (const int signal : {SIGKILL, SIGINT}) {
    const fs::path finished = kept / fmt::format("layer-{}.safetensors", layer++);
    const Result result = run_nibble({.arguments = arguments(out),
                                      .signal_when = [&] { return fs::exists(finished); },
                                      .signal = signal});
    ASSERT_TRUE(result.was_signalled) << result.err;
    EXPECT_FALSE(fs::exists(out));
    ASSERT_TRUE(fs::exists(finished)) << result.err;
    if (signal == SIGINT) {
      EXPECT_EQ(result.status, 130);
      EXPECT_THAT(result.err, HasSubstr("continuing after layer 2 of 6"));
      EXPECT_THAT(result.err, HasSubstr("the same command goes on from there"));
    }
  }
  std::vector<std::string> other = arguments(out);
  other.insert(other.end(), {"--group-size", "64"});
  const Result refused = nibble(other);
  EXPECT_EQ(refused.status, 2);
  EXPECT_THAT(refused.err, HasSubstr("begun with"));
  ASSERT_TRUE(fs::exists(kept)) << "the work of hours went with a mistyped flag";
  const Result result = nibble(arguments(out));
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("continuing after layer"));
  EXPECT_FALSE(fs::exists(out.string() + ".tmp"));
  EXPECT_FALSE(fs::exists(out / "unfinished"));
  for (const char* name : {"config.json", "rank0.safetensors"}) {
    EXPECT_EQ(read_file(out / "trt-llm/checkpoints" / name),
              read_file(whole / "trt-llm/checkpoints" / name))
        << name;
  }
}

TEST(Interrupt, BuildLeavesNothing) {
  const TemporaryDirectory scratch;
  const fs::path out = scratch / "engine";
  interrupt({"build", kNano, "--out", out}, scratch.path(), out, out / "rank0.engine", SIGINT);
}

TEST(Interrupt, SigtermIsAsGood) {
  const TemporaryDirectory scratch;
  const fs::path out = scratch / "engine";
  interrupt({"build", kNano, "--out", out}, scratch.path(), out, out / "rank0.engine", SIGTERM);
}

TEST(FullDisk, AFileSizeLimitLeavesNothing) {
  const TemporaryDirectory scratch;
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"quantize", kNano, "--method", "rtn", "--kv-cache", "none"},
        {"build", kNano}}) {
    for (const uint64_t limit : {uint64_t{100}, uint64_t{1} << 20}) {
      Command run{.arguments = arguments, .max_file_bytes = limit};
      run.arguments.insert(run.arguments.end(), {"--out", scratch / "out"});
      const Result result = run_nibble(run);
      EXPECT_EQ(result.status, 1) << arguments[0] << " " << limit << ": " << result.err;
      if (limit > 1000) {  // below, the message itself does not fit
        EXPECT_THAT(result.err, HasSubstr("nothing was left behind"));
      }
      EXPECT_THAT(everything_under(scratch.path()), testing::IsEmpty());
    }
  }
}

TEST(FullDisk, AFullFileSystemLeavesNothing) {
  const TemporaryDirectory scratch;
  if (::mount("tmpfs", scratch.path().c_str(), "tmpfs", 0, "size=3m") != 0) {
    GTEST_SKIP() << "mounting a small tmpfs needs root";
  }
  const fs::path& disk = scratch.path();
  for (std::vector<std::string> arguments :
       {std::vector<std::string>{"quantize", kNano, "--method", "rtn", "--kv-cache", "none"},
        {"build", kNano}}) {
    arguments.insert(arguments.end(), {"--out", disk / "out"});
    const Result result = nibble(arguments);
    EXPECT_EQ(result.status, 1) << result.err;
    EXPECT_THAT(result.err, HasSubstr("No space left on device"));
    EXPECT_THAT(everything_under(disk), testing::IsEmpty());
  }
  ::umount2(scratch.path().c_str(), MNT_DETACH);
}

}  // namespace
}  // namespace nibble::cli_test
