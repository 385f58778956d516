// Decides what each step computes. A pure data structure: no clock, no threads, no device, no I/O;
// the same calls give the same plans. A step is plan(), advance() once it is on its way, and
// resolve() once its tokens are known; the next plan() may come before the resolve(), which then
// comes before the next advance(): one step in flight while the next is made. add() and cancel()
// may come before any plan().
//
// Rank: lower priority value first, then order of arrival. Rules, each checked by the simulation in
// tests/:
//   * decode rows first, in order of rank; then, in order of rank, prefill chunks of running
//   sequences and
//     admissions of waiting ones; within max_num_tokens rows and max_batch_size sequences.
//   * a sequence that needs a block when all are held takes it from the worst ranked running
//   sequence that
//     ranks behind it and has nothing in this step yet: that one is preempted, its blocks stay
//     findable, and it waits in its old rank to be recomputed. With nobody to take from, it sits
//     the step out.
//   * a waiting sequence of a strictly better priority preempts the worst running one for a place
//   or for blocks.
//   * admission is in order of rank without overtaking, so within a priority nobody starves. (A
//   better
//     priority can starve a worse one: that is what it is for.)
//   * whenever there is work, a step has at least one row.
// Sequences are owned by the caller and stay alive until finished or cancelled. Not thread-safe. A
// steady step (no arrivals) allocates nothing. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/block_pool.h"
#include "engine/sequence.h"

namespace nibble {

struct SchedulerConfig {
  int max_batch_size = 64;    // sequences per step
  int max_num_tokens = 2048;  // rows per step
  int max_logit_rows = 128;   // >= max_batch_size; what is above serves prompt log-probs
  int num_blocks = 0;
  int block_tokens = 32;
  BlockPool::HashFn hash = BlockPool::default_hash;
};

/// Rows [first_token, first_token + num_tokens) of a sequence. Its logit rows are, in this order:
/// num_prompt_rows rows from first_prompt_row on, each scoring the prompt's next token; then its
/// last row if it draws a token.
struct ScheduledSequence {
  Sequence* seq = nullptr;
  int first_token = 0;
  int num_tokens = 0;
  int first_prompt_row = 0;  // a token position
  int num_prompt_rows = 0;
  bool draws = false;
  bool is_decode = false;
  bool is_dropped = false;  // set by resolve(): its sequence had ended before; `seq` may be gone

  int num_logit_rows() const { return num_prompt_rows + draws; }
};

struct BlockCopy {
  int32_t from = 0, to = 0;
};

struct StepPlan {
  std::vector<BlockCopy> copies;  // to be done in this order, before the rows are computed
  std::vector<ScheduledSequence> sequences;
  int num_tokens = 0;
  int num_logit_rows = 0;

  bool empty() const { return sequences.empty(); }
};

struct SchedulerStats {
  uint64_t num_preemptions = 0;
  uint64_t prompt_tokens = 0;        // of sequences started, siblings left out
  uint64_t prefix_query_tokens = 0;  // prompt tokens looked up
  uint64_t prefix_hit_tokens = 0;    // of those, found
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);

  /// `seq` must fit: num_prompt_tokens + max_tokens <= num_blocks * block_tokens.
  void add(Sequence& seq);
  /// Ends a sequence now and gives its blocks back.
  void cancel(Sequence& seq, FinishReason reason = FinishReason::kCancelled);

  /// Empty only when nothing can be computed: there is no work, or all of it waits for the tokens
  /// of the step in flight. Valid until the second plan() after it.
  const StepPlan& plan();
  /// The step of the last plan() has been launched: its rows count as computed, its blocks become
  /// findable (whoever finds one reads it in a later step), its tokens are pending.
  void advance();
  /// The tokens of the step of the last advance(), one per logit row (prompt rows' are ignored), in
  /// the plan's order. Finishes sequences. Rows of sequences that have finished or were cancelled
  /// since the plan are dropped.
  void resolve(std::span<const int32_t> drawn);
  /// Both at once.
  void commit(std::span<const int32_t> drawn) {
    advance();
    resolve(drawn);
  }

  bool has_work() const { return !running_.empty() || !waiting_.empty(); }
  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  const BlockPool& pool() const { return pool_; }
  const SchedulerStats& stats() const { return stats_; }

  void check_invariants() const;  // for tests

 private:
  static bool before(const Sequence* a, const Sequence* b);
  static void insert(std::vector<Sequence*>& list, Sequence* seq);
  static void remove(std::vector<Sequence*>& list, Sequence* seq);

  bool is_scheduled(const Sequence& seq) const { return seq.last_step == step_; }
  size_t first_ready() const;  // index into waiting_
  void make_way();
  void plan_decodes();
  void plan_prefills();
  bool admit(Sequence& seq);
  bool acquire_if_fits(Sequence& seq);
  int match_limit(const Sequence& seq) const;
  int32_t last_block(const Sequence& seq) const;
  void match_later(Sequence& seq);
  /// Blocks for `num_tokens` tokens, as far as there are any; returns the tokens there is room for.
  int grow(Sequence& seq, int num_tokens);
  int grow_by_preempting(Sequence& seq, int num_tokens);
  void schedule_prefill(Sequence& seq);
  void preempt(Sequence& seq);
  void give_back(Sequence& seq);
  void publish(Sequence& seq, int first_token);
  void finish(Sequence& seq, FinishReason reason);

  const SchedulerConfig config_;
  BlockPool pool_;
  std::vector<Sequence*> running_;  // by rank
  std::vector<Sequence*> waiting_;  // by rank
  StepPlan plans_[2];               // in turn
  StepPlan* plan_ = &plans_[0];     // the last plan()'s
  StepPlan* flying_ = nullptr;      // advanced, not resolved
  int tokens_left_ = 0;
  int prompt_rows_left_ = 0;
  uint64_t num_arrivals_ = 0;
  uint64_t step_ = 0;
  SchedulerStats stats_;
};

}  // namespace nibble
