// The engine thread and the requests' life between submit() and their last event. See
// docs/engine-contract.md. SPDX-License-Identifier: Apache-2.0
#include "nibble/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "engine/engine_parts.h"
#include "engine/sampling_params.h"
#include "engine/scheduler.h"

namespace nibble {
namespace {

int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// Made on the caller's thread; the engine thread owns it once it is in the inbox.
struct ActiveRequest {
  struct Choice {
    int64_t start_us = 0, first_token_us = 0;
    bool has_ended = false;  // its last event has been sent
  };
  RequestId id = 0;
  TokenSink sink;
  std::vector<Sequence> sequences;  // never grows: the scheduler points into it
  std::vector<Choice> choices;
  int num_unfinished = 0;
  bool is_queued = true;   // counts in num_queued_
  bool is_doomed = false;  // its sink threw
  int64_t submit_us = 0;
};

struct Cancel {
  RequestId id = 0;
  int index = -1;  // -1: all
};

RequestLimits make_limits(const EngineParts& parts) {
  const EngineLimits& limits = parts.plan.limits;
  const int64_t kv_tokens = int64_t{parts.num_kv_blocks} * parts.plan.kv_block_tokens;
  return {
      .max_input_len = limits.max_input_len,
      .max_output_len = limits.max_output_len,
      .max_seq_len = static_cast<int>(std::min<int64_t>(limits.max_seq_len(), kv_tokens)),
      .kv_cache_tokens = kv_tokens,
      .vocab_size = parts.plan.spec.vocab_size,
      .allowed_tokens = parts.allowed_tokens,
      .eos_ids = parts.eos_token_ids.empty() ? parts.plan.spec.eos_token_ids : parts.eos_token_ids};
}

int max_logit_rows(const EngineParts& parts) {
  return parts.plan.limits.max_batch_size + std::max(1, parts.num_prompt_logprob_rows);
}

void check_parts(const EngineParts& parts) {
  const EngineLimits& limits = parts.plan.limits;
  const auto positive = [](const char* what, int value) {
    if (value <= 0) fail(ErrorKind::kInput, "{} is {}, but must be at least 1", what, value);
  };
  positive("max_batch_size", limits.max_batch_size);
  positive("max_input_len", limits.max_input_len);
  positive("max_output_len", limits.max_output_len);
  positive("max_num_tokens", limits.max_num_tokens);
  positive("kv_block_tokens", parts.plan.kv_block_tokens);
  positive("vocab_size", parts.plan.spec.vocab_size);
  positive("max_queue", parts.max_queue);
  if (parts.num_kv_blocks <= 0) {
    fail(ErrorKind::kMemory, "the KV cache has {} blocks; give it more memory",
         parts.num_kv_blocks);
  }
  if (parts.eos_token_ids.size() > kMaxEosIds ||
      parts.plan.spec.eos_token_ids.size() > kMaxEosIds) {
    fail(ErrorKind::kInput, "the model has more than {} end-of-sequence ids", kMaxEosIds);
  }
}

class EngineImpl final : public Engine {
 public:
  explicit EngineImpl(EngineParts parts)
      : limits_(make_limits(parts)),
        block_tokens_(parts.plan.kv_block_tokens),
        max_queue_(parts.max_queue),
        tensors_(std::move(parts.tensors)),
        backend_(std::move(parts.backend)),
        weights_(std::move(parts.weights)),
        executor_(std::move(parts.executor)),
        scheduler_({.max_batch_size = parts.plan.limits.max_batch_size,
                    .max_num_tokens = parts.plan.limits.max_num_tokens,
                    .max_logit_rows = max_logit_rows(parts),
                    .num_blocks = parts.num_kv_blocks,
                    .block_tokens = parts.plan.kv_block_tokens,
                    .hash = parts.hash}) {
    if (!executor_) {
      NIBBLE_CHECK(backend_ != nullptr);
      executor_ =
          std::make_unique<ModelExecutor>(*backend_, parts.plan, weights_, parts.num_kv_blocks,
                                          max_logit_rows(parts), parts.allowed_tokens);
    }
    std::random_device random;
    next_seed_ = (uint64_t{random()} << 32) | random();
    scores_.resize(max_logit_rows(parts));
    tops_.resize(size_t(max_logit_rows(parts)) * kMaxTopLogprobs);
    new_requests_.reserve(max_queue_);
    taken_requests_.reserve(max_queue_);
    cancels_.reserve(max_queue_);
    taken_cancels_.reserve(max_queue_);
    doomed_.reserve(parts.plan.limits.max_batch_size);
    buried_.reserve(parts.plan.limits.max_batch_size + max_queue_);
    publish_stats();
    thread_ = std::thread([this] { thread_main(); });
  }

  ~EngineImpl() override { stop(); }

  // Any thread
  // -----------------------------------------------------------------------------------------

  Submitted submit(Request request) override {
    check(request);
    QueueSlot slot = reserve_slot();
    if (!slot) return {refusal().value_or(SubmitStatus::kQueueFull)};
    return submit_checked(std::move(request), std::move(slot));
  }

  Submitted submit(Request request, QueueSlot slot) override {
    NIBBLE_CHECK(static_cast<bool>(slot), "submit() with an empty slot");
    check(request);
    return submit_checked(std::move(request), std::move(slot));
  }

  QueueSlot reserve_slot() override {
    int queued = num_queued_.load();
    do {
      if (queued >= max_queue_) return QueueSlot();
    } while (!num_queued_.compare_exchange_weak(queued, queued + 1));
    return make_slot();
  }

  void cancel(RequestId id) override { cancel(id, -1); }

  void cancel(RequestId id, int index) override {
    const std::lock_guard lock(mutex_);
    if (num_live_ == 0) return;
    cancels_.push_back({id, index});
    wake_.notify_one();
  }

  EngineStats stats() const override {
    const std::lock_guard lock(stats_mutex_);
    EngineStats stats = stats_;
    stats.num_queued = num_queued_.load();
    return stats;
  }

  bool healthy() const override { return healthy_.load(); }

  std::string failure() const override {
    const std::lock_guard lock(mutex_);
    return failure_;
  }

  int max_input_len() const override {
    return std::min(limits_.max_input_len, limits_.max_seq_len - 1);
  }
  int max_output_len() const override {
    return std::min(limits_.max_output_len, limits_.max_seq_len - 1);
  }
  int max_seq_len() const override { return limits_.max_seq_len; }

  bool drain(std::chrono::milliseconds deadline) override {
    std::unique_lock lock(mutex_);
    accepting_ = false;
    const bool clean = idle_.wait_for(lock, deadline, [&] { return num_live_ == 0; });
    if (!clean) {
      cancel_all_ = true;
      wake_.notify_one();
      idle_.wait(lock, [&] { return num_live_ == 0; });
    }
    return clean;
  }

  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      accepting_ = false;
      cancel_all_ = true;
      stopping_ = true;
      wake_.notify_one();
    }
    const std::lock_guard lock(join_mutex_);
    if (thread_.joinable()) thread_.join();
  }

 private:
  // Any thread
  // -----------------------------------------------------------------------------------------

  void return_slot() override { num_queued_.fetch_sub(1); }

  void check(const Request& request) const {
    check_request(request, limits_);
    if (request.params.constraint == nullptr) return;
    if (limits_.eos_ids.empty()) {
      fail(ErrorKind::kUnsupported,
           "structured output needs an end-of-sequence id, and this model has none");
    }
  }

  std::optional<SubmitStatus> refusal() const {
    if (!healthy_.load()) return SubmitStatus::kFailed;
    const std::lock_guard lock(mutex_);
    if (!accepting_) return SubmitStatus::kDraining;
    return std::nullopt;
  }

  Submitted submit_checked(Request request, QueueSlot slot) {
    if (const auto status = refusal()) return {*status};
    auto active = std::make_unique<ActiveRequest>();
    active->id = next_id_.fetch_add(1);
    active->submit_us = now_us();
    const SequenceDefaults defaults{
        .eos_ids = limits_.eos_ids,
        .max_tokens = resolve_max_tokens(request, limits_),
        .block_tokens = block_tokens_,
        .seed = request.params.seed ? *request.params.seed
                                    : choice_seed(next_seed_, static_cast<int>(active->id))};
    const int n = request.params.n;
    active->sequences.reserve(n);
    for (int i = 0; i < n; ++i) {
      active->sequences.push_back(make_sequence(request, active->id, i, defaults));
      if (i > 0) active->sequences[i].leader = &active->sequences[0];
    }
    active->choices.resize(n);
    active->num_unfinished = n;
    active->sink = std::move(request.sink);

    const RequestId id = active->id;
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) return {SubmitStatus::kFailed};
    if (!accepting_) return {SubmitStatus::kDraining};
    new_requests_.push_back(std::move(active));
    ++num_live_;
    keep_slot(slot);  // the engine thread gives it back when the request starts
    wake_.notify_one();
    return {SubmitStatus::kAccepted, id};
  }

  // Engine thread
  // --------------------------------------------------------------------------------------

  void thread_main() {
    std::string why;
    try {
      while (take_inbox()) {
        if (scheduler_.has_work() || flying_ != nullptr) step();
      }
      return;
    } catch (const std::exception& error) {
      why = error.what();
    } catch (...) {
      why = "unknown exception";
    }
    fail_all(why.empty() ? "engine failure" : why);
  }

  /// Waits for something to do, moves new requests and cancellations into the scheduler. False:
  /// stop.
  bool take_inbox() {
    bool cancel_all;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] {
        return scheduler_.has_work() || flying_ != nullptr || !new_requests_.empty() ||
               !cancels_.empty() || cancel_all_ || stopping_;
      });
      if (new_requests_.empty() && cancels_.empty() && !cancel_all_ && !stopping_) return true;
      std::swap(new_requests_, taken_requests_);
      std::swap(cancels_, taken_cancels_);
      cancel_all = std::exchange(cancel_all_, false);
      if (stopping_ && taken_requests_.empty() && requests_.empty()) return false;
    }
    for (auto& request : taken_requests_) {
      ActiveRequest& added = *request;
      requests_.emplace(added.id, std::move(request));
      for (Sequence& seq : added.sequences) scheduler_.add(seq);
      ++counters_.requests;
    }
    taken_requests_.clear();
    for (const Cancel& cancel : taken_cancels_) cancel_request(cancel);
    taken_cancels_.clear();
    if (cancel_all) cancel_everything();
    publish_stats();
    return true;
  }

  /// Launches the next step, then reads the one before while it runs. Where steps do not overlap,
  /// or the next one needs the tokens, it is read at once.
  void step() {
    const int64_t begin_us = now_us();
    const StepPlan& plan = scheduler_.plan();
    for (const ScheduledSequence& scheduled : plan.sequences) note_start(*scheduled.seq, begin_us);
    if (!plan.empty()) executor_->launch(plan);
    if (flying_ != nullptr) land();
    if (!plan.empty()) {
      scheduler_.advance();
      flying_ = &plan;
      if (!executor_->overlaps() || needs_tokens(plan)) land();
    }
    // Together: readers take differences for the engine's own time.
    counters_.forward_us += std::exchange(landed_forward_us_, 0);
    counters_.wait_us += std::exchange(landed_wait_us_, 0);
    counters_.step_us += now_us() - begin_us;
    publish_stats();
  }

  /// Whether the step after this one cannot be made without its tokens: what a constraint allows
  /// next depends on them. (Penalties count them where they were drawn.)
  static bool needs_tokens(const StepPlan& plan) {
    return std::ranges::any_of(plan.sequences, [](const ScheduledSequence& scheduled) {
      return scheduled.draws && scheduled.seq->matcher != nullptr;
    });
  }

  /// Waits for the step in flight and hands out what it brought.
  void land() {
    const size_t num_buried = buried_.size();
    const StepPlan& plan = *std::exchange(flying_, nullptr);
    const int64_t wait_us = now_us();
    const StepResult& result = executor_->collect();
    const int64_t at_us = now_us();
    scheduler_.resolve(result.tokens);

    counters_.steps += 1;
    counters_.step_tokens += plan.num_tokens;
    const auto& sizes = EngineStats::kStepSizes;
    ++counters_.steps_by_size[static_cast<size_t>(
        std::lower_bound(sizes.begin(), sizes.end(), plan.num_tokens) - sizes.begin())];
    for (const ScheduledSequence& scheduled : plan.sequences) {
      counters_.generated_tokens += scheduled.draws && !scheduled.is_dropped;
    }
    landed_wait_us_ += at_us - wait_us;
    landed_forward_us_ += result.forward_us;
    publish_stats();  // before the sinks, so that who hears of an end sees the blocks back

    deliver(plan, result, at_us);
    for (const RequestId id : doomed_) cancel_request({id});
    doomed_.clear();
    // What ended before this step was read is in no later plan.
    buried_.erase(buried_.begin(), buried_.begin() + static_cast<std::ptrdiff_t>(num_buried));
  }

  void note_start(const Sequence& seq, int64_t at_us) {
    ActiveRequest& request = *requests_.find(seq.request_id)->second;
    ActiveRequest::Choice& choice = request.choices[seq.index];
    if (choice.start_us == 0) choice.start_us = at_us;
    leave_queue(request);
  }

  void leave_queue(ActiveRequest& request) {
    if (std::exchange(request.is_queued, false)) num_queued_.fetch_sub(1);
  }

  TokenLogprobs logprobs_of_row(const StepResult& result, size_t row, int32_t token, int wanted) {
    TokenLogprob* top = tops_.data() + row * kMaxTopLogprobs;
    size_t num_top = 0;
    for (int i = 0; i < std::min(wanted, result.max_logprobs); ++i) {
      const size_t at = row * result.max_logprobs + i;
      if (result.top_tokens[at] < 0) break;
      top[num_top++] = {result.top_tokens[at], result.top_logprobs[at]};
    }
    return {token, result.logprobs[row], {top, num_top}};
  }

  void deliver(const StepPlan& plan, const StepResult& result, int64_t at_us) {
    size_t row = 0;
    for (const ScheduledSequence& scheduled : plan.sequences) {
      const size_t first_row = row;
      row += scheduled.num_logit_rows();
      if (scheduled.is_dropped) continue;
      const Sequence& seq = *scheduled.seq;
      if (scheduled.num_logit_rows() == 0 && !seq.finish_reason) continue;

      TokenEvent event;
      if (scheduled.num_prompt_rows > 0) {
        for (int i = 0; i < scheduled.num_prompt_rows; ++i) {
          const size_t r = first_row + i;
          scores_[r] = logprobs_of_row(result, r, result.tokens[r], seq.prompt_logprobs);
        }
        event.prompt_position = scheduled.first_prompt_row + 1;
        event.prompt_logprobs = std::span(scores_).subspan(first_row, scheduled.num_prompt_rows);
      }
      if (seq.finish_reason == FinishReason::kError) {
        event.error =
            "no token that the model may draw fits the constraint: logit_bias or the stop ids that "
            "min_tokens holds back leave none, or the grammar is too ambiguous";
      } else if (scheduled.draws) {
        const size_t r = row - 1;
        event.tokens = result.tokens.subspan(r, 1);
        if (seq.row.num_logprobs >= 0) {
          scores_[r] = logprobs_of_row(result, r, result.tokens[r], seq.row.num_logprobs);
          event.logprobs = std::span(scores_).subspan(r, 1);
        }
      }
      send(seq, event, at_us);
    }
  }

  /// Completes the event with the sequence's state and hands it to the sink; forgets a request that
  /// is done.
  void send(const Sequence& seq, TokenEvent& event, int64_t at_us) {
    const auto found = requests_.find(seq.request_id);
    ActiveRequest& request = *found->second;
    ActiveRequest::Choice& choice = request.choices[seq.index];
    if (!event.tokens.empty() && choice.first_token_us == 0) choice.first_token_us = at_us;
    event.request_id = seq.request_id;
    event.index = seq.index;
    event.finish_reason = seq.finish_reason;
    event.stop_token = seq.stop_token;
    const Sequence& leader = request.sequences[0];
    event.usage = {.prompt_tokens = seq.num_prompt_tokens,
                   .cached_tokens = std::max(0, leader.num_cached_tokens),
                   .completion_tokens = seq.num_output_tokens()};
    const int64_t start_us = choice.start_us ? choice.start_us : at_us;
    const int64_t first_us = choice.first_token_us ? choice.first_token_us : at_us;
    event.usage.queue_us = std::max<int64_t>(0, start_us - request.submit_us);
    event.usage.prefill_us = first_us - start_us;
    event.usage.decode_us = at_us - first_us;
    if (seq.finish_reason) {
      ++counters_.finished[static_cast<size_t>(*seq.finish_reason)];
      choice.has_ended = true;
      event.last = --request.num_unfinished == 0;
    }
    if (!request.is_doomed) {
      try {
        request.sink(event);
      } catch (...) {
        request.is_doomed = true;
        if (!event.last) doomed_.push_back(request.id);
      }
    }
    if (!event.last) return;
    leave_queue(request);
    publish_stats();
    buried_.push_back(std::move(found->second));  // plans may still point to its sequences
    requests_.erase(found);
    const std::lock_guard lock(mutex_);
    if (--num_live_ == 0) idle_.notify_all();
  }

  void cancel_request(const Cancel& cancel) {
    end_choices(cancel, [&](Sequence& seq) { scheduler_.cancel(seq); }, {});
  }

  /// Ends what has not ended of a request, or of one choice, and says so. Unknown ids are ignored.
  template <typename End>
  void end_choices(const Cancel& which, End end, std::string_view error) {
    const auto found = requests_.find(which.id);
    if (found == requests_.end()) return;
    ActiveRequest& request = *found->second;
    for (int i = 0, left = request.num_unfinished; left > 0; ++i) {  // the last end frees `request`
      if (i == static_cast<int>(request.sequences.size())) return;
      if (request.choices[i].has_ended) continue;
      --left;
      if (which.index >= 0 && which.index != i) continue;
      Sequence& seq = request.sequences[i];
      end(seq);
      TokenEvent event;
      event.error = error;
      send(seq, event, now_us());
    }
  }

  void cancel_everything() {
    while (!requests_.empty()) cancel_request({requests_.begin()->first});
  }

  /// The engine cannot go on: every request hears so, and no other is taken.
  void fail_all(const std::string& why) {
    {
      const std::lock_guard lock(mutex_);
      failure_ = why;
      accepting_ = false;
      for (auto& request : new_requests_) requests_.emplace(request->id, std::move(request));
      new_requests_.clear();
    }
    healthy_.store(false);
    // The scheduler may be in any state: its sequences are only told off.
    const auto end = [](Sequence& seq) {
      seq.drop_pending();
      seq.finish_reason = FinishReason::kError;
    };
    while (!requests_.empty()) end_choices({requests_.begin()->first}, end, why);
    publish_stats();
  }

  void publish_stats() {
    const BlockPool& pool = scheduler_.pool();
    const SchedulerStats& scheduler = scheduler_.stats();
    counters_.num_running = scheduler_.num_running();
    counters_.num_waiting = scheduler_.num_waiting();
    counters_.kv_blocks_total = pool.num_blocks();
    counters_.kv_blocks_used = pool.num_used();
    counters_.kv_blocks_cached = pool.num_cached();
    counters_.prompt_tokens = scheduler.prompt_tokens;
    counters_.prefix_query_tokens = scheduler.prefix_query_tokens;
    counters_.prefix_hit_tokens = scheduler.prefix_hit_tokens;
    counters_.preemptions = scheduler.num_preemptions;
    const std::lock_guard lock(stats_mutex_);
    stats_ = counters_;
  }

  // Constant.
  const RequestLimits limits_;
  const int block_tokens_;
  const int max_queue_;

  // Owned by the engine thread (destroyed in reverse order, after it has ended).
  std::shared_ptr<const void> tensors_;
  std::unique_ptr<Backend> backend_;
  ModelWeights weights_;
  std::unique_ptr<Executor> executor_;
  Scheduler scheduler_;
  std::unordered_map<RequestId, std::unique_ptr<ActiveRequest>> requests_;
  std::vector<std::unique_ptr<ActiveRequest>> taken_requests_;
  std::vector<Cancel> taken_cancels_;
  std::vector<RequestId> doomed_;
  const StepPlan* flying_ = nullptr;                    // launched and not read
  int64_t landed_forward_us_ = 0, landed_wait_us_ = 0;  // of the steps read in this one
  std::vector<std::unique_ptr<ActiveRequest>> buried_;  // ended; a step in flight may know them
  std::vector<TokenLogprobs> scores_;                   // [max_logit_rows]
  std::vector<TokenLogprob> tops_;                      // [max_logit_rows, kMaxTopLogprobs]
  EngineStats counters_;

  // Shared.
  mutable std::mutex mutex_;  // guards the inbox:
  std::condition_variable wake_, idle_;
  std::vector<std::unique_ptr<ActiveRequest>> new_requests_;
  std::vector<Cancel> cancels_;
  bool accepting_ = true, cancel_all_ = false, stopping_ = false;
  int num_live_ = 0;  // accepted and not yet told their last event
  std::string failure_;
  std::atomic<int> num_queued_{0};
  std::atomic<bool> healthy_{true};
  std::atomic<RequestId> next_id_{1};
  uint64_t next_seed_ = 0;  // constant once running
  mutable std::mutex stats_mutex_;
  EngineStats stats_;
  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace

QueueSlot::~QueueSlot() {
  if (engine_ != nullptr) engine_->return_slot();
}

std::unique_ptr<Engine> Engine::create(EngineParts parts) {
  check_parts(parts);
  return std::make_unique<EngineImpl>(std::move(parts));
}

}  // namespace nibble
