// The constraints of the last requests: most servers see few schemas, many times. What one has
// learnt about its vocabulary (text/grammar_constraint.h) serves the next request at once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "nibble/constraint.h"
#include "text/output_format.h"
#include "text/token_trie.h"
#include "text/tokenizer.h"

namespace nibble {

/// Thread-safe.
class ConstraintCache {
 public:
  static constexpr size_t kMaxConstraints = 32;

  explicit ConstraintCache(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  /// Compiles what is not there. Throws as OutputFormat::grammar() does.
  std::shared_ptr<const TokenConstraint> get(const OutputFormat& format);

 private:
  using Entry = std::pair<std::string, std::shared_ptr<const TokenConstraint>>;  // by key

  const Tokenizer tokenizer_;
  std::once_flag made_vocabulary_;
  std::shared_ptr<const TokenTrie> vocabulary_;
  std::mutex mutex_;
  std::list<Entry> entries_;  // last used first
  std::unordered_map<std::string, std::list<Entry>::iterator> index_;
};

}  // namespace nibble
