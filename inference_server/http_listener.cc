#include "inference_server/http_listener.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr int kBacklog = 1024;
constexpr int kQuickThreads = 4;
constexpr int kQuickQueue = 256;
// What the kernel holds for a client that does not read.
constexpr int kSendBufferBytes = 128 << 10;
constexpr auto kSweep = std::chrono::milliseconds(250);
constexpr auto kLinger = std::chrono::seconds(2);
// Beside the body: chunk sizes and trailers of a chunked one.
constexpr size_t kBodyOverhead = 64 << 10;

thread_local HttpConnection* current_connection = nullptr;

const char* ReasonOf(int status) {
  switch (status) {
    case 408:
      return "Request Timeout";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    default:
      return "Service Unavailable";
  }
}

struct Endpoint {
  std::string host, port;
};

absl::StatusOr<Endpoint> ParseAddress(const std::string& address) {
  const size_t colon = address.rfind(':');
  Endpoint endpoint;
  if (colon != std::string::npos) {
    endpoint = {address.substr(0, colon), address.substr(colon + 1)};
    if (endpoint.host.size() > 1 && endpoint.host.front() == '[' && endpoint.host.back() == ']')
      endpoint.host = endpoint.host.substr(1, endpoint.host.size() - 2);
  }
  if (endpoint.port.empty() || endpoint.port.find_first_not_of("0123456789") != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", address, "' is no address, as 0.0.0.0:8080 is"));
  }
  return endpoint;
}

// Connections are descriptors; the usual soft limit of 1,024 would be the first to be met.
void RaiseDescriptorLimit(rlim_t wanted) {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = std::min(limit.rlim_max, wanted);
  setrlimit(RLIMIT_NOFILE, &limit);
}

std::pair<std::string, int> NameOf(const sockaddr_storage& address, socklen_t size) {
  std::array<char, NI_MAXHOST> host{};
  std::array<char, NI_MAXSERV> port{};
  if (getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host.data(), host.size(),
                  port.data(), port.size(), NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return {"", 0};
  }
  return {host.data(), std::atoi(port.data())};
}

}  // namespace

// ---- threads ----

HttpListener::Lane::~Lane() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
  }
  added_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool HttpListener::Lane::TryRun(std::function<void()> task, std::function<void()> after) {
  std::lock_guard lock(mutex_);
  if (static_cast<int>(tasks_.size()) >= idle_ &&
      static_cast<int>(threads_.size()) < max_threads_) {
    try {
      threads_.emplace_back([this] { Work(); });
    } catch (const std::system_error&) {  // NOLINT(bugprone-empty-catch)
      // The system gives no more threads: those that there are must do.
    }
  }
  if (threads_.empty() || unfinished_ >= static_cast<int>(threads_.size()) + max_queue_)
    return false;
  ++unfinished_;
  tasks_.push_back({std::move(task), std::move(after)});
  added_.notify_one();
  return true;
}

void HttpListener::Lane::Work() {
  std::unique_lock lock(mutex_);
  while (true) {
    ++idle_;
    added_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
    --idle_;
    if (tasks_.empty()) return;
    const Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task.run();
    lock.lock();
    --unfinished_;
    lock.unlock();
    task.after();
    lock.lock();
  }
}

// ---- life ----

HttpListener::HttpListener(HttpListenerOptions options, Handlers handlers)
    : options_(std::move(options)), handlers_(std::move(handlers)) {}

absl::StatusOr<std::unique_ptr<HttpListener>> HttpListener::Start(HttpListenerOptions options,
                                                                  Handlers handlers) {
  auto listener =
      std::unique_ptr<HttpListener>(new HttpListener(std::move(options), std::move(handlers)));
  const HttpListenerOptions& o = listener->options_;
  if (!o.tls_certificate.empty()) {
    absl::StatusOr<SslContext> tls = MakeSslContext(o.tls_certificate, o.tls_key, o.tls_client_ca);
    if (!tls.ok()) return tls.status();
    listener->tls_ = *std::move(tls);
  }
  RaiseDescriptorLimit(o.max_connections + 1024);
  if (absl::Status listening = listener->Listen(); !listening.ok()) return listening;

  httplib::Server& server = *listener;
  server.set_payload_max_length(o.max_body_bytes);
  server.set_keep_alive_timeout(
      std::chrono::duration_cast<std::chrono::seconds>(o.idle_timeout).count());
  server.set_keep_alive_max_count(1'000'000);
  server.set_error_handler([self = listener.get()](const httplib::Request&,
                                                   httplib::Response& response) {
    if (!response.body.empty()) return;
    const std::string words = response.status == 404 ? "there is nothing at this URL"
                                                     : "the request cannot be understood";
    response.set_content(self->handlers_.error_body(response.status, words), "application/json");
    Current().MustClose();  // a body may be unread
  });
  server.set_exception_handler([self = listener.get()](const httplib::Request&,
                                                       httplib::Response& response,
                                                       const std::exception_ptr&) {
    response.status = 500;
    response.set_content(self->handlers_.error_body(500, "internal error"), "application/json");
    Current().MustClose();
  });
  listener->handlers_.routes(server);

  listener->quick_ = std::make_unique<Lane>(kQuickThreads, kQuickQueue);
  listener->slow_ = std::make_unique<Lane>(o.max_slow_requests, 0);
  listener->loop_ = std::thread([self = listener.get()] { self->Loop(); });
  return listener;
}

absl::Status HttpListener::Listen() {
  absl::StatusOr<Endpoint> endpoint = ParseAddress(options_.address);
  if (!endpoint.ok()) return endpoint.status();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(endpoint->host.empty() ? nullptr : endpoint->host.c_str(),
                                endpoint->port.c_str(), &hints, &found);
  if (error != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot listen on ", options_.address, ": ", gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  const int fd = ::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const int on = 1;
  if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (fd < 0 || ::bind(fd, found->ai_addr, found->ai_addrlen) != 0 || ::listen(fd, kBacklog) != 0) {
    const std::string why = std::strerror(errno);
    if (fd >= 0) close(fd);
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options_.address, ": ", why));
  }
  svr_sock_ = fd;  // httplib breaks streams off when it is invalid
  sockaddr_storage bound{};
  socklen_t size = sizeof(bound);
  getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size);
  port_ = NameOf(bound, size).second;
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_ < 0 || wake_ < 0)
    return absl::ResourceExhaustedError(absl::StrCat("epoll: ", std::strerror(errno)));
  for (const int watched : {fd, wake_}) {
    epoll_event event{.events = EPOLLIN, .data = {.fd = watched}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, watched, &event);
  }
  return absl::OkStatus();
}

HttpListener::~HttpListener() {
  Shutdown(std::chrono::milliseconds(0));
  for (const int fd : {epoll_, wake_}) {
    if (fd >= 0) close(fd);
  }
}

void HttpListener::Shutdown(std::chrono::milliseconds limit) {
  stopping_ = true;
  if (loop_.joinable()) {
    Wake();
    loop_.join();
  }
  const int listening = svr_sock_;
  {
    std::unique_lock lock(mutex_);
    none_busy_.wait_for(lock, limit, [this] { return busy_.empty(); });
    svr_sock_ = INVALID_SOCKET;
    for (HttpConnection* connection : busy_) connection->Interrupt();
  }
  quick_.reset();
  slow_.reset();
  if (listening != INVALID_SOCKET) close(listening);
}

void HttpListener::Wake() const {
  const uint64_t one = 1;
  // Fails only when it is readable already.
  [[maybe_unused]] const ssize_t written = ::write(wake_, &one, sizeof(one));
}

HttpConnection& HttpListener::Current() { return *current_connection; }

// ---- the loop ----

void HttpListener::Loop() {
  std::array<epoll_event, 128> events{};
  HttpTime sweep = HttpClock::now() + kSweep;
  while (!stopping_) {
    const bool quiet = waiting_.empty() && accepting_;
    const int count = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()),
                                 quiet ? -1 : static_cast<int>(kSweep.count()));
    for (int i = 0; i < count; ++i) {
      const int fd = events[i].data.fd;
      if (fd == svr_sock_) {
        Accept();
      } else if (fd == wake_) {
        TakeBack();
      } else {
        Progress(fd);
      }
    }
    if (HttpClock::now() >= sweep) {
      Sweep();
      sweep = HttpClock::now() + kSweep;
    }
  }
  waiting_.clear();
  std::lock_guard lock(mutex_);
  returned_.clear();
}

void HttpListener::Accept() {
  // A bounded number at a time, so that those that are here are heard.
  for (int i = 0; i < kBacklog; ++i) {
    sockaddr_storage address{};
    socklen_t size = sizeof(address);
    const int fd = accept4(svr_sock_, reinterpret_cast<sockaddr*>(&address), &size,
                           SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      if (MakeRoom()) continue;
      // No descriptors: the backlog waits until the next sweep.
      accepting_ = false;
      epoll_event event{.events = 0, .data = {.fd = svr_sock_}};
      epoll_ctl(epoll_, EPOLL_CTL_MOD, svr_sock_, &event);
      return;
    }
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kSendBufferBytes, sizeof(kSendBufferBytes));
    auto [ip, port] = NameOf(address, size);
    auto connection = std::make_unique<HttpConnection>(fd, tls_.get(), std::move(ip), port);
    connection->deadline = HttpClock::now() + options_.head_timeout;
    HttpConnection& added = *connection;
    waiting_[fd] = std::move(connection);
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
    added.interest = EPOLLIN;
    size_t connections = waiting_.size();
    {
      std::lock_guard lock(mutex_);
      connections += busy_.size();
    }
    if (static_cast<int>(connections) > options_.max_connections && !MakeRoom())
      Refuse(added, 503, "too many connections");
  }
}

// Closes the connection that has been idle the longest.
bool HttpListener::MakeRoom() {
  auto oldest = waiting_.end();
  for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
    if (it->second->idle &&
        (oldest == waiting_.end() || it->second->deadline < oldest->second->deadline)) {
      oldest = it;
    }
  }
  if (oldest == waiting_.end()) return false;
  waiting_.erase(oldest);
  return true;
}

void HttpListener::TakeBack() {
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = ::read(wake_, &count, sizeof(count));
  std::vector<Connection> returned;
  {
    std::lock_guard lock(mutex_);
    returned.swap(returned_);
  }
  for (Connection& connection : returned) {
    const int fd = connection->fd();
    HttpConnection& back = *connection;
    waiting_[fd] = std::move(connection);
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
    back.interest = EPOLLIN;
    if (back.must_close()) {
      back.lingering = true;
      back.EndSending();
      back.deadline = HttpClock::now() + kLinger;
    } else {
      back.idle = back.buffered().empty();
      back.deadline =
          HttpClock::now() + (back.idle ? options_.idle_timeout : options_.head_timeout);
    }
    Progress(fd);  // the next request may be here already
  }
}

void HttpListener::Sweep() {
  const HttpTime now = HttpClock::now();
  std::vector<int> late;
  for (const auto& [fd, connection] : waiting_) {
    if (connection->deadline <= now) late.push_back(fd);
  }
  for (const int fd : late) {
    HttpConnection& connection = *waiting_[fd];
    if (connection.lingering || connection.buffered().empty()) {
      waiting_.erase(fd);
    } else {
      Refuse(connection, 408, "the request's head did not arrive in time");
    }
  }
  if (!accepting_) {
    accepting_ = true;
    epoll_event event{.events = EPOLLIN, .data = {.fd = svr_sock_}};
    epoll_ctl(epoll_, EPOLL_CTL_MOD, svr_sock_, &event);
  }
}

void HttpListener::Watch(HttpConnection& connection, uint32_t events) {
  if (connection.interest == events) return;
  connection.interest = events;
  epoll_event event{.events = events, .data = {.fd = connection.fd()}};
  epoll_ctl(epoll_, EPOLL_CTL_MOD, connection.fd(), &event);
}

void HttpListener::Progress(int fd) {
  const auto found = waiting_.find(fd);
  if (found == waiting_.end()) return;
  HttpConnection& connection = *found->second;
  const HttpConnection::Filled filled = connection.Fill(options_.max_head_bytes);
  if (connection.lingering) {
    connection.Discard();
    if (filled == HttpConnection::Filled::kClosed) waiting_.erase(found);
    return;
  }
  if (connection.idle && !connection.buffered().empty()) {
    connection.idle = false;
    connection.deadline = HttpClock::now() + options_.head_timeout;
  }
  if (connection.buffered().find("\r\n\r\n") != std::string_view::npos) return Dispatch(fd);
  switch (filled) {
    case HttpConnection::Filled::kClosed:
      waiting_.erase(found);
      return;
    case HttpConnection::Filled::kFull:
      Refuse(connection, 431,
             absl::StrCat("the request's head is larger than ", options_.max_head_bytes, " bytes"));
      return;
    case HttpConnection::Filled::kWantRead:
      return Watch(connection, EPOLLIN);
    case HttpConnection::Filled::kWantWrite:
      return Watch(connection, EPOLLIN | EPOLLOUT);
  }
}

void HttpListener::Dispatch(int fd) {
  const auto found = waiting_.find(fd);
  const std::string_view head = found->second->buffered();
  const size_t space = head.find(' ');
  const std::string_view method = head.substr(0, space);
  const std::string_view rest = space == std::string_view::npos ? "" : head.substr(space + 1);
  const bool slow = handlers_.is_slow(method, rest.substr(0, rest.find_first_of(" \r")));

  Connection taken = std::move(found->second);
  waiting_.erase(found);
  epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
  HttpConnection* const connection = taken.get();
  connection->idle = false;
  {
    std::lock_guard lock(mutex_);
    busy_.insert(connection);
  }
  // The lane owns the connection from here on, if it takes it: std::function copies what it holds.
  if ((slow ? slow_ : quick_)
          ->TryRun([this, connection] { Handle(*connection); },
                   [this, connection] { HandBack(Connection(connection)); })) {
    taken.release();  // NOLINT(bugprone-unused-return-value): the task's now
    return;
  }
  {
    std::lock_guard lock(mutex_);
    busy_.erase(connection);
  }
  waiting_[fd] = std::move(taken);
  epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
  epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
  connection->interest = EPOLLIN;
  Refuse(*connection, slow ? 429 : 503, "too many requests at a time");
}

// Answers without a handler, and goes on reading for a while: closing a socket that holds unread
// bytes would take the answer back.
void HttpListener::Refuse(HttpConnection& connection, int status, const std::string& words) {
  const std::string body = handlers_.error_body(status, words);
  connection.TrySend(absl::StrCat(
      "HTTP/1.1 ", status, " ", ReasonOf(status), "\r\nContent-Type: application/json\r\n",
      status == 429 || status == 503 ? "Retry-After: 1\r\n" : "", "Content-Length: ", body.size(),
      "\r\nConnection: close\r\n\r\n", body));
  connection.EndSending();
  connection.Discard();
  connection.lingering = true;
  connection.idle = false;
  connection.deadline = HttpClock::now() + kLinger;
  Watch(connection, EPOLLIN);
}

// ---- a request ----

void HttpListener::Handle(HttpConnection& connection) {
  current_connection = &connection;
  connection.BeginRequest(
      {.read_deadline = HttpClock::now() + options_.body_timeout,
       .max_bytes = options_.max_head_bytes + options_.max_body_bytes + kBodyOverhead,
       .write_timeout = options_.write_timeout});
  bool asked_to_close = false;
  const bool answered = process_request(connection, stopping_, asked_to_close, nullptr);
  if (!answered || asked_to_close) connection.MustClose();
  current_connection = nullptr;
}

void HttpListener::HandBack(Connection connection) {
  bool none_left = false;
  {
    std::lock_guard lock(mutex_);
    busy_.erase(connection.get());
    none_left = busy_.empty();
    if (!connection->broken() && !stopping_) {
      returned_.push_back(std::move(connection));
      Wake();
    }
  }
  if (none_left) none_busy_.notify_all();
}

bool HttpListener::ReadBody(const httplib::ContentReader& reader, size_t max_bytes,
                            const std::function<std::string(int, const std::string&)>& error_body,
                            std::string* body, httplib::Response* response) {
  bool too_large = false;
  const bool whole = reader([&](const char* data, size_t size) {
    too_large = body->size() + size > max_bytes;
    if (!too_large) body->append(data, size);
    return !too_large;
  });
  if (whole) return true;
  Current().MustClose();
  if (too_large || response->status == 413) {
    response->status = 413;
    response->set_content(
        error_body(413, absl::StrCat("the request's body is larger than ", max_bytes, " bytes")),
        "application/json");
  } else {
    response->status = 400;
    response->set_content(error_body(400, "the request's body did not arrive"), "application/json");
  }
  return false;
}

}  // namespace memory3
