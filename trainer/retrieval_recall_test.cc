#include "trainer/retrieval_recall.h"

#include <cstdlib>
#include <filesystem>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;

TEST(CutAtSentences, Pieces) {
  EXPECT_THAT(CutAtSentences("One two. Three four! Five? Six.", 20),
              ElementsAre("One two. Three four!", "Five? Six."));
  EXPECT_THAT(CutAtSentences("A sentence that is far too long. Short.", 10),
              ElementsAre("A sentence that is far too long.", "Short."));
  EXPECT_THAT(CutAtSentences("no end", 3), ElementsAre("no end"));
  EXPECT_TRUE(CutAtSentences("", 3).empty());
}

// The full measurement (1,501 questions, 20,000 other references) is embedder_recall's; this is the
// same over a third of it.
TEST(RetrievalRecall, LexicalReachesNineTenthsOfBm25) {
  const char* env = std::getenv("MEMORY3_DATA");
  const std::string data = env != nullptr ? env : "../shared/data";
  if (!std::filesystem::exists(data + "/enwiki")) {
    GTEST_SKIP() << "no shared data at " << data << " (MEMORY3_DATA): recall is not measured";
  }
  RetrievalSetOptions options;
  options.max_questions = 500;
  options.other_references = 10000;
  auto set = LoadRetrievalSet(data + "/qa/grounded-dev.jsonl.zst",
                              {data + "/enwiki/articles-0.jsonl.zst"}, options);
  ASSERT_TRUE(set.ok()) << set.status();
  ASSERT_EQ(set->questions.size(), 500u);
  auto embedder = MakeEmbedder("lexical");
  ASSERT_TRUE(embedder.ok()) << embedder.status();
  auto recall = EmbedderRecall(*set, 5, **embedder);
  ASSERT_TRUE(recall.ok()) << recall.status();
  const double bm25 = Bm25Recall(*set, 5, 1.2, 0.75);
  EXPECT_GT(bm25, 0.4);
  EXPECT_GE(*recall, 0.9 * bm25);
}

}  // namespace
}  // namespace memory3
