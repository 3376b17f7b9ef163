#include "trainer/references.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "trainer/random.h"
#include "transformer/tokenizer.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::string> Sentences(const std::string& text) {
  std::vector<std::string> sentences;
  size_t begin = 0;
  for (const size_t end : SentenceEnds(text)) {
    sentences.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return sentences;
}

TEST(SentenceEndsTest, FullStopsThatEndSentencesAndThoseThatDoNot) {
  EXPECT_THAT(Sentences("One. Two!  Three?"), ElementsAre("One.", " Two!", "  Three?"));
  EXPECT_THAT(Sentences("J. S. Bach wrote it. Really."),
              ElementsAre("J. S. Bach wrote it.", " Really."));
  EXPECT_THAT(Sentences("It cost 3.50 in 1900, c. five pounds."),
              ElementsAre("It cost 3.50 in 1900, c. five pounds."));
  EXPECT_THAT(Sentences("He said \"No.\" Then he left."),
              ElementsAre("He said \"No.\"", " Then he left."));
  EXPECT_THAT(Sentences("A heading\nText without end"),
              ElementsAre("A heading\n", "Text without end"));
  EXPECT_THAT(Sentences("一。二！三"), ElementsAre("一。", "二！", "三"));
  EXPECT_THAT(SentenceEnds(""), ElementsAre());
}

class CutReferencesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    tokenizer_ = OpenTokenizer("transformer/testdata/spm_tiny", {.vocab_size = 1 << 20}).value();
  }
  std::unique_ptr<Tokenizer> tokenizer_;
};

// Whatever the text: within the limit, with the title, nothing but white space lost, whole
// characters, what the tokenizer makes of the text.
TEST_F(CutReferencesTest, CoversEveryTextWithinTheLimit) {
  Random random({7});
  const std::vector<std::string> words = {"ab",   "cde",        "Rome", "é",    "日本",
                                          "1900", "\U0001F600", "x.y",  "(so)", "longerword"};
  for (int trial = 0; trial < 60; ++trial) {
    std::string text;
    const int n = 1 + static_cast<int>(random.Below(300));
    for (int w = 0; w < n; ++w) {
      text += words[random.Below(words.size())];
      const uint64_t kind = random.Below(12);
      text += kind == 0 ? ". " : kind == 1 ? "\n" : trial % 3 == 0 ? "" : " ";
    }
    const std::string title = trial % 4 == 0   ? ""
                              : trial % 4 == 1 ? std::string(400, 'T')
                                               : "A Title";
    const int limit = trial % 2 == 0 ? 128 : 24;
    const auto cut = CutReferences(title, text, *tokenizer_, limit);
    ASSERT_TRUE(cut.ok()) << cut.status();
    size_t at = 0;
    for (const CutReference& r : *cut) {
      for (; at < r.begin; ++at) EXPECT_TRUE(isspace(text[at])) << at;
      EXPECT_LE(static_cast<int>(r.token_ids.size()), limit);
      EXPECT_EQ(r.token_ids, tokenizer_->Encode(r.text));
      const std::string piece = text.substr(r.begin, r.end - r.begin);
      EXPECT_TRUE(r.text.ends_with(piece));
      EXPECT_NE(static_cast<unsigned char>(piece[0]) & 0xC0, 0x80) << "inside a character";
      if (trial % 4 >= 2) {
        EXPECT_EQ(r.text, absl::StrCat(title, "\n", piece));
      }
      if (trial % 4 == 0) {
        EXPECT_EQ(r.text, piece);
      }
      at = r.end;
    }
    for (; at < text.size(); ++at) EXPECT_TRUE(isspace(text[at])) << at;
  }
}

TEST_F(CutReferencesTest, KeepsSentencesWholeAndFillsReferences) {
  std::string text;
  for (int i = 0; i < 40; ++i) absl::StrAppend(&text, "The town number ", i, " has a mill. ");
  const auto cut = CutReferences("Towns", text, *tokenizer_, 128).value();
  ASSERT_GT(cut.size(), 2u);
  for (size_t i = 0; i < cut.size(); ++i) {
    EXPECT_TRUE(cut[i].text.ends_with("has a mill."));
    if (i + 1 < cut.size()) {
      EXPECT_GT(cut[i].token_ids.size(), 90u);
    }
  }
}

TEST_F(CutReferencesTest, RefusesAndReturnsNothing) {
  EXPECT_TRUE(CutReferences("T", "", *tokenizer_, 128).value().empty());
  EXPECT_TRUE(CutReferences("T", " \n ", *tokenizer_, 128).value().empty());
  EXPECT_THAT(std::string(CutReferences("T", "x", *tokenizer_, 15).status().message()),
              HasSubstr("reference_tokens"));
}

}  // namespace
}  // namespace memory3
