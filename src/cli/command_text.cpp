// tokenize and render: JSON lines in, JSON lines out.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <iostream>
#include <string>

#include "base/error.h"
#include "base/interrupt.h"
#include "build/tokenizer_files.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace nibble::cli {

int run_tokenize(const TokenizeFlags& flags) {
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_directory(flags.model),
                                              {parse_tokenizer_regex(flags.tokenizer_regex)});
  for (const std::string& notice : tokenizer.notices()) print_stderr("{}\n", notice);
  const TokenizeOptions options{
      .bos = flags.bos, .parse_special = flags.parse_special, .decode = flags.decode};
  std::string line;
  for (int64_t number = 1; std::getline(std::cin, line); ++number) {
    throw_if_interrupted();
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    try {
      std::cout << tokenize_json_line(tokenizer, line, options) << '\n';
    } catch (const Error& error) {
      std::cout.flush();
      fail(error.kind(), "standard input line {}: {}", number, error.what());
    }
  }
  std::cout.flush();
  return 0;
}

int run_render(const RenderFlags& flags) {
  const fs::path source = flags.source;
  std::optional<jinja::Template> bare;
  std::optional<ChatTemplate> chat;
  if (fs::is_directory(source)) {
    chat = ChatTemplate::load(tokenizer_directory(source));
  } else {
    bare = jinja::Template::compile(read_file(source, 16 << 20));
  }
  std::string line;
  while (std::getline(std::cin, line)) {
    throw_if_interrupted();
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    std::cout << (chat ? render_json_line(*chat, line) : render_json_line(*bare, line)) << '\n';
  }
  std::cout.flush();
  return 0;
}

}  // namespace nibble::cli
