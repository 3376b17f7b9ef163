#include "inference_server/inference_api.h"

#include <prometheus/text_serializer.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "inference_server/finish_reason.h"
#include "inference_server/inference_requests.h"

namespace memory3 {
namespace {

// A text of so many bytes a token is refused before it is tokenized; no vocabulary comes near.
constexpr size_t kMaxBytesPerToken = 256;
constexpr absl::Duration kShortestRetry = absl::Milliseconds(100);
constexpr absl::Duration kLongestRetry = absl::Seconds(60);

uint64_t RandomNumber() {
  thread_local absl::BitGen random;
  return absl::Uniform<uint64_t>(random);
}

// What a sink has collected, or why it has nothing.
template <typename Callback, typename Response>
void Deliver(const Callback& done, absl::Status status, Response& response) {
  if (status.ok()) {
    done(std::move(response));
  } else {
    done(std::move(status));
  }
}

class UnarySink final : public EventSink {
 public:
  explicit UnarySink(Inference::UnaryCallback done) : done_(std::move(done)) {}

  void Send(v1::GenerateResponse event) override {
    switch (event.event_case()) {
      case v1::GenerateResponse::kPrompt:
        response_.mutable_prompt()->Swap(event.mutable_prompt());
        break;
      case v1::GenerateResponse::kDelta: {
        v1::Delta& delta = *event.mutable_delta();
        response_.mutable_text()->append(delta.text());
        response_.mutable_token_ids()->MergeFrom(delta.token_ids());
        for (v1::TokenLogprobs& logprobs : *delta.mutable_logprobs())
          response_.add_logprobs()->Swap(&logprobs);
        break;
      }
      case v1::GenerateResponse::kProvenance:
        response_.add_provenance()->Swap(event.mutable_provenance());
        break;
      default:
        response_.mutable_finish()->Swap(event.mutable_finish());
    }
  }
  void Scored(ContinuationScore) override {}
  void End(absl::Status status) override { Deliver(done_, std::move(status), response_); }

 private:
  Inference::UnaryCallback done_;
  v1::GenerateUnaryResponse response_;
};

class ScoreSink final : public EventSink {
 public:
  ScoreSink(Inference::ScoreCallback done, const std::vector<int32_t>& continuation)
      : done_(std::move(done)) {
    response_.mutable_token_ids()->Add(continuation.begin(), continuation.end());
  }

  void Send(v1::GenerateResponse event) override {
    if (event.has_provenance()) response_.add_provenance()->Swap(event.mutable_provenance());
    if (event.has_finish())
      response_.mutable_timings()->Swap(event.mutable_finish()->mutable_timings());
  }
  void Scored(ContinuationScore score) override {
    double sum = 0;
    for (const float logprob : score.logprobs) {
      sum += logprob;
      response_.add_token_logprobs(logprob);
    }
    response_.set_log_likelihood(sum);
    response_.set_greedy(score.greedy);
  }
  void End(absl::Status status) override { Deliver(done_, std::move(status), response_); }

 private:
  Inference::ScoreCallback done_;
  v1::ScoreResponse response_;
};

}  // namespace

std::shared_ptr<EventSink> CollectUnary(Inference::UnaryCallback done) {
  return std::make_shared<UnarySink>(std::move(done));
}

// Requests that were taken and have not ended, and how long those took that did.
struct Inference::RequestCount {
  std::mutex mutex;  // guards what follows
  std::condition_variable ended;
  int running = 0;
  double mean_seconds = 1;  // exponential, over about the last 16
};

// Passes events on and tells the metrics of them.
class Inference::ObservedSink final : public EventSink {
 public:
  ObservedSink(std::shared_ptr<EventSink> sink, std::shared_ptr<InferenceMetrics> metrics,
               std::shared_ptr<RequestCount> requests, absl::Time received)
      : sink_(std::move(sink)),
        metrics_(std::move(metrics)),
        requests_(std::move(requests)),
        received_(received) {}

  void Send(v1::GenerateResponse event) override {
    if (event.has_delta() && event.delta().token_ids_size() > 0) {
      const absl::Time now = absl::Now();
      if (last_token_ == absl::InfinitePast()) {
        metrics_->FirstToken(now - received_);
      } else {
        metrics_->NextToken(now - last_token_);
      }
      last_token_ = now;
      metrics_->Tokens(event.delta().token_ids_size());
    } else if (event.has_provenance()) {
      metrics_->ChunkRead(event.provenance());
    } else if (event.has_finish()) {
      metrics_->Finished(event.finish());
      outcome_ = FinishReasonName(event.finish().reason());
    }
    sink_->Send(std::move(event));
  }
  void Scored(ContinuationScore score) override { sink_->Scored(std::move(score)); }
  void End(absl::Status status) override {
    const absl::Duration took = absl::Now() - received_;
    metrics_->Ended(status.ok() ? outcome_ : absl::StatusCodeToString(status.code()), took);
    sink_->End(std::move(status));
    sink_.reset();
    const std::lock_guard lock(requests_->mutex);
    if (--requests_->running == 0) requests_->ended.notify_all();
    requests_->mean_seconds += (absl::ToDoubleSeconds(took) - requests_->mean_seconds) / 16;
  }

 private:
  std::shared_ptr<EventSink> sink_;
  const std::shared_ptr<InferenceMetrics> metrics_;
  const std::shared_ptr<RequestCount> requests_;
  const absl::Time received_;
  absl::Time last_token_ = absl::InfinitePast();
  std::string outcome_ = "stop";
};

class Inference::Use {
 public:
  Use(const Inference* inference, const LoadedModel* model)
      : inference_(inference), model_(model) {}
  Use(Use&& other) noexcept
      : inference_(std::exchange(other.inference_, nullptr)), model_(other.model_) {}
  Use& operator=(Use&&) = delete;
  ~Use() {
    if (inference_ != nullptr) inference_->Leave();
  }
  const LoadedModel* operator->() const { return model_; }
  const LoadedModel& operator*() const { return *model_; }

 private:
  const Inference* inference_;
  const LoadedModel* model_;
};

Inference::Inference()
    : metrics_(std::make_shared<InferenceMetrics>()),
      keys_(std::make_shared<const ApiKeys>()),
      requests_(std::make_shared<RequestCount>()) {}

Inference::~Inference() { Drain(absl::ZeroDuration()); }

void Inference::Serve(std::unique_ptr<LoadedModel> model) {
  const std::lock_guard lock(mutex_);
  if (state_ != State::kLoading) return;
  model_ = std::move(model);
  state_ = State::kServing;
}

void Inference::Drain(absl::Duration limit) {
  const absl::Time deadline = absl::Now() + limit;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kDraining && model_ == nullptr) return;
    state_ = State::kDraining;
  }
  {
    // Those that got in before are counted as requests by the time they leave.
    std::unique_lock lock(mutex_);
    left_.wait_until(lock, absl::ToChronoTime(deadline), [this] { return calls_ == 0; });
  }
  {
    std::unique_lock lock(requests_->mutex);
    requests_->ended.wait_until(lock, absl::ToChronoTime(deadline),
                                [this] { return requests_->running == 0; });
  }
  std::unique_ptr<LoadedModel> model;
  {
    std::unique_lock lock(mutex_);
    left_.wait(lock, [this] { return calls_ == 0; });
    model = std::move(model_);
  }
  model.reset();  // ends what still runs
}

absl::StatusOr<Inference::Use> Inference::Enter() const {
  const std::lock_guard lock(mutex_);
  if (state_ == State::kLoading) return absl::UnavailableError("the model is being loaded");
  if (state_ == State::kDraining) return absl::UnavailableError("the server is shutting down");
  ++calls_;
  return Use(this, model_.get());
}

std::optional<Inference::Use> Inference::Peek() const {
  const std::lock_guard lock(mutex_);
  if (model_ == nullptr) return std::nullopt;
  ++calls_;
  return Use(this, model_.get());
}

void Inference::Leave() const {
  const std::lock_guard lock(mutex_);
  if (--calls_ == 0) left_.notify_all();
}

absl::Status Inference::Ready() const { return Enter().status(); }

void Inference::SetApiKeys(ApiKeys keys) {
  auto shared = std::make_shared<const ApiKeys>(std::move(keys));
  const std::lock_guard lock(mutex_);
  keys_ = std::move(shared);
}

absl::StatusOr<Identity> Inference::Authenticate(std::string_view authorization) const {
  std::shared_ptr<const ApiKeys> keys;
  {
    const std::lock_guard lock(mutex_);
    keys = keys_;
  }
  return keys->Authenticate(authorization);
}

// ---- requests ----

bool Inference::MayBlock(const v1::MemoryOptions& memory) {
  return !memory.knowledge_base().empty() && (!memory.has_enabled() || memory.enabled());
}

absl::StatusOr<MemoryPlan> Inference::PlanMemory(const LoadedModel& model, const Identity& identity,
                                                 const v1::MemoryOptions& options,
                                                 absl::Time arrived) const {
  const ExplicitMemoryConfig* geometry = model.engine->decoder().memory();
  if (model.source == nullptr || geometry == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("memory.knowledge_base is \"", options.knowledge_base(),
                     "\", but this server was started without --memory"));
  }
  absl::StatusOr<MemoryPlan> plan = ToMemoryPlan(options, geometry->references_per_chunk);
  if (!plan.ok()) return plan.status();
  // The wait for a thread that may block counts too.
  absl::StatusOr<std::shared_ptr<MemoryBase>> base = model.source->Open(
      identity.tenant, options.knowledge_base(), arrived + plan->deadline.value_or(model.wait_cap));
  plan->waited = absl::Now() - arrived;
  if (base.ok()) {
    // Aliases are resolved; rights are on what they stand for.
    if (absl::Status status = identity.Require(Right::kRead, (*base)->name()); !status.ok())
      return status;
    plan->base = *std::move(base);
    return plan;
  }
  if (!absl::IsUnavailable(base.status()) && !absl::IsDeadlineExceeded(base.status()))
    return base.status();
  if (plan->fail_if_unavailable) {
    return absl::UnavailableError(absl::StrCat("memory.knowledge_base \"", options.knowledge_base(),
                                               "\": ", base.status().message()));
  }
  plan->unavailable = true;
  return plan;
}

absl::StatusOr<uint64_t> Inference::Submit(const LoadedModel& model, EngineRequest request,
                                           std::shared_ptr<EventSink> sink) {
  {
    const std::lock_guard lock(requests_->mutex);
    ++requests_->running;
  }
  absl::StatusOr<uint64_t> number = model.engine->Submit(std::move(request), std::move(sink));
  if (!number.ok()) {
    const std::lock_guard lock(requests_->mutex);
    if (--requests_->running == 0) requests_->ended.notify_all();
  }
  return number;
}

namespace {

v1::ServingState StateOf(const LoadedModel& model) {
  const EngineStats engine = model.engine->stats();
  const MemoryReaderStats reader =
      model.reader != nullptr ? model.reader->stats() : MemoryReaderStats();
  v1::ServingState state;
  state.set_running(static_cast<uint32_t>(engine.running));
  state.set_waiting(static_cast<uint32_t>(engine.waiting));
  state.set_kv_pages(static_cast<uint32_t>(engine.kv_pages));
  state.set_kv_pages_used(static_cast<uint32_t>(engine.kv_pages_used));
  state.set_prompt_tokens(engine.prompt_tokens);
  state.set_generated_tokens(engine.generated_tokens);
  state.set_device_hits(engine.device_hits);
  state.set_host_hits(reader.host_hits);
  state.set_store_hits(reader.store_hits);
  state.set_host_cache_bytes(static_cast<uint64_t>(reader.cache_bytes));
  return state;
}

// A text that cannot fit is not worth tokenizing.
absl::Status CheckLength(const std::string& text, const Engine& engine, const char* field) {
  const size_t limit = kMaxBytesPerToken * static_cast<size_t>(engine.max_tokens(Layout::kPlain));
  if (text.size() <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " has ", text.size(),
                                                 " bytes; the longest context is ",
                                                 engine.max_tokens(Layout::kPlain), " tokens"));
}

// A layout is the model's, not the request's, but for a checkpoint in dense mode.
Layout LayoutFor(const LoadedModel& model, bool memory) {
  return memory || !model.dense_mode ? Layout::kMemory : Layout::kPlain;
}

}  // namespace

absl::StatusOr<uint64_t> Inference::Generate(const Identity& identity,
                                             const v1::GenerateRequest& request,
                                             std::shared_ptr<EventSink> sink, absl::Time arrived) {
  const auto take = [&]() -> absl::StatusOr<uint64_t> {
    absl::StatusOr<Use> model = Enter();
    if (!model.ok()) return model.status();
    const Engine& engine = *(*model)->engine;
    if (absl::Status status = CheckLength(request.text(), engine, "prompt.text"); !status.ok())
      return status;
    const absl::StatusOr<bool> memory = WantsMemory(request.memory());
    if (!memory.ok()) return memory.status();
    absl::StatusOr<EngineRequest> engine_request =
        ToEngineRequest(request, *(*model)->tokenizer, engine.decoder().config().eos_token_ids);
    if (!engine_request.ok()) return engine_request.status();
    engine_request->tenant = identity.tenant;
    engine_request->layout = LayoutFor(**model, *memory);
    if (engine_request->request_id.empty())
      engine_request->request_id = absl::StrFormat("generate-%016x", RandomNumber());
    if (!request.sampling().has_seed()) engine_request->sampling.seed = RandomNumber();
    if (*memory) {
      absl::StatusOr<MemoryPlan> plan = PlanMemory(**model, identity, request.memory(), arrived);
      if (!plan.ok()) return plan.status();
      engine_request->memory = *std::move(plan);
    }
    return Submit(**model, *std::move(engine_request),
                  std::make_shared<ObservedSink>(std::move(sink), metrics_, requests_, arrived));
  };
  absl::StatusOr<uint64_t> number = take();
  if (!number.ok()) metrics_->Refused(absl::StatusCodeToString(number.status().code()));
  return number;
}

absl::StatusOr<uint64_t> Inference::Score(const Identity& identity, const v1::ScoreRequest& request,
                                          ScoreCallback done, absl::Time arrived) {
  const auto take = [&]() -> absl::StatusOr<uint64_t> {
    absl::StatusOr<Use> model = Enter();
    if (!model.ok()) return model.status();
    const Engine& engine = *(*model)->engine;
    if (absl::Status status = CheckLength(request.text(), engine, "prompt.text"); !status.ok())
      return status;
    if (absl::Status status =
            CheckLength(request.continuation_text(), engine, "continuation.continuation_text");
        !status.ok()) {
      return status;
    }
    const absl::StatusOr<bool> memory = WantsMemory(request.memory());
    if (!memory.ok()) return memory.status();
    absl::StatusOr<EngineRequest> engine_request = ToEngineRequest(request, *(*model)->tokenizer);
    if (!engine_request.ok()) return engine_request.status();
    engine_request->tenant = identity.tenant;
    engine_request->layout = LayoutFor(**model, *memory);
    if (*memory) {
      absl::StatusOr<MemoryPlan> plan = PlanMemory(**model, identity, request.memory(), arrived);
      if (!plan.ok()) return plan.status();
      engine_request->memory = *std::move(plan);
    }
    auto sink = std::make_shared<ScoreSink>(std::move(done), *engine_request->continuation);
    return Submit(**model, *std::move(engine_request),
                  std::make_shared<ObservedSink>(std::move(sink), metrics_, requests_, arrived));
  };
  absl::StatusOr<uint64_t> number = take();
  if (!number.ok()) metrics_->Refused(absl::StatusCodeToString(number.status().code()));
  return number;
}

void Inference::Cancel(uint64_t number) {
  if (const std::optional<Use> model = Peek()) (*model)->engine->Cancel(number);
}

absl::Status Inference::Abort(const Identity& identity, const v1::AbortRequest& request) {
  const std::optional<Use> model = Peek();
  if (!model) return Enter().status();
  return (*model)->engine->Abort(identity.tenant, request.request_id());
}

absl::StatusOr<v1::TokenizeResponse> Inference::Tokenize(const v1::TokenizeRequest& request) const {
  const absl::StatusOr<Use> model = Enter();
  if (!model.ok()) return model.status();
  const Tokenizer& tokenizer = *(*model)->tokenizer;
  v1::TokenizeResponse response;
  if (request.add_bos()) response.add_ids(tokenizer.bos_id());
  const std::vector<int32_t> ids = tokenizer.Encode(request.text());
  response.mutable_ids()->Add(ids.begin(), ids.end());
  for (const int32_t id : response.ids()) response.add_pieces(std::string(tokenizer.Piece(id)));
  return response;
}

absl::StatusOr<v1::DetokenizeResponse> Inference::Detokenize(
    const v1::DetokenizeRequest& request) const {
  const absl::StatusOr<Use> model = Enter();
  if (!model.ok()) return model.status();
  const int vocabulary = (*model)->engine->decoder().config().vocab_size;
  for (int i = 0; i < request.ids_size(); ++i) {
    if (request.ids(i) < 0 || request.ids(i) >= vocabulary) {
      return absl::InvalidArgumentError(absl::StrCat("ids[", i, "] is ", request.ids(i),
                                                     ", not in the vocabulary of ", vocabulary));
    }
  }
  v1::DetokenizeResponse response;
  response.set_text(
      (*model)->tokenizer->Decode({request.ids().data(), static_cast<size_t>(request.ids_size())}));
  return response;
}

absl::StatusOr<v1::GetModelResponse> Inference::GetModel(const Identity& identity) const {
  const absl::StatusOr<Use> model = Enter();
  if (!model.ok()) return model.status();
  const Decoder& decoder = (*model)->engine->decoder();
  const ModelConfig& config = decoder.config();
  v1::GetModelResponse response;
  response.set_name((*model)->name);
  response.set_writer_fingerprint(std::string((*model)->writer_fingerprint.view()));
  response.set_parameters(config.parameter_count());
  response.set_vocabulary_size(config.vocab_size);
  response.set_dense_mode((*model)->dense_mode);
  response.set_device(decoder.model().device().name());
  response.set_weights((*model)->weights);
  const ExplicitMemoryConfig* memory = decoder.memory();
  response.set_max_context_tokens(
      (*model)->engine->max_tokens(memory != nullptr ? Layout::kMemory : Layout::kPlain));
  if (memory != nullptr) {
    *response.mutable_geometry() = GeometryOf(config, *memory);
    response.set_chunk_tokens(memory->chunk_tokens);
    response.set_references_per_chunk(memory->references_per_chunk);
  }
  *response.mutable_state() = StateOf(**model);
  if ((*model)->embedder != nullptr)
    response.set_embedder_fingerprint(std::string((*model)->embedder->fingerprint().view()));
  if ((*model)->source == nullptr) return response;
  const absl::StatusOr<std::vector<std::string>> names = (*model)->source->List(identity.tenant);
  if (!names.ok()) return response;  // what can be read now: nothing
  for (const std::string& name : *names) {
    if (identity.RightOn(name) >= Right::kRead) response.add_knowledge_bases(name);
  }
  return response;
}

// ---- chat ----

std::string Inference::model_name() const {
  const std::optional<Use> model = Peek();
  return model ? (*model)->name : "";
}

absl::StatusOr<std::vector<int32_t>> Inference::EncodeChat(
    std::span<const ChatMessage> messages) const {
  const absl::StatusOr<Use> model = Enter();
  if (!model.ok()) return model.status();
  return memory3::EncodeChat((*model)->chat, messages, *(*model)->tokenizer);
}

absl::StatusOr<ChatStops> Inference::StopsOfChat() const {
  const absl::StatusOr<Use> model = Enter();
  if (!model.ok()) return model.status();
  return StopsOf((*model)->chat, *(*model)->tokenizer);
}

// ---- state ----

absl::Duration Inference::RetryAfter() const {
  const std::optional<Use> model = Peek();
  if (!model) return absl::Seconds(1);
  const EngineStats stats = (*model)->engine->stats();
  double mean = 0;
  {
    const std::lock_guard lock(requests_->mutex);
    mean = requests_->mean_seconds;
  }
  // By then about half of those that wait now will have been admitted.
  const double seconds = mean * (stats.waiting + 1) / (2.0 * std::max(stats.running, 1));
  return std::clamp(absl::Seconds(seconds), kShortestRetry, kLongestRetry);
}

EngineStats Inference::stats() const {
  const std::optional<Use> model = Peek();
  return model ? (*model)->engine->stats() : EngineStats();
}

std::string Inference::MetricsText() const {
  const std::optional<Use> model = Peek();
  const prometheus::TextSerializer serializer;
  if (!model) return serializer.Serialize(metrics_->Collect({}, {}, /*ready=*/false));
  return serializer.Serialize(metrics_->Collect(
      (*model)->engine->stats(),
      (*model)->reader != nullptr ? (*model)->reader->stats() : MemoryReaderStats(), Ready().ok()));
}

}  // namespace memory3
