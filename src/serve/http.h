// HTTP/1.1 as the API sees it: whole requests in, whole replies or streams out. Knows no JSON, no
// models. Boost.Beast stays in http_server.cpp.
//
// One I/O thread owns every connection. The handler, every HttpExchange method and every callback
// run on it; other threads reach it through HttpServer::post(). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

struct HttpHeader {
  std::string name, value;
};

struct HttpRequest {
  std::string method;  // "GET"
  std::string path;    // target up to '?', as sent
  std::string query;   // after '?'
  std::vector<HttpHeader> headers;
  std::string body;
  std::string remote;  // peer address without port

  /// The first header of that name, whatever its case; empty without one.
  std::string_view header(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::vector<HttpHeader> headers;
  std::string body;
};

/// One request and its reply. Replying to a peer that has gone is allowed and does nothing. Other
/// threads may keep and drop references.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;

  HttpRequest request;
  /// Called exactly once: true when the reply has been handed to the kernel whole, false when the
  /// peer left or was cut before that. Set it in the handler.
  std::function<void(bool complete)> on_done;

  virtual void respond(HttpResponse response) = 0;
  /// Head of a streamed reply (chunked for HTTP/1.1); `head.body` is its first piece.
  virtual void begin_stream(HttpResponse head) = 0;
  /// Queues a piece. A reader that leaves the queue full is cut (HttpOptions::stream_queue_bytes).
  virtual void write(std::string_view data) = 0;
  virtual void end_stream() = 0;

  /// The handler has taken `request.body`, or does not need it: it no longer counts against
  /// HttpOptions::max_pending_body_bytes.
  virtual void release_body() = 0;

  virtual bool is_open() const = 0;           // the reply may still go somewhere
  virtual int status() const = 0;             // of the reply begun; 0 before
  virtual uint64_t bytes_queued() const = 0;  // of the reply so far, head included
};

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8000;                                   // 0: any free one
  std::string tls_cert, tls_key;                     // PEM files; both or none
  int max_connections = 4096;                        // more are answered 503 and closed
  uint64_t max_header_bytes = 32 << 10;              // 431
  uint64_t max_body_bytes = 4 << 20;                 // 413
  uint64_t max_pending_body_bytes = 256 << 20;       // of all bodies not taken yet; 503
  std::chrono::milliseconds header_timeout{10'000};  // a request's head, TLS handshake included
  std::chrono::milliseconds body_timeout{60'000};
  std::chrono::milliseconds idle_timeout{75'000};  // between requests of a connection
  /// 64 KiB of a reply must leave within this time, or the reader is cut.
  std::chrono::milliseconds write_timeout{10'000};
  /// Kept small on purpose: the kernel would otherwise swallow megabytes for a reader that reads
  /// nothing.
  int send_buffer_bytes = 32 << 10;
  /// A stream whose reader leaves more than this unsent for a second is cut; more than 16 times
  /// this cuts at once.
  uint64_t stream_queue_bytes = 64 << 10;
};

struct HttpStats {
  int connections = 0;  // open now
  uint64_t accepted = 0;
  uint64_t refused = 0;       // over max_connections
  uint64_t bad_requests = 0;  // not HTTP, or over a limit; answered here
  uint64_t slow_readers_cut = 0;
  uint64_t timeouts = 0;  // connections closed while waiting for their request
};

class HttpServer {
 public:
  struct Callbacks {
    std::function<void(std::shared_ptr<HttpExchange>)> handler;
    /// The reply to what is not a request (400, 413, 431, 503); adds the API's error body.
    std::function<HttpResponse(int status, std::string_view message)> error_reply;
    std::function<void()> tick;  // about ten times a second
  };

  /// Binds, listens and starts the I/O thread. Throws Error{kIo} (address in use, ...),
  /// Error{kInput} (certificate).
  static std::unique_ptr<HttpServer> start(const HttpOptions& options, Callbacks callbacks);
  virtual ~HttpServer() = default;  // stop()

  virtual int port() const = 0;
  /// Runs `action` on the I/O thread. Thread-safe; ignored after stop().
  virtual void post(std::function<void()> action) = 0;
  virtual HttpStats stats() const = 0;  // I/O thread only

  /// Reads HttpOptions::tls_cert and tls_key again; connections from now on get them. Throws
  /// Error{kInput} and changes nothing when they are no pair. Thread-safe; nothing without TLS.
  virtual void reload_certificate() = 0;

  /// Closes the listening socket and idle connections; replies from now on say "Connection: close".
  /// Thread-safe.
  virtual void stop_accepting() = 0;
  /// Waits until no connection is left. Thread-safe, not on the I/O thread.
  virtual bool wait_idle(std::chrono::milliseconds timeout) = 0;
  /// Cuts what is left and joins the thread.
  virtual void stop() = 0;
};

}  // namespace nibble
