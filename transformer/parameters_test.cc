#include "transformer/parameters.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "transformer/checkpoint.h"

namespace memory3 {
namespace {

ModelConfig Config(bool tied) {
  ModelConfig c;
  c.vocab_size = 50;
  c.hidden_size = 16;
  c.intermediate_size = 24;
  c.layers = 3;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 6;
  c.tie_word_embeddings = tied;
  c.bos_token_id = 1;
  return c;
}

std::unique_ptr<Device> Cpu() { return MakeCpuDevice({.threads = 1}).value(); }

TEST(ParametersTest, TheListIsTheModel) {
  for (const bool tied : {true, false}) {
    const auto device = Cpu();
    const auto parameters = Parameters::Create(device.get(), Config(tied)).value();
    std::set<std::string> names;
    int64_t offset = 0;
    for (const Parameter& p : parameters->list()) {
      EXPECT_EQ(p.offset, offset) << p.name;
      EXPECT_EQ(p.decay, p.cols > 1) << p.name << ": matrices decay, norms do not";
      EXPECT_EQ(p.decay, p.offset < parameters->decayed()) << p.name << ": matrices first";
      names.insert(p.name);
      offset += p.size();
    }
    EXPECT_EQ(parameters->size(), offset);
    std::set<std::string> want;
    for (const ModelTensor& t : ModelTensors(Config(tied))) want.insert(t.name);
    EXPECT_EQ(names, want);
  }
}

TEST(ParametersTest, FusedWeightsAreTheirParts) {
  const auto device = Cpu();
  const auto parameters = Parameters::Create(device.get(), Config(true)).value();
  ASSERT_TRUE(parameters->Load(InitialParameters(3, 3)).ok());
  const auto flat = parameters->AllocateLike().value();
  const ModelGradients views = parameters->GradientViews(flat.as<float>());
  for (const Parameter& p : parameters->list()) {
    if (p.name == "model.layers.1.self_attn.v_proj.weight") {
      // Behind q (4 heads) and k (2 heads) of 6.
      EXPECT_EQ(views.layers[1].qkv.Rows(36, 12).as<float>(), flat.as<float>() + p.offset);
    }
    if (p.name == "model.layers.2.mlp.up_proj.weight") {
      EXPECT_EQ(views.layers[2].gate_up.Rows(24, 24).as<float>(), flat.as<float>() + p.offset);
    }
  }
  EXPECT_EQ(views.lm_head.data, views.embedding.data);
  EXPECT_EQ(parameters->model().layer(1).qkv->out(), 48);
}

TEST(ParametersTest, InitialValuesFollowTheRuleAndTheSeed) {
  ModelConfig config = Config(false);
  config.hidden_size = 64;
  config.intermediate_size = 128;
  config.layers = 8;
  const auto device = Cpu();
  const auto a = Parameters::Create(device.get(), config).value();
  const auto b = Parameters::Create(device.get(), config).value();
  ASSERT_TRUE(a->Load(InitialParameters(5, config.layers)).ok());
  ASSERT_TRUE(b->Load(InitialParameters(6, config.layers)).ok());
  for (const Parameter& p : a->list()) {
    std::vector<float> values(p.size()), others(p.size());
    ASSERT_TRUE(a->Download(p, values).ok());
    ASSERT_TRUE(b->Download(p, others).ok());
    double sum = 0, squares = 0;
    for (const float v : values) {
      sum += v;
      squares += double{v} * v;
    }
    if (!p.decay) {
      EXPECT_EQ(sum, p.size()) << p.name;
      continue;
    }
    EXPECT_NE(values, others) << p.name;
    const bool residual =
        p.name.find("o_proj") != p.name.npos || p.name.find("down") != p.name.npos;
    const double deviation = residual ? 0.02 / 4 : 0.02;  // 1/sqrt(2*8) = 1/4
    EXPECT_NEAR(std::sqrt(squares / p.size()) / deviation, 1, 0.1) << p.name;
  }
}

TEST(ParametersTest, SavedAndLoadedTheyAreTheSameBits) {
  const std::string directory = absl::StrCat(::testing::TempDir(), "/parameters_test_", getpid());
  std::filesystem::remove_all(directory);
  const auto device = Cpu();
  const auto saved = Parameters::Create(device.get(), Config(false)).value();
  ASSERT_TRUE(saved->Load(InitialParameters(3, 3)).ok());
  absl::Status status = saved->Save(directory, DType::kF32, "");
  ASSERT_TRUE(status.ok()) << status;
  const auto checkpoint = Checkpoint::Open(directory);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto loaded = Parameters::Create(device.get(), (*checkpoint)->config()).value();
  ASSERT_TRUE(loaded->Load(**checkpoint).ok());
  for (const Parameter& p : saved->list()) {
    std::vector<float> a(p.size()), b(p.size());
    ASSERT_TRUE(saved->Download(p, a).ok());
    ASSERT_TRUE(loaded->Download(p, b).ok());
    EXPECT_EQ(a, b) << p.name;
  }
  std::filesystem::remove_all(directory);
}

TEST(ParametersTest, OnlyMatricesDecay) {
  const auto device = Cpu();
  const auto parameters = Parameters::Create(device.get(), Config(true)).value();
  ASSERT_TRUE(parameters->Load(InitialParameters(3, 3)).ok());
  const Buffer zero = parameters->AllocateLike().value();
  Buffer m = parameters->AllocateLike().value(), v = parameters->AllocateLike().value();
  std::vector<std::vector<float>> before;
  for (const Parameter& p : parameters->list()) {
    before.emplace_back(p.size());
    ASSERT_TRUE(parameters->Download(p, before.back()).ok());
  }
  parameters->AdamWStep(zero.as<float>(), m.as<float>(), v.as<float>(),
                        {.learning_rate = 0.5f, .weight_decay = 0.5f}, 1);
  for (size_t i = 0; i < before.size(); ++i) {
    const Parameter& p = parameters->list()[i];
    std::vector<float> after(p.size());
    ASSERT_TRUE(parameters->Download(p, after).ok());
    for (int64_t j = 0; j < p.size(); ++j) {
      ASSERT_EQ(after[j], before[i][j] * (p.decay ? 0.75f : 1.0f)) << p.name;
    }
  }
}

TEST(ParametersTest, AnImpossibleShapeIsRefusedByField) {
  const auto device = Cpu();
  ModelConfig config = Config(true);
  config.kv_heads = 3;
  const absl::Status status = Parameters::Create(device.get(), config).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("num_key_value_heads"));
}

}  // namespace
}  // namespace memory3
