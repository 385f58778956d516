// SPDX-License-Identifier: Apache-2.0
#include "chat/chat_model.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <mutex>
#include <optional>

#include "base/error.h"
#include "base/interrupt.h"
#include "build/cuda_plugin.h"
#include "build/memory_plan.h"
#include "engine/engine_parts.h"
#include "model/kv_cache.h"
#include "text/output_parser.h"

namespace nibble {
namespace {

/// Nothing where the backend works in the host's memory.
std::optional<MemoryPlan> plan_device(const EnginePlan& plan, uint64_t weight_bytes,
                                      Backend& backend, const ChatModelOptions& options) {
  const uint64_t free = backend.free_memory_bytes();
  if (free == 0) return std::nullopt;
  const uint64_t block = KvCache::bytes_per_block(backend, plan);
  MemoryWish wish{.kv_bytes = options.kv_cache_bytes};
  if (options.kv_cache_free_fraction > 0) wish.kv_fraction = options.kv_cache_free_fraction;
  if (wish.kv_bytes == 0 && options.kv_cache_free_fraction == 0 && options.kv_cache_sequences > 0) {
    const int per_sequence =
        (plan.limits.max_seq_len() + plan.kv_block_tokens - 1) / plan.kv_block_tokens;
    wish.kv_at_most = block * static_cast<uint64_t>(options.kv_cache_sequences * per_sequence);
  }
  return plan_memory(plan,
                     {.device = backend.name(),
                      .free = free,
                      .weights = weight_bytes,
                      .kv_block = block,
                      .act_element = backend.act_bytes()},
                     wish);
}

uint64_t available_memory_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  uint64_t kilobytes = 0;
  while (meminfo >> key >> kilobytes >> unit) {
    if (key == "MemAvailable:") return kilobytes * 1024;
  }
  return uint64_t{2} << 30;
}

int choose_num_blocks(const LoadedModel& model, const ChatModelOptions& options, uint64_t* bytes) {
  uint64_t wanted_bytes = options.kv_cache_bytes;
  if (wanted_bytes == 0 && options.kv_cache_free_fraction > 0) {
    wanted_bytes = static_cast<uint64_t>(options.kv_cache_free_fraction *
                                         static_cast<double>(available_memory_bytes()));
  }
  const uint64_t per_block = KvCache::bytes_per_block(*model.backend, model.plan);
  const int tokens = model.plan.kv_block_tokens;
  const auto per_sequence =
      static_cast<uint64_t>((model.plan.limits.max_seq_len() + tokens - 1) / tokens);
  uint64_t blocks = wanted_bytes / per_block;
  if (wanted_bytes == 0) {
    const auto sequences =
        static_cast<uint64_t>(options.kv_cache_sequences > 0 ? options.kv_cache_sequences
                                                             : model.plan.limits.max_batch_size);
    blocks = std::min(sequences * per_sequence, available_memory_bytes() / 2 / per_block);
    blocks = std::max(blocks, per_sequence);
  }
  if (blocks < per_sequence) {
    fail(ErrorKind::kMemory,
         "a KV cache of {} bytes holds {} tokens, fewer than one sequence of {} (--max-input-len + "
         "--max-output-len); give it "
         "at least {} bytes, or build the engine for shorter sequences",
         wanted_bytes, blocks * static_cast<uint64_t>(tokens), model.plan.limits.max_seq_len(),
         per_sequence * per_block);
  }
  *bytes = blocks * per_block;
  return static_cast<int>(std::min<uint64_t>(blocks, 1u << 30));
}

}  // namespace

std::vector<uint64_t> allowed_tokens(const Tokenizer& tokenizer, int vocab_size,
                                     std::span<const int> eos_ids) {
  std::vector<uint64_t> allowed((static_cast<size_t>(vocab_size) + 63) / 64);
  for (int32_t id = 0; id < vocab_size; ++id) {
    const bool is_eos = std::find(eos_ids.begin(), eos_ids.end(), id) != eos_ids.end();
    bool ok = tokenizer.has_token(id);
    if (ok && tokenizer.is_special(id)) {
      const std::string_view text = tokenizer.token_bytes(id);
      ok = !text.starts_with("<SPECIAL_") && text != "<unk>" && text != "<pad>" &&
           id != tokenizer.bos_id();
    }
    if (ok || is_eos) allowed[static_cast<size_t>(id) / 64] |= uint64_t{1} << (id % 64);
  }
  return allowed;
}

std::unique_ptr<ChatModel> ChatModel::open(const fs::path& directory,
                                           const ChatModelOptions& options) {
  std::optional<MemoryPlan> memory;  // of a device
  LoadOptions load = options.load;
  load.before_load = [&](const EnginePlan& plan, uint64_t weight_bytes, Backend& backend) {
    memory = plan_device(plan, weight_bytes, backend, options);
    if (memory && options.on_memory_plan) options.on_memory_plan(memory->text());
  };
  LoadedModel model = load_model(directory, load);
  if (!fs::exists(model.directory / "tokenizer.json")) {
    fail(
        ErrorKind::kInput,
        "{} has no tokenizer.json, so nobody can talk to it; build the engine with --tokenizer DIR",
        model.directory.string());
  }
  auto chat = std::unique_ptr<ChatModel>(
      new ChatModel(Tokenizer::load(model.directory, options.tokenizer),
                    ChatTemplate::load(model.directory, options.chat_template)));
  if (chat->tokenizer_.vocab_size() > model.plan.spec.vocab_size) {
    fail(ErrorKind::kInput,
         "{}/tokenizer.json has ids up to {}, the model's vocabulary ends at {}: they do not "
         "belong together",
         model.directory.string(), chat->tokenizer_.vocab_size() - 1,
         model.plan.spec.vocab_size - 1);
  }
  chat->roles_ = options.roles;
  chat->plan_ = model.plan;
  chat->bytes_per_decode_step_ = model.weights.bytes_per_decode_step;
  chat->notices_ = chat->tokenizer_.notices();
  chat->notices_.insert(chat->notices_.end(), model.notices.begin(), model.notices.end());
  if (const auto unused = unused_gpu(model.plan.target)) chat->notices_.push_back(*unused);
  if (model.source) {
    const auto& notices = model.source->notices();
    chat->notices_.insert(chat->notices_.end(), notices.begin(), notices.end());
  }
  EngineParts parts;
  parts.plan = model.plan;
  if (memory) {
    parts.num_kv_blocks = memory->kv_blocks;
    chat->kv_cache_bytes_ = memory->kv;
  } else {
    parts.num_kv_blocks = choose_num_blocks(model, options, &chat->kv_cache_bytes_);
  }
  parts.allowed_tokens =
      allowed_tokens(chat->tokenizer_, model.plan.spec.vocab_size, model.plan.spec.eos_token_ids);
  parts.max_queue = options.max_queue;
  parts.backend = std::move(model.backend);
  parts.tensors = std::move(model.tensors);
  parts.weights = std::move(model.weights);
  chat->source_ = std::move(model.source);
  chat->engine_ = Engine::create(std::move(parts));
  return chat;
}

void ChatModel::check_device(const fs::path& checkpoint, const ChatModelOptions& options) {
  const auto source = open_source(checkpoint);
  const EnginePlan plan = plan_engine(*source, options.load.build);
  if (!plan.target.starts_with("cuda:")) return;
  const auto backend =
      make_backend(plan.target, plan.activation_precision, options.load.num_threads);
  plan_device(plan, engine_bytes(*source, plan), *backend, options);
}

std::vector<int32_t> ChatModel::encode_chat(ChatRequest request) const {
  request.roles = roles_;
  normalize_tool_calls(request.messages, /*parse_arguments=*/!template_.is_built_in());
  const RenderedSegments rendered = template_.render(request);
  std::vector<Tokenizer::Segment> segments;
  for (const RenderedSegment& segment : rendered)
    segments.push_back({segment.text, segment.is_template});
  return tokenizer_.encode_segments(segments);
}

std::vector<int32_t> ChatModel::encode_prompt(std::string_view text) const {
  return tokenizer_.encode(text, /*parse_special=*/true, /*add_bos=*/true);
}

Generated generate(ChatModel& model, std::vector<int32_t> prompt, const SamplingParams& params,
                   std::optional<int> max_tokens, const std::vector<std::string>& stop,
                   const std::function<void(std::string_view)>& on_text) {
  struct News {
    std::vector<int32_t> tokens;
    std::optional<FinishReason> finish_reason;
    std::string error;
    Usage usage;
  };
  struct Inbox {
    std::mutex mutex;
    std::condition_variable arrived;
    std::deque<News> news;
  };
  const auto inbox = std::make_shared<Inbox>();
  Request request;
  request.prompt_tokens = std::move(prompt);
  request.params = params;
  request.max_tokens = max_tokens;
  request.sink = [inbox](const TokenEvent& event) {
    {
      const std::lock_guard lock(inbox->mutex);
      inbox->news.push_back({{event.tokens.begin(), event.tokens.end()},
                             event.finish_reason,
                             std::string(event.error),
                             event.usage});
    }
    inbox->arrived.notify_one();
  };
  const Submitted submitted = model.engine().submit(std::move(request));
  if (!submitted)
    fail(ErrorKind::kLimit, "the engine takes no request now: {}", model.engine().failure());

  Generated result;
  Detokenizer detokenizer(model.tokenizer(), {.stop = stop});
  const auto show = [&](const std::string& text) {
    if (text.empty()) return;
    result.text += text;
    if (on_text) on_text(text);
  };
  bool cancelled = false;
  for (bool ended = false; !ended;) {
    News news;
    {
      std::unique_lock lock(inbox->mutex);
      while (inbox->news.empty()) {
        inbox->arrived.wait_for(lock, std::chrono::milliseconds(100));
        if (interrupt_requested() && !cancelled) {
          cancelled = true;
          model.engine().cancel(submitted.id);
        }
      }
      news = std::move(inbox->news.front());
      inbox->news.pop_front();
    }
    result.usage = news.usage;
    for (size_t i = 0; i < news.tokens.size(); ++i) {
      result.tokens.push_back(news.tokens[i]);
      const bool is_end = news.finish_reason && *news.finish_reason == FinishReason::kEos &&
                          i + 1 == news.tokens.size();
      if (!is_end && !detokenizer.stopped()) show(detokenizer.push(news.tokens[i]));
    }
    if (detokenizer.stopped() && !cancelled && !news.finish_reason) {
      cancelled = true;
      model.engine().cancel(submitted.id);
    }
    if (!news.finish_reason) continue;
    ended = true;
    result.finish_reason = *news.finish_reason;
    if (result.finish_reason == FinishReason::kError) fail(ErrorKind::kInternal, "{}", news.error);
  }
  result.stopped_by_string = detokenizer.stopped();
  if (!detokenizer.stopped()) show(detokenizer.flush());
  return result;
}

}  // namespace nibble
