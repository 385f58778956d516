// JSON schemas as grammars: texts that match and texts that do not, schemas that are refused, and
// random texts that a validator of its own (schema_validator.h) must accept.
// SPDX-License-Identifier: Apache-2.0
#include "text/json_schema_grammar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "text/grammar_test_util.h"
#include "text/schema_validator.h"

namespace nibble {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::match;
using testing::Match;
using testing::schema_automaton;
using testing::schema_error;

struct SchemaCase {
  const char* schema;
  std::vector<const char*> good, bad;
};

const std::vector<SchemaCase>& cases() {
  static const std::vector<SchemaCase> list = {
      {"{}",
       {"1", "\"a\"", "null", "[1,{}]", "{\"a\": [true]}", "-0.5e+10"},
       {"", "nul", "01", "+1", "[1,]", "{a:1}", " 1", "1 "}},
      {"true", {"[]"}, {"[}"}},
      {R"({"type":"null"})", {"null"}, {"0"}},
      {R"({"type":"boolean"})", {"true", "false"}, {"True", "null"}},
      {R"({"type":["string","null"]})", {"null", "\"\""}, {"1"}},
      {R"({"type":"string"})",
       {R"("")", R"("a b")", "\"\xc3\xa9\xf0\x9f\x98\x80\"", R"("\"\\\/\b\f\n\r\t")",
        R"("\u0041\uD83D\ude00")", R"("\uFFFF\u0000")", "\"\x7f\""},
       {"\"a", "\"\n\"", "\"\t\"", R"("\x")", R"("\ud83d")", R"("\ud83dx")", R"("\ude00")",
        R"("\ud83d\u0041")", R"("\u12g4")", "\"\xff\"", "\"\xc3\"", "\"\xed\xa0\x80\"", "'a'"}},
      {R"({"type":"string","minLength":2,"maxLength":3})",
       {R"("ab")", R"("abc")", "\"\xc3\xa9\xc3\xa9\"", R"("\n\u00e9")", R"("\ud83d\ude00a")"},
       {R"("a")", R"("abcd")", "\"\xc3\xa9\"", R"("\ud83d\ude00")"}},
      {R"({"type":"string","minLength":3})", {R"("abcdef")"}, {R"("ab")"}},
      {R"({"type":"string","maxLength":0})", {R"("")"}, {R"("a")"}},
      {R"({"type":"string","pattern":"^[a-z]+-\\d{2}$"})",
       {R"("ab-12")"},
       {R"("ab-1")", R"("xab-123")", R"("AB-12")"}},
      {R"({"type":"string","pattern":"b+"})",
       {R"("b")", R"("abba")", R"("\n\u0001b\"")"},
       {R"("aca")", R"("")"}},
      {R"({"type":"string","pattern":"^\\\\\"\\n$"})",
       {R"("\\\"\n")"},
       {R"("\\"\n")", "\"\\\\\\\"\n\""}},
      {R"({"type":"string","pattern":"^a|b$"})", {R"("axx")", R"("xxb")"}, {R"("xax")"}},
      {R"({"type":"string","format":"date"})",
       {R"("2024-02-28")", R"("1999-12-31")"},
       {R"("2024-02-30")", R"("2024-13-01")", R"("2024-04-31")", R"("24-01-01")"}},
      {R"({"type":"string","format":"date-time"})",
       {R"("2024-02-28T23:59:00Z")", R"("2024-02-28T00:00:00.123+05:30")"},
       {R"("2024-02-28 23:59:00Z")", R"("2024-02-28T24:00:00Z")"}},
      {R"({"type":"string","format":"uuid"})",
       {R"("123e4567-e89b-12d3-a456-426614174000")"},
       {R"("123e4567e89b12d3a456426614174000")"}},
      {R"({"type":"string","format":"ipv4"})",
       {R"("1.20.255.0")"},
       {R"("1.2.3")", R"("1.2.3.256")", R"("01.2.3.4")"}},
      {R"({"type":"string","format":"email"})",
       {R"("a.b+c@x-y.org")"},
       {R"("a@b")", R"("@x.org")", R"("a..b@x.org")"}},
      {R"({"type":"integer"})", {"0", "-1", "12345"}, {"01", "-0", "1.0", "1e3", "", "-"}},
      {R"({"type":"integer","minimum":-12,"maximum":105})",
       {"-12", "-9", "-1", "0", "7", "99", "100", "105"},
       {"-13", "-20", "106", "110", "200", "1000", "-100"}},
      {R"({"type":"integer","exclusiveMinimum":9,"exclusiveMaximum":1000})",
       {"10", "999"},
       {"9", "1000"}},
      {R"({"type":"integer","minimum":1.5})", {"2", "1000000"}, {"1", "-2"}},
      {R"({"type":"integer","maximum":-10})",
       {"-10", "-11", "-123456789012345678"},
       {"-9", "0", "1"}},
      {R"({"type":"integer","minimum":-9223372036854775808,"maximum":18446744073709551615})",
       {"5", "-5"},
       {"5.5"}},
      {R"({"type":"number"})",
       {"0", "-0.5", "1e10", "1.25E-3", "-12"},
       {".5", "1.", "01.5", "1e", "--1"}},
      {R"({"type":"number","minimum":0,"maximum":1})",
       {"0", "0.5", "1", "1.0", "0.0", "0.999"},
       {"-0.1", "1.1", "1.01", "2", "1e0"}},
      {R"({"type":"number","minimum":0})", {"0", "0.25", "1e5", "123456"}, {"-1", "-0.5"}},
      {R"({"type":"number","exclusiveMinimum":0,"exclusiveMaximum":2})",
       {"0.01", "1", "1.99"},
       {"0", "0.0", "2", "2.0", "-1"}},
      {R"({"type":"number","minimum":-3,"maximum":-1})",
       {"-1", "-1.5", "-3", "-3.0", "-2.75"},
       {"-3.1", "-0.5", "1", "0", "-4"}},
      {R"({"enum":["a",1,null,{"b":[1,"c"]}]})",
       {"\"a\"", "1", "null", R"({"b":[1,"c"]})", R"({"b": [1, "c"]})"},
       {"2", "\"b\"", R"({"b":[1]})", R"("\u0061")"}},
      {R"({"type":"string","enum":["a",1]})", {"\"a\""}, {"1"}},
      {R"({"const":"x\"\n"})", {R"("x\"\n")"}, {R"("x")"}},
      {R"({"type":"array","items":{"type":"integer"}})",
       {"[]", "[1]", "[1,2]", "[1, 2]", "[\n  1,\n  2\n]", "[ ]"},
       {"[1,]", "[\"a\"]", "[1 ,2]", "[1,  2]", "[\n\n1]"}},
      {R"({"type":"array","items":{"type":"boolean"},"minItems":1,"maxItems":3})",
       {"[true]", "[true,false,true]"},
       {"[]", "[true,true,true,true]"}},
      {R"({"type":"array","items":{"type":"null"},"minItems":2})",
       {"[null,null]", "[null,null,null,null]"},
       {"[null]", "[]"}},
      {R"({"prefixItems":[{"type":"integer"},{"type":"string"}],"items":false})",
       {"[]", "[1]", "[1,\"a\"]"},
       {"[\"a\"]", "[1,\"a\",2]"}},
      {R"({"type":"array","prefixItems":[{"type":"integer"}],"items":{"type":"null"},"minItems":2,"maxItems":3})",
       {"[1,null]", "[1,null,null]"},
       {"[1]", "[1,1]", "[1,null,null,null]"}},
      {R"({"type":"array","maxItems":0})", {"[]"}, {"[1]"}},
      {R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"string"}},"required":["a"]})",
       {R"({"a":1})", R"({"a": 1, "b": "x"})", "{\n \"a\": 1\n}"},
       {R"({"b":"x"})", R"({"b":"x","a":1})", R"({"a":1,"c":2})", "{}", R"({"a":1,})",
        R"({"a" :1})", R"({"a":1,"a":2})"}},
      {R"({"type":"object","properties":{"a":{},"b":{},"c":{}}})",
       {"{}", R"({"b":1})", R"({"a":1,"c":2})"},
       {R"({"c":1,"a":2})", R"({,"a":1})"}},
      {R"({"type":"object"})", {"{}", R"({"x":{"y":[]}})"}, {"[]"}},
      {R"({"type":"object","additionalProperties":{"type":"integer"}})",
       {"{}", R"({"x":1,"y":2})", R"({"\u0078":1})"},
       {R"({"x":"1"})"}},
      {R"({"type":"object","properties":{"ab":{"type":"integer"}},"additionalProperties":{"type":"null"}})",
       {R"({"ab":1})", R"({"ab":1,"x":null})", R"({"a":null,"abc":null,"":null})",
        "{\"\xc3\xa9\":null}", R"({"\"":null})"},
       {R"({"ab":null})", R"({"x":null,"ab":1})", R"({"\u0061b":null})", R"({"ab":1,"ab":null})",
        R"({"x":1})"}},
      {R"({"type":"object","properties":{"a":{}},"required":["z"],"additionalProperties":true})",
       {R"({"a":1,"z":2})", R"({"z":2,"q":1})"},
       {R"({"a":1})", R"({"a":1,"q":2})"}},
      {R"({"type":"object","properties":{"a":false,"b":{}}})",
       {"{}", R"({"b":1})"},
       {R"({"a":1})"}},
      {R"({"anyOf":[{"type":"integer"},{"type":"null"}]})", {"1", "null"}, {"\"1\""}},
      {R"({"type":"object","properties":{"k":{"type":"string"}},"required":["k"],"anyOf":[{"properties":{"x":{"type":"integer"}},"required":["x"]},{"properties":{"y":{"type":"null"}},"required":["y"]}]})",
       {R"({"k":"a","x":1})", R"({"k":"a","y":null})"},
       {R"({"k":"a"})", R"({"x":1})", R"({"k":"a","x":1,"y":null})"}},
      {R"({"oneOf":[{"type":"object","properties":{"kind":{"const":"cat"},"n":{"type":"integer"}},"required":["kind"]},{"type":"object","properties":{"kind":{"const":"dog"}},"required":["kind"]}],"discriminator":{"propertyName":"kind"}})",
       {R"({"kind":"cat","n":1})", R"({"kind":"dog"})"},
       {R"({"kind":"cow"})", R"({"kind":"dog","n":1})"}},
      {R"({"allOf":[{"$ref":"#/$defs/a"}],"title":"t","$defs":{"a":{"type":"integer"}}})",
       {"3"},
       {"\"a\""}},
      {R"({"allOf":[{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]},{"properties":{"b":{"type":"string"},"a":{"minimum":5}},"required":["b"]}]})",
       {R"({"a":5,"b":"x"})"},
       {R"({"a":4,"b":"x"})", R"({"a":5})"}},
      {R"({"allOf":[{"type":"object","properties":{"a":{}},"additionalProperties":false},{"properties":{"b":{}}}]})",
       {"{}", R"({"a":1})"},
       {R"({"b":1})"}},
      {R"({"$ref":"#/$defs/n","$defs":{"n":{"type":"integer"}},"minimum":3})", {"3"}, {"2"}},
      {R"({"type":["integer","string"],"allOf":[{"type":["number","null"]}]})",
       {"1"},
       {"\"a\"", "null", "1.5"}},
      {R"({"$ref":"#/definitions/node","definitions":{"node":{"type":"object","properties":{"v":{"type":"integer"},"next":{"anyOf":[{"$ref":"#/definitions/node"},{"type":"null"}]}},"required":["v","next"]}}})",
       {R"({"v":1,"next":null})", R"({"v":1,"next":{"v":2,"next":null}})"},
       {R"({"v":1})", R"({"v":1,"next":{}})"}},
      {R"({"type":"object","properties":{"children":{"type":"array","items":{"$ref":"#"}}},"required":["children"]})",
       {R"({"children":[]})", R"({"children":[{"children":[]},{"children":[{"children":[]}]}]})"},
       {R"({"children":[1]})", "{}"}},
      {R"({"$ref":"#/$defs/a~1b%20c","$defs":{"a/b c":{"type":"null"}}})", {"null"}, {"1"}},
      {R"({"anyOf":[{"$ref":"#"},{"type":"null"}]})", {"null"}, {"1"}},
  };
  return list;
}

TEST(JsonSchemaGrammar, LetsThroughAndRejects) {
  for (const SchemaCase& item : cases()) {
    GrammarAutomaton automaton = schema_automaton(item.schema);
    const json::value schema = parse_json(item.schema, "schema");
    const testing::SchemaValidator validator(schema);
    for (const char* text : item.good) {
      EXPECT_EQ(match(automaton, text), Match::kWhole) << item.schema << " on " << text;
      if (std::string_view(item.schema).find("\"anyOf\":[{\"$ref\":\"#\"}") == std::string::npos) {
        EXPECT_TRUE(validator.accepts(parse_json(text, "text"))) << item.schema << " on " << text;
      }
    }
    for (const char* text : item.bad) {
      EXPECT_NE(match(automaton, text), Match::kWhole) << item.schema << " on " << text;
    }
  }
}

// Random bytes out of those that may come next; whatever comes out whole must be valid.
TEST(JsonSchemaGrammar, RandomTextsAreValid) {
  std::mt19937 random(7);
  int num_whole = 0;
  for (const SchemaCase& item : cases()) {
    GrammarAutomaton automaton = schema_automaton(item.schema);
    const json::value schema = parse_json(item.schema, "schema");
    const testing::SchemaValidator validator(schema);
    const bool is_endless = std::string_view(item.schema).starts_with(R"({"anyOf":[{"$ref":"#"})");
    for (int walk = 0; walk < 60; ++walk) {
      std::string text;
      auto state = GrammarAutomaton::kStart;
      while (text.size() < 3000) {
        std::vector<unsigned char> bytes;
        for (int b = 0; b < 256; ++b) {
          const auto byte = static_cast<unsigned char>(b);
          if (automaton.next(state, byte) == GrammarAutomaton::kDead) continue;
          // Closers more often, or the texts get long.
          const bool closes = b == '"' || b == ']' || b == '}';
          bytes.insert(bytes.end(), closes ? 40 : 1, byte);
        }
        const bool can_end = automaton.can_end(state);
        ASSERT_TRUE(can_end || !bytes.empty()) << "a dead end: " << text;
        if (can_end && (bytes.empty() || random() % 3 == 0)) break;
        text += static_cast<char>(bytes[random() % bytes.size()]);
        state = automaton.next(state, static_cast<unsigned char>(text.back()));
      }
      if (!automaton.can_end(state)) continue;
      ++num_whole;
      const json::value value = parse_json(text, "text", 200);
      ASSERT_TRUE(is_endless || validator.accepts(value)) << item.schema << " on " << text;
    }
  }
  EXPECT_GT(num_whole, 2500);
}

TEST(JsonSchemaGrammar, WhatIsNotHonouredIsNamed) {
  const auto refused = [](const char* schema, const char* word) {
    EXPECT_THAT(schema_error(schema), HasSubstr(word)) << schema;
  };
  refused(R"({"not":{}})", "\"not\"");
  refused(R"({"type":"object","properties":{"a":{"patternProperties":{}}}})", "/properties/a");
  for (const char* keyword :
       {"patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired",
        "if", "contains", "multipleOf", "unevaluatedProperties", "additionalItems", "nullable",
        "$dynamicRef"}) {
    refused(fmt::format(R"({{"{}":1}})", keyword).c_str(), keyword);
  }
  refused(R"({"uniqueItems":true})", "uniqueItems");
  EXPECT_EQ(schema_error(R"({"type":"array","uniqueItems":false})"), "accepted");
  EXPECT_EQ(
      schema_error(
          R"({"title":"t","description":"d","default":1,"examples":[1],"$schema":"s","x-order":1,"type":"null"})"),
      "accepted");
  refused(R"({"tpye":"object"})", "tpye");
  refused(R"({"type":"sting"})", "\"sting\"");
  refused(R"({"type":[]})", "\"type\" is []");
  refused("5", "5, but must be a schema");
  refused(R"({"items":[{}]})", "prefixItems");
  refused(R"({"enum":[]})", "non-empty");
  refused(R"({"anyOf":[]})", "non-empty");
  refused(R"({"enum":["a"],"minLength":1})", "minLength");
  refused(R"({"type":"number","minimum":0.5})", "whole");
  refused(R"({"type":"number","exclusiveMinimum":true})", "a number");
  refused(R"({"type":"integer","minimum":1e30})", "digits");
  refused(R"({"type":"string","minLength":-1})", "whole number");
  refused(R"({"type":"string","minLength":1e9})", "at most");
  refused(R"({"type":"string","pattern":"a","maxLength":3})", "only one of");
  refused(R"x({"type":"string","pattern":"(?=a)"})x", "look-ahead");
  refused(R"({"type":"string","format":"iri"})", "iri");
  refused(R"({"required":"a"})", "array of property names");
  refused(R"({"$ref":"http://x.y/z"})", "http://x.y/z");
  refused(R"({"$ref":"#/$defs/none"})", "nothing there");
  refused(R"({"oneOf":[{"type":"integer"},{"type":"number"}]})", "anyOf");
  refused(
      R"({"oneOf":[{"type":"object","properties":{"a":{}}},{"type":"object","properties":{"b":{}}}]})",
      "anyOf");
  refused(R"({"allOf":[{"pattern":"a"},{"pattern":"b"}]})", "given twice");
}

TEST(JsonSchemaGrammar, WhatHasNoValueIsRefused) {
  for (const char* schema :
       {"false", R"({"type":"string","minLength":3,"maxLength":2})",
        R"({"enum":[1],"type":"string"})",
        R"({"type":"object","required":["a"],"properties":{"b":{}},"additionalProperties":false})",
        R"({"type":"object","properties":{"next":{"$ref":"#"}},"required":["next"]})",
        R"({"$ref":"#"})", R"({"type":"array","minItems":2,"maxItems":1})",
        R"({"allOf":[{"type":"string"},{"type":"null"}]})",
        R"({"type":"integer","minimum":5,"maximum":4})",
        R"({"type":"array","items":false,"minItems":1})"}) {
    EXPECT_THAT(schema_error(schema), HasSubstr("allows no value")) << schema;
  }
}

TEST(JsonSchemaGrammar, LargeAndCircularSchemasHitLimits) {
  EXPECT_THAT(schema_error(
                  R"({"type":"array","minItems":90000,"items":{"type":"array","minItems":90000}})"),
              HasSubstr("states"));
  EXPECT_THAT(schema_error(R"({"allOf":[{"$ref":"#"},{"type":"object"}]})"), HasSubstr("itself"));
  // Every level doubles what is below.
  std::string doubling = R"({"$ref":"#/$defs/a0","type":"object","$defs":{)";
  for (int i = 0; i < 20; ++i) {
    doubling +=
        fmt::format(R"("a{}":{{"allOf":[{{"$ref":"#/$defs/a{}"}},{{"$ref":"#/$defs/a{}"}}]}},)", i,
                    i + 1, i + 1);
  }
  EXPECT_THAT(schema_error(doubling + R"("a20":{"type":"object"}}})"), HasSubstr("conjunctions"));
  EXPECT_THAT(
      schema_error(
          R"({"allOf":[{"properties":{"x":{"$ref":"#"}}},{"properties":{"x":{"$ref":"#"}}}]})"),
      AllOf(HasSubstr("schema"), ::testing::Not("accepted")));
  std::string wide = R"({"type":"object","properties":{)";
  for (int i = 0; i < 300; ++i) wide += fmt::format(R"("property_{}":{{"type":"string"}},)", i);
  EXPECT_EQ(schema_error(wide + R"("last":{}}})"), "accepted");
  EXPECT_EQ(schema_error(wide + R"("last":{}},"additionalProperties":true})"), "accepted");
  std::string nested = "{}";
  for (int i = 0; i < 25; ++i) nested = R"({"type":"array","items":)" + nested + "}";
  EXPECT_EQ(schema_error(nested), "accepted");
  const std::string name(1000, 'a');
  EXPECT_THAT(schema_error(R"({"properties":{")" + name + R"(":{}}})"), HasSubstr("1000 bytes"));
  EXPECT_THAT(testing::error_of([] {
                json_schema_grammar(json::object{{"description", std::string(300'000, 'x')}},
                                    "schema");
              }),
              HasSubstr("bytes"));
}

TEST(JsonObjectGrammar, AnyObjectAndNothingElse) {
  GrammarAutomaton automaton(json_object_grammar());
  EXPECT_EQ(match(automaton, R"({"a": [1, {"b": null}], "c": "\u00e9"})"), Match::kWhole);
  EXPECT_EQ(match(automaton, "{\n  \"a\": 1\n}"), Match::kWhole);
  EXPECT_EQ(match(automaton, "[1]"), Match::kNo);
  EXPECT_EQ(match(automaton, "{\n\n"), Match::kNo);
  EXPECT_EQ(match(automaton, "{}x"), Match::kNo);
  EXPECT_EQ(match(automaton, "{" + std::string(2, ' ')), Match::kNo);
  std::string deep;
  while (match(automaton, deep + R"({"a":)") != Match::kNo) deep += R"({"a":)";
  EXPECT_GT(deep.size(), 200u);
  EXPECT_NE(match(automaton, deep + "true"), Match::kNo);
}

}  // namespace
}  // namespace nibble
