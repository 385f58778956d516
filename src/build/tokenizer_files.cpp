// SPDX-License-Identifier: Apache-2.0
#include "build/tokenizer_files.h"

#include "base/error.h"

namespace nibble {

void copy_tokenizer_files(const fs::path& from, const fs::path& to) {
  const fs::path source = tokenizer_directory(from);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                           "chat_template.jinja", "generation_config.json"}) {
    if (fs::exists(source / name)) write_file_atomically(to / name, read_file(source / name));
  }
}

fs::path tokenizer_directory(const fs::path& model_dir) {
  if (fs::exists(model_dir / "tokenizer.json")) return model_dir;
  const fs::path absolute = fs::absolute(model_dir).lexically_normal();
  const fs::path trimmed = absolute.has_filename() ? absolute : absolute.parent_path();
  if (trimmed.filename() == "checkpoints" && trimmed.parent_path().filename() == "trt-llm") {
    return trimmed.parent_path().parent_path();
  }
  return model_dir;
}

}  // namespace nibble
