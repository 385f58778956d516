// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cmath>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/json.h"
#include "base/thread_pool.h"

namespace nibble {
namespace {

fs::path fresh_directory() {
  std::string name = (fs::temp_directory_path() / "nibble-base-XXXXXX").string();
  EXPECT_NE(::mkdtemp(name.data()), nullptr);
  return name;
}

TEST(Half, EveryF16RoundTrips) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = f16_to_float(static_cast<uint16_t>(bits));
    if (std::isnan(value)) continue;
    EXPECT_EQ(float_to_f16(value), bits);
  }
}

TEST(Half, NarrowingRoundsToNearestEven) {
  EXPECT_EQ(float_to_f16(1.0f + 0x1p-11f), 0x3c00);      // tie to even
  EXPECT_EQ(float_to_f16(1.0f + 3 * 0x1p-11f), 0x3c02);  // tie to even, up
  EXPECT_EQ(float_to_f16(65520.0f), 0x7c00);             // half-way to infinity
  EXPECT_EQ(float_to_f16(65519.9f), 0x7bff);
  EXPECT_EQ(float_to_f16(0x1p-25f), 0x0000);  // tie to even at the subnormal edge
  EXPECT_EQ(float_to_bf16(1.0f + 0x1p-8f), 0x3f80);
  EXPECT_EQ(float_to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82);
}

TEST(Half, E4m3RoundTripsAndRounds) {
  for (int bits = 0; bits < 256; ++bits) {
    const float value = e4m3_to_float(static_cast<uint8_t>(bits));
    if ((bits & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      EXPECT_EQ(float_to_e4m3(value), bits);
    }
  }
  EXPECT_EQ(e4m3_to_float(0x7e), 448.0f);
  EXPECT_EQ(e4m3_to_float(0x01), 0x1p-9f);
  EXPECT_EQ(e4m3_to_float(0x38), 1.0f);
  EXPECT_EQ(float_to_e4m3(1.0f + 0x1p-4f), 0x38);      // tie to even
  EXPECT_EQ(float_to_e4m3(1.0f + 3 * 0x1p-4f), 0x3a);  // tie to even, up
  EXPECT_EQ(float_to_e4m3(0x1p-10f), 0x00);            // tie to even at the subnormal edge
  EXPECT_EQ(float_to_e4m3(3 * 0x1p-10f), 0x02);
  EXPECT_EQ(float_to_e4m3(0x1.fp-7f), 0x08);  // the largest subnormal and a half
  EXPECT_EQ(float_to_e4m3(-1e9f), 0xfe);
  EXPECT_EQ(float_to_e4m3(455.0f), 0x7e);
}

TEST(Json, PythonFloats) {
  EXPECT_EQ(python_float_repr(0.7), "0.7");
  EXPECT_EQ(python_float_repr(1.0), "1.0");
  EXPECT_EQ(python_float_repr(1e16), "1e+16");
  EXPECT_EQ(python_float_repr(1e15), "1000000000000000.0");
  EXPECT_EQ(python_float_repr(1e-5), "1e-05");
  EXPECT_EQ(python_float_repr(0.0001), "0.0001");
  EXPECT_EQ(python_float_repr(-0.0), "-0.0");
}

TEST(Json, KeepsOrderAndNumberKinds) {
  const std::string text = R"({"b": 1, "a": 1.0, "c": [1e20, null, true, {}], "d": {"x": []}})";
  EXPECT_EQ(dump_json(parse_json(text, "t")),
            R"({"b": 1, "a": 1.0, "c": [1e+20, null, true, {}], "d": {"x": []}})");
}

TEST(Json, LoneSurrogatesBecomeReplacementCharacters) {
  EXPECT_EQ(parse_json(R"("a\ud800b\\ud800\ud83d\ude00\udc00")", "t").as_string(),
            "a\xef\xbf\xbd"
            "b\\ud800\xf0\x9f\x98\x80\xef\xbf\xbd");
}

TEST(Json, ErrorsNameDocumentAndPlace) {
  try {
    parse_json("{\n  \"a\": tru\n}", "config.json");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInput);
    EXPECT_NE(std::string(error.what()).find("config.json"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("line 2"), std::string::npos) << error.what();
  }
  EXPECT_THROW(parse_json("1 2", "t"), Error);
  EXPECT_THROW(parse_json("", "t"), Error);
  EXPECT_THROW(parse_json(std::string(100, '[') + std::string(100, ']'), "t"), Error);
}

TEST(Json, EnsureAsciiUsesSurrogatePairs) {
  std::string out;
  append_json_string(out, "\xf0\x9f\x98\x80\xc3\xa9\x01", true);
  EXPECT_EQ(out, R"("\ud83d\ude00\u00e9\u0001")");
}

TEST(AtomicFile, UncommittedLeavesNothing) {
  const fs::path directory = fresh_directory();
  {
    AtomicFile file = AtomicFile::create(directory / "x");
    file.write("half");
  }
  EXPECT_TRUE(fs::is_empty(directory));
  write_file_atomically(directory / "x", "whole");
  EXPECT_EQ(read_file(directory / "x"), "whole");
  fs::remove_all(directory);
}

TEST(AtomicFile, FullDiskIsAnErrorThatLeavesNothing) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  // A write to a full device fails at write(2); reached through a symlink so that .tmp is
  // /dev/full.
  const fs::path directory = fresh_directory();
  fs::create_symlink("/dev/full", directory / "x.tmp");
  {
    AtomicFile file = AtomicFile::create(directory / "x");
    EXPECT_THROW(file.write("data"), Error);
  }
  EXPECT_FALSE(fs::exists(directory / "x"));
  fs::remove_all(directory);
}

TEST(AtomicDirectory, KeepsUnfinishedWorkForTheNextRun) {
  const fs::path base = fresh_directory();
  {
    AtomicDirectory out = AtomicDirectory::open_or_create(base / "out");
    write_file_atomically(out.path() / "half", "1");
    out.keep();
  }
  EXPECT_FALSE(fs::exists(base / "out"));
  {
    AtomicDirectory out = AtomicDirectory::open_or_create(base / "out");
    EXPECT_EQ(read_file(out.path() / "half"), "1");
    out.keep();
  }
  AtomicDirectory out = AtomicDirectory::open_or_create(base / "out");
  out.keep();
  out.commit();
  EXPECT_EQ(read_file(base / "out" / "half"), "1");
  EXPECT_FALSE(fs::exists(base / "out.tmp"));
}

TEST(AtomicDirectory, AppearsWholeOrNotAtAll) {
  const fs::path base = fresh_directory();
  {
    AtomicDirectory out = AtomicDirectory::create(base / "out");
    write_file_atomically(out.path() / "a", "1");
    EXPECT_FALSE(fs::exists(base / "out"));
  }
  EXPECT_TRUE(fs::is_empty(base));
  AtomicDirectory out = AtomicDirectory::create(base / "out");
  write_file_atomically(out.path() / "a", "1");
  out.commit();
  EXPECT_TRUE(fs::exists(base / "out" / "a"));
  EXPECT_THROW(AtomicDirectory::create(base / "out"), Error);
  fs::remove_all(base);
}

TEST(ThreadPool, EveryChunkOnceAndExceptionsArrive) {
  ThreadPool pool(4);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::atomic<int>> seen(97);
    pool.parallel_for(97, [&](int64_t chunk, int) { ++seen[static_cast<size_t>(chunk)]; });
    for (const auto& count : seen) EXPECT_EQ(count.load(), 1);
  }
  EXPECT_THROW(pool.parallel_for(8,
                                 [](int64_t chunk, int) {
                                   if (chunk == 3) fail(ErrorKind::kInput, "chunk {}", chunk);
                                 }),
               Error);
  pool.parallel_for(3, [](int64_t, int) {});
}

}  // namespace
}  // namespace nibble
