// What a person sees who mistypes: the nearest flag or command, the file and what was wanted; exit
// status 2 for misuse, 1 for everything else. SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "base/json.h"
#include "cli/process.h"
#include "formats/testing.h"

namespace nibble::cli_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing_::TemporaryDirectory;

const std::string kNano = NIBBLE_SOURCE_DIR "/models/nano";
const std::vector<std::string> kCommands = {"quantize", "build", "chat",    "run",  "tokenize",
                                            "render",   "eval",  "inspect", "bench"};

std::string misuse(std::vector<std::string> arguments) {
  const Result result = nibble(std::move(arguments));
  EXPECT_EQ(result.status, 2) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  return result.err;
}

std::string failure(std::vector<std::string> arguments, const std::string& input = {}) {
  const Result result = nibble(std::move(arguments), input);
  EXPECT_EQ(result.status, 1) << result.err;
  return result.err;
}

TEST(Usage, UnknownFlagsNameTheNearestEvenWhenARequiredOneIsMissing) {
  EXPECT_THAT(misuse({"quantize", kNano, "--outt", "x"}),
              AllOf(HasSubstr("unknown flag --outt"), HasSubstr("did you mean --out?"),
                    HasSubstr("nibble quantize --help")));
  EXPECT_THAT(misuse({"quantize", "--calib-sise=3", kNano}),
              AllOf(HasSubstr("unknown flag --calib-sise;"), HasSubstr("--calib-size?")));
  EXPECT_THAT(misuse({"build", "a", "--out", "b", "--max-batchsize", "3"}),
              HasSubstr("did you mean --max-batch-size?"));
  EXPECT_THAT(misuse({"run", "a", "b", "--temprature", "0"}),
              HasSubstr("did you mean --temperature?"));
  EXPECT_THAT(misuse({"chat", "a", "--no-stats"}), HasSubstr("unknown flag --no-stats"));
  EXPECT_THAT(misuse({"eval", "--contxt", "8"}), HasSubstr("did you mean --context?"));
  EXPECT_THAT(misuse({"bench", "latency", "--sythetic", "x"}),
              HasSubstr("did you mean --synthetic?"));
  EXPECT_THAT(misuse({"inspect", "--tensr", "x"}), HasSubstr("did you mean --tensor?"));
  EXPECT_THAT(misuse({"tokenize", "x", "--boss"}), HasSubstr("did you mean --bos?"));
  EXPECT_THAT(misuse({"render", "x", "--hlp"}), HasSubstr("did you mean --help?"));
  EXPECT_THAT(misuse({"--versoin"}), HasSubstr("did you mean --version?"));
}

TEST(Usage, UnknownAndMissingCommandsNameTheKnownOnes) {
  EXPECT_THAT(misuse({"quantise", "x"}),
              AllOf(HasSubstr("unknown command quantise"), HasSubstr("did you mean quantize?")));
  const std::string none = misuse({});
  for (const std::string& command : kCommands) EXPECT_THAT(none, HasSubstr(command));
}

TEST(Usage, MissingAndSurplusArgumentsAreNamed) {
  EXPECT_THAT(misuse({"quantize", kNano}),
              AllOf(HasSubstr("--out is required"), HasSubstr("nibble quantize --help")));
  EXPECT_THAT(misuse({"build", "--out", "x"}), HasSubstr("give a CHECKPOINT"));
  EXPECT_THAT(misuse({"inspect", kNano, "more"}), HasSubstr("unexpected argument more"));
  EXPECT_THAT(misuse({"eval", kNano}), AllOf(HasSubstr("--text"), HasSubstr("--ids")));
  EXPECT_THAT(misuse({"bench", "latency"}), AllOf(HasSubstr("MODEL"), HasSubstr("--synthetic")));
}

TEST(Usage, ValuesOutOfRangeAreRefusedBeforeAnyWork) {
  EXPECT_THAT(misuse({"quantize", kNano, "--out", "x", "--method", "awk"}), HasSubstr("awq"));
  EXPECT_THAT(misuse({"quantize", kNano, "--out", "x", "--group-size", "32"}), HasSubstr("128"));
  EXPECT_THAT(misuse({"quantize", kNano, "--out", "x", "--calib-size", "0"}),
              HasSubstr("--calib-size"));
  EXPECT_THAT(misuse({"build", "a", "--out", "b", "--kv-cache", "fp8"}), HasSubstr("int8-static"));
  EXPECT_THAT(misuse({"build", "a", "--out", "b", "--max-num-tokens", "0"}),
              HasSubstr("--max-num-tokens"));
  EXPECT_THAT(misuse({"run", "a", "b", "--top-p", "1.5"}), HasSubstr("--top-p"));
  EXPECT_THAT(misuse({"bench", "speed"}), HasSubstr("throughput"));
  EXPECT_THAT(misuse({"bench", "latency", "--synthetic", "mistral-8b"}),
              AllOf(HasSubstr("mistral-7b"), HasSubstr("bench-1.1b")));
  EXPECT_THAT(misuse({"build", kNano, "--out", "b", "--target", "cpu:avx1024"}),
              HasSubstr("avx512"));
}

TEST(Usage, BadPathsAreNamed) {
  const TemporaryDirectory scratch;
  const std::string nowhere = scratch / "nowhere", empty = scratch / "empty";
  fs::create_directories(empty);
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"quantize", nowhere, "--out", "x"},
        {"build", nowhere, "--out", "x"},
        {"run", nowhere, "hello"},
        {"eval", nowhere, "--ids", "x.u16"},
        {"inspect", nowhere},
        {"bench", "latency", nowhere},
        {"tokenize", nowhere},
        {"render", nowhere}}) {
    EXPECT_THAT(failure(arguments), HasSubstr(nowhere)) << arguments[0];
  }
  EXPECT_THAT(failure({"inspect", empty}), HasSubstr("is no model"));
  EXPECT_THAT(failure({"eval", kNano, "--ids", nowhere + ".u16"}), HasSubstr(nowhere));
  EXPECT_THAT(misuse({"eval", kNano, "--ids", kNano + "/config.json"}), HasSubstr(".u16"));
  EXPECT_THAT(
      failure({"quantize", kNano, "--out", scratch / "no" / "x.safetensors", "--calib", nowhere}),
      HasSubstr(nowhere));
  EXPECT_THAT(failure({"quantize", kNano, "--method", "rtn", "--kv-cache", "none", "--out", kNano}),
              AllOf(HasSubstr(kNano), HasSubstr("exists already")));
  EXPECT_THAT(failure({"tokenize", kNano}, "not json\n"), HasSubstr("line 1"));
}

TEST(Usage, QuantizingOnAGpuRefusesWhatItHasNot) {
  const fs::path out = fs::temp_directory_path() / "nibble_never_written";
  const std::vector<std::string> command = {"quantize",   kNano,      "--out",
                                            out.string(), "--device", "cuda"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), command.begin(), command.end());
    return more;
  };
  EXPECT_THAT(nibble(with({"--method", "rtn", "--kv-cache", "none"})).err,
              HasSubstr("calibrates nothing"));
  EXPECT_THAT(failure(with({"--method", "awq-lite"})), HasSubstr("--method awq-lite"));
  EXPECT_FALSE(fs::exists(out));
}

TEST(Usage, HelpNamesEveryFlagOfTheCommandAndItsDefaults) {
  const auto help = [](const std::string& command) {
    const Result result = nibble({command, "--help"});
    EXPECT_EQ(result.status, 0);
    EXPECT_EQ(result.err, "");
    return result.out;
  };
  const std::string top = nibble({"--help"}).out;
  for (const std::string& command : kCommands) EXPECT_THAT(top, HasSubstr("\n  " + command));
  const std::vector<std::pair<std::string, std::vector<std::string>>> flags = {
      {"quantize",
       {"HF_DIR", "--out", "--calib", "--calib-size", "(64)", "--calib-seq-len", "(5675)",
        "--calib-batch", "(16)", "--group-size", "(128)", "--kv-cache", "--method", "(awq)", "--tp",
        "--dtype", "--device"}},
      {"build",
       {"CHECKPOINT", "--out", "--target", "(cpu:native)", "--max-batch-size", "(64)",
        "--max-input-len", "(5525)", "--max-output-len", "(150)", "--max-num-tokens", "default 512",
        "--kv-cache", "(int8)"}},
      {"chat", {"DIR", "/regenerate", "/continue", "/system", "/save"}},
      {"run", {"DIR", "PROMPT", "--max-tokens", "--temperature"}},
      {"tokenize", {"DIR", "--bos", "--parse-special", "--decode", "--tokenizer-regex"}},
      {"render", {"SOURCE", ".jinja"}},
      {"eval", {"MODEL", "--text", "--ids", "--context", "(1024)", "--against", "--json"}},
      {"inspect", {"MODEL", "--tensor", "--verify", "--json"}},
      {"bench", {"latency", "throughput", "ops", "--synthetic", "bench-1.1b", "--json"}}};
  for (const auto& [command, names] : flags) {
    const std::string text = help(command);
    for (const std::string& name : names) EXPECT_THAT(text, HasSubstr(name)) << command;
  }
  EXPECT_EQ(nibble({"--version"}).out, "nibble " NIBBLE_VERSION "\n");
}

TEST(Usage, AFullStandardOutputIsAnError) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  const std::string command =
      std::string(NIBBLE_BINARY) + " inspect '" + kNano + "' > /dev/full 2>/dev/null";
  EXPECT_NE(std::system(command.c_str()), 0);
}

}  // namespace
}  // namespace nibble::cli_test
