// SPDX-License-Identifier: Apache-2.0
#include "serve/token_hub.h"

#include <utility>

namespace nibble {
namespace {

TokenHub::Range append_scores(TokenHub::Batch& batch, std::span<const TokenLogprobs> rows) {
  const TokenHub::Range range{static_cast<uint32_t>(batch.scores.size()),
                              static_cast<uint32_t>(rows.size())};
  for (const TokenLogprobs& row : rows) {
    batch.scores.push_back(
        {row.token,
         row.logprob,
         {static_cast<uint32_t>(batch.top.size()), static_cast<uint32_t>(row.top.size())}});
    batch.top.insert(batch.top.end(), row.top.begin(), row.top.end());
  }
  return range;
}

}  // namespace

void TokenHub::Batch::clear() {
  events.clear();
  tokens.clear();
  scores.clear();
  top.clear();
}

TokenSink TokenHub::sink(uint64_t reply, int part) {
  return [hub = shared_from_this(), reply, part](const TokenEvent& event) {
    hub->push(reply, part, event);
  };
}

void TokenHub::push(uint64_t reply, int part, const TokenEvent& event) {
  bool wake;
  {
    const std::lock_guard lock(mutex_);
    Event& out = gathered_.events.emplace_back();
    out.reply = reply;
    out.part = part;
    out.index = event.index;
    out.tokens = {static_cast<uint32_t>(gathered_.tokens.size()),
                  static_cast<uint32_t>(event.tokens.size())};
    gathered_.tokens.insert(gathered_.tokens.end(), event.tokens.begin(), event.tokens.end());
    out.scores = append_scores(gathered_, event.logprobs);
    out.prompt_position = event.prompt_position;
    out.prompt_scores = append_scores(gathered_, event.prompt_logprobs);
    out.finish_reason = event.finish_reason;
    out.stop_token = event.stop_token;
    out.error = event.error;
    out.usage = event.usage;
    out.at = std::chrono::steady_clock::now();
    wake = !std::exchange(woken_, true);
  }
  if (wake) wake_();
}

void TokenHub::take(Batch& batch) {
  batch.clear();
  const std::lock_guard lock(mutex_);
  std::swap(batch, gathered_);
  woken_ = false;
}

}  // namespace nibble
