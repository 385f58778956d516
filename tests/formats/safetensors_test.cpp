// The parser against a table of corruptions, the writer against the parser.
// SPDX-License-Identifier: Apache-2.0
#include "formats/safetensors.h"

#include "testing.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;
using testing_::catch_error;
using testing_::raw_safetensors;
using testing_::TemporaryDirectory;

SafetensorsHeader parse(std::string_view file) {
  return parse_safetensors_header(std::as_bytes(std::span(file.data(), file.size())),
                                  "x.safetensors");
}

TEST(Safetensors, ValidHeaders) {
  const SafetensorsHeader header = parse(raw_safetensors(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[],"data_offsets":[8,12]},)"
      R"("a":{"shape":[2,2],"data_offsets":[0,8],"dtype":"BF16"},"z":{"dtype":"I8","shape":[0,9223372036854775807,9],"data_offsets":[12,12]},)"
      R"("n":{"dtype":"F4","shape":[3,2],"data_offsets":[12,15]},"t\u00e9\"":{"dtype":"U8","shape":[1],"data_offsets":[15,16]}}   )",
      "0123456789abcdef"));
  ASSERT_EQ(header.entries.size(), 5u);
  EXPECT_EQ(header.entries[0].name, "a");  // by offset
  EXPECT_EQ(header.entries[0].shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(header.entries[1].name, "b");
  EXPECT_TRUE(header.entries[1].shape.empty());
  EXPECT_EQ(header.entries[2].name, "z");
  EXPECT_EQ(header.entries[3].dtype, DType::kF4);
  EXPECT_EQ(header.entries[4].name, "t\xc3\xa9\"");
  EXPECT_EQ(header.metadata, (decltype(header.metadata){{"format", "pt"}}));
  EXPECT_TRUE(parse(raw_safetensors("{}", "")).entries.empty());
}

struct Corruption {
  const char* title;
  std::string file;
  std::vector<std::string> named;
};

std::string one(std::string_view entry, std::string_view data = "12345678") {
  return raw_safetensors(fmt::format(R"({{"w":{}}})", entry), data);
}

TEST(Safetensors, EveryCorruptionIsRefusedByName) {
  const std::string good = one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})");
  ASSERT_NO_THROW(parse(good));
  const auto with_length = [&](uint64_t length) {
    std::string file = good;
    std::memcpy(file.data(), &length, 8);
    return file;
  };
  const std::vector<Corruption> table = {
      {"empty file", "", {"0 bytes"}},
      {"seven bytes", "1234567", {"7 bytes"}},
      {"only a length", std::string(8, '\0'), {"'{'"}},
      {"header cap", with_length(100'000'001), {"100000001", "100000000"}},
      {"huge length", with_length(~uint64_t{0}), {"18446744073709551615"}},
      {"header past the end", with_length(1000), {"1000", "download"}},
      {"not an object", raw_safetensors("[1]", ""), {"'{'"}},
      {"space first", raw_safetensors(" {}", ""), {"'{'"}},
      {"cut JSON", raw_safetensors(R"({"w":{"dtype":"F32")", ""), {"valid JSON"}},
      {"two objects", raw_safetensors("{}{}", ""), {"follows the header"}},
      {"text after", raw_safetensors("{} x", ""), {"follows the header"}},
      {"zero byte after", raw_safetensors(std::string_view("{}\0", 3), ""), {"follows the header"}},
      {"broken UTF-8", raw_safetensors("{\"\xff\xfe\":{}}", ""), {"valid JSON"}},
      {"deep nesting", raw_safetensors(R"({"w":{"shape":[[[[[[1]]]]]]}})", ""), {"\"w\"", "shape"}},
      {"duplicate tensor",
       raw_safetensors(
           R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
           "1"),
       {"\"w\"", "twice"}},
      {"duplicate field",
       one(R"({"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]})"),
       {"\"shape\"", "twice", "\"w\""}},
      {"duplicate by escape",
       raw_safetensors(
           R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0077":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
           "1"),
       {"\"w\"", "twice"}},
      {"duplicate metadata",
       raw_safetensors(R"({"__metadata__":{"a":"1","a":"2"}})", ""),
       {"\"a\"", "twice", "__metadata__"}},
      {"two metadata",
       raw_safetensors(R"({"__metadata__":{},"__metadata__":{}})", ""),
       {"__metadata__", "twice"}},
      {"metadata number",
       raw_safetensors(R"({"__metadata__":{"a":1}})", ""),
       {"__metadata__", "\"a\"", "string"}},
      {"metadata object",
       raw_safetensors(R"({"__metadata__":{"a":{}}})", ""),
       {"__metadata__", "\"a\""}},
      {"metadata list", raw_safetensors(R"({"__metadata__":["a"]})", ""), {"__metadata__"}},
      {"dtype name",
       one(R"({"dtype":"bf16","shape":[4],"data_offsets":[0,8]})"),
       {"\"w\"", "\"bf16\""}},
      {"dtype number", one(R"({"dtype":5,"shape":[4],"data_offsets":[0,8]})"), {"\"w\"", "dtype"}},
      {"no dtype", one(R"({"shape":[2],"data_offsets":[0,8]})"), {"\"w\"", "dtype"}},
      {"no shape", one(R"({"dtype":"F32","data_offsets":[0,8]})"), {"\"w\"", "shape"}},
      {"no offsets", one(R"({"dtype":"F32","shape":[2]})"), {"\"w\"", "data_offsets"}},
      {"unknown field",
       one(R"({"dtype":"F32","shape":[2],"offset":[0,8]})"),
       {"\"w\"", "\"offset\""}},
      {"entry is a number", raw_safetensors(R"({"w":3})", ""), {"\"w\"", "object"}},
      {"entry is null", raw_safetensors(R"({"w":null})", ""), {"\"w\"", "null"}},
      {"negative dimension",
       one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"),
       {"\"w\"", "-2", "shape"}},
      {"fraction",
       one(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"),
       {"\"w\"", "shape"}},
      {"text dimension",
       one(R"({"dtype":"F32","shape":["2"],"data_offsets":[0,8]})"),
       {"\"w\"", "shape"}},
      {"dimension past 2^63",
       one(R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]})"),
       {"\"w\"", "2^63"}},
      {"dimension past 2^64",
       one(R"({"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]})"),
       {"\"w\"", "shape"}},
      {"product overflows",
       one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})"),
       {"\"w\"", "overflow"}},
      {"bits overflow",
       one(R"({"dtype":"F64","shape":[1152921504606846976],"data_offsets":[0,8]})"),
       {"\"w\"", "overflow"}},
      {"half a byte",
       one(R"({"dtype":"F4","shape":[3],"data_offsets":[0,2]})", "12"),
       {"\"w\"", "whole bytes"}},
      {"one offset",
       one(R"({"dtype":"F32","shape":[2],"data_offsets":[8]})"),
       {"\"w\"", "data_offsets"}},
      {"three offsets",
       one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})"),
       {"\"w\"", "data_offsets"}},
      {"swapped offsets",
       one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"),
       {"\"w\"", "data_offsets"}},
      {"too few bytes",
       one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
       {"\"w\"", "12", "8"}},
      {"offsets past the end",
       one(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})"),
       {"\"w\"", "16", "8"}},
      {"data after the last",
       one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})"),
       {"\"w\"", "4", "8"}},
      {"hole first",
       one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
       {"\"w\"", "holes"}},
      {"hole",
       raw_safetensors(
           R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})",
           "12345"),
       {"\"a\"", "\"b\"", "holes"}},
      {"overlap",
       raw_safetensors(
           R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
           "1234"),
       {"\"a\"", "\"b\"", "overlap"}},
      {"same bytes twice",
       raw_safetensors(
           R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
           "1234"),
       {"\"a\"", "\"b\"", "overlap"}},
      {"no tensors but data", raw_safetensors("{}", "1234"), {"4 bytes of data"}},
  };
  for (const Corruption& corruption : table) {
    SCOPED_TRACE(corruption.title);
    const auto caught = catch_error([&] { parse(corruption.file); });
    EXPECT_EQ(caught.kind, ErrorKind::kInput);
    EXPECT_THAT(caught.message, HasSubstr("x.safetensors"));
    for (const std::string& part : corruption.named) EXPECT_THAT(caught.message, HasSubstr(part));
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string file = raw_safetensors(
      R"({"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})",
      "12345678abc");
  ASSERT_NO_THROW(parse(file));
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_THROW(parse(std::string_view(file).substr(0, size)), Error) << size;
  }
  EXPECT_THROW(parse(file + "x"), Error);
}

TEST(Safetensors, WriterThenReaderIsByteEqual) {
  TemporaryDirectory directory;
  for (const uint64_t alignment : {8u, 64u, 4096u}) {
    const fs::path path = directory / fmt::format("{}.safetensors", alignment);
    std::vector<std::byte> first(10), second(4096 + 3), third(64);
    for (size_t i = 0; i < second.size(); ++i) second[i] = static_cast<std::byte>(i * 7);
    for (size_t i = 0; i < 10; ++i) first[i] = static_cast<std::byte>(200 + i);
    SafetensorsWriter writer =
        SafetensorsWriter::create(path,
                                  {{"one \"quoted\" \xc3\xa9", DType::kU8, {10}},
                                   {"nothing", DType::kF32, {0, 5}},
                                   {"two", DType::kI8, {4099}},
                                   {"three", DType::kBF16, {4, 8}}},
                                  {{"plan", "{\"a\": 1}\n"}}, alignment);
    writer.write(first);
    writer.write(std::span(second).first(1000));  // in pieces
    std::vector<std::byte> rest(second.begin() + 1000, second.end());
    rest.insert(rest.end(), third.begin(), third.end());  // and across a boundary
    writer.write(rest);
    EXPECT_FALSE(fs::exists(path)) << "visible before commit";
    writer.commit();
    const SafetensorsFile file = SafetensorsFile::open(path);
    EXPECT_EQ(file.metadata(),
              (std::vector<std::pair<std::string, std::string>>{{"plan", "{\"a\": 1}\n"}}));
    const auto bytes = [&](std::string_view name) {
      const auto view = file.tensor(name).bytes;
      return std::vector<std::byte>(view.begin(), view.end());
    };
    EXPECT_EQ(bytes("one \"quoted\" \xc3\xa9"), first);
    EXPECT_EQ(bytes("two"), second);
    EXPECT_EQ(bytes("three"), third);
    EXPECT_EQ(file.tensor("nothing").shape, (std::vector<int64_t>{0, 5}));
    EXPECT_EQ(file.entries().size(), alignment == 8 ? 4u : 6u);  // pads before "two" and "three"
    const std::byte* base = file.file().bytes().data();
    if (alignment > 8) {
      for (const auto& entry : file.entries()) {
        if (entry.name.starts_with("pad.")) {
          EXPECT_EQ(entry.dtype, DType::kU8);
          for (const std::byte b : file.tensor(entry.name).bytes) EXPECT_EQ(b, std::byte{0});
        } else if (entry.end > entry.begin) {
          EXPECT_EQ(static_cast<uint64_t>(file.tensor(entry.name).bytes.data() - base) % alignment,
                    0u)
              << entry.name;
        }
      }
    }
    EXPECT_EQ(static_cast<uint64_t>(bytes("one \"quoted\" \xc3\xa9").size()), 10u);
    EXPECT_EQ(static_cast<uint64_t>(file.tensor("one \"quoted\" \xc3\xa9").bytes.data() - base) %
                  alignment,
              0u);
  }
}

TEST(Safetensors, WriterChecksItsCaller) {
  TemporaryDirectory directory;
  const fs::path path = directory / "a.safetensors";
  const std::vector<std::byte> eight(8);
  {
    SafetensorsWriter writer = SafetensorsWriter::create(path, {{"a", DType::kF32, {3}}}, {});
    writer.write(eight);
    EXPECT_EQ(catch_error([&] { writer.commit(); }).kind, ErrorKind::kInternal);      // incomplete
    EXPECT_EQ(catch_error([&] { writer.write(eight); }).kind, ErrorKind::kInternal);  // too much
  }
  EXPECT_EQ(catch_error([&] {
              SafetensorsWriter::create(path, {{"a", DType::kU8, {1}}, {"a", DType::kU8, {1}}}, {});
            }).kind,
            ErrorKind::kInternal);
  EXPECT_TRUE(fs::is_empty(directory.path())) << "a temporary was left";
}

TEST(Safetensors, FileErrorsNameFileAndTensor) {
  TemporaryDirectory directory;
  const fs::path path = directory / "a.safetensors";
  EXPECT_EQ(catch_error([&] { SafetensorsFile::open(path); }).kind, ErrorKind::kIo);
  testing_::write_text(
      path, raw_safetensors(R"({"weight":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "1"));
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_TRUE(file.contains("weight"));
  EXPECT_FALSE(file.contains("wieght"));
  EXPECT_THAT(catch_error([&] { file.tensor("wieght"); }).message,
              ::testing::AllOf(HasSubstr("a.safetensors"), HasSubstr("\"wieght\""),
                               HasSubstr("\"weight\"")));
  testing_::write_text(directory / "empty", "");
  EXPECT_EQ(catch_error([&] { SafetensorsFile::open(directory / "empty"); }).kind,
            ErrorKind::kInput);
}

}  // namespace
}  // namespace nibble
