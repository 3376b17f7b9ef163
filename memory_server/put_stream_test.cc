#include "memory_server/put_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "memory_server/retrieve_wire.h"

namespace memory3 {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// What was put, owned.
struct Put {
  std::string document;
  std::string record;
  std::vector<float> embedding;
};

class PutStreamTest : public ::testing::Test {
 protected:
  static v1::PutRequest Entry(const std::string& document, const std::string& record = "",
                              uint64_t record_bytes = 0) {
    v1::PutRequest message;
    v1::Entry& entry = *message.mutable_entry();
    entry.mutable_source()->set_document_id(document);
    entry.mutable_source()->set_ordinal(3);
    entry.set_record_id(std::string(32, 'i'));
    entry.add_embedding(1);
    entry.add_embedding(2);
    entry.set_record(record);
    entry.set_record_bytes(record_bytes);
    return message;
  }
  static v1::PutRequest Piece(std::string bytes) {
    v1::PutRequest message;
    message.set_record_piece(std::move(bytes));
    return message;
  }
  absl::Status Take(v1::PutRequest message) { return stream_.Take(message); }

  absl::Status put_status_;
  std::vector<std::vector<Put>> batches_;
  PutStream stream_{[this](const std::shared_ptr<const std::vector<NewEntry>>& entries) {
    batches_.emplace_back();
    for (const NewEntry& entry : *entries) {
      batches_.back().push_back({entry.source.document_id,
                                 std::string(entry.record),
                                 {entry.embedding.begin(), entry.embedding.end()}});
    }
    return put_status_;
  }};
};

TEST_F(PutStreamTest, PutsEntriesAndTheirPiecesTogether) {
  ASSERT_TRUE(Take(Entry("whole", "abc")).ok());
  ASSERT_TRUE(Take(Entry("cut", "", 5)).ok());
  ASSERT_TRUE(Take(Piece("de")).ok());
  ASSERT_TRUE(Take(Piece("fgh")).ok());
  ASSERT_TRUE(Take(Entry("known")).ok());
  EXPECT_TRUE(batches_.empty());
  ASSERT_TRUE(stream_.Finish().ok());
  ASSERT_EQ(batches_.size(), 1);
  ASSERT_EQ(batches_[0].size(), 3);
  EXPECT_EQ(batches_[0][0].record, "abc");
  EXPECT_EQ(batches_[0][1].document, "cut");
  EXPECT_EQ(batches_[0][1].record, "defgh");
  EXPECT_EQ(batches_[0][2].record, "");
  EXPECT_THAT(batches_[0][2].embedding, ElementsAre(1, 2));
}

TEST_F(PutStreamTest, HoldsOneBatchOfAFewMiB) {
  const std::string record(1 << 20, 'x');
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(Take(Entry("d", record)).ok());
  ASSERT_TRUE(stream_.Finish().ok());
  ASSERT_GE(batches_.size(), 2);
  size_t entries = 0;
  for (const std::vector<Put>& batch : batches_) {
    EXPECT_LE(batch.size(), 5);
    entries += batch.size();
  }
  EXPECT_EQ(entries, 10);
}

TEST_F(PutStreamTest, AnEmptyStreamPutsNothing) {
  EXPECT_TRUE(stream_.Finish().ok());
  EXPECT_TRUE(batches_.empty());
}

TEST_F(PutStreamTest, WhatTheStoreRefusesEndsTheStream) {
  put_status_ = absl::FailedPreconditionError("another model");
  ASSERT_TRUE(Take(Entry("d", "abc")).ok());
  EXPECT_EQ(stream_.Finish(), put_status_);
}

TEST_F(PutStreamTest, ErrorsNameEntryAndField) {
  const auto expect = [&](const absl::Status& status, absl::StatusCode code, const char* entry,
                          const char* field) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(entry), HasSubstr(field)));
  };
  ASSERT_TRUE(Take(Entry("first", "abc")).ok());
  v1::PutRequest short_id = Entry("second");
  short_id.mutable_entry()->set_record_id("short");
  expect(Take(short_id), absl::StatusCode::kInvalidArgument, "entry 2 (document 'second'",
         "record_id");
  expect(Take(Entry("third", "abc", 4)), absl::StatusCode::kInvalidArgument,
         "entry 3 (document 'third', ordinal 3)", "record_bytes is 4 but record has 3");
  expect(Take(Entry("fourth", "", kMaxRecordBytes + 1)), absl::StatusCode::kResourceExhausted,
         "entry 4 (document 'fourth'", std::to_string(kMaxRecordBytes).c_str());
  expect(Take(Piece("x")), absl::StatusCode::kInvalidArgument, "", "record_piece");
  v1::PutRequest header;
  header.mutable_header()->set_knowledge_base("again");
  expect(Take(header), absl::StatusCode::kInvalidArgument, "", "header");
  expect(Take(v1::PutRequest()), absl::StatusCode::kInvalidArgument, "entry", "record_piece");

  ASSERT_TRUE(Take(Entry("fifth", "", 5)).ok());
  expect(Take(Piece("too long")), absl::StatusCode::kInvalidArgument, "document 'fifth'",
         "record_piece of 8 bytes");
  expect(Take(Entry("sixth")), absl::StatusCode::kInvalidArgument, "document 'fifth'",
         "0 of 5 bytes");
  expect(stream_.Finish(), absl::StatusCode::kInvalidArgument, "document 'fifth'", "0 of 5 bytes");
  EXPECT_TRUE(batches_.empty());  // nothing was put that was not complete
}

TEST_F(PutStreamTest, APieceOverTheLimitIsRefused) {
  ASSERT_TRUE(Take(Entry("d", "", 4 << 20)).ok());
  const absl::Status status = Take(Piece(std::string(kMaxPieceBytes + 1, 'x')));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("record_piece"));
  EXPECT_TRUE(Take(Piece(std::string(kMaxPieceBytes, 'x'))).ok());
}

}  // namespace
}  // namespace memory3
