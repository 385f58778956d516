// Ids and texts against goldens made by Hugging Face tokenizers and tiktoken.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstring>
#include <deque>

#include "base/error.h"
#include "tokenizer_test_util.h"

namespace nibble::testing {
namespace {

const fs::path kData = source_dir() / "tests/data/text";

TEST(TokenizerGolden, AllTekkenStringsInThreeModes) {
  if (!tekken_available()) GTEST_SKIP() << kNoTekken;
  const Tokenizer& tekken = tekken_tokenizer();
  const Tokenizer llama3 = Tokenizer::from_json(tekken_tokenizer_json(true));
  int num_rows = 0, num_l3_different = 0;
  for (const std::string& line : read_lines(kData / "golden_tokens.jsonl")) {
    const json::value row = parse_json(line, "golden_tokens.jsonl");
    const std::string_view text = row.at("text").as_string();
    const auto plain = ids_of(row.at("tekken"));
    const auto* hf = row.as_object().if_contains("hf");
    const auto* hf_l3 = row.as_object().if_contains("hf_l3");
    const auto parsed = hf ? ids_of(*hf) : plain;
    ++num_rows;
    num_l3_different += hf_l3 != nullptr;
    EXPECT_EQ(tekken.encode(text), plain) << line;
    EXPECT_EQ(tekken.encode(text, /*parse_special=*/true), parsed) << line;
    EXPECT_EQ(llama3.encode(text, true), hf_l3 ? ids_of(*hf_l3) : parsed) << line;
    EXPECT_EQ(tekken.decode(plain, true), text);
    EXPECT_EQ(tekken.decode(parsed, false), text);
  }
  EXPECT_EQ(num_rows, 466);
  EXPECT_EQ(num_l3_different, 13);
}

TEST(TokenizerGolden, AllTekkenDecodes) {
  if (!tekken_available()) GTEST_SKIP() << kNoTekken;
  const Tokenizer& tekken = tekken_tokenizer();
  int num_rows = 0;
  for (const std::string& line : read_lines(kData / "golden_decode.jsonl")) {
    const json::value row = parse_json(line, "golden_decode.jsonl");
    const auto ids = ids_of(row.at("ids"));
    EXPECT_EQ(tekken.decode(ids, false), row.at("hf_keep").as_string()) << line;
    EXPECT_EQ(tekken.decode(ids, true), row.at("hf_skip").as_string()) << line;
    std::string hex;
    for (const int32_t id : ids) {
      if (tekken.is_special(id)) continue;
      for (const unsigned char byte : tekken.token_bytes(id)) hex += fmt::format("{:02x}", byte);
    }
    EXPECT_EQ(hex, row.at("bytes_hex").as_string()) << line;
    ++num_rows;
  }
  EXPECT_EQ(num_rows, 39);
}

// The five sequences vLLM publishes for Magistral-Small-2509 start like this one (mistral.md §4).
TEST(TokenizerGolden, TekkenPublishedIds) {
  if (!tekken_available()) GTEST_SKIP() << kNoTekken;
  EXPECT_EQ(tekken_tokenizer().encode("Hello world !", true, true),
            (std::vector<int32_t>{1, 22177, 4304, 2662}));
  EXPECT_EQ(tekken_tokenizer().vocab_size(), 131072);
  EXPECT_EQ(tekken_tokenizer().bos_id(), 1);
  EXPECT_EQ(tekken_tokenizer().eos_id(), 2);
  EXPECT_EQ(tekken_tokenizer().token_id("[THINK]"), 34);
}

void check_rows(const Tokenizer& tokenizer, const json::array& rows, const std::string& name) {
  for (const json::value& row : rows) {
    const std::string_view text = row.at("text").as_string();
    const auto* plain = row.as_object().if_contains("plain");
    const auto* decoded = row.as_object().if_contains("decoded");
    const auto* skipped = row.as_object().if_contains("decoded_skip");
    const auto ids = ids_of(row.at("ids"));
    ASSERT_EQ(tokenizer.encode(text, true), ids) << name << ": " << dump_json(row);
    ASSERT_EQ(tokenizer.encode(text, false), plain ? ids_of(*plain) : ids)
        << name << ": " << dump_json(row);
    const std::string keep(decoded ? std::string_view(decoded->as_string()) : text);
    ASSERT_EQ(tokenizer.decode(ids, false), keep) << name << ": " << dump_json(row);
    ASSERT_EQ(tokenizer.decode(ids, true), skipped ? std::string(skipped->as_string()) : keep)
        << name << ": " << dump_json(row);
  }
}

TEST(TokenizerGolden, NanoStringsFromPythonTokenizers) {
  json::array rows;
  for (const std::string& line : read_lines(kData / "golden_nano_tokens.jsonl")) {
    rows.push_back(parse_json(line, "golden_nano_tokens.jsonl"));
  }
  ASSERT_EQ(rows.size(), 1371u);
  check_rows(nano_tokenizer(), rows, "nano");
}

// tokenizer.json files that differ from nano's in one respect, as scripts/gen_nano_token_goldens.py
// describes it: added tokens with every flag, other split patterns, merges ignored or as strings.
TEST(TokenizerGolden, VariantsFromPythonTokenizers) {
  const std::string nano = read_file(nano_dir() / "tokenizer.json");
  const json::value golden =
      parse_json(read_file(kData / "golden_variants.json"), "golden_variants.json");
  int num_variants = 0;
  for (const json::value& variant : golden.at("variants").as_array()) {
    json::value document = parse_json(nano, "tokenizer.json");
    json::object& root = document.as_object();
    const json::object& change = variant.at("change").as_object();
    if (const auto* pattern = change.if_contains("pattern")) {
      root["pre_tokenizer"]
          .as_object()["pretokenizers"]
          .as_array()[0]
          .as_object()["pattern"]
          .as_object()["Regex"] = *pattern;
    }
    if (const auto* pre_tokenizer = change.if_contains("pre_tokenizer")) {
      root["pre_tokenizer"] = *pre_tokenizer;
    }
    if (const auto* added = change.if_contains("added_tokens")) {
      for (const auto& token : added->as_array()) root["added_tokens"].as_array().push_back(token);
    }
    json::object& model = root["model"].as_object();
    if (const auto* ignore = change.if_contains("ignore_merges")) model["ignore_merges"] = *ignore;
    if (change.if_contains("merges_as_strings")) {
      for (auto& merge : model["merges"].as_array()) {
        const std::string joined =
            std::string(merge.at(0).as_string()) + " " + std::string(merge.at(1).as_string());
        merge = json::value(joined);
      }
    }
    check_rows(Tokenizer::from_json(dump_json(document)), variant.at("rows").as_array(),
               std::string(variant.at("name").as_string()));
    ++num_variants;
  }
  EXPECT_EQ(num_variants, 7);
}

std::vector<int32_t> read_u16(const fs::path& path) {
  const std::string bytes = read_file(path);
  std::vector<int32_t> out(bytes.size() / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t id;
    std::memcpy(&id, bytes.data() + 2 * i, 2);
    out[i] = id;
  }
  return out;
}

class EvalIds : public ::testing::TestWithParam<const char*> {};

// golden.json's protocol: a plain document is <s> + ids(text) + </s>.
TEST_P(EvalIds, WikiIsReproduced) {
  const fs::path model = shared_dir() / "models" / GetParam();
  if (!fs::exists(model / "golden/eval_wiki.u16")) GTEST_SKIP() << "no " << model;
  const Tokenizer tokenizer = Tokenizer::load(model);
  std::vector<int32_t> ids;
  for (const std::string& line : read_lines(shared_dir() / "models/texts/eval_wiki.jsonl")) {
    const json::value row = parse_json(line, "eval_wiki.jsonl");
    const auto text = tokenizer.encode(row.at("text").as_string(), false, true);
    ids.insert(ids.end(), text.begin(), text.end());
    ids.push_back(*tokenizer.eos_id());
  }
  EXPECT_TRUE(ids == read_u16(model / "golden/eval_wiki.u16")) << ids.size() << " ids";
}

// Dialogues through encode_segments: template literals parse, contents do not.
TEST_P(EvalIds, DialogueIsReproduced) {
  const fs::path model = shared_dir() / "models" / GetParam();
  if (!fs::exists(model / "golden/eval_dialog.u16")) GTEST_SKIP() << "no " << model;
  const Tokenizer tokenizer = Tokenizer::load(model);
  std::vector<int32_t> ids;
  for (const std::string& line : read_lines(shared_dir() / "models/texts/eval_dialog.jsonl")) {
    const json::value row = parse_json(line, "eval_dialog.jsonl");
    std::deque<std::string> texts;  // segments view into them
    std::vector<Tokenizer::Segment> segments;
    const auto literal = [&](std::string_view text) { segments.push_back({text, true}); };
    const auto content = [&](std::string text) {
      segments.push_back({texts.emplace_back(std::move(text)), false});
    };
    literal("<s>");
    bool tools_told = row.as_object().find("tools") == row.as_object().end();
    for (const json::value& message : row.at("messages").as_array()) {
      const std::string_view role = message.at("role").as_string();
      const auto* said = message.as_object().if_contains("content");
      const auto* calls = message.as_object().if_contains("tool_calls");
      if (role == "user" && !tools_told) {
        tools_told = true;
        literal("[AVAILABLE_TOOLS]");
        content(dump_json(row.at("tools")));
        literal("[/AVAILABLE_TOOLS]");
      }
      const std::string_view open = role == "system" ? "[SYSTEM_PROMPT]"
                                    : role == "user" ? "[INST]"
                                    : role == "tool" ? "[TOOL_RESULTS]"
                                                     : "";
      const std::string_view close = role == "system" ? "[/SYSTEM_PROMPT]"
                                     : role == "user" ? "[/INST]"
                                     : role == "tool" ? "[/TOOL_RESULTS]"
                                                      : "</s>";
      literal(open);
      if (said) content(std::string(said->as_string()));
      if (calls) {
        for (const json::value& call : calls->as_array()) {
          literal("[TOOL_CALLS]");
          content(std::string(call.at("name").as_string()));
          literal("[ARGS]");
          content(dump_json(call.at("arguments")));
        }
      }
      literal(close);
    }
    const auto chat = tokenizer.encode_segments(segments);
    ids.insert(ids.end(), chat.begin(), chat.end());
  }
  EXPECT_TRUE(ids == read_u16(model / "golden/eval_dialog.u16")) << ids.size() << " ids";
}

INSTANTIATE_TEST_SUITE_P(Models, EvalIds, ::testing::Values("nano", "small"));

}  // namespace
}  // namespace nibble::testing
