// Jinja2 3.1.6's own output (tests/data/text/golden_jinja_*.jsonl) for 560 expressions, 192
// renderings of four chat templates, and the extra templates of scripts/make_jinja_goldens.py.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <map>
#include <sstream>

#include "base/file.h"
#include "base/json.h"
#include "text/jinja.h"

namespace nibble {
namespace {

std::string data_path(const std::string& name) {
  return std::string(NIBBLE_SOURCE_DIR) + "/tests/data/text/" + name;
}

std::vector<json::object> read_lines(const std::string& name) {
  std::istringstream lines(read_file(data_path(name)));
  std::vector<json::object> rows;
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty()) rows.push_back(parse_json(line, name).as_object());
  }
  return rows;
}

std::string get(const json::object& row, std::string_view key) {
  return std::string(row.at(key).as_string());
}

jinja::RenderOptions golden_clock() {
  std::tm now{};  // Wednesday 2025-01-15 13:45:30, as in the golden tool
  now.tm_year = 125;
  now.tm_mon = 0;
  now.tm_mday = 15;
  now.tm_hour = 13;
  now.tm_min = 45;
  now.tm_sec = 30;
  now.tm_wday = 3;
  now.tm_yday = 14;
  jinja::RenderOptions options;
  options.now = now;
  return options;
}

/// Renders and compares with a row's `out`, or `error` and `message`. The tool cut messages at 200
/// characters.
void expect_row(const json::object& row, const std::string& source, const json::object& variables,
                const jinja::CompileOptions& compile_options) {
  std::string got, type, message;
  try {
    got = jinja::Template::compile(source, compile_options).render_text(variables, golden_clock());
  } catch (const jinja::TemplateError& error) {
    type = error.type();
    message = error.message().substr(0, 200);
  }
  if (row.contains("out")) {
    EXPECT_EQ(type, "") << message;
    EXPECT_EQ(got, get(row, "out"));
  } else {
    EXPECT_EQ(type, get(row, "error")) << "message " << message << ", output " << got;
    EXPECT_EQ(message, get(row, "message"));
  }
}

TEST(JinjaGolden, MicroExpressions) {
  const auto rows = read_lines("golden_jinja_micro.jsonl");
  ASSERT_EQ(rows.size(), 561u);
  const json::object context = rows[0].at("context").as_object();
  jinja::CompileOptions options;
  options.generation_tag = false;  // the golden environment had no such extension
  for (size_t i = 1; i < rows.size(); ++i) {
    SCOPED_TRACE(get(rows[i], "src"));
    expect_row(rows[i], get(rows[i], "src"), context, options);
  }
}

TEST(JinjaGolden, OwnTemplatesOverConversations) {
  std::map<std::string, json::object> conversations;
  for (auto& row : read_lines("golden_conversations.jsonl")) conversations[get(row, "name")] = row;
  const auto rows = read_lines("golden_jinja_own.jsonl");
  ASSERT_EQ(rows.size(), 192u);
  for (const auto& row : rows) {
    SCOPED_TRACE(get(row, "template") + " " + get(row, "conv") + " " + get(row, "args"));
    const json::object& conversation = conversations.at(get(row, "conv"));
    json::array messages = conversation.at("messages").as_array();
    if (get(row, "args") == "dict") {
      for (auto& message : messages) {
        if (auto* calls = message.as_object().if_contains("tool_calls")) {
          for (auto& call : calls->as_array()) {
            auto& function = call.as_object()["function"].as_object();
            function["arguments"] =
                parse_json(std::string(function["arguments"].as_string()), "arguments");
          }
        }
      }
    }
    const auto* keep_going = conversation.if_contains("continue_final_message");
    const json::object variables{
        {"messages", messages}, {"tools", conversation.at("tools")},
        {"documents", nullptr}, {"add_generation_prompt", !(keep_going && keep_going->as_bool())},
        {"bos_token", "<s>"},   {"eos_token", "</s>"}};
    expect_row(row, read_file(data_path("templates/" + get(row, "template"))), variables, {});
  }
}

TEST(JinjaGolden, ExtraTemplates) {
  const auto rows = read_lines("golden_jinja_extra.jsonl");
  ASSERT_GT(rows.size(), 250u);
  const json::object variables = rows[0].at("variables").as_object();
  for (size_t i = 1; i < rows.size(); ++i) {
    SCOPED_TRACE(get(rows[i], "src"));
    expect_row(rows[i], get(rows[i], "src"), variables, {});
  }
}

}  // namespace
}  // namespace nibble
