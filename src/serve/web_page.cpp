// SPDX-License-Identifier: Apache-2.0
#include "serve/web_page.h"

namespace nibble {
const WebFile* find_web_file(std::string_view) { return nullptr; }
}  // namespace nibble
