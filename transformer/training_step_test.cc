// Losses and gradients against PyTorch's autograd (tests/goldens/gradients.py), and what the
// training step promises: accumulation, recomputation and repetition.

#include "transformer/training_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memory3 {
namespace {

using ::nlohmann::json;
using ::testing::HasSubstr;

const char kDirectory[] = "transformer/testdata/gradients/";

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

// An f32 safetensors file, read without the product's reader.
class Tensors : public TensorSource {
 public:
  explicit Tensors(const std::string& path) {
    const std::string file = ReadFile(path);
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, file.data(), 8);
    const json header = json::parse(file.substr(8, header_bytes));
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") continue;
      EXPECT_EQ(entry["dtype"], "F32");
      const size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
      std::vector<float>& values = tensors_[name];
      values.resize((end - begin) / sizeof(float));
      std::memcpy(values.data(), file.data() + 8 + header_bytes + begin, end - begin);
    }
  }
  absl::Status Read(std::string_view name, int64_t /*rows*/, int64_t /*cols*/,
                    std::span<float> out) const override {
    const auto found = tensors_.find(std::string(name));
    if (found == tensors_.end() || found->second.size() != out.size()) {
      return absl::NotFoundError(std::string(name));
    }
    std::copy(found->second.begin(), found->second.end(), out.begin());
    return absl::OkStatus();
  }
  size_t size() const { return tensors_.size(); }

 private:
  std::map<std::string, std::vector<float>> tensors_;
};

ModelConfig ConfigOf(const json& m) {
  ModelConfig c;
  c.vocab_size = m["vocab_size"];
  c.hidden_size = m["hidden_size"];
  c.intermediate_size = m["intermediate_size"];
  c.layers = m["layers"];
  c.heads = m["heads"];
  c.kv_heads = m["kv_heads"];
  c.head_dim = m["head_dim"];
  c.rms_norm_eps = m["rms_norm_eps"];
  c.rope_theta = m["rope_theta"];
  c.tie_word_embeddings = m["tied"];
  const json& e = m["explicit_memory"];
  c.explicit_memory = ExplicitMemoryConfig{
      .memory_layers = e["memory_layers"],
      .tokens_kept = e["tokens_kept"],
      .reference_tokens = e["reference_tokens"],
      .chunk_tokens = e["chunk_tokens"],
      .references_per_chunk = e["references_per_chunk"],
      .prefix_token_ids = e["prefix_token_ids"],
  };
  return c;
}

TrainingBatch BatchOf(const json& golden) {
  TrainingBatch batch;
  batch.layout =
      golden["layout"] == "memory" ? TrainingBatch::Layout::kMemory : TrainingBatch::Layout::kPlain;
  for (const json& s : golden["sequences"]) {
    batch.sequences.push_back({s["token_ids"], s["targets"], s["chunk_references"]});
  }
  batch.references = golden["references"];
  batch.tokens_kept = golden["tokens_kept"];
  batch.gradient_through_writing = golden["gradient_through_writing"];
  return batch;
}

// A model with its gradient, on a CPU device of its own.
struct Fixture {
  explicit Fixture(const std::string& model_name, int threads = 2) {
    const json goldens = json::parse(ReadFile(std::string(kDirectory) + "cases.json"));
    device = MakeCpuDevice({.threads = threads}).value();
    parameters = Parameters::Create(device.get(), ConfigOf(goldens["models"][model_name])).value();
    EXPECT_TRUE(parameters->Load(Tensors(kDirectory + model_name + ".weights.safetensors")).ok());
    gradient = parameters->AllocateLike().value();
    step = std::make_unique<TrainingStep>(parameters.get());
  }

  TrainingResult Run(const TrainingBatch& batch) {
    absl::StatusOr<TrainingResult> result = step->Run(batch, gradient.as<float>());
    EXPECT_TRUE(result.ok()) << result.status();
    return *std::move(result);
  }
  TrainingResult RunFromZero(const TrainingBatch& batch) {
    device->Zero(gradient.data(), gradient.bytes());
    return Run(batch);
  }
  double Loss(const TrainingBatch& batch) { return step->Run(batch, nullptr).value().loss; }
  std::vector<float> Gradient() const {
    std::vector<float> host(parameters->size());
    EXPECT_TRUE(device->Download(host.data(), gradient.data(), gradient.bytes()).ok());
    return host;
  }

  std::unique_ptr<Device> device;
  std::unique_ptr<Parameters> parameters;
  Buffer gradient;
  std::unique_ptr<TrainingStep> step;
};

json Cases() { return json::parse(ReadFile(std::string(kDirectory) + "cases.json"))["cases"]; }

json CaseNamed(const std::string& name) {
  for (const json& golden : Cases()) {
    if (golden["name"] == name) return golden;
  }
  ADD_FAILURE() << "no case " << name;
  return {};
}

const char* const kCaseNames[] = {
    "gqa_tied_plain",    "gqa_tied_memory",           "gqa_tied_memory_stopped", "mha_untied_plain",
    "mha_untied_memory", "mha_untied_memory_stopped", "mha_untied_memory_dense"};

double LargestError(std::span<const float> got, std::span<const float> want) {
  double error = 0, scale = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error = std::max(error, std::abs(double{got[i]} - want[i]));
    scale = std::max(scale, std::abs(double{want[i]}));
  }
  return std::isfinite(error) && scale > 0 ? error / scale : error;
}

class GoldenTest : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenTest, LossAndEveryGradientAgreeWithAutograd) {
  const json golden = CaseNamed(GetParam());
  Fixture f(golden["model"]);
  const TrainingResult result = f.RunFromZero(BatchOf(golden));
  const std::vector<double> losses = golden["sequence_loss"];
  ASSERT_EQ(result.sequence_loss.size(), losses.size());
  for (size_t s = 0; s < losses.size(); ++s) {
    EXPECT_NEAR(result.sequence_loss[s] / losses[s], 1, 1e-5) << "sequence " << s;
  }
  const Tensors want(kDirectory + std::string(golden["gradients"]));
  const std::vector<float> got = f.Gradient();
  ASSERT_EQ(want.size(), f.parameters->list().size());
  for (const Parameter& p : f.parameters->list()) {
    std::vector<float> expected(p.size());
    ASSERT_TRUE(want.Read(p.name, p.rows, p.cols, expected).ok()) << p.name;
    EXPECT_LT(LargestError(std::span(got).subspan(p.offset, p.size()), expected), 1e-4) << p.name;
  }
}

TEST_P(GoldenTest, RecomputedActivationsGiveTheSameBits) {
  const json golden = CaseNamed(GetParam());
  Fixture f(golden["model"]);
  TrainingBatch batch = BatchOf(golden);
  const TrainingResult kept = f.RunFromZero(batch);
  const std::vector<float> kept_gradient = f.Gradient();
  batch.recompute_activations = true;
  const TrainingResult recomputed = f.RunFromZero(batch);
  EXPECT_EQ(recomputed.loss, kept.loss);
  EXPECT_EQ(f.Gradient(), kept_gradient);
  EXPECT_EQ(f.Loss(batch), kept.loss) << "forward only";
}

TEST_P(GoldenTest, RepeatedItGivesTheSameBits) {
  const json golden = CaseNamed(GetParam());
  Fixture f(golden["model"]), other(golden["model"]);
  const TrainingBatch batch = BatchOf(golden);
  const TrainingResult first = f.RunFromZero(batch);
  const std::vector<float> gradient = f.Gradient();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(f.RunFromZero(batch).loss, first.loss);
    EXPECT_EQ(f.Gradient(), gradient);
  }
  EXPECT_EQ(other.RunFromZero(batch).loss, first.loss);
  EXPECT_EQ(other.Gradient(), gradient);
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenTest, ::testing::ValuesIn(kCaseNames),
                         [](const auto& info) { return std::string(info.param); });

TEST(TrainingStepTest, EveryStoredCaseIsTested) {
  std::vector<std::string> names;
  for (const json& golden : Cases()) names.push_back(golden["name"]);
  EXPECT_THAT(names, ::testing::ElementsAreArray(kCaseNames));
}

// Where products are cut up among threads and attention needs many tiles.
TEST(TrainingStepTest, LargerBatchesGiveTheSameBitsToo) {
  ModelConfig config;
  config.vocab_size = 500;
  config.hidden_size = 160;
  config.intermediate_size = 352;
  config.layers = 3;
  config.heads = 6;
  config.kv_heads = 3;
  config.head_dim = 32;
  config.tie_word_embeddings = true;
  config.explicit_memory =
      ExplicitMemoryConfig{.memory_layers = {0, 1}, .prefix_token_ids = {1, 2, 3}};
  const auto device = MakeCpuDevice({.threads = 2}).value();
  const auto parameters = Parameters::Create(device.get(), config).value();
  ASSERT_TRUE(parameters->Load(InitialParameters(4, config.layers)).ok());
  const Buffer gradient = parameters->AllocateLike().value();
  TrainingStep step(parameters.get());

  uint32_t state = 1;
  const auto ids = [&](int n) {
    std::vector<int32_t> v(n);
    for (int32_t& id : v) id = (state = state * 1664525u + 1013904223u) % 500;
    return v;
  };
  TrainingBatch batch;
  batch.layout = TrainingBatch::Layout::kMemory;
  batch.references = {ids(128), ids(128), ids(77), ids(128)};
  batch.sequences = {{ids(190), ids(190), {{0}, {0, 1}, {0, 1, 2}}},
                     {ids(65), ids(65), {{3}}},
                     {ids(130), ids(130), {{2, 3}, {3}, {}}}};
  const auto run = [&](bool through_writing, bool recompute) {
    batch.gradient_through_writing = through_writing;
    batch.recompute_activations = recompute;
    device->Zero(gradient.data(), gradient.bytes());
    const double loss = step.Run(batch, gradient.as<float>()).value().loss;
    std::vector<float> result(gradient.as<float>(), gradient.as<float>() + parameters->size());
    return std::make_pair(loss, result);
  };
  for (const bool through_writing : {true, false}) {
    const auto first = run(through_writing, false);
    for (const bool recompute : {false, true, true}) {
      const auto again = run(through_writing, recompute);
      EXPECT_EQ(again.first, first.first);
      EXPECT_TRUE(again.second == first.second) << through_writing << recompute;
    }
  }
}

// Sequences alone, one after the other, add up to the batch's gradient.
TEST(TrainingStepTest, GradientsAccumulateOverBatches) {
  const json golden = CaseNamed("gqa_tied_memory");
  Fixture f(golden["model"]);
  const TrainingBatch batch = BatchOf(golden);
  const TrainingResult whole = f.RunFromZero(batch);
  const std::vector<float> want = f.Gradient();
  f.device->Zero(f.gradient.data(), f.gradient.bytes());
  double loss = 0;
  for (const TrainingSequence& sequence : batch.sequences) {
    TrainingBatch alone = batch;
    alone.sequences = {sequence};
    loss += f.Run(alone).loss;
  }
  EXPECT_NEAR(loss, whole.loss, 1e-5 * whole.loss);
  const std::vector<float> got = f.Gradient();
  for (const Parameter& p : f.parameters->list()) {
    EXPECT_LT(LargestError(std::span(got).subspan(p.offset, p.size()),
                           std::span<const float>(want).subspan(p.offset, p.size())),
              1e-5)
        << p.name;
  }
}

// Along each tensor's own gradient the loss must rise by its length.
TEST(TrainingStepTest, GradientsAreTheSlopeOfTheLoss) {
  const json golden = CaseNamed("mha_untied_memory");
  Fixture f(golden["model"]);
  const TrainingBatch batch = BatchOf(golden);
  f.RunFromZero(batch);
  const std::vector<float> gradient = f.Gradient();
  for (const Parameter& p : f.parameters->list()) {
    const std::span<const float> g = std::span(gradient).subspan(p.offset, p.size());
    double length = 0;
    for (const float x : g) length += double{x} * x;
    length = std::sqrt(length);
    std::vector<float> value(p.size()), moved(p.size());
    ASSERT_TRUE(f.parameters->Download(p, value).ok());
    float* at = f.parameters->values() + p.offset;
    // Far enough for float32 losses to tell, near enough for the curvature not to.
    const double h = 2e-3;
    double losses[2];
    for (const int side : {0, 1}) {
      const double reach = (side == 0 ? -h : h) / length;
      for (size_t i = 0; i < g.size(); ++i) moved[i] = value[i] + reach * g[i];
      f.device->Upload(at, moved.data(), moved.size() * sizeof(float));
      losses[side] = f.Loss(batch);
    }
    f.device->Upload(at, value.data(), value.size() * sizeof(float));
    EXPECT_NEAR((losses[1] - losses[0]) / (2 * h) / length, 1, 0.02) << p.name;
  }
}

TEST(TrainingStepTest, OverfitsAFewTokens) {
  const json golden = CaseNamed("gqa_tied_memory");
  Fixture f(golden["model"]);
  ASSERT_TRUE(f.parameters->Load(InitialParameters(/*seed=*/1, /*layers=*/4)).ok());
  const TrainingBatch batch = BatchOf(golden);
  Buffer m = f.parameters->AllocateLike().value(), v = f.parameters->AllocateLike().value();
  const TrainingResult first = f.RunFromZero(batch);
  // An untrained model guesses among the vocabulary.
  EXPECT_NEAR(first.loss / first.tokens, std::log(67.0), 0.1);
  double last = 0;
  for (int i = 1; i <= 120; ++i) {
    const TrainingResult result = f.RunFromZero(batch);
    last = result.loss / result.tokens;
    f.parameters->AdamWStep(f.gradient.as<float>(), m.as<float>(), v.as<float>(),
                            {.learning_rate = 1e-2f, .weight_decay = 0.01f, .step = i},
                            1.0f / result.tokens);
  }
  EXPECT_LT(last, 0.1);
}

// References that nobody reads change nothing, and a memory's place in the list of a chunk only the
// order of summation.
TEST(TrainingStepTest, UnreadReferencesHaveNoPart) {
  const json golden = CaseNamed("gqa_tied_memory");
  Fixture f(golden["model"]);
  TrainingBatch batch = BatchOf(golden);
  const double loss = f.RunFromZero(batch).loss;
  const std::vector<float> gradient = f.Gradient();
  batch.references.push_back({5, 6, 7, 8});
  EXPECT_EQ(f.RunFromZero(batch).loss, loss);
  EXPECT_LT(LargestError(f.Gradient(), gradient), 1e-6);
  std::reverse(batch.sequences[0].chunk_references[1].begin(),
               batch.sequences[0].chunk_references[1].end());
  EXPECT_NEAR(f.RunFromZero(batch).loss / loss, 1, 1e-6);
  batch.sequences[0].chunk_references[1].pop_back();
  EXPECT_GT(std::abs(f.RunFromZero(batch).loss / loss - 1), 1e-4) << "memories are read";
}

TEST(TrainingStepTest, ActivationsAreAllocatedOnceAndRecomputationNeedsLess) {
  const json golden = CaseNamed("gqa_tied_memory");
  Fixture f(golden["model"]), small(golden["model"]);
  TrainingBatch batch = BatchOf(golden);
  f.RunFromZero(batch);
  const int64_t bytes = f.step->bytes();
  TrainingBatch shorter = batch;
  shorter.sequences.pop_back();
  f.RunFromZero(shorter);
  f.RunFromZero(batch);
  EXPECT_EQ(f.step->bytes(), bytes);
  batch.recompute_activations = true;
  small.RunFromZero(batch);
  EXPECT_LT(small.step->bytes(), bytes * 3 / 4);
}

TEST(TrainingStepTest, ABatchWithoutTargetsHasNoLoss) {
  const json golden = CaseNamed("gqa_tied_plain");
  Fixture f(golden["model"]);
  TrainingBatch batch = BatchOf(golden);
  for (TrainingSequence& s : batch.sequences) std::fill(s.targets.begin(), s.targets.end(), -1);
  const TrainingResult result = f.RunFromZero(batch);
  EXPECT_EQ(result.tokens, 0);
  EXPECT_EQ(result.loss, 0);
  for (const float g : f.Gradient()) ASSERT_EQ(g, 0);
}

TEST(TrainingStepTest, BadBatchesAreRefusedByName) {
  const json golden = CaseNamed("gqa_tied_memory");
  Fixture f(golden["model"]);
  const TrainingBatch good = BatchOf(golden);
  const auto refused = [&](auto change) {
    TrainingBatch batch = good;
    change(batch);
    const absl::Status status = f.step->Run(batch, nullptr).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(refused([](TrainingBatch& b) { b.sequences.clear(); }), HasSubstr("no sequences"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.sequences[1].token_ids[2] = 67; }),
              HasSubstr("sequence 1: token id 67"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.sequences[1].targets[2] = -2; }),
              HasSubstr("sequence 1: target -2"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.sequences[1].targets.pop_back(); }),
              HasSubstr("sequence 1 has 8 tokens but 7 targets"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.sequences[0].chunk_references.pop_back(); }),
              HasSubstr("sequence 0 has 4 chunks, but 3"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.sequences[0].chunk_references[2] = {5}; }),
              HasSubstr("sequence 0, chunk 2"));
  EXPECT_THAT(refused([](TrainingBatch& b) {
                b.sequences[0].chunk_references[2] = {1, 0, 1};
              }),
              HasSubstr("twice"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.references[3].clear(); }),
              HasSubstr("reference 3 is empty"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.references[3].assign(13, 2); }),
              HasSubstr("reference 3 has 13 tokens"));
  EXPECT_THAT(refused([](TrainingBatch& b) {
                b.sequences[2].token_ids.assign(2048, 2);
                b.sequences[2].targets.assign(2048, 2);
              }),
              HasSubstr("sequence 2 has 2048 tokens, the longest is 2033"));
  EXPECT_THAT(refused([](TrainingBatch& b) { b.layout = TrainingBatch::Layout::kPlain; }),
              HasSubstr("plain layout"));
}

}  // namespace
}  // namespace memory3
