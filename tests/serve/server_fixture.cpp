// SPDX-License-Identifier: Apache-2.0
#include "serve/server_fixture.h"

#include <unistd.h>

#include <chrono>
#include <thread>

#include "base/progress.h"
#include "build/engine_builder.h"
#include "formats/weight_source.h"

namespace nibble::serve_test {

const fs::path& nano_engine() {
  struct Built {
    fs::path path = fs::temp_directory_path() / ("nibble-serve-" + std::to_string(::getpid()));
    Built() {
      fs::remove_all(path);
      const fs::path model = fs::path(NIBBLE_SOURCE_DIR) / "models" / "nano";
      BuildOptions options;
      options.limits = {
          .max_batch_size = 16, .max_input_len = 1000, .max_output_len = 400, .max_num_tokens = 64};
      options.kv_block_tokens = 16;
      SilentProgress progress;
      build_engine(model, *open_hf(model), options, path, progress);
    }
    ~Built() {
      std::error_code ignored;
      fs::remove_all(path, ignored);
    }
  };
  static const Built built;
  return built.path;
}

void ServerTest::start(ServerSetup setup) {
  setup.api.http.port = 0;
  if (setup.api.model_names.empty()) setup.api.model_names = {"nano", "nano-alias"};
  setup.api.access_log = [this](std::string line) {
    const std::lock_guard lock(log_mutex_);
    log_.push_back(std::move(line));
  };
  server_ = ApiServer::start(std::move(setup.api));
  if (!setup.with_model) return;
  ChatModelOptions options;
  options.load.num_threads = 1;
  options.kv_cache_sequences = setup.kv_cache_sequences;
  options.max_queue = setup.max_queue;
  options.roles = setup.roles;
  server_->set_model(ChatModel::open(nano_engine(), options), {});
}

void ServerTest::TearDown() {
  if (server_) server_->stop();
}

double ServerTest::metric(const std::string& name) {
  const std::string text = "\n" + metrics();
  const size_t at = text.find("\n" + name);
  if (at == text.npos) return -1;
  const size_t end = text.find('\n', at + 1);
  return std::stod(text.substr(text.rfind(' ', end) + 1));
}

std::vector<std::string> ServerTest::log_lines() {
  const std::lock_guard lock(log_mutex_);
  return log_;
}

std::string ServerTest::chat_body(const std::string& fields) {
  return R"({"messages":[{"role":"user","content":"What is water?"}])" +
         (fields.empty() ? "" : "," + fields) + "}";
}

bool ServerTest::eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 6000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

bool ServerTest::is_empty() const {
  const EngineStats stats = this->stats();
  return stats.kv_blocks_used == 0 && stats.num_running == 0 && stats.num_waiting == 0 &&
         stats.num_queued == 0;
}

std::string streamed_text(const std::vector<std::string>& events, int index) {
  std::string text;
  for (const std::string& event : events) {
    if (event == "[DONE]") continue;
    const json::value value = parse_json(event, "event");
    for (const auto& choice : value.at("choices").as_array()) {
      if (choice.at("index") != index) continue;
      if (const auto* delta = choice.as_object().if_contains("delta")) {
        if (const auto* content = delta->as_object().if_contains("content")) {
          text += text_of(*content);
        }
      } else {
        text += text_of(choice.at("text"));
      }
    }
  }
  return text;
}

std::string text_of(const json::value& value) { return std::string(value.as_string()); }

}  // namespace nibble::serve_test
