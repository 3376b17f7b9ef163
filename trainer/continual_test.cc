// Continual training's batches: what is read where, what the filters reject, that only content
// tells where a copied value is.
#include "trainer/continual.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "trainer/copy_evaluation.h"
#include "trainer/copying_parameters.h"
#include "trainer/sentencepiece_training.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

ModelConfig TinyConfig(int vocab) {
  ModelConfig c;
  c.vocab_size = vocab;
  c.hidden_size = 32;
  c.intermediate_size = 64;
  c.layers = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 8;
  c.bos_token_id = 1;
  c.tie_word_embeddings = true;
  c.explicit_memory = ExplicitMemoryConfig{.memory_layers = {0, 1}, .prefix_token_ids = {1, 5, 6}};
  return c;
}

std::string Letter(Random* random) {
  return std::string(1, static_cast<char>('a' + random->Below(26)));
}

TEST(OverlapTest, IsTheCommonSubsequenceWithinTwiceTheReference) {
  const std::vector<int32_t> reference = {1, 2, 3, 4};
  EXPECT_DOUBLE_EQ(Overlap(reference, std::vector<int32_t>{9, 1, 2, 3, 4, 9, 9}), 1);
  EXPECT_DOUBLE_EQ(Overlap(reference, std::vector<int32_t>{1, 9, 2, 9, 3, 9, 4}), 1);
  EXPECT_DOUBLE_EQ(Overlap(reference, std::vector<int32_t>{4, 3, 2, 1}), 0.25);
  EXPECT_DOUBLE_EQ(Overlap(reference, std::vector<int32_t>{7, 8}), 0);
  EXPECT_DOUBLE_EQ(Overlap(reference, {}), 0);
  // Farther apart than twice the reference: not one stretch.
  std::vector<int32_t> far(40, 9);
  far[0] = 1, far[1] = 2, far[38] = 3, far[39] = 4;
  EXPECT_DOUBLE_EQ(Overlap(reference, far), 0.5);
}

TEST(StepScheduleTest, ParsesAndRefuses) {
  const StepSchedule s = StepSchedule::Parse("128@0,32@10,8@20", "tokens_kept", 1, 128).value();
  EXPECT_EQ(s.At(0), 128);
  EXPECT_EQ(s.At(9), 128);
  EXPECT_EQ(s.At(10), 32);
  EXPECT_EQ(s.At(1000), 8);
  for (const char* bad : {"", "8", "8@1", "8@0,4@0", "129@0", "0@0", "x@0", "8@0,"}) {
    EXPECT_THAT(std::string(StepSchedule::Parse(bad, "tokens_kept", 1, 128).status().message()),
                HasSubstr("tokens_kept"))
        << bad;
  }
}

TEST(CopyExerciseTest, EveryValueFollowsFromWhatIsReadAndFromNothingElse) {
  const ModelConfig config = TinyConfig(5000);
  for (const CopyLevel level :
       {CopyLevel::kContext, CopyLevel::kOneMemory, CopyLevel::kFiveMemories}) {
    std::map<int, int> distances;
    for (uint64_t seed = 0; seed < 20; ++seed) {
      TrainingBatch batch;
      batch.layout = TrainingBatch::Layout::kMemory;
      const auto queries = AddPairExercise(config, level, 257, Random({seed}), &batch);
      ASSERT_TRUE(TrainingLayout::Create(config, batch).ok());
      const TrainingSequence& s = batch.sequences[0];
      ASSERT_EQ(s.token_ids.size(), 257u);
      ASSERT_FALSE(queries.empty());
      int targets = 0;
      for (const int32_t t : s.targets) targets += t >= 0;
      EXPECT_EQ(targets, 3 * static_cast<int>(queries.size()));
      for (const CopyQuery& q : queries) {
        std::vector<int32_t> pair(s.token_ids.begin() + q.key_end - 1,
                                  s.token_ids.begin() + q.key_end + 1);
        pair.insert(pair.end(), s.targets.begin() + q.key_end, s.targets.begin() + q.key_end + 3);
        // Where it stood before: within the chunk's references, or earlier in the context.
        int found = 0;
        const auto look = [&](std::span<const int32_t> text, int limit) {
          for (int i = 0; i + 5 <= std::min<int>(limit, static_cast<int>(text.size())); ++i) {
            if (!std::equal(pair.begin(), pair.end(), text.begin() + i)) continue;
            ++found;
            ++distances[q.key_end - i];
          }
        };
        if (level == CopyLevel::kContext) {
          look(s.token_ids, q.key_end - 1);
        } else {
          const auto& reads = s.chunk_references[(q.key_end - 1) / 64];
          EXPECT_EQ(reads.size(), level == CopyLevel::kOneMemory ? 1u : 5u);
          for (const int r : reads) look(batch.references[r], 128);
        }
        EXPECT_GE(found, 1);
      }
    }
    EXPECT_GT(distances.size(), 80u) << "distances are random";
  }
}

// Words of a small made-up language, documents of 300 tokens.
class AttachTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::vector<std::string> lines;
    Random random({3});
    for (int d = 0; d < 6; ++d) {
      std::string text;
      for (int w = 0; w < 260; ++w) {
        absl::StrAppend(&text, w ? " " : "", "w", d, Letter(&random), Letter(&random));
      }
      documents_.push_back(text);
      lines.push_back(text);
    }
    std::string model, error;
    ASSERT_TRUE(TrainSentencePiece(lines, 400, 1, &model, &error)) << error;
    tokenizer_ = MakeSentencePieceTokenizer(model, "test").value();
    path_ = fs::path(::testing::TempDir()) / absl::StrCat("attach_", getpid(), ".m3s");
    TokenShardBuilder builder(tokenizer_->file_hash(), tokenizer_->vocab_size());
    for (size_t d = 0; d < documents_.size(); ++d) {
      std::vector<int32_t> ids = tokenizer_->Encode(documents_[d]);
      ids.push_back(tokenizer_->eos_id());
      ASSERT_TRUE(builder.Add(absl::StrCat(d), "", ids).ok());
    }
    ASSERT_TRUE(builder.Write(path_.string()).ok());
    corpus_ = TokenCorpus::Open({path_.string()}, tokenizer_->file_hash()).value();
    auto embedder = MakeEmbedder("lexical");
    ASSERT_TRUE(embedder.ok()) << embedder.status();
    embedder_ = *std::move(embedder);
    index_ = ReferenceIndex::Build(corpus_.get(), tokenizer_.get(), embedder_.get(), {}, nullptr)
                 .value();
  }
  void TearDown() override { fs::remove(path_); }

  TrainingBatch Attach(const RetrievalOptions& options) {
    TrainingBatch batch;
    batch.layout = TrainingBatch::Layout::kMemory;
    const std::vector<Window> windows = {{0, 40}};
    batch.sequences.push_back(SequenceOf(*corpus_, windows[0], 193, 1));
    const absl::Status status =
        AttachReferences(config(), *tokenizer_, *corpus_, *index_, windows, options, 1, &batch);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(TrainingLayout::Create(config(), batch).ok());
    return batch;
  }
  const ModelConfig& config() {
    static const ModelConfig c = TinyConfig(400);
    return c;
  }

  std::vector<std::string> documents_;
  fs::path path_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<TokenCorpus> corpus_;
  std::unique_ptr<Embedder> embedder_;
  std::unique_ptr<ReferenceIndex> index_;
};

TEST_F(AttachTest, AChunkReadsItsOwnReferenceAndThoseOfTheChunksBefore) {
  const TrainingBatch batch = Attach({});
  const auto& reads = batch.sequences[0].chunk_references;
  ASSERT_EQ(reads.size(), 3u);
  for (size_t c = 1; c < reads.size(); ++c) {
    EXPECT_GE(reads[c].size(), reads[c - 1].size());
    for (const int r : reads[c - 1]) EXPECT_THAT(reads[c], ::testing::Contains(r));
  }
  EXPECT_EQ(reads[2].size(), 3u);
}

TEST_F(AttachTest, WhatOverlapsTheSequenceIsRejectedUnlessTheFilterIsOff) {
  const auto worst = [](const TrainingBatch& batch) {
    double most = 0;
    for (const auto& r : batch.references) {
      most = std::max(most, Overlap(r, batch.sequences[0].targets));
    }
    return most;
  };
  EXPECT_LE(worst(Attach({.overlap_limit = 0.6})), 0.6);
  EXPECT_GT(worst(Attach({.overlap_limit = 1})), 0.6) << "its own text is nearest";
}

TEST_F(AttachTest, ThePreviousChunkIsTheQueryAndTheOwnDocumentLeftOutWhereAsked) {
  const TrainingBatch batch =
      Attach({.own_chunk_query = false, .share_previous = false, .leave_out_document = true});
  const auto& reads = batch.sequences[0].chunk_references;
  EXPECT_TRUE(reads[0].empty()) << "nothing stands before the first chunk";
  for (const auto& r : batch.references) {
    EXPECT_EQ(tokenizer_->DecodeQuery(r).find("w0"), std::string::npos);
  }
}

TEST_F(AttachTest, APieceOfTheSameDocumentSharesNoTokenWithTheWindow) {
  const Window window = {0, 200};
  std::set<std::vector<int32_t>> pieces;
  for (uint64_t i = 0; i < 30; ++i) {
    const auto piece = index_->FromSameDocument(*corpus_, window, 64, 210, i);
    ASSERT_EQ(piece.size(), 128u);
    pieces.insert(piece);
    EXPECT_NE(tokenizer_->DecodeQuery(piece).find("w0"), std::string::npos);
    EXPECT_EQ(tokenizer_->DecodeQuery(piece).find("w1"), std::string::npos);
  }
  EXPECT_GT(pieces.size(), 5u);
}

TEST(RunExerciseTest, EveryTargetStandsInWhatIsRead) {
  const ModelConfig config = TinyConfig(5000);
  for (const CopyLevel level :
       {CopyLevel::kContext, CopyLevel::kOneMemory, CopyLevel::kFiveMemories}) {
    for (uint64_t seed = 0; seed < 10; ++seed) {
      TrainingBatch batch;
      batch.layout = TrainingBatch::Layout::kMemory;
      for (int i = 0; i < 3; ++i) {
        AddRunExercise(config, level, nullptr, 193, Random({seed, static_cast<uint64_t>(i)}),
                       &batch);
      }
      ASSERT_TRUE(TrainingLayout::Create(config, batch).ok());
      for (const TrainingSequence& s : batch.sequences) {
        int targets = 0;
        for (int i = 0; i < 192; ++i) {
          if (s.targets[i] < 0) continue;
          ++targets;
          ASSERT_EQ(s.targets[i], s.token_ids[i + 1]);
          // The token and the one before it follow each other somewhere that is read.
          const std::vector<int32_t> pair = {s.token_ids[i], s.targets[i]};
          bool found = false;
          const auto look = [&](std::span<const int32_t> text) {
            found = found ||
                    std::search(text.begin(), text.end(), pair.begin(), pair.end()) != text.end();
          };
          if (level == CopyLevel::kContext) {
            look(std::span(s.token_ids).first(i + 1));
          } else {
            // The next token's chunk is what its run was copied from.
            for (const int r : s.chunk_references[i / 64]) look(batch.references[r]);
          }
          EXPECT_TRUE(found) << i;
        }
        EXPECT_GT(targets, 90);
        for (const auto& reads : s.chunk_references) {
          EXPECT_EQ(reads.size(), level == CopyLevel::kOneMemory ? 1u : 5u);
        }
      }
      if (level == CopyLevel::kFiveMemories) {
        EXPECT_LT(batch.references.size(), 3u * 3 * 5) << "references are shared";
      }
    }
  }
}

TEST(CopyingParametersTest, CopyFromContextAndMemoriesBeforeAnyTraining) {
  ModelConfig config = TinyConfig(1000);
  config.hidden_size = 256;
  config.heads = config.kv_heads = 8;
  config.head_dim = 32;
  config.rope_theta = 500000;
  config.explicit_memory->memory_layers = {1};
  auto device = MakeCpuDevice({.threads = 1}).value();
  auto parameters = Parameters::Create(device.get(), config).value();
  ASSERT_TRUE(parameters->Load(*CopyingParameters::Create(config, 1).value()).ok());
  for (const CopyLevel level : {CopyLevel::kContext, CopyLevel::kOneMemory}) {
    const auto match = CopyExactMatch(*parameters, level, 128, 30, 1);
    ASSERT_TRUE(match.ok()) << match.status();
    EXPECT_GT(*match, 0.5) << CopyLevelName(level);
  }
  config.kv_heads = 4;
  EXPECT_THAT(std::string(CopyingParameters::Create(config, 1).status().message()),
              HasSubstr("num_key_value_heads"));
}

TEST(CopyExactMatchTest, AFreshModelReadsNothing) {
  auto device = MakeCpuDevice({.threads = 1}).value();
  auto parameters = Parameters::Create(device.get(), TinyConfig(300)).value();
  ASSERT_TRUE(parameters->Load(InitialParameters(1, 2)).ok());
  for (const int kept : {128, 8}) {
    const auto match = CopyExactMatch(*parameters, CopyLevel::kFiveMemories, kept, 10, 1);
    ASSERT_TRUE(match.ok()) << match.status();
    EXPECT_EQ(*match, 0);
  }
  EXPECT_TRUE(CopyExactMatch(*parameters, CopyLevel::kContext, 8, 10, 1).ok());
}

}  // namespace
}  // namespace memory3
