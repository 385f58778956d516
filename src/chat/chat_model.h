// A model one can talk to: weights, tokenizer, chat template and engine opened together from one
// directory. `run`, `chat` and `serve` stand on this. Thread-safe once open, except where a class
// says otherwise. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "build/model_loader.h"
#include "chat/constraint_cache.h"
#include "nibble/engine.h"
#include "text/chat_template.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace nibble {

struct ChatModelOptions {
  LoadOptions load;
  TokenizerOptions tokenizer;
  RolePolicy roles = RolePolicy::kTolerant;
  fs::path chat_template;       // a .jinja file instead of the model's own; empty: the model's
  uint64_t kv_cache_bytes = 0;  // 0: by the two below
  /// Of the memory that weights (on a device: and steps) leave; 0: `kv_cache_sequences` sequences
  /// of full length, at most half of the free memory; on a device with kv_cache_sequences 0: 0.9.
  double kv_cache_free_fraction = 0;
  int kv_cache_sequences = 4;  // 0: the engine's max_batch_size
  int max_queue = 256;
  /// Told a device's memory plan before anything is loaded, if it is there.
  std::function<void(const std::string&)> on_memory_plan;
};

class ChatModel {
 public:
  /// Throws Error naming what is missing (no tokenizer.json, KV memory too small for one sequence,
  /// ...).
  static std::unique_ptr<ChatModel> open(const fs::path& directory,
                                         const ChatModelOptions& options);

  /// Throws what open() would throw of an engine of `checkpoint`, built with options.load.build,
  /// whose device is not there or has too little memory. Before it is built.
  static void check_device(const fs::path& checkpoint, const ChatModelOptions& options);

  const Tokenizer& tokenizer() const { return tokenizer_; }
  const ChatTemplate& chat_template() const { return template_; }
  const EnginePlan& plan() const { return plan_; }
  Engine& engine() const { return *engine_; }
  uint64_t bytes_per_decode_step() const { return bytes_per_decode_step_; }
  uint64_t kv_cache_bytes() const { return kv_cache_bytes_; }
  const std::vector<std::string>& notices() const { return notices_; }

  /// Of SamplingParams.
  std::shared_ptr<const TokenConstraint> constraint(const OutputFormat& format) const {
    return constraints_->get(format);
  }

  /// Template literals may become control tokens, what people typed never does.
  std::vector<int32_t> encode_chat(ChatRequest request) const;
  /// A finished prompt (completions): control strings are parsed, BOS added unless already there.
  std::vector<int32_t> encode_prompt(std::string_view text) const;

 private:
  ChatModel(Tokenizer tokenizer, ChatTemplate chat_template)
      : tokenizer_(std::move(tokenizer)),
        template_(std::move(chat_template)),
        constraints_(std::make_unique<ConstraintCache>(tokenizer_)) {}

  Tokenizer tokenizer_;
  ChatTemplate template_;
  std::unique_ptr<ConstraintCache> constraints_;
  RolePolicy roles_ = RolePolicy::kTolerant;
  EnginePlan plan_;
  std::unique_ptr<WeightSource> source_;  // host backends map its bytes; must outlive the engine
  uint64_t bytes_per_decode_step_ = 0, kv_cache_bytes_ = 0;
  std::vector<std::string> notices_;
  std::unique_ptr<Engine> engine_;
};

struct Generated {
  std::string text;
  std::vector<int32_t> tokens;
  FinishReason finish_reason = FinishReason::kEos;
  bool stopped_by_string = false;
  Usage usage;
};

/// Submits one request and blocks until it ends, handing text to `on_text` as it becomes safe to
/// show (whole characters, never part of a stop string). An interrupt (Ctrl-C) cancels it. Throws
/// Error{kLimit} for a prompt that is too long.
Generated generate(ChatModel& model, std::vector<int32_t> prompt, const SamplingParams& params,
                   std::optional<int> max_tokens, const std::vector<std::string>& stop,
                   const std::function<void(std::string_view)>& on_text);

/// Bits of the ids that may be drawn: those with a text or an end-of-sequence role; never <unk>,
/// <pad>, BOS or the
/// "<SPECIAL_n>" fillers of Tekken vocabularies.
std::vector<uint64_t> allowed_tokens(const Tokenizer& tokenizer, int vocab_size,
                                     std::span<const int> eos_ids);

}  // namespace nibble
