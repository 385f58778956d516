// SPDX-License-Identifier: Apache-2.0
#include "engine/scheduler.h"

#include <algorithm>
#include <tuple>

#include "base/error.h"

namespace nibble {

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(config), pool_(config.num_blocks, config.block_tokens, config.hash) {
  NIBBLE_CHECK(config.max_batch_size > 0 && config.max_num_tokens > 0);
  NIBBLE_CHECK(config.max_logit_rows > config.max_batch_size,
               "prompt log-probs need a logit row besides the {} of the batch",
               config.max_batch_size);
  for (StepPlan& plan : plans_) {
    plan.sequences.reserve(config.max_batch_size);
    plan.copies.reserve(config.max_batch_size);
  }
  running_.reserve(config.max_batch_size);
  waiting_.reserve(256);
}

// Lists by rank
// ---------------------------------------------------------------------------------------

bool Scheduler::before(const Sequence* a, const Sequence* b) {
  return std::tie(a->priority, a->arrival) < std::tie(b->priority, b->arrival);
}

void Scheduler::insert(std::vector<Sequence*>& list, Sequence* seq) {
  list.insert(std::upper_bound(list.begin(), list.end(), seq, before), seq);
}

void Scheduler::remove(std::vector<Sequence*>& list, Sequence* seq) {
  const auto found = std::lower_bound(list.begin(), list.end(), seq, before);
  NIBBLE_CHECK(found != list.end() && *found == seq);
  list.erase(found);
}

void Scheduler::add(Sequence& seq) {
  NIBBLE_CHECK(seq.state == SequenceState::kNew);
  NIBBLE_CHECK(int64_t{seq.num_prompt_tokens} + seq.max_tokens <=
               int64_t{config_.num_blocks} * config_.block_tokens);
  seq.arrival = ++num_arrivals_;
  seq.root = pool_.intern_salt(seq.cache_salt);
  seq.state = SequenceState::kWaiting;
  insert(waiting_, &seq);
}

void Scheduler::cancel(Sequence& seq, FinishReason reason) {
  if (seq.state == SequenceState::kFinished || seq.state == SequenceState::kNew) return;
  finish(seq, reason);
}

void Scheduler::finish(Sequence& seq, FinishReason reason) {
  remove(seq.state == SequenceState::kRunning ? running_ : waiting_, &seq);
  seq.drop_pending();
  give_back(seq);
  pool_.release_salt(seq.root);
  seq.state = SequenceState::kFinished;
  seq.finish_reason = reason;
}

void Scheduler::give_back(Sequence& seq) {
  while (!seq.block_table.empty()) {  // leaf first
    pool_.release(seq.block_table.back());
    seq.block_table.pop_back();
  }
  seq.num_computed_tokens = 0;
}

void Scheduler::preempt(Sequence& seq) {
  remove(running_, &seq);
  give_back(seq);
  seq.state = SequenceState::kWaiting;
  ++seq.num_preemptions;
  ++stats_.num_preemptions;
  insert(waiting_, &seq);
}

size_t Scheduler::first_ready() const {
  size_t i = 0;
  for (; i < waiting_.size(); ++i) {
    const Sequence* leader = waiting_[i]->leader;
    if (!leader || leader->prompt_done || leader->state == SequenceState::kFinished) break;
  }
  return i;
}

// Blocks
// ----------------------------------------------------------------------------------------------

int Scheduler::match_limit(const Sequence& seq) const {
  if (!seq.reuse_prefix) return 0;
  if (seq.wants_prompt_rows()) return seq.num_scored_tokens;
  return seq.num_tokens() - 1;  // the last token's row is what the next one is drawn from
}

int32_t Scheduler::last_block(const Sequence& seq) const {
  return seq.block_table.empty() ? seq.root : seq.block_table.back();
}

int Scheduler::grow(Sequence& seq, int num_tokens) {
  const auto room = [&] { return static_cast<int>(seq.block_table.size()) * config_.block_tokens; };
  while (room() < num_tokens) {
    const auto block = pool_.allocate();
    if (!block) break;
    NIBBLE_CHECK(seq.block_table.size() < seq.block_table.capacity());
    seq.block_table.push_back(*block);
  }
  return std::min(room(), num_tokens);
}

int Scheduler::grow_by_preempting(Sequence& seq, int num_tokens) {
  for (;;) {
    const int room = grow(seq, num_tokens);
    if (room > seq.num_computed_tokens) return room;
    const auto victim = std::find_if(running_.rbegin(), running_.rend(),
                                     [&](Sequence* other) { return !is_scheduled(*other); });
    if (victim == running_.rend() || !before(&seq, *victim)) return room;
    preempt(**victim);
  }
}

/// Takes the cached full blocks of a waiting sequence. False, with nothing taken, when the pool
/// could not hold the rest of its tokens with a block to spare for every running sequence. (With
/// less, it would be preempted, or preempt, at once.)
bool Scheduler::acquire_if_fits(Sequence& seq) {
  const int limit = match_limit(seq);
  const int num_cached =
      pool_.acquire_prefix(seq.root, std::span(seq.tokens).first(limit), seq.block_table);
  const int num_needed =
      (seq.num_tokens() + config_.block_tokens - 1) / config_.block_tokens - num_cached;
  if (running_.empty() || pool_.num_available() >= num_needed + num_running()) return true;
  give_back(seq);
  return false;
}

bool Scheduler::admit(Sequence& seq) {
  if (seq.is_pending()) return false;  // preempted since its step was launched: when it is known
  if (num_running() == config_.max_batch_size || !acquire_if_fits(seq)) return false;
  const int limit = match_limit(seq);
  int num_cached = static_cast<int>(seq.block_table.size()) * config_.block_tokens;
  if (num_cached < limit) {
    const auto partial = pool_.find_partial(
        last_block(seq), std::span(seq.tokens).subspan(num_cached, limit - num_cached));
    if (partial.num_tokens > 0) {
      int32_t block = partial.block;
      if (!pool_.adopt(block, partial.num_tokens)) {
        block = pool_.allocate().value();
        if (block != partial.block) plan_->copies.push_back({partial.block, block});
      }
      seq.block_table.push_back(block);
      num_cached += partial.num_tokens;
    }
  }
  seq.num_computed_tokens = num_cached;
  if (seq.num_cached_tokens < 0) {
    seq.num_cached_tokens = num_cached;
    if (seq.index == 0) {
      stats_.prompt_tokens += seq.num_prompt_tokens;
      if (seq.reuse_prefix) stats_.prefix_query_tokens += seq.num_prompt_tokens;
      stats_.prefix_hit_tokens += num_cached;
    }
  }
  remove(waiting_, &seq);
  seq.state = SequenceState::kRunning;
  insert(running_, &seq);
  return true;
}

/// Another sequence may have computed what this one is about to.
void Scheduler::match_later(Sequence& seq) {
  const int begin = seq.num_computed_tokens;
  const int limit = match_limit(seq);
  if (begin >= limit || begin != static_cast<int>(seq.block_table.size()) * config_.block_tokens) {
    return;
  }
  const int num_found = pool_.acquire_prefix(
      last_block(seq), std::span(seq.tokens).subspan(begin, limit - begin), seq.block_table);
  const int num_tokens = num_found * config_.block_tokens;
  seq.num_computed_tokens += num_tokens;
  if (!seq.prompt_done && seq.num_preemptions == 0) {
    seq.num_cached_tokens += num_tokens;
    if (seq.index == 0) stats_.prefix_hit_tokens += num_tokens;
  }
}

void Scheduler::publish(Sequence& seq, int first_token) {
  const int size = config_.block_tokens;
  for (int i = first_token / size; i * size < seq.num_computed_tokens; ++i) {
    const int end = std::min((i + 1) * size, seq.num_computed_tokens);
    const int32_t parent = i == 0 ? seq.root : seq.block_table[i - 1];
    seq.block_table[i] = pool_.publish(seq.block_table[i], parent,
                                       std::span(seq.tokens).subspan(i * size, end - i * size));
  }
}

// Planning
// --------------------------------------------------------------------------------------------

const StepPlan& Scheduler::plan() {
  ++step_;
  plan_ = &plans_[step_ % 2];
  plan_->copies.clear();
  plan_->sequences.clear();
  plan_->num_tokens = plan_->num_logit_rows = 0;
  tokens_left_ = config_.max_num_tokens;
  prompt_rows_left_ = config_.max_logit_rows - config_.max_batch_size;
  make_way();
  plan_decodes();
  plan_prefills();
  NIBBLE_CHECK(!plan_->empty() || !has_work() || flying_ != nullptr,
               "{} running and {} waiting sequences make no step", num_running(), num_waiting());
  return *plan_;
}

void Scheduler::make_way() {
  const size_t head = first_ready();
  if (head == waiting_.size()) return;
  Sequence& seq = *waiting_[head];
  if (seq.is_pending()) return;
  while (!running_.empty() && running_.back()->priority > seq.priority) {
    if (num_running() < config_.max_batch_size && acquire_if_fits(seq)) {
      give_back(seq);
      return;
    }
    preempt(*running_.back());
  }
}

void Scheduler::plan_decodes() {
  for (size_t i = 0; i < running_.size() && tokens_left_ > 0; ++i) {
    Sequence& seq = *running_[i];
    if (!seq.is_decoding() || seq.is_ending()) continue;
    // Only sequences that rank behind are preempted, so running_[0..i] stays as it is.
    if (grow_by_preempting(seq, seq.num_tokens()) < seq.num_tokens()) continue;
    plan_->sequences.push_back({.seq = &seq,
                                .first_token = seq.num_computed_tokens,
                                .num_tokens = 1,
                                .draws = true,
                                .is_decode = true});
    plan_->num_tokens += 1;
    plan_->num_logit_rows += 1;
    --tokens_left_;
    seq.last_step = step_;
  }
}

void Scheduler::plan_prefills() {
  bool admitting = true;
  size_t next = 0;
  while (tokens_left_ > 0) {
    while (next < running_.size() && running_[next]->is_decoding()) ++next;
    const size_t head = admitting ? first_ready() : waiting_.size();
    const bool has_running = next < running_.size();
    const bool has_waiting = head < waiting_.size();
    if (!has_running && !has_waiting) break;
    if (has_running && (!has_waiting || before(running_[next], waiting_[head]))) {
      Sequence& seq = *running_[next++];
      match_later(seq);
      schedule_prefill(seq);
    } else {
      Sequence& seq = *waiting_[head];
      admitting = admit(seq);
      if (!admitting) continue;
      ++next;  // it ranks before running_[next]
      schedule_prefill(seq);
    }
  }
}

void Scheduler::schedule_prefill(Sequence& seq) {
  const int begin = seq.num_computed_tokens;
  const int first_prompt_row = std::max(begin, seq.num_scored_tokens);
  int end = std::min(seq.num_tokens(), begin + tokens_left_);
  if (seq.wants_prompt_rows()) {
    end = std::min(end, first_prompt_row + prompt_rows_left_);
  }
  if (end <= begin) return;
  end = std::min(end, grow_by_preempting(seq, end));
  if (end <= begin) return;

  ScheduledSequence scheduled{.seq = &seq, .first_token = begin, .num_tokens = end - begin};
  if (seq.wants_prompt_rows()) {
    scheduled.first_prompt_row = first_prompt_row;
    scheduled.num_prompt_rows =
        std::max(0, std::min(end, seq.num_prompt_tokens - 1) - first_prompt_row);
    prompt_rows_left_ -= scheduled.num_prompt_rows;
  }
  scheduled.draws = end == seq.num_tokens() && seq.max_tokens > 0;
  plan_->num_tokens += scheduled.num_tokens;
  plan_->num_logit_rows += scheduled.num_logit_rows();
  tokens_left_ -= scheduled.num_tokens;
  seq.last_step = step_;
  plan_->sequences.push_back(scheduled);
}

void Scheduler::advance() {
  NIBBLE_CHECK(flying_ == nullptr, "the step before has not been resolved");
  flying_ = plan_;
  int row = 0;
  for (const ScheduledSequence& scheduled : plan_->sequences) {
    Sequence& seq = *scheduled.seq;
    row += scheduled.num_logit_rows();
    if (seq.state == SequenceState::kFinished) continue;
    seq.num_computed_tokens += scheduled.num_tokens;
    if (scheduled.num_prompt_rows > 0) {
      seq.num_scored_tokens = scheduled.first_prompt_row + scheduled.num_prompt_rows;
    }
    publish(seq, scheduled.first_token);
    if (seq.num_computed_tokens >= seq.num_prompt_tokens) seq.prompt_done = true;
    if (scheduled.draws) seq.append_pending(row - 1);
  }
}

void Scheduler::resolve(std::span<const int32_t> drawn) {
  NIBBLE_CHECK(flying_ != nullptr && drawn.size() == static_cast<size_t>(flying_->num_logit_rows));
  size_t row = 0;
  for (ScheduledSequence& scheduled : flying_->sequences) {
    Sequence& seq = *scheduled.seq;
    row += static_cast<size_t>(scheduled.num_logit_rows());
    scheduled.is_dropped = seq.state == SequenceState::kFinished;
    if (scheduled.is_dropped) continue;
    if (scheduled.draws) {
      if (const auto reason = seq.settle(drawn[row - 1])) finish(seq, *reason);
    } else if (seq.num_uncomputed_tokens() == 0) {
      finish(seq, FinishReason::kLength);  // max_tokens is 0
    }
  }
  flying_ = nullptr;
}

void Scheduler::check_invariants() const {
  pool_.check_invariants();
  NIBBLE_CHECK(num_running() <= config_.max_batch_size);
  NIBBLE_CHECK(std::is_sorted(running_.begin(), running_.end(), before));
  NIBBLE_CHECK(std::is_sorted(waiting_.begin(), waiting_.end(), before));
  std::vector<int> num_holders(pool_.num_blocks(), 0);
  for (const Sequence* seq : running_) {
    NIBBLE_CHECK(seq->state == SequenceState::kRunning);
    // With nothing to generate, it ends when its step is resolved.
    NIBBLE_CHECK(seq->num_computed_tokens < seq->num_tokens() ||
                 (flying_ != nullptr && seq->max_tokens == 0));
    NIBBLE_CHECK(seq->block_table.size() * config_.block_tokens >=
                 static_cast<size_t>(seq->num_computed_tokens));
    for (const int32_t block : seq->block_table) ++num_holders[block];
  }
  for (const Sequence* seq : waiting_) {
    NIBBLE_CHECK(seq->state == SequenceState::kWaiting && seq->block_table.empty());
  }
  for (int block = 0; block < pool_.num_blocks(); ++block) {
    NIBBLE_CHECK(pool_.ref_count(block) == num_holders[block],
                 "block {}: {} references, {} holders", block, pool_.ref_count(block),
                 num_holders[block]);
  }
}

}  // namespace nibble
