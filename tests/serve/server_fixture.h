// A whole server over an engine built from models/nano, for tests that talk to it as clients do.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "serve/api_server.h"
#include "serve/client.h"

namespace nibble::serve_test {

/// The engine directory, built once per process (unquantized, 1000 + 400 tokens, batches of 16).
const fs::path& nano_engine();

struct ServerSetup {
  ApiOptions api;
  int max_queue = 256;
  int kv_cache_sequences = 8;
  RolePolicy roles = RolePolicy::kTolerant;
  bool with_model = true;
};

class ServerTest : public ::testing::Test {
 protected:
  void start(ServerSetup setup = {});
  void TearDown() override;

  int port() const { return server_->port(); }
  EngineStats stats() const { return server_->model()->engine().stats(); }
  std::string metrics() { return get(port(), "/metrics").body; }
  /// Value of the first sample whose line begins with `name`; -1 without one.
  double metric(const std::string& name);
  std::vector<std::string> log_lines();

  Reply chat(const std::string& fields) {
    return post(port(), "/v1/chat/completions", chat_body(fields));
  }
  Reply complete(const std::string& fields) {
    return post(port(), "/v1/completions", "{" + fields + "}");
  }
  /// {"messages": one question, fields}
  static std::string chat_body(const std::string& fields);
  /// Waits until `condition` holds, at most a minute.
  static bool eventually(const std::function<bool()>& condition);
  /// No sequence, no queued request and no KV block is held.
  bool is_empty() const;

  std::unique_ptr<ApiServer> server_;
  std::mutex log_mutex_;
  std::vector<std::string> log_;
};

/// The text of a chat stream's choice `index`.
std::string streamed_text(const std::vector<std::string>& events, int index = 0);
std::string text_of(const json::value& value);  // of a JSON string

}  // namespace nibble::serve_test
