#include "transformer/fingerprint.h"

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <set>
#include <string>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "transformer/atomic_file.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kMax = 16 << 20;
constexpr char kCache[] = ".memory3_tensors.json";
constexpr char kSpm[] = "transformer/testdata/spm_tiny/tokenizer.model";

std::unique_ptr<Tokenizer> OpenTokenizerFile(const std::string& path) {
  const std::string bytes = *ReadSmallFile(path, kMax);
  return path.ends_with(".model") ? *MakeSentencePieceTokenizer(bytes, path)
                                  : *MakeBpeTokenizer(bytes, "<|begin_of_text|>", "", path);
}

ExplicitMemoryConfig Memory(const json& j) {
  ExplicitMemoryConfig m;
  m.memory_layers = j["memory_layers"].get<std::vector<int>>();
  m.tokens_kept = j["tokens_kept"];
  m.reference_tokens = j["reference_tokens"];
  m.prefix_token_ids = j["prefix_token_ids"].get<std::vector<int32_t>>();
  return m;
}

class FingerprintTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::path(testing::TempDir()) /
           ("m3.fingerprint." + std::to_string(::getpid()) + "." +
            testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  // Tests never write beside the committed models.
  void Copy(const std::string& model) {
    fs::remove_all(dir_);
    fs::copy(model, dir_);
    for (const auto& entry : fs::directory_iterator(dir_)) {
      fs::permissions(entry, fs::perms::owner_all, fs::perm_options::add);
    }
  }
  std::string Fingerprint(const ExplicitMemoryConfig& memory, const std::string& tokenizer = kSpm) {
    const auto checkpoint = Checkpoint::Open(dir_.string());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto hash = WriterFingerprint(**checkpoint, *OpenTokenizerFile(tokenizer), memory);
    EXPECT_TRUE(hash.ok()) << hash.status();
    return hash->ToHex();
  }

  const ExplicitMemoryConfig memory_ = Memory({{"memory_layers", {0}},
                                               {"tokens_kept", 8},
                                               {"reference_tokens", 128},
                                               {"prefix_token_ids", {1, 9}}});
  fs::path dir_;
};

TEST_F(FingerprintTest, IsThatOfTheIndependentScript) {
  const json vectors =
      *ParseJson(*ReadSmallFile("transformer/testdata/fingerprints.json", kMax), "fingerprints");
  ASSERT_GE(vectors.size(), 10);
  std::set<std::string> all;
  for (const json& v : vectors) {
    Copy(v["model"]);
    EXPECT_EQ(Fingerprint(Memory(v["memory"]), v["tokenizer"]), v["fingerprint"]) << v;
    EXPECT_TRUE(fs::exists(dir_ / kCache));
    EXPECT_EQ(Fingerprint(Memory(v["memory"]), v["tokenizer"]), v["fingerprint"]) << "cached " << v;
    all.insert(v["fingerprint"]);
  }
  EXPECT_EQ(all.size(), vectors.size());  // each difference counts
}

TEST_F(FingerprintTest, DoesNotDependOnSharding) {
  Copy("transformer/testdata/llama_sharded");
  const std::string sharded = Fingerprint(memory_);
  const auto checkpoint = *Checkpoint::Open("transformer/testdata/llama_sharded");
  fs::remove_all(dir_);
  ASSERT_TRUE(SaveModelDirectory(
                  dir_.string(), checkpoint->config(), DType::kF32,
                  [&](const ModelTensor& t, std::span<float> out) {
                    return checkpoint->Read(t.name, t.rows, t.cols, out);
                  },
                  "")
                  .ok());
  EXPECT_EQ(Fingerprint(memory_), sharded);
}

TEST_F(FingerprintTest, SeesAFlippedBitThroughItsCache) {
  Copy("transformer/testdata/llama_gqa");
  const std::string before = Fingerprint(memory_);
  const std::string path = (dir_ / "model.safetensors").string();
  const auto modified = fs::last_write_time(path);
  std::string bytes = *ReadSmallFile(path, kMax);
  bytes.back() ^= 1;
  ASSERT_TRUE(WriteFileAtomically(path, bytes).ok());
  fs::last_write_time(path, modified + std::chrono::seconds(1));
  EXPECT_NE(Fingerprint(memory_), before);
  bytes.back() ^= 1;
  ASSERT_TRUE(WriteFileAtomically(path, bytes).ok());
  fs::last_write_time(path, modified + std::chrono::seconds(2));
  EXPECT_EQ(Fingerprint(memory_), before);
}

TEST_F(FingerprintTest, ReadsAndDistrustsItsCache) {
  Copy("transformer/testdata/llama_gqa");
  const std::string good = Fingerprint(memory_);
  const std::string path = (dir_ / kCache).string();
  json cache = json::parse(*ReadSmallFile(path, kMax));
  // The cache is used: another digest in it shows.
  cache["digest"] = std::string(64, 'a');
  ASSERT_TRUE(WriteFileAtomically(path, cache.dump()).ok());
  EXPECT_NE(Fingerprint(memory_), good);
  // Anything that does not fit is not.
  for (const std::string& text :
       {std::string("nonsense"), std::string("[]"), std::string("{}"), std::string()}) {
    ASSERT_TRUE(WriteFileAtomically(path, text).ok());
    EXPECT_EQ(Fingerprint(memory_), good);
  }
  cache["digest"] = "xyz";
  ASSERT_TRUE(WriteFileAtomically(path, cache.dump()).ok());
  EXPECT_EQ(Fingerprint(memory_), good);
}

TEST_F(FingerprintTest, AnUnwritableCacheIsNoError) {
  Copy("transformer/testdata/llama_gqa");
  const std::string good = Fingerprint(memory_);
  // A directory in the cache's place: it can be neither read nor written, even by root.
  fs::remove(dir_ / kCache);
  fs::create_directory(dir_ / kCache);
  EXPECT_EQ(Fingerprint(memory_), good);
}

TEST_F(FingerprintTest, IgnoresWhatDoesNotChangeTheForwardPass) {
  Copy("transformer/testdata/llama_gqa");
  const std::string good = Fingerprint(memory_);
  const std::string path = (dir_ / "config.json").string();
  json config = json::parse(*ReadSmallFile(path, kMax));
  config["max_position_embeddings"] = 1024;
  config["eos_token_id"] = 5;
  config["transformers_version"] = "4";
  ASSERT_TRUE(WriteFileAtomically(path, config.dump()).ok());
  EXPECT_EQ(Fingerprint(memory_), good);
  config["rms_norm_eps"] = 1e-6;
  ASSERT_TRUE(WriteFileAtomically(path, config.dump()).ok());
  EXPECT_NE(Fingerprint(memory_), good);
}

}  // namespace
}  // namespace memory3
