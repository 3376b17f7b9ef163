// Which answer goes first: Retrieve over the wire, on a store that answers when it is told to.
#include "memory_server/retrieve_stream.h"

#include <gtest/gtest.h>

#include <set>

#include "absl/synchronization/notification.h"
#include "memory_server/client.h"
#include "memory_server/server.h"

namespace memory3 {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(60);

// Retrieval without hits, each when it is let go. Nothing else is asked of it.
class GatedStore : public MemoryStore {
 public:
  absl::StatusOr<std::shared_ptr<const VersionPin>> Pin(std::string_view, std::string_view,
                                                        std::optional<uint64_t>) override {
    return pin_;
  }
  absl::StatusOr<RetrieveResult> Retrieve(const VersionPin&, std::span<const Query> queries,
                                          const RetrieveOptions&) override {
    std::set<float> asked;
    for (const Query& query : queries) asked.insert(query.embedding[0]);
    absl::MutexLock lock(&mutex_);
    const size_t call = calls_.size();
    calls_.push_back(std::move(asked));
    const auto let_go = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return call < let_go_; };
    mutex_.Await(absl::Condition(&let_go));
    return RetrieveResult{std::vector<std::vector<Hit>>(queries.size()), nullptr};
  }
  // The queries (their embeddings' first numbers) of the search with this number, once it begins.
  std::set<float> AwaitCall(size_t number) {
    absl::MutexLock lock(&mutex_);
    const auto begun = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return number < calls_.size(); };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&begun), kPatience));
    return number < calls_.size() ? calls_[number] : std::set<float>();
  }
  void LetGo(size_t calls) {
    absl::MutexLock lock(&mutex_);
    let_go_ = calls;
  }
  void HoldAgain() {
    absl::MutexLock lock(&mutex_);
    let_go_ = calls_.size();
  }
  size_t calls() {
    absl::MutexLock lock(&mutex_);
    return calls_.size();
  }

  absl::StatusOr<KnowledgeBaseInfo> CreateKnowledgeBase(std::string_view, const KnowledgeBaseSpec&,
                                                        bool) override {
    return No();
  }
  absl::StatusOr<KnowledgeBaseInfo> GetKnowledgeBase(std::string_view, std::string_view,
                                                     bool) override {
    return No();
  }
  absl::StatusOr<std::vector<KnowledgeBaseInfo>> ListKnowledgeBases(std::string_view) override {
    return No();
  }
  absl::Status DeleteKnowledgeBase(std::string_view, std::string_view) override { return No(); }
  absl::StatusOr<std::string> SetAlias(std::string_view, std::string_view,
                                       std::string_view) override {
    return No();
  }
  absl::Status DeleteAlias(std::string_view, std::string_view) override { return No(); }
  absl::StatusOr<std::map<std::string, std::string>> ListAliases(std::string_view) override {
    return No();
  }
  absl::StatusOr<std::vector<VersionInfo>> ListVersions(std::string_view,
                                                        std::string_view) override {
    return No();
  }
  absl::StatusOr<uint64_t> Rollback(std::string_view, std::string_view,
                                    std::optional<uint64_t>) override {
    return No();
  }
  absl::Status DropVersion(std::string_view, std::string_view, uint64_t) override { return No(); }
  absl::StatusOr<PutResult> Put(std::string_view, std::string_view, std::span<const NewEntry>,
                                bool) override {
    return No();
  }
  absl::Status Sync() override { return No(); }
  absl::StatusOr<StoredRecord> GetRecord(std::string_view, std::string_view, const RecordId&,
                                         bool) override {
    return No();
  }
  absl::StatusOr<DeleteResult> DeleteRecords(std::string_view, std::string_view,
                                             std::span<const RecordId>) override {
    return No();
  }
  absl::StatusOr<DeleteResult> DeleteDocuments(std::string_view, std::string_view,
                                               std::span<const std::string>) override {
    return No();
  }
  absl::StatusOr<DocumentPage> ListDocuments(std::string_view, std::string_view, uint32_t,
                                             std::string_view) override {
    return No();
  }
  absl::StatusOr<Counts> Count(std::string_view, std::string_view) override { return No(); }
  absl::StatusOr<BeginLoadResult> BeginLoad(std::string_view, std::string_view, std::string_view,
                                            LoadMode, std::optional<uint64_t>) override {
    return No();
  }
  absl::StatusOr<PutResult> PutLoad(std::string_view, std::string_view, std::span<const NewEntry>,
                                    bool) override {
    return No();
  }
  absl::StatusOr<DocumentPage> ListLoadedDocuments(std::string_view, std::string_view, uint32_t,
                                                   std::string_view) override {
    return No();
  }
  absl::StatusOr<LoadInfo> CommitLoad(std::string_view, std::string_view, bool) override {
    return No();
  }
  absl::StatusOr<LoadInfo> AbortLoad(std::string_view, std::string_view) override { return No(); }
  absl::StatusOr<LoadInfo> GetLoad(std::string_view, std::string_view) override { return No(); }
  absl::StatusOr<std::vector<LoadInfo>> ListLoads(std::string_view, std::string_view) override {
    return No();
  }
  absl::StatusOr<SnapshotInfo> CreateSnapshot(std::string_view) override { return No(); }
  absl::StatusOr<std::vector<SnapshotInfo>> ListSnapshots() override { return No(); }
  absl::Status RestoreSnapshot(std::string_view) override { return No(); }
  absl::Status DeleteSnapshot(std::string_view) override { return No(); }
  absl::StatusOr<BackupInfo> CreateBackup(std::string_view) override { return No(); }
  absl::Status RestoreBackup(std::string_view, std::optional<uint64_t>) override { return No(); }
  absl::StatusOr<std::unique_ptr<LoadPutter>> OpenLoadPutter(std::string_view,
                                                             std::string_view) override {
    return No();
  }
  StoreStatus GetStatus() override { return {}; }
  absl::Status Writable() override { return absl::OkStatus(); }

 private:
  class OnlyPin : public VersionPin {
   public:
    const std::string& tenant() const override { return name_; }
    const std::string& knowledge_base() const override { return name_; }
    uint64_t version() const override { return 1; }
    const KnowledgeBaseSpec& spec() const override { return spec_; }

   private:
    const std::string name_ = "default";
    const KnowledgeBaseSpec spec_;
  };
  static absl::Status No() { return absl::UnimplementedError("not asked for here"); }

  const std::shared_ptr<const VersionPin> pin_ = std::make_shared<OnlyPin>();
  absl::Mutex mutex_;
  std::vector<std::set<float>> calls_ ABSL_GUARDED_BY(mutex_);
  size_t let_go_ ABSL_GUARDED_BY(mutex_) = 0;
};

// A request on a stream of its own.
class Asked {
 public:
  Asked(MemoryClient* client, float number) : stream_(client->OpenRetrieve()) {
    v1::RetrieveRequest request;
    request.set_knowledge_base("kb");
    request.add_queries()->add_embedding(number);
    request.mutable_queries(0)->set_top_k(1);
    stream_->Send(std::move(request), [this](absl::StatusOr<RetrieveAnswer> answer) {
      EXPECT_TRUE(answer.ok()) << answer.status();
      answered_.Notify();
    });
  }
  bool AwaitAnswer() { return answered_.WaitForNotificationWithTimeout(kPatience); }

 private:
  absl::Notification answered_;
  std::unique_ptr<RetrieveStream> stream_;  // its thread ends before the rest goes
};

// Several answers found by one search are sent before requests that came meanwhile are searched.
TEST(RetrieveStreamTest, AnswersThatAreFoundGoBeforeLaterSearches) {
  GatedStore store;
  ServingOptions serving;
  serving.listen = "127.0.0.1:0";
  RetrieveOptionsOfServer one_thread;
  one_thread.search_threads = 1;
  absl::StatusOr<std::unique_ptr<MemoryServer>> server =
      MemoryServer::Start(&store, serving, one_thread);
  ASSERT_TRUE(server.ok()) << server.status();
  MemoryClientOptions options;
  options.target = "127.0.0.1:" + std::to_string((*server)->port());
  const std::unique_ptr<MemoryClient> client = *MemoryClient::Create(options);

  int shared = 0;
  for (int round = 0; round < 1000 && shared < 20; ++round) {
    const size_t first = store.calls();
    Asked occupies(client.get(), 0);
    EXPECT_EQ(store.AwaitCall(first), std::set<float>{0});
    Asked a(client.get(), 1), b(client.get(), 2);
    store.LetGo(first + 1);
    const bool together = store.AwaitCall(first + 1).size() == 2;  // both had come by then
    if (together) {
      ++shared;
      Asked later(client.get(), 3);
      store.LetGo(first + 2);
      // Whenever the later one's search begins it does not end before both have their answers.
      EXPECT_TRUE(a.AwaitAnswer());
      EXPECT_TRUE(b.AwaitAnswer());
      store.LetGo(SIZE_MAX);
      EXPECT_TRUE(later.AwaitAnswer());
    }
    store.LetGo(SIZE_MAX);
    EXPECT_TRUE(occupies.AwaitAnswer());
    EXPECT_TRUE(a.AwaitAnswer());
    EXPECT_TRUE(b.AwaitAnswer());
    store.HoldAgain();
  }
  EXPECT_EQ(shared, 20);
}

}  // namespace
}  // namespace memory3
