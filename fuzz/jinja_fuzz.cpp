// Chat templates are untrusted: compile and render any bytes. Only nibble::Error may come out,
// within the limits. Provenance is checked too: data typed by the user must not come out as
// template text. SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "text/jinja.h"

namespace {

const nibble::json::object& variables() {
  static const nibble::json::object value =
      nibble::parse_json(
          R"({"messages": [{"role": "system", "content": "Be \u0394."}, {"role": "user", "content": "\u2620"},
              {"role": "assistant", "content": [{"type": "text", "text": "\u2620"}], "tool_calls": [{"id": "abcdefghi",
               "function": {"name": "f", "arguments": {"x": [1, 2.5, null, true]}}}]}],
              "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": {"b": "c"}}}}],
              "add_generation_prompt": true, "n": 5, "f": 1.5, "l": [3, 1, 2], "s": "h\u2620llo", "d": {"a": 1}})",
          "variables")
          .as_object();
  return value;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view source(reinterpret_cast<const char*>(data), size);
  nibble::jinja::RenderOptions options;
  options.limits.max_steps = 20'000;
  options.limits.max_memory_bytes = size_t{16} << 20;
  options.limits.max_output_bytes = size_t{1} << 20;
  options.limits.max_string_bytes = size_t{1} << 20;
  options.limits.max_depth = 200;
  constexpr std::string_view kSkull = "\xe2\x98\xa0";  // stands in the variables only
  const bool in_source = source.find(kSkull) != source.npos || source.find("2620") != source.npos ||
                         source.find("\\x") != source.npos || source.find('\\') != source.npos;
  try {
    const auto segments = nibble::jinja::Template::compile(source).render(
        variables(), {{"bos_token", "<s>"}, {"eos_token", "</s>"}}, options);
    for (const auto& segment : segments) {
      if (segment.is_template && !in_source && segment.text.find(kSkull) != std::string::npos)
        abort();
    }
  } catch (const nibble::Error& error) {
    if (error.kind() == nibble::ErrorKind::kInternal) abort();
  }
  return 0;
}
