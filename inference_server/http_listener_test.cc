// What clients do to a server: nothing, too slowly, too much, and leave.
#include "inference_server/http_listener.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// A client that does exactly what it is told.
class RawClient {
 public:
  explicit RawClient(int port, int receive_buffer = 0) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer > 0)
      setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~RawClient() { Close(); }
  RawClient(const RawClient&) = delete;
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void Send(const std::string& bytes) const {
    EXPECT_EQ(send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL), bytes.size());
  }
  // Until `text` has come, or the end.
  const std::string& ReadUntil(const std::string& text) {
    char buffer[4096];
    while (received_.find(text) == std::string::npos) {
      pollfd waited = {fd_, POLLIN, 0};
      if (poll(&waited, 1, 20'000) <= 0) {
        ADD_FAILURE() << "nothing came after: " << received_;
        break;
      }
      const ssize_t n = recv(fd_, buffer, sizeof(buffer), 0);
      if (n <= 0) break;
      received_.append(buffer, n);
    }
    return received_;
  }
  const std::string& ReadAll() { return ReadUntil(std::string(1, '\0')); }

 private:
  int fd_;
  std::string received_;
};

// A number that a test waits for.
class Counter {
 public:
  void Add(int n = 1) {
    std::lock_guard lock(mutex_);
    value_ += n;
    changed_.notify_all();
  }
  bool WaitFor(int value) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, seconds(30), [&] { return value_ >= value; });
  }
  int value() {
    std::lock_guard lock(mutex_);
    return value_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int value_ = 0;
};

class HttpListenerTest : public ::testing::Test {
 protected:
  HttpListenerTest() : never_(eventfd(0, EFD_CLOEXEC)) {}
  ~HttpListenerTest() override {
    listener_.reset();
    close(never_);
  }

  static std::string ErrorBody(int status, const std::string& words) {
    return absl::StrCat("{\"", status, "\": \"", words, "\"}");
  }
  static HttpListenerOptions Quick() {
    HttpListenerOptions options;
    options.address = "127.0.0.1:0";
    options.max_slow_requests = 2;
    options.max_body_bytes = 1000;
    options.head_timeout = milliseconds(300);
    options.body_timeout = milliseconds(300);
    options.write_timeout = milliseconds(300);
    return options;
  }
  void Start(const HttpListenerOptions& options = Quick()) {
    auto listener = HttpListener::Start(
        options,
        {.routes = [this](httplib::Server& server) { AddRoutes(server); },
         .is_slow = [](std::string_view,
                       std::string_view target) { return target.substr(0, 6) == "/slow/"; },
         .error_body = ErrorBody});
    ASSERT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
  }
  void AddRoutes(httplib::Server& server) {
    server.Get("/health", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("well", "text/plain");
    });
    server.Post("/slow/echo", [](const httplib::Request&, httplib::Response& response,
                                 const httplib::ContentReader& reader) {
      std::string body;
      if (HttpListener::ReadBody(reader, 1000, ErrorBody, &body, &response))
        response.set_content(body, "text/plain");
    });
    // Until the client goes.
    server.Get("/slow/wait", [this](const httplib::Request&, httplib::Response& response) {
      begun_.Add();
      const auto woken = HttpListener::Current().WaitFor(never_, HttpTime::max());
      gone_.Add(woken == HttpConnection::Woken::kGone);
      response.set_content("over", "text/plain");
    });
    // Without end.
    server.Get("/slow/stream", [this](const httplib::Request&, httplib::Response& response) {
      begun_.Add();
      response.set_chunked_content_provider(
          "text/event-stream",
          [](size_t, httplib::DataSink& sink) {
            const std::string text(10'000, 'x');
            return sink.write(text.data(), text.size());
          },
          [this](bool) { gone_.Add(); });
    });
    server.Get("/throw", [](const httplib::Request&, httplib::Response&) {
      throw std::runtime_error("a defect");
    });
  }
  httplib::Client Client() const {
    httplib::Client client("127.0.0.1", listener_->port());
    client.set_read_timeout(seconds(20));
    return client;
  }
  void ExpectWell() const {
    const httplib::Result health = Client().Get("/health");
    ASSERT_TRUE(health);
    EXPECT_EQ(health->body, "well");
  }

  const int never_;  // an event that does not come
  Counter begun_, gone_;
  std::unique_ptr<HttpListener> listener_;
};

TEST_F(HttpListenerTest, OneConnectionServesManyRequestsPipelinedOnesToo) {
  Start();
  RawClient client(listener_->port());
  for (int i = 1; i <= 3; ++i) {
    client.Send(
        absl::StrCat("POST /slow/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n", "abc", i));
    EXPECT_THAT(client.ReadUntil(absl::StrCat("abc", i)), StartsWith("HTTP/1.1 200"));
  }
  std::string both;
  for (const char* body : {"one", "two"}) {
    both += absl::StrCat("POST /slow/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n", body);
  }
  client.Send(both + "GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
  const std::string& all = client.ReadAll();
  EXPECT_LT(all.find("one"), all.find("two"));
  EXPECT_LT(all.find("two"), all.find("well"));
}

// The thread that answered one request counted as busy for a moment after its connection was back,
// and the next request on it was refused.
TEST_F(HttpListenerTest, OneAfterAnotherNeedsNoMoreThanOneSlowThread) {
  HttpListenerOptions options = Quick();
  options.max_slow_requests = 1;
  Start(options);
  RawClient client(listener_->port());
  constexpr int kRequests = 150;
  std::string all;
  for (int i = 1; i <= kRequests; ++i) {
    all += absl::StrCat("POST /slow/echo HTTP/1.1\r\nContent-Length: 6\r\n",
                        i == kRequests ? "Connection: close\r\n" : "", "\r\n<", 1000 + i, ">");
  }
  client.Send(all);
  const std::string& answers = client.ReadAll();
  EXPECT_THAT(answers, ::testing::Not(HasSubstr("HTTP/1.1 429")));
  EXPECT_THAT(answers, HasSubstr(absl::StrCat("<", 1000 + kRequests, ">")));
}

TEST_F(HttpListenerTest, AHeadInSinglesArrives) {
  Start();
  RawClient client(listener_->port());
  for (const char c : std::string("GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"))
    client.Send(std::string(1, c));
  EXPECT_THAT(client.ReadAll(), HasSubstr("well"));
}

TEST_F(HttpListenerTest, HalfAHeadAndHalfABodyAreGivenUp) {
  Start();
  RawClient head(listener_->port()), body(listener_->port()), silent(listener_->port());
  head.Send("GET /health HTT");
  body.Send("POST /slow/echo HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc");
  ExpectWell();
  EXPECT_THAT(head.ReadAll(), StartsWith("HTTP/1.1 408"));
  body.ReadAll();
  EXPECT_EQ(silent.ReadAll(), "");
  ExpectWell();
}

TEST_F(HttpListenerTest, WhatIsTooLargeIsRefused) {
  Start();
  RawClient head(listener_->port());
  head.Send("GET /health HTTP/1.1\r\n");
  for (int i = 0; i < 20; ++i) head.Send(absl::StrCat("X: ", std::string(1000, 'x'), "\r\n"));
  EXPECT_THAT(head.ReadAll(), StartsWith("HTTP/1.1 431"));

  httplib::Client client = Client();
  const httplib::Result body = client.Post("/slow/echo", std::string(1001, 'x'), "text/plain");
  ASSERT_TRUE(body);
  EXPECT_EQ(body->status, 413);
  EXPECT_THAT(body->body, HasSubstr("1000 bytes"));
  const httplib::Result chunked = Client().Post(
      "/slow/echo",
      [](size_t offset, httplib::DataSink& sink) {
        sink.write("0123456789", 10);
        if (offset >= 2000) sink.done();
        return true;
      },
      "text/plain");
  ASSERT_TRUE(chunked);
  EXPECT_EQ(chunked->status, 413);
  // Large only when it is unpacked.
  httplib::Client packing = Client();
  packing.set_compress(true);
  const httplib::Result packed =
      packing.Post("/slow/echo", std::string(100'000, 'x'), "text/plain");
  ASSERT_TRUE(packed);
  EXPECT_EQ(packed->status, 413);
  ASSERT_TRUE(client.Post("/slow/echo", std::string(1000, 'x'), "text/plain"));
  ExpectWell();
}

TEST_F(HttpListenerTest, NonsenseIsABadRequestAndADefectAnInternalError) {
  Start();
  RawClient nonsense(listener_->port());
  nonsense.Send("What is this?\r\n\r\n");
  EXPECT_THAT(nonsense.ReadAll(), StartsWith("HTTP/1.1 400"));
  const httplib::Result defect = Client().Get("/throw");
  ASSERT_TRUE(defect);
  EXPECT_EQ(defect->status, 500);
  EXPECT_EQ(defect->body, ErrorBody(500, "internal error"));
  const httplib::Result nothing = Client().Get("/nothing");
  ASSERT_TRUE(nothing);
  EXPECT_EQ(nothing->status, 404);
  EXPECT_THAT(nothing->body, HasSubstr("404"));
}

TEST_F(HttpListenerTest, WhenAllSlowThreadsAreBusyMoreAreRefusedAndQuickOnesServed) {
  Start();
  RawClient first(listener_->port()), second(listener_->port()), third(listener_->port());
  for (const RawClient* client : {&first, &second}) client->Send("GET /slow/wait HTTP/1.1\r\n\r\n");
  ASSERT_TRUE(begun_.WaitFor(2));
  third.Send("GET /slow/wait HTTP/1.1\r\n\r\n");
  EXPECT_THAT(third.ReadAll(),
              ::testing::AllOf(StartsWith("HTTP/1.1 429"), HasSubstr("Retry-After: 1")));
  ExpectWell();
  // The body of what is refused unread does not take the answer back.
  RawClient fourth(listener_->port());
  fourth.Send("POST /slow/echo HTTP/1.1\r\nContent-Length: 900\r\n\r\n" + std::string(900, 'x'));
  EXPECT_THAT(fourth.ReadAll(), StartsWith("HTTP/1.1 429"));
  // A thread is free again once its client is gone.
  first.Close();
  ASSERT_TRUE(gone_.WaitFor(1));
  int status = 429;
  while (status == 429) {  // until the thread has noticed
    const httplib::Result echo = Client().Post("/slow/echo", "again", "text/plain");
    ASSERT_TRUE(echo);
    status = echo->status;
  }
  EXPECT_EQ(status, 200);
}

TEST_F(HttpListenerTest, AClientThatNeverReadsIsGivenUp) {
  Start();
  RawClient client(listener_->port(), /*receive_buffer=*/4096);
  client.Send("GET /slow/stream HTTP/1.1\r\n\r\n");
  EXPECT_TRUE(gone_.WaitFor(1));
  ExpectWell();
}

TEST_F(HttpListenerTest, TheLongestIdleConnectionGivesWay) {
  HttpListenerOptions options = Quick();
  options.max_connections = 2;
  Start(options);
  RawClient first(listener_->port());
  first.Send("GET /health HTTP/1.1\r\n\r\n");
  first.ReadUntil("well");
  RawClient second(listener_->port());
  second.Send("GET /health HTTP/1.1\r\n\r\n");
  second.ReadUntil("well");
  // Not before they are known to be idle, which is after they have their answers.
  std::string answer;
  do {
    RawClient third(listener_->port());
    third.Send("GET /health HTTP/1.1\r\nConnection: close\r\n\r\n");
    answer = third.ReadAll();
  } while (answer.substr(0, 12) == "HTTP/1.1 503");
  EXPECT_THAT(answer, HasSubstr("well"));
  EXPECT_THAT(first.ReadAll(), HasSubstr("well"));  // closed without another answer
}

TEST_F(HttpListenerTest, ManyClientsAtOnce) {
  HttpListenerOptions options = Quick();
  options.max_slow_requests = 64;
  options.body_timeout = options.head_timeout = seconds(20);
  Start(options);
  std::vector<std::thread> threads;
  threads.reserve(16);
  std::atomic<int> answered = 0;
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([&, t] {
      httplib::Client client = Client();
      client.set_keep_alive(t % 2 == 0);
      for (int i = 0; i < 20; ++i) {
        const std::string text = absl::StrCat(t, " ", i);
        const httplib::Result echo = client.Post("/slow/echo", text, "text/plain");
        answered += echo && echo->body == text;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(answered, 16 * 20);
}

TEST_F(HttpListenerTest, ShutdownLetsRequestsEndAndThenBreaksThemOff) {
  Start();
  RawClient client(listener_->port());
  client.Send("GET /slow/wait HTTP/1.1\r\n\r\n");
  ASSERT_TRUE(begun_.WaitFor(1));
  std::thread stopper([this] { listener_->Shutdown(seconds(20)); });
  client.Close();  // the request ends, and with it the wait
  stopper.join();
  EXPECT_EQ(gone_.value(), 1);

  Start();
  RawClient stubborn(listener_->port());
  stubborn.Send("GET /slow/stream HTTP/1.1\r\n\r\n");
  ASSERT_TRUE(begun_.WaitFor(2));
  stubborn.ReadUntil("xxx");
  listener_->Shutdown(milliseconds(10));
  EXPECT_EQ(gone_.value(), 2);
}

TEST_F(HttpListenerTest, AddressesAreChecked) {
  Start();
  HttpListenerOptions options = Quick();
  options.address = absl::StrCat("127.0.0.1:", listener_->port());
  const auto start = [](const HttpListenerOptions& o) {
    return HttpListener::Start(o, {.routes = [](httplib::Server&) {}}).status();
  };
  EXPECT_TRUE(absl::IsUnavailable(start(options)));
  EXPECT_THAT(std::string(start(options).message()), HasSubstr(options.address));
  for (const char* bad : {"", "8080", "localhost:", "localhost:http"}) {
    options.address = bad;
    EXPECT_TRUE(absl::IsInvalidArgument(start(options))) << bad;
  }
  options = Quick();
  options.tls_certificate = "/nowhere.pem";
  EXPECT_THAT(std::string(start(options).message()), HasSubstr("/nowhere.pem"));
}

TEST_F(HttpListenerTest, OverTls) {
  const std::filesystem::path directory =
      std::filesystem::path(::testing::TempDir()) / absl::StrCat("http_listener_", getpid());
  std::filesystem::create_directories(directory);
  const std::string key = directory / "key.pem", certificate = directory / "cert.pem";
  ASSERT_EQ(std::system(("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
                         "-keyout " +
                         key + " -out " + certificate + " 2>/dev/null")
                            .c_str()),
            0);
  HttpListenerOptions options = Quick();
  options.tls_certificate = certificate;
  options.tls_key = key;
  options.head_timeout = options.body_timeout = seconds(20);
  Start(options);
  httplib::SSLClient client("localhost", listener_->port());
  client.enable_server_certificate_verification(true);
  client.set_ca_cert_path(certificate);
  client.set_keep_alive(true);
  for (int i = 0; i < 3; ++i) {
    const httplib::Result echo = client.Post("/slow/echo", std::string(900, 'a' + i), "text/plain");
    ASSERT_TRUE(echo) << static_cast<int>(echo.error());
    EXPECT_EQ(echo->body, std::string(900, 'a' + i));
  }
  // No TLS: closed. And one that goes away is noticed.
  RawClient plain(listener_->port());
  plain.Send("GET /health HTTP/1.1\r\n\r\n");
  EXPECT_THAT(plain.ReadAll(), ::testing::Not(HasSubstr("well")));
  {
    httplib::SSLClient leaving("localhost", listener_->port());
    leaving.enable_server_certificate_verification(false);
    std::thread stopper([&] {
      EXPECT_TRUE(begun_.WaitFor(1));
      leaving.stop();
    });
    leaving.Get("/slow/wait");
    stopper.join();
  }
  EXPECT_TRUE(gone_.WaitFor(1));
  listener_.reset();
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace memory3
