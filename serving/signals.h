// Signals as events of one thread. Construct it in main() before any thread starts: it blocks
// SIGTERM, SIGINT and SIGHUP for all of them.
#pragma once

#include <functional>

namespace memory3 {

class Signals {
 public:
  Signals();
  // Waits for SIGTERM or SIGINT and returns it; calls `on_hangup` for every SIGHUP meanwhile.
  int WaitForShutdown(const std::function<void()>& on_hangup);
};

}  // namespace memory3
