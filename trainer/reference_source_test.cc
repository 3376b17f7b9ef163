#include "trainer/reference_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ReferenceSourceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::path(::testing::TempDir()) / absl::StrCat("references_", getpid());
    std::filesystem::create_directories(root_);
    const std::string file = "transformer/testdata/spm_tiny/tokenizer.model";
    tokenizer_ = *MakeSentencePieceTokenizer(*ReadSmallFile(file, 1 << 24), file);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  // 40 documents of ten or so references; every fourth one repeats the text and title of the first.
  ReferenceSourceOptions Options(const std::string& more = "") {
    const std::string path = (root_ / "d.jsonl").string();
    std::ofstream out(path);
    for (int d = 0; d < 40; ++d) {
      out << "{\"id\": " << d << ", \"title\": \"" << (d % 4 == 0 ? 0 : d) << "\", \"text\": \"";
      for (int s = 0; s < 40; ++s) out << "Häuser " << (d % 4 == 0 ? 0 : d) << " and " << s << ". ";
      out << "\"}\n";
    }
    out << more;
    ReferenceSourceOptions options;
    options.inputs = {path};
    options.threads = 3;
    return options;
  }
  std::vector<ReferenceItem> All(ReferenceSource& source) {
    std::vector<ReferenceItem> all, items;
    while (true) {
      const absl::StatusOr<bool> some = source.Next(300, 5, &items);
      EXPECT_TRUE(some.ok()) << some.status();
      if (!some.ok() || !*some) return all;
      int64_t tokens = 0;
      for (const ReferenceItem& item : items) {
        if (!item.has_record) tokens += static_cast<int64_t>(item.token_ids.size());
      }
      EXPECT_LE(tokens, 300);
      EXPECT_LE(items.size(), 5);
      for (ReferenceItem& item : items) all.push_back(std::move(item));
    }
  }

  std::filesystem::path root_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(ReferenceSourceTest, GivesTheDocumentsReferencesInOrder) {
  auto source = ReferenceSource::Open(tokenizer_.get(), Options());
  ASSERT_TRUE(source.ok()) << source.status();
  const std::vector<ReferenceItem> all = All(**source);
  int document = -1;
  uint32_t ordinal = 0;
  int64_t repeated = 0;
  uint64_t end = 0;
  for (const ReferenceItem& item : all) {
    if (item.ordinal == 0) {
      ++document;
      ordinal = 0;
      end = 0;
    }
    EXPECT_EQ(item.document->id, absl::StrCat(document));
    EXPECT_EQ(item.ordinal, ordinal++);
    EXPECT_GE(item.char_begin, end);
    end = item.char_end;
    // Characters, not bytes: one of each "Häuser" is two bytes long.
    EXPECT_LT(item.char_end - item.char_begin, item.text.size() - item.document->title.size() - 1);
    EXPECT_EQ(item.has_record, document > 0 && document % 4 == 0) << document;
    repeated += item.has_record;
    EXPECT_EQ(item.record_id, ComputeRecordId("default", {}, CodecId::kF32, {}, item.token_ids));
  }
  const ReferenceCounts counts = (*source)->counts();
  EXPECT_EQ(counts.documents, 40);
  EXPECT_EQ(counts.references, static_cast<int64_t>(all.size()));
  EXPECT_EQ(counts.in_run, repeated);
  EXPECT_EQ(counts.bytes_read, counts.bytes_total);
}

TEST_F(ReferenceSourceTest, LeavesOutWhatIsLoadedAndAsksTheStoreForTheRest) {
  ReferenceSourceOptions options = Options();
  options.loaded[ShortHash::OfText("1")] = 1000;
  options.loaded[ShortHash::OfText("2")] = 3;
  std::atomic<int> asked = 0;
  options.store_has = [&](const RecordId& id) -> absl::StatusOr<bool> {
    ++asked;
    return id.bytes[0] % 2 == 0;
  };
  auto source = ReferenceSource::Open(tokenizer_.get(), options);
  ASSERT_TRUE(source.ok()) << source.status();
  int64_t in_store = 0;
  for (const ReferenceItem& item : All(**source)) {
    EXPECT_NE(item.document->id, "1");
    if (item.document->id == "2") {
      EXPECT_GE(item.ordinal, 3);
    }
    if (item.has_record && item.document->id.size() == 1 && item.document->id != "0") {
      EXPECT_TRUE(item.record_id.bytes[0] % 2 == 0 || item.document->id == "4" ||
                  item.document->id == "8");
    }
    in_store += item.has_record;
  }
  const ReferenceCounts counts = (*source)->counts();
  EXPECT_EQ(asked, counts.references - counts.loaded - counts.in_run);
  EXPECT_EQ(in_store, counts.in_store + counts.in_run);
  EXPECT_GT(counts.in_store, 0);
}

TEST_F(ReferenceSourceTest, ShardsShareTheDocuments) {
  std::vector<std::string> ids;
  for (int shard = 0; shard < 3; ++shard) {
    ReferenceSourceOptions options = Options();
    options.shard = shard;
    options.shards = 3;
    auto source = ReferenceSource::Open(tokenizer_.get(), options);
    ASSERT_TRUE(source.ok()) << source.status();
    for (const ReferenceItem& item : All(**source)) {
      EXPECT_EQ(std::stoi(item.document->id) % 3, shard);
      if (item.ordinal == 0) ids.push_back(item.document->id);
    }
  }
  EXPECT_EQ(ids.size(), 40);
}

TEST_F(ReferenceSourceTest, ErrorsComeAfterWhatWasReadAndNameTheLine) {
  ReferenceSourceOptions options = Options("{\"id\": 3, \"text\": \"Again.\"}\nno JSON\n");
  auto source = ReferenceSource::Open(tokenizer_.get(), options);
  ASSERT_TRUE(source.ok());
  EXPECT_FALSE(All(**source).empty());
  EXPECT_EQ((*source)->counts().skipped, 2);
  EXPECT_THAT((*source)->warnings(), ElementsAre(HasSubstr("d.jsonl:41: another document"),
                                                 HasSubstr("d.jsonl:42: is not valid JSON")));
  options.documents.strict = true;
  source = ReferenceSource::Open(tokenizer_.get(), options);
  ASSERT_TRUE(source.ok());
  std::vector<ReferenceItem> items;
  absl::StatusOr<bool> some;
  do {
    some = (*source)->Next(300, 5, &items);
  } while (some.ok() && *some);
  EXPECT_THAT(std::string(some.status().message()), HasSubstr("d.jsonl:41"));

  options.documents.strict = false;
  options.store_has = [](const RecordId&) -> absl::StatusOr<bool> {
    return absl::UnavailableError("no store");
  };
  source = ReferenceSource::Open(tokenizer_.get(), options);
  ASSERT_TRUE(source.ok());
  EXPECT_EQ((*source)->Next(300, 5, &items).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ReferenceSourceTest, MayBeLeftBeforeItsEnd) {
  auto source = ReferenceSource::Open(tokenizer_.get(), Options());
  ASSERT_TRUE(source.ok());
  std::vector<ReferenceItem> items;
  ASSERT_TRUE((*source)->Next(300, 5, &items).ok());
}

TEST(BoundedQueueTest, AFullQueueWaitsAndACancelledOneTakesNothing) {
  BoundedQueue<int> queue(2);
  EXPECT_TRUE(queue.Push(1, 5));  // heavier than the queue may be: alone it fits
  std::thread consumer([&] {
    for (int i = 1; i <= 100; ++i) EXPECT_EQ(queue.Pop(), i);
    EXPECT_EQ(queue.Pop(), std::nullopt);
  });
  for (int i = 2; i <= 100; ++i) EXPECT_TRUE(queue.Push(i, 1));
  queue.Close();
  consumer.join();
  EXPECT_FALSE(queue.Push(101, 1));
  EXPECT_EQ(queue.PopUntil(BoundedQueue<int>::Clock::now()), std::nullopt);

  BoundedQueue<int> cancelled(1);
  EXPECT_TRUE(cancelled.Push(1, 1));
  std::thread producer([&] { EXPECT_FALSE(cancelled.Push(2, 1)); });
  cancelled.Cancel();
  producer.join();
  EXPECT_EQ(cancelled.Pop(), std::nullopt);
}

}  // namespace
}  // namespace memory3
