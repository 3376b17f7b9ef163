// The paged key/value cache of contexts: pages of 16 tokens of all layers,
// [layers][K, V][kv_heads][16][head_dim], f32 or bf16, reference-counted so that sequences may
// share the pages of an equal beginning.
//
// Bounded: the device memory is allocated once. Thread-safety: one thread (the engine's), handles
// included. A KvCache must outlive its pages.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/tensor.h"

namespace memory3 {

inline constexpr int kKvPageTokens = 16;

class KvCache;

// A counted reference to one page; the last one to go frees it.
class KvPage {
 public:
  KvPage() = default;
  KvPage(const KvPage& other);
  KvPage(KvPage&& other) noexcept
      : cache_(std::exchange(other.cache_, nullptr)), id_(std::exchange(other.id_, -1)) {}
  KvPage& operator=(KvPage other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(id_, other.id_);
    return *this;
  }
  ~KvPage();

  int id() const { return id_; }
  const KvCache* cache() const { return cache_; }
  void* data() const;  // device memory of the page
  int use_count() const;

 private:
  friend class KvCache;
  KvPage(KvCache* cache, int id) : cache_(cache), id_(id) {}

  KvCache* cache_ = nullptr;
  int id_ = -1;
};

class KvCache {
 public:
  // INVALID_ARGUMENT: pages < 1 or another dtype than f32 and bf16. RESOURCE_EXHAUSTED: device
  // full.
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(Device* device, const ModelConfig& config,
                                                         DType dtype, int pages);
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // RESOURCE_EXHAUSTED: all pages are in use.
  absl::StatusOr<KvPage> Allocate();
  int pages() const { return static_cast<int>(uses_.size()); }
  int free_pages() const { return static_cast<int>(free_.size()); }
  int64_t page_bytes() const { return page_bytes_; }
  // A block of it starts at a page's data() and has up to kKvPageTokens tokens.
  const KvSource& source() const { return source_; }

 private:
  friend class KvPage;
  KvCache() = default;

  Buffer storage_;
  KvSource source_;
  int64_t page_bytes_ = 0;
  std::vector<int> uses_;  // by page
  std::vector<int> free_;  // the last one is taken next
};

}  // namespace memory3
