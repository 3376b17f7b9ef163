// Black-box tests of the memory_server binary under clients that ask too much, do not read, or
// vanish: each gets a clear status, and nobody else notices.
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory_server/client.h"
#include "tests/child_process.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
using Stub = MemoryClient::Stub;

constexpr int kDimension = 8;
constexpr int kRecords = 64;
constexpr int kLayers = 64;  // records of 256 KiB

Hash256 Fingerprint() { return Sha256Of("writer"); }

std::string MakeRecord(uint64_t seed) {
  std::mt19937_64 random(seed);
  ExplicitMemory memory;
  memory.shape = {.layers = kLayers, .kv_heads = 2, .tokens = 8, .head_dim = 32};
  memory.reference_tokens = 100;
  memory.values.resize(memory.shape.values());
  for (float& value : memory.values) value = static_cast<float>(random() % 1000);
  return *EncodeRecord(memory, Fingerprint(), *MakeF32Codec(32));
}

v1::Entry MakeEntry(int i) {
  v1::Entry entry;
  entry.mutable_source()->set_document_id("doc");
  entry.mutable_source()->set_ordinal(i);
  entry.set_record_id(std::string(Sha256Of(absl::StrCat("record ", i)).view()));
  for (int d = 0; d < kDimension; ++d) entry.add_embedding(d == i % kDimension ? 1 : 0.01f * i);
  return entry;
}

v1::RetrieveRequest Query(int top_k, int queries = 1) {
  v1::RetrieveRequest request;
  request.set_knowledge_base("wiki");
  for (int q = 0; q < queries; ++q) {
    auto& query = *request.add_queries();
    for (int d = 0; d < kDimension; ++d) query.add_embedding(d == q % kDimension ? 1 : 0.1f);
    query.set_top_k(top_k);
  }
  return request;
}

class MemoryServerLimitsTest : public ::testing::Test {
 protected:
  void Start(std::vector<std::string> extra = {}) {
    directory_ = std::filesystem::path(::testing::TempDir()) /
                 absl::StrCat("memory_server_limits_", getpid());
    std::filesystem::remove_all(directory_);
    std::vector<std::string> arguments = {"--data", directory_.string(), "--listen", "127.0.0.1:0"};
    arguments.insert(arguments.end(), extra.begin(), extra.end());
    server_ = std::make_unique<ChildProcess>("memory_server", arguments);
    const std::optional<std::string> port = server_->WaitForLine(R"(gRPC on port (\d+))");
    ASSERT_TRUE(port) << server_->output();
    target_ = "127.0.0.1:" + *port;
    client_ = Connect();
    v1::CreateKnowledgeBaseRequest create;
    v1::KnowledgeBaseSpec& spec = *create.mutable_spec();
    spec.set_name("wiki");
    spec.set_writer_fingerprint(std::string(Fingerprint().view()));
    spec.set_embedder_fingerprint(std::string(Fingerprint().view()));
    spec.set_codec(v1::CODEC_F32);
    spec.set_embedding_dimension(kDimension);
    for (int layer = 0; layer < kLayers; ++layer) spec.mutable_geometry()->add_memory_layers(layer);
    spec.mutable_geometry()->set_kv_heads(2);
    spec.mutable_geometry()->set_head_dim(32);
    spec.mutable_geometry()->set_tokens_kept(8);
    spec.mutable_geometry()->set_reference_tokens(128);
    ASSERT_TRUE(client_->Call(&Stub::CreateKnowledgeBase, create).ok());
  }
  void TearDown() override {
    client_.reset();
    server_.reset();
    std::filesystem::remove_all(directory_);
  }
  std::unique_ptr<MemoryClient> Connect() {
    MemoryClientOptions options;
    options.target = target_;
    return *MemoryClient::Create(options);
  }
  void Fill() {
    const auto writer = client_->Put("wiki");
    for (int i = 0; i < kRecords; ++i) ASSERT_TRUE(writer->Write(MakeEntry(i), MakeRecord(i)).ok());
    const auto put = writer->Finish();
    ASSERT_TRUE(put.ok()) << put.status();
  }
  uint64_t Entries() {
    v1::CountRequest request;
    request.set_knowledge_base("wiki");
    const auto count = client_->Call(&Stub::Count, request);
    EXPECT_TRUE(count.ok()) << count.status();
    return count.ok() ? count->entries() : 0;
  }
  // Of the server, in KiB.
  int64_t ResidentKb() {
    std::ifstream status(absl::StrCat("/proc/", server_->pid(), "/status"));
    for (std::string line; std::getline(status, line);) {
      if (line.rfind("VmRSS:", 0) == 0) return std::stoll(line.substr(6));
    }
    ADD_FAILURE() << "no VmRSS";
    return 0;
  }

  std::filesystem::path directory_;
  std::unique_ptr<ChildProcess> server_;
  std::unique_ptr<MemoryClient> client_;
  std::string target_;
};

TEST_F(MemoryServerLimitsTest, ATimeoutEndsItsRequestOnly) {
  Start();
  Fill();
  const auto stream = client_->OpenRetrieve();
  v1::RetrieveRequest hurried = Query(5, 1000);
  hurried.mutable_timeout()->set_nanos(1);
  const absl::Status status = stream->Retrieve(hurried).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  const auto answer = stream->Retrieve(Query(5));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->records.size(), 5);  // nothing of the failed one counts as held
}

TEST_F(MemoryServerLimitsTest, AClientThatNeverReadsCostsLittleAndStopsNobody) {
  Start();
  Fill();
  // 20 clients ask for 16 MiB each time, a thousand times, and read nothing: 16 GB each, were it
  // kept.
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReaderWriter<v1::RetrieveRequest, v1::RetrieveResponse>>>
      streams;
  std::vector<std::thread> writers;
  std::vector<std::unique_ptr<v1::MemoryService::Stub>> stubs;
  v1::RetrieveRequest everything = Query(kRecords);
  for (int i = 0; i < kRecords; ++i) everything.mutable_evicted()->append(MakeEntry(i).record_id());
  for (int c = 0; c < 20; ++c) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    stubs.push_back(v1::MemoryService::NewStub(
        grpc::CreateCustomChannel(target_, grpc::InsecureChannelCredentials(), arguments)));
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    streams.push_back(stubs.back()->Retrieve(contexts.back().get()));
    writers.emplace_back([&everything, stream = streams.back().get()] {
      for (int i = 0; i < 1000 && stream->Write(everything); ++i) continue;
    });
  }
  const auto stream = client_->OpenRetrieve();
  for (int i = 0; i < 50; ++i) {
    v1::RetrieveRequest request = Query(5);
    request.set_evicted(everything.evicted());
    const auto answer = stream->Retrieve(request);
    ASSERT_TRUE(answer.ok()) << answer.status();
    ASSERT_EQ(answer->records.size(), 5);
  }
  // 16 MiB of records, caches and write buffers, and per client what one step of an answer holds.
  EXPECT_LT(ResidentKb(), 700 << 10);
  for (const auto& context : contexts) context->TryCancel();
  for (std::thread& writer : writers) writer.join();
  for (const auto& s : streams) s->Finish();
  EXPECT_TRUE(stream->Retrieve(Query(5)).ok());
}

TEST_F(MemoryServerLimitsTest, AClientThatVanishesInAPutLeavesNothingHalf) {
  Start();
  {
    const auto writer = client_->Put("wiki");
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(writer->Write(MakeEntry(i), MakeRecord(i)).ok());
  }  // it goes without Finish: cancelled
  {
    // In the middle of a record.
    grpc::ClientContext context;
    v1::PutResponse response;
    const auto stub = v1::MemoryService::NewStub(
        grpc::CreateChannel(target_, grpc::InsecureChannelCredentials()));
    const auto writer = stub->Put(&context, &response);
    v1::PutRequest message;
    message.mutable_header()->set_knowledge_base("wiki");
    ASSERT_TRUE(writer->Write(message));
    *message.mutable_entry() = MakeEntry(7);
    message.mutable_entry()->set_record_bytes(MakeRecord(7).size());
    ASSERT_TRUE(writer->Write(message));
    message.set_record_piece(MakeRecord(7).substr(0, 1000));
    ASSERT_TRUE(writer->Write(message));
    writer->WritesDone();
    const grpc::Status status = writer->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr("1000 of"));
  }
  // A drain waits for every call, so that what follows is after the cancelled ones' end.
  server_->Signal(SIGTERM);
  EXPECT_EQ(server_->Wait(), 0) << server_->output();
  server_ = std::make_unique<ChildProcess>(
      "memory_server",
      std::vector<std::string>{"--data", directory_.string(), "--listen", "127.0.0.1:0"});
  const std::optional<std::string> port = server_->WaitForLine(R"(gRPC on port (\d+))");
  ASSERT_TRUE(port) << server_->output();
  target_ = "127.0.0.1:" + *port;
  client_ = Connect();
  EXPECT_EQ(Entries(), 0);
}

TEST_F(MemoryServerLimitsTest, AnOversizedMessageIsRefusedWithTheLimit) {
  Start({"--max_message_mb", "1"});
  grpc::ClientContext context;
  v1::PutResponse response;
  const auto stub =
      v1::MemoryService::NewStub(grpc::CreateChannel(target_, grpc::InsecureChannelCredentials()));
  const auto writer = stub->Put(&context, &response);
  v1::PutRequest message;
  message.mutable_header()->set_knowledge_base("wiki");
  writer->Write(message);
  *message.mutable_entry() = MakeEntry(0);
  message.mutable_entry()->set_record(std::string(2 << 20, 'x'));
  writer->Write(message);
  writer->WritesDone();
  const grpc::Status status = writer->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr(std::to_string(1 << 20)));
  EXPECT_EQ(Entries(), 0);
}

TEST_F(MemoryServerLimitsTest, MoreStreamsThanAllowedAreRefused) {
  Start({"--max_retrieve_streams", "2"});
  Fill();
  const auto first = client_->OpenRetrieve();
  auto second = client_->OpenRetrieve();
  ASSERT_TRUE(first->Retrieve(Query(1)).ok());
  ASSERT_TRUE(second->Retrieve(Query(1)).ok());
  const absl::Status status = client_->OpenRetrieve()->Retrieve(Query(1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("--max_retrieve_streams"));
  second.reset();  // its place is free again, as soon as the server has noticed
  absl::Status retried;
  for (int attempt = 0; attempt < 1000; ++attempt) {
    retried = client_->OpenRetrieve()->Retrieve(Query(1)).status();
    if (retried.ok()) break;
    ASSERT_EQ(retried.code(), absl::StatusCode::kResourceExhausted) << retried;
  }
  EXPECT_TRUE(retried.ok()) << retried;
  EXPECT_TRUE(first->Retrieve(Query(1)).ok());
}

}  // namespace
}  // namespace memory3
