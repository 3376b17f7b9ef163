#include "memory_server/version_index.h"

#include <algorithm>
#include <utility>

#include "memory_server/dot.h"
#include "memory_server/message.h"

namespace memory3 {

VersionIndex::Tail::~Tail() {
  for (uint32_t c = 0; c < kMaxChunks && chunks[c] != nullptr; ++c) delete chunks[c].load();
}

VersionIndex::VersionIndex(std::shared_ptr<const BaseIndex> base)
    : state_(NewState(std::move(base))) {
  uint64_t distinct = 0;
  std::span<const SlotKey> keys = state_->base->keys();
  for (size_t i = 0; i < keys.size(); ++i) {
    distinct += i == 0 || keys[i].record_id != keys[i - 1].record_id;
  }
  records_ = distinct;
}

std::shared_ptr<VersionIndex::State> VersionIndex::NewState(std::shared_ptr<const BaseIndex> base) {
  auto state = std::make_shared<State>();
  state->dead.reset(new std::atomic<uint64_t>[base->size() / 64 + 1]());
  state->base = std::move(base);
  return state;
}

std::shared_ptr<VersionIndex::State> VersionIndex::state() const {
  std::lock_guard lock(state_mu_);
  return state_;
}

void VersionIndex::Search(std::span<Lookup> lookups) const {
  std::shared_ptr<State> s = state();
  const int n = s->base->dimension();
  std::vector<BaseIndex::Lookup> in_base;
  in_base.reserve(lookups.size());
  for (const Lookup& lookup : lookups) in_base.push_back({lookup.query, lookup.k, {}, false});
  s->base->Search(in_base, s->dead.get());
  for (size_t i = 0; i < lookups.size(); ++i) {
    lookups[i].found.clear();
    lookups[i].all = in_base[i].all;
    for (const ScoredSlot& b : in_base[i].best) {
      lookups[i].found.push_back({s->base->key(b.slot), b.score, s->base->exact()});
    }
  }
  const uint32_t size = s->tail.size.load(std::memory_order_acquire);
  for (uint32_t begin = 0; begin < size; begin += kChunk) {
    TailChunk* chunk = s->tail.chunks[begin / kChunk].load(std::memory_order_acquire);
    float scores[kChunk];
    uint32_t rows = std::min(kChunk, size - begin);
    for (Lookup& lookup : lookups) {
      DotRows(lookup.query, chunk->vectors.get(), rows, n, scores);
      for (uint32_t r = 0; r < rows; ++r) {
        if (chunk->slots[r].live.load(std::memory_order_relaxed)) {
          lookup.found.push_back({chunk->slots[r].key, scores[r], true});
        }
      }
    }
  }
  for (size_t i = 0; i < lookups.size(); ++i) {
    std::vector<Candidate>& found = lookups[i].found;
    const size_t from_base = in_base[i].best.size(), k = lookups[i].k;
    if (found.size() - from_base <= k) continue;
    lookups[i].all = false;
    std::nth_element(found.begin() + from_base, found.begin() + from_base + k - 1, found.end(),
                     [](const Candidate& a, const Candidate& b) {
                       return a.score != b.score ? a.score > b.score : a.key < b.key;
                     });
    found.resize(from_base + k);
  }
}

uint64_t VersionIndex::memory_bytes() const {
  std::shared_ptr<State> s = state();
  uint64_t tail = s->tail.size.load(std::memory_order_acquire);
  return s->base->memory_bytes() + s->base->size() / 8 +
         tail * (sizeof(TailSlot) + 4ull * s->base->dimension());
}

std::string VersionIndex::description() const { return state()->base->description(); }

bool VersionIndex::BaseLive(uint32_t slot) const {
  return (state_->dead[slot / 64].load(std::memory_order_relaxed) >> (slot % 64) & 1) == 0;
}

VersionIndex::TailSlot& VersionIndex::SlotAt(uint32_t i) const {
  return state_->tail.chunks[i / kChunk].load(std::memory_order_relaxed)->slots[i % kChunk];
}

const float* VersionIndex::VectorAt(uint32_t i) const {
  TailChunk* chunk = state_->tail.chunks[i / kChunk].load(std::memory_order_relaxed);
  return &chunk->vectors[uint64_t{i % kChunk} * state_->base->dimension()];
}

std::vector<uint64_t> VersionIndex::EmbeddingsOf(const RecordId& id) const {
  std::vector<uint64_t> hashes;
  auto [first, last] = state_->base->SlotsOf(id);
  for (uint32_t s = first; s < last; ++s) {
    if (BaseLive(s)) hashes.push_back(state_->base->key(s).embedding_hash);
  }
  if (auto it = tail_slots_.find(id); it != tail_slots_.end()) {
    for (uint32_t i : it->second) {
      if (SlotAt(i).live.load(std::memory_order_relaxed)) {
        hashes.push_back(SlotAt(i).key.embedding_hash);
      }
    }
  }
  return hashes;
}

std::shared_ptr<VersionIndex> VersionIndex::Clone() const {
  std::shared_ptr<VersionIndex> copy(new VersionIndex);
  copy->state_ = NewState(state_->base);
  for (size_t w = 0; w < state_->base->size() / 64 + 1; ++w) {
    copy->state_->dead[w].store(state_->dead[w].load(std::memory_order_relaxed),
                                std::memory_order_relaxed);
  }
  copy->dead_base_ = dead_base_;
  const uint32_t size = state_->tail.size.load(std::memory_order_relaxed);
  for (uint32_t i = 0; i < size; ++i) {
    if (SlotAt(i).live.load(std::memory_order_relaxed)) copy->AddOne(SlotAt(i).key, VectorAt(i));
  }
  copy->records_ = records_.load();  // AddOne counted those of the tail only
  return copy;
}

std::vector<RecordId> VersionIndex::ChangedRecords() const {
  std::vector<RecordId> ids;
  for (const auto& [id, slots] : tail_slots_) ids.push_back(id);
  for (uint32_t w = 0; dead_base_ != 0 && w < state_->base->size() / 64 + 1; ++w) {
    if (state_->dead[w].load(std::memory_order_relaxed) == 0) continue;
    for (uint32_t s = 64 * w; s < std::min<uint64_t>(64 * w + 64, state_->base->size()); ++s) {
      if (!BaseLive(s)) ids.push_back(state_->base->key(s).record_id);
    }
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

bool VersionIndex::HasRecord(const RecordId& id) const { return !EmbeddingsOf(id).empty(); }

void VersionIndex::Apply(std::vector<Addition> additions, const std::vector<SlotKey>& removals) {
  for (const SlotKey& key : removals) {
    RemoveOne(key);
    if (folding_) since_fold_.push_back({false, key, {}});
  }
  for (Addition& a : additions) {
    AddOne(a.key, a.vector.data());
    if (folding_) since_fold_.push_back({true, a.key, std::move(a.vector)});
  }
}

void VersionIndex::AddOne(const SlotKey& key, const float* vector) {
  if (!HasRecord(key.record_id)) records_.fetch_add(1, std::memory_order_relaxed);
  if (std::optional<uint32_t> slot = state_->base->Find(key)) {
    if (!BaseLive(*slot)) {
      state_->dead[*slot / 64].fetch_and(~(uint64_t{1} << (*slot % 64)), std::memory_order_relaxed);
      --dead_base_;
    }
    return;
  }
  std::vector<uint32_t>& mine = tail_slots_[key.record_id];
  for (uint32_t i : mine) {
    if (SlotAt(i).key == key) {
      SlotAt(i).live.store(true, std::memory_order_relaxed);
      return;
    }
  }
  Tail& tail = state_->tail;
  const uint32_t i = tail.size.load(std::memory_order_relaxed);
  const int n = state_->base->dimension();
  if (i % kChunk == 0) {
    auto chunk = std::make_unique<TailChunk>();
    chunk->vectors.reset(new float[uint64_t{kChunk} * n]);
    tail.chunks[i / kChunk].store(chunk.release(), std::memory_order_release);
  }
  TailChunk* chunk = tail.chunks[i / kChunk].load(std::memory_order_relaxed);
  std::copy_n(vector, n, &chunk->vectors[uint64_t{i % kChunk} * n]);
  chunk->slots[i % kChunk].key = key;
  tail.size.store(i + 1, std::memory_order_release);
  mine.push_back(i);
}

void VersionIndex::RemoveOne(const SlotKey& key) {
  bool was_live = false;
  if (std::optional<uint32_t> slot = state_->base->Find(key); slot && BaseLive(*slot)) {
    state_->dead[*slot / 64].fetch_or(uint64_t{1} << (*slot % 64), std::memory_order_relaxed);
    ++dead_base_;
    was_live = true;
  }
  if (auto it = tail_slots_.find(key.record_id); it != tail_slots_.end()) {
    for (uint32_t i : it->second) {
      if (SlotAt(i).key != key) continue;
      was_live |= SlotAt(i).live.exchange(false, std::memory_order_relaxed);
    }
  }
  if (was_live && !HasRecord(key.record_id)) records_.fetch_sub(1, std::memory_order_relaxed);
}

uint64_t VersionIndex::backlog() const {
  return dead_base_ + state_->tail.size.load(std::memory_order_relaxed);
}

std::vector<SlotKey> VersionIndex::BeginFold() {
  folding_ = true;
  since_fold_.clear();
  std::vector<SlotKey> keys;
  for (uint32_t s = 0; s < state_->base->size(); ++s) {
    if (BaseLive(s)) keys.push_back(state_->base->key(s));
  }
  const size_t from_base = keys.size();
  const uint32_t size = state_->tail.size.load(std::memory_order_relaxed);
  for (uint32_t i = 0; i < size; ++i) {
    if (SlotAt(i).live.load(std::memory_order_relaxed)) keys.push_back(SlotAt(i).key);
  }
  std::sort(keys.begin() + from_base, keys.end());
  std::inplace_merge(keys.begin(), keys.begin() + from_base, keys.end());
  return keys;
}

void VersionIndex::FinishFold(std::shared_ptr<const BaseIndex> base) {
  // The new state is filled before readers see it: no search misses a change made before it began.
  VersionIndex fresh(std::move(base));
  for (Change& c : since_fold_) {
    if (c.add) {
      fresh.AddOne(c.key, c.vector.data());
    } else {
      fresh.RemoveOne(c.key);
    }
  }
  tail_slots_ = std::move(fresh.tail_slots_);
  dead_base_ = fresh.dead_base_;
  records_ = fresh.records_.load();
  {
    std::lock_guard lock(state_mu_);
    state_ = std::move(fresh.state_);
  }
  CancelFold();
}

void VersionIndex::CancelFold() {
  folding_ = false;
  since_fold_ = {};
}

}  // namespace memory3
