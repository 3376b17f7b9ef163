// Both sources against a real store: in the process, and behind a memory server that is stopped and
// started again.
#include "inference_server/memory_source.h"

#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "inference_server/embedded_memory_source.h"
#include "inference_server/remote_memory_source.h"
#include "memory3/v1/memory.grpc.pb.h"
#include "memory_server/conversions.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/server.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

ReaderIdentity Reader() {
  ReaderIdentity reader;
  reader.writer_fingerprint = store_testing::FingerprintOf("writer");
  reader.embedder_fingerprint = store_testing::FingerprintOf("embedder");
  reader.embedding_dimension = 8;
  for (const int layer : {0, 1}) reader.geometry.add_memory_layers(layer);
  reader.geometry.set_kv_heads(1);
  reader.geometry.set_head_dim(4);
  reader.geometry.set_tokens_kept(2);
  reader.geometry.set_reference_tokens(16);
  return reader;
}

class MemorySourceTest : public ::testing::TestWithParam<bool> {
 protected:
  MemorySourceTest() {
    options_.directory = directory_.path() + "/db";
    options_.backup_root = directory_.path() + "/backups";
    OpenStore();
    EXPECT_TRUE(store_->CreateKnowledgeBase("default", store_testing::SmallSpec("kb"), false).ok());
    for (int i = 0; i < 5; ++i) {
      const auto entry = store_testing::MakeEntry(absl::StrCat("d", i), 0, i);
      EXPECT_TRUE(store_->Put("default", "kb", {&entry->entry, 1}, true).ok());
    }
    EXPECT_TRUE(store_->SetAlias("default", "live", "kb").ok());
    KnowledgeBaseSpec foreign = store_testing::SmallSpec("foreign");
    foreign.writer_fingerprint = store_testing::FingerprintOf("another writer");
    EXPECT_TRUE(store_->CreateKnowledgeBase("default", foreign, false).ok());
    OpenSource();
  }
  ~MemorySourceTest() override { Close(); }
  void OpenStore() {
    auto store = OpenRocksDbStore(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  void OpenSource(const ReaderIdentity& reader = Reader()) {
    if (GetParam()) {
      StartServer("127.0.0.1:0");
      RemoteMemoryOptions options;
      options.client.target = absl::StrCat("127.0.0.1:", server_->port());
      options.client.timeout = absl::Seconds(20);
      options.patience = absl::Milliseconds(50);
      auto source = RemoteMemorySource::Create(options, reader);
      EXPECT_TRUE(source.ok()) << source.status();
      source_ = *std::move(source);
    } else {
      source_ = std::make_unique<EmbeddedMemorySource>(store_.get(), reader);
    }
  }
  void Close() {
    source_.reset();
    if (server_) server_->Shutdown(absl::ZeroDuration());
    server_.reset();
    store_.reset();
  }
  void StartServer(const std::string& listen) {
    auto server = MemoryServer::Start(store_.get(), {.listen = listen}, {});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  static absl::StatusOr<SourceAnswer> Ask(MemoryBase& base, std::vector<RecordId> missing = {}) {
    SourceRequest request;
    request.queries.push_back({store_testing::MakeVector(2), 3, std::nullopt, {}});
    request.missing = std::move(missing);
    return Ask(base, std::move(request));
  }
  static absl::StatusOr<SourceAnswer> Ask(MemoryBase& base, SourceRequest request) {
    request.deadline = std::min(request.deadline, absl::Now() + absl::Seconds(30));
    std::promise<absl::StatusOr<SourceAnswer>> answer;
    base.Retrieve(std::move(request),
                  [&](absl::StatusOr<SourceAnswer> a) { answer.set_value(std::move(a)); });
    return answer.get_future().get();
  }

  store_testing::TemporaryDirectory directory_;
  RocksDbStoreOptions options_;
  std::unique_ptr<MemoryStore> store_;
  std::unique_ptr<MemoryServer> server_;
  std::unique_ptr<MemorySource> source_;
};

TEST_P(MemorySourceTest, OpensWhatTheModelCanReadAndNothingElse) {
  const auto base = source_->Open("default", "live", absl::InfiniteFuture());
  ASSERT_TRUE(base.ok()) << base.status();
  EXPECT_EQ((*base)->name(), "kb");
  EXPECT_EQ((*base)->tenant(), "default");
  EXPECT_EQ(*source_->Open("default", "live", absl::InfiniteFuture()), *base);
  EXPECT_TRUE(
      absl::IsNotFound(source_->Open("default", "nowhere", absl::InfiniteFuture()).status()));
  const absl::Status foreign = source_->Open("default", "foreign", absl::InfiniteFuture()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(foreign)) << foreign;
  EXPECT_THAT(std::string(foreign.message()), HasSubstr("was written by model"));
  EXPECT_FALSE(source_->Open("stranger", "kb", absl::InfiniteFuture()).ok());
  const auto names = source_->List("default");
  ASSERT_TRUE(names.ok()) << names.status();
  EXPECT_THAT(*names, ElementsAre("kb"));
}

TEST_P(MemorySourceTest, SendsBytesOnceAndAgainWhenEvictedOrMissing) {
  const auto base = source_->Open("default", "kb", absl::InfiniteFuture());
  ASSERT_TRUE(base.ok()) << base.status();
  auto answer = Ask(**base);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_EQ(answer->queries.size(), 1u);
  ASSERT_EQ(answer->queries[0].size(), 3u);
  const RecordId best = answer->queries[0][0].id;
  EXPECT_EQ(best, store_testing::MakeId(2));
  EXPECT_EQ(answer->queries[0][0].sources.at(0).document_id(), "d2");
  ASSERT_EQ(answer->records.size(), 3u);
  EXPECT_EQ(answer->records.at(best).bytes, store_testing::MakeRecord(2));

  answer = Ask(**base);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->queries[0].size(), 3u);
  EXPECT_TRUE(answer->records.empty());

  (*base)->Evicted(best);
  answer = Ask(**base);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_EQ(answer->records.size(), 1u);
  EXPECT_TRUE(answer->records.contains(best));

  answer = Ask(**base, {best});
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->records.size(), 1u);
}

// Of a batch only the queries that hit it are without it, and it is tried again with its next hit.
TEST_P(MemorySourceTest, ARecordThatIsDamagedOnDiskIsAloneInThat) {
  // Long enough for a block of its own each.
  const auto record_of = [](int n) {
    ExplicitMemory memory;
    memory.shape = {2, 4, 8, 64};
    memory.reference_tokens = 16;
    std::mt19937_64 random(n);
    for (int64_t i = 0; i < memory.shape.values(); ++i)
      memory.values.push_back(static_cast<float>(random() % 1000) / 500 - 1);
    return *EncodeRecord(memory, store_testing::FingerprintOf("writer"), *MakeF32Codec(64));
  };
  KnowledgeBaseSpec spec = store_testing::SmallSpec("long");
  spec.geometry = {{0, 1}, 4, 64, 8, 16};
  ASSERT_TRUE(store_->CreateKnowledgeBase("default", spec, false).ok());
  constexpr int kRecords = 4, kBad = 101;
  for (int n = 100; n < 100 + kRecords; ++n) {
    const auto entry = store_testing::MakeEntry(absl::StrCat("d", n), 0, n);
    entry->record = record_of(n);
    entry->entry.record = entry->record;
    const auto put = store_->Put("default", "long", {&entry->entry, 1}, true);
    ASSERT_TRUE(put.ok()) << put.status();
  }
  ASSERT_TRUE(store_->CreateBackup("flush").ok());  // into files, out of the log
  Close();
  int damaged = 0;
  for (const auto& file :
       std::filesystem::recursive_directory_iterator(options_.directory + "/store-1")) {
    if (!file.is_regular_file() || file.path().extension() != ".sst") continue;
    std::ifstream in(file.path(), std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(in)), {});
    const size_t at = bytes.find(record_of(kBad).substr(5000, 64));
    if (at == std::string::npos) continue;
    bytes[at] = static_cast<char>(bytes[at] ^ 4);
    std::ofstream(file.path(), std::ios::binary | std::ios::trunc) << bytes;
    ++damaged;
  }
  ASSERT_GE(damaged, 1);
  OpenStore();
  ReaderIdentity reader = Reader();
  reader.geometry.set_kv_heads(4);
  reader.geometry.set_head_dim(64);
  reader.geometry.set_tokens_kept(8);
  OpenSource(reader);
  const auto base = source_->Open("default", "long", absl::InfiniteFuture());
  ASSERT_TRUE(base.ok()) << base.status();
  const RecordId bad = store_testing::MakeId(kBad);
  for (int attempt = 0; attempt < 2; ++attempt) {
    SCOPED_TRACE(attempt);
    SourceRequest request;
    request.queries.push_back({store_testing::MakeVector(kBad), 1, std::nullopt, {}});
    request.queries.push_back({store_testing::MakeVector(100), kRecords, std::nullopt, {}});
    request.queries.push_back({store_testing::MakeVector(102), 1, std::nullopt, {}});
    const absl::StatusOr<SourceAnswer> answer = Ask(**base, std::move(request));
    ASSERT_TRUE(answer.ok()) << answer.status();
    ASSERT_EQ(answer->queries.size(), 3u);
    EXPECT_EQ(answer->queries[0].at(0).id, bad);
    EXPECT_EQ(answer->queries[1].size(), size_t{kRecords});
    EXPECT_EQ(answer->records.size(), attempt == 0 ? size_t{kRecords - 1} : 0);
    ASSERT_EQ(answer->unreadable.size(), 1u);
    const absl::Status& why = answer->unreadable.at(bad);
    EXPECT_EQ(why.code(), absl::StatusCode::kDataLoss) << why;
    EXPECT_THAT(std::string(why.message()), HasSubstr(bad.ToHex()));
  }
}

TEST_P(MemorySourceTest, AServerThatDiesIsFoundAgain) {
  if (!GetParam()) GTEST_SKIP() << "there is no server in the process";
  const auto base = source_->Open("default", "kb", absl::InfiniteFuture());
  ASSERT_TRUE(base.ok()) << base.status();
  ASSERT_TRUE(Ask(**base).ok());
  const std::string address = absl::StrCat("127.0.0.1:", server_->port());
  server_->Shutdown(absl::ZeroDuration());
  server_.reset();
  const absl::Status gone = Ask(**base).status();
  EXPECT_TRUE(absl::IsUnavailable(gone)) << gone;
  // What the name meant is still known.
  EXPECT_EQ(*source_->Open("default", "kb", absl::InfiniteFuture()), *base);

  StartServer(address);
  absl::StatusOr<SourceAnswer> answer = absl::UnavailableError("not asked yet");
  const absl::Time limit = absl::Now() + absl::Seconds(40);
  while (!answer.ok() && absl::Now() < limit) answer = Ask(**base);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->queries[0].size(), 3u);
  EXPECT_TRUE(answer->records.empty());  // the new stream was told what is here
}

// A server that takes connections and reads nothing: what is written to it blocks.
class DeafService final : public v1::MemoryService::Service {
 public:
  ~DeafService() override {
    released_.set_value();
    server_->Shutdown(std::chrono::system_clock::now());
  }
  DeafService() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  int port() const { return port_; }
  grpc::Status GetKnowledgeBase(grpc::ServerContext*, const v1::GetKnowledgeBaseRequest*,
                                v1::GetKnowledgeBaseResponse* response) override {
    *response->mutable_knowledge_base()->mutable_spec() = ToProto(store_testing::SmallSpec("kb"));
    return grpc::Status::OK;
  }
  grpc::Status Retrieve(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<v1::RetrieveResponse, v1::RetrieveRequest>*) override {
    release_.wait();
    return grpc::Status::OK;
  }

 private:
  std::promise<void> released_;
  const std::shared_future<void> release_ = released_.get_future();
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

TEST_P(MemorySourceTest, AServerThatReadsNothingHoldsNobodyUp) {
  if (!GetParam()) GTEST_SKIP() << "there is no server in the process";
  DeafService service;
  RemoteMemoryOptions options;
  options.client.target = absl::StrCat("127.0.0.1:", service.port());
  auto source = RemoteMemorySource::Create(options, Reader());
  ASSERT_TRUE(source.ok()) << source.status();
  auto base = (*source)->Open("default", "kb", absl::InfiniteFuture());
  ASSERT_TRUE(base.ok()) << base.status();
  const auto large = [](absl::Time deadline) {  // more than the transport takes unread
    SourceRequest request;
    request.queries.resize(4);
    for (SourceQuery& query : request.queries) query.embedding.resize(1 << 20);
    request.deadline = deadline;
    return request;
  };
  for (int i = 0; i < 2; ++i) {
    const absl::Status late = Ask(**base, large(absl::Now() + absl::Milliseconds(50))).status();
    EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  }
  std::promise<absl::Status> ended;
  (*base)->Retrieve(large(absl::InfiniteFuture()), [&](const absl::StatusOr<SourceAnswer>& answer) {
    ended.set_value(answer.status());
  });
  base->reset();
  source->reset();
  const absl::Status status = ended.get_future().get();
  // Sent to a new stream, or not at all since the server was not there just now.
  EXPECT_TRUE(absl::IsCancelled(status) || absl::IsUnavailable(status)) << status;
}

// Debian's gRPC is not built with TSan, which reports it by the hundred: there the store in this
// process stands for both.
#ifdef __SANITIZE_THREAD__
const auto kSources = ::testing::Values(false);
#else
const auto kSources = ::testing::Bool();
#endif

INSTANTIATE_TEST_SUITE_P(Sources, MemorySourceTest, kSources,
                         [](const auto& info) { return info.param ? "Remote" : "Embedded"; });

}  // namespace
}  // namespace memory3
