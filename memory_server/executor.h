// A fixed number of threads that run queued work in order of arrival, what is to be first before
// the rest. Whoever queues bounds the queue: a Retrieve stream has at most one piece of work in it.
//
// Thread-safety: Run and RunFirst from any thread. The destructor finishes what is queued, then
// joins.
#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace memory3 {

class Executor {
 public:
  explicit Executor(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Executor() {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
    }
    for (std::thread& thread : threads_) thread.join();
  }

  void Run(std::function<void()> work) {
    absl::MutexLock lock(&mutex_);
    queue_.push_back(std::move(work));
  }
  // Before all that was given to Run and has not begun.
  void RunFirst(std::function<void()> work) {
    absl::MutexLock lock(&mutex_);
    first_.push_back(std::move(work));
  }

 private:
  bool Ready() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !first_.empty() || !queue_.empty();
  }

  void Work() {
    for (;;) {
      std::function<void()> work;
      {
        absl::MutexLock lock(&mutex_, absl::Condition(this, &Executor::Ready));
        std::deque<std::function<void()>>& next = first_.empty() ? queue_ : first_;
        if (next.empty()) return;
        work = std::move(next.front());
        next.pop_front();
      }
      work();
    }
  }

  absl::Mutex mutex_;
  std::deque<std::function<void()>> first_ ABSL_GUARDED_BY(mutex_), queue_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace memory3
