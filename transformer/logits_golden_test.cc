// The forward pass against what others computed: transformers' logits for small Llama directories
// (tests/goldens/llama_logits.py), and llama2.c's greedy text of a trained model.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "transformer/checkpoint.h"
#include "transformer/decoder.h"
#include "transformer/generate.h"
#include "transformer/testing/decoder_fixture.h"
#include "transformer/testing/golden_file.h"

namespace memory3 {
namespace {

std::shared_ptr<const Model> LoadModel(Device* device, const std::string& directory,
                                       WeightFormat format) {
  auto checkpoint = Checkpoint::Open(directory);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  auto model = Model::Load(device, (*checkpoint)->config(), **checkpoint, format);
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

TEST(LogitsGoldenTest, AgreeWithTransformers) {
  int models = 0;
  for (const auto& entry : std::filesystem::directory_iterator("transformer/testdata")) {
    const std::string directory = entry.path().string();
    if (entry.path().filename().string().rfind("llama_", 0) != 0) continue;
    ++models;
    SCOPED_TRACE(directory);
    const GoldenFile golden(directory + "/expected.safetensors");
    const std::vector<int64_t> shape = golden.Shape("input_ids");
    const std::vector<int32_t> ids = golden.Ints("input_ids");
    const std::vector<float> logits = golden.Floats("logits");
    const int64_t row = golden.Shape("logits")[2];
    for (const std::string& instructions : InstructionSets()) {
      SCOPED_TRACE(instructions);
      const std::unique_ptr<Device> device = TestDevice(instructions);
      const std::unique_ptr<Decoder> decoder =
          TestDecoder(LoadModel(device.get(), directory, WeightFormat::kF32));
      for (int64_t s = 0; s < shape[0]; ++s) {
        const std::span<const int32_t> sequence = std::span(ids).subspan(s * shape[1], shape[1]);
        const std::span<const float> expected =
            std::span(logits).subspan(s * shape[1] * row, shape[1] * row);
        EXPECT_LE(Difference(FeedNew(*decoder, Layout::kPlain, sequence), expected), 1e-5)
            << "sequence " << s;
      }
    }
  }
  EXPECT_GE(models, 10);
}

class StoriesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = (SharedData() / "fixtures/stories260K").string();
    if (!std::filesystem::exists(directory_)) {
      GTEST_SKIP() << "NOT TESTED: no " << directory_ << "; set MEMORY3_DATA to the shared data";
    }
    std::ifstream file(directory_ + "/greedy_ids.json");
    ids_ = nlohmann::json::parse(file).get<std::vector<int32_t>>();
    ASSERT_GT(ids_.size(), 100u);
  }

  // Logits of every token of the text, teacher-forced.
  std::vector<float> TextLogits(WeightFormat format, const std::string& instructions = "") {
    const std::unique_ptr<Device> device = TestDevice(instructions);
    const std::unique_ptr<Decoder> decoder =
        TestDecoder(LoadModel(device.get(), directory_, format));
    vocab_ = decoder->config().vocab_size;
    return FeedNew(*decoder, Layout::kPlain, ids_);
  }

  // Mean over the text of KL(p || q) in nats, p and q the softmax of rows.
  double MeanKl(const std::vector<float>& p, const std::vector<float>& q) const {
    const size_t rows = p.size() / vocab_;
    double total = 0;
    const auto log_sum = [](std::span<const float> x) {
      double sum = 0;
      for (float v : x) sum += std::exp(double{v});
      return std::log(sum);
    };
    for (size_t r = 0; r < rows; ++r) {
      const std::span<const float> a = std::span(p).subspan(r * vocab_, vocab_);
      const std::span<const float> b = std::span(q).subspan(r * vocab_, vocab_);
      const double log_sum_a = log_sum(a), log_sum_b = log_sum(b);
      for (int32_t id = 0; id < vocab_; ++id) {
        const double log_p = a[id] - log_sum_a;
        total += std::exp(log_p) * (log_p - (b[id] - log_sum_b));
      }
    }
    return total / rows;
  }

  std::string directory_;
  std::vector<int32_t> ids_;
  int vocab_ = 0;
};

TEST_F(StoriesTest, GreedyTextOnEveryKernelPath) {
  for (const std::string& instructions : InstructionSets()) {
    SCOPED_TRACE(instructions);
    const std::unique_ptr<Device> device = TestDevice(instructions);
    const std::unique_ptr<Decoder> decoder =
        TestDecoder(LoadModel(device.get(), directory_, WeightFormat::kF32));
    const int new_tokens = static_cast<int>(ids_.size()) - 1;
    const auto generated = Generate(*decoder, std::span(ids_).first(1), nullptr,
                                    {.layout = Layout::kPlain, .max_new_tokens = new_tokens});
    ASSERT_TRUE(generated.ok()) << generated.status();
    EXPECT_EQ(generated->tokens, std::vector<int32_t>(ids_.begin() + 1, ids_.end()));
    // The device's own choice is the same.
    Sequence sequence = *decoder->Start(Layout::kPlain);
    for (int i = 0; i < 50; ++i) {
      const Slice slice{&sequence, std::span(ids_).subspan(i, 1), {}, 1};
      ASSERT_TRUE(decoder->Forward({&slice, 1}).ok());
      EXPECT_EQ(decoder->ArgMax()->front(), ids_[i + 1]) << i;
    }
  }
}

TEST_F(StoriesTest, RoundedWeightsStayClose) {
  const std::vector<float> exact = TextLogits(WeightFormat::kF32);
  for (const std::string& instructions : InstructionSets()) {
    SCOPED_TRACE(instructions);
    const double int8 = MeanKl(exact, TextLogits(WeightFormat::kInt8, instructions));
    const double bf16 = MeanKl(exact, TextLogits(WeightFormat::kBF16, instructions));
    EXPECT_LT(int8, 0.01);
    EXPECT_LT(bf16, 0.001);
    EXPECT_GT(int8, 0) << "the weights are not rounded";
    EXPECT_GT(bf16, 0) << "the weights are not rounded";
    std::cout << "mean KL to f32: int8 " << int8 << ", bf16 " << bf16 << " (" << instructions
              << ")\n";
  }
}

TEST_F(StoriesTest, Bf16CacheStaysClose) {
  const std::vector<float> exact = TextLogits(WeightFormat::kF32);
  const std::unique_ptr<Device> device = TestDevice();
  const std::unique_ptr<Decoder> decoder = TestDecoder(
      LoadModel(device.get(), directory_, WeightFormat::kF32), {.kv_dtype = DType::kBF16});
  const double kl = MeanKl(exact, FeedNew(*decoder, Layout::kPlain, ids_));
  EXPECT_LT(kl, 1e-4);
  EXPECT_GT(kl, 0) << "the cache is not bf16";
  std::cout << "mean KL to f32: bf16 KV cache " << kl << "\n";
}

// Dense mode of a checkpoint that knows nothing of memories: one whole reference as a memory is the
// plain forward of prefix + reference + context.
TEST_F(StoriesTest, DenseMemoryIsThePlainForward) {
  const std::unique_ptr<Device> device = TestDevice();
  const std::shared_ptr<const Model> model =
      LoadModel(device.get(), directory_, WeightFormat::kF32);
  const ExplicitMemoryConfig dense = DenseMode(model->config(), {1, 403, 407});
  const std::unique_ptr<Decoder> decoder = TestDecoder(model, {.memory = dense});
  const std::span<const int32_t> text = std::span(ids_).subspan(1);
  const std::vector<int32_t> reference(text.begin(), text.begin() + 128);
  std::vector<int32_t> context = {1};
  context.insert(context.end(), text.begin() + 128, text.begin() + 228);
  LoadMemories(*decoder, WriteMemories(*decoder, {reference}));
  const int tokens = static_cast<int>(context.size());
  const std::vector<float> with_memory =
      FeedNew(*decoder, Layout::kMemory, context, {{tokens, {0}}});

  std::vector<int32_t> everything = dense.prefix_token_ids;
  everything.insert(everything.end(), reference.begin(), reference.end());
  everything.insert(everything.end(), context.begin(), context.end());
  const std::vector<float> plain = FeedNew(*decoder, Layout::kPlain, everything);
  EXPECT_LE(Difference(with_memory, std::span(plain).last(with_memory.size())), 1e-5);
}

}  // namespace
}  // namespace memory3
