// Tokenizer: segments, BOS, notices, hostile lengths, and refusals that name file and field.
// SPDX-License-Identifier: Apache-2.0
#include "text/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <random>

#include "base/error.h"
#include "text/pretokenizer.h"
#include "text/utf8.h"
#include "tokenizer_test_util.h"

namespace nibble::testing {
namespace {

using Ids = std::vector<int32_t>;
using Edit = std::function<void(json::object&)>;

std::string edited_nano(const Edit& edit) {
  static const json::value nano =
      parse_json(read_file(nano_dir() / "tokenizer.json"), "tokenizer.json");
  json::value copy = nano;
  edit(copy.as_object());
  return dump_json(copy);
}

json::object& pre_tokenizer_step(json::object& root, size_t step) {
  return root["pre_tokenizer"].as_object()["pretokenizers"].as_array()[step].as_object();
}

// The message of the Error that loading throws; "" if it throws none.
std::string message_of(const Edit& edit, ErrorKind kind) {
  try {
    Tokenizer::from_json(edited_nano(edit));
    return "";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  }
}

TEST(Tokenizer, RandomTextRoundTrips) {
  std::mt19937 random(5);
  const Tokenizer& nano = nano_tokenizer();
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (size_t n = random() % 40; n > 0; --n) {
      uint32_t point = random() % 3 ? random() % 128 : random() % 0x110000;
      if (point >= 0xd800 && point < 0xe000) point = 0;
      utf8::append_code_point(text, point);
    }
    ASSERT_EQ(nano.decode(nano.encode(text), false), text);
    ASSERT_EQ(nano.decode(nano.encode(text, true), false), text);
  }
  EXPECT_TRUE(nano.encode("").empty());
  const std::string nul("a\0b", 3);
  EXPECT_EQ(nano.decode(nano.encode(nul), false), nul);
}

TEST(Tokenizer, PlainTextNeverBecomesAControlToken) {
  const Tokenizer& nano = nano_tokenizer();
  for (int32_t id = 0; id < nano.vocab_size(); ++id) {
    if (!nano.is_special(id)) continue;
    const std::string text(nano.token_bytes(id));
    EXPECT_EQ(nano.encode(text, true), Ids{id});
    for (const int32_t got : nano.encode(text + " " + text + text, false))
      EXPECT_FALSE(nano.is_special(got));
  }
}

TEST(Tokenizer, BosOnlyIfTheTextDoesNotBeginWithIt) {
  const Tokenizer& nano = nano_tokenizer();
  const int32_t bos = *nano.bos_id();
  EXPECT_EQ(nano.encode("", true, true), Ids{bos});
  EXPECT_EQ(nano.encode("<s>", true, true), Ids{bos});
  EXPECT_EQ(nano.encode("<s>hi", true, true), nano.encode("hi", true, true));
  // Typed text is not BOS, so BOS comes before it.
  EXPECT_EQ(nano.encode("<s>hi", false, true).size(), nano.encode("<s>hi", false).size() + 1);
  EXPECT_EQ(nano.bos_token(), "<s>");
  EXPECT_EQ(nano.eos_token(), "</s>");
  EXPECT_EQ(*nano.eos_id(), 2);
}

TEST(Tokenizer, SegmentsEncodeAsOneTextButTypedControlStringsStayText) {
  const Tokenizer& nano = nano_tokenizer();
  const auto segments = [&](std::vector<Tokenizer::Segment> s) { return nano.encode_segments(s); };
  // Literal text glued to content: one piece across the border, as in HF.
  EXPECT_EQ(
      segments(
          {{"[INST]", true}, {"hel", false}, {"lo wor", true}, {"ld", false}, {"[/INST]", true}}),
      nano.encode("[INST]hello world[/INST]", true));
  EXPECT_NE(nano.encode("hello", false).size(),
            nano.encode("hel", false).size() + nano.encode("lo", false).size());
  Ids want = nano.encode("[INST]", true);
  for (const int32_t id : nano.encode("a[/INST]b</s>", false)) want.push_back(id);
  want.push_back(*nano.token_id("[/INST]"));
  EXPECT_EQ(segments({{"[INST]", true}, {"a[/INST]b</s>", false}, {"[/INST]", true}}), want);
  // A control string that only forms across a border is text; across two literals it is a token.
  EXPECT_EQ(segments({{"[IN", false}, {"ST]", true}}), nano.encode("[INST]", false));
  EXPECT_EQ(segments({{"[IN", true}, {"ST]", false}}), nano.encode("[INST]", false));
  EXPECT_EQ(segments({{"[IN", true}, {"ST]", true}}), Ids{*nano.token_id("[INST]")});
  EXPECT_TRUE(segments({}).empty());
  EXPECT_TRUE(segments({{"", true}, {"", false}}).empty());
}

TEST(Tokenizer, HalvesOfACharacterDoNotJoinAcrossSegments) {
  const std::vector<Tokenizer::Segment> halves{{"\xc3", false}, {"\xa9", false}};
  EXPECT_THROW(nano_tokenizer().encode_segments(halves), Error);
}

TEST(Tokenizer, InvalidUtf8IsRefusedWithItsOffset) {
  try {
    nano_tokenizer().encode("abc\xff");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInput);
    EXPECT_STREQ(error.what(), "the text is not UTF-8: byte 3 is 0xff; nibble wants UTF-8");
  }
}

TEST(Tokenizer, HostileLengthsTakeNoQuadraticTime) {
  for (const std::string_view unit :
       {"a", " ", "\n", "\xf0\x9f\x98\x80", "\xe4\xb8\xad", "<", "[INST", "ab1 "}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    const auto begin = std::chrono::steady_clock::now();
    const Ids ids = nano_tokenizer().encode(text, true);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    EXPECT_LT(seconds.count(), 3) << unit;
    EXPECT_TRUE(nano_tokenizer().decode(ids, false) == text) << unit;
  }
}

TEST(Tokenizer, TheWrongShippedRegexIsNamedAndCanBeReplaced) {
  const auto llama3 = [](json::object& root) {
    pre_tokenizer_step(root, 0)["pattern"].as_object()["Regex"] = json::string_view(kLlama3Pattern);
  };
  const std::string text = "it'still";  // Llama-3: it|'s|till, Tekken: it|'still
  const Tokenizer shipped = Tokenizer::from_json(edited_nano(llama3));
  ASSERT_EQ(shipped.notices().size(), 1u);
  EXPECT_NE(shipped.notices()[0].find("ships Llama-3's split regex by mistake"), std::string::npos);
  EXPECT_NE(shipped.notices()[0].find("--tokenizer-regex tekken"), std::string::npos);
  const TokenizerOptions tekken{.regex = parse_tokenizer_regex("tekken")};
  const Tokenizer replaced = Tokenizer::from_json(edited_nano(llama3), tekken);
  EXPECT_EQ(replaced.encode(text), nano_tokenizer().encode(text));
  EXPECT_NE(shipped.encode(text), nano_tokenizer().encode(text));
  ASSERT_EQ(replaced.notices().size(), 1u);
  EXPECT_NE(replaced.notices()[0].find("is replaced by Tekken's"), std::string::npos);
  // Right already: nothing to say.
  EXPECT_TRUE(nano_tokenizer().notices().empty());
  EXPECT_TRUE(Tokenizer::load(nano_dir(), tekken).notices().empty());
  // A third pattern is neither replaced nor silently kept.
  const auto other = [](json::object& root) {
    pre_tokenizer_step(root, 0)["pattern"].as_object()["Regex"] = "\\p{L}+|\\P{L}";
  };
  EXPECT_THROW(Tokenizer::from_json(edited_nano(other), tekken), Error);
  ASSERT_EQ(Tokenizer::from_json(edited_nano(other)).notices().size(), 1u);
  EXPECT_THROW(parse_tokenizer_regex("llama3"), Error);
}

TEST(Tokenizer, TekkenLoadsWithinHalfASecond) {
  if (!tekken_available()) GTEST_SKIP() << kNoTekken;
  const std::string& text = tekken_tokenizer_json();
  const auto begin = std::chrono::steady_clock::now();
  const Tokenizer tokenizer = Tokenizer::from_json(text);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  RecordProperty("load_ms", static_cast<int>(seconds.count() * 1000));
  EXPECT_LT(seconds.count(), 10);  // 0.2 to 0.5 s in a release build; slack for sanitizers and load
  EXPECT_EQ(tokenizer.vocab_size(), 131072);
}

TEST(Tokenizer, MergesOfSpecialTokensAreLeftOut) {
  // "the" made special: typed text must not reach its id, however the merges lead there.
  const Tokenizer& nano = nano_tokenizer();
  const Ids the = nano.encode("the", false);
  ASSERT_EQ(the.size(), 1u);
  const Tokenizer special = Tokenizer::from_json(edited_nano([&](json::object& root) {
    root["added_tokens"].as_array().push_back(
        {{"id", the[0]}, {"content", "the"}, {"special", true}, {"normalized", false}});
  }));
  EXPECT_EQ(special.encode("the", true), the);
  for (const int32_t id : special.encode("the other there", false)) EXPECT_NE(id, the[0]);
}

struct Refusal {
  const char* name;
  Edit edit;
  ErrorKind kind;
  const char* message;  // a part of it
};

TEST(TokenizerFile, RefusalsNameFileFieldSeenAndWanted) {
  const auto model = [](json::object& root) -> json::object& { return root["model"].as_object(); };
  const auto added = [](json::object& root, json::value token) {
    root["added_tokens"].as_array().push_back(std::move(token));
  };
  const Refusal refusals[] = {
      {"no model", [](auto& r) { r.erase("model"); }, ErrorKind::kInput,
       "tokenizer.json: model is missing; nibble wants an object"},
      {"unigram", [&](auto& r) { model(r)["type"] = "Unigram"; }, ErrorKind::kUnsupported,
       "tokenizer.json: model.type is \"Unigram\"; nibble wants \"BPE\""},
      {"dropout", [&](auto& r) { model(r)["dropout"] = 0.1; }, ErrorKind::kUnsupported,
       "tokenizer.json: model.dropout is 0.1; nibble wants null"},
      {"prefix", [&](auto& r) { model(r)["continuing_subword_prefix"] = "##"; },
       ErrorKind::kUnsupported, "model.continuing_subword_prefix is \"##\"; nibble wants null"},
      {"suffix", [&](auto& r) { model(r)["end_of_word_suffix"] = "</w>"; }, ErrorKind::kUnsupported,
       "model.end_of_word_suffix is \"</w>\""},
      {"byte fallback", [&](auto& r) { model(r)["byte_fallback"] = true; }, ErrorKind::kUnsupported,
       "model.byte_fallback is true; nibble wants false"},
      {"ignore_merges", [&](auto& r) { model(r)["ignore_merges"] = 1; }, ErrorKind::kInput,
       "model.ignore_merges is 1; nibble wants true or false"},
      {"vocab kind", [&](auto& r) { model(r)["vocab"] = json::array{}; }, ErrorKind::kInput,
       "model.vocab is an array of 0; nibble wants an object"},
      {"vocab id", [&](auto& r) { model(r)["vocab"].as_object()["zzz"] = -1; }, ErrorKind::kInput,
       "model.vocab[\"zzz\"] is -1; nibble wants a token id from 0 to 2097151"},
      {"vocab huge id", [&](auto& r) { model(r)["vocab"].as_object()["zzz"] = 1ull << 40; },
       ErrorKind::kInput, "model.vocab[\"zzz\"] is 1099511627776"},
      {"vocab twice", [&](auto& r) { model(r)["vocab"].as_object()["zzz"] = 300; },
       ErrorKind::kInput, "model.vocab gives id 300 to two tokens, one of them \"zzz\""},
      {"byte missing", [&](auto& r) { model(r)["vocab"].as_object().erase("Q"); },
       ErrorKind::kUnsupported, "model.vocab has no token for the byte 0x51"},
      {"merges", [&](auto& r) { model(r).erase("merges"); }, ErrorKind::kInput,
       "model.merges is missing; nibble wants an array"},
      {"merge shape", [&](auto& r) { model(r)["merges"].as_array()[5] = {1, 2}; },
       ErrorKind::kInput,
       "model.merges[5] is an array of 2; nibble wants \"a b\" or [\"a\", \"b\"]"},
      {"merge string", [&](auto& r) { model(r)["merges"].as_array()[5] = "abc"; },
       ErrorKind::kInput, "model.merges[5] is \"abc\"; nibble wants two tokens with one space"},
      {"merge token",
       [&](auto& r) { model(r)["merges"].as_array()[5] = {"\xf0\x9f\x98\x80", "b"}; },
       ErrorKind::kInput,
       "model.merges[5] needs the token \"\xf0\x9f\x98\x80\", which model.vocab does not have"},
      {"merge result", [&](auto& r) { model(r)["merges"].as_array()[5] = {"Q", "Q"}; },
       ErrorKind::kInput, "model.merges[5] needs the token \"QQ\""},
      {"normalizer", [](auto& r) { r["normalizer"] = {{"type", "NFC"}}; }, ErrorKind::kUnsupported,
       "tokenizer.json: normalizer is a NFC; nibble wants null"},
      {"no pre_tokenizer", [](auto& r) { r["pre_tokenizer"] = nullptr; }, ErrorKind::kUnsupported,
       "pre_tokenizer is null; nibble wants a ByteLevel step"},
      {"metaspace", [](auto& r) { r["pre_tokenizer"] = {{"type", "Metaspace"}}; },
       ErrorKind::kUnsupported,
       "pre_tokenizer is a Metaspace; nibble wants a Split or ByteLevel step"},
      {"split behaviour", [](auto& r) { pre_tokenizer_step(r, 0)["behavior"] = "Removed"; },
       ErrorKind::kUnsupported,
       "pre_tokenizer.pretokenizers[0].behavior is \"Removed\"; nibble wants \"Isolated\""},
      {"split invert", [](auto& r) { pre_tokenizer_step(r, 0)["invert"] = true; },
       ErrorKind::kUnsupported,
       "pre_tokenizer.pretokenizers[0].invert is true; nibble wants false"},
      {"split string", [](auto& r) { pre_tokenizer_step(r, 0)["pattern"] = {{"String", " "}}; },
       ErrorKind::kUnsupported,
       "pre_tokenizer.pretokenizers[0].pattern is an object; nibble wants {\"Regex\": ...}"},
      {"regex", [](auto& r) { pre_tokenizer_step(r, 0)["pattern"].as_object()["Regex"] = "["; },
       ErrorKind::kInput,
       "tokenizer.json: pre_tokenizer.pretokenizers[0].pattern.Regex does not compile"},
      {"prefix space", [](auto& r) { pre_tokenizer_step(r, 1)["add_prefix_space"] = true; },
       ErrorKind::kUnsupported,
       "pre_tokenizer.pretokenizers[1].add_prefix_space is true; nibble wants false"},
      {"no byte level",
       [](auto& r) { r["pre_tokenizer"].as_object()["pretokenizers"].as_array().pop_back(); },
       ErrorKind::kUnsupported,
       "pre_tokenizer is a Sequence; nibble wants a sequence that ends in a ByteLevel"},
      {"decoder", [](auto& r) { r["decoder"] = {{"type", "WordPiece"}}; }, ErrorKind::kUnsupported,
       "decoder is a WordPiece; nibble wants a ByteLevel decoder"},
      {"no decoder", [](auto& r) { r["decoder"] = nullptr; }, ErrorKind::kUnsupported,
       "decoder is null"},
      {"post_processor", [](auto& r) { r["post_processor"] = {{"type", "BertProcessing"}}; },
       ErrorKind::kUnsupported,
       "post_processor is a BertProcessing; nibble wants ByteLevel or TemplateProcessing"},
      {"template token",
       [](auto& r) { r["post_processor"].as_object()["special_tokens"] = json::object{}; },
       ErrorKind::kInput, "post_processor.special_tokens.<s> is missing; nibble wants an object"},
      {"template id",
       [](auto& r) {
         r["post_processor"].as_object()["special_tokens"].as_object()["<s>"].as_object()["ids"] = {
             999999};
       },
       ErrorKind::kInput,
       "post_processor.special_tokens.<s>.ids[0] is 999999; nibble wants the id of a token"},
      {"template text", [](auto& r) { r["post_processor"].as_object()["single"] = json::array{}; },
       ErrorKind::kInput,
       "post_processor.single is an array of 0; nibble wants a template with the Sequence A"},
      {"added id", [&](auto& r) { added(r, {{"id", 7}, {"content", "new"}}); }, ErrorKind::kInput,
       "added_tokens[18].id is 7; nibble wants an id of its own for \"new\""},
      {"added other id", [&](auto& r) { added(r, {{"id", 4096}, {"content", "the"}}); },
       ErrorKind::kInput, "added_tokens[18].id is 4096; nibble wants "},
      {"added empty", [&](auto& r) { added(r, {{"id", 4096}, {"content", ""}}); },
       ErrorKind::kInput,
       "added_tokens[18].content is \"\"; nibble wants a string that is not empty"},
      {"added twice", [&](auto& r) { added(r, {{"id", 4096}, {"content", "<s>"}}); },
       ErrorKind::kInput, "added_tokens lists \"<s>\" twice"},
      {"added flag", [&](auto& r) { added(r, {{"id", 4096}, {"content", "x"}, {"lstrip", "no"}}); },
       ErrorKind::kInput, "added_tokens[18].lstrip is \"no\"; nibble wants true or false"},
  };
  for (const Refusal& refusal : refusals) {
    const std::string message = message_of(refusal.edit, refusal.kind);
    EXPECT_NE(message.find(refusal.message), std::string::npos) << refusal.name << ": " << message;
    EXPECT_EQ(message.rfind("tokenizer.json", 0), 0u) << refusal.name << ": " << message;
  }
}

TEST(TokenizerFile, AcceptsWhatChangesNothing) {
  const Tokenizer tokenizer = Tokenizer::from_json(edited_nano([](json::object& root) {
    root["normalizer"] = {{"type", "Sequence"}, {"normalizers", json::array{}}};
    root["truncation"] = {{"max_length", 512}};
    root["model"].as_object()["continuing_subword_prefix"] = "";
    root["decoder"] = {{"type", "Sequence"},
                       {"decoders", {{{"type", "ByteLevel"}}, {{"type", "Fuse"}}}}};
    root["post_processor"] = {{"type", "Sequence"},
                              {"processors", {{{"type", "ByteLevel"}}, root["post_processor"]}}};
    root["added_tokens"].as_array().push_back(
        {{"id", 4100}, {"content", "beyond"}, {"normalized", false}});
  }));
  EXPECT_EQ(tokenizer.encode("Hello world", true, true),
            nano_tokenizer().encode("Hello world", true, true));
  ASSERT_EQ(tokenizer.notices().size(), 1u);
  EXPECT_NE(tokenizer.notices()[0].find("truncation is set"), std::string::npos);
  EXPECT_EQ(tokenizer.vocab_size(), 4101);
  EXPECT_FALSE(tokenizer.has_token(4098));
  EXPECT_EQ(tokenizer.decode(Ids{4098, 4100, -1, 1 << 30}, false), "beyond");
}

TEST(TokenizerFile, BosMustExist) {
  const std::string nano = read_file(nano_dir() / "tokenizer.json");
  try {
    Tokenizer::from_json(nano, {}, R"({"bos_token": "<start>"})", {}, "/m/tokenizer.json");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "/m/tokenizer_config.json: bos_token is \"<start>\", which /m/tokenizer.json "
                 "does not list in added_tokens");
  }
  const Tokenizer from_map =
      Tokenizer::from_json(nano, {}, R"({"bos_token": null})",
                           R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})");
  EXPECT_EQ(from_map.bos_id(), 1);
  EXPECT_EQ(from_map.eos_id(), 2);
  EXPECT_FALSE(Tokenizer::from_json(nano).bos_id().has_value());
  EXPECT_THROW(Tokenizer::from_json(nano, {}, R"({"bos_token": 5})"), Error);
  EXPECT_THROW(Tokenizer::load("/nowhere"), Error);
  EXPECT_THROW(Tokenizer::from_json("{"), Error);
  EXPECT_THROW(Tokenizer::from_json("[]"), Error);
}

TEST(TokenizeJsonLine, EncodesAndDecodes) {
  const Tokenizer& nano = nano_tokenizer();
  const auto run = [&](std::string_view line, TokenizeOptions options) {
    return tokenize_json_line(nano, line, options);
  };
  EXPECT_EQ(run("\"<s>\"", {.parse_special = true}), "[1]");
  EXPECT_EQ(run("\"<s>\"", {.bos = true, .parse_special = true}), "[1]");
  EXPECT_EQ(run("\"\"", {.bos = true}), "[1]");
  EXPECT_EQ(run("\"\"", {}), "[]");
  EXPECT_EQ(run("\"<s>\"", {}).find("1,"), std::string::npos);
  EXPECT_EQ(run("[1, 2]", {.decode = true}), "\"\"");
  EXPECT_EQ(run("[1, 2]", {.parse_special = true, .decode = true}), "\"<s></s>\"");
  // A lone surrogate is U+FFFD, NUL is a byte.
  EXPECT_EQ(run(run("\"a\\ud800\\u0000b\"", {}), {.decode = true}), "\"a\xef\xbf\xbd\\u0000b\"");
  for (const char* bad : {"5", "[1]", "{}", "\"a"}) EXPECT_THROW(run(bad, {}), Error) << bad;
  for (const char* bad : {"\"a\"", "[4096]", "[-1]", "[1.0]", "[\"1\"]"}) {
    EXPECT_THROW(run(bad, {.decode = true}), Error) << bad;
  }
}

}  // namespace
}  // namespace nibble::testing
