// SPDX-License-Identifier: Apache-2.0
#include "text/jinja.h"

#include "text/jinja_eval.h"

namespace nibble {

std::string join_segments(const RenderedSegments& segments) {
  std::string out;
  for (const RenderedSegment& segment : segments) out += segment.text;
  return out;
}

void append_segment(RenderedSegments& segments, std::string_view text, bool is_template) {
  if (text.empty()) return;
  if (!segments.empty() && segments.back().is_template == is_template) {
    segments.back().text += text;
  } else {
    segments.push_back({std::string(text), is_template});
  }
}

namespace jinja {

Template Template::compile(std::string_view source, const CompileOptions& options) {
  Template out;
  out.body_ = std::make_shared<const Body>(parse_template(source, options));
  return out;
}

RenderedSegments Template::render(const json::object& variables, const json::object& trusted,
                                  const RenderOptions& options) const {
  DictObject context;
  int line = 0;
  try {
    for (const auto& member : trusted)
      context.set(member.key(), Value::from_json(member.value(), true));
    for (const auto& member : variables)
      context.set(member.key(), Value::from_json(member.value()));
    Evaluator evaluator(context, options);
    Text text;
    try {
      text = evaluator.run(*body_);
    } catch (...) {
      line = evaluator.line();
      throw;
    }
    RenderedSegments segments;
    text.for_each_run([&](size_t begin, size_t end, bool is_template) {
      append_segment(segments, std::string_view(text.str()).substr(begin, end - begin),
                     is_template);
    });
    return segments;
  } catch (const Raise& raised) {
    throw TemplateError(raised.kind, raised.type, raised.message, line);
  }
}

std::string Template::render_text(const json::object& variables,
                                  const RenderOptions& options) const {
  return join_segments(render(variables, {}, options));
}

}  // namespace jinja
}  // namespace nibble
