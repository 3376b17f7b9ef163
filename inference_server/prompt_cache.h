// Keys and values of prompts that requests share: full chunks only, found by what they were
// computed from (explicit-memory.md, Chunks and retrieval): the chunk before, the tenant and
// layout, the chunk's ids, the memories it read in sorted order.
//
// A context begins with `<s>`, so that chunk c's pages end one token before the chunk does: pages
// of chunks 0 … c hold context indices 0 … chunk_tokens·(c+1) - 1, and the chunk's last token is
// fed again.
//
// Bounded in pages, least recently used first out, a chunk never before those that follow it.
//
// Thread-safety: the engine's thread. Ownership: shares pages with sequences; the KV cache must
// outlive it.
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "memory/hash.h"
#include "memory/record.h"
#include "transformer/decoder.h"
#include "transformer/kv_cache.h"

namespace memory3 {

class PromptCache {
 public:
  // `max_pages`: 0 keeps nothing. chunk_tokens must be a multiple of kKvPageTokens, else nothing is
  // kept either.
  PromptCache(int max_pages, int chunk_tokens);

  // What a prompt's first chunk follows.
  static Hash256 Root(std::string_view tenant, Layout layout);
  // The key of a chunk of these ids that read these memories (in any order) after `previous`.
  static Hash256 KeyOf(const Hash256& previous, std::span<const int32_t> ids,
                       std::vector<RecordId> memories);

  bool enabled() const { return max_pages_ > 0; }
  int pages_per_chunk() const { return pages_per_chunk_; }
  // The pages of the longest beginning of `keys` (of chunks 0, 1, …) that is here.
  std::vector<KvPage> Find(std::span<const Hash256> keys);
  // `keys` of chunks 0 … c; `pages` those of chunk c, all full. What is here already stays.
  void Insert(std::span<const Hash256> keys, std::span<const KvPage> pages);
  // Gives back the page run used longest ago that nobody else holds. False: there is none.
  bool Evict();
  // Pages that nobody else holds.
  int idle_pages() const;

 private:
  struct Entry {
    std::vector<KvPage> pages;
    std::list<Hash256>::iterator age;
  };
  // Makes them the most recent, the first chunk most of all.
  void Touch(std::span<const Hash256> keys);
  void Remove(std::list<Hash256>::iterator age);

  const int pages_per_chunk_;
  const int max_pages_;
  std::list<Hash256> ages_;  // used last first
  absl::flat_hash_map<Hash256, Entry> entries_;
};

}  // namespace memory3
