// A queue between two stages of a pipeline, bounded by weight (bytes, say), so that a fast stage
// waits for a slow one instead of filling the memory.
//
// Thread-safety: any thread.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

namespace memory3 {

template <typename T>
class BoundedQueue {
 public:
  using Clock = std::chrono::steady_clock;

  explicit BoundedQueue(int64_t most) : most_(most) {}

  // Waits while the queue holds as much as it may (one item always fits). False: it is closed, the
  // item is dropped.
  bool Push(T item, int64_t weight) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return closed_ || items_.empty() || held_ + weight <= most_; });
    if (closed_) return false;
    held_ += weight;
    items_.emplace_back(std::move(item), weight);
    changed_.notify_all();
    return true;
  }

  // Waits for an item; nothing once the queue is closed and empty.
  std::optional<T> Pop() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return closed_ || !items_.empty(); });
    return Take();
  }
  // Nothing at `deadline` either.
  std::optional<T> PopUntil(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline, [this] { return closed_ || !items_.empty(); });
    return Take();
  }

  // Nothing more comes in; what is there may still be taken.
  void Close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  // Close, and what is there is dropped.
  void Cancel() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    items_.clear();
    held_ = 0;
    changed_.notify_all();
  }

 private:
  std::optional<T> Take() {
    if (items_.empty()) return std::nullopt;
    std::pair<T, int64_t> item = std::move(items_.front());
    items_.pop_front();
    held_ -= item.second;
    changed_.notify_all();
    return std::move(item.first);
  }

  const int64_t most_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<T, int64_t>> items_;
  int64_t held_ = 0;
  bool closed_ = false;
};

}  // namespace memory3
