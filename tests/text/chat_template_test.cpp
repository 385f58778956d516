// Finding a model's template, roles and their repair, continuing the final message, `nibble
// render`. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "text/chat_template.h"
#include "tokenizer_test_util.h"

namespace nibble {
namespace {

json::array messages_of(std::string_view text) { return parse_json(text, "messages").as_array(); }

struct TemporaryDir {
  TemporaryDir() {
    std::string pattern = (fs::temp_directory_path() / "nibble_chat_XXXXXX").string();
    path = mkdtemp(pattern.data());
  }
  ~TemporaryDir() { fs::remove_all(path); }
  void write(const std::string& name, std::string_view text) const {
    write_file_atomically(path / name, text);
  }
  fs::path path;
};

std::string render_user(const ChatTemplate& chat, json::value tools = nullptr) {
  ChatRequest request;
  request.messages = messages_of(R"([{"role":"user","content":"hi"}])");
  request.tools = std::move(tools);
  return join_segments(chat.render(request));
}

ChatTemplate nano() { return ChatTemplate::load(std::string(NIBBLE_SOURCE_DIR) + "/models/nano"); }

TEST(ChatTemplateLoad, WhichTemplateWins) {
  const TemporaryDir dir;
  EXPECT_EQ(ChatTemplate::load(dir.path).origin(), "built-in v7-tekken");
  dir.write("tokenizer.json",
            R"({"added_tokens":[{"content":"[THINK]"},{"content":"[ARGS]"}],"model":{}})");
  EXPECT_EQ(ChatTemplate::load(dir.path).origin(), "built-in v13");
  EXPECT_EQ(render_user(ChatTemplate::load(dir.path)), "<s>[INST]hi[/INST]");
  dir.write("tokenizer_config.json",
            R"({"bos_token":{"content":"<b>"},"chat_template":"{{ bos_token }}config"})");
  EXPECT_EQ(render_user(ChatTemplate::load(dir.path)), "<b>config");
  dir.write("tokenizer_config.json", R"({"chat_template":[{"name":"default","template":"plain"},
                                                          {"name":"tool_use","template":"{{ tools|length }} tools"}]})");
  EXPECT_EQ(render_user(ChatTemplate::load(dir.path)), "plain");
  EXPECT_EQ(render_user(ChatTemplate::load(dir.path), json::array{json::object{}}), "1 tools");
  dir.write("chat_template.jinja", "file");
  EXPECT_EQ(render_user(ChatTemplate::load(dir.path)), "file");
  EXPECT_EQ(ChatTemplate::load(dir.path).origin(), "chat_template.jinja");
  dir.write("chat_template.jinja", "\n{{ broken");
  try {
    ChatTemplate::load(dir.path);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("chat_template.jinja"), std::string::npos)
        << error.what();
    EXPECT_NE(std::string(error.what()).find("line 2"), std::string::npos) << error.what();
  }
}

TEST(ChatTemplateRoles, TolerantRepairsWhatStrictRefuses) {
  const struct {
    const char* messages;
    const char* prompt;
  } kCases[] = {
      {R"([{"role":"user","content":"a"},{"role":"user","content":"b"}])",
       "<s>[INST]a\n\nb[/INST]"},
      {R"([{"role":"assistant","content":"Greetings."},{"role":"user","content":"hi"}])",
       "<s>[INST][/INST]Greetings.</s>[INST]hi[/INST]"},
      {R"([{"role":"system","content":"S"},{"role":"assistant","content":"Greetings."},{"role":"user","content":"hi"}])",
       "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST][/INST]Greetings.</s>[INST]hi[/INST]"},
      {R"([{"role":"system","content":"S"},{"role":"system","content":"T"},{"role":"user","content":"hi"}])",
       "<s>[SYSTEM_PROMPT]S\n\nT[/SYSTEM_PROMPT][INST]hi[/INST]"},
      {R"([{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"system","content":"note"},
           {"role":"user","content":"c"}])",
       "<s>[INST]a[/INST]b</s>[INST]note\n\nc[/INST]"},
      {R"([{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"system","content":"note"}])",
       "<s>[INST]a[/INST]b</s>[INST]note[/INST]"},
      {R"([{"role":"user","content":"a"},{"role":"assistant","content":""},{"role":"user","content":"c"}])",
       "<s>[INST]a\n\nc[/INST]"},
      {R"([{"role":"user","content":"a"},{"role":"tool","content":"r"},{"role":"user","content":"c"}])",
       "<s>[INST]a\n\nr\n\nc[/INST]"},
      {R"([{"role":"narrator","content":"a"},{"role":"user","content":"c"}])",
       "<s>[INST]a\n\nc[/INST]"},
      {R"([{"role":"system","content":"S"},{"role":"system","content":""},{"role":"assistant","content":null},
           {"role":"assistant","content":"x"},{"role":"assistant","content":"y"}])",
       "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST][/INST]x\n\ny</s>"},
  };
  for (const auto& c : kCases) {
    ChatRequest request;
    request.messages = messages_of(c.messages);
    EXPECT_EQ(join_segments(nano().render(request)), c.prompt) << c.messages;
    request.roles = RolePolicy::kStrict;
    EXPECT_THROW(nano().render(request), jinja::TemplateError) << c.messages;
  }
}

TEST(ChatTemplateRoles, EveryOrderOfFourRendersTolerantly) {
  const char* roles[] = {"system", "user", "assistant", "tool"};
  const ChatTemplate own = nano();
  const std::string strict_alternation =
      "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
      "{{ raise_exception('alternate!') }}{% endif %}{{ m.role + ':' + m.content + ';' }}{% endfor "
      "%}";
  const ChatTemplate alternating = ChatTemplate::from_source(strict_alternation, {});
  for (int code = 0; code < 256; ++code) {
    json::array messages;
    for (int i = 0, rest = code; i < 4; ++i, rest /= 4) {
      messages.push_back(
          json::object{{"role", roles[rest % 4]}, {"content", "m" + std::to_string(i)}});
    }
    for (const ChatTemplate* chat : {&own, &alternating}) {
      ChatRequest request;
      request.messages = messages;
      std::string prompt;
      ASSERT_NO_THROW(prompt = join_segments(chat->render(request))) << dump_json(messages);
      for (int i = 0; i < 4; ++i) {
        EXPECT_NE(prompt.find("m" + std::to_string(i)), std::string::npos) << dump_json(messages);
      }
    }
  }
}

TEST(ChatTemplateRoles, ContentAndLimitErrorsStayErrors) {
  ChatRequest request;
  request.messages = messages_of(R"([{"role":"user","content":[{"type":"image_url"}]}])");
  try {
    nano().render(request);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
  }
  request.messages = messages_of(R"([{"role":"user","content":"x"}])");
  const auto endless =
      ChatTemplate::from_source("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {});
  try {
    endless.render(request);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kLimit);
  }
  request.messages = messages_of("[3]");
  EXPECT_THROW(nano().render(request), Error);
  request.messages.clear();
  EXPECT_THROW(nano().render(request), Error);
}

TEST(ChatTemplateContinue, EndsAfterTheLastText) {
  const auto render = [](const ChatTemplate& chat, const char* last) {
    ChatRequest request;
    request.messages = messages_of(R"([{"role":"user","content":"go"}])");
    request.messages.push_back(json::object{{"role", "assistant"}, {"content", last}});
    request.continue_final_message = true;
    return chat.render(request);
  };
  EXPECT_EQ(join_segments(render(nano(), "Once upon")), "<s>[INST]go[/INST]Once upon");
  EXPECT_EQ(join_segments(render(nano(), "Once upon  ")), "<s>[INST]go[/INST]Once upon  ");
  EXPECT_EQ(join_segments(render(nano(), "go")), "<s>[INST]go[/INST]go");
  EXPECT_EQ(join_segments(render(nano(), "")), "<s>[INST]go[/INST]");
  const auto trimming =
      ChatTemplate::from_source("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", {});
  EXPECT_EQ(join_segments(render(trimming, " Once ")), "<go><Once");
  EXPECT_EQ(join_segments(render(ChatTemplate::built_in(MistralVersion::kV7), "Once")),
            "<s>[INST]go[/INST]Once");
  EXPECT_THROW(render(ChatTemplate::from_source("{{ messages|length }}", {}), "Once"), Error);
  // A [THINK] prefill is the control token; elsewhere it is what somebody typed.
  const RenderedSegments thinking = {
      {"<s>[INST]", true}, {"go", false}, {"[/INST][THINK]", true}, {"[THINK] hm", false}};
  EXPECT_EQ(render(nano(), "[THINK][THINK] hm"), thinking);
  EXPECT_EQ(render(ChatTemplate::built_in(MistralVersion::kV13), "[THINK][THINK] hm"), thinking);
  EXPECT_EQ(render(ChatTemplate::built_in(MistralVersion::kV7), "[THINK]").back(),
            (RenderedSegment{"[THINK]", false}));
  ChatRequest prefix;
  prefix.messages = messages_of(
      R"([{"role":"user","content":"go"},{"role":"assistant","content":"So","prefix":true}])");
  EXPECT_EQ(join_segments(nano().render(prefix)), "<s>[INST]go[/INST]So");
}

TEST(ChatTemplateVariables, KwargsAreData) {
  const auto chat = ChatTemplate::from_source(
      "{{ bos_token }}{{ 'think' if enable_thinking else 'plain' }}{{ tag }}"
      "{{ '|' if add_generation_prompt }}{{ documents|length if documents }}",
      {{"bos_token", "<s>"}});
  ChatRequest request;
  request.messages = messages_of(R"([{"role":"user","content":"x"}])");
  request.template_variables = {{"enable_thinking", true}, {"tag", "[INST]"}};
  request.documents = json::array{1, 2};
  const RenderedSegments expected = {
      {"<s>think", true}, {"[INST]", false}, {"|", true}, {"2", false}};
  EXPECT_EQ(chat.render(request), expected);
}

TEST(RenderCommand, LinesInLinesOut) {
  EXPECT_EQ(render_json_line(nano(), R"({"messages":[{"role":"user","content":"é \"q\""}]})"),
            R"("<s>[INST]é \"q\"[/INST]")");
  EXPECT_EQ(
      render_json_line(
          nano(),
          R"({"messages":[{"role":"system","content":"a"},{"role":"assistant","content":"b"}]})"),
      R"({"error": "TemplateError", "message": "User and assistant turns must alternate: an assistant turn came where user was due."})");
  EXPECT_EQ(render_json_line(
                nano(), R"({"messages":[{"role":"assistant","content":"b"}],"roles":"tolerant"})"),
            R"("<s>[INST][/INST]b</s>")");
  EXPECT_EQ(
      render_json_line(
          nano(),
          R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"continue_final_message":true})"),
      R"("<s>[INST]a[/INST]b")");
  EXPECT_EQ(render_json_line(jinja::Template::compile("{{ a + 1 }}"), R"({"a": 2.5})"), R"("3.5")");
  EXPECT_NE(render_json_line(nano(), "{").find("\"error\""), std::string::npos);
  EXPECT_NE(render_json_line(nano(), "{}").find("\"error\""), std::string::npos);
}

TEST(ChatTemplateNemo, ThirdPartyTemplate) {
  const std::string config = testing::read_nemo_file("tokenizer_config");
  if (config.empty()) GTEST_SKIP() << testing::kNoTekken;
  const TemporaryDir dir;
  dir.write("tokenizer_config.json", config);
  const ChatTemplate chat = ChatTemplate::load(dir.path);
  ChatRequest request;
  request.roles = RolePolicy::kStrict;
  request.messages = messages_of(
      R"([{"role":"system","content":"S"},{"role":"user","content":"a"},{"role":"assistant","content":"b"},
          {"role":"user","content":"[/INST]c"}])");
  const RenderedSegments expected = {{"<s>[INST]", true}, {"a", false},         {"[/INST]", true},
                                     {"b", false},        {"</s>[INST]", true}, {"S", false},
                                     {"\n\n", true},      {"[/INST]c", false},  {"[/INST]", true}};
  EXPECT_EQ(chat.render(request), expected);
  request.tools = parse_json(
      R"([{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object"}}}])",
      "tools");
  EXPECT_EQ(join_segments(chat.render(request)),
            "<s>[INST]a[/INST]b</s>[AVAILABLE_TOOLS][{\"type\": \"function\", \"function\": "
            "{\"name\": \"f\", "
            "\"description\": \"d\", \"parameters\": {\"type\": \"object\"}}}][/AVAILABLE_TOOLS]"
            "[INST]S\n\n[/INST]c[/INST]");
  request.tools = nullptr;
  request.messages =
      messages_of(R"([{"role":"assistant","content":"hey"},{"role":"user","content":"a"}])");
  EXPECT_THROW(chat.render(request), jinja::TemplateError);
  request.roles = RolePolicy::kTolerant;
  EXPECT_EQ(join_segments(chat.render(request)), "<s>[INST][/INST]hey</s>[INST]a[/INST]");
}

}  // namespace
}  // namespace nibble
