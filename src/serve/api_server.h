// The OpenAI-compatible server: routes, keys, CORS, the hand-over from I/O thread to workers to
// engine and back. docs/http-api.md is its contract with clients.
//
// Threads: one I/O thread (http.h) owns connections, generations and metrics; workers parse,
// template and tokenize; the engine thread makes tokens. Everything crosses by value.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "chat/chat_model.h"
#include "serve/api_keys.h"
#include "serve/api_request.h"
#include "serve/http.h"

namespace nibble {

struct ApiOptions {
  HttpOptions http;
  std::vector<std::string> model_names;   // the first is the one replies use by default
  ApiKeys keys;                           // none: open to everybody
  std::vector<std::string> cors_origins;  // "*": any; none: no CORS headers
  BodyLimits limits;
  int num_workers = 2;
  std::chrono::milliseconds ping_interval{15'000};  // SSE comments into silence; 0: none
  bool web_page = true;
  std::function<void(std::string line)> access_log;  // empty: none. Called on the I/O thread
};

class ApiServer {
 public:
  /// Listens at once; until set_model() every endpoint that needs the model answers 503. Throws
  /// Error{kIo, kUsage, kInput} (address, certificate).
  static std::unique_ptr<ApiServer> start(ApiOptions options);
  virtual ~ApiServer() = default;  // stop()

  /// From now on requests are served. Called once.
  virtual void set_model(std::unique_ptr<ChatModel> model, const SamplingParams& defaults) = 0;
  virtual int port() const = 0;
  virtual bool healthy() const = 0;
  virtual const ChatModel* model() const = 0;  // null before set_model()

  /// From now on these keys count, and connections get the certificate that the files hold now.
  /// Throws Error{kInput} and changes nothing when the certificate is not good.
  virtual void reload(ApiKeys keys) = 0;

  /// Refuses new work (503, /ready too), lets what runs finish, cuts the rest at the deadline, then
  /// closes the listening socket. True when nothing was cut. Not on the I/O thread.
  virtual bool drain(std::chrono::milliseconds deadline) = 0;
  virtual void stop() = 0;
};

}  // namespace nibble
