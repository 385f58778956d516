// The files that make a weights directory a chat model: tokenizer, chat template, generation
// config. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"

namespace nibble {

/// Copies those present in `from` to `to`.
/// A missing tokenizer.json is no error: chat and serve say so when they need it.
void copy_tokenizer_files(const fs::path& from, const fs::path& to);

/// Where the tokenizer of a model directory lies: itself, or the root of a published layout
/// (ROOT/trt-llm/checkpoints -> ROOT).
fs::path tokenizer_directory(const fs::path& model_dir);

}  // namespace nibble
