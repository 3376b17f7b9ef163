// The engine against the offline loops: the same tokens, the same grid; and what happens when
// memories do not come. Many at a time: engine_crowd_test.cc.
#include "inference_server/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "inference_server/testing/engine_fixture.h"
#include "memory/vq_codec.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(EngineTest, AloneItEqualsTheOfflineLoopAndKeepsToTheGrid) {
  Start({}, {.slice_tokens = 48});
  int retrievals = 0;
  for (const int in : {1, 63, 64, 65, 128}) {
    for (const int out : {1, 64, 65, 128}) {
      SCOPED_TRACE(absl::StrCat(in, " in, ", out, " out"));
      const EngineRequest request = Request(RandomIds(config_, in, 3 * in + out), out);
      const auto sink = Run(request);
      const Generation expected = Offline(request);
      EXPECT_EQ(sink->tokens_, expected.tokens);
      const ChunkGrid grid(in, 64);
      retrievals += grid.Retrievals(out);
      ASSERT_TRUE(base_->WaitForQueries(retrievals));
      EXPECT_EQ(base_->queries(), retrievals);
      EXPECT_EQ(sink->finish_.usage().retrievals(), grid.Retrievals(out));
      if (in == 128 && out == 128) {
        EXPECT_EQ(sink->finish_.usage().retrievals(), 3);
      }
      EXPECT_EQ(sink->finish_.reason(), v1::FINISH_REASON_LENGTH);
      // What each chunk that was fed a token read. The last token is never fed.
      const int chunks = grid.prompt_retrievals() + (out - 1 + 63) / 64;
      ASSERT_EQ(sink->provenance_.size(), chunks);
      for (int c = 0; c < chunks; ++c) {
        const v1::ChunkProvenance& p = sink->provenance_[c];
        const int of_prompt = grid.prompt_retrievals();
        EXPECT_EQ(p.chunk(), c);
        EXPECT_EQ(p.generated(), c >= of_prompt);
        EXPECT_EQ(p.inherited(), c == of_prompt);
        EXPECT_EQ(p.token_begin(), c < of_prompt ? 64 * c : in + 64 * (c - of_prompt));
        EXPECT_EQ(p.token_end(),
                  std::min<int>(p.token_begin() + 64, c < of_prompt ? in : in + out));
        const ChunkRead& read = expected.reads[grid.RetrievalOf(p.token_begin())];
        ASSERT_EQ(p.memories_size(), read.memory_ids.size());
        for (int i = 0; i < p.memories_size(); ++i) {
          EXPECT_EQ(p.memories(i).record_id(), read.memory_ids[i]);
          EXPECT_EQ(p.memories(i).sources_size(), 1);
          EXPECT_NE(p.memories(i).from(), v1::BYTE_SOURCE_UNSPECIFIED);
        }
      }
    }
  }
  ExpectIdle();
}

TEST_F(EngineTest, MemoryChangesTheOutputAndOffIsTheOfflineLoopWithout) {
  Start();
  const std::vector<int32_t> prompt = RandomIds(config_, 40, 11);
  const auto with = Run(Request(prompt, 50)), without = Run(Request(prompt, 50, false));
  EXPECT_NE(with->tokens_, without->tokens_);
  EXPECT_EQ(without->tokens_, Offline(Request(prompt, 50, false)).tokens);
  EXPECT_TRUE(without->provenance_.empty());
  EXPECT_EQ(with->prompt_.knowledge_base(), "kb");
  EXPECT_EQ(with->prompt_.knowledge_base_version(), 3);
  EXPECT_EQ(with->prompt_.token_ids_size(), 41);
}

TEST_F(EngineTest, UnderADeadlineAChunkGoesOnWithoutLateMemories) {
  Start();
  base_->SetOpen(false);
  EngineRequest request = Request(RandomIds(config_, 70, 21), 10);
  request.memory.deadline = absl::Milliseconds(30);
  const auto sink = Run(request);
  request.memory.base = nullptr;
  EXPECT_EQ(sink->tokens_, Offline(request).tokens);
  ASSERT_EQ(sink->provenance_.size(), 3u);
  for (const v1::ChunkProvenance& p : sink->provenance_) {
    EXPECT_TRUE(p.timed_out());
    EXPECT_FALSE(p.unavailable());
    EXPECT_EQ(p.memories_size(), 0);
  }
  base_->SetOpen(true);
}

TEST_F(EngineTest, UnderADeadlineAChunkReadsTheMemoriesThatHaveCome) {
  Start();
  base_->SetOpen(false);
  base_->SetParts(2);  // the first of three is late
  EngineRequest request = Request(RandomIds(config_, 40, 23), 10);
  request.memory.deadline = absl::Seconds(1);  // time enough for what is there
  const auto sink = Run(request);
  const RetrieveFunction all = base_->Offline(&tokenizer_, kTopK);
  const auto late = [&](std::span<const int32_t> query) {
    absl::StatusOr<std::vector<RetrievedMemory>> found = all(query);
    found->erase(found->begin());
    return found;
  };
  const auto expected =
      Generate(*offline_, request.prompt, late, {.layout = request.layout, .max_new_tokens = 10});
  ASSERT_TRUE(expected.ok()) << expected.status();
  EXPECT_EQ(sink->tokens_, expected->tokens);
  EXPECT_NE(sink->tokens_, Offline(request).tokens);
  ASSERT_EQ(sink->provenance_.size(), 2u);
  for (const v1::ChunkProvenance& p : sink->provenance_) {
    EXPECT_TRUE(p.timed_out());
    EXPECT_FALSE(p.unavailable());
    ASSERT_EQ(p.memories_size(), 2);
    EXPECT_GT(p.memories(0).score(), p.memories(1).score());
    EXPECT_EQ(p.memories(0).from(), v1::STORE);
  }
  // The late one fills the cache.
  base_->SetOpen(true);
  request.memory.deadline = std::nullopt;
  EXPECT_EQ(Run(request)->tokens_, Offline(request).tokens);
  EXPECT_EQ(reader_->stats().store_hits, 3u);
  ExpectIdle();
}

// Memories that came in time, while a step of others ran past the deadline, are read although they
// are not on the device yet.
TEST_F(EngineTest, UnderADeadlineALongStepLosesNothingThatHasCome) {
  Start();
  constexpr absl::Duration kDeadline = absl::Milliseconds(20);
  EngineRequest request = Request(RandomIds(config_, 70, 25), 10);
  request.memory.deadline = kDeadline;
  // Both on the engine's thread: the request is admitted, its retrieval begins, and the step that
  // follows takes until the retrieval is over and the deadline past.
  absl::Time over = absl::InfiniteFuture();
  auto sink = std::make_shared<KeepingSink>(), other = std::make_shared<KeepingSink>();
  sink->OnEvent([&] { over = std::min(over, absl::Now() + 2 * kDeadline); });
  other->OnEvent([&] {
    if (over == absl::InfiniteFuture()) return;
    while (retrieved_ == 0 || absl::Now() < over) std::this_thread::yield();
  });
  ASSERT_TRUE(engine_->Submit(Request({5, 6}, 300, false), other).ok());
  ASSERT_TRUE(engine_->Submit(request, sink).ok());
  EXPECT_TRUE(sink->Wait().ok());
  EXPECT_EQ(sink->tokens_, Offline(request).tokens);
  for (const v1::ChunkProvenance& p : sink->provenance_) {
    EXPECT_FALSE(p.timed_out());
    EXPECT_EQ(p.memories_size(), kTopK);
  }
  EXPECT_TRUE(other->Wait().ok());
}

TEST_F(EngineTest, MemoriesThatComeInPartsAreReadInTheirOrder) {
  Start();
  base_->SetParts(kTopK);
  std::vector<std::pair<EngineRequest, std::shared_ptr<KeepingSink>>> running;
  for (int i = 0; i < 8; ++i) {
    EngineRequest request = Request(RandomIds(config_, 60 + 20 * i, 31 + i), 70);
    running.emplace_back(request, Submit(request));
  }
  for (auto& [request, sink] : running) {
    EXPECT_TRUE(sink->Wait().ok());
    EXPECT_EQ(sink->tokens_, Offline(request).tokens);
    for (const v1::ChunkProvenance& p : sink->provenance_) EXPECT_EQ(p.memories_size(), kTopK);
  }
  ExpectIdle();
}

// What one query still waits for holds no other one up.
TEST_F(EngineTest, AQueryHasItsMemoriesBeforeTheOthersHaveTheirs) {
  Start();
  base_->SetOpen(false);
  base_->SetParts(1);
  std::vector<ReadQuery> queries(2);
  queries[0] = {"one", 1, std::nullopt, {}};
  queries[1] = {"another", 3, std::nullopt, {}};
  Once first, second;
  reader_->Read(base_, std::move(queries), false, absl::InfiniteFuture(),
                [&](size_t query, const ReadResult& result) {
                  if (result.last) (query == 0 ? first : second).Notify();
                });
  EXPECT_TRUE(first.Wait());
  EXPECT_FALSE(second.HasHappened());
  base_->SetOpen(true);
  EXPECT_TRUE(second.Wait());
}

// A record that the store cannot read: the query that hit it goes on with its other memories and
// says why, at once; the batch's other query does not notice.
TEST_F(EngineTest, AnUnreadableRecordIsItsOwnQueriesAlone) {
  Start();
  std::vector<ReadQuery> queries;
  std::vector<std::vector<int>> found;
  for (int i = 0; queries.size() < 2; ++i) {  // two that share no memory
    std::string text = absl::StrCat("query ", i);
    std::vector<int> hits = base_->Find(text, kTopK);
    if (!found.empty() && std::find_first_of(hits.begin(), hits.end(), found[0].begin(),
                                             found[0].end()) != hits.end())
      continue;
    queries.push_back({std::move(text), kTopK, std::nullopt, {}});
    found.push_back(std::move(hits));
  }
  const std::string bad = FakeBase::IdOf(found[0][1]).ToHex();
  base_->SetUnreadable(found[0][1], absl::NotFoundError("record " + bad + " is unknown"));
  std::vector<std::vector<size_t>> ranks(2);
  std::vector<absl::Status> statuses(2);
  Once ended[2];
  reader_->Read(base_, queries, false, absl::InfiniteFuture(),
                [&](size_t query, const ReadResult& result) {
                  for (const ReadMemory& read : result.memories) ranks[query].push_back(read.rank);
                  if (!result.last) return;
                  statuses[query] = result.status;
                  ended[query].Notify();
                });
  EXPECT_TRUE(ended[0].Wait());
  EXPECT_TRUE(ended[1].Wait());
  EXPECT_THAT(ranks[0], ElementsAre(0, 2));
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDataLoss) << statuses[0];
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr(bad));
  EXPECT_THAT(ranks[1], ElementsAre(0, 1, 2));
  EXPECT_EQ(statuses[1], absl::OkStatus());
  EXPECT_EQ(base_->requests(), 1);  // not asked for again and again

  // A request's chunks say it; a request that wants all its memories fails. Nothing in the cache.
  engine_.reset();
  base_ = std::make_shared<FakeBase>(memories_, config_.head_dim);
  Start();
  EngineRequest request = Request(RandomIds(config_, 20, 24), 10);
  const std::vector<int> read = base_->Find(tokenizer_.DecodeQuery(request.prompt), kTopK);
  base_->SetUnreadable(read[0], absl::DataLossError("record: checksum mismatch"));
  const auto sink = Run(request);
  ASSERT_EQ(sink->provenance_.size(), 2u);
  EXPECT_TRUE(sink->provenance_[0].unavailable());
  ASSERT_EQ(sink->provenance_[0].memories_size(), kTopK - 1);
  for (const auto& memory : sink->provenance_[0].memories())
    EXPECT_NE(memory.record_id(), FakeBase::IdOf(read[0]).view());
  request.memory.fail_if_unavailable = true;
  const absl::Status failed = Submit(request)->Wait();
  EXPECT_TRUE(absl::IsUnavailable(failed));
  EXPECT_THAT(std::string(failed.message()), HasSubstr("checksum mismatch"));
  base_->SetUnreadable(read[0], absl::OkStatus());  // repaired
  EXPECT_EQ(Run(request)->tokens_, Offline(request).tokens);
}

// What came before a retrieval failed does not pile up in the cache.
TEST_F(EngineTest, TheCacheKeepsToItsBoundThoughEveryRetrievalFails) {
  Start({}, {}, /*cache_bytes=*/1);
  base_->SetParts(kTopK);
  base_->FailAfterParts(absl::DeadlineExceededError("too late"));
  const int64_t one = memories_[0].values.size() * static_cast<int64_t>(sizeof(float));
  for (int i = 0; i < 26; ++i) {
    Once ended;
    reader_->Read(base_, {{absl::StrCat("query ", i), kTopK, std::nullopt, {}}}, false,
                  absl::InfiniteFuture(), [&](size_t, const ReadResult& result) {
                    if (result.last) ended.Notify();
                  });
    EXPECT_TRUE(ended.Wait());
  }
  // Of thirteen memories those of the last retrievals, which may have been in use just then.
  EXPECT_LE(reader_->stats().cache_bytes, 2 * kTopK * one);
}

TEST_F(EngineTest, AWaitEndsAtTheCap) {
  Start({}, {.wait_cap = absl::Milliseconds(30)});
  base_->SetOpen(false);
  EngineRequest request = Request(RandomIds(config_, 70, 22), 10);
  const auto degraded = Run(request);
  for (const v1::ChunkProvenance& p : degraded->provenance_) EXPECT_TRUE(p.unavailable());
  request.memory.fail_if_unavailable = true;
  const auto failed = Submit(request);
  EXPECT_TRUE(absl::IsUnavailable(failed->Wait()));
  EXPECT_TRUE(failed->tokens_.empty());
  base_->SetOpen(true);
  ExpectIdle();
}

TEST_F(EngineTest, AStoreThatFailsDegradesOrFailsAsAsked) {
  Start();
  base_->Fail(absl::UnavailableError("gone"));
  EngineRequest request = Request(RandomIds(config_, 20, 23), 10);
  const auto degraded = Run(request);
  ASSERT_EQ(degraded->provenance_.size(), 2u);
  EXPECT_TRUE(degraded->provenance_[0].unavailable());
  EngineRequest off = Request(request.prompt, 10, false);
  EXPECT_EQ(degraded->tokens_, Offline(off).tokens);
  request.memory.fail_if_unavailable = true;
  const absl::Status status = Submit(request)->Wait();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("gone"));
  // And comes back.
  base_->Fail(absl::OkStatus());
  EXPECT_EQ(Run(request)->tokens_, Offline(request).tokens);
}

TEST_F(EngineTest, DamagedRecordsAndAnotherModelsAreNeverRead) {
  Start();
  const EngineRequest request = Request(RandomIds(config_, 20, 24), 10);
  const std::vector<int> found = base_->Find(tokenizer_.DecodeQuery(request.prompt), kTopK);
  base_->Damage(found[1], 200);
  const auto sink = Run(request);
  ASSERT_EQ(sink->provenance_.size(), 2u);
  EXPECT_TRUE(sink->provenance_[0].unavailable());
  ASSERT_EQ(sink->provenance_[0].memories_size(), kTopK - 1);
  for (const auto& memory : sink->provenance_[0].memories())
    EXPECT_NE(memory.record_id(), FakeBase::IdOf(found[1]).view());
  base_->Damage(found[1], 200);  // repaired, and asked for again
  EXPECT_EQ(Run(request)->tokens_, Offline(request).tokens);

  // Nothing in the cache, and a store full of another model's memories.
  engine_.reset();
  base_ = std::make_shared<FakeBase>(memories_, config_.head_dim, "another model");
  Start();
  const auto foreign = Run(Request(request.prompt, 10));
  ASSERT_EQ(foreign->provenance_.size(), 2u);
  EXPECT_TRUE(foreign->provenance_[0].unavailable());
  EXPECT_EQ(foreign->provenance_[0].memories_size(), 0);
  EXPECT_EQ(foreign->tokens_, Offline(Request(request.prompt, 10, false)).tokens);
}

// On a device that decodes vq itself the host keeps the records' codes: the same output, less
// cache, and damage is found before the codes go anywhere.
TEST_F(EngineTest, MemoriesKeptEncodedAreReadAsDecodedOnes) {
  VqCodebook book;
  book.head_dim = config_.head_dim;
  book.coarse_bits = 3;
  book.fine_bits = 2;
  book.rotation.assign(64, 0.0f);
  for (int i = 0; i < 8; ++i) book.rotation[i * 8 + (i * 3 + 1) % 8] = 1;
  for (int i = 0; i < 8 << 3; ++i) book.coarse.push_back(0.4f * static_cast<float>(i % 11 - 5));
  for (int i = 0; i < 8 << 2; ++i) book.fine.push_back(0.1f * static_cast<float>(i % 7 - 3));
  auto codec = VqCodec::Create(book, Sha256Of("a codebook"));
  ASSERT_TRUE(codec.ok()) << codec.status();
  const std::shared_ptr<const Codec> vq = *std::move(codec);
  int64_t cache_bytes[2];
  for (const bool encoded : {false, true}) {
    SCOPED_TRACE(encoded);
    engine_.reset();
    base_ = std::make_shared<FakeBase>(memories_, config_.head_dim, "model", vq);
    Start({.memory_slots = 2 * kTopK}, {}, 1 << 30, encoded);
    for (int i = 0; i < 4; ++i) {
      const EngineRequest request = Request(RandomIds(config_, 80, 60 + i), 10);
      EXPECT_EQ(Run(request)->tokens_, Offline(request).tokens) << i;
    }
    cache_bytes[encoded] = reader_->stats().cache_bytes;
  }
  EXPECT_LT(cache_bytes[1] * 4, cache_bytes[0]);

  for (const std::string_view writer : {"model", "another model"}) {
    engine_.reset();
    base_ = std::make_shared<FakeBase>(memories_, config_.head_dim, writer, vq);
    Start({}, {}, 1 << 30, /*device_decodes_vq=*/true);
    const EngineRequest request = Request(RandomIds(config_, 20, 24), 10);
    const std::vector<int> found = base_->Find(tokenizer_.DecodeQuery(request.prompt), kTopK);
    base_->Damage(found[1], 140);
    const auto sink = Run(request);
    ASSERT_EQ(sink->provenance_.size(), 2u);
    EXPECT_TRUE(sink->provenance_[0].unavailable());
    EXPECT_EQ(sink->provenance_[0].memories_size(), writer == "model" ? kTopK - 1 : 0);
  }
}

TEST_F(EngineTest, StopsAtIdsAndStringsAfterTheMinimum) {
  Start();
  EngineRequest request = Request(RandomIds(config_, 20, 31), 40);
  request.sampling = {.temperature = 1, .seed = 4};
  const auto free = Run(request);
  ASSERT_EQ(free->tokens_.size(), 40u);
  EXPECT_EQ(free->text_, tokenizer_.Decode(free->tokens_));
  for (const std::string& piece : free->pieces_) {
    EXPECT_TRUE(piece.empty() || (piece[0] & 0xC0) != 0x80) << "half a character";
  }

  request.stop_token_ids = {free->tokens_[12]};
  const auto stopped = Run(request);
  EXPECT_EQ(stopped->tokens_, Offline(request).tokens);
  EXPECT_EQ(stopped->finish_.reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(stopped->finish_.stop_token_id(), free->tokens_[12]);
  EXPECT_EQ(stopped->text_,
            tokenizer_.Decode(std::span(stopped->tokens_).first(stopped->tokens_.size() - 1)));
  request.min_new_tokens = 25;
  EXPECT_EQ(Run(request)->tokens_, Offline(request).tokens);

  request.stop_token_ids.clear();
  request.min_new_tokens = 0;
  const std::string text = tokenizer_.Decode(std::span(free->tokens_).first(20));
  request.stop = {"never there", text.substr(text.size() - 3)};
  const auto at_string = Run(request);
  EXPECT_EQ(at_string->text_, free->text_.substr(0, free->text_.find(request.stop[1])));
  EXPECT_EQ(at_string->finish_.stop(), request.stop[1]);
  EXPECT_LE(at_string->tokens_.size(), 20u);
}

TEST_F(EngineTest, LogprobsEchoAndScoreAreTheOfflineOnes) {
  Start({.max_logit_rows = 32}, {.slice_tokens = 48});
  EngineRequest request = Request(RandomIds(config_, 70, 41), 80);
  request.logprobs = 2;
  request.echo = true;
  const auto sink = Run(request);
  EXPECT_EQ(sink->tokens_, Offline(request).tokens);
  EXPECT_EQ(sink->text_.rfind(tokenizer_.Decode(request.prompt), 0), 0u);

  const auto expected = ScoreContinuation(*offline_, request.prompt, sink->tokens_,
                                          base_->Offline(&tokenizer_, kTopK), {});
  ASSERT_TRUE(expected.ok()) << expected.status();
  ASSERT_EQ(sink->logprobs_.size(), 80u);
  for (int i = 0; i < 80; ++i) {
    EXPECT_EQ(sink->logprobs_[i].chosen().logprob(), expected->logprobs[i]) << i;
    ASSERT_EQ(sink->logprobs_[i].top_size(), 2);
    EXPECT_EQ(sink->logprobs_[i].top(0).token_id(), sink->tokens_[i]);  // greedy
  }
  EngineRequest score = Request(request.prompt, 1);
  score.continuation = sink->tokens_;
  const auto scored = Run(score);
  EXPECT_EQ(scored->score_.logprobs, expected->logprobs);
  EXPECT_TRUE(scored->score_.greedy);
  (*score.continuation)[40] = (*score.continuation)[40] == 7 ? 8 : 7;
  EXPECT_FALSE(Run(score)->score_.greedy);
}

// A client that goes away at a token gets no further one: its place is free within that step.
TEST_F(EngineTest, ACancelTakesEffectBeforeTheNextStep) {
  Start({}, {.max_running = 1});
  for (const bool abort : {false, true}) {
    EngineRequest request = Request(RandomIds(config_, 70, 51), 100);
    request.request_id = "mine";
    auto sink = std::make_shared<KeepingSink>();
    std::atomic<uint64_t> number = 0;
    Once taken;
    sink->OnEvent([&, raw = sink.get()] {
      if (raw->tokens_.size() != 3) return;
      EXPECT_TRUE(taken.Wait());
      if (abort) {
        EXPECT_TRUE(engine_->Abort("default", "mine").ok());
      } else {
        engine_->Cancel(number);
      }
    });
    const auto submitted = engine_->Submit(std::move(request), sink);
    ASSERT_TRUE(submitted.ok()) << submitted.status();
    number = *submitted;
    taken.Notify();
    const auto next = Submit(Request({5, 6}, 4));  // waits for the only place
    EXPECT_EQ(absl::IsCancelled(sink->Wait()), !abort);
    EXPECT_EQ(sink->tokens_.size(), 3u);
    EXPECT_TRUE(next->Wait().ok());
    ExpectIdle();
  }
}

TEST_F(EngineTest, BadRequestsNameTheField) {
  Start({.kv_pages = 16, .memory_slots = 4}, {.max_waiting = 1});
  const auto error = [&](const std::function<void(EngineRequest&)>& change) {
    EngineRequest request = Request({5, 6}, 4);
    change(request);
    const auto number = engine_->Submit(std::move(request), std::make_shared<KeepingSink>());
    EXPECT_TRUE(absl::IsInvalidArgument(number.status())) << number.status();
    return std::string(number.status().message());
  };
  EXPECT_THAT(error([](auto& r) { r.prompt.clear(); }), HasSubstr("prompt"));
  EXPECT_THAT(error([](auto& r) { r.prompt[1] = 96; }), HasSubstr("token_ids[1] is 96"));
  EXPECT_THAT(error([](auto& r) { r.prompt.assign(1000, 5); }), HasSubstr("longest context"));
  EXPECT_THAT(error([](auto& r) { r.prompt.assign(300, 5); }), HasSubstr("KV cache"));
  EXPECT_THAT(error([](auto& r) { r.max_new_tokens = 0; }), HasSubstr("max_new_tokens"));
  EXPECT_THAT(error([](auto& r) { r.min_new_tokens = 9; }), HasSubstr("min_new_tokens"));
  EXPECT_THAT(error([](auto& r) { r.stop = {""}; }), HasSubstr("stop"));
  EXPECT_THAT(error([](auto& r) { r.logprobs = 21; }), HasSubstr("logprobs"));
  EXPECT_THAT(error([](auto& r) { r.sampling.temperature = NAN; }), HasSubstr("temperature"));
  EXPECT_THAT(error([](auto& r) { r.memory.references_per_chunk = 5; }),
              HasSubstr("references_per_chunk is 5, the limit is 4"));
  EXPECT_THAT(error([](auto& r) { r.memory.min_score = NAN; }), HasSubstr("memory.min_score"));
  EXPECT_THAT(error([](auto& r) { r.memory.deadline = -absl::Seconds(1); }),
              HasSubstr("memory.deadline"));
  // Scores.
  EXPECT_THAT(error([](auto& r) { r.continuation = {5, 96}; }), HasSubstr("continuation.ids[1]"));
  EXPECT_THAT(error([](auto& r) { r.continuation = std::vector<int32_t>(1000, 5); }),
              HasSubstr("longest context"));
}

TEST_F(EngineTest, AFullQueueIsResourceExhaustedAndShutdownEndsAll) {
  Start({}, {.max_running = 1, .max_waiting = 2});
  base_->SetOpen(false);
  std::vector<std::shared_ptr<KeepingSink>> sinks;
  absl::Status last;
  EngineRequest request = Request({5, 6}, 4);
  request.request_id = "same";
  sinks.push_back(Submit(request));
  EXPECT_TRUE(
      absl::IsAlreadyExists(engine_->Submit(request, std::make_shared<KeepingSink>()).status()));
  for (int i = 0; i < 4 && last.ok(); ++i) {
    auto sink = std::make_shared<KeepingSink>();
    last = engine_->Submit(Request({5, 6}, 4), sink).status();
    if (last.ok()) sinks.push_back(sink);
  }
  EXPECT_TRUE(absl::IsResourceExhausted(last)) << last;
  engine_.reset();
  for (const auto& sink : sinks) EXPECT_TRUE(absl::IsUnavailable(sink->Wait()));
  base_->SetOpen(true);
}

}  // namespace
}  // namespace memory3
