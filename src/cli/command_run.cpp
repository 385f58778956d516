// run: one prompt, one answer.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <iostream>
#include <iterator>

#include "cli/chat_support.h"
#include "cli/options.h"
#include "cli/terminal.h"

namespace nibble::cli {

int run_run(const RunFlags& flags) {
  std::string prompt = flags.prompt;
  if (prompt == "-") prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  const auto model = open_chat_model(flags);
  std::vector<int32_t> ids;
  if (flags.raw) {
    ids = model->encode_prompt(prompt);
  } else {
    ChatRequest request;
    if (!flags.system.empty())
      request.messages.push_back(json::object{{"role", "system"}, {"content", flags.system}});
    request.messages.push_back(json::object{{"role", "user"}, {"content", prompt}});
    ids = model->encode_chat(std::move(request));
  }
  const SpeedReport report(*model);
  const Generated answer =
      generate(*model, std::move(ids), sampling_params(flags.sampling), max_tokens(flags.sampling),
               flags.sampling.stop, [](std::string_view text) {
                 fmt::print("{}", text);
                 std::fflush(stdout);
               });
  fmt::print("\n");
  std::fflush(stdout);
  if (!flags.no_stats) print_stderr("{}\n", report.line(answer));
  return answer.finish_reason == FinishReason::kCancelled && !answer.stopped_by_string ? 130 : 0;
}

}  // namespace nibble::cli
