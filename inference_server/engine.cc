// Requests in, events out, and the thread's loop. engine_step.cc: what a step feeds.
#include "inference_server/engine.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "inference_server/engine_internal.h"

namespace memory3 {
namespace {

constexpr size_t kQueriesPerRetrieve = 512;  // the memory service takes 1,024
constexpr size_t kMaxStopStrings = 16;
constexpr int kChunkTokens = 64;  // of a model without a geometry

void Set(google::protobuf::Duration* proto, absl::Duration duration) {
  proto->set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
}

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

absl::Status CheckIds(std::span<const int32_t> ids, int vocabulary, const char* field) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, "[", i, "] is ", ids[i], ", not in the vocabulary of ", vocabulary));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::unique_ptr<Decoder> decoder,
                                                       const Tokenizer* tokenizer,
                                                       MemoryReader* reader,
                                                       const EngineOptions& options) {
  if (decoder->config().bos_token_id < 0)
    return absl::InvalidArgumentError("bos_token_id: the model has none");
  if (options.max_running < 1)
    return absl::InvalidArgumentError(absl::StrCat("max_running is ", options.max_running));
  if (options.max_waiting < 1)
    return absl::InvalidArgumentError(absl::StrCat("max_waiting is ", options.max_waiting));
  if (options.slice_tokens < 1)
    return absl::InvalidArgumentError(absl::StrCat("slice_tokens is ", options.slice_tokens));
  const DecoderOptions& d = decoder->options();
  if (options.max_running > std::min(d.max_rows, d.max_logit_rows)) {
    return absl::InvalidArgumentError(absl::StrCat("max_running is ", options.max_running,
                                                   ", the decoder takes ", d.max_rows, " rows, ",
                                                   d.max_logit_rows, " of them with logits"));
  }
  return std::unique_ptr<Engine>(new Engine(std::move(decoder), tokenizer, reader, options));
}

Engine::Engine(std::unique_ptr<Decoder> decoder, const Tokenizer* tokenizer, MemoryReader* reader,
               const EngineOptions& options)
    : decoder_(std::move(decoder)),
      tokenizer_(tokenizer),
      reader_(reader),
      options_(options),
      mailbox_(std::make_shared<Mailbox>()),
      prompts_(options.prompt_cache_pages.value_or(decoder_->cache().pages() / 2),
               decoder_->memory() ? decoder_->memory()->chunk_tokens : kChunkTokens) {
  if (decoder_->memory() != nullptr)
    slots_.emplace(&decoder_->pool(), [mailbox = mailbox_] { mailbox->Poke(); });
  stats_.kv_pages = decoder_->cache().pages();
  stats_.memory_slots = slots_ ? slots_->slots() : 0;
  thread_ = std::thread([this] { Run(); });
}

Engine::~Engine() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  mailbox_->Poke();
  thread_.join();
}

int Engine::max_tokens(Layout layout) const { return decoder_->max_context(layout); }

absl::Status Engine::Check(const EngineRequest& request) const {
  const int vocabulary = decoder_->config().vocab_size;
  if (request.prompt.empty()) return absl::InvalidArgumentError("prompt: it is empty");
  if (absl::Status s = CheckIds(request.prompt, vocabulary, "prompt.token_ids"); !s.ok()) return s;
  if (absl::Status s = CheckIds(request.stop_token_ids, vocabulary, "stopping.stop_token_ids");
      !s.ok()) {
    return s;
  }
  if (request.layout == Layout::kMemory && decoder_->memory() == nullptr)
    return absl::InvalidArgumentError("layout: the decoder has no geometry of memories");
  if (request.memory.base != nullptr || request.memory.unavailable) {
    if (request.layout == Layout::kPlain)
      return absl::InvalidArgumentError("memory: the plain layout reads no memories");
    if (request.memory.base != nullptr && reader_ == nullptr)
      return absl::InvalidArgumentError("memory: this server has no memory server");
    if (request.memory.references_per_chunk > static_cast<uint32_t>(slots_->slots())) {
      return absl::InvalidArgumentError(absl::StrCat("memory.references_per_chunk is ",
                                                     request.memory.references_per_chunk,
                                                     ", the limit is ", slots_->slots()));
    }
    if (request.memory.min_score && !(*request.memory.min_score >= -1e30f))
      return absl::InvalidArgumentError("memory.min_score is no number");
    if (request.memory.deadline && *request.memory.deadline < absl::ZeroDuration())
      return absl::InvalidArgumentError("memory.deadline is negative");
  }
  const int longest = max_tokens(request.layout);
  const int n =
      static_cast<int>(WithoutBos(request.prompt, decoder_->config().bos_token_id).size());
  const int continuation =
      request.continuation ? static_cast<int>(request.continuation->size()) : 0;
  if (n + std::max(continuation, 1) > longest) {
    return absl::InvalidArgumentError(absl::StrCat(
        request.continuation ? "prompt and continuation have " : "prompt has ", n + continuation,
        " tokens; the longest context is ", longest, " with <s> and at least one token to come"));
  }
  const int pages =
      (std::min(longest, n + std::max(continuation, 1)) + kKvPageTokens) / kKvPageTokens;
  if (pages > decoder_->cache().pages()) {
    return absl::InvalidArgumentError(absl::StrCat("prompt: ", n, " tokens take ", pages,
                                                   " pages of the KV cache, which has ",
                                                   decoder_->cache().pages()));
  }
  if (request.continuation) {
    return CheckIds(*request.continuation, vocabulary, "continuation.ids");
  }
  if (request.max_new_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("stopping.max_new_tokens is ", request.max_new_tokens));
  }
  if (request.min_new_tokens < 0 || request.min_new_tokens > request.max_new_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("stopping.min_new_tokens is ",
                                                   request.min_new_tokens, ", max_new_tokens ",
                                                   request.max_new_tokens));
  }
  if (request.stop.size() > kMaxStopStrings) {
    return absl::InvalidArgumentError(absl::StrCat("stopping.stop: ", request.stop.size(),
                                                   " strings, at most ", kMaxStopStrings));
  }
  for (const std::string& stop : request.stop) {
    if (stop.empty()) return absl::InvalidArgumentError("stopping.stop: a string is empty");
  }
  if (request.logprobs && (*request.logprobs < 0 || *request.logprobs > 20)) {
    return absl::InvalidArgumentError(
        absl::StrCat("logprobs is ", *request.logprobs, ", not within 0 and 20"));
  }
  return CheckSampling(request.sampling, vocabulary);
}

absl::StatusOr<uint64_t> Engine::Submit(EngineRequest request, std::shared_ptr<EventSink> sink) {
  if (absl::Status status = Check(request); !status.ok()) return status;
  const std::span<const int32_t> ids = WithoutBos(request.prompt, decoder_->config().bos_token_id);
  // What the context and the whole KV cache leave.
  const int room =
      std::min(max_tokens(request.layout), decoder_->cache().pages() * kKvPageTokens - 1) -
      static_cast<int>(ids.size());
  request.max_new_tokens = std::min(request.max_new_tokens, std::max(room, 1));
  request.min_new_tokens = std::min(request.min_new_tokens, request.max_new_tokens);
  absl::StatusOr<Sampler> sampler =
      Sampler::Create(request.sampling, decoder_->config().vocab_size, request.prompt);
  if (!sampler.ok()) return sampler.status();
  std::vector<int32_t> tokens(ids.begin(), ids.end());
  const int chunk_tokens = decoder_->memory() ? decoder_->memory()->chunk_tokens : kChunkTokens;
  auto running = std::make_unique<Running>(std::move(request), std::move(sink), *std::move(sampler),
                                           std::move(tokens), chunk_tokens, tokenizer_);
  if (running->scores()) {
    running->tokens.insert(running->tokens.end(), running->request.continuation->begin(),
                           running->request.continuation->end());
  }
  running->waited = running->request.memory.waited;
  running->submitted = absl::Now() - running->waited;
  uint64_t number = 0;
  {
    const std::lock_guard lock(mutex_);
    if (ending_) return absl::UnavailableError("the server is shutting down");
    if (!running->request.request_id.empty()) {
      for (const auto& [n, other] : requests_) {
        if (other.request_id == running->request.request_id &&
            other.tenant == running->request.tenant) {
          return absl::AlreadyExistsError(
              absl::StrCat("request_id: \"", running->request.request_id, "\" is running already"));
        }
      }
    }
    if (static_cast<int>(waiting_.size()) >= options_.max_waiting) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the queue is full: ", waiting_.size(), " requests wait"));
    }
    number = next_number_++;
    running->number = number;
    requests_[number] = {running->request.tenant, running->request.request_id, Stop::kNo};
    waiting_.push_back(std::move(running));
  }
  mailbox_->Poke();
  return number;
}

void Engine::Cancel(uint64_t number) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = requests_.find(number);
    if (found == requests_.end()) return;
    found->second.stop = Stop::kCancel;
    stops_ = true;
  }
  mailbox_->Poke();
}

absl::Status Engine::Abort(const std::string& tenant, const std::string& request_id) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(requests_.begin(), requests_.end(), [&](const auto& r) {
      return r.second.tenant == tenant && r.second.request_id == request_id;
    });
    if (request_id.empty() || found == requests_.end())
      return absl::NotFoundError(absl::StrCat("request_id: \"", request_id, "\" is not running"));
    if (found->second.stop == Stop::kNo) found->second.stop = Stop::kAbort;
    stops_ = true;
  }
  mailbox_->Poke();
  return absl::OkStatus();
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  stats.waiting = static_cast<int>(waiting_.size());
  return stats;
}

// ---- the thread ----

void Engine::Run() {
  while (true) {
    const absl::Time begin = absl::Now();
    TakeEvents();
    {
      const std::lock_guard lock(mutex_);
      if (ending_) break;
    }
    Admit();
    StartRetrievals();
    absl::Time wake = absl::InfiniteFuture();
    std::vector<Work> batch = Schedule(&wake);
    if (!batch.empty()) {
      Step(batch);
    }
    const bool ended = std::any_of(running_.begin(), running_.end(),
                                   [](const auto& sequence) { return sequence->ended; });
    RemoveEnded();
    {
      const std::lock_guard lock(mutex_);
      stats_.running = static_cast<int>(running_.size());
      stats_.kv_pages_cached = prompts_.idle_pages();
      stats_.kv_pages_used =
          decoder_->cache().pages() - decoder_->cache().free_pages() - stats_.kv_pages_cached;
      stats_.memory_slots_pinned = slots_ ? slots_->pinned() : 0;
      if (!batch.empty()) {
        const absl::Duration took = absl::Now() - begin;
        ++stats_.steps;
        stats_.busy += took;
        stats_.longest_step = std::max(stats_.longest_step, took);
      }
    }
    if (!batch.empty() || ended) continue;  // what has ended makes room for what waits
    std::unique_lock lock(mailbox_->mutex);
    mailbox_->changed.wait_until(lock, absl::ToChronoTime(wake),
                                 [this] { return mailbox_->poked || !mailbox_->answers.empty(); });
  }
  std::vector<std::unique_ptr<Running>> left;
  {
    const std::lock_guard lock(mutex_);
    left.swap(waiting_);
  }
  for (auto& sequence : left) running_.push_back(std::move(sequence));
  for (auto& sequence : running_)
    EndRequest(*sequence, absl::UnavailableError("the server is shutting down"));
  RemoveEnded();
}

void Engine::TakeEvents() {
  std::vector<Answer> answers;
  {
    const std::lock_guard lock(mailbox_->mutex);
    mailbox_->poked = false;
    answers.swap(mailbox_->answers);
  }
  for (Answer& answer : answers) TakeAnswer(std::move(answer));
  std::vector<std::pair<uint64_t, Stop>> stops;
  std::vector<std::unique_ptr<Running>> taken;
  {
    const std::lock_guard lock(mutex_);
    if (!stops_) return;
    stops_ = false;
    for (const auto& [number, request] : requests_) {
      if (request.stop != Stop::kNo) stops.emplace_back(number, request.stop);
    }
    for (const auto& [number, stop] : stops) {
      const auto found = std::find_if(waiting_.begin(), waiting_.end(),
                                      [&](const auto& w) { return w->number == number; });
      if (found == waiting_.end()) continue;
      taken.push_back(std::move(*found));
      waiting_.erase(found);
    }
  }
  // Those that waited end on the way the running ones do.
  for (auto& sequence : taken) {
    sequence->admitted = absl::Now();
    running_.push_back(std::move(sequence));
  }
  for (const auto& [number, stop] : stops) {
    for (auto& sequence : running_) {
      if (sequence->number != number || sequence->ended) continue;
      if (stop == Stop::kAbort) {
        FinishRequest(*sequence, v1::FINISH_REASON_ABORTED, absl::Now());
      } else {
        EndRequest(*sequence, absl::CancelledError("the request was cancelled"));
      }
    }
  }
  RemoveEnded();
}

void Engine::TakeAnswer(Answer answer) {
  for (auto& sequence : running_) {
    if (sequence->number != answer.number) continue;
    ChunkMemories& chunk = sequence->chunks[answer.retrieval];
    // Too late: it only filled the cache.
    if (chunk.fixed || chunk.timed_out || chunk.unavailable) return;
    if (answer.result.last) {
      chunk.answered = true;
      chunk.status = std::move(answer.result.status);
    }
    for (ReadMemory& read : answer.result.memories) {
      chunk.memories.push_back({std::move(read)});
      chunk.loaded = false;
    }
    // Into slots that nobody else wants, while it is not needed yet.
    PinChunk(*sequence, answer.retrieval, /*from_others=*/false);
    return;
  }
}

void Engine::Admit() {
  const absl::Time now = absl::Now();
  const size_t before = running_.size();
  {
    const std::lock_guard lock(mutex_);
    while (!waiting_.empty() && static_cast<int>(running_.size()) < options_.max_running) {
      running_.push_back(std::move(waiting_.front()));
      waiting_.erase(waiting_.begin());
    }
  }
  for (size_t i = before; i < running_.size(); ++i) {
    Running& sequence = *running_[i];
    sequence.admitted = now;
    Introduce(sequence);
    if (sequence.scores() && sequence.request.continuation->empty()) {
      FinishRequest(sequence, v1::FINISH_REASON_LENGTH, now);
    }
  }
}

void Engine::Introduce(Running& sequence) {
  if (sequence.introduced) return;
  sequence.introduced = true;
  const EngineRequest& request = sequence.request;
  v1::GenerateResponse event;
  v1::PromptInfo& info = *event.mutable_prompt();
  info.set_request_id(request.request_id);
  info.set_model(options_.model_name);
  info.add_token_ids(decoder_->config().bos_token_id);
  info.mutable_token_ids()->Add(sequence.tokens.begin(),
                                sequence.tokens.begin() + sequence.prompt_tokens());
  if (request.memory.base != nullptr) {
    info.set_knowledge_base(request.memory.base->name());
    info.set_knowledge_base_version(request.memory.base->version());
  }
  sequence.sink->Send(std::move(event));
  if (request.echo && sequence.prompt_tokens() > 0) {
    v1::GenerateResponse echo;
    echo.mutable_delta()->set_text(
        tokenizer_->Decode(std::span(sequence.tokens).first(sequence.prompt_tokens())));
    sequence.sink->Send(std::move(echo));
  }
}

void Engine::StartRetrievals() {
  struct Group {
    std::shared_ptr<MemoryBase> base;
    bool with_text = false;
    std::vector<std::pair<uint64_t, int>> targets;  // request, retrieval
    std::vector<ReadQuery> queries;
  };
  std::map<std::pair<MemoryBase*, bool>, std::vector<Group>> groups;
  for (auto& running : running_) {
    Running& sequence = *running;
    if (sequence.ended || !sequence.reads_memories()) continue;
    // A continuation is known from the start. A generation asks for the chunk of the next token as
    // soon as that chunk's query is known.
    const int last = sequence.grid.RetrievalOf(static_cast<int>(sequence.tokens.size()) -
                                               (sequence.scores() ? 1 : 0));
    while (static_cast<int>(sequence.chunks.size()) <= last) {
      const int r = static_cast<int>(sequence.chunks.size());
      ChunkMemories& chunk = sequence.chunks.emplace_back();
      // Those of the prompt are due at once, together.
      if (r < sequence.grid.prompt_retrievals())
        chunk.due = sequence.admitted - sequence.request.memory.waited;
      const MemoryPlan& plan = sequence.request.memory;
      if (plan.base == nullptr) {
        chunk.answered = true;
        chunk.status = absl::UnavailableError("the memory server cannot be reached");
        continue;
      }
      if (plan.references_per_chunk == 0) {
        chunk.answered = true;
        continue;
      }
      std::vector<Group>& list = groups[{plan.base.get(), plan.with_text}];
      if (list.empty() || list.back().queries.size() == kQueriesPerRetrieve)
        list.push_back({plan.base, plan.with_text, {}, {}});
      const ChunkGrid::Range query = sequence.grid.QueryOf(r);
      list.back().targets.emplace_back(sequence.number, r);
      list.back().queries.push_back(
          {tokenizer_->DecodeQuery(std::span(sequence.tokens).subspan(query.first, query.tokens)),
           plan.references_per_chunk, plan.min_score, plan.filter});
    }
  }
  const absl::Time deadline = absl::Now() + options_.wait_cap;
  for (auto& [key, list] : groups) {
    for (Group& group : list) {
      reader_->Read(std::move(group.base), std::move(group.queries), group.with_text, deadline,
                    [mailbox = mailbox_, targets = std::move(group.targets)](size_t query,
                                                                             ReadResult result) {
                      const std::lock_guard lock(mailbox->mutex);
                      mailbox->answers.push_back(
                          {targets[query].first, targets[query].second, std::move(result)});
                      mailbox->changed.notify_one();
                    });
    }
  }
}

// ---- tokens and events ----

void Engine::UseLogits(Work& work, const float* logits, const int32_t* greedy, absl::Time now) {
  Running& sequence = *work.sequence;
  if (!sequence.scores()) {
    if (greedy != nullptr) sequence.sampler.Accept(*greedy);
    if (greedy != nullptr) {
      Sampled(sequence, *greedy, nullptr, now);
      return;
    }
    std::vector<int32_t> banned;
    if (sequence.generated < sequence.request.min_new_tokens) {
      banned = sequence.request.stop_token_ids;
      banned.insert(banned.end(), sequence.request.eos_token_ids.begin(),
                    sequence.request.eos_token_ids.end());
    }
    const absl::StatusOr<int32_t> id = sequence.sampler.Sample(
        {logits, static_cast<size_t>(decoder_->config().vocab_size)}, banned);
    if (!id.ok()) {
      EndRequest(sequence, id.status());
      return;
    }
    Sampled(sequence, *id, logits, now);
    return;
  }
  const size_t vocabulary = decoder_->config().vocab_size;
  for (int i = 0; i < work.logit_rows; ++i) {
    const std::span<const float> row(logits + i * vocabulary, vocabulary);
    const int32_t next = sequence.tokens[work.end - work.logit_rows + i + 1];
    sequence.score.logprobs.push_back(Logprob(row, next));
    sequence.score.greedy =
        sequence.score.greedy && std::max_element(row.begin(), row.end()) - row.begin() == next;
  }
  if (sequence.score.logprobs.size() == sequence.request.continuation->size())
    FinishRequest(sequence, v1::FINISH_REASON_LENGTH, now);
}

void Engine::Sampled(Running& sequence, int32_t id, const float* logits, absl::Time now) {
  const EngineRequest& request = sequence.request;
  const bool may_stop = sequence.generated >= request.min_new_tokens;
  if (sequence.generated == 0) sequence.first_token = now;
  ++sequence.generated;
  sequence.tokens.push_back(id);
  const bool stop_id = Contains(request.stop_token_ids, id);
  const bool stopped = stop_id || Contains(request.eos_token_ids, id);
  const bool full = sequence.generated == request.max_new_tokens;

  v1::GenerateResponse event;
  v1::Delta& delta = *event.mutable_delta();
  delta.add_token_ids(id);
  if (!stopped) delta.set_text(sequence.text.Push(id, may_stop));
  if ((stopped || full) && !sequence.text.stopped())
    *delta.mutable_text() += sequence.text.Finish(may_stop);
  if (request.logprobs) {
    const std::span<const float> row(logits, decoder_->config().vocab_size);
    const auto set = [&](v1::TokenLogprob* proto, int32_t token, float logprob) {
      proto->set_token_id(token);
      proto->set_logprob(logprob);
      // As it continues a text: Decode would drop the leading space of a text of its own.
      DecodeStream text(tokenizer_, /*at_start=*/false);
      const std::string whole = text.Push(token);
      proto->set_text(whole + text.Finish());
    };
    v1::TokenLogprobs& logprobs = *delta.add_logprobs();
    set(logprobs.mutable_chosen(), id, Logprob(row, id));
    for (const TokenLogprob& top : TopLogprobs(row, *request.logprobs))
      set(logprobs.add_top(), top.id, top.logprob);
  }
  sequence.sink->Send(std::move(event));
  if (stopped || sequence.text.stopped()) {
    sequence.stop_token_id =
        stop_id && !sequence.text.stopped() ? std::optional<int32_t>(id) : std::nullopt;
    FinishRequest(sequence, v1::FINISH_REASON_STOP, now);
  } else if (full) {
    FinishRequest(sequence, v1::FINISH_REASON_LENGTH, now);
  }
}

void Engine::SendProvenance(Running& sequence, int end) {
  if (!sequence.reads_memories()) return;
  const int n = sequence.prompt_tokens(), size = sequence.grid.chunk_tokens();
  const int last = end - 1;  // fed last; <s> alone belongs to the first chunk
  const int chunk = last < 0   ? (n > 0 ? 0 : -1)
                    : last < n ? last / size
                               : sequence.grid.prompt_retrievals() + (last - n) / size;
  while (sequence.next_chunk <= chunk) SendChunk(sequence, sequence.next_chunk++);
}

void Engine::SendChunk(Running& sequence, int chunk) {
  const int n = sequence.prompt_tokens(), size = sequence.grid.chunk_tokens();
  const int of_prompt = sequence.grid.prompt_retrievals();
  v1::GenerateResponse event;
  v1::ChunkProvenance& proto = *event.mutable_provenance();
  const bool generated = chunk >= of_prompt;
  const int begin = generated ? n + (chunk - of_prompt) * size : chunk * size;
  const int longest = sequence.scores() ? static_cast<int>(sequence.tokens.size())
                                        : n + sequence.request.max_new_tokens;
  proto.set_chunk(chunk);
  proto.set_generated(generated);
  proto.set_token_begin(begin);
  proto.set_token_end(std::min(begin + size, generated ? longest : n));
  proto.set_inherited(chunk == of_prompt && of_prompt > 0);
  if (const int r = sequence.grid.RetrievalOf(begin); r != ChunkGrid::kNoRetrieval) {
    const ChunkMemories& memories = sequence.chunks[r];
    proto.set_timed_out(memories.timed_out);
    proto.set_unavailable(memories.unavailable);
    for (size_t i = 0; i < memories.memories.size(); ++i) {
      const ReadMemory& read = memories.memories[i].read;
      v1::ChunkProvenance::Memory& memory = *proto.add_memories();
      memory.set_record_id(std::string(read.memory->id().view()));
      memory.set_score(read.score);
      for (const v1::Source& source : read.sources) *memory.add_sources() = source;
      memory.set_from(memories.memories[i].from);
    }
    if (!proto.inherited()) sequence.memories_read += memories.memories.size();
  }
  sequence.sink->Send(std::move(event));
}

void Engine::FinishRequest(Running& sequence, v1::FinishReason reason, absl::Time now) {
  Introduce(sequence);
  if (reason == v1::FINISH_REASON_ABORTED && sequence.generated > 0) {
    if (std::string rest = sequence.text.Finish(/*may_stop=*/false); !rest.empty()) {
      v1::GenerateResponse event;
      event.mutable_delta()->set_text(std::move(rest));
      sequence.sink->Send(std::move(event));
    }
  }
  v1::GenerateResponse event;
  v1::Finish& finish = *event.mutable_finish();
  finish.set_reason(reason);
  if (reason == v1::FINISH_REASON_STOP) {
    finish.set_stop(sequence.text.stop());
    if (sequence.stop_token_id) finish.set_stop_token_id(*sequence.stop_token_id);
  }
  v1::Usage& usage = *finish.mutable_usage();
  usage.set_prompt_tokens(sequence.prompt_tokens() + 1);
  usage.set_completion_tokens(sequence.scores() ? static_cast<int>(sequence.score.logprobs.size())
                                                : sequence.generated);
  usage.set_retrievals(static_cast<uint32_t>(sequence.chunks.size()));
  usage.set_memories_read(sequence.memories_read);
  usage.set_cached_prompt_tokens(sequence.cached_tokens);
  v1::Timings& timings = *finish.mutable_timings();
  const absl::Time first = std::min(sequence.first_token, now);
  Set(timings.mutable_queue(),
      sequence.admitted - sequence.submitted - sequence.request.memory.waited);
  Set(timings.mutable_retrieve(), sequence.waited);
  Set(timings.mutable_load(), sequence.loading);
  Set(timings.mutable_prefill(),
      std::max(first - sequence.admitted - sequence.waited_for_prompt, absl::ZeroDuration()));
  Set(timings.mutable_decode(), now - first);
  if (sequence.generated > 0)
    Set(timings.mutable_time_to_first_token(), first - sequence.submitted);
  Set(timings.mutable_total(), now - sequence.submitted);
  if (sequence.scores()) sequence.sink->Scored(sequence.score);
  sequence.sink->Send(std::move(event));
  EndRequest(sequence, absl::OkStatus());
}

void Engine::EndRequest(Running& sequence, absl::Status status) {
  if (sequence.ended) return;
  sequence.ended = true;
  {
    // Before the sink hears of it, so that its request_id is free for the next.
    const std::lock_guard lock(mutex_);
    requests_.erase(sequence.number);
    stats_.generated_tokens += sequence.generated;
  }
  sequence.sink->End(std::move(status));
}

void Engine::RemoveEnded() {
  for (auto& sequence : running_) {
    if (sequence->ended) Unpin(*sequence, static_cast<int>(sequence->chunks.size()));
  }
  std::erase_if(running_, [](const auto& sequence) { return sequence->ended; });
}

}  // namespace memory3
