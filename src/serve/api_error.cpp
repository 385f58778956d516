// SPDX-License-Identifier: Apache-2.0
#include "serve/api_error.h"

#include "base/json.h"
#include "text/utf8.h"

namespace nibble {
namespace {

ApiError make(int status, std::string_view type, std::string_view code, std::string_view param,
              const std::string& message) {
  ApiError error(message);
  error.status = status;
  error.type = type;
  error.code = code;
  error.param = param;
  return error;
}

/// A message may quote what a client sent, which need not be UTF-8.
std::string valid_text(std::string_view text) {
  std::string out;
  utf8::append_lossy(out, text);
  return out;
}

json::value text_or_null(const std::string& text) {
  if (text.empty()) return nullptr;
  return json::string(valid_text(text));
}

}  // namespace

ApiError ApiError::bad_request(std::string_view param, const std::string& message) {
  return make(400, "invalid_request_error", "", param, message);
}

ApiError ApiError::unsupported(std::string_view param, const std::string& message) {
  return make(400, "invalid_request_error", "unsupported_value", param, message);
}

ApiError ApiError::unauthorized(const std::string& message) {
  ApiError error = make(401, "invalid_request_error", "invalid_api_key", "", message);
  error.authenticate = "Bearer";
  return error;
}

ApiError ApiError::not_found(std::string_view code, const std::string& message) {
  return make(404, "invalid_request_error", code, "", message);
}

ApiError ApiError::queue_full(const std::string& message) {
  ApiError error = make(429, "rate_limit_exceeded", "rate_limit_exceeded", "", message);
  error.retry_after_s = 1;
  return error;
}

ApiError ApiError::unavailable(const std::string& message, int retry_after_s) {
  ApiError error = make(503, "server_error", "service_unavailable", "", message);
  error.retry_after_s = retry_after_s;
  return error;
}

ApiError ApiError::from(const Error& error, std::string_view param) {
  switch (error.kind()) {
    case ErrorKind::kLimit: {
      const bool context =
          std::string_view(error.what()).find("maximum context length") != std::string_view::npos;
      return make(400, "invalid_request_error",
                  context ? "context_length_exceeded" : "limit_exceeded", param, error.what());
    }
    case ErrorKind::kInput: return bad_request(param, error.what());
    case ErrorKind::kUnsupported: return unsupported(param, error.what());
    default: return make(500, "server_error", "internal_error", "", error.what());
  }
}

ApiError ApiError::from_status(int status, std::string_view message) {
  ApiError error = make(status, status >= 500 ? "server_error" : "invalid_request_error", "", "",
                        std::string(message));
  switch (status) {
    case 413: error.code = "request_too_large"; break;
    case 431: error.code = "headers_too_large"; break;
    case 503:
      error.code = "service_unavailable";
      error.retry_after_s = 1;
      break;
    default: break;
  }
  return error;
}

std::string ApiError::body() const {
  return dump_json(json::object{{"error", json::object{{"message", valid_text(what())},
                                                       {"type", type},
                                                       {"param", text_or_null(param)},
                                                       {"code", text_or_null(code)}}}},
                   {.item_separator = ",", .key_separator = ":"});
}

HttpResponse ApiError::response() const {
  HttpResponse response{.status = status, .body = body()};
  if (retry_after_s > 0) {
    response.headers.push_back({"Retry-After", std::to_string(retry_after_s)});
  }
  if (!authenticate.empty()) response.headers.push_back({"WWW-Authenticate", authenticate});
  if (!allow.empty()) response.headers.push_back({"Allow", allow});
  return response;
}

}  // namespace nibble
