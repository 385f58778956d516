// A sink for tests: keeps what one request was told, and waits for its end.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nibble/request.h"

namespace nibble {

class Collector {
 public:
  struct Choice {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs, prompt_logprobs;
    std::vector<std::vector<int32_t>> top_tokens;
    std::optional<FinishReason> reason;
    int32_t stop_token = -1;
    std::string error;
    Usage usage;
  };

  TokenSink sink() {
    return [shared = shared_](const TokenEvent& event) {
      const std::lock_guard lock(shared->mutex);
      EXPECT_FALSE(shared->is_done) << "an event after the last";
      if (static_cast<int>(shared->choices.size()) <= event.index)
        shared->choices.resize(event.index + 1);
      Choice& choice = shared->choices[event.index];
      EXPECT_FALSE(choice.reason) << "an event after the choice's last";
      choice.tokens.insert(choice.tokens.end(), event.tokens.begin(), event.tokens.end());
      for (const TokenLogprobs& score : event.logprobs) {
        choice.logprobs.push_back(score.logprob);
        auto& top = choice.top_tokens.emplace_back();
        for (const TokenLogprob& entry : score.top) top.push_back(entry.token);
      }
      if (!event.prompt_logprobs.empty()) {
        EXPECT_EQ(event.prompt_position, static_cast<int>(choice.prompt_logprobs.size()) + 1);
      }
      for (const TokenLogprobs& score : event.prompt_logprobs) {
        choice.prompt_logprobs.push_back(score.logprob);
      }
      choice.reason = event.finish_reason;
      choice.stop_token = event.stop_token;
      choice.error = event.error;
      choice.usage = event.usage;
      EXPECT_EQ(event.usage.completion_tokens, static_cast<int>(choice.tokens.size()));
      ++shared->num_events;
      shared->is_done = event.last;
      shared->changed.notify_all();
    };
  }

  bool wait(std::chrono::seconds limit = std::chrono::seconds(60)) {
    std::unique_lock lock(shared_->mutex);
    return shared_->changed.wait_for(lock, limit, [&] { return shared_->is_done; });
  }
  bool wait_for_tokens(size_t num_tokens) {
    std::unique_lock lock(shared_->mutex);
    return shared_->changed.wait_for(lock, std::chrono::seconds(60), [&] {
      return !shared_->choices.empty() && shared_->choices[0].tokens.size() >= num_tokens;
    });
  }
  std::vector<Choice> choices() const {
    const std::lock_guard lock(shared_->mutex);
    return shared_->choices;
  }
  Choice choice(int index = 0) const { return choices().at(index); }

 private:
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Choice> choices;
    bool is_done = false;
    int num_events = 0;
  };
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace nibble
