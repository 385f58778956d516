// SPDX-License-Identifier: Apache-2.0
#include "chat/constraint_cache.h"

#include "text/grammar_constraint.h"

namespace nibble {

std::shared_ptr<const TokenConstraint> ConstraintCache::get(const OutputFormat& format) {
  const std::string key = format.key();
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = index_.find(key); found != index_.end()) {
      entries_.splice(entries_.begin(), entries_, found->second);
      return found->second->second;
    }
  }
  // Outside of the lock: a large schema takes a while.
  Grammar grammar = format.grammar();
  std::call_once(made_vocabulary_, [&] { vocabulary_ = std::make_shared<TokenTrie>(tokenizer_); });
  auto constraint = std::make_shared<GrammarConstraint>(std::move(grammar), vocabulary_);
  const std::lock_guard lock(mutex_);
  if (const auto found = index_.find(key); found != index_.end()) return found->second->second;
  entries_.emplace_front(key, constraint);
  index_.emplace(key, entries_.begin());
  if (entries_.size() > kMaxConstraints) {
    index_.erase(entries_.back().first);
    entries_.pop_back();
  }
  return constraint;
}

}  // namespace nibble
