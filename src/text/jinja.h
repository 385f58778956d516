// The Jinja engine's front door: compile a chat template once, render it many times, with Python's
// and Hugging Face's output (ImmutableSandboxedEnvironment, trim_blocks, lstrip_blocks,
// loopcontrols, tojson without HTML escaping). Templates come from model repositories and are not
// trusted: steps, memory, output and depth are limited. A rendering says which bytes are the
// template's own literals (they may become control tokens) and which came from the variables (they
// never may). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/jinja_parser.h"
#include "text/jinja_value.h"

namespace nibble {

/// A stretch of a rendered prompt. The tokenizer may look for special tokens in template segments
/// only; plain text of neighbouring segments is to be joined before it is encoded.
struct RenderedSegment {
  std::string text;
  bool is_template = false;

  bool operator==(const RenderedSegment&) const = default;
};

using RenderedSegments = std::vector<RenderedSegment>;

std::string join_segments(const RenderedSegments& segments);
/// Appends; neighbours of one kind are merged, empty text is dropped.
void append_segment(RenderedSegments& segments, std::string_view text, bool is_template);

namespace jinja {

struct Limits {
  uint64_t max_steps = 4'000'000;               // evaluated nodes; long operations count extra
  size_t max_memory_bytes = size_t{256} << 20;  // all values made during one rendering
  size_t max_output_bytes = size_t{32} << 20;
  size_t max_string_bytes = size_t{32} << 20;  // one string value
  int max_depth = 600;                         // nesting of evaluation, recursion of macros
};

struct RenderOptions {
  Limits limits;
  /// What strftime_now() shows; the local time when absent.
  std::optional<std::tm> now;
};

class Template {
 public:
  /// Throws TemplateError with the line for syntax errors, unknown filters and unknown tests.
  static Template compile(std::string_view source, const CompileOptions& options = {});

  /// `variables` are data. `trusted` (bos_token, eos_token, ...: set by the server from the model's
  /// own files) count as template text; a variable of the same name hides them. Throws
  /// TemplateError; its kind is kLimit when a limit was hit. Thread-safe.
  RenderedSegments render(const json::object& variables, const json::object& trusted = {},
                          const RenderOptions& options = {}) const;
  std::string render_text(const json::object& variables, const RenderOptions& options = {}) const;

 private:
  std::shared_ptr<const Body> body_;
};

}  // namespace jinja
}  // namespace nibble
