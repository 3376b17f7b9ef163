// The engine with many requests at a time: each stream is its own, whoever joins, leaves or is
// preempted, and nothing is left behind.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "inference_server/testing/engine_fixture.h"

namespace memory3 {
namespace {

// 48 requests in a batch of 32, few pages, few slots and a small host cache: sequences join, leave,
// are cancelled and preempted, memories are evicted and come again.
TEST_F(EngineTest, InACrowdedBatchEveryStreamIsItsOwn) {
  const int64_t memory_bytes = memories_.back().values.size() * sizeof(float);
  Start({.max_rows = 96, .max_logit_rows = 32, .kv_pages = 70, .memory_slots = 8 * kTopK + 1},
        {.max_running = 32, .slice_tokens = 64}, 8 * memory_bytes);
  std::mt19937 random(5);
  std::vector<EngineRequest> requests;
  std::vector<std::shared_ptr<KeepingSink>> sinks;
  for (int i = 0; i < 48; ++i) {
    EngineRequest request =
        Request(RandomIds(config_, 1 + random() % 90, i), 60 + random() % 80, i % 4 != 0);
    if (i % 3 == 0) request.sampling = {.temperature = 1, .seed = static_cast<uint64_t>(i)};
    requests.push_back(request);
  }
  std::vector<Generation> expected;
  for (const EngineRequest& request : requests) expected.push_back(Offline(request));
  for (size_t i = 0; i < requests.size(); ++i) {
    sinks.push_back(Submit(requests[i]));
    if (i % 8 == 0) {
      uint64_t leaver = 0;
      Submit(Request(RandomIds(config_, 70, 900 + i), 200), &leaver);
      engine_->Cancel(leaver);
    }
    if (i == 31) {
      EXPECT_TRUE(sinks[0]->Wait().ok());  // the rest join a batch under way
    }
  }
  for (size_t i = 0; i < sinks.size(); ++i) {
    const absl::Status status = sinks[i]->Wait();
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(sinks[i]->tokens_, expected[i].tokens) << i;
    EXPECT_EQ(sinks[i]->finish_.usage().retrievals(), expected[i].reads.size());
  }
  EXPECT_GT(engine_->stats().preemptions, 0u);
  ExpectIdle();
}

// Two that begin together and grow until the cache is full: the later one gives way, feeds its
// tokens again with the memories it had, and retrieves nothing twice.
TEST_F(EngineTest, APreemptedSequenceReplaysWithoutRetrieving) {
  Start({.kv_pages = 12, .memory_slots = 2 * kTopK}, {.max_running = 2});
  base_->SetOpen(false);
  const EngineRequest first = Request(RandomIds(config_, 10, 61), 120),
                      second = Request(RandomIds(config_, 12, 62), 120);
  const auto a = Submit(first), b = Submit(second);
  base_->SetOpen(true);
  ASSERT_TRUE(a->Wait().ok());
  ASSERT_TRUE(b->Wait().ok());
  EXPECT_EQ(a->tokens_, Offline(first).tokens);
  EXPECT_EQ(b->tokens_, Offline(second).tokens);
  EXPECT_GT(IdleStats().preemptions, 0u);
  EXPECT_EQ(base_->queries(), 4);
  EXPECT_EQ(b->provenance_.size(), 3u);
}

// A host cache that holds nothing longer than it is used: what went is told to the source and
// comes again.
TEST_F(EngineTest, EvictedMemoriesComeAgain) {
  Start({.memory_slots = kTopK}, {}, /*cache_bytes=*/0);
  for (int i = 0; i < 12; ++i) {
    const EngineRequest request = Request(RandomIds(config_, 10, 70 + i % 6), 5);
    EXPECT_EQ(Run(request)->tokens_, Offline(request).tokens) << i;
  }
  EXPECT_GT(base_->evictions(), 0);
}

TEST_F(EngineTest, CancelledAndAbortedAtRandomMomentsTheRestIsUnharmed) {
  Start({.kv_pages = 80, .memory_slots = 4 * kTopK}, {.max_running = 8, .slice_tokens = 32});
  std::mt19937 random(9);
  std::vector<std::shared_ptr<KeepingSink>> kept, stopped;
  std::vector<EngineRequest> requests;
  std::vector<std::thread> threads;
  for (int i = 0; i < 24; ++i) {
    EngineRequest request = Request(RandomIds(config_, 1 + random() % 100, i), 40 + random() % 60);
    if (i % 2 == 0) {
      requests.push_back(request);
      kept.push_back(Submit(request));
      continue;
    }
    request.request_id = absl::StrCat("r", i);
    auto sink = std::make_shared<KeepingSink>();
    // Stopped at its k-th event, from another thread; some at once.
    auto reached = std::make_shared<Once>();
    auto left = std::make_shared<std::atomic<int>>(random() % 30);
    if (*left == 0) {
      reached->Notify();
    } else {
      sink->OnEvent([reached, left] {
        if (--*left == 0) reached->Notify();
      });
    }
    const auto number = engine_->Submit(request, sink);
    ASSERT_TRUE(number.ok()) << number.status();
    stopped.push_back(sink);
    threads.emplace_back([this, reached, number = *number, i, id = request.request_id] {
      EXPECT_TRUE(reached->Wait());
      if (i % 4 == 1) {
        engine_->Cancel(number);
      } else {
        engine_->Abort("default", id).IgnoreError();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  int cancelled = 0, aborted = 0;
  for (const auto& sink : stopped) {
    const absl::Status status = sink->Wait();
    EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
    cancelled += absl::IsCancelled(status);
    aborted += sink->finish_.reason() == v1::FINISH_REASON_ABORTED;
  }
  EXPECT_GT(cancelled, 0);
  EXPECT_GT(aborted, 0);
  for (size_t i = 0; i < kept.size(); ++i) {
    EXPECT_TRUE(kept[i]->Wait().ok());
    EXPECT_EQ(kept[i]->tokens_, Offline(requests[i]).tokens) << i;
  }
  EXPECT_TRUE(absl::IsNotFound(engine_->Abort("default", "r1")));
  ExpectIdle();
}

// Four clients cancel 1,000 requests at moments of their own while others run to their end.
TEST_F(EngineTest, AThousandCancelsLeaveNothingBehind) {
  const auto threads_now = [] {
    int count = 0;
    for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task"))
      ++count;
    return count;
  };
  constexpr int kClients = 4, kEach = 250, kKept = 4;
  const int threads_before = threads_now();
  Start({.max_rows = 96, .kv_pages = 60, .memory_slots = 5 * kTopK},
        {.max_running = 8, .slice_tokens = 48}, /*cache_bytes=*/1 << 14);
  std::vector<EngineRequest> kept;
  std::vector<Generation> expected;
  for (int i = 0; i < kKept; ++i) {
    kept.push_back(Request(RandomIds(config_, 30 + 40 * i, 500 + i), 70));
    expected.push_back(Offline(kept.back()));
  }
  std::atomic<int> cancelled = 0, finished = 0;
  std::atomic<bool> done = false;
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      std::mt19937 random(c);
      for (int i = 0; i < kEach; ++i) {
        const EngineRequest request =
            Request(RandomIds(config_, 1 + random() % 140, random()), 20 + random() % 60);
        auto sink = std::make_shared<KeepingSink>();
        // At the k-th event, or after some turns of the scheduler where k is 0.
        auto left = std::make_shared<std::atomic<int>>(random() % 12);
        const int turns = *left == 0 ? static_cast<int>(random() % 200) : 0;
        auto reached = std::make_shared<Once>();
        if (*left == 0) {
          reached->Notify();
        } else {
          sink->OnEvent([reached, left] {
            if (--*left == 0) reached->Notify();
          });
        }
        const auto number = engine_->Submit(request, sink);
        ASSERT_TRUE(number.ok()) << number.status();
        EXPECT_TRUE(reached->Wait());
        for (int turn = 0; turn < turns; ++turn) std::this_thread::yield();
        engine_->Cancel(*number);
        const absl::Status status = sink->Wait();
        EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
        ++(status.ok() ? finished : cancelled);
      }
    });
  }
  std::thread other([&] {
    for (int i = 0; !done; i = (i + 1) % kKept)
      EXPECT_EQ(Run(kept[i])->tokens_, expected[i].tokens) << i;
  });
  for (std::thread& client : clients) client.join();
  done = true;
  other.join();
  EXPECT_EQ(cancelled + finished, kClients * kEach);
  EXPECT_GT(cancelled, kClients * kEach / 2);
  ExpectIdle();
  engine_.reset();
  reader_.reset();
  EXPECT_EQ(threads_now(), threads_before);
}

// What arrives while a step runs is admitted together, and all its chunks' queries go in one
// Retrieve.
TEST_F(EngineTest, OneRetrievalForAllSequencesThatNeedOne) {
  Start({}, {.max_running = 16});
  Once blocked, go_on;
  auto first = std::make_shared<KeepingSink>();
  first->OnEvent([&, once = true]() mutable {
    if (!std::exchange(once, false)) return;
    blocked.Notify();
    EXPECT_TRUE(go_on.Wait());
  });
  ASSERT_TRUE(engine_->Submit(Request({5, 6}, 3, false), first).ok());
  ASSERT_TRUE(blocked.Wait());
  std::vector<EngineRequest> requests;
  std::vector<std::shared_ptr<KeepingSink>> sinks;
  for (int i = 0; i < 8; ++i) {
    requests.push_back(Request(RandomIds(config_, 129 + i, 300 + i), 2));  // three chunks
    sinks.push_back(Submit(requests.back()));
  }
  go_on.Notify();
  for (size_t i = 0; i < sinks.size(); ++i) {
    ASSERT_TRUE(sinks[i]->Wait().ok());
    EXPECT_EQ(sinks[i]->tokens_, Offline(requests[i]).tokens);
  }
  EXPECT_EQ(base_->requests(), 1);
  EXPECT_EQ(base_->queries(), 24);
  EXPECT_TRUE(first->Wait().ok());
}

// A source that answers far too late, beside a batch that keeps the engine busy: a first token
// comes after the deadline, the step then under way and the prompt's own.
TEST_F(EngineTest, ADeadlineBoundsTheTimeToTheFirstToken) {
  constexpr absl::Duration kDeadline = absl::Milliseconds(20);
  constexpr absl::Duration kWakeUp = absl::Milliseconds(100);  // of a thread on a busy machine
  Start({}, {.max_running = 8});
  base_->SetOpen(false);
  std::vector<uint64_t> numbers(4);
  std::vector<std::shared_ptr<KeepingSink>> busy;
  for (int i = 0; i < 4; ++i)
    busy.push_back(Submit(Request(RandomIds(config_, 20, 700 + i), 300, false), &numbers[i]));
  std::vector<absl::Duration> times;
  for (int i = 0; i < 100; ++i) {
    EngineRequest request = Request(RandomIds(config_, 70, 800 + i), 2);
    request.memory.deadline = kDeadline;
    const auto sink = Run(request);
    EXPECT_TRUE(sink->provenance_.at(0).timed_out());
    const google::protobuf::Duration& time = sink->finish_.timings().time_to_first_token();
    times.push_back(absl::Seconds(time.seconds()) + absl::Nanoseconds(time.nanos()));
  }
  std::sort(times.begin(), times.end());
  EXPECT_GE(times.front(), kDeadline);
  EXPECT_LE(times[98], kDeadline + 2 * engine_->stats().longest_step + kWakeUp);
  base_->SetOpen(true);
  for (const auto& sink : busy) EXPECT_TRUE(sink->Wait().ok());
}

// A long continuation is scored beside a generation that came after it, not before it.
TEST_F(EngineTest, AScoreLeavesEachGenerationItsRow) {
  Start({.max_logit_rows = 4}, {.max_running = 4});
  EngineRequest score = Request(RandomIds(config_, 20, 81), 1, false);
  score.continuation = RandomIds(config_, 250, 82);
  const EngineRequest request = Request(RandomIds(config_, 20, 83), 20, false);
  auto scored = std::make_shared<KeepingSink>();
  Once both;
  scored->OnEvent([&] { EXPECT_TRUE(both.Wait()); });
  ASSERT_TRUE(engine_->Submit(score, scored).ok());
  auto sink = std::make_shared<KeepingSink>();
  size_t tokens_beside = 0;  // of the generation when the score ended; the engine's thread's
  sink->OnEvent([&, raw = sink.get()] {
    if (!scored->has_finish_) tokens_beside = raw->tokens_.size();
  });
  ASSERT_TRUE(engine_->Submit(request, sink).ok());
  both.Notify();
  EXPECT_TRUE(sink->Wait().ok());
  EXPECT_TRUE(scored->Wait().ok());
  EXPECT_EQ(tokens_beside, 20u);
  EXPECT_EQ(sink->tokens_, Offline(request).tokens);
  const auto expected =
      ScoreContinuation(*offline_, score.prompt, *score.continuation, RetrieveFunction(), {});
  ASSERT_TRUE(expected.ok()) << expected.status();
  EXPECT_EQ(scored->score_.logprobs, expected->logprobs);
  ExpectIdle();
}

// The wait for the memories of a prompt that others have computed wholly ends where it begins.
TEST_F(EngineTest, AWaitIsCountedOnceWhereThePromptIsShared) {
  Start({.kv_pages = 80}, {.prompt_cache_pages = 24});
  // No generated chunk has a retrieval, whose wait would count as well.
  const EngineRequest request = Request(RandomIds(config_, 128, 97), 60);
  Run(request);
  const int before = base_->queries();
  base_->SetOpen(false);
  const auto sink = Submit(request);
  EXPECT_TRUE(base_->WaitForQueries(before + 2));
  base_->SetOpen(true);
  EXPECT_TRUE(sink->Wait().ok());
  EXPECT_EQ(sink->finish_.usage().cached_prompt_tokens(), 128);
  const auto to_seconds = [](const google::protobuf::Duration& d) {
    return static_cast<double>(d.seconds()) + 1e-9 * d.nanos();
  };
  const v1::Timings& timings = sink->finish_.timings();
  EXPECT_GT(to_seconds(timings.retrieve()), 0);
  EXPECT_LE(to_seconds(timings.retrieve()), to_seconds(timings.time_to_first_token()));
}

// Full chunks of a prompt are computed once for those that begin alike and read the same.
TEST_F(EngineTest, PromptsThatBeginAlikeShareTheirChunks) {
  Start({.kv_pages = 80}, {.prompt_cache_pages = 24});
  std::vector<int32_t> prompt = RandomIds(config_, 200, 91);
  const EngineRequest request = Request(prompt, 70);
  const Generation expected = Offline(request);
  const auto first = Run(request), second = Run(request);
  EXPECT_EQ(first->tokens_, expected.tokens);
  EXPECT_EQ(first->finish_.usage().cached_prompt_tokens(), 0);
  EXPECT_EQ(second->tokens_, expected.tokens);
  EXPECT_EQ(second->finish_.usage().cached_prompt_tokens(), 192);
  ASSERT_EQ(second->provenance_.size(), first->provenance_.size());
  for (size_t c = 0; c < first->provenance_.size(); ++c) {
    ASSERT_EQ(second->provenance_[c].memories_size(), first->provenance_[c].memories_size());
    for (int i = 0; i < first->provenance_[c].memories_size(); ++i) {
      EXPECT_EQ(second->provenance_[c].memories(i).record_id(),
                first->provenance_[c].memories(i).record_id());
      EXPECT_NE(second->provenance_[c].memories(i).from(), v1::BYTE_SOURCE_UNSPECIFIED);
    }
  }
  // A score of the same prompt shares it too.
  EngineRequest score = Request(prompt, 1);
  score.continuation = expected.tokens;
  const auto scored = Run(score);
  EXPECT_EQ(scored->finish_.usage().cached_prompt_tokens(), 192);
  const auto offline =
      ScoreContinuation(*offline_, prompt, expected.tokens, base_->Offline(&tokenizer_, kTopK), {});
  ASSERT_TRUE(offline.ok()) << offline.status();
  EXPECT_EQ(scored->score_.logprobs, offline->logprobs);

  // Another second chunk: the first one is shared.
  prompt[100] = prompt[100] == 9 ? 10 : 9;
  const EngineRequest changed = Request(prompt, 10);
  const auto third = Run(changed);
  EXPECT_EQ(third->tokens_, Offline(changed).tokens);
  EXPECT_EQ(third->finish_.usage().cached_prompt_tokens(), 64);
  // No memories, fewer memories, another tenant: other keys and values.
  const auto without = Run(Request(prompt, 10, false));
  EXPECT_EQ(without->tokens_, Offline(Request(prompt, 10, false)).tokens);
  EXPECT_EQ(without->finish_.usage().cached_prompt_tokens(), 0);
  EngineRequest fewer = Request(prompt, 10);
  fewer.memory.references_per_chunk = 1;
  EXPECT_EQ(Run(fewer)->finish_.usage().cached_prompt_tokens(), 0);
  EngineRequest stranger = Request(prompt, 10);
  stranger.tenant = "stranger";
  EXPECT_EQ(Run(stranger)->finish_.usage().cached_prompt_tokens(), 0);
  EXPECT_GT(engine_->stats().kv_pages_cached, 0);
  EXPECT_LE(engine_->stats().kv_pages_cached, 24);
  // One that needs all pages gets them.
  const EngineRequest large = Request(RandomIds(config_, 250, 95), 70);
  const auto a = Submit(large), b = Submit(Request(RandomIds(config_, 300, 96), 40));
  EXPECT_TRUE(a->Wait().ok());
  EXPECT_TRUE(b->Wait().ok());
  EXPECT_EQ(a->tokens_, Offline(large).tokens);
  ExpectIdle();
}

}  // namespace
}  // namespace memory3
