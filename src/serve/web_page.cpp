// SPDX-License-Identifier: Apache-2.0
#include "serve/web_page.h"

#include <array>
#include <span>
#include <string>

#include "base/hash.h"

// The assembler copies the files into read-only data; CMake passes their folder and makes this file
// depend on them.
#define NIBBLE_EMBED(symbol, file)           \
  asm("  .section .rodata\n"                 \
      "  .global nibble_web_" symbol         \
      "_begin\n"                             \
      "  .global nibble_web_" symbol         \
      "_end\n"                               \
      "nibble_web_" symbol                   \
      "_begin:\n"                            \
      "  .incbin \"" NIBBLE_WEB_DIR "/" file \
      "\"\n"                                 \
      "nibble_web_" symbol                   \
      "_end:\n"                              \
      "  .byte 0\n"                          \
      "  .previous\n")

NIBBLE_EMBED("page", "index.html");
NIBBLE_EMBED("script", "app.js");
NIBBLE_EMBED("style", "style.css");
NIBBLE_EMBED("openapi", "openapi.json");

extern "C" {
extern const char nibble_web_page_begin[], nibble_web_page_end[];
extern const char nibble_web_script_begin[], nibble_web_script_end[];
extern const char nibble_web_style_begin[], nibble_web_style_end[];
extern const char nibble_web_openapi_begin[], nibble_web_openapi_end[];
}

namespace nibble {
namespace {

std::string_view between(const char* begin, const char* end) {
  return {begin, static_cast<size_t>(end - begin)};
}

struct Files {
  Files() {
    const auto set = [&](size_t i, std::string_view path, std::string_view type, const char* begin,
                         const char* end) { files[i] = {path, type, between(begin, end), {}}; };
    set(0, "/", "text/html; charset=utf-8", nibble_web_page_begin, nibble_web_page_end);
    set(1, "/app.js", "text/javascript; charset=utf-8", nibble_web_script_begin,
        nibble_web_script_end);
    set(2, "/style.css", "text/css; charset=utf-8", nibble_web_style_begin, nibble_web_style_end);
    set(3, kOpenApiPath, "application/json", nibble_web_openapi_begin, nibble_web_openapi_end);
    for (size_t i = 0; i < files.size(); ++i) {
      const std::string_view content = files[i].content;
      etags[i] = "\"" + hex64(xxh3_64(std::as_bytes(std::span(content)))) + "\"";
      files[i].etag = etags[i];
    }
  }
  std::array<WebFile, 4> files;
  std::array<std::string, 4> etags;
};

}  // namespace

const WebFile* find_web_file(std::string_view path) {
  static const Files all;
  for (const WebFile& file : all.files) {
    if (file.path == path) return &file;
  }
  return nullptr;
}

}  // namespace nibble
