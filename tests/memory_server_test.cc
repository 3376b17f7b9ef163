// Black-box tests of the memory_server binary: what clients, operators and deployers see over the
// wire.
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <httplib.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory_server/client.h"
#include "serving/status.h"
#include "tests/child_process.h"

namespace memory3 {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Stub = MemoryClient::Stub;

constexpr int kDimension = 16;

Hash256 Fingerprint(uint8_t byte) {
  Hash256 hash;
  hash.bytes.fill(byte);
  return hash;
}

// A memory of the shape every knowledge base here has, of `tokens` kept tokens.
std::string MakeRecord(uint64_t seed, const Hash256& fingerprint = Fingerprint(1), int tokens = 8,
                       int layers = 2) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  ExplicitMemory memory;
  memory.shape = {.layers = layers, .kv_heads = 2, .tokens = tokens, .head_dim = 16};
  memory.reference_tokens = tokens + 20;
  memory.values.resize(memory.shape.values());
  for (float& value : memory.values) value = normal(random);
  return *EncodeRecord(memory, fingerprint, *MakeF32Codec(16));
}

v1::KnowledgeBaseSpec Spec(const std::string& name) {
  v1::KnowledgeBaseSpec spec;
  spec.set_name(name);
  spec.set_writer_fingerprint(std::string(Fingerprint(1).view()));
  spec.set_embedder_fingerprint(std::string(Fingerprint(2).view()));
  spec.set_codec(v1::CODEC_F32);
  spec.set_embedding_dimension(kDimension);
  v1::Geometry& geometry = *spec.mutable_geometry();
  geometry.add_memory_layers(0);
  geometry.add_memory_layers(1);
  geometry.set_kv_heads(2);
  geometry.set_head_dim(16);
  geometry.set_tokens_kept(8);
  geometry.set_reference_tokens(128);
  return spec;
}

// Entry i points along axis i % kDimension, a little off.
v1::Entry MakeEntry(int i, const std::string& document) {
  v1::Entry entry;
  v1::Source& source = *entry.mutable_source();
  source.set_document_id(document);
  source.set_ordinal(i);
  source.set_title(absl::StrCat("Title of ", document));
  source.set_uri(absl::StrCat("https://example.org/", document));
  source.set_char_begin(100 * i);
  source.set_char_end(100 * i + 90);
  source.set_text(absl::StrCat("Text ", i));
  (*source.mutable_metadata())["parity"] = i % 2 == 0 ? "even" : "odd";
  entry.set_record_id(std::string(Sha256Of(absl::StrCat("record ", i)).view()));
  for (int d = 0; d < kDimension; ++d)
    entry.add_embedding(d == i % kDimension ? 1.0f : 0.001f * (i + 1));
  return entry;
}

class MemoryServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::path(::testing::TempDir()) /
                 absl::StrCat("memory_server_test_", getpid(), "_",
                              ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override {
    client_.reset();
    server_.reset();
    std::filesystem::remove_all(directory_);
  }

  std::string Path(const std::string& name) const { return (directory_ / name).string(); }

  void StartServer(std::vector<std::string> extra = {}, MemoryClientOptions options = {}) {
    std::vector<std::string> arguments = {"--data",      Path("data"),    "--listen",
                                          "127.0.0.1:0", "--backup_root", Path("backups")};
    arguments.insert(arguments.end(), extra.begin(), extra.end());
    server_ = std::make_unique<ChildProcess>("memory_server", arguments);
    const std::optional<std::string> port = server_->WaitForLine(R"(gRPC on port (\d+))");
    ASSERT_TRUE(port) << server_->output();
    port_ = *port;
    client_ = Connect(std::move(options));
  }
  std::unique_ptr<MemoryClient> Connect(MemoryClientOptions options = {}) {
    if (options.target.empty()) options.target = "localhost:" + port_;
    absl::StatusOr<std::unique_ptr<MemoryClient>> client = MemoryClient::Create(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  template <typename Request, typename Response>
  Response Ok(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
              const Request& request) {
    absl::StatusOr<Response> response = client_->Call(method, request);
    EXPECT_TRUE(response.ok()) << response.status();
    return response.ok() ? *response : Response();
  }
  template <typename Request, typename Response>
  absl::Status Error(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                     const Request& request) {
    return client_->Call(method, request).status();
  }

  v1::KnowledgeBase Create(const std::string& name) {
    v1::CreateKnowledgeBaseRequest request;
    *request.mutable_spec() = Spec(name);
    return Ok(&Stub::CreateKnowledgeBase, request).knowledge_base();
  }
  absl::StatusOr<v1::PutResponse> Put(const std::string& kb, const std::vector<v1::Entry>& entries,
                                      MemoryClient* client = nullptr) {
    const std::unique_ptr<KnowledgeBaseWriter> writer = (client ? client : client_.get())->Put(kb);
    for (const v1::Entry& entry : entries) {
      if (!writer->Write(entry, MakeRecord(entry.source().ordinal())).ok()) break;
    }
    return writer->Finish();
  }
  std::vector<v1::Entry> Entries(int begin, int end, const std::string& document = "doc") {
    std::vector<v1::Entry> entries;
    for (int i = begin; i < end; ++i) entries.push_back(MakeEntry(i, document));
    return entries;
  }
  v1::CountResponse Count(const std::string& kb) {
    v1::CountRequest request;
    request.set_knowledge_base(kb);
    return Ok(&Stub::Count, request);
  }
  static v1::RetrieveRequest Query(const std::string& kb, int axis, int top_k) {
    v1::RetrieveRequest request;
    request.set_knowledge_base(kb);
    auto* query = request.add_queries();
    for (int d = 0; d < kDimension; ++d) query->add_embedding(d == axis ? 1.0f : 0.0f);
    query->set_top_k(top_k);
    return request;
  }
  static RecordId IdOf(const v1::RetrieveResponse::Hit& hit) {
    return *RecordId::FromBytes(hit.record_id());
  }

  std::filesystem::path directory_;
  std::unique_ptr<ChildProcess> server_;
  std::unique_ptr<MemoryClient> client_;
  std::string port_;
};

TEST_F(MemoryServerTest, WhatIsPutIsRetrievedBitForBitWithItsSources) {
  StartServer();
  const v1::KnowledgeBase kb = Create("wiki");
  EXPECT_EQ(kb.version(), 1);
  EXPECT_EQ(kb.bytes_per_reference(), MakeRecord(0).size());
  const absl::StatusOr<v1::PutResponse> put = Put("wiki", Entries(0, 20));
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_EQ(put->entries(), 20);
  EXPECT_EQ(put->new_records(), 20);
  EXPECT_GT(put->took().nanos() + put->took().seconds(), 0);
  // The same reference in another document: one record, two sources.
  v1::Entry copy = MakeEntry(3, "other");
  ASSERT_TRUE(Put("wiki", {copy}).ok());
  EXPECT_EQ(Count("wiki").entries(), 21);
  EXPECT_EQ(Count("wiki").records(), 20);
  EXPECT_EQ(Count("wiki").documents(), 2);

  const std::unique_ptr<RetrieveStream> stream = client_->OpenRetrieve();
  v1::RetrieveRequest request = Query("wiki", 3, 5);
  request.set_with_text(true);
  const absl::StatusOr<RetrieveAnswer> answer = stream->Retrieve(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_EQ(answer->hits.queries_size(), 1);
  ASSERT_EQ(answer->hits.queries(0).hits_size(), 5);
  const auto& best = answer->hits.queries(0).hits(0);
  EXPECT_EQ(best.record_id(), copy.record_id());
  ASSERT_EQ(best.sources_size(), 2);
  EXPECT_EQ(best.sources(0).SerializeAsString(), MakeEntry(3, "doc").source().SerializeAsString());
  EXPECT_EQ(best.sources(1).document_id(), "other");
  EXPECT_EQ(*answer->records.at(IdOf(best)), MakeRecord(3));
  for (int i = 1; i < 5; ++i) {
    EXPECT_LE(answer->hits.queries(0).hits(i).score(), answer->hits.queries(0).hits(i - 1).score());
  }

  v1::GetRecordRequest get;
  get.set_knowledge_base("wiki");
  get.set_record_id(copy.record_id());
  const auto fetched = client_->GetRecord(get);
  ASSERT_TRUE(fetched.ok()) << fetched.status();
  EXPECT_EQ(fetched->record, MakeRecord(3));
  EXPECT_EQ(fetched->sources.size(), 2);
}

TEST_F(MemoryServerTest, HeldRecordsComeWithoutBytesUntilTheyAreEvicted) {
  StartServer();
  Create("wiki");
  ASSERT_TRUE(Put("wiki", Entries(0, 16)).ok());
  const std::unique_ptr<RetrieveStream> stream = client_->OpenRetrieve();
  const auto first = stream->Retrieve(Query("wiki", 2, 5));
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->records.size(), 5);
  EXPECT_GT(first->hits.held_limit(), 1000);
  const auto second = stream->Retrieve(Query("wiki", 2, 5));
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_TRUE(second->records.empty());
  for (const auto& hit : second->hits.queries(0).hits()) EXPECT_TRUE(hit.held());
  v1::RetrieveRequest request = Query("wiki", 2, 5);
  request.set_evicted(first->hits.queries(0).hits(1).record_id());
  const auto third = stream->Retrieve(request);
  ASSERT_TRUE(third.ok()) << third.status();
  ASSERT_EQ(third->records.size(), 1);
  EXPECT_TRUE(third->records.contains(IdOf(first->hits.queries(0).hits(1))));
  // Another stream holds nothing, unless it says so.
  const std::unique_ptr<RetrieveStream> other = client_->OpenRetrieve();
  v1::RetrieveRequest claims = Query("wiki", 2, 5);
  claims.set_held(first->hits.queries(0).hits(0).record_id());
  EXPECT_EQ(other->Retrieve(claims)->records.size(), 4);
  // The same record for two queries of one request crosses the wire once.
  v1::RetrieveRequest twice = Query("wiki", 9, 1);
  *twice.add_queries() = twice.queries(0);
  const auto shared = other->Retrieve(twice);
  ASSERT_TRUE(shared.ok());
  EXPECT_LE(shared->records.size(), 1);
  EXPECT_TRUE(shared->hits.queries(1).hits(0).held());
}

TEST_F(MemoryServerTest, LargeRecordsTravelInPieces) {
  StartServer();
  v1::CreateKnowledgeBaseRequest create;
  *create.mutable_spec() = Spec("large");
  create.mutable_spec()->mutable_geometry()->clear_memory_layers();
  for (int layer = 0; layer < 100; ++layer)
    create.mutable_spec()->mutable_geometry()->add_memory_layers(layer);
  create.mutable_spec()->mutable_geometry()->set_tokens_kept(128);
  Ok(&Stub::CreateKnowledgeBase, create);
  const std::string record = MakeRecord(7, Fingerprint(1), /*tokens=*/108, /*layers=*/100);
  ASSERT_GT(record.size(), 2 << 20);
  const auto writer = client_->Put("large");
  ASSERT_TRUE(writer->Write(MakeEntry(0, "doc"), record).ok());
  const auto put = writer->Finish();
  ASSERT_TRUE(put.ok()) << put.status();
  const auto answer = client_->OpenRetrieve()->Retrieve(Query("large", 0, 1));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(*answer->records.begin()->second, record);
}

TEST_F(MemoryServerTest, LoadsPublishAtomicallyAndRollBack) {
  StartServer();
  Create("wiki");
  ASSERT_TRUE(Put("wiki", Entries(0, 4)).ok());
  v1::BeginLoadRequest begin;
  begin.set_knowledge_base("wiki");
  begin.set_idempotency_key("night");
  begin.set_mode(v1::LOAD_MODE_REPLACE);
  begin.set_expected_entries(6);
  const v1::Load load = Ok(&Stub::BeginLoad, begin).load();
  EXPECT_EQ(load.state(), v1::LOAD_STATE_LOADING);
  auto writer = client_->PutLoad(load.load_id());
  for (const v1::Entry& entry : Entries(10, 16))
    ASSERT_TRUE(writer->Write(entry, MakeRecord(entry.source().ordinal())).ok());
  const auto loaded = writer->Finish();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->load().entries(), 6);
  EXPECT_EQ(Count("wiki").entries(), 4);  // not visible yet
  const absl::StatusOr<v1::PutResponse> put = Put("wiki", Entries(5, 6));
  EXPECT_EQ(put.status().code(), absl::StatusCode::kFailedPrecondition) << put.status();

  v1::BeginLoadResponse again = Ok(&Stub::BeginLoad, begin);
  EXPECT_TRUE(again.resumed());
  EXPECT_EQ(again.load().load_id(), load.load_id());

  v1::CommitLoadRequest commit;
  commit.set_load_id(load.load_id());
  commit.set_wait(true);
  const v1::Load committed = Ok(&Stub::CommitLoad, commit).load();
  EXPECT_EQ(committed.state(), v1::LOAD_STATE_COMMITTED) << committed.failure();
  EXPECT_EQ(Count("wiki").entries(), 6);
  writer = client_->PutLoad(load.load_id());
  (void)writer->Write(MakeEntry(20, "late"), MakeRecord(20));
  EXPECT_EQ(writer->Finish().status().code(), absl::StatusCode::kFailedPrecondition);

  v1::RollbackRequest rollback;
  rollback.set_knowledge_base("wiki");
  EXPECT_EQ(Ok(&Stub::Rollback, rollback).version(), 1);
  EXPECT_EQ(Count("wiki").entries(), 4);
}

TEST_F(MemoryServerTest, AliasesSwitchAndNamesAreChecked) {
  StartServer();
  Create("v1");
  Create("v2");
  ASSERT_TRUE(Put("v2", Entries(0, 3)).ok());
  v1::SetAliasRequest alias;
  alias.set_alias("live");
  alias.set_knowledge_base("v1");
  EXPECT_EQ(Ok(&Stub::SetAlias, alias).previous(), "");
  EXPECT_EQ(Count("live").entries(), 0);
  alias.set_knowledge_base("v2");
  EXPECT_EQ(Ok(&Stub::SetAlias, alias).previous(), "v1");
  EXPECT_EQ(Count("live").entries(), 3);

  for (const char* name : {"", "../etc", "a/b", ".hidden", "x\ny"}) {
    v1::CreateKnowledgeBaseRequest create;
    *create.mutable_spec() = Spec(name);
    const absl::Status status = Error(&Stub::CreateKnowledgeBase, create);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(std::string(status.message()), HasSubstr("name"));
  }
  v1::CountRequest count;
  count.set_knowledge_base("nothing");
  const absl::Status missing = Error(&Stub::Count, count);
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("nothing"));
}

TEST_F(MemoryServerTest, BadEntriesAreRefusedAndNothingOfThemIsKept) {
  StartServer();
  Create("wiki");
  struct Case {
    const char* what;
    v1::Entry entry;
    std::string record;
    absl::StatusCode code;
    const char* message;
  };
  std::vector<Case> cases;
  cases.push_back({"dimension", MakeEntry(0, "d"), MakeRecord(0),
                   absl::StatusCode::kInvalidArgument, "embedding"});
  cases.back().entry.mutable_embedding()->RemoveLast();
  cases.push_back(
      {"NaN", MakeEntry(0, "d"), MakeRecord(0), absl::StatusCode::kInvalidArgument, "embedding"});
  cases.back().entry.set_embedding(2, std::nanf(""));
  cases.push_back({"foreign", MakeEntry(0, "d"), MakeRecord(0, Fingerprint(9)),
                   absl::StatusCode::kFailedPrecondition, "fingerprint"});
  cases.push_back(
      {"flipped bit", MakeEntry(0, "d"), MakeRecord(0), absl::StatusCode::kDataLoss, "record"});
  cases.back().record[200] ^= 4;
  cases.push_back({"short id", MakeEntry(0, "d"), MakeRecord(0), absl::StatusCode::kInvalidArgument,
                   "record_id"});
  cases.back().entry.set_record_id("short");
  cases.push_back({"no document", MakeEntry(0, ""), MakeRecord(0),
                   absl::StatusCode::kInvalidArgument, "document_id"});
  cases.push_back({"no record", MakeEntry(0, "d"), "", absl::StatusCode::kNotFound, "record"});
  for (const Case& c : cases) {
    const auto writer = client_->Put("wiki");
    (void)writer->Write(c.entry, c.record);
    const absl::Status status = writer->Finish().status();
    if (std::string(c.what) == "flipped bit") {
      EXPECT_THAT(status.code(), ::testing::AnyOf(absl::StatusCode::kDataLoss,
                                                  absl::StatusCode::kInvalidArgument));
    } else {
      EXPECT_EQ(status.code(), c.code) << c.what << ": " << status;
    }
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message)) << c.what;
  }
  EXPECT_EQ(Count("wiki").entries(), 0);
}

TEST_F(MemoryServerTest, BadQueriesFailAloneAndTheStreamGoesOn) {
  StartServer();
  Create("wiki");
  ASSERT_TRUE(Put("wiki", Entries(0, 3)).ok());
  const auto stream = client_->OpenRetrieve();
  const auto code = [&](const v1::RetrieveRequest& request) {
    return stream->Retrieve(request).status().code();
  };
  EXPECT_EQ(code(Query("wiki", 0, 0)), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      code(Query("wiki", 0, 100'000)),
      ::testing::AnyOf(absl::StatusCode::kInvalidArgument, absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(code(Query("nothing", 0, 5)), absl::StatusCode::kNotFound);
  v1::RetrieveRequest nan = Query("wiki", 0, 5);
  nan.mutable_queries(0)->set_embedding(0, std::nanf(""));
  EXPECT_EQ(code(nan), absl::StatusCode::kInvalidArgument);
  v1::RetrieveRequest evicted = Query("wiki", 0, 5);
  evicted.set_evicted("not 32 bytes");
  EXPECT_EQ(code(evicted), absl::StatusCode::kInvalidArgument);
  v1::RetrieveRequest filtered = Query("wiki", 0, 5);
  (*filtered.mutable_queries(0)->mutable_filter()->mutable_metadata())["parity"] = "odd";
  const auto answer = stream->Retrieve(filtered);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->hits.queries(0).hits_size(), 1);
}

TEST_F(MemoryServerTest, AcknowledgedPutsSurviveKill9) {
  StartServer();
  Create("wiki");
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(Put("wiki", Entries(10 * round, 10 * round + 10)).ok());
    server_->Signal(SIGKILL);
    EXPECT_EQ(server_->Wait(), -SIGKILL);
    client_.reset();
    StartServer();
    EXPECT_EQ(Count("wiki").entries(), 10 * (round + 1));
  }
  const auto answer = client_->OpenRetrieve()->Retrieve(Query("wiki", 5, 2));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->records.size(), 2);
}

TEST_F(MemoryServerTest, SnapshotsAndBackupsRestore) {
  StartServer();
  Create("wiki");
  ASSERT_TRUE(Put("wiki", Entries(0, 5)).ok());
  v1::CreateSnapshotRequest snapshot;
  snapshot.set_name("before");
  EXPECT_EQ(Ok(&Stub::CreateSnapshot, snapshot).snapshot().manifest_sha256().size(), 32);
  v1::CreateBackupRequest backup;
  backup.set_directory("nightly");
  EXPECT_GT(Ok(&Stub::CreateBackup, backup).bytes_copied(), 0);
  ASSERT_TRUE(Put("wiki", Entries(5, 9)).ok());
  EXPECT_EQ(Count("wiki").entries(), 9);
  v1::RestoreSnapshotRequest restore;
  restore.set_name("before");
  Ok(&Stub::RestoreSnapshot, restore);
  EXPECT_EQ(Count("wiki").entries(), 5);
  ASSERT_TRUE(Put("wiki", Entries(5, 8)).ok());
  v1::RestoreBackupRequest from_backup;
  from_backup.set_directory("nightly");
  Ok(&Stub::RestoreBackup, from_backup);
  EXPECT_EQ(Count("wiki").entries(), 5);
  backup.set_directory("../../outside");
  EXPECT_EQ(Error(&Stub::CreateBackup, backup).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(MemoryServerTest, KeysSeparateTenantsAndRights) {
  const std::string file = Path("keys.json");
  const auto write_keys = [&](const std::string& reader_right) {
    std::ofstream(file) << absl::StrCat(
        R"({"keys": [{"name": "boss", "tenant": "acme", "knowledge_bases": {"*": "admin"}, "sha256": ")",
        Sha256Of("boss-key").ToHex(),
        R"("}, {"name": "reader", "tenant": "acme", "knowledge_bases": {"wiki": ")", reader_right,
        R"("}, "sha256": ")", Sha256Of("reader-key").ToHex(),
        R"("}, {"name": "other", "tenant": "zenith", "knowledge_bases": {"*": "admin"}, "sha256": ")",
        Sha256Of("other-key").ToHex(), R"("}]})");
  };
  write_keys("read");
  MemoryClientOptions boss;
  boss.api_key = "boss-key";
  StartServer({"--api_keys", file}, boss);
  Create("wiki");
  Create("secret");
  ASSERT_TRUE(Put("wiki", Entries(0, 3)).ok());

  MemoryClientOptions options;
  options.api_key = "reader-key";
  const auto reader = Connect(options);
  EXPECT_TRUE(reader->OpenRetrieve()->Retrieve(Query("wiki", 0, 1)).ok());
  EXPECT_EQ(reader->OpenRetrieve()->Retrieve(Query("secret", 0, 1)).status().code(),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(Put("wiki", Entries(3, 4), reader.get()).status().code(),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(reader->Call(&Stub::CreateSnapshot, v1::CreateSnapshotRequest()).status().code(),
            absl::StatusCode::kPermissionDenied);

  options.api_key = "other-key";  // another tenant: the name means nothing there
  EXPECT_EQ(Connect(options)->OpenRetrieve()->Retrieve(Query("wiki", 0, 1)).status().code(),
            absl::StatusCode::kNotFound);
  options.api_key = "wrong";
  EXPECT_EQ(Connect(options)->Call(&Stub::GetStatus, v1::GetStatusRequest()).status().code(),
            absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(Connect(options)->OpenRetrieve()->Retrieve(Query("wiki", 0, 1)).status().code(),
            absl::StatusCode::kUnauthenticated);

  write_keys("write");
  server_->Signal(SIGHUP);
  ASSERT_TRUE(server_->WaitForLine("API keys read again"));
  EXPECT_TRUE(Put("wiki", Entries(3, 4), reader.get()).ok());
}

TEST_F(MemoryServerTest, TlsAndMutualTls) {
  const auto run = [&](const std::string& command) {
    ASSERT_EQ(
        std::system(("cd " + directory_.string() + " && " + command + " 2>/dev/null").c_str()), 0)
        << command;
  };
  run("openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=test-ca "
      "-days 2");
  for (const char* name : {"server", "client"}) {
    run(absl::StrCat(
        "openssl req -newkey rsa:2048 -nodes -keyout ", name, ".key -out ", name,
        ".csr -subj /CN=localhost && echo subjectAltName=DNS:localhost,IP:127.0.0.1 > san && "
        "openssl x509 -req -in ",
        name,
        ".csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile "
        "san -out ",
        name, ".pem"));
  }
  MemoryClientOptions tls;
  tls.timeout = absl::Seconds(5);
  tls.tls.ca = Path("ca.pem");
  tls.tls.certificate = Path("client.pem");
  tls.tls.key = Path("client.key");
  StartServer({"--tls_certificate", Path("server.pem"), "--tls_key", Path("server.key"),
               "--tls_client_ca", Path("ca.pem")},
              tls);
  Create("wiki");
  ASSERT_TRUE(Put("wiki", Entries(0, 2)).ok());
  EXPECT_TRUE(client_->OpenRetrieve()->Retrieve(Query("wiki", 0, 1)).ok());

  MemoryClientOptions plain = {.attempts = 1};
  plain.timeout = absl::Seconds(5);
  EXPECT_FALSE(Connect(plain)->Call(&Stub::GetStatus, v1::GetStatusRequest()).ok());
  MemoryClientOptions without_certificate = plain;
  without_certificate.tls.ca = Path("ca.pem");
  EXPECT_FALSE(Connect(without_certificate)->Call(&Stub::GetStatus, v1::GetStatusRequest()).ok());
}

TEST_F(MemoryServerTest, HealthMetricsAndDrain) {
  StartServer({"--metrics_listen", "127.0.0.1:0", "--drain_seconds", "20"});
  Create("wiki");
  ASSERT_TRUE(Put("wiki", Entries(0, 2)).ok());
  const auto stream = client_->OpenRetrieve();
  ASSERT_TRUE(stream->Retrieve(Query("wiki", 0, 1)).ok());

  // grpc.health.v1.Health/Check; HealthCheckRequest{1: service}, HealthCheckResponse{1: SERVING =
  // 1}.
  grpc::GenericStub generic(
      grpc::CreateChannel("localhost:" + port_, grpc::InsecureChannelCredentials()));
  for (const std::string service :
       {"", "memory3.v1.MemoryService", "memory3.v1.MemoryService.Write"}) {
    std::string request;
    if (!service.empty())
      request = absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
    grpc::Slice slice(request);
    grpc::ByteBuffer out(&slice, 1), in;
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const auto call =
        generic.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", out, &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&in, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    ASSERT_TRUE(queue.Next(&tag, &ok));
    ASSERT_TRUE(status.ok()) << service << ": " << status.error_message();
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(in.Dump(&slices).ok());
    ASSERT_EQ(slices.size(), 1);
    EXPECT_EQ(std::string(slices[0].begin(), slices[0].end()), "\x08\x01") << service;
  }

  const std::optional<std::string> metrics_port = server_->WaitForLine(R"(metrics on port (\d+))");
  ASSERT_TRUE(metrics_port) << server_->output();
  httplib::Client http("127.0.0.1", std::stoi(*metrics_port));
  const auto page = http.Get("/metrics");
  ASSERT_TRUE(page);
  EXPECT_THAT(
      page->body,
      AllOf(HasSubstr("memory3_entries 2"), HasSubstr("memory3_writable 1"),
            HasSubstr("memory3_retrieve_queries_total 1"), HasSubstr("memory3_retrieve_streams 1"),
            HasSubstr(R"(memory3_memory_requests_total{code="OK",method="Put"} 1)")));

  // SIGTERM ends the idle stream at once, not after the time to drain.
  const auto begun = std::chrono::steady_clock::now();
  server_->Signal(SIGTERM);
  EXPECT_EQ(server_->Wait(), 0) << server_->output();
  EXPECT_LT(std::chrono::steady_clock::now() - begun, std::chrono::seconds(15));
  EXPECT_EQ(stream->Retrieve(Query("wiki", 0, 1)).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(MemoryServerTest, StartsOrSaysInOneLineWhyNot) {
  StartServer();
  ChildProcess same_port("memory_server",
                         {"--data", Path("data2"), "--listen", "127.0.0.1:" + port_});
  EXPECT_EQ(same_port.Wait(), 1);
  EXPECT_THAT(same_port.output(), HasSubstr("--listen 127.0.0.1:" + port_));
  ChildProcess same_data("memory_server", {"--data", Path("data"), "--listen", "127.0.0.1:0"});
  EXPECT_EQ(same_data.Wait(), 1);
  EXPECT_THAT(same_data.output(), HasSubstr(Path("data")));
  ChildProcess no_keys("memory_server",
                       {"--data", Path("data3"), "--api_keys", Path("missing.json")});
  EXPECT_EQ(no_keys.Wait(), 1);
  EXPECT_THAT(no_keys.output(), HasSubstr("missing.json"));
  // The tests' own MEMORY3_DATA would be --data to it.
  ChildProcess no_data("memory_server", {}, {{"MEMORY3_DATA", ""}});
  EXPECT_NE(no_data.Wait(), 0);
  EXPECT_THAT(no_data.output(), HasSubstr("--data"));
}

}  // namespace
}  // namespace memory3
