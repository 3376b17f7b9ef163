#include "transformer/kv_cache.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {

KvPage::KvPage(const KvPage& other) : cache_(other.cache_), id_(other.id_) {
  if (cache_ != nullptr) ++cache_->uses_[id_];
}

KvPage::~KvPage() {
  if (cache_ != nullptr && --cache_->uses_[id_] == 0) cache_->free_.push_back(id_);
}

void* KvPage::data() const { return cache_->storage_.as<char>() + id_ * cache_->page_bytes_; }

int KvPage::use_count() const { return cache_ == nullptr ? 0 : cache_->uses_[id_]; }

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(Device* device, const ModelConfig& c,
                                                         DType dtype, int pages) {
  if (pages < 1)
    return absl::InvalidArgumentError(absl::StrCat("KV cache: pages is ", pages, ", must be >= 1"));
  if (dtype != DType::kF32 && dtype != DType::kBF16) {
    return absl::InvalidArgumentError("KV cache: the type must be f32 or bf16");
  }
  std::unique_ptr<KvCache> cache(new KvCache);
  KvSource& s = cache->source_;
  s.dtype = dtype;
  s.token_stride = c.head_dim;
  s.head_stride = s.token_stride * kKvPageTokens;
  s.value_offset = s.head_stride * c.kv_heads;
  s.layer_stride = s.value_offset * 2;
  cache->page_bytes_ = s.layer_stride * c.layers * SizeOf(dtype);
  absl::StatusOr<Buffer> storage = device->Allocate(size_t(pages) * cache->page_bytes_);
  if (!storage.ok()) return storage.status();
  cache->storage_ = *std::move(storage);
  cache->uses_.assign(pages, 0);
  for (int id = pages - 1; id >= 0; --id) cache->free_.push_back(id);
  return cache;
}

absl::StatusOr<KvPage> KvCache::Allocate() {
  if (free_.empty()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("KV cache: all ", pages(), " pages are in use"));
  }
  const int id = free_.back();
  free_.pop_back();
  uses_[id] = 1;
  return KvPage(this, id);
}

}  // namespace memory3
