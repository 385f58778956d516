// Grammars over a real vocabulary: masks say exactly which tokens fit, and whoever follows them
// ends up with a valid text. SPDX-License-Identifier: Apache-2.0
#include "text/grammar_constraint.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "text/grammar_test_util.h"
#include "text/schema_validator.h"
#include "text/tokenizer_test_util.h"

namespace nibble {
namespace {

using testing::nano_tokenizer;

std::shared_ptr<const TokenTrie> nano_vocabulary() {
  static const auto trie = std::make_shared<TokenTrie>(nano_tokenizer());
  return trie;
}

size_t num_words() { return static_cast<size_t>(nano_tokenizer().vocab_size() + 63) / 64; }

bool has(const std::vector<uint64_t>& mask, int32_t id) {
  return (mask[static_cast<size_t>(id) / 64] >> (id % 64) & 1) != 0;
}

Grammar schema_grammar(std::string_view schema) {
  return json_schema_grammar(parse_json(schema, "schema"), "schema");
}

TEST(TokenTrie, HoldsEveryTextTokenOnceInOrder) {
  const TokenTrie& trie = *nano_vocabulary();
  std::vector<bool> seen(static_cast<size_t>(nano_tokenizer().vocab_size()));
  std::string path;
  for (size_t i = 0; i < trie.nodes().size(); ++i) {
    const TokenTrie::Node& node = trie.nodes()[i];
    ASSERT_GT(node.end, i);
    ASSERT_LE(node.depth, path.size());
    path.resize(node.depth);
    path += static_cast<char>(node.byte);
    if (node.token < 0) continue;
    EXPECT_EQ(path, nano_tokenizer().token_bytes(node.token));
    EXPECT_FALSE(seen[static_cast<size_t>(node.token)]);
    seen[static_cast<size_t>(node.token)] = true;
  }
  for (int32_t id = 0; id < nano_tokenizer().vocab_size(); ++id) {
    const bool is_text = nano_tokenizer().has_token(id) && !nano_tokenizer().is_special(id) &&
                         !nano_tokenizer().token_bytes(id).empty();
    EXPECT_EQ(seen[static_cast<size_t>(id)], is_text) << id;
  }
}

TEST(GrammarConstraint, MasksAreWhatAByteMatcherSays) {
  const char* schema =
      R"({"type":"object","properties":{"name":{"type":"string"},"n":{"type":"integer"}},"required":["name"]})";
  const GrammarConstraint constraint(schema_grammar(schema), nano_vocabulary());
  GrammarAutomaton automaton(schema_grammar(schema));
  for (const char* prefix : {"", "{", "{\"name\":", "{\"name\": \"a", "{\"name\": \"\xc3",
                             "{\"name\": \"\\u00", "{\"name\":\"x\",\"n\":1", "{\"name\":\"x\"}"}) {
    const auto matcher = constraint.start();
    std::string text;
    for (const int32_t id : nano_tokenizer().encode("")) ASSERT_TRUE(matcher->accept(id));
    for (const char c : std::string_view(prefix)) {  // byte by byte: every byte is a token
      text += c;
      int32_t id = 0;
      while (nano_tokenizer().token_bytes(id) != std::string_view(&c, 1) ||
             nano_tokenizer().is_special(id)) {
        ++id;
      }
      ASSERT_TRUE(matcher->accept(id)) << text;
    }
    std::vector<uint64_t> mask(num_words(), ~uint64_t{0});
    const auto ending = matcher->fill_mask(mask);
    EXPECT_EQ(ending.can_end, testing::match(automaton, text) == testing::Match::kWhole);
    EXPECT_EQ(ending.must_end, text.ends_with('}'));
    EXPECT_EQ(matcher->can_end(), ending.can_end);
    for (int32_t id = 0; id < nano_tokenizer().vocab_size(); ++id) {
      const bool is_text = nano_tokenizer().has_token(id) && !nano_tokenizer().is_special(id);
      const bool fits =
          is_text &&
          testing::match(automaton, text + std::string(nano_tokenizer().token_bytes(id))) !=
              testing::Match::kNo;
      ASSERT_EQ(has(mask, id), fits) << text << " + " << nano_tokenizer().token_bytes(id);
      const auto probe = constraint.start();
      if (!fits && prefix[0] == '\0') {
        EXPECT_FALSE(probe->accept(id));
      }
    }
  }
}

// Random tokens out of the masks, as a model that knows nothing would draw them.
TEST(GrammarConstraint, RandomWalksEndInValidTexts) {
  const std::vector<const char*> schemas = {
      R"({"type":"object","properties":{"name":{"type":"string","maxLength":12},"tags":{"type":"array","items":{"enum":["red","green"]},"maxItems":3},"at":{"type":"string","format":"date-time"},"size":{"type":"number","minimum":0,"maximum":10}},"required":["name","tags","at","size"]})",
      R"({"$ref":"#/$defs/n","$defs":{"n":{"type":"object","properties":{"v":{"type":"integer"},"l":{"anyOf":[{"$ref":"#/$defs/n"},{"type":"null"}]}},"required":["v","l"],"additionalProperties":false}}})",
      R"({"type":"object","properties":{"a":{"type":"boolean"}},"additionalProperties":{"type":["integer","null"]}})",
      R"({"type":"array","prefixItems":[{"const":"x"},{"type":"string","pattern":"^\\w{3,5}$"}],"items":false,"minItems":2})",
      R"({})"};
  std::mt19937 random(3);
  int num_whole = 0;
  for (const char* schema : schemas) {
    const GrammarConstraint constraint(schema_grammar(schema), nano_vocabulary());
    const json::value document = parse_json(schema, "schema");
    const testing::SchemaValidator validator(document);
    for (int walk = 0; walk < 40; ++walk) {
      const auto matcher = constraint.start();
      std::string text;
      bool is_whole = false;
      for (int step = 0; step < 400; ++step) {
        std::vector<uint64_t> mask(num_words());
        const auto ending = matcher->fill_mask(mask);
        if (ending.must_end || (ending.can_end && random() % 4 == 0)) {
          is_whole = true;
          break;
        }
        std::vector<int32_t> ids;
        for (int32_t id = 0; id < nano_tokenizer().vocab_size(); ++id) {
          if (!has(mask, id)) continue;
          const std::string_view bytes = nano_tokenizer().token_bytes(id);
          const bool closes = bytes.find_first_of("\"}]") != bytes.npos;
          ids.insert(ids.end(), closes ? 20 : 1, id);
        }
        ASSERT_TRUE(ending.can_end || !ids.empty()) << "a dead end: " << text;
        if (ids.empty()) continue;
        const int32_t id = ids[random() % ids.size()];
        ASSERT_TRUE(matcher->accept(id));
        text += nano_tokenizer().token_bytes(id);
      }
      if (!is_whole) continue;
      ++num_whole;
      ASSERT_TRUE(validator.accepts(parse_json(text, "text"))) << schema << " on " << text;
    }
  }
  EXPECT_GT(num_whole, 150);
}

TEST(GrammarConstraint, MasksAreMadeOnceForAllChoices) {
  const GrammarConstraint constraint(json_object_grammar(), nano_vocabulary());
  std::vector<uint64_t> mask(num_words());
  const std::vector<int32_t> ids = nano_tokenizer().encode(R"({"key": "a long enough string")");
  for (int i = 0; i < 5; ++i) {
    const auto matcher = constraint.start();
    for (const int32_t id : ids) {
      matcher->fill_mask(mask);
      ASSERT_TRUE(matcher->accept(id));
    }
  }
  const GrammarConstraintStats stats = constraint.stats();
  EXPECT_EQ(stats.num_masks_made + stats.num_masks_found, 5 * ids.size());
  EXPECT_LT(stats.num_masks_made, ids.size());
}

TEST(GrammarConstraint, ForgettingChangesNothing) {
  // Counted characters make a state each; two matchers far apart outgrow the tables in turn.
  const GrammarConstraint constraint(
      schema_grammar(
          R"({"type":"array","items":{"type":"string","minLength":1,"maxLength":20000}})"),
      nano_vocabulary());
  const auto first = constraint.start(), second = constraint.start();
  std::vector<uint64_t> mask(num_words());
  const auto accept = [](TokenMatcher& matcher, std::string_view text) {
    for (const int32_t id : nano_tokenizer().encode(text)) ASSERT_TRUE(matcher.accept(id));
  };
  accept(*first, "[\"");
  accept(*second, "[\"ab\", \"");
  for (int i = 0; i < 4000; ++i) {
    ASSERT_NO_FATAL_FAILURE(accept(*first, "some words "));
    ASSERT_NO_FATAL_FAILURE(i % 50 == 0 ? accept(*second, "x") : void());
    if (i % 40 == 0) first->fill_mask(mask);
    if (i * 11 > 19'900) break;
  }
  accept(*first, "\"]");
  accept(*second, "\"]");
  EXPECT_TRUE(first->can_end() && second->can_end());
}

TEST(GrammarConstraint, AmbiguityEndsWhereItGetsTooCostly) {
  // Every "a" may be the one that 2000 letters follow: a stack more each.
  const GrammarConstraint constraint(regex_grammar("[a-z]*a[a-z]{2000}", "regex"),
                                     nano_vocabulary());
  const auto matcher = constraint.start();
  std::vector<uint64_t> mask(num_words());
  const int32_t a = nano_tokenizer().encode("a").back(), b = nano_tokenizer().encode("b").back();
  int num_taken = 0;
  while (num_taken < 2000 && matcher->accept(a)) ++num_taken;
  EXPECT_GT(num_taken, 200);
  EXPECT_LT(num_taken, 1000);
  matcher->fill_mask(mask);
  EXPECT_FALSE(has(mask, a));
  EXPECT_TRUE(has(mask, b));
  EXPECT_TRUE(matcher->accept(b));
}

}  // namespace
}  // namespace nibble
