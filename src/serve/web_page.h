// The chat page at "/" and the OpenAPI document: files embedded in the binary.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace nibble {

struct WebFile {
  std::string_view path;  // "/"
  std::string_view content_type;
  std::string_view content;
  std::string_view etag;  // quoted
};

inline constexpr std::string_view kOpenApiPath = "/openapi.json";  // served without the page too

/// Nothing but this server's own files may run, load or be talked to.
inline constexpr std::string_view kContentSecurityPolicy =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Null for any other path. What it points to lives forever.
const WebFile* find_web_file(std::string_view path);

}  // namespace nibble
