// The only file that knows Boost.Beast and Asio (37 s and 1.3 GB to compile: keep it so). Beast
// parses requests; replies are written by hand. A connection is one coroutine, plus one that keeps
// a read pending while a reply is made: that read is how a peer that leaves is noticed, and
// whatever it brings is the start of the next request.
//
// Time limits are deadlines looked at ten times a second, not timers of Beast's tcp_stream: those
// stay armed on a pending read and cut healthy streams. SPDX-License-Identifier: Apache-2.0
#include "serve/http.h"

#include <openssl/ssl.h>
#include <sys/resource.h>

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/stream_traits.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/status.hpp>
#include <boost/beast/http/string_body.hpp>
#include <condition_variable>
#include <ctime>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_set>
#include <utility>

#include "base/error.h"

namespace nibble {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kWritePieceBytes = 64 << 10;
constexpr size_t kPipelineBytes = 16 << 10;  // read ahead of a reply; more waits in the kernel
constexpr size_t kRefusalConnections = 256;  // beyond max_connections, only to be told so
constexpr size_t kLingerBytes = 1 << 20;

asio::redirect_error_t<asio::use_awaitable_t<>> into(error_code& ec) {
  return {asio::use_awaitable, ec};
}

const std::string& date_now() {
  static std::string text;  // I/O thread
  static std::time_t at = 0;
  const std::time_t now = std::time(nullptr);
  if (now != at) {
    at = now;
    std::tm parts{};
    gmtime_r(&now, &parts);
    char buffer[64];
    text.assign(buffer, std::strftime(buffer, sizeof buffer, "%a, %d %b %Y %H:%M:%S GMT", &parts));
  }
  return text;
}

enum class Framing { kLength, kChunked, kUntilClose };

std::string reply_head(const HttpResponse& response, Framing framing, bool keep_alive) {
  const auto reason = http::obsolete_reason(static_cast<http::status>(response.status));
  std::string out = fmt::format("HTTP/1.1 {} {}\r\nDate: {}\r\n", response.status,
                                std::string_view(reason.data(), reason.size()), date_now());
  if (!response.content_type.empty())
    out += fmt::format("Content-Type: {}\r\n", response.content_type);
  for (const HttpHeader& header : response.headers)
    out += fmt::format("{}: {}\r\n", header.name, header.value);
  if (framing == Framing::kChunked) out += "Transfer-Encoding: chunked\r\n";
  if (framing == Framing::kLength && response.status != 204)
    out += fmt::format("Content-Length: {}\r\n", response.body.size());
  if (!keep_alive) out += "Connection: close\r\n";
  out += "\r\n";
  return out;
}

class Session {
 public:
  virtual ~Session() = default;
  virtual void close() = 0;  // pending operations end with an error
  void wake() { wake_.cancel(); }

  Clock::time_point deadline = Clock::time_point::max();
  bool waiting_for_request = false;  // nothing of the next request has come
  bool writing = false;              // what the deadline is about
  Clock::time_point write_since;
  bool gone = false;  // the peer left, or we cut it

 protected:
  explicit Session(asio::io_context& io) : wake_(io, Clock::time_point::max()) {}
  asio::steady_timer wake_;
};

struct Shared {  // what sessions need of the server; outlives them
  HttpOptions options;
  HttpServer::Callbacks callbacks;
  HttpStats stats;
  uint64_t body_bytes = 0;  // of bodies being read and not taken yet
  bool draining = false;
};

/// A body's share of Shared::body_bytes; gives itself back.
struct BodyCharge {
  explicit BodyCharge(Shared& shared) : shared(&shared) {}
  BodyCharge(const BodyCharge&) = delete;
  BodyCharge& operator=(const BodyCharge&) = delete;
  ~BodyCharge() { release(); }
  void release() {
    // An exchange may be dropped on any thread once it is done, and then has nothing to give back.
    if (bytes != 0) shared->body_bytes -= std::exchange(bytes, 0);
  }

  Shared* shared;
  uint64_t bytes = 0;
};

class Exchange final : public HttpExchange {
 public:
  Exchange(Session* session, Shared& shared, BodyCharge& charge, bool is_http11, bool is_head,
           bool keep_alive)
      : session_(session),
        shared_(shared),
        body_charge_(shared),
        is_http11_(is_http11),
        is_head_(is_head),
        keep_alive_(keep_alive) {
    std::swap(body_charge_.bytes, charge.bytes);
  }

  void respond(HttpResponse response) override {
    if (state_ != State::kWaiting || session_ == nullptr) return;
    status_ = response.status;
    append(reply_head(response, Framing::kLength, keep_alive_));
    if (!is_head_) append(response.body);
    finish_reply();
  }

  void begin_stream(HttpResponse head) override {
    if (state_ != State::kWaiting || session_ == nullptr) return;
    status_ = head.status;
    if (!is_http11_) keep_alive_ = false;
    const std::string body = std::move(head.body);
    append(reply_head(head, is_http11_ ? Framing::kChunked : Framing::kUntilClose, keep_alive_));
    state_ = State::kStreaming;
    if (!body.empty()) write(body);
    session_->wake();
  }

  void write(std::string_view data) override {
    if (state_ != State::kStreaming || session_ == nullptr || session_->gone || data.empty())
      return;
    const bool full = out.size() > shared_.options.stream_queue_bytes;
    const bool stalled =
        session_->writing && Clock::now() - session_->write_since > milliseconds(1000);
    if ((full && stalled) || out.size() > 16 * shared_.options.stream_queue_bytes) {
      ++shared_.stats.slow_readers_cut;
      session_->close();
      return;
    }
    if (is_http11_) append(fmt::format("{:x}\r\n", data.size()));
    append(data);
    if (is_http11_) append("\r\n");
    if (!session_->writing) session_->wake();
  }

  void end_stream() override {
    if (state_ != State::kStreaming || session_ == nullptr) return;
    if (is_http11_) append("0\r\n\r\n");
    finish_reply();
  }

  void release_body() override {
    request.body = {};
    body_charge_.release();
  }
  bool is_open() const override {
    return session_ != nullptr && !session_->gone && state_ != State::kEnded;
  }
  int status() const override { return status_; }
  uint64_t bytes_queued() const override { return bytes_; }

  bool ended() const { return state_ == State::kEnded; }
  bool keep_alive() const { return keep_alive_; }
  void close_after_reply() { keep_alive_ = false; }
  void done(bool complete) {
    if (session_ == nullptr) return;
    session_ = nullptr;
    body_charge_.release();
    if (const auto callback = std::move(on_done)) callback(complete);
  }

  std::string out;  // what the session has not taken yet

 private:
  enum class State { kWaiting, kStreaming, kEnded };
  void append(std::string_view data) {
    out += data;
    bytes_ += data.size();
  }
  void finish_reply() {
    state_ = State::kEnded;
    session_->wake();
  }

  Session* session_;  // null once done
  Shared& shared_;
  BodyCharge body_charge_;
  const bool is_http11_, is_head_;
  bool keep_alive_;
  State state_ = State::kWaiting;
  int status_ = 0;
  uint64_t bytes_ = 0;
};

template <class Stream>
class SessionOn final : public Session, public std::enable_shared_from_this<SessionOn<Stream>> {
 public:
  static constexpr bool kTls = !std::is_same_v<Stream, tcp::socket>;

  template <class... Args>
  SessionOn(asio::io_context& io, Shared& shared, bool refuse, std::string remote, Args&&... stream)
      : Session(io),
        io_(io),
        shared_(shared),
        refuse_(refuse),
        remote_(std::move(remote)),
        stream_(std::forward<Args>(stream)...),
        buffer_(shared.options.max_header_bytes + (128 << 10)) {}

  void close() override {
    error_code ignored;
    beast::get_lowest_layer(stream_).close(ignored);
    gone = true;
    wake();
  }

  asio::awaitable<void> run() {
    error_code ec;
    set_deadline(shared_.options.header_timeout);
    if constexpr (kTls) {
      co_await stream_.async_handshake(asio::ssl::stream_base::server, into(ec));
      if (ec) co_return;
    }
    if (refuse_) {
      co_await reject(503, "too many connections");
      co_return;
    }
    bool again = true;
    while (again) again = co_await serve_one();
    if constexpr (kTls) {
      if (!gone && !reading_) {
        set_deadline(milliseconds(1000));
        co_await stream_.async_shutdown(into(ec));
      }
    }
  }

  /// After run(), however it ended.
  void finish() {
    close();
    if (exchange_) exchange_->done(false);
    exchange_.reset();
  }

 private:
  void set_deadline(milliseconds time) { deadline = Clock::now() + time; }

  /// Counts the body read so far against what all of them may take. False: too much.
  bool charge_body(size_t bytes) {
    shared_.body_bytes += bytes - body_charge_.bytes;
    body_charge_.bytes = bytes;
    return shared_.body_bytes <= shared_.options.max_pending_body_bytes;
  }

  asio::awaitable<void> wait() {
    error_code ignored;
    wake_.expires_at(Clock::time_point::max());
    co_await wake_.async_wait(into(ignored));
  }

  asio::awaitable<bool> serve_one() {
    const bool has_input = co_await await_input();
    if (!has_input) co_return false;
    std::optional<http::request_parser<http::string_body>> parser;
    parser.emplace();
    parser->header_limit(static_cast<uint32_t>(shared_.options.max_header_bytes));
    parser->body_limit(shared_.options.max_body_bytes);
    error_code ec;
    set_deadline(shared_.options.header_timeout);
    co_await http::async_read_header(stream_, buffer_, *parser, into(ec));
    if (!ec && parser->get().version() >= 11 && parser->get().count(http::field::host) != 1) {
      co_await reject(400, "an HTTP/1.1 request needs exactly one Host header");
      co_return false;
    }
    if (!ec) {
      if (parser->get()[http::field::expect] == "100-continue") {
        co_await asio::async_write(stream_, asio::buffer(kContinue, sizeof kContinue - 1),
                                   into(ec));
        if (ec) co_return false;
      }
      set_deadline(shared_.options.body_timeout);
      while (!ec && !parser->is_done()) {
        co_await http::async_read_some(stream_, buffer_, *parser, into(ec));
        const bool fits = charge_body(parser->get().body().size());
        if (!fits) {
          parser.reset();
          body_charge_.release();
          co_await reject(503, "too many request bodies are being read; retry in a moment");
          co_return false;
        }
      }
    }
    if (ec) {
      parser.reset();
      body_charge_.release();
      co_await explain(ec);
      co_return false;
    }
    make_exchange(parser->get(), parser->keep_alive());
    parser.reset();
    if (buffer_.size() == 0) buffer_.shrink_to_fit();  // a body's 64 KiB
    call_handler();
    if (buffer_.size() < kPipelineBytes) {
      reading_ = true;
      asio::co_spawn(io_, watch(this->shared_from_this()), [](std::exception_ptr) {});
    }
    co_await write_reply();
    const std::shared_ptr<Exchange> exchange = std::move(exchange_);
    exchange_.reset();
    exchange->done(!gone);
    co_return !gone && !peer_eof_ && exchange->keep_alive() && !shared_.draining;
  }

  /// False when no further request comes.
  asio::awaitable<bool> await_input() {
    waiting_for_request = true;
    deadline =
        Clock::now() + (first_ ? shared_.options.header_timeout : shared_.options.idle_timeout);
    first_ = false;
    while (reading_ && buffer_.size() == 0 && !gone) co_await wait();
    if (gone) co_return false;
    if (reading_) {  // part of a request is here and the watcher wants more: end its read
      if constexpr (kTls) co_return false;
      stopping_watch_ = true;
      beast::get_lowest_layer(stream_).cancel();
      while (reading_ && !gone) co_await wait();
      stopping_watch_ = false;
      if (gone) co_return false;
    }
    if (buffer_.size() == 0) {
      error_code ec;
      const size_t count = co_await stream_.async_read_some(buffer_.prepare(4096), into(ec));
      if (ec) co_return false;
      buffer_.commit(count);
    }
    waiting_for_request = false;
    co_return true;
  }

  /// The read that is pending while a reply is made.
  asio::awaitable<void> watch([[maybe_unused]] std::shared_ptr<SessionOn> self) {
    while (!gone && exchange_ && buffer_.size() < kPipelineBytes) {
      error_code ec;
      const size_t count = co_await stream_.async_read_some(buffer_.prepare(4096), into(ec));
      if (ec) {
        // Who has shut down its side after a whole request still gets a reply that is ready.
        if (ec == asio::error::eof && exchange_ && exchange_->ended())
          peer_eof_ = true;
        else if (!stopping_watch_)
          gone = true;
        break;
      }
      buffer_.commit(count);
    }
    reading_ = false;
    wake();
  }

  asio::awaitable<void> write_reply() {
    const std::shared_ptr<Exchange> exchange = exchange_;
    error_code ec;
    while (!gone) {
      if (exchange->out.empty()) {
        if (exchange->ended()) break;
        deadline = Clock::time_point::max();
        co_await wait();
        continue;
      }
      in_flight_.clear();
      in_flight_.swap(exchange->out);
      writing = true;
      for (size_t at = 0; at < in_flight_.size() && !gone;) {
        write_since = Clock::now();
        deadline = write_since + shared_.options.write_timeout;
        const size_t count = std::min(kWritePieceBytes, in_flight_.size() - at);
        co_await asio::async_write(stream_, asio::buffer(in_flight_.data() + at, count), into(ec));
        if (ec) gone = true;
        at += count;
      }
      writing = false;
    }
    if (in_flight_.capacity() > 4 * kWritePieceBytes) in_flight_ = {};
  }

  void make_exchange(http::request<http::string_body>& message, bool keep_alive) {
    exchange_ = std::make_shared<Exchange>(
        this, shared_, body_charge_, message.version() >= 11, message.method() == http::verb::head,
        keep_alive && message.version() >= 11 && !shared_.draining);
    HttpRequest& request = exchange_->request;
    const auto text = [](beast::string_view view) { return std::string(view.data(), view.size()); };
    request.method = text(message.method_string());
    std::string target = text(message.target());
    if (!target.starts_with("/")) {  // absolute form
      const size_t scheme = target.find("://");
      const size_t slash = scheme == target.npos ? target.npos : target.find('/', scheme + 3);
      if (slash != target.npos) target.erase(0, slash);
    }
    const size_t question = target.find('?');
    if (question != target.npos) {
      request.query = target.substr(question + 1);
      target.resize(question);
    }
    request.path = std::move(target);
    for (const auto& field : message)
      request.headers.push_back({text(field.name_string()), text(field.value())});
    request.body = std::move(message.body());
    request.remote = remote_;
  }

  void call_handler() {
    const std::shared_ptr<Exchange> exchange = exchange_;
    try {
      shared_.callbacks.handler(exchange);
    } catch (const std::exception& error) {
      exchange->respond(shared_.callbacks.error_reply(500, error.what()));
    }
  }

  asio::awaitable<void> explain(error_code ec) {
    if (gone) co_return;
    if (ec == http::error::body_limit) {
      co_await reject(
          413, fmt::format("the body is larger than {} bytes", shared_.options.max_body_bytes));
    } else if (ec == http::error::header_limit || ec == http::error::buffer_overflow) {
      co_await reject(431, fmt::format("the request's head is larger than {} bytes",
                                       shared_.options.max_header_bytes));
    } else if (ec.category() == error_code(http::error::bad_method).category() &&
               ec != http::error::end_of_stream && ec != http::error::partial_message) {
      co_await reject(400, "not an HTTP/1.1 request: " + ec.message());
    }
  }

  /// Replies without an exchange, then reads on for a moment: closing with unread input would reset
  /// the connection and the peer might never see the reply.
  asio::awaitable<void> reject(int status, std::string message) {
    if (status != 503) ++shared_.stats.bad_requests;
    const HttpResponse response = shared_.callbacks.error_reply(status, message);
    in_flight_ = reply_head(response, Framing::kLength, false) + response.body;
    error_code ec;
    set_deadline(milliseconds(2000));
    co_await asio::async_write(stream_, asio::buffer(in_flight_), into(ec));
    if constexpr (!kTls) {
      if (!ec) stream_.shutdown(tcp::socket::shutdown_send, ec);
    }
    buffer_.clear();
    for (size_t total = 0; !ec && !gone && total < kLingerBytes;) {
      total += co_await stream_.async_read_some(buffer_.prepare(16 << 10), into(ec));
    }
  }

  static constexpr char kContinue[] = "HTTP/1.1 100 Continue\r\n\r\n";

  asio::io_context& io_;
  Shared& shared_;
  const bool refuse_;
  const std::string remote_;
  Stream stream_;
  beast::flat_buffer buffer_;
  bool first_ = true;
  bool reading_ = false;  // the watcher's read is pending
  bool stopping_watch_ = false;
  bool peer_eof_ = false;
  std::string in_flight_;
  BodyCharge body_charge_{shared_};  // of the request being read
  std::shared_ptr<Exchange> exchange_;
};

class Server final : public HttpServer {
 public:
  Server(const HttpOptions& options, Callbacks callbacks)
      : acceptor_(io_), sweep_timer_(io_), accept_pause_(io_) {
    shared_.options = options;
    shared_.callbacks = std::move(callbacks);
    if (!options.tls_cert.empty() || !options.tls_key.empty()) tls_ = load_certificate();
    listen();
    asio::co_spawn(io_, accept_loop(), [](std::exception_ptr) {});
    asio::co_spawn(io_, sweep(), [](std::exception_ptr) {});
    thread_ = std::thread([this] { io_.run(); });
  }
  ~Server() override { stop(); }

  int port() const override { return port_; }

  void post(std::function<void()> action) override { asio::post(io_, std::move(action)); }

  HttpStats stats() const override {
    HttpStats stats = shared_.stats;
    stats.connections = static_cast<int>(sessions_.size());
    return stats;
  }

  void reload_certificate() override {
    if (shared_.options.tls_cert.empty()) return;
    post([this, fresh = load_certificate()] { tls_ = fresh; });
  }

  void stop_accepting() override {
    asio::post(io_, [this] {
      shared_.draining = true;
      error_code ignored;
      acceptor_.close(ignored);
      for (Session* session : sessions_) {
        if (session->waiting_for_request) session->close();
      }
    });
  }

  bool wait_idle(milliseconds timeout) override {
    std::unique_lock lock(idle_mutex_);
    return idle_.wait_for(lock, timeout, [this] { return num_sessions_ == 0; });
  }

  void stop() override {
    if (!thread_.joinable()) return;
    stop_accepting();
    asio::post(io_, [this] {
      stopping_ = true;
      sweep_timer_.cancel();
      accept_pause_.cancel();
      for (Session* session : sessions_) session->close();
    });
    wait_idle(milliseconds(2000));
    io_.stop();
    thread_.join();
  }

 private:
  std::shared_ptr<asio::ssl::context> load_certificate() const {
    const HttpOptions& options = shared_.options;
    if (options.tls_cert.empty() || options.tls_key.empty()) {
      fail(ErrorKind::kUsage, "TLS needs both --tls-cert and --tls-key");
    }
    auto tls = std::make_shared<asio::ssl::context>(asio::ssl::context::tls_server);
    error_code ec;
    tls->set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_sslv2 |
                     asio::ssl::context::no_sslv3 | asio::ssl::context::no_tlsv1 |
                     asio::ssl::context::no_tlsv1_1);
    SSL_CTX_set_mode(tls->native_handle(), SSL_MODE_RELEASE_BUFFERS);
    tls->use_certificate_chain_file(options.tls_cert, ec);
    if (ec)
      fail(ErrorKind::kInput, "{}: not a PEM certificate chain: {}", options.tls_cert,
           ec.message());
    tls->use_private_key_file(options.tls_key, asio::ssl::context::pem, ec);
    if (ec)
      fail(ErrorKind::kInput, "{}: not the certificate's PEM private key: {}", options.tls_key,
           ec.message());
    return tls;
  }

  void listen() {
    const HttpOptions& options = shared_.options;
    error_code ec;
    tcp::resolver resolver(io_);
    const auto found = resolver.resolve(options.host, std::to_string(options.port), ec);
    if (ec || found.empty()) fail(ErrorKind::kUsage, "--host {}: {}", options.host, ec.message());
    const tcp::endpoint endpoint = found.begin()->endpoint();
    acceptor_.open(endpoint.protocol(), ec);
    if (!ec) acceptor_.set_option(tcp::acceptor::reuse_address(true), ec);
    if (!ec) acceptor_.bind(endpoint, ec);
    if (!ec) acceptor_.listen(4096, ec);
    if (ec) {
      fail(ErrorKind::kIo, "cannot listen on {}:{}: {}; choose another --host or --port",
           options.host, options.port, ec.message());
    }
    port_ = acceptor_.local_endpoint().port();
  }

  asio::awaitable<void> accept_loop() {
    while (acceptor_.is_open()) {
      error_code ec;
      tcp::socket socket(io_);
      co_await acceptor_.async_accept(socket, into(ec));
      if (ec == asio::error::operation_aborted) co_return;
      if (ec) {  // out of file descriptors: those who wait stay in the kernel's queue
        accept_pause_.expires_after(milliseconds(50));
        co_await accept_pause_.async_wait(into(ec));
        continue;
      }
      open_session(std::move(socket));
    }
  }

  void open_session(tcp::socket socket) {
    const size_t limit = static_cast<size_t>(shared_.options.max_connections);
    const bool refuse = sessions_.size() >= limit;
    if (refuse) ++shared_.stats.refused;
    if (sessions_.size() >= limit + kRefusalConnections) return;
    ++shared_.stats.accepted;
    error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    socket.set_option(asio::socket_base::keep_alive(true), ignored);
    socket.set_option(asio::socket_base::send_buffer_size(shared_.options.send_buffer_bytes),
                      ignored);
    const tcp::endpoint peer = socket.remote_endpoint(ignored);
    std::string remote = ignored ? std::string() : peer.address().to_string();
    if (tls_) {
      start(std::make_shared<SessionOn<asio::ssl::stream<tcp::socket>>>(
          io_, shared_, refuse, std::move(remote), std::move(socket), *tls_));
    } else {
      start(std::make_shared<SessionOn<tcp::socket>>(io_, shared_, refuse, std::move(remote),
                                                     std::move(socket)));
    }
  }

  template <class S>
  void start(const std::shared_ptr<S>& session) {
    sessions_.insert(session.get());
    count_sessions();
    asio::co_spawn(io_, session->run(), [this, session](std::exception_ptr) {
      session->finish();
      sessions_.erase(session.get());
      count_sessions();
    });
  }

  void count_sessions() {
    {
      const std::lock_guard lock(idle_mutex_);
      num_sessions_ = sessions_.size();
    }
    if (sessions_.empty()) idle_.notify_all();
  }

  asio::awaitable<void> sweep() {
    while (!stopping_) {
      error_code ec;
      sweep_timer_.expires_after(milliseconds(100));
      co_await sweep_timer_.async_wait(into(ec));
      const Clock::time_point now = Clock::now();
      for (Session* session : sessions_) {
        if (session->gone || now < session->deadline) continue;
        ++(session->writing ? shared_.stats.slow_readers_cut : shared_.stats.timeouts);
        session->close();
      }
      if (shared_.callbacks.tick && !stopping_) shared_.callbacks.tick();
    }
  }

  Shared shared_;
  /// Null without TLS. OpenSSL counts references: a session outlives a replaced one.
  std::shared_ptr<asio::ssl::context> tls_;
  asio::io_context io_{1};
  tcp::acceptor acceptor_;
  asio::steady_timer sweep_timer_, accept_pause_;
  int port_ = 0;
  bool stopping_ = false;
  std::unordered_set<Session*> sessions_;
  std::mutex idle_mutex_;
  std::condition_variable idle_;
  size_t num_sessions_ = 0;
  std::thread thread_;
};

bool equal_ignoring_case(std::string_view a, std::string_view b) {
  const auto lower = [](char c) {
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  };
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(),
                                            [&](char x, char y) { return lower(x) == lower(y); });
}

}  // namespace

std::string_view HttpRequest::header(std::string_view name) const {
  for (const HttpHeader& header : headers) {
    if (equal_ignoring_case(header.name, name)) return header.value;
  }
  return {};
}

std::unique_ptr<HttpServer> HttpServer::start(const HttpOptions& options, Callbacks callbacks) {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  return std::make_unique<Server>(options, std::move(callbacks));
}

}  // namespace nibble
