// What a step feeds: which sequences, how many tokens, with which memories, and who gives way.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "inference_server/engine_internal.h"

namespace memory3 {

std::vector<Engine::Work> Engine::Schedule(absl::Time* wake) {
  const absl::Time now = absl::Now();
  ++step_;
  for (auto& sequence : running_) sequence->scheduled = false;
  budget_ = {decoder_->options().max_rows,
             std::min(decoder_->options().max_logit_rows, decoder_->options().max_rows),
             options_.slice_tokens};
  // A long continuation must not take the row that a later request's next token needs.
  const auto generations = std::count_if(running_.begin(), running_.end(),
                                         [](const auto& s) { return !s->ended && !s->scores(); });
  budget_.score_rows = budget_.logit_rows - static_cast<int>(generations);
  std::vector<Work> batch;
  for (size_t i = 0; i < running_.size(); ++i) {
    Running& sequence = *running_[i];
    if (sequence.ended) continue;
    Work work;
    if (!PlanSlice(sequence, now, wake, &work)) continue;
    sequence.scheduled = true;
    const int tokens = work.end - work.first;
    budget_.rows -= tokens;
    budget_.logit_rows -= work.logit_rows;
    if (sequence.scores()) budget_.score_rows -= work.logit_rows;
    if (!work.decodes) budget_.slice_tokens -= tokens;
    budget_.pages_taken += Decoder::PagesNeeded(*sequence.sequence, tokens);
    batch.push_back(std::move(work));
  }
  return batch;
}

bool Engine::AwaitsShared(Running& sequence, int shared, absl::Time now, absl::Time* wake) const {
  const size_t known = sequence.prompt_keys.size();
  if (!prompts_.enabled() || !sequence.reads_memories() || shared < static_cast<int>(known) ||
      known >= static_cast<size_t>(sequence.prompt_tokens() / sequence.grid.chunk_tokens()) ||
      known >= sequence.chunks.size())
    return false;
  const ChunkMemories& chunk = sequence.chunks[known];
  const absl::Time limit = chunk.due + sequence.request.memory.deadline.value_or(options_.wait_cap);
  if (chunk.fixed || chunk.answered || sequence.gave_up || now >= limit) return false;
  *wake = std::min(*wake, limit);
  if (sequence.waiting_since == absl::InfiniteFuture()) sequence.waiting_since = now;
  return true;
}

bool Engine::Begin(Running& sequence, absl::Time now, absl::Time* wake) {
  std::vector<KvPage> shared = FindShared(sequence);
  if (AwaitsShared(sequence, static_cast<int>(shared.size()) / prompts_.pages_per_chunk(), now,
                   wake))
    return false;
  // The chunks that are shared ask for no memories again.
  sequence.EndWait(now, &sequence.waiting_since, &sequence.waited);
  // One that has no pages begins when there is room for all its tokens and a page for each of the
  // others, so that it is not preempted at once. The oldest one always begins.
  int holders = 0;
  for (const auto& other : running_) holders += other->pages() > 0 ? 1 : 0;
  const int pages = (sequence.feedable_end() + 1 + kKvPageTokens) / kKvPageTokens -
                    static_cast<int>(shared.size());
  const bool oldest = running_.front().get() == &sequence;
  if (!oldest && holders > 0 && !EvictPrompts(pages + holders)) return false;

  const int chunks = static_cast<int>(shared.size()) / prompts_.pages_per_chunk();
  absl::StatusOr<Sequence> started = decoder_->Start(sequence.request.layout, std::move(shared));
  if (!started.ok()) {
    EndRequest(sequence, started.status());
    return false;
  }
  sequence.sequence = *std::move(started);
  sequence.shared_chunks = chunks;
  if (chunks == 0) return true;
  sequence.fed = sequence.sequence->length() - 1;  // `<s>` is token -1
  for (int r = 0; r < chunks && sequence.reads_memories(); ++r) {
    ChunkMemories& chunk = sequence.chunks[r];
    chunk.fixed = true;
    OrderChunk(chunk);
    for (ChunkMemory& memory : chunk.memories) {
      if (memory.from == v1::BYTE_SOURCE_UNSPECIFIED)
        memory.from = memory.read.from_store ? v1::STORE : v1::HOST;
    }
  }
  Unpin(sequence, sequence.retrieval_of(sequence.fed));
  if (sequence.began) return true;  // it was preempted meanwhile
  sequence.cached_tokens = sequence.sequence->length();
  const std::lock_guard lock(mutex_);
  stats_.cached_prompt_tokens += sequence.cached_tokens;
  return true;
}

bool Engine::PlanSlice(Running& sequence, absl::Time now, absl::Time* wake, Work* work) {
  if (sequence.pages() == 0 && !Begin(sequence, now, wake)) return false;
  const int first = sequence.fed, feedable = sequence.feedable_end();
  work->sequence = &sequence;
  work->first = first;
  work->decodes = feedable - first == 1 && first >= sequence.prompt_tokens();
  int limit = std::min(feedable, first + (work->decodes ? 1 : budget_.slice_tokens));
  limit = std::min(limit, first + budget_.rows);
  // Rows with logits are the slice's last; with scores there may be many.
  const int first_logits = sequence.first_logits();
  const int logit_rows =
      sequence.scores() ? std::min(budget_.score_rows, budget_.logit_rows) : budget_.logit_rows;
  limit = std::min(limit, std::max(first, first_logits) + logit_rows);
  if (limit <= first) return false;

  int end = first;
  while (end < limit) {
    const int r = sequence.retrieval_of(end);
    int run_end = end + 1;
    while (run_end < limit && sequence.retrieval_of(run_end) == r) ++run_end;
    if (!MemoriesReady(sequence, r, now, wake)) break;
    MemoryRead read{run_end - end, {}};
    if (r != ChunkGrid::kNoRetrieval) {
      read.slots = sequence.chunks[r].slots;
      sequence.chunks[r].step = step_;
    }
    work->reads.push_back(std::move(read));
    end = run_end;
  }
  if (sequence.ended || end == first) return false;

  if (!MakeRoom(sequence, Decoder::PagesNeeded(*sequence.sequence, end - first))) {
    const int room = (sequence.pages() + FreePages()) * kKvPageTokens - sequence.sequence->length();
    if (room <= 0) return false;
    end = std::min(end, first + room);
    int left = end - first;
    std::vector<MemoryRead> reads;
    for (MemoryRead& read : work->reads) {
      if (left == 0) break;
      read.tokens = std::min(read.tokens, left);
      left -= read.tokens;
      reads.push_back(std::move(read));
    }
    work->reads = std::move(reads);
  }
  sequence.began = true;
  work->end = end;
  work->logit_rows = std::max(0, end - std::max(first, first_logits));
  for (int t = first; t < end; ++t) {
    work->ids.push_back(t == ChunkGrid::kBos ? decoder_->config().bos_token_id
                                             : sequence.tokens[t]);
  }
  return true;
}

bool Engine::MemoriesReady(Running& sequence, int retrieval, absl::Time now, absl::Time* wake) {
  if (retrieval == ChunkGrid::kNoRetrieval) return true;
  ChunkMemories& chunk = sequence.chunks[retrieval];
  if (chunk.fixed && chunk.loaded) return true;
  const MemoryPlan& plan = sequence.request.memory;
  if (chunk.due == absl::InfiniteFuture()) chunk.due = now;
  const absl::Time limit =
      chunk.due +
      (sequence.gave_up ? absl::ZeroDuration() : plan.deadline.value_or(options_.wait_cap));
  if (!chunk.fixed && !chunk.answered) {
    if (now < limit) {
      *wake = std::min(*wake, limit);
      if (sequence.waiting_since == absl::InfiniteFuture()) sequence.waiting_since = now;
      return false;
    }
    if (plan.deadline) {
      chunk.timed_out = true;
    } else {
      chunk.status =
          absl::UnavailableError(absl::StrCat("no memories came from the memory server within ",
                                              absl::FormatDuration(options_.wait_cap)));
      sequence.gave_up = true;
    }
  }
  sequence.EndWait(now, &sequence.waiting_since, &sequence.waited);
  if (!chunk.fixed && !chunk.status.ok()) {
    if (plan.fail_if_unavailable) {
      EndRequest(sequence,
                 absl::UnavailableError(absl::StrCat("memory: ", chunk.status.message())));
      return false;
    }
    chunk.unavailable = true;
  }
  if (!PinChunk(sequence, retrieval, /*from_others=*/true)) {
    if (sequence.ended) return false;
    // What has come by the deadline is read: a load is waited for, a slot is not.
    const bool drop =
        !chunk.fixed && plan.deadline && now >= limit && chunk.slots.size() < chunk.memories.size();
    if (!drop) {
      if (!chunk.fixed && plan.deadline && now < limit) *wake = std::min(*wake, limit);
      if (sequence.loading_since == absl::InfiniteFuture()) sequence.loading_since = now;
      return false;
    }
    DropUnloaded(sequence, retrieval);
  }
  sequence.EndWait(now, &sequence.loading_since, &sequence.loading);
  if (chunk.fixed) return true;
  chunk.fixed = true;
  OrderChunk(chunk);
  if (chunk.unavailable || chunk.timed_out) {
    const std::lock_guard lock(mutex_);
    ++stats_.retrieval_fallbacks;
  }
  return true;
}

bool Engine::PinChunk(Running& sequence, int retrieval, bool from_others) {
  ChunkMemories& chunk = sequence.chunks[retrieval];
  if (chunk.memories.empty()) chunk.loaded = true;
  if (chunk.loaded) return true;
  if (const size_t first = chunk.slots.size(); first < chunk.memories.size()) {
    std::vector<std::shared_ptr<const HostMemory>> memories;
    for (size_t i = first; i < chunk.memories.size(); ++i)
      memories.push_back(chunk.memories[i].read.memory);
    absl::StatusOr<std::vector<DeviceSlots::Pinned>> pinned = slots_->Pin(memories);
    while (!pinned.ok() && from_others && TakeSlots(sequence, retrieval))
      pinned = slots_->Pin(memories);
    if (!pinned.ok()) return false;
    uint64_t device_hits = 0;
    for (const DeviceSlots::Pinned& p : *pinned) {
      ChunkMemory& memory = chunk.memories[chunk.slots.size()];
      chunk.slots.push_back(p.slot);
      if (memory.from != v1::BYTE_SOURCE_UNSPECIFIED) continue;
      device_hits += p.was_there ? 1 : 0;
      memory.from = p.was_there ? v1::DEVICE : memory.read.from_store ? v1::STORE : v1::HOST;
    }
    const std::lock_guard lock(mutex_);
    stats_.device_hits += device_hits;
  }
  for (const int slot : chunk.slots) {
    const absl::StatusOr<bool> loaded = slots_->Loaded(slot);
    if (!loaded.ok()) EndRequest(sequence, loaded.status());
    if (!loaded.ok() || !*loaded) return false;
  }
  chunk.loaded = true;
  return true;
}

bool Engine::TakeSlots(const Running& sequence, int retrieval) {
  // What was loaded ahead of its time, of those that arrived last first.
  for (size_t i = running_.size(); i-- > 0;) {
    Running& other = *running_[i];
    const int needed = &other == &sequence ? retrieval : other.retrieval_of(other.fed);
    for (int r = static_cast<int>(other.chunks.size()); r-- > std::max(needed, 0) + 1;) {
      if (!other.chunks[r].pinned() || other.chunks[r].step == step_) continue;
      UnpinChunk(other.chunks[r]);
      return true;
    }
  }
  // Those that arrived later and are not in this step give way.
  for (size_t i = running_.size(); i-- > 0 && running_[i].get() != &sequence;) {
    Running& other = *running_[i];
    if (other.scheduled) continue;
    for (ChunkMemories& chunk : other.chunks) {
      if (!chunk.pinned()) continue;
      UnpinChunk(chunk);
      return true;
    }
  }
  return false;
}

void Engine::OrderChunk(ChunkMemories& chunk) {
  const auto in_order = [](const ChunkMemory& a, const ChunkMemory& b) {
    return a.read.rank < b.read.rank;
  };
  if (std::is_sorted(chunk.memories.begin(), chunk.memories.end(), in_order)) return;
  // Slots of some only are those of memories that are not read yet: they are pinned anew.
  if (chunk.slots.size() < chunk.memories.size()) {
    UnpinChunk(chunk);
    std::sort(chunk.memories.begin(), chunk.memories.end(), in_order);
    return;
  }
  std::vector<std::pair<ChunkMemory, int>> both;
  for (size_t i = 0; i < chunk.slots.size(); ++i)
    both.emplace_back(std::move(chunk.memories[i]), chunk.slots[i]);
  std::sort(both.begin(), both.end(),
            [&](const auto& a, const auto& b) { return in_order(a.first, b.first); });
  for (size_t i = 0; i < both.size(); ++i) {
    chunk.memories[i] = std::move(both[i].first);
    chunk.slots[i] = both[i].second;
  }
}

void Engine::DropUnloaded(Running& sequence, int retrieval) {
  ChunkMemories& chunk = sequence.chunks[retrieval];
  std::vector<ChunkMemory> memories;
  std::vector<int> slots;
  for (size_t i = 0; i < chunk.slots.size(); ++i) {
    if (!slots_->Loaded(chunk.slots[i]).value_or(false)) {
      slots_->Unpin({&chunk.slots[i], 1});
      continue;
    }
    memories.push_back(std::move(chunk.memories[i]));
    slots.push_back(chunk.slots[i]);
  }
  chunk.memories = std::move(memories);
  chunk.slots = std::move(slots);
  chunk.loaded = true;
  chunk.timed_out = true;
  // Keys computed from the whole answer are of another prompt.
  if (static_cast<int>(sequence.prompt_keys.size()) > retrieval)
    sequence.prompt_keys.resize(retrieval);
}

// ---- pages ----

void Engine::ExtendPromptKeys(Running& sequence, int chunks) {
  const int size = sequence.grid.chunk_tokens();
  for (int c = static_cast<int>(sequence.prompt_keys.size()); c < chunks; ++c) {
    std::vector<RecordId> memories;
    if (sequence.reads_memories()) {
      if (c >= static_cast<int>(sequence.chunks.size())) return;
      const ChunkMemories& chunk = sequence.chunks[c];
      if (!chunk.fixed && !(chunk.answered && chunk.status.ok())) return;
      for (const ChunkMemory& memory : chunk.memories) memories.push_back(memory.read.memory->id());
    }
    const Hash256 previous =
        c > 0 ? sequence.prompt_keys[c - 1]
              : PromptCache::Root(sequence.request.tenant, sequence.request.layout);
    sequence.prompt_keys.push_back(
        PromptCache::KeyOf(previous, std::span(sequence.tokens).subspan(int64_t{c} * size, size),
                           std::move(memories)));
  }
}

std::vector<KvPage> Engine::FindShared(Running& sequence) {
  if (!prompts_.enabled()) return {};
  ExtendPromptKeys(sequence, sequence.prompt_tokens() / sequence.grid.chunk_tokens());
  return prompts_.Find(sequence.prompt_keys);
}

void Engine::SharePrompt(Running& sequence) {
  if (!prompts_.enabled()) return;
  const int size = sequence.grid.chunk_tokens(), pages = prompts_.pages_per_chunk();
  const int whole = std::min(sequence.prompt_tokens(), sequence.sequence->length()) / size;
  if (sequence.shared_chunks >= whole) return;
  ExtendPromptKeys(sequence, whole);
  for (int& c = sequence.shared_chunks; c < whole; ++c) {
    prompts_.Insert(std::span(sequence.prompt_keys).first(c + 1),
                    std::span(sequence.sequence->pages()).subspan(c * pages, pages));
  }
}

int Engine::FreePages() const { return decoder_->cache().free_pages() - budget_.pages_taken; }

bool Engine::EvictPrompts(int pages) {
  while (FreePages() < pages && prompts_.Evict()) {
  }
  return FreePages() >= pages;
}

bool Engine::MakeRoom(Running& sequence, int pages) {
  for (size_t i = running_.size(); i-- > 0;) {
    if (EvictPrompts(pages)) return true;
    Running& other = *running_[i];
    if (&other == &sequence) break;
    if (!other.scheduled && other.pages() > 0) Preempt(other);
  }
  return EvictPrompts(pages);
}

void Engine::Preempt(Running& sequence) {
  Unpin(sequence, static_cast<int>(sequence.chunks.size()));
  sequence.sequence.reset();
  sequence.fed = ChunkGrid::kBos;
  const std::lock_guard lock(mutex_);
  ++stats_.preemptions;
}

void Engine::Unpin(Running& sequence, int end_retrieval) {
  for (int r = 0; r < end_retrieval; ++r) {
    if (sequence.chunks[r].pinned()) UnpinChunk(sequence.chunks[r]);
  }
}

void Engine::UnpinChunk(ChunkMemories& chunk) {
  slots_->Unpin(chunk.slots);
  chunk.slots.clear();
  chunk.loaded = false;
}

void Engine::Step(std::vector<Work>& batch) {
  std::vector<Slice> slices;
  int logit_rows = 0;
  bool greedy = true;  // the device may choose
  uint64_t prompt_tokens = 0;
  for (Work& work : batch) {
    Running& sequence = *work.sequence;
    slices.push_back({&*sequence.sequence, work.ids, work.reads, work.logit_rows});
    logit_rows += work.logit_rows;
    if (!work.decodes) prompt_tokens += work.ids.size();
    if (work.logit_rows > 0) {
      greedy = greedy && !sequence.scores() && sequence.sampler.is_plain_greedy() &&
               !sequence.request.logprobs && sequence.generated >= sequence.request.min_new_tokens;
    }
  }
  const absl::Time begin = absl::Now();
  absl::Status status = decoder_->Forward(slices);
  std::vector<int32_t> chosen;
  if (status.ok()) {
    if (logit_rows == 0) {
      status = decoder_->model().device().Synchronize();  // slots are let go below
    } else if (greedy) {
      absl::StatusOr<std::vector<int32_t>> ids = decoder_->ArgMax();
      status = ids.status();
      if (ids.ok()) chosen = *std::move(ids);
    } else {
      status = decoder_->DownloadLogits(&logits_);
    }
  }
  if (!status.ok()) {
    for (Work& work : batch) EndRequest(*work.sequence, status);
    return;
  }
  const absl::Time now = absl::Now();
  {
    const std::lock_guard lock(mutex_);
    stats_.prompt_tokens += prompt_tokens;
    stats_.in_model += now - begin;
  }
  const size_t vocabulary = decoder_->config().vocab_size;
  int row = 0;
  for (Work& work : batch) {
    Running& sequence = *work.sequence;
    sequence.fed = work.end;
    SharePrompt(sequence);
    SendProvenance(sequence, work.end);
    if (work.logit_rows > 0) {
      UseLogits(work, chosen.empty() ? logits_.data() + row * vocabulary : nullptr,
                chosen.empty() ? nullptr : &chosen[row], now);
    }
    row += work.logit_rows;
    if (!sequence.ended) Unpin(sequence, sequence.retrieval_of(sequence.fed));
  }
}

}  // namespace memory3
