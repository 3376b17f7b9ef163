#include "inference_server/http_connection.h"

#include <openssl/err.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr size_t kReadBytes = 4096;

// poll()'s milliseconds until `deadline`, at most a minute at a time.
int Milliseconds(HttpTime deadline) {
  const HttpTime now = HttpClock::now();
  if (deadline <= now) return 0;
  if (deadline - now > std::chrono::minutes(1)) return 60'000;
  return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(deadline - now).count());
}

}  // namespace

absl::StatusOr<SslContext> MakeSslContext(const std::string& certificate, const std::string& key,
                                          const std::string& client_ca) {
  SslContext context(SSL_CTX_new(TLS_server_method()));
  if (context == nullptr) return absl::InternalError("OpenSSL gives no context");
  SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION);
  SSL_CTX_set_mode(context.get(),
                   SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_CTX_set_options(context.get(), SSL_OP_NO_RENEGOTIATION);
  if (SSL_CTX_use_certificate_chain_file(context.get(), certificate.c_str()) != 1)
    return absl::InvalidArgumentError(absl::StrCat("cannot read the certificate ", certificate));
  if (SSL_CTX_use_PrivateKey_file(context.get(), key.c_str(), SSL_FILETYPE_PEM) != 1 ||
      SSL_CTX_check_private_key(context.get()) != 1) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read the private key ", key,
                                                   ", or it does not belong to ", certificate));
  }
  if (!client_ca.empty()) {
    if (SSL_CTX_load_verify_locations(context.get(), client_ca.c_str(), nullptr) != 1)
      return absl::InvalidArgumentError(absl::StrCat("cannot read the client CA ", client_ca));
    SSL_CTX_set_verify(context.get(), SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  }
  return context;
}

HttpConnection::HttpConnection(int fd, SSL_CTX* tls, std::string remote_ip, int remote_port)
    : fd_(fd), remote_ip_(std::move(remote_ip)), remote_port_(remote_port) {
  if (tls == nullptr) return;
  ssl_ = SSL_new(tls);
  shaken_ = false;
  if (ssl_ == nullptr || SSL_set_fd(ssl_, fd) != 1) {
    broken_ = true;
  } else {
    SSL_set_accept_state(ssl_);
  }
}

HttpConnection::~HttpConnection() {
  SSL_free(ssl_);
  close(fd_);
}

HttpConnection::Io HttpConnection::TlsWants(int result) const {
  if (result == 1) return Io::kDone;
  switch (SSL_get_error(ssl_, result)) {
    case SSL_ERROR_WANT_READ:
      return Io::kWantRead;
    case SSL_ERROR_WANT_WRITE:
      return Io::kWantWrite;
    default:
      return Io::kClosed;
  }
}

HttpConnection::Io HttpConnection::Handshake() {
  if (shaken_) return Io::kDone;
  if (broken_) return Io::kClosed;
  ERR_clear_error();
  const int result = SSL_do_handshake(ssl_);
  shaken_ = result == 1;
  return TlsWants(result);
}

HttpConnection::Io HttpConnection::Receive(char* out, size_t size, size_t* received) {
  if (ssl_ == nullptr) {
    while (true) {
      const ssize_t n = recv(fd_, out, size, 0);
      if (n > 0) {
        *received = n;
        return Io::kDone;
      }
      if (n < 0 && errno == EINTR) continue;
      return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? Io::kWantRead : Io::kClosed;
    }
  }
  if (const Io shaken = Handshake(); shaken != Io::kDone) return shaken;
  ERR_clear_error();
  const int result = SSL_read_ex(ssl_, out, size, received);
  return TlsWants(result);
}

HttpConnection::Io HttpConnection::Send(const char* data, size_t size, size_t* sent) {
  if (ssl_ == nullptr) {
    while (true) {
      const ssize_t n = send(fd_, data, size, MSG_NOSIGNAL);
      if (n >= 0) {
        *sent = n;
        return Io::kDone;
      }
      if (errno == EINTR) continue;
      return errno == EAGAIN || errno == EWOULDBLOCK ? Io::kWantWrite : Io::kClosed;
    }
  }
  if (const Io shaken = Handshake(); shaken != Io::kDone) return shaken;
  ERR_clear_error();
  const int result = SSL_write_ex(ssl_, data, size, sent);
  return TlsWants(result);
}

HttpConnection::Filled HttpConnection::Fill(size_t limit) {
  if (read_ > 0) {
    buffer_.erase(0, read_);
    read_ = 0;
  }
  while (buffer_.size() < limit) {
    const size_t before = buffer_.size();
    buffer_.resize(std::min(limit, before + kReadBytes));
    size_t received = 0;
    const Io io = Receive(buffer_.data() + before, buffer_.size() - before, &received);
    buffer_.resize(before + received);
    if (io == Io::kWantRead) return Filled::kWantRead;
    if (io == Io::kWantWrite) return Filled::kWantWrite;
    if (io == Io::kClosed) return Filled::kClosed;
  }
  return Filled::kFull;
}

void HttpConnection::TrySend(std::string_view bytes) {
  while (!bytes.empty()) {
    size_t sent = 0;
    if (Send(bytes.data(), bytes.size(), &sent) != Io::kDone) return;
    bytes.remove_prefix(sent);
  }
}

void HttpConnection::EndSending() {
  if (ssl_ != nullptr && shaken_ && !broken_) {
    ERR_clear_error();
    SSL_shutdown(ssl_);
  }
  shutdown(fd_, SHUT_WR);
}

void HttpConnection::BeginRequest(const Limits& limits) {
  limits_ = limits;
  request_bytes_ = 0;
  write_deadline_ = HttpTime::max();
}

bool HttpConnection::Await(Io what, HttpTime until) {
  pollfd waited = {fd_, static_cast<short>(what == Io::kWantRead ? POLLIN : POLLOUT), 0};
  while (true) {
    const int ready = poll(&waited, 1, Milliseconds(until));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return false;
    if (HttpClock::now() >= until) return false;
  }
}

HttpConnection::Woken HttpConnection::WaitFor(int event_fd, HttpTime until) {
  pollfd waited[2] = {{event_fd, POLLIN, 0}, {fd_, POLLRDHUP, 0}};
  while (true) {
    const int ready = poll(waited, 2, Milliseconds(until));
    if (ready < 0 && errno != EINTR) return Woken::kGone;
    // Gone before all else: what has happened is of no use to anybody.
    if (ready > 0 && waited[1].revents != 0) {
      broken_ = true;
      return Woken::kGone;
    }
    if (ready > 0) return Woken::kEvent;
    if (HttpClock::now() >= until) return Woken::kTimeout;
  }
}

void HttpConnection::Interrupt() { shutdown(fd_, SHUT_RDWR); }

ssize_t HttpConnection::read(char* out, size_t size) {
  size_t received = 0;
  if (read_ < buffer_.size()) {
    received = std::min(size, buffer_.size() - read_);
    memcpy(out, buffer_.data() + read_, received);
    read_ += received;
  } else {
    while (!broken_) {
      const Io io = Receive(out, size, &received);
      if (io == Io::kDone) break;
      if (io == Io::kClosed || !Await(io, limits_.read_deadline)) broken_ = true;
    }
  }
  request_bytes_ += received;
  if (broken_ || request_bytes_ > limits_.max_bytes) {
    broken_ = true;
    return -1;
  }
  return static_cast<ssize_t>(received);
}

ssize_t HttpConnection::write(const char* data, size_t size) {
  const HttpTime until = std::min(write_deadline_, HttpClock::now() + limits_.write_timeout);
  size_t done = 0;
  while (done < size && !broken_) {
    size_t sent = 0;
    const Io io = Send(data + done, size - done, &sent);
    done += sent;
    if (io == Io::kClosed || (io != Io::kDone && !Await(io, until))) broken_ = true;
  }
  return broken_ ? -1 : static_cast<ssize_t>(size);
}

void HttpConnection::get_remote_ip_and_port(std::string& ip, int& port) const {
  ip = remote_ip_;
  port = remote_port_;
}

void HttpConnection::get_local_ip_and_port(std::string& ip, int& port) const {
  ip.clear();
  port = 0;
}

}  // namespace memory3
