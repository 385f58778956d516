// Grammars over bytes, for structured output: a graph of states that consume a byte, branch, call a
// rule or return from one. Recursion is a rule that calls itself. JSON schemas, regular expressions
// and lists of choices are compiled to one (json_schema_grammar.h, regex_grammar.h); what can be
// matched against it step by step is grammar_automaton.h's business.
//
// States are made back to front: each names the state that follows it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bitset>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace nibble {

using ByteSet = std::bitset<256>;
ByteSet byte_range(unsigned char first, unsigned char last);
ByteSet bytes_of(std::string_view bytes);

struct CodePointRange {
  uint32_t first = 0, last = 0;
};
/// Ranges, made sorted, disjoint and free of surrogates by normalize().
using CodePoints = std::vector<CodePointRange>;
CodePoints normalize(CodePoints points);
CodePoints complement(const CodePoints& points);
CodePoints intersect(const CodePoints& a, const CodePoints& b);

/// Immutable once built.
struct Grammar {
  enum class Kind : uint8_t {
    kBytes,   // one byte of sets[arg], then next
    kSplit,   // any of targets[arg, arg + count)
    kCall,    // the rule that begins at state arg, then next
    kReturn,  // end of a rule, of the outermost one: end of the text
    kNone,    // matches nothing
  };
  struct State {
    Kind kind = Kind::kNone;
    int32_t next = 0;
    int32_t arg = 0;
    int32_t count = 0;
    int32_t min_depth = 0;  // calls within calls that it takes at least to get to the rule's end
  };
  std::vector<State> states;
  std::vector<int32_t> targets;
  std::vector<ByteSet> sets;
  int32_t start = 0;
  uint8_t class_of[256] = {};  // bytes that no set tells apart share a class
  int num_classes = 1;

  /// Nothing can be matched, as with a schema that demands an endless value.
  bool matches_nothing() const { return states[static_cast<size_t>(start)].kind == Kind::kNone; }
};

/// Throws Error{kLimit} when the grammar gets too large.
class GrammarBuilder {
 public:
  using StateId = int32_t;
  using RuleId = int32_t;
  /// Makes something that is followed by `next`; returns where it begins.
  using Part = std::function<StateId(StateId next)>;

  static constexpr int kMaxStates = 100'000;
  static constexpr StateId kReturn = 0;  // end of the rule
  static constexpr StateId kNone = 1;    // matches nothing

  GrammarBuilder();

  StateId bytes(const ByteSet& set, StateId next);
  StateId literal(std::string_view text, StateId next);
  StateId any_of(std::span<const StateId> states);
  StateId any_of(std::initializer_list<StateId> states) {
    return any_of(std::span(states.begin(), states.size()));
  }
  StateId optional(const Part& part, StateId next) { return any_of({part(next), next}); }
  /// min to max times; max -1: without end.
  StateId repeat(const Part& part, int min, int max, StateId next);
  /// Byte strings of the length of `first` and `last`, from the one to the other in order, whose
  /// bytes after the first one go from `low` to `high`: numbers by their digits, code points by
  /// their UTF-8.
  StateId between(std::string_view first, std::string_view last, unsigned char low,
                  unsigned char high, StateId next);
  /// One code point of the set, as UTF-8.
  StateId code_point(const CodePoints& points, StateId next);

  RuleId new_rule();
  void define(RuleId rule, StateId start);
  StateId call(RuleId rule, StateId next);

  int num_states() const { return static_cast<int>(states_.size()); }
  /// Prunes what can never be completed, so that no prefix is a dead end.
  Grammar finish(StateId start);

 private:
  StateId add(Grammar::State state);
  StateId forward();  // a branch whose only target is given later
  void set_target(StateId forward, StateId target);
  static void prune(Grammar& grammar);
  static void make_classes(Grammar& grammar);

  std::vector<Grammar::State> states_;  // kCall: arg is a rule
  std::vector<int32_t> targets_;
  std::vector<ByteSet> sets_;
  std::unordered_map<ByteSet, int32_t> set_ids_;
  std::vector<StateId> rules_;
};

}  // namespace nibble
