// The HTTP layer alone, over real sockets: framing, limits, deadlines, peers that leave or stall.
// SPDX-License-Identifier: Apache-2.0
#include "serve/http.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <future>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "serve/client.h"
#include "serve/test_certificate.h"

namespace nibble {
namespace {

using serve_test::Client;
using serve_test::Reply;
using namespace std::chrono_literals;

/// /echo gives the body back; /stream keeps its exchange for the test; /big streams without end.
class HttpTest : public ::testing::Test {
 protected:
  void start(HttpOptions options = {}) {
    options.port = 0;
    server_ = HttpServer::start(
        options, {.handler = [this](std::shared_ptr<HttpExchange> x) { handle(std::move(x)); },
                  .error_reply =
                      [](int status, std::string_view message) {
                        return HttpResponse{.status = status, .body = std::string(message)};
                      },
                  .tick = [this] { tick(); }});
  }
  void TearDown() override {
    if (server_) server_->stop();
  }

  void handle(std::shared_ptr<HttpExchange> exchange) {
    exchange->on_done = [this](bool complete) { ++(complete ? num_complete_ : num_broken_); };
    if (exchange->request.path == "/stream" || exchange->request.path == "/big") {
      exchange->begin_stream({.content_type = "text/event-stream"});
      (exchange->request.path == "/big" ? big_ : held_).push_back(std::move(exchange));
    } else if (exchange->request.path == "/hold") {
      held_.push_back(std::move(exchange));
    } else if (exchange->request.path == "/throw") {
      throw std::runtime_error("handler failed");
    } else {
      exchange->respond({.body = exchange->request.method + " " + exchange->request.path + "?" +
                                 exchange->request.query + " " + exchange->request.body});
    }
  }

  void tick() {
    const std::string piece(16 << 10, 'x');
    for (const auto& exchange : big_) exchange->write(piece);
  }

  template <class Work>
  auto on_io(Work work) {
    std::promise<decltype(work())> promise;
    server_->post([&] { promise.set_value(work()); });
    return promise.get_future().get();
  }
  HttpStats stats() {
    return on_io([&] { return server_->stats(); });
  }
  /// Waits until `condition` holds, at most half a minute.
  template <class Condition>
  static bool eventually(Condition condition) {
    for (int i = 0; i < 3000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(10ms);
    }
    return false;
  }

  std::vector<std::shared_ptr<HttpExchange>> held_, big_;  // I/O thread
  std::atomic<int> num_complete_{0}, num_broken_{0};
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpTest, KeepsAConnectionOverManyRequests) {
  start();
  Client client(server_->port());
  for (int i = 0; i < 3; ++i) {
    const Reply reply = client.post("/echo?a=1&b", "hello");
    EXPECT_EQ(reply.status, 200);
    EXPECT_EQ(reply.body, "POST /echo?a=1&b hello");
  }
  EXPECT_EQ(stats().accepted, 1u);
  EXPECT_TRUE(eventually([&] { return num_complete_ == 3; }));
}

TEST_F(HttpTest, AnswersPipelinedRequestsInOrder) {
  start();
  Client client(server_->port());
  client.send(
      "GET /one HTTP/1.1\r\nHost: x\r\n\r\n"
      "POST /two HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
      "GET /three HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(client.read_reply().body, "GET /one? ");
  EXPECT_EQ(client.read_reply().body, "POST /two? abc");
  EXPECT_EQ(client.read_reply().body, "GET /three? ");
}

TEST_F(HttpTest, KeepsTheNextRequestThatArrivesDuringAStream) {
  start();
  Client client(server_->port());
  client.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\nGET /next HT");
  ASSERT_TRUE(eventually([&] { return on_io([&] { return held_.size(); }) == 1; }));
  std::this_thread::sleep_for(50ms);
  on_io([&] {
    held_[0]->write("data");
    held_[0]->end_stream();
    return 0;
  });
  EXPECT_EQ(client.read_reply().body, "data");
  client.send("TP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(client.read_reply().body, "GET /next? ");
}

TEST_F(HttpTest, HeadGetsTheLengthAndNoBody) {
  start();
  Client client(server_->port());
  client.send("HEAD /echo HTTP/1.1\r\nHost: x\r\n\r\n");
  const Reply reply = client.read_reply(true);
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.headers.at("content-length"), "12");
  EXPECT_EQ(client.get("/after").body, "GET /after? ");
}

TEST_F(HttpTest, ReadsChunkedBodiesAndExpectContinue) {
  start();
  Client client(server_->port());
  client.send(
      "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
      "3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n");
  EXPECT_EQ(client.read_reply().body, "POST /echo? abcdefg");
  client.send(
      "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  ASSERT_TRUE(client.read_until("HTTP/1.1 100 Continue\r\n\r\n"));
  client.send("ok");
  EXPECT_EQ(client.read_reply().body, "POST /echo? ok");
}

TEST_F(HttpTest, OldClientsGetAStreamThatEndsWithTheConnection) {
  start();
  Client client(server_->port());
  client.send("GET /stream HTTP/1.0\r\n\r\n");
  ASSERT_TRUE(eventually([&] { return on_io([&] { return held_.size(); }) == 1; }));
  on_io([&] {
    held_[0]->write("plain");
    held_[0]->end_stream();
    return 0;
  });
  const Reply reply = client.read_reply();
  EXPECT_FALSE(reply.headers.contains("transfer-encoding"));
  EXPECT_EQ(reply.body, "plain");
}

TEST_F(HttpTest, WhatIsNotHttpGetsA400AndAClose) {
  start();
  for (const char* junk :
       {"\x16\x03\x01\x02garbage\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n", "\r\n\r\n\r\n\r\n=\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -4\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        // What two servers in a row could read differently.
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: "
        "chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n\r\nabc", "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"}) {
    Client client(server_->port());
    client.send(junk);
    const Reply reply = client.read_reply();
    EXPECT_EQ(reply.status, 400) << junk << " got " << reply.body;
    EXPECT_EQ(reply.headers.at("connection"), "close");
    EXPECT_TRUE(client.closed_within(3000)) << junk;
  }
  EXPECT_EQ(stats().bad_requests, 13u);
}

TEST_F(HttpTest, LargeBodiesAndHeadsAreRefusedUnread) {
  start({.max_header_bytes = 4096, .max_body_bytes = 10'000});
  Client declared(server_->port());
  declared.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10001\r\n\r\n");
  EXPECT_EQ(declared.read_reply().status, 413);
  Client chunked(server_->port());
  chunked.send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3000\r\n" +
               std::string(0x3000, 'a') + "\r\n0\r\n\r\n");
  EXPECT_EQ(chunked.read_reply().status, 413);
  Client head(server_->port());
  head.send("GET / HTTP/1.1\r\nX-Long: " + std::string(5000, 'h') + "\r\n\r\n");
  EXPECT_EQ(head.read_reply().status, 431);
  EXPECT_EQ(Client(server_->port()).post("/echo", std::string(10'000, 'b')).status, 200);
}

TEST_F(HttpTest, BodiesBeingReadShareABudget) {
  start({.max_body_bytes = 60'000, .max_pending_body_bytes = 100'000});
  const std::string head = "POST /hold HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n";
  Client first(server_->port()), second(server_->port());
  first.send(head + std::string(59'999, 'a'));  // never complete
  std::this_thread::sleep_for(50ms);
  second.send(head + std::string(60'000, 'b'));
  EXPECT_EQ(second.read_reply().status, 503);
  first.close();  // gives its share back
  EXPECT_TRUE(eventually([&] { return stats().connections <= 1; }));
  Client third(server_->port());
  EXPECT_EQ(third.post("/echo", std::string(60'000, 'c')).status, 200);
}

TEST_F(HttpTest, ConnectionsOverTheLimitAreToldSo) {
  start({.max_connections = 2});
  Client a(server_->port()), b(server_->port());
  EXPECT_EQ(a.get("/a").status, 200);
  EXPECT_EQ(b.get("/b").status, 200);
  Client c(server_->port());
  EXPECT_EQ(c.read_reply().status, 503);
  a.close();
  EXPECT_TRUE(eventually([&] { return Client(server_->port()).get("/again").status == 200; }));
}

TEST_F(HttpTest, SlowHeadsAndBodiesRunIntoTheirDeadlines) {
  start({.header_timeout = 300ms, .body_timeout = 300ms, .idle_timeout = 300ms});
  Client head(server_->port()), body(server_->port()), idle(server_->port()),
      silent(server_->port());
  head.send("GET / HTTP/1.1\r\nHost:");
  body.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc");
  EXPECT_EQ(idle.get("/once").status, 200);
  for (Client* client : {&head, &body, &idle, &silent}) EXPECT_TRUE(client->closed_within(2000));
  EXPECT_EQ(stats().timeouts, 4u);
}

TEST_F(HttpTest, AReplyInTheMakingHasNoDeadline) {
  start({.header_timeout = 200ms,
         .body_timeout = 200ms,
         .idle_timeout = 200ms,
         .write_timeout = 200ms});
  Client client(server_->port());
  client.send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  std::this_thread::sleep_for(700ms);
  on_io([&] {
    held_.at(0)->respond({.body = "late"});
    return 0;
  });
  EXPECT_EQ(client.read_reply().body, "late");
}

TEST_F(HttpTest, APeerThatLeavesIsNoticedWhileTheReplyIsMade) {
  start();
  for (const char* path : {"/hold", "/stream"}) {
    num_broken_ = 0;
    Client client(server_->port());
    client.send(fmt::format("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", path));
    ASSERT_TRUE(eventually([&] { return on_io([&] { return held_.size(); }) == 1; }));
    EXPECT_EQ(num_broken_, 0);
    client.close();
    EXPECT_TRUE(eventually([&] { return num_broken_ == 1; })) << path;
    EXPECT_FALSE(on_io([&] {
      held_[0]->write("to nobody");
      held_[0]->respond({});
      const bool open = held_[0]->is_open();
      held_.clear();
      return open;
    }));
  }
}

TEST_F(HttpTest, AReaderThatTakesNothingIsCutAndOthersGoOn) {
  start({.write_timeout = 1000ms});
  Client stalled(server_->port(), false, 4096), healthy(server_->port());
  stalled.send("GET /big HTTP/1.1\r\nHost: x\r\n\r\n");
  healthy.send("GET /big HTTP/1.1\r\nHost: x\r\n\r\n");
  uint64_t taken = 0;
  ASSERT_TRUE(eventually([&] {
    taken += healthy.read_some(1000).size();
    return stats().slow_readers_cut == 1;
  }));
  EXPECT_TRUE(eventually([&] { return num_broken_ == 1; }));
  const uint64_t before = taken;
  for (int i = 0; i < 5; ++i) taken += healthy.read_some(1000).size();
  EXPECT_GT(taken, before);
}

TEST_F(HttpTest, AThrowingHandlerIsA500) {
  start();
  Client client(server_->port());
  const Reply reply = client.get("/throw");
  EXPECT_EQ(reply.status, 500);
  EXPECT_EQ(reply.body, "handler failed");
  EXPECT_EQ(client.get("/next").status, 200);
}

TEST_F(HttpTest, StopAcceptingLetsAStreamFinish) {
  start();
  Client streaming(server_->port()), idle(server_->port());
  EXPECT_EQ(idle.get("/a").status, 200);
  streaming.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(eventually([&] { return on_io([&] { return held_.size(); }) == 1; }));
  const int port = server_->port();
  server_->stop_accepting();
  EXPECT_TRUE(idle.closed_within(2000));
  EXPECT_ANY_THROW(Client{port});
  EXPECT_FALSE(server_->wait_idle(100ms));
  on_io([&] {
    held_[0]->write("to the end");
    held_[0]->end_stream();
    return 0;
  });
  EXPECT_EQ(streaming.read_reply().body, "to the end");
  EXPECT_TRUE(server_->wait_idle(3000ms));
}

TEST_F(HttpTest, ServesTls) {
  const serve_test::TestCertificate certificate;
  start({.tls_cert = certificate.cert_path(), .tls_key = certificate.key_path()});
  Client client(server_->port(), true);
  EXPECT_EQ(client.get("/secret").body, "GET /secret? ");
  EXPECT_EQ(client.post("/echo", std::string(300'000, 'z')).body.size(), 300'012u);
  client.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(eventually([&] { return on_io([&] { return held_.size(); }) == 1; }));
  client.close();
  EXPECT_TRUE(eventually([&] { return num_broken_ == 1; }));
  Client plain(server_->port());  // plain HTTP to a TLS port
  plain.send("GET / HTTP/1.1\r\n\r\n");
  EXPECT_TRUE(plain.closed_within(3000));
}

TEST_F(HttpTest, ReloadsItsCertificate) {
  serve_test::TestCertificate certificate;
  start({.tls_cert = certificate.cert_path(), .tls_key = certificate.key_path()});
  Client before(server_->port(), true);
  certificate.make();
  const std::string old = before.peer_certificate();
  EXPECT_EQ(Client(server_->port(), true).peer_certificate(), old);
  server_->reload_certificate();
  Client after(server_->port(), true);
  EXPECT_NE(after.peer_certificate(), old);
  EXPECT_EQ(before.get("/a").body, "GET /a? ");  // an open connection lives on
  const std::string fresh = after.peer_certificate();
  std::ofstream(certificate.key_path(), std::ios::trunc);
  EXPECT_THROW(server_->reload_certificate(), Error);
  EXPECT_EQ(Client(server_->port(), true).peer_certificate(), fresh);
}

TEST_F(HttpTest, BadAddressesAndCertificatesAreErrorsWithTheFlag) {
  start();
  HttpOptions taken;
  taken.port = server_->port();
  const auto message = [](const HttpOptions& options) -> std::string {
    try {
      HttpServer::start(options, {});
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message(taken).find("Address already in use"), std::string::npos) << message(taken);
  EXPECT_NE(message({.port = 0, .tls_cert = "/nonexistent.pem", .tls_key = "/nonexistent.key"})
                .find("/nonexistent.pem"),
            std::string::npos);
  EXPECT_NE(message({.port = 0, .tls_cert = "/nonexistent.pem"}).find("--tls-key"),
            std::string::npos);
}

}  // namespace
}  // namespace nibble
