// /metrics over HTTP on an address of its own. (prometheus-cpp's Exposer answers on threads of
// 100 KiB of stack, which the thread-local variables of the libraries that compute leave too little
// of.)
//
// Thread-safety: one thread; the page is made on threads of its own.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"

namespace httplib {
class Server;
}

namespace memory3 {

class MetricsPage {
 public:
  // `address`: HOST:PORT; port 0 picks one. UNAVAILABLE: it is taken; INVALID_ARGUMENT: it is none.
  static absl::StatusOr<std::unique_ptr<MetricsPage>> Start(const std::string& address,
                                                            std::function<std::string()> text);
  ~MetricsPage();

  int port() const { return port_; }

 private:
  MetricsPage();

  std::unique_ptr<httplib::Server> server_;
  int port_ = 0;
  std::atomic<bool> ended_ = false;
  std::thread thread_;
};

}  // namespace memory3
