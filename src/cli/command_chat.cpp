// chat: a conversation in the terminal.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <histedit.h>
#include <unistd.h>

#include <array>
#include <clocale>
#include <cstdio>
#include <iostream>

#include "base/error.h"
#include "base/interrupt.h"
#include "base/nearest.h"
#include "cli/chat_support.h"
#include "cli/options.h"
#include "cli/terminal.h"

namespace nibble::cli {
namespace {

constexpr const char* kHelp =
    "/regenerate      answer the last message again\n"
    "/continue        go on where the last answer stopped\n"
    "/system TEXT     set the system prompt (empty: none); the conversation stays\n"
    "/save FILE       write the conversation as JSON\n"
    "/reset           forget the conversation\n"
    "/quit            leave (also Ctrl-D); Ctrl-C stops an answer\n";

// Lines from a terminal with editing and history, or from a pipe.
class LineReader {
 public:
  LineReader() : is_terminal_(::isatty(STDIN_FILENO) == 1) {
    if (!is_terminal_) return;
    std::setlocale(LC_CTYPE, "");
    history_ = ::history_init();
    HistEvent event;
    ::history(history_, &event, H_SETSIZE, 500);
    edit_ = ::el_init("nibble", stdin, stdout, stderr);
    ::el_set(
        edit_, EL_PROMPT, +[](EditLine*) {
          static char prompt[] = "> ";
          return prompt;
        });
    ::el_set(edit_, EL_EDITOR, "emacs");
    ::el_set(edit_, EL_SIGNAL, 0);
    ::el_set(edit_, EL_HIST, ::history, history_);
  }
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;
  ~LineReader() {
    if (edit_ != nullptr) ::el_end(edit_);
    if (history_ != nullptr) ::history_end(history_);
  }

  std::optional<std::string> next() {
    std::string line;
    if (!is_terminal_) return std::getline(std::cin, line) ? std::optional(line) : std::nullopt;
    int length = 0;
    const char* text = ::el_gets(edit_, &length);
    if (text == nullptr) {
      if (!interrupt_requested()) return std::nullopt;
      clear_interrupt();  // Ctrl-C at the prompt only drops the line
      fmt::print("\n");
      return std::string();
    }
    line.assign(text, static_cast<size_t>(length));
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
    HistEvent event;
    if (!line.empty()) ::history(history_, &event, H_ENTER, text);
    return line;
  }

 private:
  bool is_terminal_;
  EditLine* edit_ = nullptr;
  History* history_ = nullptr;
};

class Conversation {
 public:
  Conversation(const RunFlags& flags, ChatModel& model)
      : flags_(flags), model_(model), report_(model), system_(flags.system) {}

  void say(const std::string& text) {
    turns_.push_back(json::object{{"role", "user"}, {"content", text}});
    if (!answer(false)) turns_.erase(turns_.end() - 1);
  }

  /// False when the line was no command.
  bool command(const std::string& line, bool& quit) {
    if (!line.starts_with("/")) return false;
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space);
    const std::string argument = space == line.npos ? "" : line.substr(space + 1);
    if (name == "/quit" || name == "/exit") {
      quit = true;
    } else if (name == "/help") {
      fmt::print("{}", kHelp);
    } else if (name == "/reset") {
      turns_.clear();
    } else if (name == "/system") {
      system_ = argument;
      fmt::print("{}\n", system_.empty() ? "no system prompt" : "system prompt set");
    } else if (name == "/regenerate") {
      regenerate();
    } else if (name == "/continue") {
      if (turns_.empty() || !last_is("assistant")) {
        fmt::print("there is no answer to continue\n");
      } else {
        answer(true);
      }
    } else if (name == "/save") {
      save(argument);
    } else {
      constexpr std::array<std::string_view, 7> kNames{
          "/regenerate", "/continue", "/system", "/save", "/reset", "/quit", "/help"};
      fmt::print("unknown command {}; did you mean {}? /help lists them\n", name,
                 nearest_name(name, kNames));
    }
    return true;
  }

 private:
  bool last_is(std::string_view role) const {
    return !turns_.empty() && std::string_view(turns_.back().at("role").get_string()) == role;
  }

  json::array messages() const {
    json::array all;
    if (!system_.empty()) all.push_back(json::object{{"role", "system"}, {"content", system_}});
    all.insert(all.end(), turns_.begin(), turns_.end());
    return all;
  }

  void regenerate() {
    if (turns_.empty()) {
      fmt::print("nothing has been said yet\n");
      return;
    }
    json::value previous;
    if (last_is("assistant")) {
      previous = turns_.back();
      turns_.pop_back();
    }
    ++regenerations_;
    if (!answer(false) && !previous.is_null()) turns_.push_back(previous);
  }

  bool answer(bool go_on) {
    try {
      ChatRequest request;
      request.messages = messages();
      request.continue_final_message = go_on;
      request.add_generation_prompt = !go_on;
      SamplingParams params = sampling_params(flags_.sampling);
      if (params.seed) *params.seed += regenerations_;  // another answer, still reproducible
      const Generated generated =
          generate(model_, model_.encode_chat(std::move(request)), params,
                   max_tokens(flags_.sampling), flags_.sampling.stop, [](std::string_view text) {
                     fmt::print("{}", text);
                     std::fflush(stdout);
                   });
      clear_interrupt();
      fmt::print("\n");
      std::fflush(stdout);
      if (!flags_.no_stats) print_stderr("{}\n", report_.line(generated));
      if (generated.finish_reason == FinishReason::kLength) {
        print_stderr("(stopped at the length limit; /continue goes on)\n");
      }
      if (go_on) {
        auto& content = turns_.back().at("content").as_string();
        content.append(generated.text);
      } else {
        turns_.push_back(json::object{{"role", "assistant"}, {"content", generated.text}});
      }
      return true;
    } catch (const Error& error) {
      if (error.kind() == ErrorKind::kInternal || error.kind() == ErrorKind::kDevice) throw;
      clear_interrupt();
      print_stderr("\n{}\n", error.what());
      return false;
    }
  }

  void save(const std::string& file) const {
    if (file.empty()) {
      fmt::print("/save needs a file name\n");
      return;
    }
    try {
      write_file_atomically(
          file, dump_json(json::object{{"messages", messages()}}, {.indent = 2}) + "\n");
      fmt::print("saved {}\n", file);
    } catch (const Error& error) {
      print_stderr("{}\n", error.what());
    }
  }

  const RunFlags& flags_;
  ChatModel& model_;
  SpeedReport report_;
  std::string system_;
  json::array turns_;
  uint64_t regenerations_ = 0;
};

}  // namespace

int run_chat(const RunFlags& flags) {
  const auto model = open_chat_model(flags);
  Conversation conversation(flags, *model);
  if (::isatty(STDIN_FILENO) == 1) fmt::print("/help lists commands, Ctrl-D ends\n");
  LineReader reader;
  bool quit = false;
  while (!quit) {
    const std::optional<std::string> line = reader.next();
    if (!line) break;
    if (line->empty()) continue;
    if (!conversation.command(*line, quit)) conversation.say(*line);
  }
  return 0;
}

}  // namespace nibble::cli
