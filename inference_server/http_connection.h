// One HTTP connection as cpp-httplib's Stream: a non-blocking socket, TLS or not, with a deadline
// on everything that waits for the peer.
//
// Why not httplib's own: its time limits are for each read and write, so a peer that sends (or
// takes) a byte now and then holds a thread for ever; and it cannot wait for an event and for the
// peer's going away at once.
//
// Thread-safety: one thread at a time; Interrupt from any. Ownership: owns the socket.
#pragma once

#include <httplib.h>
#include <openssl/ssl.h>

#include <chrono>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace memory3 {

using HttpClock = std::chrono::steady_clock;
using HttpTime = HttpClock::time_point;

struct SslContextDeleter {
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
};
using SslContext = std::unique_ptr<SSL_CTX, SslContextDeleter>;

// TLS 1.2 or later from PEM files; with `client_ca` clients must show a certificate it signed.
// INVALID_ARGUMENT names the file.
absl::StatusOr<SslContext> MakeSslContext(const std::string& certificate, const std::string& key,
                                          const std::string& client_ca);

class HttpConnection final : public httplib::Stream {
 public:
  // `tls`: null for plain text; must outlive the connection.
  HttpConnection(int fd, SSL_CTX* tls, std::string remote_ip, int remote_port);
  ~HttpConnection() override;
  HttpConnection(const HttpConnection&) = delete;

  int fd() const { return fd_; }

  // ---- before a request: nothing blocks ----
  enum class Filled : uint8_t { kWantRead, kWantWrite, kFull, kClosed };
  // Takes what has arrived into the buffer, up to `limit` bytes in all. kWantWrite: TLS waits to
  // send.
  Filled Fill(size_t limit);
  // What was received and not yet read.
  std::string_view buffered() const { return std::string_view(buffer_).substr(read_); }
  void Discard() { buffer_.clear(), read_ = 0; }
  // Sends what the socket takes at once.
  void TrySend(std::string_view bytes);
  // No more is sent; the peer sees the end.
  void EndSending();

  // ---- during a request: blocks, within limits ----
  struct Limits {
    HttpTime read_deadline;               // of the whole request
    size_t max_bytes = 0;                 // of the whole request
    HttpClock::duration write_timeout{};  // of each write
  };
  void BeginRequest(const Limits& limits);
  // No write may end later, from now on.
  void LimitWrites(HttpTime deadline) { write_deadline_ = deadline; }
  enum class Woken : uint8_t { kEvent, kGone, kTimeout };
  // Waits for `event_fd` to be readable, or for the peer to go away.
  Woken WaitFor(int event_fd, HttpTime deadline);
  // Whether the connection must not be used for another request.
  bool broken() const { return broken_; }
  // After an answer that left the request unread, or broke off.
  void MustClose() { must_close_ = true; }
  bool must_close() const { return must_close_; }
  // Ends all waiting, from another thread: the peer seems gone.
  void Interrupt();

  // ---- httplib::Stream ----
  bool is_readable() const override { return !broken_; }
  bool is_writable() const override { return !broken_; }
  // -1: the peer is gone, or a limit of the request is passed.
  ssize_t read(char* out, size_t size) override;
  // Writes all, or -1.
  ssize_t write(const char* data, size_t size) override;
  using Stream::write;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  // For httplib, which fears numbers that do not fit select(); nothing here uses select().
  socket_t socket() const override { return 0; }

  // ---- the listener's notes ----
  HttpTime deadline;       // of what it waits for now
  bool lingering = false;  // answered; what still comes is dropped
  bool idle = false;       // between two requests
  uint32_t interest = 0;   // epoll events waited for

 private:
  enum class Io : uint8_t { kDone, kWantRead, kWantWrite, kClosed };
  // What OpenSSL's answer means: `result` of a handshake, a read or a write just made.
  Io TlsWants(int result) const;
  Io Handshake();
  Io Receive(char* out, size_t size, size_t* received);
  Io Send(const char* data, size_t size, size_t* sent);
  // False: deadline or peer gone.
  bool Await(Io what, HttpTime deadline);

  const int fd_;
  const std::string remote_ip_;
  const int remote_port_;
  SSL* ssl_ = nullptr;
  bool shaken_ = true;
  std::string buffer_;
  size_t read_ = 0;
  Limits limits_;
  size_t request_bytes_ = 0;
  HttpTime write_deadline_ = HttpTime::max();
  bool broken_ = false;
  bool must_close_ = false;
};

}  // namespace memory3
