// What run and chat share: opening the model, sampling flags, the line with speeds.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "chat/chat_model.h"
#include "cli/options.h"

namespace nibble::cli {

std::unique_ptr<ChatModel> open_chat_model(const RunFlags& flags);
SamplingParams sampling_params(const SamplingFlags& flags);
std::optional<int> max_tokens(const SamplingFlags& flags);

/// "[31 tokens at 212.4 tokens/s, 1.6 GB/s of weights = 8 % of the 19.8 GB/s this machine reads;
/// prompt 27 tokens (16 cached) in 0.02 s]"; of a GPU without the percent.
class SpeedReport {
 public:
  explicit SpeedReport(
      const ChatModel& model);  // measures the read bandwidth, a fraction of a second
  std::string line(const Generated& generated) const;

 private:
  uint64_t bytes_per_step_;
  double read_bandwidth_ = 0;  // 0: not this machine's
};

}  // namespace nibble::cli
