#include "transformer/config.h"

#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "transformer/json.h"

namespace memory3 {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kSmall = 1 << 20;

json Base() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "rms_norm_eps": 1e-05})");
}

json WithMemory() {
  json j = Base();
  j["explicit_memory"] = {
      {"version", 1}, {"memory_layers", {0, 1}}, {"prefix_token_ids", {1, 7, 8}}};
  return j;
}

absl::StatusOr<ModelConfig> Parse(const json& j) {
  return ParseModelConfig(j.dump(), "config.json");
}

ModelConfig ParseOk(const json& j) {
  auto c = Parse(j);
  EXPECT_TRUE(c.ok()) << c.status();
  return c.ok() ? *c : ModelConfig{};
}

void ExpectRefused(const json& j, const std::string& field, const std::string& why = "") {
  const auto c = Parse(j);
  ASSERT_FALSE(c.ok()) << field << " " << j.dump();
  EXPECT_EQ(c.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(c.status().message()),
              AllOf(HasSubstr("config.json: " + field), HasSubstr(why)));
}

TEST(ModelConfig, ReadsThePlainFields) {
  const ModelConfig c = ParseOk(Base());
  EXPECT_EQ(c.vocab_size, 100);
  EXPECT_EQ(c.hidden_size, 32);
  EXPECT_EQ(c.intermediate_size, 48);
  EXPECT_EQ(c.layers, 4);
  EXPECT_EQ(c.heads, 4);
  EXPECT_EQ(c.kv_heads, 2);
  EXPECT_EQ(c.head_dim, 8);
  EXPECT_EQ(c.max_position_embeddings, 512);
  EXPECT_EQ(c.rms_norm_eps, 1e-5f);
  EXPECT_EQ(c.rope_theta, 10000);
  EXPECT_EQ(c.rope_scaling.kind, RopeScaling::Kind::kNone);
  EXPECT_FALSE(c.tie_word_embeddings);
  EXPECT_EQ(c.bos_token_id, 1);
  EXPECT_THAT(c.eos_token_ids, ElementsAre(2));
  EXPECT_FALSE(c.explicit_memory.has_value());
}

TEST(ModelConfig, AbsentFieldsHaveTransformersDefaults) {
  json j = Base();
  for (const char* name : {"num_key_value_heads", "max_position_embeddings", "bos_token_id",
                           "eos_token_id", "rms_norm_eps", "model_type"}) {
    j.erase(name);
  }
  const ModelConfig c = ParseOk(j);
  EXPECT_EQ(c.kv_heads, 4);
  EXPECT_EQ(c.max_position_embeddings, 2048);
  EXPECT_EQ(c.bos_token_id, 1);
  EXPECT_THAT(c.eos_token_ids, ElementsAre(2));
  EXPECT_EQ(c.rms_norm_eps, 1e-6f);
}

TEST(ModelConfig, ReadsTheVariants) {
  json j = Base();
  j["head_dim"] = 16;
  j["eos_token_id"] = {2, 5};
  j["bos_token_id"] = nullptr;
  j["tie_word_embeddings"] = true;
  j["rope_theta"] = 500000;
  ModelConfig c = ParseOk(j);
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_THAT(c.eos_token_ids, ElementsAre(2, 5));
  EXPECT_EQ(c.bos_token_id, -1);
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.rope_theta, 500000);

  // head_dim given: hidden_size need not divide by heads.
  j["num_attention_heads"] = 6;
  j["num_key_value_heads"] = 3;
  EXPECT_EQ(ParseOk(j).head_dim, 16);
}

TEST(ModelConfig, RopeInBothSpellings) {
  const json linear = {{"type", "linear"}, {"factor", 4.0}};
  const json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 64}};
  json j = Base();
  j["rope_scaling"] = linear;
  ModelConfig c = ParseOk(j);
  EXPECT_EQ(c.rope_scaling.kind, RopeScaling::Kind::kLinear);
  EXPECT_EQ(c.rope_scaling.factor, 4);

  j = Base();
  j["rope_parameters"] = llama3;
  j["rope_parameters"]["rope_theta"] = 12345.0;
  c = ParseOk(j);
  EXPECT_EQ(c.rope_scaling.kind, RopeScaling::Kind::kLlama3);
  EXPECT_EQ(c.rope_scaling.factor, 8);
  EXPECT_EQ(c.rope_scaling.low_freq_factor, 1);
  EXPECT_EQ(c.rope_scaling.high_freq_factor, 4);
  EXPECT_EQ(c.rope_scaling.original_max_position_embeddings, 64);
  EXPECT_EQ(c.rope_theta, 12345);

  // Both at once must say the same.
  j["rope_scaling"] = llama3;
  j["rope_theta"] = 12345;
  ParseOk(j);
  j["rope_scaling"]["factor"] = 2;
  ExpectRefused(j, "rope_parameters", "disagrees with rope_scaling");
  j.erase("rope_scaling");
  j["rope_theta"] = 10000;
  ExpectRefused(j, "rope_parameters.rope_theta", "disagrees");
}

TEST(ModelConfig, RefusesRopeVariants) {
  const auto with = [](json rope) {
    json j = Base();
    j["rope_scaling"] = std::move(rope);
    return j;
  };
  ExpectRefused(with({{"rope_type", "yarn"}, {"factor", 2.0}}), "rope_scaling.rope_type", "yarn");
  ExpectRefused(with({{"type", "dynamic"}, {"factor", 2.0}}), "rope_scaling.type", "dynamic");
  ExpectRefused(with({{"type", "linear"}, {"rope_type", "llama3"}, {"factor", 2.0}}),
                "rope_scaling.rope_type", "disagrees with type");
  ExpectRefused(with({{"type", "linear"}}), "rope_scaling.factor", "missing");
  ExpectRefused(with({{"type", "linear"}, {"factor", 0}}), "rope_scaling.factor");
  ExpectRefused(with({{"type", "linear"}, {"factor", "4"}}), "rope_scaling.factor");
  ExpectRefused(with({{"factor", 4}}), "rope_scaling.rope_type", "missing");
  ExpectRefused(with({{"type", "linear"}, {"factor", 4}, {"attention_factor", 2}}),
                "rope_scaling.attention_factor");
  ExpectRefused(with({{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}),
                "rope_scaling.partial_rotary_factor");
  ExpectRefused(with({{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 1}}),
                "rope_scaling.high_freq_factor", "missing");
  ExpectRefused(with({{"rope_type", "llama3"},
                      {"factor", 8},
                      {"low_freq_factor", 4},
                      {"high_freq_factor", 4}}),
                "rope_scaling.high_freq_factor", "low_freq_factor");
  ExpectRefused(with("linear"), "rope_scaling", "object");
}

TEST(ModelConfig, RefusesWhatWouldChangeTheForwardPass) {
  const std::vector<std::pair<std::string, json>> fields = {
      {"attention_bias", true},
      {"mlp_bias", true},
      {"hidden_act", "gelu"},
      {"sliding_window", 4096},
      {"use_sliding_window", true},
      {"partial_rotary_factor", 0.5},
      {"pretraining_tp", 2},
      {"quantization_config", {{"bits", 4}}},
      {"layer_types", {"full_attention", "sliding_attention"}},
      {"attn_logit_softcapping", 50.0},
      {"embedding_multiplier", 12.0},
      {"logits_scaling", 8.0},
      {"num_local_experts", 8},
      {"clip_qkv", 8.0},
      {"model_type", "mistral"},
      {"architectures", {"MistralForCausalLM"}},
      {"architectures", {"LlamaForCausalLM", "LlamaForSequenceClassification"}},
      {"architectures", "LlamaForCausalLM"},
  };
  for (const auto& [name, value] : fields) {
    json j = Base();
    j[name] = value;
    ExpectRefused(j, name);
  }
  json j = Base();
  j.erase("architectures");
  j.erase("model_type");
  ExpectRefused(j, "architectures", "missing");
}

TEST(ModelConfig, IgnoresHarmlessFields) {
  json j = Base();
  j["torch_dtype"] = "bfloat16";
  j["dtype"] = "float16";
  j["_name_or_path"] = "somewhere";
  j["attention_dropout"] = 0.1;
  j["pad_token_id"] = -1;
  j["use_cache"] = false;
  j["attention_bias"] = false;
  j["sliding_window"] = nullptr;
  j["pretraining_tp"] = 1;
  j["partial_rotary_factor"] = 1.0;
  j["rope_scaling"] = nullptr;
  j["layer_types"] = {"full_attention"};
  ParseOk(j);
}

TEST(ModelConfig, NamesTheFieldThatIsMissingOrOutOfRange) {
  for (const char* name : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                           "num_attention_heads"}) {
    json j = Base();
    j.erase(name);
    ExpectRefused(j, name, "missing");
    for (const json& value : {json(0), json(-1), json(1.5), json("8"), json(true),
                              json(int64_t{1} << 40), json(uint64_t{1} << 63), json::array({4})}) {
      j[name] = value;
      ExpectRefused(j, name);
    }
  }
  const std::vector<std::pair<std::string, json>> fields = {
      {"num_key_value_heads", 3},
      {"head_dim", 7},
      {"head_dim", 0},
      {"head_dim", 8192},
      {"rms_norm_eps", 0},
      {"rms_norm_eps", "1e-5"},
      {"rms_norm_eps", 1e-60},
      {"rope_theta", -1},
      {"tie_word_embeddings", 1},
      {"bos_token_id", 100},
      {"bos_token_id", -1},
      {"eos_token_id", {2, 100}},
      {"eos_token_id", "</s>"},
      {"max_position_embeddings", 0},
  };
  for (const auto& [name, value] : fields) {
    json j = Base();
    j[name] = value;
    ExpectRefused(j, name);
  }
  json j = Base();
  j["hidden_size"] = 34;
  ExpectRefused(j, "hidden_size", "no multiple");
}

TEST(ModelConfig, RefusesWhatIsNoConfig) {
  for (const std::string text :
       {"", "{", "[]", "null", "3", "{\"a\":1}x", "{\"vocab_size\": 1e999}", "\xff\xfe{}"}) {
    const auto c = ParseModelConfig(text, "dir/config.json");
    ASSERT_FALSE(c.ok()) << text;
    EXPECT_THAT(std::string(c.status().message()), HasSubstr("dir/config.json"));
  }
  std::string twice = Base().dump();
  twice.insert(twice.size() - 1, ",\"hidden_size\":64");
  EXPECT_THAT(std::string(ParseModelConfig(twice, "c").status().message()),
              HasSubstr("key 'hidden_size' stands twice"));
  const std::string deep = "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}";
  EXPECT_THAT(std::string(ParseModelConfig(deep, "c").status().message()), HasSubstr("nested"));
}

TEST(ExplicitMemoryConfig, DefaultsAreThePapersNumbers) {
  const ModelConfig c = ParseOk(WithMemory());
  ASSERT_TRUE(c.explicit_memory.has_value());
  const ExplicitMemoryConfig& m = *c.explicit_memory;
  EXPECT_EQ(m.version, 1);
  EXPECT_THAT(m.memory_layers, ElementsAre(0, 1));
  EXPECT_EQ(m.tokens_kept, 8);
  EXPECT_EQ(m.reference_tokens, 128);
  EXPECT_EQ(m.chunk_tokens, 64);
  EXPECT_EQ(m.references_per_chunk, 5);
  EXPECT_THAT(m.prefix_token_ids, ElementsAre(1, 7, 8));
}

TEST(ExplicitMemoryConfig, IsValidatedFieldByField) {
  const std::vector<std::pair<std::string, json>> fields = {
      {"version", 2},
      {"version", "1"},
      {"version", nullptr},
      {"memory_layers", json::array()},
      {"memory_layers", nullptr},
      {"memory_layers", 1},
      {"memory_layers", {0, 4}},
      {"memory_layers", {-1}},
      {"memory_layers", {1, 0}},
      {"memory_layers", {1, 1}},
      {"memory_layers", {0.5}},
      {"tokens_kept", 0},
      {"tokens_kept", 129},
      {"reference_tokens", 0},
      {"reference_tokens", 1 << 20},
      {"reference_tokens", 508},  // 3 + 508 + 1 = 512 positions leave none for the context
      {"chunk_tokens", 0},
      {"references_per_chunk", 0},
      {"prefix_token_ids", json::array()},
      {"prefix_token_ids", nullptr},
      {"prefix_token_ids", {1, 100}},
      {"prefix_token_ids", {2, 7}},
      {"tokens_keptt", 8},
  };
  for (const auto& [name, value] : fields) {
    json j = WithMemory();
    j["explicit_memory"][name] = value;
    ExpectRefused(j, "explicit_memory." + name);
  }
  json j = WithMemory();
  j["explicit_memory"]["reference_tokens"] = 507;
  EXPECT_EQ(ParseOk(j).explicit_memory->reference_tokens, 507);
  j["explicit_memory"] = json::array();
  ExpectRefused(j, "explicit_memory");
}

TEST(ExplicitMemoryConfig, DenseModeIsEveryLayerAndEveryToken) {
  const ExplicitMemoryConfig m = DenseMode(ParseOk(Base()), {1, 9});
  EXPECT_THAT(m.memory_layers, ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(m.tokens_kept, 128);
  EXPECT_EQ(m.reference_tokens, 128);
  EXPECT_THAT(m.prefix_token_ids, ElementsAre(1, 9));
}

TEST(ModelConfig, JsonRoundTrips) {
  std::vector<json> all = {Base(), WithMemory()};
  all.push_back(Base());
  all.back()["rope_scaling"] = {{"type", "linear"}, {"factor", 2.5}};
  all.back()["bos_token_id"] = nullptr;
  all.back()["eos_token_id"] = nullptr;
  all.back()["head_dim"] = 16;
  all.push_back(WithMemory());
  all.back()["rope_parameters"] = {
      {"rope_type", "llama3"},  {"factor", 8.0},
      {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0},
      {"rope_theta", 500000.0}, {"original_max_position_embeddings", 64}};
  all.back()["tie_word_embeddings"] = true;
  all.back()["eos_token_id"] = {2, 3};
  all.back()["explicit_memory"]["tokens_kept"] = 4;
  for (const json& j : all) {
    const ModelConfig a = ParseOk(j);
    const std::string text = ModelConfigToJson(a);
    const auto b = ParseModelConfig(text, "saved");
    ASSERT_TRUE(b.ok()) << b.status() << text;
    EXPECT_EQ(ModelConfigToJson(*b), text);
    EXPECT_EQ(a.rope_scaling.kind, b->rope_scaling.kind);
    EXPECT_EQ(a.rope_theta, b->rope_theta);
    EXPECT_EQ(a.rms_norm_eps, b->rms_norm_eps);
    EXPECT_EQ(a.eos_token_ids, b->eos_token_ids);
    EXPECT_EQ(a.bos_token_id, b->bos_token_id);
    EXPECT_EQ(a.head_dim, b->head_dim);
    EXPECT_EQ(a.explicit_memory.has_value(), b->explicit_memory.has_value());
    EXPECT_EQ(json::parse(text)["rms_norm_eps"].dump(), "1e-05");
  }
}

TEST(ModelConfig, CountsParameters) {
  // transformers: sum(p.numel()) of testdata/llama_gqa and llama_tied, read off the files.
  for (const std::string name : {"llama_gqa", "llama_tied", "llama_head_dim"}) {
    const std::string dir = "transformer/testdata/" + name;
    const auto c = ParseModelConfig(*ReadSmallFile(dir + "/config.json", kSmall), dir);
    ASSERT_TRUE(c.ok()) << c.status();
    const std::string file = *ReadSmallFile(dir + "/model.safetensors", kSmall);
    uint64_t header = 0;
    std::memcpy(&header, file.data(), 8);
    EXPECT_EQ(c->parameter_count() * 4, file.size() - 8 - header) << name;
  }
}

TEST(ModelConfig, ReadsWhatTransformersSaves) {
  for (const std::string name :
       {"llama_mha", "llama_gqa", "llama_tied", "llama_rope_theta", "llama_rope_linear",
        "llama_rope_llama3", "llama_head_dim", "llama_sharded", "llama_bf16", "llama_f16"}) {
    const std::string path = "transformer/testdata/" + name + "/config.json";
    const auto c = ParseModelConfig(*ReadSmallFile(path, kSmall), path);
    EXPECT_TRUE(c.ok()) << c.status();
  }
}

TEST(RopeInverseFrequencies, AreTransformers) {
  const json cases =
      json::parse(*ReadSmallFile("transformer/testdata/rope_frequencies.json", kSmall));
  ASSERT_GE(cases.size(), 10);
  for (const json& c : cases) {
    const std::vector<float> got = RopeInverseFrequencies(ParseOk(c["config"]));
    const auto want = c["inv_freq_bits"].get<std::vector<int32_t>>();
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      const float w = std::bit_cast<float>(want[i]);
      // torch's powf is within one unit in the last place, ours is rounded correctly.
      EXPECT_NEAR(got[i], w, 3e-7 * w) << c["config"] << " " << i;
    }
  }
}

}  // namespace
}  // namespace memory3
