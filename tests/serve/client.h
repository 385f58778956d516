// A blocking HTTP client over a real socket, for tests that need to misbehave: send half a request,
// read slowly, vanish. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <openssl/ssl.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace nibble::serve_test {

struct Reply {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined

  json::value json() const;
  /// The payloads of "data: " lines of an event stream, "[DONE]" included.
  std::vector<std::string> events() const;
};

class Client {
 public:
  /// receive_buffer_bytes: small values make the server's writes stall early.
  explicit Client(int port, bool tls = false, int receive_buffer_bytes = 0);
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client();

  /// Sends bytes as they are; false when the peer has closed.
  bool send(std::string_view bytes);
  /// One whole reply. status 0 when the connection ended or a minute passed before it was
  /// complete; what came is in `body` then. `without_body`: of a HEAD request.
  Reply read_reply(bool without_body = false);
  /// Whatever arrives next, at most 64 KiB; empty at the end of the connection or after a timeout.
  std::string read_some(int timeout_ms = 60'000);
  /// Reads until `text` has come; false at the end of the connection or after a minute.
  bool read_until(std::string_view text);
  /// True when the server closes the connection within the time (what it still sends is dropped).
  bool closed_within(int timeout_ms);
  /// What the TLS server showed, as DER.
  std::string peer_certificate() const;
  void shutdown_send();
  void close();  // at once, unread data or not

  Reply get(std::string_view path, std::string_view headers = {});
  Reply post(std::string_view path, std::string_view body, std::string_view headers = {});
  bool send_post(std::string_view path, std::string_view body, std::string_view headers = {});

 private:
  bool fill(int timeout_ms);  // reads more into buffer_
  int socket_ = -1;
  SSL_CTX* context_ = nullptr;
  SSL* ssl_ = nullptr;
  std::string buffer_;
};

/// A connection of its own for one request.
Reply get(int port, std::string_view path, std::string_view headers = {});
Reply post(int port, std::string_view path, std::string_view body, std::string_view headers = {});

}  // namespace nibble::serve_test
