// What the tokenizer tests share: finding data, and the Tekken vocabulary under Magistral's names.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "text/tokenizer.h"

namespace nibble::testing {

inline fs::path source_dir() { return NIBBLE_SOURCE_DIR; }
inline fs::path shared_dir() { return NIBBLE_SHARED_DIR; }
inline fs::path nano_dir() { return source_dir() / "models/nano"; }

std::vector<std::string> read_lines(const fs::path& path);
std::string read_gzip(const fs::path& path);

/// A file of the Nemo tokenizer, which is not in the repository: gzipped in NIBBLE_SHARED_DIR/text,
/// or as scripts/fetch_tekken brings it. Empty without either.
std::string read_nemo_file(const std::string& name);
constexpr const char* kNoTekken = "no Tekken vocabulary; scripts/fetch_tekken brings it";

/// tokenizer.json with the Tekken vocabulary and Magistral-2509's control tokens (shared
/// tools/mktok.py); `llama3_regex`: as Mistral-Small-3.1 ships it. Only if tekken_available().
bool tekken_available();
const std::string& tekken_tokenizer_json(bool llama3_regex = false);
const Tokenizer& tekken_tokenizer();
const Tokenizer& nano_tokenizer();

std::vector<int32_t> ids_of(const json::value& array);

}  // namespace nibble::testing
