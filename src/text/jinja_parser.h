// Tokens to syntax tree: Jinja 3.1's grammar, its precedence and its messages.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "text/jinja_ast.h"

namespace nibble::jinja {

struct CompileOptions {
  /// Hugging Face's `{% generation %}` block (renders its body).
  bool generation_tag = true;
  size_t max_source_bytes = size_t{1} << 20;
};

/// Throws TemplateError (TemplateSyntaxError, TemplateAssertionError).
Body parse_template(std::string_view source, const CompileOptions& options);

}  // namespace nibble::jinja
