#include "inference_server/request_events.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace memory3 {

class RequestEvents::Sink final : public EventSink {
 public:
  Sink(std::shared_ptr<RequestEvents> events, int choice)
      : events_(std::move(events)), choice_(choice) {}
  void Send(v1::GenerateResponse event) override {
    events_->Add({.choice = choice_, .event = std::move(event)});
  }
  void Scored(ContinuationScore /*score*/) override {}  // of scores; these are generations
  void End(absl::Status status) override {
    events_->Add({.choice = choice_, .end = std::move(status)});
  }

 private:
  const std::shared_ptr<RequestEvents> events_;
  const int choice_;
};

absl::StatusOr<std::shared_ptr<RequestEvents>> RequestEvents::Create(size_t max_bytes) {
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) return absl::ResourceExhaustedError(absl::StrCat("eventfd: ", std::strerror(errno)));
  return std::shared_ptr<RequestEvents>(new RequestEvents(fd, max_bytes));
}

RequestEvents::~RequestEvents() { close(fd_); }

std::shared_ptr<EventSink> RequestEvents::SinkFor(int choice) {
  return std::make_shared<Sink>(shared_from_this(), choice);
}

void RequestEvents::Add(Item item) {
  const size_t size = sizeof(Item) + (item.event ? item.event->ByteSizeLong() : 0);
  std::lock_guard lock(mutex_);
  // Ends are few and always kept.
  if (item.event && (overflown_ || bytes_ + size > max_bytes_)) {
    overflown_ = true;
    return;
  }
  const bool first = items_.empty();
  bytes_ += size;
  items_.push_back(std::move(item));
  if (!first) return;
  const uint64_t one = 1;
  // Fails only when it is readable already.
  [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof(one));
}

std::vector<RequestEvents::Item> RequestEvents::Take() {
  std::lock_guard lock(mutex_);
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = read(fd_, &count, sizeof(count));
  bytes_ = 0;
  return std::exchange(items_, {});
}

bool RequestEvents::overflown() const {
  std::lock_guard lock(mutex_);
  return overflown_;
}

}  // namespace memory3
