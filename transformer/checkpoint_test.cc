#include "transformer/checkpoint.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "transformer/atomic_file.h"
#include "transformer/bf16.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::HasSubstr;

constexpr char kTestData[] = "transformer/testdata/";

// A copy of one of the model directories, to be damaged.
class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::path(testing::TempDir()) /
           ("m3.checkpoint." + std::to_string(::getpid()) + "." +
            testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  void CopyModel(const std::string& name) {
    fs::remove_all(dir_);
    fs::copy(kTestData + name, dir_);
    for (const auto& entry : fs::directory_iterator(dir_)) {
      fs::permissions(entry, fs::perms::owner_all, fs::perm_options::add);
    }
  }
  std::string Path(const std::string& name) const { return (dir_ / name).string(); }
  json ReadJson(const std::string& name) const {
    return json::parse(*ReadSmallFile(Path(name), 1 << 20));
  }
  void WriteJson(const std::string& name, const json& j) const {
    ASSERT_TRUE(WriteFileAtomically(Path(name), j.dump()).ok());
  }
  void SetConfig(const std::string& field, const json& value) const {
    json j = ReadJson("config.json");
    j[field] = value;
    WriteJson("config.json", j);
  }
  // Rewrites the header of a safetensors file.
  template <typename F>
  void EditHeader(const std::string& name, F edit) const {
    const std::string file = *ReadSmallFile(Path(name), 1 << 20);
    uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    json header = json::parse(file.substr(8, length));
    std::string data = file.substr(8 + length);
    edit(header, data);
    const std::string text = header.dump();
    length = text.size();
    std::string out(8, '\0');
    std::memcpy(out.data(), &length, 8);
    ASSERT_TRUE(WriteFileAtomically(Path(name), out + text + data).ok());
  }
  // A tensor of `bytes` bytes at the end of the file.
  void AddTensor(const std::string& file, const std::string& name, const json& shape,
                 int bytes) const {
    EditHeader(file, [&](json& header, std::string& data) {
      header[name] = {
          {"dtype", "F32"}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + bytes}}};
      data += std::string(bytes, '\0');
    });
  }
  void ExpectRefused(const std::vector<std::string>& words, absl::StatusCode code) const {
    const auto c = Checkpoint::Open(dir_.string());
    ASSERT_FALSE(c.ok());
    EXPECT_EQ(c.status().code(), code) << c.status();
    for (const std::string& word : words) {
      EXPECT_THAT(std::string(c.status().message()), HasSubstr(word));
    }
  }

  fs::path dir_;
};

TEST_F(CheckpointTest, OpensWhatTransformersSaves) {
  for (const std::string name :
       {"llama_mha", "llama_gqa", "llama_tied", "llama_rope_theta", "llama_rope_linear",
        "llama_rope_llama3", "llama_head_dim", "llama_sharded", "llama_bf16", "llama_f16"}) {
    const auto c = Checkpoint::Open(kTestData + name);
    ASSERT_TRUE(c.ok()) << c.status();
    int64_t total = 0;
    for (const ModelTensor& t : ModelTensors((*c)->config())) {
      std::vector<float> values(t.rows * t.cols);
      ASSERT_TRUE((*c)->Read(t.name, t.rows, t.cols, values).ok()) << t.name;
      double sum = 0;
      for (float v : values) sum += std::abs(v);
      EXPECT_GT(sum, 0) << t.name;
      EXPECT_LT(sum / values.size(), 4) << t.name;
      total += t.rows * t.cols;
    }
    EXPECT_EQ(total, (*c)->config().parameter_count()) << name;
    EXPECT_EQ((*c)->weight_files().size(), name == "llama_sharded" ? 2 : 1);
  }
}

TEST_F(CheckpointTest, ReadChecksNameAndShape) {
  const auto c = *Checkpoint::Open(std::string(kTestData) + "llama_tied");
  std::vector<float> out(80 * 32);
  EXPECT_TRUE(c->Read("model.embed_tokens.weight", 80, 32, out).ok());
  EXPECT_EQ(c->Read("model.embed_tokens.weight", 32, 80, out).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(c->Read("model.embed_tokens.weight", 80, 31, out).code(),
            absl::StatusCode::kInvalidArgument);
  const absl::Status none = c->Read("lm_head.weight", 80, 32, out);
  EXPECT_EQ(none.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(none.message()), HasSubstr("lm_head.weight"));
}

TEST_F(CheckpointTest, NamesMissingFiles) {
  CopyModel("llama_sharded");
  fs::remove(dir_ / "model-00002-of-00002.safetensors");
  ExpectRefused({"model-00002-of-00002.safetensors"}, absl::StatusCode::kNotFound);
  fs::remove(dir_ / "model.safetensors.index.json");
  ExpectRefused({"model.safetensors", "index"}, absl::StatusCode::kNotFound);
  fs::remove(dir_ / "config.json");
  ExpectRefused({"config.json"}, absl::StatusCode::kNotFound);
}

TEST_F(CheckpointTest, NamesAMissingTensor) {
  CopyModel("llama_gqa");
  SetConfig("num_hidden_layers", 3);
  ExpectRefused({"no tensor model.layers.2."}, absl::StatusCode::kNotFound);
  CopyModel("llama_tied");
  SetConfig("tie_word_embeddings", false);
  ExpectRefused({"no tensor lm_head.weight"}, absl::StatusCode::kNotFound);
}

TEST_F(CheckpointTest, NamesAWrongShape) {
  CopyModel("llama_gqa");
  SetConfig("intermediate_size", 47);
  ExpectRefused(
      {"model.safetensors", "model.layers.0.mlp.down_proj.weight", "[48, 48]", "[48, 47]"},
      absl::StatusCode::kInvalidArgument);
  CopyModel("llama_gqa");
  EditHeader("model.safetensors", [](json& header, std::string&) {
    header["model.norm.weight"]["shape"] = {2, 24};
  });
  ExpectRefused({"model.norm.weight", "[2, 24]", "[48]"}, absl::StatusCode::kInvalidArgument);
}

TEST_F(CheckpointTest, NamesAWrongType) {
  CopyModel("llama_gqa");
  EditHeader("model.safetensors",
             [](json& header, std::string&) { header["model.norm.weight"]["dtype"] = "I32"; });
  ExpectRefused({"model.norm.weight", "dtype I32"}, absl::StatusCode::kInvalidArgument);
}

TEST_F(CheckpointTest, NamesATruncatedFile) {
  CopyModel("llama_gqa");
  fs::resize_file(dir_ / "model.safetensors", fs::file_size(dir_ / "model.safetensors") - 1);
  ExpectRefused({"model.safetensors", "truncated"}, absl::StatusCode::kDataLoss);
  fs::resize_file(dir_ / "model.safetensors", 100);
  ExpectRefused({"model.safetensors", "truncated"}, absl::StatusCode::kDataLoss);
}

TEST_F(CheckpointTest, NamesALyingHeader) {
  CopyModel("llama_gqa");
  EditHeader("model.safetensors", [](json& header, std::string&) {
    header["model.norm.weight"]["data_offsets"] = {0, 192};
  });
  ExpectRefused({"model.safetensors", "data_offsets"}, absl::StatusCode::kInvalidArgument);
}

TEST_F(CheckpointTest, NamesAnUnknownArchitecture) {
  CopyModel("llama_gqa");
  SetConfig("architectures", {"Qwen2ForCausalLM"});
  ExpectRefused({"config.json", "architectures", "Qwen2ForCausalLM"},
                absl::StatusCode::kInvalidArgument);
}

TEST_F(CheckpointTest, RefusesTensorsALlamaDoesNotHave) {
  CopyModel("llama_gqa");
  AddTensor("model.safetensors", "model.layers.0.self_attn.q_proj.bias", {2}, 8);
  ExpectRefused({"q_proj.bias", "not part of"}, absl::StatusCode::kInvalidArgument);
  CopyModel("llama_gqa");
  SetConfig("num_hidden_layers", 1);
  ExpectRefused({"model.layers.1.", "not part of"}, absl::StatusCode::kInvalidArgument);
  CopyModel("llama_gqa");
  AddTensor("model.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq", {2}, 8);
  EXPECT_TRUE(Checkpoint::Open(dir_.string()).ok());
}

TEST_F(CheckpointTest, ATiedHeadMustEqualTheEmbedding) {
  CopyModel("llama_tied");
  const int bytes = 80 * 32 * 4;
  EditHeader("model.safetensors", [&](json& header, std::string& data) {
    const uint64_t begin = header["model.embed_tokens.weight"]["data_offsets"][0];
    header["lm_head.weight"] = {{"dtype", "F32"},
                                {"shape", {80, 32}},
                                {"data_offsets", {data.size(), data.size() + bytes}}};
    data += data.substr(begin, bytes);
  });
  EXPECT_TRUE(Checkpoint::Open(dir_.string()).ok());
  EditHeader("model.safetensors", [](json&, std::string& data) { data.back() ^= 1; });
  ExpectRefused({"lm_head.weight", "tie_word_embeddings"}, absl::StatusCode::kInvalidArgument);
}

TEST_F(CheckpointTest, RefusesBadIndexes) {
  const json bad[] = {json::array(),
                      {{"weight_map", nullptr}},
                      {{"weight_map", json::object()}},
                      {{"weight_map", {{"a", 1}}}},
                      {{"weight_map", {{"a", "../llama_gqa/model.safetensors"}}}},
                      {{"weight_map", {{"a", "/etc/passwd"}}}}};
  for (const json& index : bad) {
    CopyModel("llama_sharded");
    WriteJson("model.safetensors.index.json", index);
    ExpectRefused({"model.safetensors.index.json", "weight_map"},
                  absl::StatusCode::kInvalidArgument);
  }
  CopyModel("llama_sharded");
  fs::copy(dir_ / "model-00001-of-00002.safetensors", dir_ / "twice.safetensors");
  json index = ReadJson("model.safetensors.index.json");
  index["weight_map"]["more"] = "twice.safetensors";
  WriteJson("model.safetensors.index.json", index);
  ExpectRefused({"twice.safetensors", "as well"}, absl::StatusCode::kInvalidArgument);
}

TEST_F(CheckpointTest, SavesWhatItOpens) {
  for (const std::string name : {"llama_gqa", "llama_tied", "llama_sharded", "llama_rope_llama3"}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      fs::remove_all(dir_);
      const auto c = *Checkpoint::Open(kTestData + name);
      const auto fill = [&](const ModelTensor& t, std::span<float> out) {
        return c->Read(t.name, t.rows, t.cols, out);
      };
      ASSERT_TRUE(SaveModelDirectory(dir_.string(), c->config(), dtype, fill, "").ok());
      const auto saved = Checkpoint::Open(dir_.string());
      ASSERT_TRUE(saved.ok()) << saved.status();
      EXPECT_EQ(ModelConfigToJson((*saved)->config()), ModelConfigToJson(c->config()));
      for (const ModelTensor& t : ModelTensors(c->config())) {
        std::vector<float> a(t.rows * t.cols), b(t.rows * t.cols);
        ASSERT_TRUE(c->Read(t.name, t.rows, t.cols, a).ok());
        ASSERT_TRUE((*saved)->Read(t.name, t.rows, t.cols, b).ok());
        if (dtype == DType::kBF16) {
          for (float& v : a) v = Bf16ToFloat(FloatToBf16(v));
        }
        ASSERT_EQ(a, b) << t.name;
      }
      EXPECT_EQ(SaveModelDirectory(dir_.string(), c->config(), dtype, fill, "").code(),
                absl::StatusCode::kAlreadyExists);
    }
  }
}

TEST_F(CheckpointTest, SaveNamesAMissingTokenizer) {
  const auto c = *Checkpoint::Open(std::string(kTestData) + "llama_tied");
  const auto fill = [&](const ModelTensor& t, std::span<float> out) {
    return c->Read(t.name, t.rows, t.cols, out);
  };
  const absl::Status status =
      SaveModelDirectory(dir_.string(), c->config(), DType::kF32, fill, kTestData);
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(fs::exists(dir_ / "config.json"));
}

// Another implementation reads what we write.
TEST_F(CheckpointTest, SafetensorsReadsWhatWeSave) {
  if (!fs::exists(".venv/bin/python")) {
    GTEST_SKIP() << "no .venv (tools/setup makes it): not compared with Python's safetensors";
  }
  const auto c = *Checkpoint::Open(std::string(kTestData) + "llama_gqa");
  const auto fill = [&](const ModelTensor& t, std::span<float> out) {
    return c->Read(t.name, t.rows, t.cols, out);
  };
  ASSERT_TRUE(SaveModelDirectory(dir_.string(), c->config(), DType::kF32, fill, "").ok());
  const std::string command = ".venv/bin/python tests/goldens/compare_safetensors.py " +
                              Path("model.safetensors") + " " + kTestData +
                              "llama_gqa/model.safetensors";
  EXPECT_EQ(std::system(command.c_str()), 0) << command;
}

}  // namespace
}  // namespace memory3
