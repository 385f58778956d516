// A grammar as an automaton that is built while it is used: a state is the set of stacks a matcher
// can be in, found again by its content, and a step that has been taken once is a table look-up
// from then on. Walking a vocabulary of 131,000 tokens is affordable because of that.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/grammar.h"

namespace nibble {

/// Not thread-safe: every step may add to the tables.
class GrammarAutomaton {
 public:
  using StateId = uint32_t;
  static constexpr StateId kDead = 0;
  static constexpr StateId kStart = 1;
  /// Calls within calls: no path is taken that needs more, so that none ends there. A level of a
  /// free JSON value and a $ref are one each.
  static constexpr size_t kMaxDepth = 64;
  /// Stacks of one state; a text that needs more does not match.
  static constexpr size_t kMaxStacks = 500;

  explicit GrammarAutomaton(Grammar grammar);

  StateId next(StateId state, unsigned char byte) {
    const size_t at = state * num_classes_ + grammar_.class_of[byte];
    return next_[at] != kUnknown ? next_[at] : step(state, byte);
  }
  bool can_end(StateId state) const { return states_[state].can_end; }
  /// Nothing can follow.
  bool is_final(StateId state) const { return states_[state].stacks.empty(); }
  size_t num_states() const { return states_.size(); }
  size_t num_bytes() const { return num_bytes_; }  // of memory, about
  /// Stacks looked at so far: what all steps have cost.
  uint64_t work() const { return work_; }

  /// What a state is, so that it can be found again after clear().
  std::u32string content(StateId state) const;
  StateId find(const std::u32string& content);
  /// Forgets every state but kDead and kStart.
  void clear();

 private:
  static constexpr StateId kUnknown = ~StateId{0};
  // A stack: where each caller goes on, outermost first, then the state on top, which consumes a
  // byte. Stacks lie one after another, each after its length.
  struct State {
    std::u32string stacks;
    bool can_end = false;
  };

  StateId step(StateId state, unsigned char byte);
  /// Everything a stack can become without consuming a byte.
  void expand(std::u32string stack);
  StateId intern();  // what expand() gathered

  const Grammar grammar_;
  const size_t num_classes_;
  std::deque<State> states_;                                 // the keys below point into it
  std::unordered_map<std::u32string_view, StateId> ids_[2];  // by can_end
  std::vector<StateId> next_;                                // [states, classes]
  uint64_t work_ = 0;
  size_t num_bytes_ = 0;
  // Of the step at hand.
  std::set<std::u32string> seen_, stacks_;
  std::vector<std::u32string> pending_;
  bool can_end_ = false;
};

}  // namespace nibble
