// The engine's own view of a request. Only engine*.cc include it.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "inference_server/engine.h"
#include "inference_server/text_output.h"
#include "transformer/chunk_grid.h"

namespace memory3 {

struct Engine::Mailbox {
  void Poke() {
    const std::lock_guard lock(mutex);
    poked = true;
    changed.notify_one();
  }
  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  bool poked = false;
  std::vector<Answer> answers;
};

struct ChunkMemory {
  ReadMemory read;
  v1::ByteSource from = v1::BYTE_SOURCE_UNSPECIFIED;  // known with the first pin
};

// One retrieval of a sequence: what it found, and what those who read it read for good.
struct ChunkMemories {
  bool answered = false;                    // wholly
  absl::Status status;                      // of the answer: why memories are missing
  absl::Time due = absl::InfiniteFuture();  // since when its first reader could be fed
  // Once the first reader is fed nothing below changes, except for the slots. Once it has timed out
  // or is unavailable no more memories are taken.
  bool fixed = false;
  bool timed_out = false;
  bool unavailable = false;
  std::vector<ChunkMemory> memories;  // as they come; in the order of their ranks once fixed
  bool loaded = false;                // all slots can be read
  std::vector<int> slots;             // of the first memories; of all, before they are read
  uint64_t step = 0;                  // the last that read it

  bool pinned() const { return !slots.empty(); }
};

struct Engine::Running {
  Running(EngineRequest r, std::shared_ptr<EventSink> s, Sampler sampling, std::vector<int32_t> ids,
          int chunk_tokens, const Tokenizer* tokenizer)
      : request(std::move(r)),
        sink(std::move(s)),
        sampler(std::move(sampling)),
        grid(static_cast<int>(ids.size()), chunk_tokens),
        text(tokenizer, request.stop),
        tokens(std::move(ids)) {}

  bool scores() const { return request.continuation.has_value(); }
  bool reads_memories() const {
    return request.memory.base != nullptr || request.memory.unavailable;
  }
  int prompt_tokens() const { return grid.prompt_tokens(); }
  // Tokens before this one can be fed: the last of a continuation is not.
  int feedable_end() const { return static_cast<int>(tokens.size()) - (scores() ? 1 : 0); }
  // Logits are wanted after each token from this one on.
  int first_logits() const {
    return scores() ? prompt_tokens() - 1 + static_cast<int>(score.logprobs.size())
                    : static_cast<int>(tokens.size()) - 1;
  }
  int retrieval_of(int token) const {
    return reads_memories() ? grid.RetrievalOf(token) : ChunkGrid::kNoRetrieval;
  }
  int pages() const { return sequence ? static_cast<int>(sequence->pages().size()) : 0; }
  // A wait since `*since`, if there is one, is over and counts to `*total`.
  void EndWait(absl::Time now, absl::Time* since, absl::Duration* total) {
    if (*since == absl::InfiniteFuture()) return;
    *total += now - *since;
    if (generated == 0) waited_for_prompt += now - *since;
    *since = absl::InfiniteFuture();
  }

  uint64_t number = 0;
  EngineRequest request;
  std::shared_ptr<EventSink> sink;
  Sampler sampler;
  ChunkGrid grid;
  TextOutput text;
  std::vector<int32_t> tokens;  // without <s>: the prompt, then generated or the continuation
  int fed = ChunkGrid::kBos;    // the next token to feed
  int generated = 0;
  std::optional<Sequence> sequence;   // none: it has no pages
  std::vector<ChunkMemories> chunks;  // by retrieval, those asked for
  bool gave_up = false;               // a wait ran into the cap: no chunk waits any more
  std::vector<Hash256> prompt_keys;   // of the first full prompt chunks, as far as they are known
  int cached_tokens = 0;              // of the prompt, `<s>` included, that were not fed
  int shared_chunks = 0;              // full prompt chunks of `sequence` that are shared
  bool began = false;                 // a token was fed once
  int next_chunk = 0;                 // whose provenance is sent next
  bool introduced = false;            // PromptInfo is sent
  bool scheduled = false;             // in this step
  bool ended = false;
  ContinuationScore score;

  uint32_t memories_read = 0;
  absl::Time submitted, admitted;
  absl::Time first_token = absl::InfiniteFuture();
  absl::Time waiting_since = absl::InfiniteFuture();  // for memories
  absl::Time loading_since = absl::InfiniteFuture();  // for their slots
  absl::Duration waited, waited_for_prompt, loading;
  std::optional<int32_t> stop_token_id;  // the one found
};

struct Engine::Work {
  Running* sequence = nullptr;
  int first = 0, end = 0;  // tokens, <s> being -1
  std::vector<int32_t> ids;
  std::vector<MemoryRead> reads;
  int logit_rows = 0;
  bool decodes = false;  // one generated token
};

}  // namespace memory3
