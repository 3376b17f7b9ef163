// The server as an object, with the real store and client in one process, so that sanitizers see
// all of it.
#include "memory_server/server.h"

#include <gmock/gmock.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "memory/codec.h"
#include "memory_server/client.h"
#include "memory_server/conversions.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using Stub = MemoryClient::Stub;

class ServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    RocksDbStoreOptions options;
    options.directory = directory_.path() + "/data";
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
    ServingOptions serving;
    serving.listen = "127.0.0.1:0";
    absl::StatusOr<std::unique_ptr<MemoryServer>> server =
        MemoryServer::Start(store_.get(), serving, {});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  std::unique_ptr<MemoryClient> Connect() {
    MemoryClientOptions options;
    options.target = "127.0.0.1:" + std::to_string(server_->port());
    return *MemoryClient::Create(options);
  }
  static v1::Entry EntryOf(uint64_t n) {
    const auto owned = store_testing::MakeEntry("doc-" + std::to_string(n % 7), n, n);
    v1::Entry entry;
    *entry.mutable_source() = ToProto(owned->entry.source);
    entry.set_record_id(std::string(owned->entry.record_id.view()));
    entry.mutable_embedding()->Add(owned->embedding.begin(), owned->embedding.end());
    return entry;
  }

  store_testing::TemporaryDirectory directory_;
  std::unique_ptr<MemoryStore> store_;
  std::unique_ptr<MemoryServer> server_;
};

TEST_F(ServerTest, ManyClientsAtOnceSeeWholeAnswersOnly) {
  constexpr int kRounds = 30;
  constexpr uint64_t kNumbers = 64;
  for (const char* name : {"a", "b"}) {
    ASSERT_TRUE(store_->CreateKnowledgeBase("default", store_testing::SmallSpec(name), false).ok());
  }
  ASSERT_TRUE(store_->SetAlias("default", "live", "a").ok());

  std::atomic<int> answers{0}, wrong{0};
  const auto expect_ok = [&](const absl::Status& status) {
    if (status.ok()) return;
    ++wrong;
    ADD_FAILURE() << status;
  };
  const auto put = [&](uint64_t seed) {
    const auto client = Connect();
    for (uint64_t round = 0; round < kRounds; ++round) {
      const auto writer = client->Put(round % 2 == 0 ? "a" : "live", /*wait=*/round % 8 == 0);
      for (uint64_t i = 0; i < 8; ++i) {
        const uint64_t n = (seed + 8 * round + i) % kNumbers;
        (void)writer->Write(EntryOf(n), store_testing::MakeRecord(n));
      }
      expect_ok(writer->Finish().status());
    }
  };
  const auto remove = [&](uint64_t seed) {
    const auto client = Connect();
    for (uint64_t round = 0; round < kRounds; ++round) {
      if (round % 2 == 0) {
        v1::DeleteRecordsRequest request;
        request.set_knowledge_base("a");
        request.add_record_ids(
            std::string(store_testing::MakeId((seed + 5 * round) % kNumbers).view()));
        expect_ok(client->Call(&Stub::DeleteRecords, request).status());
      } else {
        v1::DeleteDocumentsRequest request;
        request.set_knowledge_base("live");
        request.add_document_ids("doc-" + std::to_string(round % 7));
        expect_ok(client->Call(&Stub::DeleteDocuments, request).status());
      }
    }
  };
  const auto retrieve = [&](uint64_t seed) {
    const auto client = Connect();
    std::string evicted;
    std::unique_ptr<RetrieveStream> stream = client->OpenRetrieve();
    for (uint64_t round = 0; round < 2 * kRounds; ++round) {
      v1::RetrieveRequest request;
      request.set_knowledge_base(round % 3 == 0 ? "a" : "live");
      request.set_evicted(std::move(evicted));
      evicted.clear();
      const std::vector<float> vector = store_testing::MakeVector((seed + round) % kNumbers);
      request.add_queries()->mutable_embedding()->Add(vector.begin(), vector.end());
      request.mutable_queries(0)->set_top_k(5);
      const absl::StatusOr<RetrieveAnswer> answer = stream->Retrieve(std::move(request));
      expect_ok(answer.status());
      if (!answer.ok()) return;
      ++answers;
      for (const auto& hit : answer->hits.queries(0).hits()) {
        const auto record = answer->records.find(*RecordId::FromBytes(hit.record_id()));
        // All was reported evicted, so nothing is held; and bytes are the id's own.
        if (hit.held() || hit.sources_size() == 0 || record == answer->records.end()) {
          ++wrong;
          continue;
        }
        evicted += hit.record_id();
        const uint64_t n = std::stoull(hit.sources(0).metadata().at("number"));
        if (hit.record_id() != store_testing::MakeId(n).view() ||
            *record->second != store_testing::MakeRecord(n))
          ++wrong;
      }
      if (round % 20 == 19) stream = client->OpenRetrieve(), evicted.clear();
    }
  };
  const auto alias = [&] {
    const auto client = Connect();
    for (int round = 0; round < 2 * kRounds; ++round) {
      v1::SetAliasRequest request;
      request.set_alias("live");
      request.set_knowledge_base(round % 2 == 0 ? "b" : "a");
      expect_ok(client->Call(&Stub::SetAlias, request).status());
    }
  };
  std::vector<std::thread> threads;
  for (uint64_t seed : {0, 31}) threads.emplace_back(put, seed);
  for (uint64_t seed : {3, 17}) threads.emplace_back(remove, seed);
  for (uint64_t seed : {0, 20, 40}) threads.emplace_back(retrieve, seed);
  threads.emplace_back(alias);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(answers, 3 * 2 * kRounds);
  server_->Shutdown(absl::Seconds(20));
}

// Requests that wait at the same time share a search; each is answered as if it were alone, and a
// bad one among them fails alone.
TEST_F(ServerTest, RequestsThatShareASearchAreAnsweredAsAlone) {
  constexpr uint64_t kClients = 12, kRounds = 15;
  const auto client = Connect();
  for (const char* name : {"a", "b"}) {
    ASSERT_TRUE(store_->CreateKnowledgeBase("default", store_testing::SmallSpec(name), false).ok());
    const auto writer = client->Put(name);
    for (uint64_t n = name[0] == 'a' ? 0 : 300; n < 600; ++n)
      ASSERT_TRUE(writer->Write(EntryOf(n), store_testing::MakeRecord(n)).ok());
    ASSERT_TRUE(writer->Finish().ok());
  }
  const auto request_of = [](uint64_t c, uint64_t round) {
    v1::RetrieveRequest request;
    request.set_knowledge_base(c % 4 == 3 ? "b" : "a");
    request.set_with_text(c % 6 == 5);
    for (uint64_t q = 0; q <= c % 3; ++q) {
      const std::vector<float> vector = store_testing::MakeVector(100 * c + 10 * round + q);
      v1::RetrieveRequest::Query& query = *request.add_queries();
      query.mutable_embedding()->Add(vector.begin(), vector.end());
      query.set_top_k(static_cast<uint32_t>(1 + c));
      if (c == 4) query.set_min_score(0.5);
      if (c == 6) (*query.mutable_filter()->mutable_metadata())["parity"] = "odd";
    }
    if (c == 7) request.mutable_queries(0)->add_embedding(0);  // one number too many
    if (c == 8) request.mutable_queries(1)->set_top_k(0);
    return request;
  };
  const auto hits_of = [](const absl::StatusOr<RetrieveAnswer>& answer) {
    return answer.ok()
               ? answer->hits.queries(0).ShortDebugString() + "\n" +
                     std::to_string(answer->hits.queries_size()) + "\n" +
                     answer->hits.queries(answer->hits.queries_size() - 1).ShortDebugString()
               : answer.status().ToString();
  };
  std::vector<std::vector<std::string>> alone(kClients);
  for (uint64_t c = 0; c < kClients; ++c) {
    const auto stream = client->OpenRetrieve();
    for (uint64_t round = 0; round < kRounds; ++round)
      alone[c].push_back(hits_of(stream->Retrieve(request_of(c, round))));
  }
  EXPECT_THAT(alone[7][0], testing::HasSubstr("queries[0]"));
  EXPECT_THAT(alone[8][0], testing::HasSubstr("queries[1]"));
  std::vector<std::thread> threads;
  for (uint64_t c = 0; c < kClients; ++c) {
    threads.emplace_back([&, c] {
      const auto stream = client->OpenRetrieve();
      for (uint64_t round = 0; round < kRounds; ++round)
        EXPECT_EQ(hits_of(stream->Retrieve(request_of(c, round))), alone[c][round]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  server_->Shutdown(absl::Seconds(20));
}

TEST_F(ServerTest, StreamsMayEndInTheMiddleOfAnAnswer) {
  constexpr int kThreads = 4, kRecords = 24;
  constexpr int kLayers = 16, kHeadDim = 4096;  // 512 KiB a record: a message each
  KnowledgeBaseSpec spec = store_testing::SmallSpec("large");
  spec.geometry = {{}, 1, kHeadDim, 1, 128};
  for (uint32_t layer = 0; layer < kLayers; ++layer) spec.geometry.memory_layers.push_back(layer);
  const absl::Status created = store_->CreateKnowledgeBase("default", spec, false).status();
  ASSERT_TRUE(created.ok()) << created;
  ExplicitMemory memory;
  memory.shape = {kLayers, 1, 1, kHeadDim};
  memory.reference_tokens = 128;
  memory.values.assign(memory.shape.values(), 0.5f);
  const absl::StatusOr<std::string> record =
      EncodeRecord(memory, store_testing::FingerprintOf("writer"), *MakeF32Codec(kHeadDim));
  ASSERT_TRUE(record.ok()) << record.status();
  const auto client = Connect();
  const auto writer = client->Put("large");
  for (uint64_t n = 0; n < kRecords; ++n) ASSERT_TRUE(writer->Write(EntryOf(n), *record).ok());
  ASSERT_TRUE(writer->Finish().ok());

  v1::RetrieveRequest request;
  request.set_knowledge_base("large");
  const std::vector<float> vector = store_testing::MakeVector(1);
  request.add_queries()->mutable_embedding()->Add(vector.begin(), vector.end());
  request.mutable_queries(0)->set_top_k(kRecords);
  const auto channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()),
                                           grpc::InsecureChannelCredentials());
  std::atomic<int> whole{0};
  const auto leave_early = [&](int seed) {
    const auto stub = v1::MemoryService::NewStub(channel);
    for (int round = 0; round < 15; ++round) {
      grpc::ClientContext context;
      const auto stream = stub->Retrieve(&context);
      stream->Write(request);
      v1::RetrieveResponse message;
      const int messages = (round + seed) % 5 * kRecords / 3;  // none, some, or all
      bool last = false;
      for (int i = 0; i < messages && !last && stream->Read(&message); ++i) last = message.last();
      if (last) {
        ++whole;
        stream->WritesDone();
      } else {
        context.TryCancel();
      }
      EXPECT_EQ(stream->Finish().ok(), last);
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(leave_early, t);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(whole, kThreads * 6);
  // The server is none the worse, and ends although a client that does not read is in an answer.
  const absl::StatusOr<RetrieveAnswer> answer = client->OpenRetrieve()->Retrieve(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->records.size(), kRecords);
  for (const auto& [id, bytes] : answer->records) EXPECT_EQ(*bytes, *record);
  grpc::ClientContext idle;
  const auto stuck = v1::MemoryService::NewStub(channel)->Retrieve(&idle);
  stuck->Write(request);
  v1::RetrieveResponse first;
  ASSERT_TRUE(stuck->Read(&first));
  server_->Shutdown(absl::Milliseconds(200));
  idle.TryCancel();
  EXPECT_FALSE(stuck->Finish().ok());
}

}  // namespace
}  // namespace memory3
