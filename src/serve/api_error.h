// What a client is told when its request cannot be served: a status and OpenAI's nested error body.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "base/error.h"
#include "serve/http.h"

namespace nibble {

class ApiError : public std::runtime_error {
 public:
  int status = 500;
  std::string type = "server_error";
  std::string code;          // empty: null
  std::string param;         // the field at fault; empty: null
  int retry_after_s = 0;     // 0: no Retry-After header
  std::string authenticate;  // WWW-Authenticate of a 401
  std::string allow;         // Allow of a 405

  using std::runtime_error::runtime_error;

  static ApiError bad_request(std::string_view param, const std::string& message);  // 400
  static ApiError unsupported(std::string_view param, const std::string& message);  // 400
  static ApiError unauthorized(const std::string& message);                         // 401
  static ApiError not_found(std::string_view code, const std::string& message);     // 404
  static ApiError queue_full(const std::string& message);                           // 429
  static ApiError unavailable(const std::string& message, int retry_after_s);       // 503
  /// Input, limit and unsupported errors are the client's (400), the rest ours (500). What the
  /// engine says about its context length gets the code clients look for.
  static ApiError from(const Error& error, std::string_view param = {});
  /// The error of a reply that has no request (http_server.cpp makes these).
  static ApiError from_status(int status, std::string_view message);

  /// {"error": {"message", "type", "param", "code"}}
  std::string body() const;
  HttpResponse response() const;
};

}  // namespace nibble
