// The client against a server that answers what it should not: damage on the way, pieces out of
// order, ids that are none. Nothing of it may reach an answer.
#include "memory_server/client.h"

#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <functional>
#include <future>

#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

// Answers every request with the messages the test set, numbered as the request is.
class ScriptedService : public v1::MemoryService::Service {
 public:
  grpc::Status Retrieve(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<v1::RetrieveResponse, v1::RetrieveRequest>* stream) override {
    v1::RetrieveRequest request;
    while (stream->Read(&request)) {
      for (v1::RetrieveResponse message : script) {
        if (message.last() && before_last) before_last();
        message.set_request_id(request.request_id());
        stream->Write(message);
      }
      if (end_stream) return {grpc::StatusCode::UNAVAILABLE, "going down"};
    }
    return grpc::Status::OK;
  }
  std::vector<v1::RetrieveResponse> script;
  bool end_stream = false;
  std::function<void()> before_last;
};

class ClientTest : public ::testing::Test {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    MemoryClientOptions options;
    options.target = "127.0.0.1:" + std::to_string(port);
    options.channels = 1;
    client_ = *MemoryClient::Create(options);
    stream_ = client_->OpenRetrieve();
  }
  void TearDown() override {
    stream_.reset();
    server_->Shutdown();
  }

  // One answer with one record cut into two pieces.
  void Answer(const std::string& record, uint64_t second_offset, bool last = true) {
    service_.script.assign(2, {});
    v1::RetrieveResponse& first = service_.script[0];
    auto& hit = *first.add_queries()->add_hits();
    hit.set_record_id(id_);
    hit.set_record_bytes(record.size());
    auto& piece = *first.add_pieces();
    piece.set_record_id(id_);
    piece.set_data(record.substr(0, record.size() / 2));
    auto& rest = *service_.script[1].add_pieces();
    rest.set_record_id(id_);
    rest.set_offset(second_offset);
    rest.set_data(record.substr(record.size() / 2));
    service_.script[1].set_last(last);
  }
  absl::StatusOr<RetrieveAnswer> Ask() { return stream_->Retrieve({}); }
  // Why an answer, or the record in it, is refused.
  absl::Status Refused() {
    const absl::StatusOr<RetrieveAnswer> answer = Ask();
    if (!answer.ok()) return answer.status();
    EXPECT_TRUE(answer->records.empty());
    const auto why = answer->unreadable.find(store_testing::MakeId(1));
    return why == answer->unreadable.end() ? absl::OkStatus() : why->second;
  }

  const std::string id_ = std::string(store_testing::MakeId(1).view());
  const std::string record_ = store_testing::MakeRecord(1);
  ScriptedService service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<MemoryClient> client_;
  std::unique_ptr<RetrieveStream> stream_;
};

TEST_F(ClientTest, PiecesAreJoined) {
  Answer(record_, record_.size() / 2);
  const absl::StatusOr<RetrieveAnswer> answer = Ask();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(*answer->records.at(store_testing::MakeId(1)), record_);
  EXPECT_EQ(answer->hits.pieces_size(), 0);
}

TEST_F(ClientTest, WhatHasComeIsToldBeforeTheLastPieceIsThere) {
  Answer(record_, record_.size() / 2);
  const RecordId other = store_testing::MakeId(2);
  auto& hit = *service_.script[0].mutable_queries(0)->add_hits();
  hit.set_record_id(std::string(other.view()));
  hit.set_record_bytes(store_testing::MakeRecord(2).size());
  auto& piece = *service_.script[0].add_pieces();
  piece.set_record_id(hit.record_id());
  piece.set_data(store_testing::MakeRecord(2));
  std::promise<void> told;
  service_.before_last = [&] { told.get_future().wait(); };
  std::promise<absl::StatusOr<RetrieveAnswer>> answer;
  stream_->Send(
      {}, [&](absl::StatusOr<RetrieveAnswer> a) { answer.set_value(std::move(a)); },
      [&](const RetrieveAnswer& so_far, const std::vector<RecordId>& fresh) {
        EXPECT_EQ(so_far.hits.queries(0).hits_size(), 2);
        EXPECT_THAT(fresh, ::testing::ElementsAre(other));
        EXPECT_EQ(*so_far.records.at(other), store_testing::MakeRecord(2));
        told.set_value();
      });
  const absl::StatusOr<RetrieveAnswer> whole = answer.get_future().get();
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(whole->records.size(), 2u);
}

TEST_F(ClientTest, EveryFlippedBitIsFound) {
  for (size_t bit = 0; bit < 8 * record_.size(); ++bit) {
    std::string damaged = record_;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    Answer(damaged, damaged.size() / 2);
    const absl::Status status = Refused();
    ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << "bit " << bit;
    ASSERT_THAT(std::string(status.message()), HasSubstr(store_testing::MakeId(1).ToHex()));
  }
  // And the stream goes on.
  Answer(record_, record_.size() / 2);
  EXPECT_TRUE(Ask().ok());
}

// One record of two is damaged on the way, or could not be read: the other one is there.
TEST_F(ClientTest, OneUnreadableRecordLeavesTheOthers) {
  const RecordId other = store_testing::MakeId(2);
  const auto add_other = [&] {
    auto& hit = *service_.script[0].mutable_queries(0)->add_hits();
    hit.set_record_id(std::string(other.view()));
    hit.set_record_bytes(store_testing::MakeRecord(2).size());
    auto& piece = *service_.script[1].add_pieces();
    piece.set_record_id(hit.record_id());
    piece.set_data(store_testing::MakeRecord(2));
  };
  std::string damaged = record_;
  damaged[140] ^= 1;
  Answer(damaged, damaged.size() / 2);
  add_other();
  absl::StatusOr<RetrieveAnswer> answer = Ask();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(*answer->records.at(other), store_testing::MakeRecord(2));
  EXPECT_EQ(answer->records.size(), 1u);
  EXPECT_EQ(answer->unreadable.at(store_testing::MakeId(1)).code(), absl::StatusCode::kDataLoss);

  // Codes that mean nothing are damage.
  for (const auto& [code, meant] : {std::pair{uint32_t{14}, absl::StatusCode::kUnavailable},
                                    {uint32_t{5}, absl::StatusCode::kNotFound},
                                    {uint32_t{0}, absl::StatusCode::kDataLoss}}) {
    Answer(record_, record_.size() / 2);
    service_.script[0].clear_pieces();
    service_.script[1].clear_pieces();
    add_other();
    auto& unreadable = *service_.script[1].add_unreadable();
    unreadable.set_record_id(id_);
    unreadable.set_code(code);
    unreadable.set_message("a bad sector");
    answer = Ask();
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_EQ(answer->records.size(), 1u);
    EXPECT_EQ(answer->unreadable.at(store_testing::MakeId(1)), absl::Status(meant, "a bad sector"));
    EXPECT_EQ(answer->hits.unreadable_size(), 0);
  }
  service_.script[1].mutable_unreadable(0)->set_record_id(std::string(32, 'x'));
  EXPECT_EQ(Ask().status().code(), absl::StatusCode::kDataLoss);  // of no hit
}

TEST_F(ClientTest, ShortenedRecordsAndGapsAreFound) {
  for (const size_t size : {size_t{0}, size_t{1}, size_t{127}, record_.size() - 1}) {
    Answer(record_.substr(0, size), size / 2);
    EXPECT_EQ(Refused().code(), absl::StatusCode::kDataLoss) << size;
  }
  Answer(record_ + "x", (record_.size() + 1) / 2);
  EXPECT_EQ(Refused().code(), absl::StatusCode::kDataLoss);
  for (const uint64_t offset :
       {uint64_t{0}, record_.size() / 2 - 1, record_.size() / 2 + 1, UINT64_MAX}) {
    Answer(record_, offset);
    const absl::Status status = Ask().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << offset;
    EXPECT_THAT(std::string(status.message()), HasSubstr("piece"));
  }
  Answer(record_, record_.size() / 2);
  service_.script[0].mutable_pieces(0)->set_record_id("short");
  EXPECT_EQ(Ask().status().code(), absl::StatusCode::kDataLoss);
  Answer(record_, record_.size() / 2);
  EXPECT_TRUE(Ask().ok());
}

TEST_F(ClientTest, AStreamThatEndsAnswersAllThatWaits) {
  Answer(record_, record_.size() / 2, /*last=*/false);
  service_.end_stream = true;
  const absl::Status status = Ask().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("going down"));
  EXPECT_EQ(stream_->ended().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Ask().status().code(), absl::StatusCode::kUnavailable);  // at once
}

TEST_F(ClientTest, DestroyingTheStreamAnswersCancelled) {
  service_.script.clear();  // never answers
  absl::Status status;
  bool called = false;
  stream_->Send({}, [&](const absl::StatusOr<RetrieveAnswer>& answer) {
    status = answer.status();
    called = true;
  });
  stream_.reset();
  EXPECT_TRUE(called);
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
}

}  // namespace
}  // namespace memory3
