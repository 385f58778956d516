// SPDX-License-Identifier: Apache-2.0
#include "serve/generation.h"

#include <algorithm>
#include <ctime>
#include <utility>

#include "base/error.h"
#include "base/hash.h"
#include "base/json.h"

namespace nibble {
namespace {

double seconds(Generation::Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

int64_t count_characters(std::string_view bytes) {
  return std::count_if(bytes.begin(), bytes.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

}  // namespace

Generation::Generation(const Services& services, uint64_t key, Origin origin,
                       PreparedRequest request)
    : services_(services),
      key_(key),
      origin_(std::move(origin)),
      body_(std::move(request.body)),
      prompts_(std::move(request.prompts)),
      prompt_texts_(std::move(request.prompt_texts)),
      forced_(std::move(request.forced)),
      writer_(body_.is_chat, origin_.reply_id, origin_.model_name, std::time(nullptr),
              body_.stream_options),
      last_write_(Clock::now()) {}

Generation::~Generation() { cancel_running(); }

void Generation::start(QueueSlot slot) {
  AccessRecord& record = *origin_.record;
  record.is_generation = true;
  record.model = origin_.model_name;
  record.stream = body_.stream;
  record.choices = static_cast<int>(prompts_.size()) * body_.params.n;
  parts_.resize(prompts_.size());
  try {
    for (size_t i = 0; i < prompts_.size(); ++i) {
      submit(i, prompts_[i], i == 0 ? &slot : nullptr);
    }
  } catch (...) {
    cancel_running();
    throw;
  }
  if (body_.stream) {
    HttpResponse head{.content_type = "text/event-stream; charset=utf-8",
                      .headers = origin_.headers};
    head.headers.push_back({"Cache-Control", "no-cache"});
    head.headers.push_back({"X-Accel-Buffering", "no"});
    origin_.exchange->begin_stream(std::move(head));
    streaming_ = true;
  }
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (body_.echo) begin_echo(parts_[i], prompt_texts_[i]);
    if (!streaming_) continue;
    for (int k = 0; k < body_.params.n; ++k) {
      const int index = choice_index(i, k);
      if (body_.is_chat) writer_.role_chunk(chunks_, index, usage());
    }
  }
  flush();
}

void Generation::submit(size_t part_idx, std::vector<int32_t> prompt, QueueSlot* slot) {
  Part& part = parts_[part_idx];
  const int n = body_.params.n;
  part.usage.prompt_tokens = static_cast<int>(prompt.size());
  try {
    part.choices.reserve(static_cast<size_t>(n));
    for (int k = 0; k < n; ++k) {
      Choice& choice = part.choices.emplace_back(parser(part_idx, k), body_.is_chat);
      for (const int32_t id : forced_) choice.parser.push(id, choice.output);
    }
    Request request;
    request.prompt_tokens = std::move(prompt);
    request.params = body_.params;
    request.max_tokens = body_.max_tokens;
    request.priority = body_.priority;
    request.cache_salt = body_.cache_salt;
    request.sink = services_.hub.sink(key_, static_cast<int>(part_idx));
    Engine& engine = services_.model.engine();
    const Submitted submitted = slot != nullptr
                                    ? engine.submit(std::move(request), std::move(*slot))
                                    : engine.submit(std::move(request));
    switch (submitted.status) {
      case SubmitStatus::kAccepted: break;
      case SubmitStatus::kQueueFull:
        services_.metrics.count_rejected("queue_full");
        throw ApiError::queue_full(
            "the queue has no room for every prompt of this request; send fewer at once or retry");
      case SubmitStatus::kDraining:
        services_.metrics.count_rejected("draining");
        throw ApiError::unavailable("the server is shutting down", 5);
      case SubmitStatus::kFailed:
        services_.metrics.count_rejected("failed");
        throw ApiError::unavailable("the engine has failed: " + engine.failure(), 30);
    }
    part.id = submitted.id;
    part.submitted = true;
    num_running_ += n;
  } catch (const Error& error) {
    throw ApiError::from(error, body_.is_chat ? "messages" : "prompt");
  }
}

OutputParser Generation::parser(size_t part_idx, int index) const {
  const Tokenizer& tokenizer = services_.model.tokenizer();
  const std::string key = origin_.reply_id + std::to_string(choice_index(part_idx, index));
  OutputParser parser(tokenizer, {.content = {.stop = body_.stop,
                                              .include_stop = body_.include_stop,
                                              .skip_special = body_.skip_special},
                                  .reasoning = body_.is_chat,
                                  .tool_calls = body_.uses_tools(),
                                  .max_tool_calls = body_.parallel_tool_calls ? 0 : 1,
                                  .seed = xxh3_64(std::as_bytes(std::span(key)))});
  if (body_.is_chat && ends_in_reasoning(tokenizer, prompts_[part_idx])) parser.begin_reasoning();
  return parser;
}

void Generation::begin_echo(Part& part, std::string_view text) {
  for (Choice& choice : part.choices) {
    choice.output.content = text;
    const auto idx = static_cast<size_t>(&part - parts_.data());
    if (body_.params.logprobs >= 0 && !prompts_[idx].empty()) {
      add_score(choice, {.token = prompts_[idx].front()}, {}, false);
    }
  }
}

void Generation::on_event(const TokenHub::Event& event, const TokenHub::Batch& batch) {
  if (finished_) return;
  const auto part_idx = static_cast<size_t>(event.part);
  Part& part = parts_[part_idx];
  Choice& choice = part.choices[static_cast<size_t>(event.index)];
  if (choice.ended) return;
  part.usage.cached_tokens = event.usage.cached_tokens;
  part.usage.queue_us = event.usage.queue_us;
  part.usage.prefill_us = event.usage.prefill_us;
  part.decode_us = std::max(part.decode_us, event.usage.decode_us);
  if (event.prompt_scores.count > 0) {
    // Scored once, by choice 0; every choice echoes the same prompt.
    for (Choice& each : part.choices) {
      for (uint32_t i = 0; i < event.prompt_scores.count; ++i) {
        add_score(each, batch.scores[event.prompt_scores.begin + i], batch, true);
      }
    }
  }
  take_tokens(part, choice, event, batch);
  const int index = choice_index(part_idx, event.index);
  if (choice.parser.stopped()) {
    if (!event.finish_reason) services_.model.engine().cancel(part.id, event.index);
    if (const auto stop_idx = choice.parser.stop_idx()) {
      std::string stop;
      append_json_string(stop, body_.stop[*stop_idx]);
      end_choice(part, event.index, {"stop", stop});
    } else {
      end_choice(part, event.index, {"tool_calls"});
    }
  } else if (event.finish_reason) {
    choice.parser.flush(choice.output);
    switch (*event.finish_reason) {
      case FinishReason::kEos:
        end_choice(part, event.index, {choice.parser.num_tool_calls() > 0 ? "tool_calls" : "stop"});
        break;
      case FinishReason::kStopToken:
        end_choice(part, event.index, {"stop", std::to_string(event.stop_token)});
        break;
      case FinishReason::kLength: end_choice(part, event.index, {"length"}); break;
      case FinishReason::kCancelled:
        fail(ApiError::unavailable("the server shut down before the answer was complete", 5));
        return;
      case FinishReason::kError: {
        if (services_.model.engine().healthy()) {  // this choice's own: nothing fits its constraint
          fail(ApiError::unsupported(body_.format.field, event.error));
          return;
        }
        ApiError error("the engine has failed: " + event.error);
        error.code = "engine_failed";
        fail(error);
        return;
      }
    }
  }
  if (streaming_) stream_choice(index, choice);
  if (num_running_ == 0) finish();
}

void Generation::take_tokens(Part& part, Choice& choice, const TokenHub::Event& event,
                             const TokenHub::Batch& batch) {
  if (event.tokens.count == 0) return;
  part.started = true;
  if (choice.num_tokens > 0) {
    services_.metrics.observe_next_token(seconds(event.at - choice.last_token_at));
  } else if (!first_token_seen_) {
    first_token_seen_ = true;
    const double first = seconds(event.at - origin_.arrival);
    services_.metrics.observe_first_token(first);
    origin_.record->first_token_ms = first * 1e3;
  }
  choice.last_token_at = event.at;
  const bool ends_on_token =
      event.finish_reason == FinishReason::kEos || event.finish_reason == FinishReason::kStopToken;
  for (uint32_t i = 0; i < event.tokens.count && !choice.parser.stopped(); ++i) {
    ++choice.num_tokens;
    if (ends_on_token && i + 1 == event.tokens.count) break;  // not part of the text
    choice.parser.push(batch.tokens[event.tokens.begin + i], choice.output);
    if (i < event.scores.count) {
      add_score(choice, batch.scores[event.scores.begin + i], batch, true);
    }
  }
}

void Generation::add_score(Choice& choice, const TokenHub::ScoredRow& row,
                           const TokenHub::Batch& batch, bool known) {
  const Tokenizer& tokenizer = services_.model.tokenizer();
  ScoredToken token{.bytes = tokenizer.token_bytes(row.token)};
  if (known) token.logprob = row.logprob;
  for (uint32_t i = 0; i < row.top.count; ++i) {
    const TokenLogprob& top = batch.top[row.top.begin + i];
    token.top.push_back({tokenizer.token_bytes(top.token), top.logprob});
  }
  choice.logprobs.add(token, choice.text_offset);
  if (!body_.skip_special || !tokenizer.is_special(row.token)) {
    choice.text_offset += count_characters(token.bytes);
  }
}

void Generation::end_choice(Part& part, int index, ChoiceEnd end) {
  Choice& choice = part.choices[static_cast<size_t>(index)];
  choice.ended = true;
  choice.end = std::move(end);
  --num_running_;
  services_.metrics.count_finish(choice.end.reason);
  if (origin_.record->finish.empty()) origin_.record->finish = choice.end.reason;
  if (++part.num_ended == body_.params.n) note_end(part);
}

void Generation::note_end(const Part& part) {
  RequestTimes times{.prompt_tokens = part.usage.prompt_tokens,
                     .cached_tokens = part.usage.cached_tokens,
                     .n = body_.params.n,
                     .max_tokens = body_.max_tokens.value_or(0)};
  for (const Choice& choice : part.choices) {
    times.completion_tokens += choice.num_tokens;
    times.longest_choice = std::max<int64_t>(times.longest_choice, choice.num_tokens);
  }
  times.queue_s = static_cast<double>(part.usage.queue_us) * 1e-6;
  times.prefill_s = static_cast<double>(part.usage.prefill_us) * 1e-6;
  times.decode_s = static_cast<double>(part.decode_us) * 1e-6;
  times.e2e_s = seconds(Clock::now() - origin_.arrival);
  times.has_started = part.started;
  services_.metrics.observe_request(times);
}

void Generation::stream_choice(int index, Choice& choice) {
  const bool scored = body_.params.logprobs >= 0;
  if (!choice.output.empty()) {
    const std::string logprobs =
        scored && !choice.logprobs.empty() ? choice.logprobs.take() : "null";
    writer_.delta_chunk(chunks_, index, choice.output, logprobs, usage());
    choice.output = {};
  }
  if (choice.ended) {
    const std::string logprobs =
        scored && !choice.logprobs.empty() ? choice.logprobs.take() : "null";
    writer_.end_chunk(chunks_, index, choice.end, logprobs, usage());
  }
}

void Generation::finish() {
  finished_ = true;
  const ReplyUsage total = usage();
  origin_.record->prompt_tokens = total.prompt_tokens;
  origin_.record->cached_tokens = total.cached_tokens;
  origin_.record->completion_tokens = total.completion_tokens;
  if (streaming_) {
    if (body_.stream_options.include_usage) writer_.usage_chunk(chunks_, total);
    ReplyWriter::done(chunks_);
    flush();
    origin_.exchange->end_stream();
    return;
  }
  std::vector<ReplyWriter::Choice> choices;
  for (size_t i = 0; i < parts_.size(); ++i) {
    for (int k = 0; k < body_.params.n; ++k) {
      Choice& choice = parts_[i].choices[static_cast<size_t>(k)];
      ReplyWriter::Choice& out = choices.emplace_back();
      out.index = choice_index(i, k);
      out.output = &choice.output;
      if (body_.params.logprobs >= 0) out.logprobs = choice.logprobs.take();
      out.end = choice.end;
    }
  }
  origin_.exchange->respond({.headers = origin_.headers, .body = writer_.whole(choices, total)});
}

void Generation::fail(const ApiError& error) {
  finished_ = true;
  cancel_running();
  services_.metrics.count_finish("error");
  origin_.record->finish = "error";
  if (streaming_) {
    ReplyWriter::error(chunks_, error.body());
    ReplyWriter::done(chunks_);
    flush();
    origin_.exchange->end_stream();
    return;
  }
  HttpResponse response = error.response();
  response.headers.insert(response.headers.end(), origin_.headers.begin(), origin_.headers.end());
  origin_.exchange->respond(std::move(response));
}

void Generation::flush() {
  if (chunks_.empty()) return;
  origin_.exchange->write(chunks_);
  chunks_.clear();
  last_write_ = Clock::now();
}

void Generation::abandon() {
  if (finished_) return;
  finished_ = true;
  cancel_running();
  services_.metrics.count_disconnect();
  for (Part& part : parts_) {
    if (part.num_ended == body_.params.n) continue;
    for (const Choice& choice : part.choices) {
      if (!choice.ended) services_.metrics.count_finish("abort");
    }
    note_end(part);
  }
  const ReplyUsage total = usage();
  origin_.record->prompt_tokens = total.prompt_tokens;
  origin_.record->cached_tokens = total.cached_tokens;
  origin_.record->completion_tokens = total.completion_tokens;
  origin_.record->finish = "abort";
}

void Generation::ping(Clock::time_point now, Clock::duration silence) {
  if (!streaming_ || finished_ || now - last_write_ < silence) return;
  chunks_ += ": ping\n\n";
  flush();
}

void Generation::cancel_running() {
  for (Part& part : parts_) {
    if (part.submitted && part.num_ended < static_cast<int>(part.choices.size())) {
      services_.model.engine().cancel(part.id);
    }
    part.submitted = false;
  }
}

ReplyUsage Generation::usage() const {
  ReplyUsage usage;
  for (const Part& part : parts_) {
    usage.prompt_tokens += part.usage.prompt_tokens;
    usage.cached_tokens += part.usage.cached_tokens;
    for (const Choice& choice : part.choices) usage.completion_tokens += choice.num_tokens;
  }
  return usage;
}

}  // namespace nibble
