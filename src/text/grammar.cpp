// SPDX-License-Identifier: Apache-2.0
#include "text/grammar.h"

#include <algorithm>
#include <map>

#include "base/error.h"
#include "text/utf8.h"

namespace nibble {
namespace {

constexpr uint32_t kLastCodePoint = 0x10ffff;

}  // namespace

ByteSet byte_range(unsigned char first, unsigned char last) {
  ByteSet set;
  for (int b = first; b <= last; ++b) set.set(static_cast<size_t>(b));
  return set;
}

ByteSet bytes_of(std::string_view bytes) {
  ByteSet set;
  for (const char c : bytes) set.set(static_cast<unsigned char>(c));
  return set;
}

CodePoints normalize(CodePoints points) {
  for (size_t i = points.size(); i-- > 0;) {
    const auto [first, last] = points[i];
    if (first > 0xdfff || last < 0xd800) continue;
    points[i].last = 0xd7ff;  // surrogates fall out; a range that begins with one is empty now
    points.push_back({0xe000, last});
  }
  std::sort(points.begin(), points.end(),
            [](const CodePointRange& a, const CodePointRange& b) { return a.first < b.first; });
  CodePoints out;
  for (CodePointRange range : points) {
    range.last = std::min(range.last, kLastCodePoint);
    if (range.first > range.last) continue;
    if (!out.empty() && range.first <= out.back().last + 1) {
      out.back().last = std::max(out.back().last, range.last);
    } else {
      out.push_back(range);
    }
  }
  return out;
}

CodePoints complement(const CodePoints& points) {
  CodePoints out;
  uint32_t next = 0;
  for (const CodePointRange& range : normalize(points)) {
    if (range.first > next) out.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next <= kLastCodePoint) out.push_back({next, kLastCodePoint});
  return normalize(out);
}

CodePoints intersect(const CodePoints& a, const CodePoints& b) {
  CodePoints outside = complement(a);
  const CodePoints outside_b = complement(b);
  outside.insert(outside.end(), outside_b.begin(), outside_b.end());
  return complement(outside);
}

GrammarBuilder::GrammarBuilder() {
  states_.push_back({.kind = Grammar::Kind::kReturn});
  states_.push_back({.kind = Grammar::Kind::kNone});
}

GrammarBuilder::StateId GrammarBuilder::add(Grammar::State state) {
  if (states_.size() >= kMaxStates) {
    fail(ErrorKind::kLimit,
         "the grammar needs more than {} states; use smaller lengths, counts or lists", kMaxStates);
  }
  states_.push_back(state);
  return static_cast<StateId>(states_.size()) - 1;
}

GrammarBuilder::StateId GrammarBuilder::bytes(const ByteSet& set, StateId next) {
  if (set.none() || next == kNone) return kNone;
  const auto [found, is_new] = set_ids_.try_emplace(set, static_cast<int32_t>(sets_.size()));
  if (is_new) sets_.push_back(set);
  return add({.kind = Grammar::Kind::kBytes, .next = next, .arg = found->second});
}

GrammarBuilder::StateId GrammarBuilder::literal(std::string_view text, StateId next) {
  for (size_t i = text.size(); i-- > 0;) next = bytes(bytes_of(text.substr(i, 1)), next);
  return next;
}

GrammarBuilder::StateId GrammarBuilder::any_of(std::span<const StateId> states) {
  std::vector<StateId> targets;
  for (const StateId state : states) {
    if (state != kNone && std::ranges::find(targets, state) == targets.end()) {
      targets.push_back(state);
    }
  }
  if (targets.empty()) return kNone;
  if (targets.size() == 1) return targets[0];
  const StateId id = add({.kind = Grammar::Kind::kSplit,
                          .arg = static_cast<int32_t>(targets_.size()),
                          .count = static_cast<int32_t>(targets.size())});
  targets_.insert(targets_.end(), targets.begin(), targets.end());
  return id;
}

GrammarBuilder::StateId GrammarBuilder::forward() {
  targets_.push_back(kNone);
  return add({.kind = Grammar::Kind::kSplit,
              .arg = static_cast<int32_t>(targets_.size()) - 1,
              .count = 1});
}

void GrammarBuilder::set_target(StateId forward, StateId target) {
  targets_[static_cast<size_t>(states_[static_cast<size_t>(forward)].arg)] = target;
}

GrammarBuilder::StateId GrammarBuilder::repeat(const Part& part, int min, int max, StateId next) {
  StateId state = next;
  if (max < 0) {
    const StateId loop = forward();
    set_target(loop, any_of({part(loop), next}));
    state = loop;
  }
  for (int i = max - min; i > 0; --i) state = any_of({part(state), next});
  for (int i = 0; i < min; ++i) state = part(state);
  return state;
}

GrammarBuilder::StateId GrammarBuilder::between(std::string_view first, std::string_view last,
                                                unsigned char low, unsigned char high,
                                                StateId next) {
  if (first > last) return kNone;
  if (first.empty()) return next;
  const auto a = static_cast<unsigned char>(first[0]), z = static_cast<unsigned char>(last[0]);
  const std::string_view first_rest = first.substr(1), last_rest = last.substr(1);
  const std::string lowest(first_rest.size(), static_cast<char>(low));
  const std::string highest(first_rest.size(), static_cast<char>(high));
  const auto anything = [&] {
    StateId state = next;
    for (size_t i = 0; i < first_rest.size(); ++i) state = bytes(byte_range(low, high), state);
    return state;
  };
  if (first_rest == lowest && last_rest == highest) return bytes(byte_range(a, z), anything());
  if (a == z) return bytes(byte_range(a, a), between(first_rest, last_rest, low, high, next));
  const StateId lower = bytes(byte_range(a, a), between(first_rest, highest, low, high, next));
  const StateId upper = bytes(byte_range(z, z), between(lowest, last_rest, low, high, next));
  if (a + 1 == z) return any_of({lower, upper});
  return any_of(
      {lower,
       bytes(byte_range(static_cast<unsigned char>(a + 1), static_cast<unsigned char>(z - 1)),
             anything()),
       upper});
}

GrammarBuilder::StateId GrammarBuilder::code_point(const CodePoints& points, StateId next) {
  ByteSet ascii;
  std::vector<StateId> states;
  for (const auto& [first, last] : normalize(points)) {
    constexpr uint32_t kEnds[] = {0x7f, 0x7ff, 0xffff, kLastCodePoint};  // by length in UTF-8
    for (uint32_t begin = first; begin <= last;) {
      const uint32_t end = std::min(last, *std::ranges::lower_bound(kEnds, begin));
      if (end <= 0x7f) {
        ascii |= byte_range(static_cast<unsigned char>(begin), static_cast<unsigned char>(end));
      } else {
        std::string low, high;
        utf8::append_code_point(low, begin);
        utf8::append_code_point(high, end);
        states.push_back(between(low, high, 0x80, 0xbf, next));
      }
      begin = end + 1;
    }
  }
  states.push_back(bytes(ascii, next));
  return any_of(states);
}

GrammarBuilder::RuleId GrammarBuilder::new_rule() {
  rules_.push_back(kNone);
  return static_cast<RuleId>(rules_.size()) - 1;
}

void GrammarBuilder::define(RuleId rule, StateId start) {
  rules_[static_cast<size_t>(rule)] = start;
}

GrammarBuilder::StateId GrammarBuilder::call(RuleId rule, StateId next) {
  if (next == kNone) return kNone;
  return add({.kind = Grammar::Kind::kCall, .next = next, .arg = rule});
}

void GrammarBuilder::prune(Grammar& grammar) {
  using Kind = Grammar::Kind;
  constexpr int32_t kNever = kMaxStates + 1;
  const auto depth_of = [&](int32_t state) {
    return grammar.states[static_cast<size_t>(state)].min_depth;
  };
  const auto depth_now = [&](const Grammar::State& state) {
    switch (state.kind) {
      case Kind::kReturn: return 0;
      case Kind::kBytes: return depth_of(state.next);
      case Kind::kCall:
        return std::min(kNever, std::max(depth_of(state.next), 1 + depth_of(state.arg)));
      case Kind::kSplit: {
        int32_t least = kNever;
        for (int32_t i = 0; i < state.count; ++i) {
          least = std::min(least, depth_of(grammar.targets[static_cast<size_t>(state.arg + i)]));
        }
        return least;
      }
      case Kind::kNone: return kNever;
    }
    return kNever;
  };
  for (Grammar::State& state : grammar.states) state.min_depth = kNever;
  // What follows a state was made before it, but for loops and calls: few rounds.
  for (bool changed = true; changed;) {
    changed = false;
    for (Grammar::State& state : grammar.states) {
      const int32_t depth = depth_now(state);
      changed |= depth != state.min_depth;
      state.min_depth = depth;
    }
  }
  for (Grammar::State& state : grammar.states) {
    if (state.min_depth == kNever) state.kind = Kind::kNone;
    if (state.kind != Kind::kSplit) continue;
    const auto begin = grammar.targets.begin() + state.arg;
    const auto end = std::remove_if(begin, begin + state.count,
                                    [&](int32_t target) { return depth_of(target) == kNever; });
    state.count = static_cast<int32_t>(end - begin);
  }
}

void GrammarBuilder::make_classes(Grammar& grammar) {
  for (const ByteSet& set : grammar.sets) {
    std::map<std::pair<int, bool>, int> split;
    for (size_t b = 0; b < 256; ++b) {
      const auto key = std::pair(int{grammar.class_of[b]}, set.test(b));
      const auto id = split.try_emplace(key, static_cast<int>(split.size())).first->second;
      grammar.class_of[b] = static_cast<uint8_t>(id);
    }
    grammar.num_classes = static_cast<int>(split.size());
  }
}

Grammar GrammarBuilder::finish(StateId start) {
  Grammar grammar;
  grammar.states = std::move(states_);
  grammar.targets = std::move(targets_);
  grammar.sets = std::move(sets_);
  grammar.start = start;
  for (Grammar::State& state : grammar.states) {
    if (state.kind == Grammar::Kind::kCall) state.arg = rules_[static_cast<size_t>(state.arg)];
  }
  prune(grammar);
  make_classes(grammar);
  return grammar;
}

}  // namespace nibble
