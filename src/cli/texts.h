// Text files for eval and calibration, turned into ids by the model's own tokenizer and chat
// template. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/file.h"

namespace nibble::cli {

/// .jsonl with {"messages"} (rendered by the chat template) or {"text"} a line, or a plain text
/// file: documents become <s> + ids + </s>, chats what the template gives; all concatenated. Throws
/// Error naming file and line.
std::vector<int32_t> encode_text_file(const fs::path& model_dir, const fs::path& file,
                                      const std::string& regex);

/// Token ids as little-endian integers, .u16 or .u32. Throws Error{kUsage} for other names.
std::vector<int32_t> read_ids_file(const fs::path& path);

/// One or the other, by the file's name.
std::vector<int32_t> eval_ids(const fs::path& model_dir, const fs::path& file,
                              const std::string& regex);

}  // namespace nibble::cli
