#include "inference_server/prompt_cache.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace memory3 {
namespace {

bool IsIdle(const std::vector<KvPage>& pages) {
  return std::all_of(pages.begin(), pages.end(),
                     [](const KvPage& page) { return page.use_count() == 1; });
}

}  // namespace

PromptCache::PromptCache(int max_pages, int chunk_tokens)
    : pages_per_chunk_(chunk_tokens / kKvPageTokens),
      max_pages_(chunk_tokens % kKvPageTokens == 0 ? max_pages : 0) {}

Hash256 PromptCache::Root(std::string_view tenant, Layout layout) {
  Sha256 sha;
  sha.UpdateLengthPrefixed(tenant);
  sha.UpdateLengthPrefixed(layout == Layout::kMemory ? "memory" : "plain");
  return sha.Finish();
}

Hash256 PromptCache::KeyOf(const Hash256& previous, std::span<const int32_t> ids,
                           std::vector<RecordId> memories) {
  std::sort(memories.begin(), memories.end());
  Sha256 sha;
  sha.UpdateLengthPrefixed(previous.view());
  sha.UpdateLengthPrefixed({reinterpret_cast<const char*>(ids.data()), ids.size_bytes()});
  for (const RecordId& id : memories) sha.UpdateLengthPrefixed(id.view());
  return sha.Finish();
}

std::vector<KvPage> PromptCache::Find(std::span<const Hash256> keys) {
  std::vector<KvPage> pages;
  size_t found = 0;
  for (; found < keys.size(); ++found) {
    const auto entry = entries_.find(keys[found]);
    if (entry == entries_.end()) break;
    pages.insert(pages.end(), entry->second.pages.begin(), entry->second.pages.end());
  }
  Touch(keys.first(found));
  return pages;
}

void PromptCache::Insert(std::span<const Hash256> keys, std::span<const KvPage> pages) {
  if (!enabled()) return;
  if (!entries_.contains(keys.back())) {
    while (static_cast<int>(entries_.size() + 1) * pages_per_chunk_ > max_pages_) {
      if (ages_.empty()) return;
      Remove(std::prev(ages_.end()));
    }
    ages_.push_front(keys.back());
    entries_[keys.back()] = {{pages.begin(), pages.end()}, ages_.begin()};
  }
  Touch(keys);
}

void PromptCache::Touch(std::span<const Hash256> keys) {
  for (size_t i = keys.size(); i-- > 0;) {
    const auto entry = entries_.find(keys[i]);
    if (entry != entries_.end()) ages_.splice(ages_.begin(), ages_, entry->second.age);
  }
}

void PromptCache::Remove(std::list<Hash256>::iterator age) {
  entries_.erase(*age);
  ages_.erase(age);
}

bool PromptCache::Evict() {
  for (auto age = ages_.end(); age != ages_.begin();) {
    --age;
    if (!IsIdle(entries_.at(*age).pages)) continue;
    Remove(age);
    return true;
  }
  return false;
}

int PromptCache::idle_pages() const {
  int idle = 0;
  for (const auto& [key, entry] : entries_) {
    for (const KvPage& page : entry.pages) idle += page.use_count() == 1 ? 1 : 0;
  }
  return idle;
}

}  // namespace memory3
