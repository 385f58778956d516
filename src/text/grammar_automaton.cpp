// SPDX-License-Identifier: Apache-2.0
#include "text/grammar_automaton.h"

#include <utility>

#include "base/error.h"

namespace nibble {

GrammarAutomaton::GrammarAutomaton(Grammar grammar)
    : grammar_(std::move(grammar)), num_classes_(static_cast<size_t>(grammar_.num_classes)) {
  clear();
}

void GrammarAutomaton::clear() {
  for (auto& ids : ids_) ids.clear();
  states_.clear();
  next_.clear();
  num_bytes_ = 0;
  states_.emplace_back();  // kDead
  ids_[0].emplace(std::u32string_view(), kDead);
  next_.assign(num_classes_, kDead);
  expand(std::u32string(1, static_cast<char32_t>(grammar_.start)));
  const StateId start = intern();
  if (start != kStart) {
    fail(
        ErrorKind::kLimit,
        "the grammar begins in more than {} ways at once, or nests deeper than {} levels; simplify "
        "it",
        kMaxStacks, kMaxDepth);
  }
}

void GrammarAutomaton::expand(std::u32string stack) {
  using Kind = Grammar::Kind;
  pending_.push_back(std::move(stack));
  while (!pending_.empty()) {
    std::u32string top = std::move(pending_.back());
    pending_.pop_back();
    ++work_;
    if (seen_.size() > kMaxStacks) continue;
    const Grammar::State& state = grammar_.states[top.back()];
    if (top.size() - 1 + static_cast<size_t>(state.min_depth) > kMaxDepth) continue;
    if (state.kind == Kind::kBytes) {
      stacks_.insert(std::move(top));
      continue;
    }
    if (!seen_.insert(top).second) continue;
    top.pop_back();
    switch (state.kind) {
      case Kind::kReturn:
        if (top.empty()) {
          can_end_ = true;
        } else {
          pending_.push_back(std::move(top));  // the caller's state is on top now
        }
        break;
      case Kind::kCall:
        // A call that is the last thing of its rule needs no way back.
        if (grammar_.states[static_cast<size_t>(state.next)].kind != Kind::kReturn) {
          top.push_back(static_cast<char32_t>(state.next));
        }
        top.push_back(static_cast<char32_t>(state.arg));
        pending_.push_back(std::move(top));
        break;
      case Kind::kSplit:
        for (int32_t i = 0; i < state.count; ++i) {
          top.push_back(
              static_cast<char32_t>(grammar_.targets[static_cast<size_t>(state.arg + i)]));
          pending_.push_back(top);
          top.pop_back();
        }
        break;
      case Kind::kBytes:
      case Kind::kNone: break;
    }
  }
}

GrammarAutomaton::StateId GrammarAutomaton::intern() {
  State state{.can_end = std::exchange(can_end_, false)};
  // Too ambiguous to follow: no text leads here.
  const bool is_too_many = seen_.size() > kMaxStacks || stacks_.size() > kMaxStacks;
  seen_.clear();
  if (is_too_many) {
    stacks_.clear();
    return kDead;
  }
  for (const std::u32string& stack : stacks_) {
    state.stacks += static_cast<char32_t>(stack.size());
    state.stacks += stack;
  }
  stacks_.clear();
  auto& ids = ids_[state.can_end];
  if (const auto found = ids.find(state.stacks); found != ids.end()) return found->second;
  const auto id = static_cast<StateId>(states_.size());
  states_.push_back(std::move(state));
  ids.emplace(states_.back().stacks, id);
  next_.resize(next_.size() + num_classes_, kUnknown);
  num_bytes_ += num_classes_ * sizeof(StateId) + states_.back().stacks.size() * sizeof(char32_t) +
                sizeof(State);
  return id;
}

GrammarAutomaton::StateId GrammarAutomaton::step(StateId from, unsigned char byte) {
  const std::u32string_view stacks = states_[from].stacks;
  for (size_t at = 0; at < stacks.size();) {
    const std::u32string_view stack = stacks.substr(at + 1, stacks[at]);
    at += 1 + stack.size();
    ++work_;
    const Grammar::State& state = grammar_.states[stack.back()];
    if (!grammar_.sets[static_cast<size_t>(state.arg)].test(byte)) continue;
    std::u32string after(stack);
    after.back() = static_cast<char32_t>(state.next);
    expand(std::move(after));
  }
  const StateId to = intern();
  next_[from * num_classes_ + grammar_.class_of[byte]] = to;
  return to;
}

std::u32string GrammarAutomaton::content(StateId state) const {
  return (states_[state].can_end ? U"1" : U"0") + states_[state].stacks;
}

GrammarAutomaton::StateId GrammarAutomaton::find(const std::u32string& content) {
  const std::u32string_view stacks = std::u32string_view(content).substr(1);
  for (size_t at = 0; at < stacks.size();) {
    const std::u32string_view stack = stacks.substr(at + 1, stacks[at]);
    at += 1 + stack.size();
    stacks_.insert(std::u32string(stack));
  }
  can_end_ = content[0] == U'1';
  return intern();
}

}  // namespace nibble
