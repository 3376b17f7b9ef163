// What a step feeds: which sequences, how many tokens, with which memories, and who gives way.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "inference_server/engine_internal.h"

namespace memory3 {

std::vector<Engine::Work> Engine::Schedule(absl::Time* wake) {
  const absl::Time now = absl::Now();
  for (auto& sequence : running_) sequence->scheduled = false;
  budget_ = {decoder_->options().max_rows,
             std::min(decoder_->options().max_logit_rows, decoder_->options().max_rows),
             options_.slice_tokens, 0};
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
    if (!work.decodes) budget_.slice_tokens -= tokens;
    budget_.pages_taken += Decoder::PagesNeeded(*sequence.sequence, tokens);
    batch.push_back(std::move(work));
  }
  return batch;
}

bool Engine::PlanSlice(Running& sequence, absl::Time now, absl::Time* wake, Work* work) {
  const int first = sequence.fed, feedable = sequence.feedable_end();
  work->sequence = &sequence;
  work->first = first;
  work->decodes = feedable - first == 1 && first >= sequence.prompt_tokens();
  int limit = std::min(feedable, first + (work->decodes ? 1 : budget_.slice_tokens));
  limit = std::min(limit, first + budget_.rows);
  // Rows with logits are the slice's last; with scores there may be many.
  const int first_logits = sequence.first_logits();
  limit = std::min(limit, std::max(first, first_logits) + budget_.logit_rows);
  if (limit <= first) return false;

  if (!sequence.sequence) {
    // One that has no pages begins when there is room for all its tokens and a page for each of
    // the others, so that it is not preempted at once. The oldest one always begins.
    int holders = 0;
    for (const auto& other : running_) holders += other->pages() > 0 ? 1 : 0;
    const int pages = (feedable + 1 + kKvPageTokens) / kKvPageTokens;
    const bool oldest = running_.front().get() == &sequence;
    if (!oldest && holders > 0 &&
        decoder_->cache().free_pages() - budget_.pages_taken < pages + holders) {
      return false;
    }
  }

  int end = first;
  while (end < limit) {
    const int r = sequence.retrieval_of(end);
    int run_end = end + 1;
    while (run_end < limit && sequence.retrieval_of(run_end) == r) ++run_end;
    if (!MemoriesReady(sequence, r, now, wake) || !PinChunk(sequence, r)) break;
    MemoryRead read{run_end - end, {}};
    if (r != ChunkGrid::kNoRetrieval) read.slots = sequence.chunks[r].slots;
    work->reads.push_back(std::move(read));
    end = run_end;
  }
  if (sequence.ended || end == first) return false;

  if (!sequence.sequence) {
    absl::StatusOr<Sequence> started = decoder_->Start(sequence.request.layout);
    if (!started.ok()) {
      EndRequest(sequence, started.status());
      return false;
    }
    sequence.sequence = *std::move(started);
  }
  if (!MakeRoom(sequence, Decoder::PagesNeeded(*sequence.sequence, end - first))) {
    const int free = decoder_->cache().free_pages() - budget_.pages_taken;
    const int room = (sequence.pages() + free) * kKvPageTokens - sequence.sequence->length();
    if (room <= 0) {
      if (sequence.pages() == 0) sequence.sequence.reset();
      return false;
    }
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
  if (chunk.fixed) return true;
  const MemoryPlan& plan = sequence.request.memory;
  if (chunk.due == absl::InfiniteFuture()) chunk.due = now;
  if (!chunk.answered) {
    const absl::Duration limit =
        sequence.gave_up ? absl::ZeroDuration() : plan.deadline.value_or(options_.wait_cap);
    if (now < chunk.due + limit) {
      *wake = std::min(*wake, chunk.due + limit);
      if (sequence.waiting_since == absl::InfiniteFuture()) sequence.waiting_since = now;
      return false;
    }
    if (plan.deadline) {
      chunk.timed_out = true;
    } else {
      chunk.result.status =
          absl::UnavailableError(absl::StrCat("no memories came from the memory server within ",
                                              absl::FormatDuration(options_.wait_cap)));
      sequence.gave_up = true;
    }
  }
  if (sequence.waiting_since != absl::InfiniteFuture()) {
    const absl::Duration waited = now - sequence.waiting_since;
    sequence.waited += waited;
    if (sequence.generated == 0) sequence.waited_for_prompt += waited;
    sequence.waiting_since = absl::InfiniteFuture();
  }
  if (!chunk.result.status.ok()) {
    if (plan.fail_if_unavailable) {
      EndRequest(sequence,
                 absl::UnavailableError(absl::StrCat("memory: ", chunk.result.status.message())));
      return false;
    }
    chunk.unavailable = true;
  }
  chunk.fixed = true;
  chunk.memories = std::move(chunk.result.memories);
  if (chunk.unavailable || chunk.timed_out) {
    const std::lock_guard lock(mutex_);
    ++stats_.retrieval_fallbacks;
  }
  return true;
}

bool Engine::PinChunk(Running& sequence, int retrieval) {
  if (retrieval == ChunkGrid::kNoRetrieval) return true;
  ChunkMemories& chunk = sequence.chunks[retrieval];
  if (chunk.pinned || chunk.memories.empty()) return true;
  std::vector<std::shared_ptr<const HostMemory>> memories;
  for (const ReadMemory& read : chunk.memories) memories.push_back(read.memory);
  const absl::Time begin = absl::Now();
  absl::StatusOr<std::vector<DeviceSlots::Pinned>> pinned = slots_->Pin(memories);
  // Those that arrived last and are not in this step give way.
  for (size_t i = running_.size(); i-- > 0 && absl::IsResourceExhausted(pinned.status());) {
    Running& other = *running_[i];
    if (&other == &sequence) break;
    if (other.scheduled) continue;
    Unpin(other, ChunkGrid::kNoRetrieval);
    pinned = slots_->Pin(memories);
  }
  sequence.loading += absl::Now() - begin;
  if (absl::IsResourceExhausted(pinned.status())) return false;
  if (!pinned.ok()) {
    EndRequest(sequence, pinned.status());
    return false;
  }
  const bool first = chunk.from.empty();
  uint64_t device_hits = 0;
  for (size_t i = 0; i < pinned->size(); ++i) {
    const DeviceSlots::Pinned& p = (*pinned)[i];
    chunk.slots.push_back(p.slot);
    if (!first) continue;
    device_hits += p.was_there ? 1 : 0;
    chunk.from.push_back(p.was_there                    ? v1::DEVICE
                         : chunk.memories[i].from_store ? v1::STORE
                                                        : v1::HOST);
  }
  chunk.pinned = true;
  const std::lock_guard lock(mutex_);
  stats_.device_hits += device_hits;
  return true;
}

bool Engine::MakeRoom(Running& sequence, int pages) {
  for (size_t i = running_.size(); i-- > 0;) {
    if (decoder_->cache().free_pages() - budget_.pages_taken >= pages) return true;
    Running& other = *running_[i];
    if (&other == &sequence) break;
    if (!other.scheduled && other.pages() > 0) Preempt(other);
  }
  return decoder_->cache().free_pages() - budget_.pages_taken >= pages;
}

void Engine::Preempt(Running& sequence) {
  Unpin(sequence, ChunkGrid::kNoRetrieval);
  sequence.sequence.reset();
  sequence.fed = ChunkGrid::kBos;
  const std::lock_guard lock(mutex_);
  ++stats_.preemptions;
}

void Engine::Unpin(Running& sequence, int keep_retrieval) {
  for (int r = 0; r < static_cast<int>(sequence.chunks.size()); ++r) {
    ChunkMemories& chunk = sequence.chunks[r];
    if (!chunk.pinned || r == keep_retrieval) continue;
    slots_->Unpin(chunk.slots);
    chunk.slots.clear();
    chunk.pinned = false;
  }
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
  {
    const std::lock_guard lock(mutex_);
    stats_.prompt_tokens += prompt_tokens;
  }
  const absl::Time now = absl::Now();
  const size_t vocabulary = decoder_->config().vocab_size;
  int row = 0;
  for (Work& work : batch) {
    Running& sequence = *work.sequence;
    sequence.fed = work.end;
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
