// Bytes of a client as HTTP: the listener must answer or close, stay alive and answer others.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "inference_server/http_listener.h"

namespace memory3 {
namespace {

constexpr size_t kMaxBody = 1000;

std::string ErrorBody(int status, const std::string& words) {
  return "{\"" + std::to_string(status) + "\": \"" + words + "\"}";
}

std::unique_ptr<HttpListener> StartListener() {
  HttpListenerOptions options;
  options.address = "127.0.0.1:0";
  options.max_slow_requests = 2;
  options.max_head_bytes = 2048;
  options.max_body_bytes = kMaxBody;
  auto listener = HttpListener::Start(
      options,
      {.routes =
           [](httplib::Server& server) {
             server.Get("/health", [](const httplib::Request&, httplib::Response& response) {
               response.set_content("well", "text/plain");
             });
             server.Post("/slow/echo", [](const httplib::Request&, httplib::Response& response,
                                          const httplib::ContentReader& reader) {
               std::string body;
               if (HttpListener::ReadBody(reader, kMaxBody, ErrorBody, &body, &response))
                 response.set_content(body, "text/plain");
             });
           },
       .is_slow = [](std::string_view,
                     std::string_view target) { return target.substr(0, 6) == "/slow/"; },
       .error_body = ErrorBody});
  if (!listener.ok()) std::abort();
  return *std::move(listener);
}

// Sends all and no more, and reads to the end.
std::string Exchange(int port, std::string_view bytes) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (fd < 0) std::abort();
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const linger at_once = {1, 0};  // or a minute of fuzzing uses all ports up
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) std::abort();
  send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  shutdown(fd, SHUT_WR);
  std::string answer;
  char buffer[4096];
  for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) answer.append(buffer, n);
  close(fd);
  return answer;
}

}  // namespace
}  // namespace memory3

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::unique_ptr<memory3::HttpListener> listener = memory3::StartListener();
  const std::string answer = memory3::Exchange(
      listener->port(), std::string_view(reinterpret_cast<const char*>(data), size));
  if (!answer.empty() && answer.substr(0, 9) != "HTTP/1.1 ") std::abort();
  const std::string health =
      memory3::Exchange(listener->port(), "GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
  if (health.find("well") == std::string::npos) std::abort();
  return 0;
}
