// SPDX-License-Identifier: Apache-2.0
#include "quantize/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "base/error.h"

namespace nibble {
namespace {

using testing::HasSubstr;

// One token a byte, 1 before and 2 after a document; a chat is its contents joined by 3.
CalibrationEncoder byte_encoder() {
  CalibrationEncoder encoder;
  encoder.text = [](std::string_view text) {
    std::vector<int32_t> ids = {1};
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    ids.push_back(2);
    return ids;
  };
  encoder.chat = [](const json::object& chat) {
    std::vector<int32_t> ids = {1};
    for (const json::value& message : chat.at("messages").as_array()) {
      if (message.at("role") == "narrator") fail(ErrorKind::kInput, "unknown role narrator");
      for (const char c : message.at("content").as_string())
        ids.push_back(static_cast<unsigned char>(c));
      ids.push_back(3);
    }
    return ids;
  };
  return encoder;
}

CalibrationData make_calibration(std::string name, std::string content,
                                 const CalibrationOptions& options,
                                 const CalibrationEncoder& encoder) {
  const CalibrationText text{std::move(name), std::move(content)};
  return nibble::make_calibration({&text, 1}, options, encoder);
}

std::string numbered_lines(int count) {
  std::string content;
  for (int i = 0; i < count; ++i) content += fmt::format("{{\"text\": \"{:04}\"}}\n", i);
  return content;
}

std::vector<int32_t> flatten(const CalibrationData& data) {
  std::vector<int32_t> all;
  for (const auto& sequence : data.sequences)
    all.insert(all.end(), sequence.begin(), sequence.end());
  return all;
}

TEST(Calibration, UsesEverySampleOnceWithoutPaddingWhenTheFileIsSmall) {
  const CalibrationData data = make_calibration(
      "c.jsonl", numbered_lines(50), {.size = 64, .seq_len = 7, .seed = 5}, byte_encoder());
  EXPECT_EQ(data.tokens, 50 * 6);
  EXPECT_EQ(data.sources[0].samples_used, 50);
  for (size_t i = 0; i + 1 < data.sequences.size(); ++i) EXPECT_EQ(data.sequences[i].size(), 7u);
  EXPECT_EQ(data.sequences.back().size(), 300u % 7);
  // Read back the stream: each document is complete and appears once.
  const std::vector<int32_t> all = flatten(data);
  std::map<std::string, int> seen;
  for (size_t i = 0; i < all.size(); i += 6) {
    ASSERT_EQ(all[i], 1);
    ASSERT_EQ(all[i + 5], 2);
    seen[std::string(all.begin() + static_cast<long>(i) + 1,
                     all.begin() + static_cast<long>(i) + 5)]++;
  }
  EXPECT_EQ(seen.size(), 50u);
  ASSERT_EQ(data.notices().size(), 1u);
  EXPECT_THAT(data.notices()[0], HasSubstr("300 tokens, 448 were asked for"));
}

TEST(Calibration, StopsAtTheSizeAskedForAndIsShuffledByTheSeed) {
  const CalibrationOptions options = {.size = 3, .seq_len = 20, .seed = 1};
  const CalibrationData a =
      make_calibration("c.jsonl", numbered_lines(1000), options, byte_encoder());
  EXPECT_EQ(a.sequences.size(), 3u);
  EXPECT_EQ(a.tokens, 60);
  EXPECT_EQ(a.sources[0].samples_used, 10);
  EXPECT_TRUE(a.notices().empty());
  const CalibrationData again =
      make_calibration("c.jsonl", numbered_lines(1000), options, byte_encoder());
  EXPECT_EQ(a.sequences, again.sequences);
  const CalibrationData other = make_calibration(
      "c.jsonl", numbered_lines(1000), {.size = 3, .seq_len = 20, .seed = 2}, byte_encoder());
  EXPECT_NE(a.sequences, other.sequences);
  const CalibrationData in_order = make_calibration("c.txt", "0000", options, byte_encoder());
  EXPECT_NE(std::vector<int32_t>(a.sequences[0].begin(), a.sequences[0].begin() + 6),
            in_order.sequences[0])
      << "the first sample of the file came first: not shuffled";
}

TEST(Calibration, RendersChatsAndLeavesOutThoseTheTemplateRefuses) {
  const std::string content =
      "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n\n"
      "{\"messages\": [{\"role\": \"narrator\", \"content\": \"x\"}]}\n";
  const CalibrationData data = make_calibration("c.jsonl", content, {}, byte_encoder());
  EXPECT_EQ(flatten(data), (std::vector<int32_t>{1, 'h', 'i', 3}));
  EXPECT_EQ(data.sources[0].samples_unusable, 1);
  ASSERT_EQ(data.notices().size(), 2u);
  EXPECT_THAT(data.notices()[1], HasSubstr("c.jsonl line 3: unknown role narrator"));
  EXPECT_EQ(data.to_json().at("sources").at(0).at("samples_unusable"), 1);
}

TEST(Calibration, CutsTextFilesAtBlankLines) {
  std::string content;
  for (int i = 0; i < 40; ++i)
    content += std::string(500, static_cast<char>('a' + i % 26)) + "\n\n";
  const CalibrationData data = make_calibration("c.txt", content, {}, byte_encoder());
  EXPECT_GT(data.sources[0].samples_in_file, 3);
  EXPECT_EQ(data.tokens,
            static_cast<int64_t>(content.size()) + 2 * data.sources[0].samples_in_file);
}

void expect_error(std::string name, std::string content, ErrorKind kind, std::string_view part) {
  try {
    make_calibration(name, content, {}, byte_encoder());
    ADD_FAILURE() << "no error for " << content;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    EXPECT_THAT(error.what(), HasSubstr(std::string(part)));
  }
}

TEST(Calibration, NamesFileAndLineOfWhatItCannotRead) {
  expect_error("c.jsonl", "{\"text\": \"a\"}\n{\"text\"", ErrorKind::kInput, "c.jsonl line 2");
  expect_error("c.jsonl", "{\"prompt\": \"a\"}", ErrorKind::kInput,
               "c.jsonl line 1: wanted an object");
  expect_error("c.jsonl", "[1]", ErrorKind::kInput, "line 1");
  expect_error("c.jsonl", "\n\n", ErrorKind::kInput, "gave no token");
  expect_error("c.csv", "a", ErrorKind::kUsage, "wanted a .jsonl file");
}

TEST(Calibration, MixesFilesByWeightAndRecordsWhatItTookOfEach) {
  const CalibrationText texts[] = {{"dir/chat.jsonl", numbered_lines(1000), 3},
                                   {"wiki.txt", std::string(3000, 'w'), 1}};
  const CalibrationData data =
      nibble::make_calibration(texts, {.size = 8, .seq_len = 20}, byte_encoder());
  ASSERT_EQ(data.sources.size(), 2u);
  EXPECT_EQ(data.sources[0].file, "chat.jsonl");
  EXPECT_EQ(data.sources[0].tokens, 6 * 20);
  EXPECT_EQ(data.sources[0].samples_used, 20);
  EXPECT_EQ(data.sources[0].samples_split, 4) << "60 is a multiple of 6";
  EXPECT_EQ(data.sources[0].tokens_cut, 0);
  EXPECT_EQ(data.sources[1].tokens, 2 * 20);
  EXPECT_EQ(data.sources[1].tokens_cut, 3002 - 40);
  EXPECT_EQ(data.sources[1].samples_split, 1);
  EXPECT_EQ(data.sequences.size(), 8u);
  EXPECT_EQ(data.tokens, 160);
  EXPECT_NE(data.sources[0].hash, data.sources[1].hash);
  EXPECT_EQ(data.to_json().at("sources").at(0).at("weight"), 3.0);

  const CalibrationData alone =
      nibble::make_calibration({texts, 1}, {.size = 6, .seq_len = 20}, byte_encoder());
  EXPECT_TRUE(std::equal(alone.sequences.begin(), alone.sequences.end(), data.sequences.begin()))
      << "a file's sequences do not depend on the other files";
  EXPECT_NE(alone.checksum(), data.checksum());
}

TEST(Calibration, GivesEveryFileASequenceAndRefusesBadWeights) {
  const std::string text(3000, 'w');
  const CalibrationText texts[] = {{"a.txt", text, 1000}, {"b.txt", text, 1}, {"c.txt", text, 1}};
  const CalibrationData data =
      nibble::make_calibration(texts, {.size = 4, .seq_len = 20}, byte_encoder());
  EXPECT_EQ(data.sources[0].tokens, 40);
  EXPECT_EQ(data.sources[1].tokens, 20);
  EXPECT_EQ(data.sources[2].tokens, 20);
  const auto expect_usage = [&](std::vector<CalibrationText> mixture, int size, const char* part) {
    try {
      nibble::make_calibration(mixture, {.size = size, .seq_len = 20}, byte_encoder());
      ADD_FAILURE() << "no error, wanted " << part;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
      EXPECT_THAT(error.what(), HasSubstr(part));
    }
  };
  expect_usage({{"a.txt", text, 0}}, 4, "weight 0; wanted a number above 0");
  expect_usage({{"a.txt", text}, {"b.txt", text}}, 1, "raise --calib-size");
}

}  // namespace
}  // namespace nibble
