// Runs a loop's pieces on a bounded number of threads made for it; for index builds, never for
// queries.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace memory3 {

// Calls body(i) for every i in [0, n), from `threads` threads, the caller's one of them. 0: all
// cores.
template <typename Body>
void ParallelFor(int threads, size_t n, const Body& body) {
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  size_t workers = std::min<size_t>(threads, n);
  if (workers <= 1) {
    for (size_t i = 0; i < n; ++i) body(i);
    return;
  }
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < n;) body(i);
  };
  std::vector<std::thread> others;
  for (size_t w = 1; w < workers; ++w) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
}

}  // namespace memory3
