// Events of one HTTP request's generations on their way from the engine's thread to the
// connection's: a bounded queue that a descriptor tells of, so that the connection's thread can
// wait for the next event and for its client's going away at once.
//
// Thread-safety: every method from any thread; sinks as EventSink says. Ownership: shared by the
// sinks and the reader, whichever goes last.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "inference_server/engine.h"

namespace memory3 {

class RequestEvents : public std::enable_shared_from_this<RequestEvents> {
 public:
  struct Item {
    int choice = 0;
    std::optional<v1::GenerateResponse> event;  // none: this choice has ended with `end`
    absl::Status end;
  };

  // Of at most `max_bytes` (as serialized) that nobody has taken yet. RESOURCE_EXHAUSTED: no
  // descriptor is left.
  static absl::StatusOr<std::shared_ptr<RequestEvents>> Create(size_t max_bytes);
  ~RequestEvents();
  RequestEvents(const RequestEvents&) = delete;

  std::shared_ptr<EventSink> SinkFor(int choice);
  // Readable while there are items.
  int fd() const { return fd_; }
  std::vector<Item> Take();
  // More came than is kept; nothing is kept since.
  bool overflown() const;

 private:
  class Sink;
  RequestEvents(int fd, size_t max_bytes) : fd_(fd), max_bytes_(max_bytes) {}
  void Add(Item item);

  const int fd_;
  const size_t max_bytes_;
  mutable std::mutex mutex_;  // of all below
  std::vector<Item> items_;
  size_t bytes_ = 0;
  bool overflown_ = false;
};

}  // namespace memory3
