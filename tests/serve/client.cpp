// SPDX-License-Identifier: Apache-2.0
#include "serve/client.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>

namespace nibble::serve_test {
namespace {

// Only what fails waits this long: sanitizers on a busy machine are slow.
constexpr int kPatienceMs = 60'000;

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return out;
}

}  // namespace

json::value Reply::json() const { return parse_json(body, "reply"); }

std::vector<std::string> Reply::events() const {
  std::vector<std::string> out;
  for (size_t at = 0; at < body.size();) {
    const size_t end = body.find("\n\n", at);
    if (end == body.npos) throw std::runtime_error("half an event: " + body.substr(at));
    const std::string event = body.substr(at, end - at);
    if (event.starts_with("data: ")) out.push_back(event.substr(6));
    at = end + 2;
  }
  return out;
}

Client::Client(int port, bool tls, int receive_buffer_bytes) {
  socket_ = ::socket(AF_INET, SOCK_STREAM, 0);
  if (receive_buffer_bytes > 0) {
    ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof(int));
  }
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    ::close(socket_);
    throw std::runtime_error(fmt::format("cannot connect to port {}", port));
  }
  if (tls) {
    context_ = SSL_CTX_new(TLS_client_method());
    ssl_ = SSL_new(context_);
    SSL_set_fd(ssl_, socket_);
    if (SSL_connect(ssl_) != 1) {
      SSL_free(ssl_);
      SSL_CTX_free(context_);
      ::close(socket_);
      throw std::runtime_error("TLS handshake failed");
    }
  }
}

std::string Client::peer_certificate() const {
  X509* certificate = SSL_get1_peer_certificate(ssl_);
  unsigned char* der = nullptr;
  const int size = i2d_X509(certificate, &der);
  std::string out(reinterpret_cast<const char*>(der), static_cast<size_t>(size));
  OPENSSL_free(der);
  X509_free(certificate);
  return out;
}

Client::~Client() { close(); }

void Client::close() {
  if (ssl_ != nullptr) SSL_free(ssl_);
  if (context_ != nullptr) SSL_CTX_free(context_);
  ssl_ = nullptr;
  context_ = nullptr;
  if (socket_ >= 0) ::close(socket_);
  socket_ = -1;
}

bool Client::send(std::string_view bytes) {
  while (!bytes.empty()) {
    const auto count =
        ssl_ != nullptr
            ? static_cast<ssize_t>(SSL_write(ssl_, bytes.data(), static_cast<int>(bytes.size())))
            : ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (count <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(count));
  }
  return true;
}

bool Client::fill(int timeout_ms) {
  if (ssl_ == nullptr || SSL_pending(ssl_) == 0) {
    pollfd waiting{socket_, POLLIN, 0};
    if (::poll(&waiting, 1, timeout_ms) <= 0) return false;
  }
  char data[64 << 10];
  const auto count = ssl_ != nullptr ? static_cast<ssize_t>(SSL_read(ssl_, data, sizeof data))
                                     : ::recv(socket_, data, sizeof data, 0);
  if (count <= 0) return false;
  buffer_.append(data, static_cast<size_t>(count));
  return true;
}

std::string Client::read_some(int timeout_ms) {
  if (buffer_.empty()) fill(timeout_ms);
  return std::exchange(buffer_, {});
}

bool Client::read_until(std::string_view text) {
  while (buffer_.find(text) == buffer_.npos) {
    if (!fill(kPatienceMs)) return false;
  }
  buffer_.erase(0, buffer_.find(text) + text.size());
  return true;
}

bool Client::closed_within(int timeout_ms) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        end - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    pollfd waiting{socket_, POLLIN, 0};
    if (::poll(&waiting, 1, static_cast<int>(left.count())) <= 0) return false;
    char data[64 << 10];
    if (::recv(socket_, data, sizeof data, 0) <= 0) return true;
  }
}

void Client::shutdown_send() { ::shutdown(socket_, SHUT_WR); }

Reply Client::read_reply(bool without_body) {
  Reply reply;
  const auto incomplete = [&] {
    reply.status = 0;
    reply.body += std::exchange(buffer_, {});
    return reply;
  };
  size_t head_end;
  while ((head_end = buffer_.find("\r\n\r\n")) == buffer_.npos) {
    if (!fill(kPatienceMs)) return incomplete();
  }
  const std::string head = buffer_.substr(0, head_end + 2);
  buffer_.erase(0, head_end + 4);
  reply.status = std::stoi(head.substr(9, 3));
  for (size_t at = head.find("\r\n") + 2; at < head.size();) {
    const size_t end = head.find("\r\n", at);
    const size_t colon = head.find(": ", at);
    reply.headers[lower(head.substr(at, colon - at))] = head.substr(colon + 2, end - colon - 2);
    at = end + 2;
  }
  if (reply.status == 100) return read_reply(without_body);
  if (without_body || reply.status == 204 || reply.status == 304) return reply;
  if (reply.headers.contains("transfer-encoding")) {
    while (true) {
      size_t line;
      while ((line = buffer_.find("\r\n")) == buffer_.npos) {
        if (!fill(kPatienceMs)) return incomplete();
      }
      const size_t size = std::stoul(buffer_.substr(0, line), nullptr, 16);
      while (buffer_.size() < line + 2 + size + 2) {
        if (!fill(kPatienceMs)) return incomplete();
      }
      reply.body += buffer_.substr(line + 2, size);
      buffer_.erase(0, line + 2 + size + 2);
      if (size == 0) return reply;
    }
  }
  if (!reply.headers.contains("content-length")) {  // until the end of the connection
    while (fill(kPatienceMs)) {
    }
    reply.body = std::exchange(buffer_, {});
    return reply;
  }
  const size_t size = std::stoul(reply.headers["content-length"]);
  while (buffer_.size() < size) {
    if (!fill(kPatienceMs)) return incomplete();
  }
  reply.body = buffer_.substr(0, size);
  buffer_.erase(0, size);
  return reply;
}

bool Client::send_post(std::string_view path, std::string_view body, std::string_view headers) {
  return send(
      fmt::format("POST {} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{}"
                  "Content-Length: {}\r\n\r\n{}",
                  path, headers, body.size(), body));
}

Reply Client::get(std::string_view path, std::string_view headers) {
  send(fmt::format("GET {} HTTP/1.1\r\nHost: test\r\n{}\r\n", path, headers));
  return read_reply();
}

Reply Client::post(std::string_view path, std::string_view body, std::string_view headers) {
  send_post(path, body, headers);
  return read_reply();
}

Reply get(int port, std::string_view path, std::string_view headers) {
  return Client(port).get(path, headers);
}

Reply post(int port, std::string_view path, std::string_view body, std::string_view headers) {
  return Client(port).post(path, body, headers);
}

}  // namespace nibble::serve_test
