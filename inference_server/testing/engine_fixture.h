// What the engine's tests share: a fixture, a tokenizer of bytes, an embedder and a source of
// memories whose answers follow from the query's text alone, a sink that keeps what it is sent.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "inference_server/engine.h"
#include "inference_server/worker_threads.h"
#include "transformer/generate.h"
#include "transformer/testing/decoder_fixture.h"

namespace memory3 {

// Id i >= 2 is one byte; 92 … 95 are the bytes of two characters of two bytes each.
class ByteTokenizer final : public Tokenizer {
 public:
  ByteTokenizer() {
    for (int i = 0; i < 96; ++i) bytes_.push_back(i < 2 ? "" : std::string(1, char(30 + i)));
    bytes_[92] = "\xC3";
    bytes_[93] = "\xA9";
    bytes_[94] = "\xC5";
    bytes_[95] = "\xB1";
  }
  int vocab_size() const override { return 96; }
  int32_t bos_id() const override { return 1; }
  int32_t eos_id() const override { return 0; }
  std::vector<int32_t> Encode(std::string_view text, SpecialTokens) const override {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(c - 30);
    return ids;
  }
  std::string_view TokenBytes(int32_t id) const override {
    return id >= 0 && id < 96 ? std::string_view(bytes_[id]) : std::string_view();
  }
  std::string_view Piece(int32_t id) const override { return TokenBytes(id); }
  bool IsSpecial(int32_t id) const override { return id < 2; }
  int32_t TokenId(std::string_view) const override { return -1; }
  LeadingSpace leading_space() const override { return LeadingSpace::kNone; }
  const Hash256& file_hash() const override { return hash_; }

 private:
  std::vector<std::string> bytes_;
  Hash256 hash_;
};

// A text becomes a number below 2^20.
inline uint32_t NumberOf(std::string_view text) { return Crc32c(text) >> 12; }

class NumberEmbedder final : public Embedder {
 public:
  int dimension() const override { return 1; }
  const Hash256& fingerprint() const override { return hash_; }
  absl::Status Embed(std::span<const std::string_view> texts, std::span<float> out) const override {
    for (size_t i = 0; i < texts.size(); ++i) out[i] = static_cast<float>(NumberOf(texts[i]));
    return absl::OkStatus();
  }

 private:
  Hash256 hash_;
};

inline Hash256 WriterOf(std::string_view model) { return Sha256Of(model); }

// Answers on a thread of its own, as a stream would; remembers what it has sent, as a server does.
class FakeBase final : public MemoryBase {
 public:
  // Default codec: f32.
  FakeBase(const std::vector<ExplicitMemory>& memories, int head_dim,
           std::string_view writer = "model", std::shared_ptr<const Codec> codec = nullptr)
      : MemoryBase("default", "kb", 3,
                   codec != nullptr ? std::move(codec) : MakeF32Codec(head_dim)),
        worker_(1) {
    for (const ExplicitMemory& memory : memories) {
      auto record = EncodeRecord(memory, WriterOf(writer), *this->codec());
      EXPECT_TRUE(record.ok()) << record.status();
      auto decoded = DecodeRecord(*record, WriterOf(writer), *this->codec());
      EXPECT_TRUE(decoded.ok()) << decoded.status();
      memories_.push_back(*std::move(decoded));
      records_.push_back(std::make_shared<std::string>(*std::move(record)));
    }
  }

  static RecordId IdOf(int memory) { return Sha256Of(absl::StrCat("memory ", memory)); }
  // The memories for a query of this text.
  std::vector<int> Find(std::string_view text, int top_k) const {
    return FindNumber(NumberOf(text), top_k);
  }
  RetrieveFunction Offline(const Tokenizer* tokenizer, int top_k) const {
    return [this, tokenizer,
            top_k](std::span<const int32_t> query) -> absl::StatusOr<std::vector<RetrievedMemory>> {
      std::vector<RetrievedMemory> found;
      for (const int i : Find(tokenizer->DecodeQuery(query), top_k)) {
        found.push_back(
            {std::string(IdOf(i).view()), std::make_shared<const ExplicitMemory>(memories_[i])});
      }
      return found;
    };
  }

  void Retrieve(SourceRequest request, SourceCallback done) override {
    {
      const std::lock_guard lock(mutex_);
      ++requests_;
      queries_ += static_cast<int>(request.queries.size());
      changed_.notify_all();
    }
    worker_.Add([this, request = std::move(request), done = std::move(done)] {
      const absl::StatusOr<SourceAnswer> parts = TellParts(request);
      absl::Status late;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return open_; });
        late = late_failure_;
      }
      done(!late.ok() ? late : parts.ok() ? parts : Answer(request));
    });
  }
  void Evicted(const RecordId& id) override {
    const std::lock_guard lock(mutex_);
    sent_.erase(id);
    ++evictions_;
  }

  void SetOpen(bool open) {
    const std::lock_guard lock(mutex_);
    open_ = open;
    changed_.notify_all();
  }
  // Before the base is open all hits are told, and of each query's records those of its last
  // `records` hits, the last first.
  void SetParts(int records) {
    const std::lock_guard lock(mutex_);
    parts_ = records;
  }
  void Fail(absl::Status status) {
    const std::lock_guard lock(mutex_);
    failure_ = std::move(status);
  }
  // What ends a retrieval once its parts are told.
  void FailAfterParts(absl::Status status) {
    const std::lock_guard lock(mutex_);
    late_failure_ = std::move(status);
  }
  // The n-th byte of a memory's record.
  void Damage(int memory, size_t byte) { (*records_[memory])[byte] ^= 1; }
  // The store cannot read the memory's record; OK: it can again.
  void SetUnreadable(int memory, absl::Status why) {
    const std::lock_guard lock(mutex_);
    unreadable_[memory] = std::move(why);
  }
  int requests() const {
    const std::lock_guard lock(mutex_);
    return requests_;
  }
  int queries() const {
    const std::lock_guard lock(mutex_);
    return queries_;
  }
  // A chunk whose only token is the last of the output is asked for but not waited for. False:
  // there were not that many queries within a minute.
  bool WaitForQueries(int count) const {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::minutes(1), [&] { return queries_ >= count; });
  }
  int evictions() const {
    const std::lock_guard lock(mutex_);
    return evictions_;
  }

 private:
  std::vector<int> FindNumber(uint32_t number, int top_k) const {
    const int count = static_cast<int>(memories_.size());
    std::vector<int> found;
    for (int j = 0; j < std::min(top_k, count); ++j) found.push_back((number + j * 5) % count);
    return found;  // distinct where 5 does not divide count
  }
  // The whole answer, of which parts have been told; nothing where none are to be.
  absl::StatusOr<SourceAnswer> TellParts(const SourceRequest& request) {
    int records = 0;
    {
      const std::lock_guard lock(mutex_);
      records = parts_;
    }
    if (records == 0 || !request.part) return absl::UnavailableError("no parts");
    absl::StatusOr<SourceAnswer> answer = Answer(request);
    if (!answer.ok()) return answer;
    request.part({answer->queries, {}});
    for (const std::vector<SourceHit>& hits : answer->queries) {
      const int count = static_cast<int>(hits.size());
      for (int rank = count - 1; rank >= std::max(0, count - records); --rank) {
        const auto record = answer->records.find(hits[rank].id);
        if (record != answer->records.end()) request.part({{}, {{record->first, record->second}}});
      }
    }
    return answer;
  }
  absl::StatusOr<SourceAnswer> Answer(const SourceRequest& request) {
    const std::lock_guard lock(mutex_);
    if (!failure_.ok()) return failure_;
    for (const RecordId& id : request.missing) sent_.erase(id);
    SourceAnswer answer;
    for (const SourceQuery& query : request.queries) {
      std::vector<SourceHit>& hits = answer.queries.emplace_back();
      float score = 1;
      for (const int i : FindNumber(static_cast<uint32_t>(query.embedding[0]), query.top_k)) {
        SourceHit& hit = hits.emplace_back();
        hit.id = IdOf(i);
        hit.score = score /= 2;
        hit.sources.emplace_back().set_title(absl::StrCat("title ", i));
        if (sent_.contains(hit.id)) continue;
        if (const auto bad = unreadable_.find(i); bad != unreadable_.end() && !bad->second.ok()) {
          answer.unreadable[hit.id] = bad->second;
          continue;
        }
        sent_.insert(hit.id);
        answer.records[hit.id] = {*records_[i], records_[i]};
      }
    }
    return answer;
  }

  std::vector<ExplicitMemory> memories_;  // as the records hold them
  std::vector<std::shared_ptr<std::string>> records_;
  mutable std::mutex mutex_;  // guards what follows but the thread
  mutable std::condition_variable changed_;
  bool open_ = true;
  int parts_ = 0;
  absl::Status failure_, late_failure_;
  std::map<int, absl::Status> unreadable_;
  int requests_ = 0, queries_ = 0, evictions_ = 0;
  absl::flat_hash_set<RecordId> sent_;
  WorkerThreads worker_;
};

// Happens once. Not absl::Notification, whose locks TSan does not see.
class Once {
 public:
  void Notify() {
    const std::lock_guard lock(mutex_);
    happened_ = true;
    changed_.notify_all();
  }
  bool HasHappened() const {
    const std::lock_guard lock(mutex_);
    return happened_;
  }
  // False: not within the time.
  bool Wait(std::chrono::seconds limit = std::chrono::seconds(100)) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [this] { return happened_; });
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool happened_ = false;
};

class KeepingSink final : public EventSink {
 public:
  void Send(v1::GenerateResponse event) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_.HasHappened());
    EXPECT_FALSE(has_finish_);
    if (event.has_prompt()) {
      EXPECT_TRUE(tokens_.empty());
      prompt_ = event.prompt();
    } else if (event.has_delta()) {
      text_ += event.delta().text();
      pieces_.push_back(event.delta().text());
      tokens_.insert(tokens_.end(), event.delta().token_ids().begin(),
                     event.delta().token_ids().end());
      logprobs_.insert(logprobs_.end(), event.delta().logprobs().begin(),
                       event.delta().logprobs().end());
    } else if (event.has_provenance()) {
      provenance_.push_back(event.provenance());
    } else {
      has_finish_ = true;
      finish_ = event.finish();
    }
    if (on_event_) on_event_();
  }
  void Scored(ContinuationScore score) override { score_ = std::move(score); }
  void End(absl::Status status) override {
    status_ = std::move(status);
    ended_.Notify();
  }
  void OnEvent(std::function<void()> callback) { on_event_ = std::move(callback); }

  absl::Status Wait() {
    EXPECT_TRUE(ended_.Wait());
    return status_;
  }
  // Only after Wait.
  v1::PromptInfo prompt_;
  std::string text_;
  std::vector<std::string> pieces_;
  std::vector<int32_t> tokens_;
  std::vector<v1::TokenLogprobs> logprobs_;
  std::vector<v1::ChunkProvenance> provenance_;
  bool has_finish_ = false;
  v1::Finish finish_;
  ContinuationScore score_;

 private:
  std::mutex mutex_;
  absl::Status status_;
  std::function<void()> on_event_;
  Once ended_;
};

inline constexpr int kTopK = 3;

// A small model, the same for offline loops, and an engine over a FakeBase.
class EngineTest : public ::testing::Test {
 protected:
  EngineTest() : device_(TestDevice()), config_(SmallConfig()) {
    config_.explicit_memory->chunk_tokens = 64;
    model_ = RandomModel(device_.get(), config_);
    offline_device_ = TestDevice();
    offline_ = TestDecoder(RandomModel(offline_device_.get(), config_));
    std::vector<std::vector<int32_t>> references;
    for (int i = 0; i < 13; ++i) references.push_back(RandomIds(config_, 8 + i, 50 + i));
    memories_ = WriteMemories(*offline_, references);
    base_ = std::make_shared<FakeBase>(memories_, config_.head_dim);
  }
  ~EngineTest() override {
    engine_.reset();
    reader_.reset();
  }

  void Start(const DecoderOptions& decoder = {}, EngineOptions options = {},
             int64_t cache_bytes = 1 << 30, bool device_decodes_vq = false) {
    const ExplicitMemoryConfig& memory = *config_.explicit_memory;
    reader_ = std::make_unique<MemoryReader>(
        &embedder_, WriterOf("model"),
        MemoryShape{static_cast<int>(memory.memory_layers.size()), config_.kv_heads,
                    memory.tokens_kept, config_.head_dim},
        MemoryReaderOptions{cache_bytes, 2, device_decodes_vq,
                            [this](absl::Duration /*took*/) { ++retrieved_; }});
    options.model_name = "small";
    auto engine = Engine::Create(TestDecoder(model_, decoder), &tokenizer_, reader_.get(), options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }

  EngineRequest Request(std::vector<int32_t> prompt, int max_new_tokens, bool memory = true) {
    EngineRequest request;
    request.prompt = std::move(prompt);
    request.max_new_tokens = max_new_tokens;
    if (memory) request.memory.base = base_;
    request.memory.references_per_chunk = kTopK;
    return request;
  }
  std::shared_ptr<KeepingSink> Submit(EngineRequest request, uint64_t* number = nullptr) {
    auto sink = std::make_shared<KeepingSink>();
    auto submitted = engine_->Submit(std::move(request), sink);
    EXPECT_TRUE(submitted.ok()) << submitted.status();
    if (number != nullptr && submitted.ok()) *number = *submitted;
    return sink;
  }
  std::shared_ptr<KeepingSink> Run(EngineRequest request) {
    auto sink = Submit(std::move(request));
    const absl::Status status = sink->Wait();
    EXPECT_TRUE(status.ok()) << status;
    return sink;
  }
  Generation Offline(const EngineRequest& request) {
    GenerateOptions options{.layout = request.layout,
                            .max_new_tokens = request.max_new_tokens,
                            .min_new_tokens = request.min_new_tokens,
                            .stop_ids = request.stop_token_ids,
                            .sampling = request.sampling};
    auto generation = Generate(
        *offline_, request.prompt,
        request.memory.base ? base_->Offline(&tokenizer_, request.memory.references_per_chunk)
                            : RetrieveFunction(),
        options);
    EXPECT_TRUE(generation.ok()) << generation.status();
    return *std::move(generation);
  }
  // Everything is given back.
  void ExpectIdle() {
    const EngineStats stats = IdleStats();
    EXPECT_EQ(stats.running, 0);
    EXPECT_EQ(stats.waiting, 0);
    EXPECT_EQ(stats.kv_pages_used, 0);
    EXPECT_EQ(stats.memory_slots_pinned, 0);
  }
  // A sink's End comes before the engine's thread has counted; one more request orders them.
  EngineStats IdleStats() {
    Run(Request({5}, 1, false));
    EngineStats stats = engine_->stats();
    const absl::Time limit = absl::Now() + absl::Seconds(60);
    while (stats.running > 0 && absl::Now() < limit) {
      std::this_thread::yield();
      stats = engine_->stats();
    }
    return stats;
  }

  std::unique_ptr<Device> device_, offline_device_;
  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Decoder> offline_;
  std::vector<ExplicitMemory> memories_;
  std::shared_ptr<FakeBase> base_;
  ByteTokenizer tokenizer_;
  NumberEmbedder embedder_;
  std::atomic<int> retrieved_ = 0;  // retrievals whose callers have heard all of it
  std::unique_ptr<MemoryReader> reader_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace memory3
