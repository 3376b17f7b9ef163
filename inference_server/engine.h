// The engine: one thread that owns the device and runs all requests in continuous batches, with
// memories read beside compute.
//
// Each step feeds, in the order requests arrived, the next tokens of every sequence whose memories
// are here: one token of those that generate, slices of prompts within a budget, so that a long
// prompt does not stall the others. A sequence that waits for memories steps aside. When the KV
// cache (or the pool of memories) is full, the sequence that arrived last gives its pages up and
// later feeds its tokens again with the memories that its chunks have read: it never retrieves
// again. What memories need (embedding, retrieval, decoding, the copy into the device's pool) runs
// on other threads beside the steps. Full prompt chunks are computed once for requests that begin
// alike and read the same memories. A request's tokens are those of the offline loops
// (transformer/generate.h) whatever runs beside it.
//
// Thread-safety: every method from any thread. Sinks are called on the engine's thread (or in
// Submit's for a request that never ran) and must not block.
// Ownership: an Engine owns its decoder; tokenizer and reader must outlive it. A sink is held until
// its End has been called. The destructor ends what runs with UNAVAILABLE.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "inference_server/device_slots.h"
#include "inference_server/memory_reader.h"
#include "inference_server/memory_source.h"
#include "inference_server/prompt_cache.h"
#include "memory3/v1/inference.pb.h"
#include "transformer/decoder.h"
#include "transformer/sampler.h"
#include "transformer/tokenizer.h"

namespace memory3 {

struct EngineOptions {
  int max_running = 32;    // sequences in the batch
  int max_waiting = 256;   // requests that wait to be; more are RESOURCE_EXHAUSTED
  int slice_tokens = 256;  // prompt tokens fed in one step, of all sequences
  // How long a chunk waits for its memories under WAIT, at most.
  absl::Duration wait_cap = absl::Seconds(30);
  // Pages of the KV cache that may keep prompts for requests that begin alike (prompt_cache.h).
  // They are given up before a sequence is preempted. Default: half of the cache. 0: none.
  std::optional<int> prompt_cache_pages;
  std::string model_name;
};

// What a request's memories are read from and how; `base` null: no knowledge base.
struct MemoryPlan {
  std::shared_ptr<MemoryBase> base;
  bool unavailable = false;  // a base was asked for but cannot be reached: chunks say so
  // Spent on looking the base up: counts as waiting for the prompt's memories.
  absl::Duration waited;
  uint32_t references_per_chunk = 5;
  std::optional<float> min_score;
  v1::Filter filter;
  std::optional<absl::Duration> deadline;  // the DEADLINE policy; else WAIT
  bool fail_if_unavailable = false;
  bool with_text = false;
};

struct EngineRequest {
  std::string tenant = "default";
  std::string request_id;       // unique among the tenant's running ones
  std::vector<int32_t> prompt;  // ids, with or without bos
  Layout layout = Layout::kMemory;
  MemoryPlan memory;

  // Generate.
  SamplingOptions sampling;
  int max_new_tokens = 256;
  int min_new_tokens = 0;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  std::vector<int32_t> eos_token_ids;  // as stop ids, but not reported as one; empty: ignored
  std::optional<int> logprobs;
  bool echo = false;

  // Score: these ids follow the prompt; nothing is generated.
  std::optional<std::vector<int32_t>> continuation;
};

struct ContinuationScore {
  std::vector<float> logprobs;
  bool greedy = true;
};

// Where a request's events go.
class EventSink {
 public:
  virtual ~EventSink() = default;
  // PromptInfo, deltas and provenance, Finish; for a score provenance and Finish only.
  virtual void Send(v1::GenerateResponse event) = 0;
  // Before Finish, of a score.
  virtual void Scored(ContinuationScore score) = 0;
  // Last. Not OK: the request failed.
  virtual void End(absl::Status status) = 0;
};

struct EngineStats {
  int running = 0, waiting = 0;
  int kv_pages = 0, kv_pages_used = 0;  // used by sequences
  int kv_pages_cached = 0;              // kept for requests to come, given up when wanted
  int memory_slots = 0, memory_slots_pinned = 0;
  uint64_t steps = 0, preemptions = 0, prompt_tokens = 0, generated_tokens = 0;
  uint64_t device_hits = 0;          // memories that lay on the device when they were needed
  uint64_t retrieval_fallbacks = 0;  // chunks that went on without
  uint64_t cached_prompt_tokens = 0;
  // Of steps: from choosing what to feed to the last event sent; in the model, of that.
  absl::Duration busy, in_model, longest_step;
};

struct ChunkMemories;

class Engine {
 public:
  // `reader`: null where no request has a knowledge base. INVALID_ARGUMENT names the option.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::unique_ptr<Decoder> decoder,
                                                        const Tokenizer* tokenizer,
                                                        MemoryReader* reader,
                                                        const EngineOptions& options);
  ~Engine();

  // Takes a request; its events go to `sink`. The number is for Cancel. Errors, without a call of
  // the sink: INVALID_ARGUMENT names the field; ALREADY_EXISTS: request_id is in use;
  // RESOURCE_EXHAUSTED: the queue is full; UNAVAILABLE: shutting down.
  absl::StatusOr<uint64_t> Submit(EngineRequest request, std::shared_ptr<EventSink> sink);
  // Ends it with CANCELLED and frees what it holds, within one step. Unknown numbers do nothing.
  void Cancel(uint64_t number);
  // Ends it with FINISH_REASON_ABORTED. NOT_FOUND: no such request of this tenant is running.
  absl::Status Abort(const std::string& tenant, const std::string& request_id);
  EngineStats stats() const;

  const Decoder& decoder() const { return *decoder_; }
  // Longest prompt and output together, `<s>` not counted.
  int max_tokens(Layout layout) const;

 private:
  struct Running;
  struct Work;
  enum class Stop : uint8_t { kNo, kCancel, kAbort };
  struct Arrival {
    std::string tenant, request_id;
    Stop stop = Stop::kNo;
  };
  // An answer of the reader for retrieval `retrieval` of a request.
  struct Answer {
    uint64_t number = 0;
    int retrieval = 0;
    ReadResult result;
  };
  // Where answers of the reader go; outlives the engine as long as one is under way.
  struct Mailbox;

  Engine(std::unique_ptr<Decoder> decoder, const Tokenizer* tokenizer, MemoryReader* reader,
         const EngineOptions& options);
  absl::Status Check(const EngineRequest& request) const;

  void Run();
  void TakeEvents();
  void Admit();
  void StartRetrievals();
  void TakeAnswer(Answer answer);
  // What can be fed now; waits of sequences that cannot are in `wake`.
  std::vector<Work> Schedule(absl::Time* wake);
  bool Begin(Running& sequence, absl::Time now, absl::Time* wake);
  // Whether a chunk whose memories are still to come may have been computed for another request:
  // all before it, `shared` of them, have.
  bool AwaitsShared(Running& sequence, int shared, absl::Time now, absl::Time* wake) const;
  bool PlanSlice(Running& sequence, absl::Time now, absl::Time* wake, Work* work);
  // Whether the retrieval's memories are here, chosen for good and in slots that can be read.
  bool MemoriesReady(Running& sequence, int retrieval, absl::Time now, absl::Time* wake);
  bool PinChunk(Running& sequence, int retrieval, bool from_others);
  // The chunk's memories in the order of their ranks, however they came: as the offline loops.
  void OrderChunk(ChunkMemories& chunk);
  // Lets go of slots for `sequence`'s retrieval that are less urgent. False: there are none.
  bool TakeSlots(const Running& sequence, int retrieval);
  // Keeps only those of the chunk's memories that can be read now.
  void DropUnloaded(Running& sequence, int retrieval);
  // The beginning of a prompt that another request has computed.
  std::vector<KvPage> FindShared(Running& sequence);
  void ExtendPromptKeys(Running& sequence, int chunks);
  void SharePrompt(Running& sequence);
  // Free pages, less those that this step takes already.
  int FreePages() const;
  // Has `pages` free pages, if giving up cached prompts brings them.
  bool EvictPrompts(int pages);
  bool MakeRoom(Running& sequence, int pages);
  void Preempt(Running& sequence);
  // Of retrievals before this one.
  void Unpin(Running& sequence, int end_retrieval);
  void UnpinChunk(ChunkMemories& chunk);
  void Step(std::vector<Work>& batch);
  void UseLogits(Work& work, const float* logits, const int32_t* greedy, absl::Time now);
  void Sampled(Running& sequence, int32_t id, const float* logits, absl::Time now);
  // Of the chunks begun by the tokens before `end`.
  void SendProvenance(Running& sequence, int end);
  void Introduce(Running& sequence);
  void SendChunk(Running& sequence, int chunk);
  void FinishRequest(Running& sequence, v1::FinishReason reason, absl::Time now);
  void EndRequest(Running& sequence, absl::Status status);
  void RemoveEnded();

  const std::unique_ptr<Decoder> decoder_;
  const Tokenizer* const tokenizer_;
  MemoryReader* const reader_;
  const EngineOptions options_;
  const std::shared_ptr<Mailbox> mailbox_;
  std::optional<DeviceSlots> slots_;

  // What a step may still take.
  struct Budget {
    int rows = 0, logit_rows = 0, slice_tokens = 0;
    int score_rows = 0;  // of the logit rows those that no generation may want
    int pages_taken = 0;
  };

  // The thread's.
  Budget budget_;
  uint64_t step_ = 0;
  PromptCache prompts_;
  std::vector<std::unique_ptr<Running>> running_;  // by arrival
  std::vector<float> logits_;

  mutable std::mutex mutex_;  // guards what follows but the thread
  bool ending_ = false;
  uint64_t next_number_ = 1;
  std::vector<std::unique_ptr<Running>> waiting_;  // by arrival
  absl::flat_hash_map<uint64_t, Arrival> requests_;
  bool stops_ = false;  // some Arrival is to stop
  EngineStats stats_;
  std::thread thread_;
};

}  // namespace memory3
