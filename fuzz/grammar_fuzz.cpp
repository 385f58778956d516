// JSON schemas, regular expressions and choices from strangers: each is refused with an error or
// becomes a grammar without dead ends. The first byte picks the kind; the second and the rest of
// the text's end steer a walk through the grammar. SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/json.h"
#include "text/grammar_automaton.h"
#include "text/json_schema_grammar.h"
#include "text/utf8.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

nibble::Grammar grammar_of(uint8_t kind, std::string_view text) {
  switch (kind) {
    case 's': return nibble::json_schema_grammar(nibble::parse_json(text, "schema"), "schema");
    case 'r': return nibble::regex_grammar(text, "regex");
    default: break;
  }
  const std::string choices[] = {std::string(text.substr(0, text.size() / 2)),
                                 std::string(text.substr(text.size() / 2))};
  return nibble::choice_grammar(choices, "choice");
}

/// Takes one of the bytes that may come next, again and again.
void walk(nibble::GrammarAutomaton& automaton, std::string_view choices, bool is_json) {
  using Automaton = nibble::GrammarAutomaton;
  auto state = Automaton::kStart;
  std::string text;
  for (size_t step = 0; step < 200 && automaton.work() < 200'000; ++step) {
    unsigned char bytes[256];
    size_t num_bytes = 0;
    for (int byte = 0; byte < 256; ++byte) {
      const auto b = static_cast<unsigned char>(byte);
      if (automaton.next(state, b) != Automaton::kDead) bytes[num_bytes++] = b;
    }
    if (automaton.can_end(state)) {
      require(nibble::utf8::is_valid(text));
      if (is_json) nibble::parse_json(text, "answer", 1000);  // throws when it is none
    }
    if (num_bytes == 0) {
      // Ambiguity beyond the automaton's limits is the one reason to stop before the end.
      require(automaton.can_end(state) || automaton.work() > Automaton::kMaxStacks);
      return;
    }
    const auto choice = static_cast<unsigned char>(choices[step % choices.size()]);
    text += static_cast<char>(bytes[(choice + step / choices.size()) % num_bytes]);
    state = automaton.next(state, static_cast<unsigned char>(text.back()));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);
  bool is_grammar = false;
  try {
    nibble::GrammarAutomaton automaton(grammar_of(data[0], text));
    is_grammar = true;
    walk(automaton, text, data[0] == 's');
  } catch (const nibble::Error& error) {
    require(!is_grammar);  // what a grammar lets through is JSON
    require(error.kind() == nibble::ErrorKind::kInput ||
            error.kind() == nibble::ErrorKind::kUnsupported ||
            error.kind() == nibble::ErrorKind::kLimit);
  }
  return 0;
}
