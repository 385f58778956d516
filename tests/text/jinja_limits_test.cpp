// Hostile templates fail within about a second and bounded memory.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <chrono>

#include "text/jinja.h"

namespace nibble {
namespace {

/// Compiles and renders; returns the error type ("" when it rendered).
std::string outcome(const std::string& source) {
  const auto start = std::chrono::steady_clock::now();
  std::string type;
  try {
    jinja::Template::compile(source).render({{"messages", json::array{}}});
  } catch (const jinja::TemplateError& error) {
    type = error.type();
    if (type == "LimitError") {
      EXPECT_EQ(error.kind(), ErrorKind::kLimit);
    }
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_LT(took.count(), 10.0) << source.substr(0, 100);  // about one on an idle machine
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  EXPECT_LT(usage.ru_maxrss, 2'000'000) << "KiB after " << source.substr(0, 100);
  return type;
}

std::string repeat(const std::string& piece, int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += piece;
  return out;
}

TEST(JinjaLimits, HostileTemplates) {
  const std::string loops =
      "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}"
      "{% endfor %}{% endfor %}{% endfor %}";
  const std::string hostile[] = {
      "{{ 'x' * 10**9 }}",
      "{{ 'x' * 1000000000000000000 }}",
      "{{ [1] * 10**9 }}",
      "{% set ns = namespace(x='x') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% "
      "endfor %}",
      "{% set ns = namespace(x='x' * 1000) %}{% for i in range(100000) %}{% set ns.x = ns.x + 'y' "
      "* 1000 %}{% endfor %}",
      "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = ns.x + [1] %}{% "
      "endfor %}",
      "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor "
      "%}",
      "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor "
      "%}{{ ns.x }}",
      "{% set ns = namespace(x=1, y=1) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}"
      "{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ ns.x == ns.y }}",
      "{% for a in range(100000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 1000 }}{% endfor %}",
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
      "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
      "{{ " + repeat("(", 100000) + "1" + repeat(")", 100000) + " }}",
      "{{ " + repeat("[", 100000) + repeat("]", 100000) + " }}",
      "{{ " + repeat("not ", 100000) + "1 }}",
      "{{ " + repeat("-", 100000) + "1 }}",
      "{{ 1" + repeat(" + 1", 100000) + " }}",
      "{{ a" + repeat(".a", 100000) + " }}",
      "{{ a" + repeat("|upper", 100000) + " }}",
      "{{ " + repeat("1 if ", 1000) + "1 }}",
      repeat("{% if 1 %}", 100000) + repeat("{% endif %}", 100000),
      loops,
      "{% for a in range(100000) %}{% set x = range(100000)|list|sort|reverse|list %}{% endfor %}",
      "{% set s = 'a' * 10000000 %}{% for i in range(100000) %}{% set x = (s ~ 'b') in s %}{% "
      "endfor %}",
      "{% set s = 'a' * 10000000 %}{% for i in range(100000) %}{% set x = s[i] %}{% endfor %}",
      "{% set s = 'a' * 10000000 %}{% for i in range(100000) %}{% set x = s|upper %}{% endfor %}",
      "{% set s = 'a' * 4000000 %}{{ s.replace('a', s) }}",
      "{% set s = 'a' * 4000000 %}{{ s|list|length }}",
      "{{ '%1000000000d' % 1 }}",
      "{{ '{:1000000000}'.format(1) }}",
      "{{ 'x'.center(10**12) }}",
      "{{ 'x'|indent(10**12) }}",
      "{{ [1]|batch(10**12, 0)|list }}",
      "{{ [1]|slice(10**12)|list }}",
      "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
      "{% for i in range(1000) recursive %}{{ loop([1]) }}{% endfor %}",
      "{% set ns = namespace(f=1) %}{% for i in range(100000) %}{% set ns.f = cycler(ns.f) %}{% "
      "endfor %}",
      std::string(3 << 20, 'x'),
  };
  for (const std::string& source : hostile) {
    EXPECT_EQ(outcome(source), "LimitError") << source.substr(0, 200);
  }
}

TEST(JinjaLimits, DeepButHonestTemplatesRender) {
  EXPECT_EQ(outcome("{{ " + repeat("(", 40) + "1" + repeat(")", 40) + " }}"), "");
  EXPECT_EQ(outcome("{{ 'a'" + repeat(" + 'a'", 200) + " }}"), "");
  EXPECT_EQ(outcome("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"),
            "");
  EXPECT_EQ(outcome(repeat("{% if 1 %}", 40) + "x" + repeat("{% endif %}", 40)), "");
  EXPECT_EQ(outcome("{% for i in range(100000) %}{{ i }}{% endfor %}"), "");
  // A namespace that holds itself is freed all the same (the sanitizer build looks for leaks).
  EXPECT_EQ(
      outcome(
          "{% set ns = namespace() %}{% set ns.x = [ns] %}{% macro m() %}{% endmacro %}"
          "{% for i in [1] %}{% macro q() %}{{ i }}{% endmacro %}{% set ns.m = q %}{% endfor %}"),
      "");
}

TEST(JinjaLimits, ErrorsNameTheLine) {
  try {
    jinja::Template::compile("a\n{% if x %}\n{{ 1 + }}\n{% endif %}");
    FAIL();
  } catch (const jinja::TemplateError& error) {
    EXPECT_EQ(error.line(), 3);
    EXPECT_EQ(error.kind(), ErrorKind::kInput);
  }
  try {
    jinja::Template::compile("a\n\n\n{{ raise_exception('no') }}").render({});
    FAIL();
  } catch (const jinja::TemplateError& error) {
    EXPECT_EQ(error.line(), 4);
    EXPECT_STREQ(error.what(), "chat template, line 4: TemplateError: no");
  }
}

}  // namespace
}  // namespace nibble
