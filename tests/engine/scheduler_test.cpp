// The scheduler against a fake model (fake_model.h): random arrivals, cancellations, priorities and
// pools that are far too small; after each step the rules of scheduler.h, at the end the answer of
// one-at-a-time generation. SPDX-License-Identifier: Apache-2.0
#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <random>

#include "engine/allocation_counter.h"
#include "engine/fake_model.h"

namespace nibble {
namespace {

constexpr int kVocab = 50;
const std::vector<int32_t> kEos = {2, 3};

struct Case {
  Request request;
  int max_tokens = 0;
  std::list<Sequence> sequences;
  int64_t cancel_step = -1;
};

struct Totals {
  uint64_t preemptions = 0, hits = 0, copies = 0, steps = 0, cancelled = 0, stopped = 0, scored = 0;
  uint64_t overlapped = 0, dropped = 0, constrained = 0;
};

class Simulation {
 public:
  Simulation(uint32_t seed, Totals* totals, BlockPool::HashFn hash, bool overlaps)
      : random_(seed),
        totals_(totals),
        config_(make_config(hash)),
        scheduler_(config_),
        executor_({.max_batch_size = config_.max_batch_size,
                   .max_num_tokens = config_.max_num_tokens,
                   .max_logit_rows = config_.max_logit_rows,
                   .max_seq_len = config_.num_blocks * config_.block_tokens,
                   .block_tokens = config_.block_tokens,
                   .vocab_size = kVocab},
                  config_.num_blocks, overlaps) {}

  void run(int num_cases) {
    int num_added = 0;
    for (int64_t step = 0; num_added < num_cases || scheduler_.has_work() || flying_; ++step) {
      ASSERT_LT(step, 200 * num_cases) << "no progress";
      for (int arrivals = pick(3); num_added < num_cases && arrivals > 0; --arrivals, ++num_added) {
        add(step);
      }
      for (Case& item : cases_) {
        if (item.cancel_step != step) continue;
        for (Sequence& seq : item.sequences) {
          scheduler_.cancel(seq);
          EXPECT_EQ(seq.state, SequenceState::kFinished);
        }
      }
      ASSERT_NO_FATAL_FAILURE(one_step());
    }
    EXPECT_EQ(scheduler_.pool().num_used(), 0);
    EXPECT_EQ(scheduler_.num_running() + scheduler_.num_waiting(), 0);
    for (Case& item : cases_) check_answer(item);
    totals_->preemptions += scheduler_.stats().num_preemptions;
    totals_->hits += scheduler_.stats().prefix_hit_tokens;
  }

 private:
  int pick(int n) { return static_cast<int>(random_() % n); }

  SchedulerConfig make_config(BlockPool::HashFn hash) {
    SchedulerConfig config{.max_batch_size = 1 + pick(8),
                           .max_num_tokens = 1 + pick(pick(2) ? 12 : 60),
                           .num_blocks = 6 + pick(20),
                           .block_tokens = 1 + pick(8),
                           .hash = hash};
    config.max_logit_rows = config.max_batch_size + 1 + pick(6);
    return config;
  }

  void add(int64_t step) {
    Case& item = cases_.emplace_back();
    Request& request = item.request;
    const int capacity = config_.num_blocks * config_.block_tokens;
    const int num_prompt = 1 + pick(std::min(capacity - 1, 60));
    // Prompts are often continuations of earlier ones, as in a chat; else they share short
    // beginnings.
    if (cases_.size() > 1 && pick(2)) {
      const Case& earlier = *std::next(cases_.begin(), pick(static_cast<int>(cases_.size()) - 1));
      const auto& tokens = earlier.sequences.front().tokens;
      const int known = static_cast<int>(tokens.size()) - earlier.sequences.front().is_pending();
      request.prompt_tokens.assign(tokens.begin(), tokens.begin() + std::min(num_prompt, known));
    }
    while (static_cast<int>(request.prompt_tokens.size()) < num_prompt) {
      request.prompt_tokens.push_back(pick(4) ? 7 : pick(kVocab));
    }
    item.max_tokens = pick(std::min(capacity - num_prompt + 1, 40));
    SamplingParams& params = request.params;
    params.temperature = pick(2) ? 0.0f : 1.0f;
    params.seed = pick(1000);
    params.n = pick(4) ? 1 : 1 + pick(4);
    params.ignore_eos = pick(3) == 0;
    params.min_tokens = pick(2) ? 0 : pick(item.max_tokens + 1);
    if (pick(2)) params.stop_token_ids = {pick(kVocab), 11};
    if (pick(3) == 0) params.presence_penalty = 0.5f;
    if (pick(3) == 0) params.logit_bias = {{pick(kVocab), -INFINITY}, {pick(kVocab), 1.0f}};
    if (pick(5) == 0) params.prompt_logprobs = 0;
    if (pick(4) == 0) {
      params.constraint = std::make_shared<FakeConstraint>(
          kVocab, pick(20), std::set<int32_t>(kEos.begin(), kEos.end()));
      ++totals_->constrained;
    }
    request.priority = pick(3) == 0 ? pick(3) : 0;
    request.cache_salt = pick(4) ? "" : "s";
    request.reuse_prefix = pick(6) != 0;
    if (pick(8) == 0) item.cancel_step = step + pick(20);
    for (int i = 0; i < params.n; ++i) {
      item.sequences.push_back(make_sequence(request, cases_.size(), i,
                                             {.eos_ids = kEos,
                                              .max_tokens = item.max_tokens,
                                              .block_tokens = config_.block_tokens,
                                              .seed = *params.seed}));
      if (i > 0) item.sequences.back().leader = &item.sequences.front();
    }
    for (Sequence& seq : item.sequences) scheduler_.add(seq);
  }

  void one_step() {
    const bool had_work = scheduler_.has_work();
    decoding_.clear();
    for (Case& item : cases_) {
      for (const Sequence& seq : item.sequences) {
        if (seq.state != SequenceState::kRunning || !seq.is_decoding()) continue;
        decoding_[&seq] = seq.num_preemptions;
      }
    }
    const StepPlan& plan = scheduler_.plan();
    ASSERT_NO_THROW(scheduler_.check_invariants());
    if (flying_ == nullptr) {
      ASSERT_EQ(plan.empty(), !had_work);
    }
    if (!plan.empty()) {
      check_plan(plan);
      check_no_overtaking(plan);
      executor_.launch(plan);
    }
    ASSERT_NO_FATAL_FAILURE(land());
    if (plan.empty()) return;
    scheduler_.advance();
    flying_ = &plan;
    ++totals_->steps;
    totals_->copies += plan.copies.size();
    const bool needs_tokens = std::ranges::any_of(
        plan.sequences, [](const auto& s) { return s.draws && s.seq->matcher != nullptr; });
    if (!executor_.overlaps() || needs_tokens) {
      ASSERT_NO_FATAL_FAILURE(land());
    } else {
      ++totals_->overlapped;
    }
  }

  void land() {
    if (flying_ == nullptr) return;
    const StepPlan& plan = *std::exchange(flying_, nullptr);
    const StepResult& result = executor_.collect();
    scheduler_.resolve(result.tokens);
    ASSERT_NO_THROW(scheduler_.check_invariants());
    size_t row = 0;
    for (const ScheduledSequence& scheduled : plan.sequences) {
      const size_t first_row = row;
      row += scheduled.num_logit_rows();
      totals_->dropped += scheduled.is_dropped;
      if (scheduled.is_dropped) continue;
      auto& scores = scores_[scheduled.seq];
      for (int i = 0; i < scheduled.num_prompt_rows; ++i) {
        ASSERT_EQ(scheduled.first_prompt_row + i, static_cast<int>(scores.size()));
        scores.push_back(result.logprobs[first_row + i]);
      }
    }
  }

  void check_plan(const StepPlan& plan) {
    int num_tokens = 0, num_rows = 0;
    bool prefill_seen = false;
    std::set<const Sequence*> once;
    for (const ScheduledSequence& scheduled : plan.sequences) {
      const Sequence& seq = *scheduled.seq;
      ASSERT_TRUE(once.insert(&seq).second);
      ASSERT_EQ(seq.state, SequenceState::kRunning);
      ASSERT_EQ(scheduled.first_token, seq.num_computed_tokens);
      ASSERT_GT(scheduled.num_tokens, 0);
      ASSERT_LE(scheduled.first_token + scheduled.num_tokens, seq.num_tokens());
      ASSERT_LE(static_cast<size_t>(scheduled.first_token + scheduled.num_tokens),
                seq.block_table.size() * config_.block_tokens);
      if (scheduled.is_decode) {
        ASSERT_FALSE(prefill_seen) << "a decode row after a prefill chunk";
        ASSERT_EQ(scheduled.num_tokens, 1);
      } else {
        prefill_seen = true;
        // One that was preempted may need a single row when it comes back: an admission all the
        // same.
        const auto before = decoding_.find(&seq);
        ASSERT_TRUE(before == decoding_.end() || before->second < seq.num_preemptions);
      }
      // Written blocks have one owner.
      for (int p = scheduled.first_token; p < scheduled.first_token + scheduled.num_tokens; ++p) {
        ASSERT_EQ(scheduler_.pool().ref_count(seq.block_table[p / config_.block_tokens]), 1);
      }
      num_tokens += scheduled.num_tokens;
      num_rows += scheduled.num_logit_rows();
    }
    ASSERT_EQ(num_tokens, plan.num_tokens);
    ASSERT_EQ(num_rows, plan.num_logit_rows);
    ASSERT_LE(num_tokens, config_.max_num_tokens);
    ASSERT_LE(num_rows, config_.max_logit_rows);
    ASSERT_LE(static_cast<int>(plan.sequences.size()), config_.max_batch_size);
  }

  /// Nobody is admitted while a sequence that ranks before it could have been.
  void check_no_overtaking(const StepPlan& plan) {
    const auto rank = [](const Sequence& seq) { return std::pair(seq.priority, seq.arrival); };
    for (Case& item : cases_) {
      for (const Sequence& waiting : item.sequences) {
        if (waiting.state != SequenceState::kWaiting) continue;
        if (waiting.leader && !waiting.leader->prompt_done &&
            waiting.leader->state != SequenceState::kFinished) {
          continue;
        }
        for (const ScheduledSequence& scheduled : plan.sequences) {
          if (was_running_.contains(scheduled.seq)) continue;  // not admitted in this step
          EXPECT_LT(rank(*scheduled.seq), rank(waiting));
        }
      }
    }
    was_running_.clear();
    for (Case& item : cases_) {
      for (const Sequence& seq : item.sequences) {
        if (seq.state == SequenceState::kRunning) was_running_.insert(&seq);
      }
    }
  }

  void check_answer(Case& item) {
    for (Sequence& seq : item.sequences) {
      ASSERT_EQ(seq.state, SequenceState::kFinished);
      ASSERT_TRUE(seq.finish_reason);
      const FakeAnswer expected =
          fake_generate(item.request, seq.index, item.max_tokens, kEos, kVocab);
      const std::vector<int32_t> output(seq.tokens.begin() + seq.num_prompt_tokens,
                                        seq.tokens.end());
      ASSERT_LE(output.size(), expected.tokens.size());
      ASSERT_TRUE(std::equal(output.begin(), output.end(), expected.tokens.begin()));
      const auto& scores = scores_[&seq];
      ASSERT_TRUE(std::equal(scores.begin(), scores.end(), expected.prompt_logprobs.begin()));
      if (*seq.finish_reason == FinishReason::kCancelled) {
        ASSERT_GE(item.cancel_step, 0);
        ++totals_->cancelled;
        continue;
      }
      ASSERT_EQ(output.size(), expected.tokens.size());
      ASSERT_EQ(*seq.finish_reason, expected.reason);
      if (seq.prompt_logprobs >= 0) {
        ASSERT_EQ(scores.size(), expected.prompt_logprobs.size());
        totals_->scored += scores.size();
      }
      totals_->stopped += expected.reason != FinishReason::kLength;
    }
  }

  std::mt19937 random_;
  Totals* totals_;
  const SchedulerConfig config_;
  Scheduler scheduler_;
  FakeExecutor executor_;
  const StepPlan* flying_ = nullptr;
  std::list<Case> cases_;
  std::map<const Sequence*, std::vector<float>> scores_;
  std::set<const Sequence*> was_running_;
  std::map<const Sequence*, int> decoding_;  // before the plan: its preemptions
};

void simulate(uint32_t first_seed, int num_seeds, BlockPool::HashFn hash, bool overlaps) {
  Totals totals;
  for (uint32_t seed = first_seed; seed < first_seed + num_seeds; ++seed) {
    SCOPED_TRACE(seed);
    Simulation simulation(seed, &totals, hash, overlaps);
    simulation.run(40);
    if (::testing::Test::HasFatalFailure()) return;
  }
  // The simulation must have been somewhere.
  EXPECT_GT(totals.steps, 50u * num_seeds);
  EXPECT_GT(totals.preemptions, 2u * num_seeds);
  EXPECT_GT(totals.hits, 20u * num_seeds);
  EXPECT_GT(totals.copies, 2u * num_seeds);
  EXPECT_GT(totals.cancelled, 1u * num_seeds);
  EXPECT_GT(totals.stopped, 5u * num_seeds);
  EXPECT_GT(totals.scored, 5u * num_seeds);
  EXPECT_GT(totals.constrained, 5u * num_seeds);
  if (overlaps) {
    EXPECT_GT(totals.overlapped, 20u * num_seeds);
    EXPECT_GT(totals.dropped, 2u * num_seeds);
  }
  std::printf(
      "steps %lu, preemptions %lu, hit tokens %lu, copies %lu, cancelled %lu, stopped %lu, scored "
      "%lu\n",
      totals.steps, totals.preemptions, totals.hits, totals.copies, totals.cancelled,
      totals.stopped, totals.scored);
}

uint64_t weak_hash(uint64_t parent, std::span<const int32_t> tokens) {
  return (parent * 3 + static_cast<uint64_t>(tokens[0])) % 5;
}

TEST(SchedulerSimulation, EveryAnswerIsTheOneAtATimeAnswer) {
  simulate(1, 150, BlockPool::default_hash, false);
}

TEST(SchedulerSimulation, OverlappingStepsChangeNoAnswer) {
  simulate(1, 150, BlockPool::default_hash, true);
}

TEST(SchedulerSimulation, CollidingHashesChangeNothing) { simulate(1000, 60, weak_hash, false); }

}  // namespace
}  // namespace nibble
