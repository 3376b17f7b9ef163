#include "serving/metrics_page.h"

#include <httplib.h>

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr int kThreads = 2;
constexpr char kContentType[] = "text/plain; version=0.0.4; charset=utf-8";

}  // namespace

MetricsPage::MetricsPage() : server_(std::make_unique<httplib::Server>()) {}

absl::StatusOr<std::unique_ptr<MetricsPage>> MetricsPage::Start(const std::string& address,
                                                                std::function<std::string()> text) {
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 0 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("--metrics_listen is \"", address, "\", not HOST:PORT"));
  }
  std::unique_ptr<MetricsPage> page(new MetricsPage());
  httplib::Server& server = *page->server_;
  server.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
  // SO_REUSEPORT, which httplib sets, would share a taken port.
  server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  });
  server.Get("/metrics",
             [text = std::move(text)](const httplib::Request&, httplib::Response& response) {
               response.set_content(text(), kContentType);
             });
  const std::string host = address.substr(0, colon);
  page->port_ =
      port != 0 ? (server.bind_to_port(host, port) ? port : -1) : server.bind_to_any_port(host);
  if (page->port_ <= 0) {
    return absl::UnavailableError(
        absl::StrCat("--metrics_listen ", address, ": cannot listen there; is it taken?"));
  }
  page->thread_ = std::thread([page = page.get()] {
    page->server_->listen_after_bind();
    page->ended_ = true;
  });
  // stop() means nothing to a server that does not run yet.
  while (!server.is_running() && !page->ended_) std::this_thread::yield();
  return page;
}

MetricsPage::~MetricsPage() {
  server_->stop();
  if (thread_.joinable()) thread_.join();
}

}  // namespace memory3
