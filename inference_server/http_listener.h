// An HTTP/1.1 server that stays in charge whatever its clients do: cpp-httplib reads, routes and
// answers the requests, threads and connections are kept here.
//
// One thread accepts connections, waits on those that are idle, and collects the heads of requests
// without ever blocking; only a request whose head is complete gets a thread, of one of two lanes:
// quick requests (health, metrics, pages) a few of their own, so that they are answered however
// many slow ones run; slow requests (generations) up to `max_slow_requests`. More are refused at
// once with 429. Bounded as well: connections (the longest idle gives way), the size of heads and
// bodies, the time a head or body may take to come and an answer to be taken.
//
// Thread-safety: Start and Shutdown from one thread. Handlers run on many.
// Ownership: what handlers use must outlive the listener.
#pragma once

#include <httplib.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "absl/status/statusor.h"
#include "inference_server/http_connection.h"

namespace memory3 {

struct HttpListenerOptions {
  std::string address;  // "0.0.0.0:8080", "[::]:8080"; port 0 picks one
  std::string tls_certificate, tls_key, tls_client_ca;  // PEM files, as serving/flags.h
  int max_connections = 16384;
  int max_slow_requests = 512;
  size_t max_head_bytes = 16 << 10;
  size_t max_body_bytes = 4 << 20;
  std::chrono::milliseconds head_timeout{10'000};
  std::chrono::milliseconds body_timeout{30'000};
  std::chrono::milliseconds idle_timeout{75'000};
  std::chrono::milliseconds write_timeout{10'000};  // of each write
};

class HttpListener final : private httplib::Server {
 public:
  struct Handlers {
    std::function<void(httplib::Server&)> routes;
    // Whether a request (method, target) may take long.
    std::function<bool(std::string_view, std::string_view)> is_slow;
    // JSON of an error that no handler has answered, by HTTP status and words.
    std::function<std::string(int, const std::string&)> error_body;
  };

  // INVALID_ARGUMENT: address or TLS files; UNAVAILABLE: an address that is taken, named.
  static absl::StatusOr<std::unique_ptr<HttpListener>> Start(HttpListenerOptions options,
                                                             Handlers handlers);
  ~HttpListener() override;

  int port() const { return port_; }
  // Takes no more requests, lets running ones end for up to `limit`, then breaks them off.
  void Shutdown(std::chrono::milliseconds limit);

  // Of the request that the calling thread handles.
  static HttpConnection& Current();
  // Reads a request's body. False, with the answer set (413; 408 or nobody left to answer): the
  // handler returns.
  static bool ReadBody(const httplib::ContentReader& reader, size_t max_bytes,
                       const std::function<std::string(int, const std::string&)>& error_body,
                       std::string* body, httplib::Response* response);

 private:
  // Threads made when they are needed.
  class Lane {
   public:
    Lane(int max_threads, int max_queue) : max_threads_(max_threads), max_queue_(max_queue) {}
    ~Lane();
    // Runs `task`, then, when its place is free again, `after`: whoever learns through `after` that
    // the task is over finds room for the next. False: all are busy and the queue is full.
    bool TryRun(std::function<void()> task, std::function<void()> after);

   private:
    struct Task {
      std::function<void()> run, after;
    };
    void Work();

    const int max_threads_, max_queue_;
    std::mutex mutex_;
    std::condition_variable added_;
    std::deque<Task> tasks_;
    int unfinished_ = 0;  // waiting or running, but for what runs `after`
    int idle_ = 0;
    bool ending_ = false;
    std::vector<std::thread> threads_;
  };
  using Connection = std::unique_ptr<HttpConnection>;

  HttpListener(HttpListenerOptions options, Handlers handlers);
  absl::Status Listen();

  // The loop's.
  void Loop();
  void Accept();
  bool MakeRoom();
  void TakeBack();
  void Sweep();
  void Watch(HttpConnection& connection, uint32_t events);
  // What a connection has sent, or may now send.
  void Progress(int fd);
  void Dispatch(int fd);
  void Refuse(HttpConnection& connection, int status, const std::string& words);

  // On a lane's thread.
  void Handle(HttpConnection& connection);
  void HandBack(Connection connection);
  void Wake() const;

  const HttpListenerOptions options_;
  const Handlers handlers_;
  SslContext tls_;
  int port_ = 0;
  int epoll_ = -1, wake_ = -1;
  bool accepting_ = true;
  std::unordered_map<int, Connection> waiting_;  // by descriptor

  std::mutex mutex_;
  std::condition_variable none_busy_;
  std::unordered_set<HttpConnection*> busy_;  // at handlers
  std::vector<Connection> returned_;          // from handlers
  std::atomic<bool> stopping_ = false;

  std::unique_ptr<Lane> quick_, slow_;
  std::thread loop_;
};

}  // namespace memory3
