// SPDX-License-Identifier: Apache-2.0
#include "text/output_parser.h"

#include <gtest/gtest.h>

#include "tokenizer_test_util.h"

namespace nibble::testing {
namespace {

struct Parsed {
  OutputDelta output;    // merged, as a whole reply has it
  std::string streamed;  // the same, put together from one delta per token
  int num_tool_calls = 0;
  bool stopped = false;
};

std::string shown(const OutputDelta& output) {
  std::string text = output.content + "|" + output.reasoning;
  for (const auto& call : output.tool_calls) {
    if (call.begins) text += "|" + std::to_string(call.index) + " " + call.name + " ";
    text += call.arguments;
  }
  return text;
}

/// `text` with control strings as control tokens.
Parsed parse(std::string_view text, OutputParserOptions options) {
  const Tokenizer& nano = nano_tokenizer();
  OutputParser whole(nano, options), pieces(nano, options);
  Parsed out;
  OutputDelta joined;
  const auto join = [&](OutputDelta& delta) {
    joined.content += delta.content;
    joined.reasoning += delta.reasoning;
    for (auto& call : delta.tool_calls) joined.tool_calls.push_back(call);
    delta = {};
  };
  OutputDelta delta;
  for (const int32_t id : nano.encode(text, /*parse_special=*/true)) {
    whole.push(id, out.output);
    pieces.push(id, delta);
    join(delta);
  }
  whole.flush(out.output);
  pieces.flush(delta);
  join(delta);
  out.streamed = shown(joined);
  out.num_tool_calls = whole.num_tool_calls();
  out.stopped = whole.stopped();
  return out;
}

constexpr OutputParserOptions kAll{.reasoning = true, .tool_calls = true};

TEST(OutputParser, ContentReasoningAndCalls) {
  const struct {
    const char *text, *wanted;
  } kCases[] = {
      {"Hello there.", "Hello there.|"},
      {"[THINK]Let me see.[/THINK]Yes.", "Yes.|Let me see."},
      {"[THINK]never closed", "|never closed"},
      {"[TOOL_CALLS]f[ARGS]{\"a\": 1}", "||0 f {\"a\": 1}"},
      {"Wait.[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g_2[ARGS]{\"b\": [\"x\"]}",
       "Wait.||0 f {}|1 g_2 {\"b\": [\"x\"]}"},
      {"[THINK]hm[/THINK][TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}", "|hm|0 f {}"},
      {"[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": 1.0}}, {\"name\": \"g\"}]",
       "||0 f {\"a\": 1.0}|1 g {}"},
      {"[TOOL_CALLS] {\"name\": \"f\", \"arguments\": \"{}\"}", "||0 f {}"},
      // no calls after all: nothing that was said is lost
      {"[TOOL_CALLS]well", "well|"},
      {"[TOOL_CALLS][{\"name\": ", "[{\"name\": |"},
      {"[TOOL_CALLS][1, 2]", "[1, 2]|"},
      {"[TOOL_CALLS]f[CALL_ID]abc", "fabc|"},
      {"[TOOL_CALLS]", "|"},
      {"[ARGS]x[/THINK]y", "xy|"},
  };
  for (const auto& c : kCases) {
    const Parsed parsed = parse(c.text, kAll);
    EXPECT_EQ(shown(parsed.output), c.wanted) << c.text;
    EXPECT_EQ(parsed.streamed, c.wanted) << c.text;
  }
}

TEST(OutputParser, IdsAreTheModelsOrMadeOfTheSeed) {
  EXPECT_EQ(parse("[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}", kAll).output.tool_calls.at(0).id,
            "abcdefghi");
  EXPECT_EQ(parse("[TOOL_CALLS][{\"name\": \"f\", \"id\": \"ABC45678z\"}]", kAll)
                .output.tool_calls.at(0)
                .id,
            "ABC45678z");
  const Parsed two = parse("[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]f[ARGS]{}", kAll);
  OutputParserOptions other = kAll;
  other.seed = 1;
  const std::string a = two.output.tool_calls.at(0).id, b = two.output.tool_calls.at(1).id,
                    c = parse("[TOOL_CALLS]f[ARGS]{}", other).output.tool_calls.at(0).id;
  EXPECT_EQ(a.size(), 9u);
  EXPECT_NE(a, b);
  EXPECT_NE(a, c);
  EXPECT_EQ(a, parse("[TOOL_CALLS]f[ARGS]{}", kAll).output.tool_calls.at(0).id);
}

TEST(OutputParser, OffMeansContent) {
  EXPECT_EQ(shown(parse("a[THINK]b[/THINK][TOOL_CALLS]f[ARGS]{}", {}).output), "abf{}|");
}

TEST(OutputParser, OneCallIsEnough) {
  OutputParserOptions options = kAll;
  options.max_tool_calls = 1;
  const Parsed parsed = parse("[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}", options);
  EXPECT_EQ(shown(parsed.output), "||0 f {}");
  EXPECT_TRUE(parsed.stopped);
  EXPECT_EQ(shown(parse("[TOOL_CALLS][{\"name\":\"f\"},{\"name\":\"g\"}]", options).output),
            "||0 f {}");
}

TEST(OutputParser, StopStringsLookAtContentOnly) {
  OutputParserOptions options = kAll;
  options.content.stop = {"END"};
  const Parsed parsed = parse("[THINK]END[/THINK]a END b[TOOL_CALLS]f[ARGS]{}", options);
  EXPECT_EQ(shown(parsed.output), "a |END");
  EXPECT_TRUE(parsed.stopped);
  EXPECT_EQ(shown(parse("E[TOOL_CALLS]f[ARGS]{\"END\": 1}", options).output),
            "E||0 f {\"END\": 1}");
}

TEST(OutputParser, ForcedCallsAreReadBack) {
  OutputParser parser(nano_tokenizer(), kAll);
  OutputDelta out;
  for (const int32_t id : forced_tool_call(nano_tokenizer(), "look_up")) parser.push(id, out);
  for (const int32_t id : nano_tokenizer().encode("{\"q\": 1}")) parser.push(id, out);
  parser.flush(out);
  EXPECT_EQ(shown(out), "||0 look_up {\"q\": 1}");
  EXPECT_EQ(forced_tool_call(nano_tokenizer(), "").size(), 1u);
  EXPECT_TRUE(can_call_tools(nano_tokenizer()));
}

TEST(OutputParser, PromptsThatEndInReasoning) {
  const auto ends = [](std::string_view text) {
    return ends_in_reasoning(nano_tokenizer(), nano_tokenizer().encode(text, true));
  };
  EXPECT_TRUE(ends("[INST]x[/INST][THINK]so far"));
  EXPECT_FALSE(ends("[INST]x[/INST][THINK]so far[/THINK]and"));
  EXPECT_FALSE(ends("[SYSTEM_PROMPT][THINK][/SYSTEM_PROMPT][INST]x[/INST]"));
  OutputParser parser(nano_tokenizer(), kAll);
  parser.begin_reasoning();
  OutputDelta out;
  for (const int32_t id : nano_tokenizer().encode(" more[/THINK]Yes", true)) parser.push(id, out);
  parser.flush(out);
  EXPECT_EQ(shown(out), "Yes| more");
}

TEST(ToolCallHistory, IdsBecomeMistralsAndArgumentsObjects) {
  json::array messages =
      parse_json(R"([{"role":"assistant","tool_calls":[{"id":"call_123","function":{"name":"f",
                     "arguments":"{\"a\": 1}"}},{"id":"abcdefghi","function":{"name":"g",
                     "arguments":"not json"}}]},{"role":"tool","tool_call_id":"call_123"},5])",
                 "t")
          .get_array();
  normalize_tool_calls(messages, true);
  const auto& calls = messages.at(0).at("tool_calls");
  EXPECT_EQ(calls.at(0).at("id").as_string().size(), 9u);
  EXPECT_EQ(calls.at(0).at("id"), messages.at(1).at("tool_call_id"));
  EXPECT_EQ(calls.at(1).at("id"), "abcdefghi");
  EXPECT_EQ(calls.at(0).at("function").at("arguments"), (json::object{{"a", 1}}));
  EXPECT_EQ(calls.at(1).at("function").at("arguments"), "not json");
  EXPECT_EQ(mistral_call_id("call_123"), mistral_call_id("call_123"));
  EXPECT_NE(mistral_call_id("call_123"), mistral_call_id("call_124"));
}

}  // namespace
}  // namespace nibble::testing
