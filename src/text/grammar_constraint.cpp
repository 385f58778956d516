// SPDX-License-Identifier: Apache-2.0
#include "text/grammar_constraint.h"

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "text/grammar_automaton.h"

namespace nibble {
namespace {

// What one constraint may hold before it forgets and begins anew.
constexpr size_t kMaxAutomatonBytes = 4 << 20;
constexpr size_t kMaxMaskBytes = 4 << 20;
// Stacks looked at for one mask. Real schemas need thousands; a mask that needs more would hold up
// every other request's step.
constexpr uint64_t kMaxWorkPerMask = 1'000'000;

}  // namespace

/// What the matchers of a constraint share.
class GrammarConstraint::Shared {
 public:
  Shared(Grammar grammar, std::shared_ptr<const TokenTrie> vocabulary)
      : automaton_(std::move(grammar)), vocabulary_(std::move(vocabulary)) {
    path_.resize(static_cast<size_t>(vocabulary_->max_depth()) + 1);
  }

  /// A position outlives the states it was made of.
  struct Position {
    uint64_t generation = 0;
    GrammarAutomaton::StateId state = GrammarAutomaton::kStart;
    std::u32string content;  // of the state; empty: the start
  };

  TokenMatcher::Ending fill_mask(Position& position, std::span<uint64_t> allowed) {
    const std::lock_guard lock(mutex_);
    renew(position);
    const auto state = position.state;
    const Mask& mask = mask_of(state, allowed.size());
    std::ranges::copy(mask.words, allowed.begin());
    const bool can_end = automaton_.can_end(state);
    return {.can_end = can_end, .must_end = can_end && mask.is_empty};
  }

  bool accept(Position& position, int32_t token) {
    const std::lock_guard lock(mutex_);
    renew(position);
    const std::string_view bytes = vocabulary_->bytes(token);
    GrammarAutomaton::StateId state = position.state;
    for (const char byte : bytes) {
      state = automaton_.next(state, static_cast<unsigned char>(byte));
    }
    if (bytes.empty() || state == GrammarAutomaton::kDead) return false;
    if (state != position.state) {
      position.state = state;
      position.content = automaton_.content(state);
    }
    return true;
  }

  bool can_end(Position& position) {
    const std::lock_guard lock(mutex_);
    renew(position);
    return automaton_.can_end(position.state);
  }

  GrammarConstraintStats stats() {
    const std::lock_guard lock(mutex_);
    GrammarConstraintStats stats = stats_;
    stats.num_states = automaton_.num_states();
    return stats;
  }

 private:
  struct Mask {
    std::vector<uint64_t> words;
    bool is_empty = true;
  };

  void renew(Position& position) {
    if (automaton_.num_bytes() > kMaxAutomatonBytes) {
      automaton_.clear();
      masks_.clear();
      mask_ids_.clear();
      ++generation_;
    }
    if (position.generation == generation_) return;
    position.generation = generation_;
    position.state =
        position.content.empty() ? GrammarAutomaton::kStart : automaton_.find(position.content);
  }

  const Mask& mask_of(GrammarAutomaton::StateId state, size_t num_words) {
    if (mask_ids_.size() <= state) mask_ids_.resize(state + 1, -1);
    if (mask_ids_[state] >= 0 &&
        masks_[static_cast<size_t>(mask_ids_[state])].words.size() == num_words) {
      ++stats_.num_masks_found;
      return masks_[static_cast<size_t>(mask_ids_[state])];
    }
    if ((masks_.size() + 1) * num_words * sizeof(uint64_t) > kMaxMaskBytes) {
      masks_.clear();
      std::ranges::fill(mask_ids_, -1);
    }
    ++stats_.num_masks_made;
    mask_ids_[state] = static_cast<int32_t>(masks_.size());
    return masks_.emplace_back(make_mask(state, num_words));
  }

  Mask make_mask(GrammarAutomaton::StateId state, size_t num_words) {
    Mask mask{.words = std::vector<uint64_t>(num_words)};
    const std::vector<TokenTrie::Node>& nodes = vocabulary_->nodes();
    const uint64_t work_before = automaton_.work();
    path_[0] = state;
    for (size_t i = 0; i < nodes.size();) {
      const TokenTrie::Node& node = nodes[i];
      const auto next = automaton_.next(path_[node.depth], node.byte);
      if (next == GrammarAutomaton::kDead) {
        i = node.end;
        continue;
      }
      path_[node.depth + 1u] = next;
      if (node.token >= 0 && static_cast<size_t>(node.token) / 64 < num_words) {
        mask.words[static_cast<size_t>(node.token) / 64] |= uint64_t{1} << (node.token % 64);
        mask.is_empty = false;
      }
      ++i;
      if (automaton_.work() - work_before > kMaxWorkPerMask) {
        // Allows nothing, which ends the request with a reason.
        return {.words = std::vector<uint64_t>(num_words), .is_empty = false};
      }
    }
    return mask;
  }

  std::mutex mutex_;
  GrammarAutomaton automaton_;
  const std::shared_ptr<const TokenTrie> vocabulary_;
  uint64_t generation_ = 0;
  std::vector<Mask> masks_;
  std::vector<int32_t> mask_ids_;  // by state; -1: not made
  std::vector<GrammarAutomaton::StateId> path_;
  GrammarConstraintStats stats_;
};

class GrammarConstraint::Matcher final : public TokenMatcher {
 public:
  explicit Matcher(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}

  Ending fill_mask(std::span<uint64_t> allowed) override {
    return shared_->fill_mask(position_, allowed);
  }
  bool accept(int32_t token) override { return shared_->accept(position_, token); }
  bool can_end() override { return shared_->can_end(position_); }

 private:
  const std::shared_ptr<Shared> shared_;
  Shared::Position position_;
};

GrammarConstraint::GrammarConstraint(Grammar grammar, std::shared_ptr<const TokenTrie> vocabulary)
    : shared_(std::make_shared<Shared>(std::move(grammar), std::move(vocabulary))) {}

GrammarConstraint::~GrammarConstraint() = default;

std::unique_ptr<TokenMatcher> GrammarConstraint::start() const {
  return std::make_unique<Matcher>(shared_);
}

GrammarConstraintStats GrammarConstraint::stats() const { return shared_->stats(); }

}  // namespace nibble
