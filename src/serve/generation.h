// One generation request from accepted to answered: submits its prompts to the engine, turns the
// tokens into text, and writes the reply, whole or as a stream. Lives on the I/O thread.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "chat/chat_model.h"
#include "serve/access_log.h"
#include "serve/api_error.h"
#include "serve/api_request.h"
#include "serve/http.h"
#include "serve/metrics.h"
#include "serve/reply_writer.h"
#include "serve/token_hub.h"
#include "text/output_parser.h"

namespace nibble {

/// A checked and tokenized request.
struct PreparedRequest {
  GenerationBody body;                        // messages and prompts are spent
  std::vector<std::vector<int32_t>> prompts;  // token ids, one engine request each
  std::vector<std::string> prompt_texts;      // with echo: what is shown of each
  std::vector<int32_t> forced;  // the prompt's last tokens, which belong to the answer
};

class Generation {
 public:
  using Clock = std::chrono::steady_clock;
  struct Services {  // outlive the generation
    const ChatModel& model;
    TokenHub& hub;
    Metrics& metrics;
  };
  struct Origin {
    std::shared_ptr<HttpExchange> exchange;
    std::shared_ptr<AccessRecord> record;  // of the access log; filled in as things become known
    std::vector<HttpHeader> headers;       // of the reply
    std::string reply_id;                  // "chatcmpl-..."
    std::string model_name;                // as the client called it
    Clock::time_point arrival;
  };

  Generation(const Services& services, uint64_t key, Origin origin, PreparedRequest request);
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;
  ~Generation();  // cancels what still runs

  /// Submits everything; the first prompt takes `slot`. A stream's head leaves at once. Throws
  /// ApiError, with nothing left running, when the engine refuses.
  void start(QueueSlot slot);
  void on_event(const TokenHub::Event& event, const TokenHub::Batch& batch);
  /// After the events of a batch: hands the stream's new chunks to the connection at once.
  void flush();
  /// The reply has been written to its end (or the request has failed and said so).
  bool is_finished() const { return finished_; }
  /// The client has gone: stop computing, count it.
  void abandon();
  /// Keeps a silent stream alive through proxies: a comment when nothing was sent for `silence`.
  void ping(Clock::time_point now, Clock::duration silence);

 private:
  struct Choice {
    explicit Choice(OutputParser parser, bool is_chat)
        : parser(std::move(parser)), logprobs(is_chat) {}
    OutputParser parser;
    LogprobList logprobs;
    OutputDelta output;       // not streamed yet; all of it when not streaming
    int64_t text_offset = 0;  // characters before the next token (text completions' log-probs)
    int num_tokens = 0;
    Clock::time_point last_token_at;
    bool ended = false;
    ChoiceEnd end;
  };
  struct Part {
    RequestId id = 0;
    bool submitted = false;
    std::vector<Choice> choices;
    Usage usage;            // of the latest event
    int64_t decode_us = 0;  // longest of its choices
    bool started = false;
    int num_ended = 0;
  };

  void submit(size_t part_idx, std::vector<int32_t> prompt, QueueSlot* slot);
  OutputParser parser(size_t part_idx, int index) const;
  void begin_echo(Part& part, std::string_view text);
  void take_tokens(Part& part, Choice& choice, const TokenHub::Event& event,
                   const TokenHub::Batch& batch);
  void add_score(Choice& choice, const TokenHub::ScoredRow& row, const TokenHub::Batch& batch,
                 bool known);
  void end_choice(Part& part, int index, ChoiceEnd end);
  void stream_choice(int index, Choice& choice);
  void fail(const ApiError& error);
  void finish();
  void cancel_running();
  void note_end(const Part& part);
  ReplyUsage usage() const;
  int choice_index(size_t part_idx, int index) const {
    return static_cast<int>(part_idx) * body_.params.n + index;
  }

  Services services_;
  const uint64_t key_;
  Origin origin_;
  GenerationBody body_;
  std::vector<std::vector<int32_t>> prompts_;  // kept until submitted; with echo until shown
  std::vector<std::string> prompt_texts_;
  std::vector<int32_t> forced_;
  ReplyWriter writer_;
  std::vector<Part> parts_;
  int num_running_ = 0;  // choices not ended
  bool streaming_ = false, finished_ = false, first_token_seen_ = false;
  std::string chunks_;  // of the stream, not handed over yet
  Clock::time_point last_write_;
};

}  // namespace nibble
