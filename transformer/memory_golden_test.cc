// Writing and reading memories against the NumPy reference written from the method's equations
// (tests/goldens/memory_reference.py), on every kernel path.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "transformer/checkpoint.h"
#include "transformer/config.h"
#include "transformer/decoder.h"
#include "transformer/memory_writer.h"
#include "transformer/testing/decoder_fixture.h"
#include "transformer/testing/golden_file.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

constexpr double kTolerance = 1e-5;
constexpr char kDirectory[] = "transformer/testdata/memory_gqa";

struct Golden {
  std::string name;
  ExplicitMemoryConfig geometry;
  std::vector<std::vector<int32_t>> references;
  std::vector<std::vector<float>> memories;
  std::vector<std::vector<int64_t>> memory_shapes;
  std::vector<int32_t> context;
  std::vector<MemoryRead> reads;
  std::vector<float> logits, logits_without;
};

Golden ReadGolden(const std::string& name) {
  const GoldenFile file(absl::StrCat(kDirectory, "/expected.safetensors"));
  Golden g;
  g.name = name;
  const std::vector<int32_t> layers = file.Ints(name + ".memory_layers"),
                             numbers = file.Ints(name + ".numbers");
  g.geometry.memory_layers.assign(layers.begin(), layers.end());
  g.geometry.prefix_token_ids = file.Ints(name + ".prefix");
  g.geometry.tokens_kept = numbers[0];
  g.geometry.reference_tokens = numbers[1];
  for (int r = 0; file.Has(absl::StrCat(name, ".reference_", r)); ++r) {
    g.references.push_back(file.Ints(absl::StrCat(name, ".reference_", r)));
    g.memories.push_back(file.Floats(absl::StrCat(name, ".memory_", r)));
    g.memory_shapes.push_back(file.Shape(absl::StrCat(name, ".memory_", r)));
  }
  g.context = file.Ints(name + ".context");
  const std::vector<int32_t> reads = file.Ints(name + ".reads");
  for (size_t t = 0; t < g.context.size(); ++t) {
    std::vector<int> slots;
    for (size_t r = 0; r < g.references.size(); ++r) {
      if (reads[t * g.references.size() + r] != 0) slots.push_back(static_cast<int>(r));
    }
    if (g.reads.empty() || g.reads.back().slots != slots) g.reads.push_back({0, slots});
    ++g.reads.back().tokens;
  }
  g.logits = file.Floats(name + ".logits");
  g.logits_without = file.Floats(name + ".logits_without");
  return g;
}

using MemoryGoldenTest = ::testing::TestWithParam<std::string>;

std::shared_ptr<const Model> LoadModel(Device* device) {
  auto checkpoint = Checkpoint::Open(kDirectory);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  auto model = Model::Load(device, (*checkpoint)->config(), **checkpoint, WeightFormat::kF32);
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

TEST_P(MemoryGoldenTest, WrittenMemories) {
  const Golden g = ReadGolden(GetParam());
  ASSERT_FALSE(g.references.empty());
  for (const std::string& instructions : InstructionSets()) {
    SCOPED_TRACE(instructions);
    const std::unique_ptr<Device> device = TestDevice(instructions);
    const std::shared_ptr<const Model> model = LoadModel(device.get());
    auto writer = MemoryWriter::Create(model, {.memory = g.geometry});
    ASSERT_TRUE(writer.ok()) << writer.status();
    auto memories = (*writer)->Write(g.references);
    ASSERT_TRUE(memories.ok()) << memories.status();
    ASSERT_EQ(memories->size(), g.references.size());
    for (size_t r = 0; r < memories->size(); ++r) {
      const ExplicitMemory& m = (*memories)[r];
      EXPECT_EQ((std::vector<int64_t>{m.shape.layers, 2, m.shape.kv_heads, m.shape.tokens,
                                      m.shape.head_dim}),
                g.memory_shapes[r]);
      EXPECT_EQ(m.reference_tokens, static_cast<int>(g.references[r].size()));
      // Another choice of tokens would be off by far more than rounding.
      EXPECT_LE(Difference(m.values, g.memories[r]), kTolerance) << "reference " << r;
    }
    // The batch does not matter: alone, and in batches of the smallest size.
    auto small = MemoryWriter::Create(
        model, {.memory = g.geometry, .max_rows = g.geometry.reference_tokens});
    ASSERT_TRUE(small.ok()) << small.status();
    auto one_by_one = (*small)->Write(g.references);
    ASSERT_TRUE(one_by_one.ok()) << one_by_one.status();
    for (size_t r = 0; r < memories->size(); ++r)
      EXPECT_EQ((*one_by_one)[r].values, (*memories)[r].values) << r;
  }
}

TEST_P(MemoryGoldenTest, LogitsWithMemories) {
  const Golden g = ReadGolden(GetParam());
  for (const std::string& instructions : InstructionSets()) {
    SCOPED_TRACE(instructions);
    const std::unique_ptr<Device> device = TestDevice(instructions);
    const std::shared_ptr<const Model> model = LoadModel(device.get());
    std::unique_ptr<Decoder> decoder = TestDecoder(model, {.memory = g.geometry});
    LoadMemories(*decoder, WriteMemories(*decoder, g.references));
    EXPECT_LE(Difference(FeedNew(*decoder, Layout::kMemory, g.context, g.reads), g.logits),
              kTolerance);
    EXPECT_LE(Difference(FeedNew(*decoder, Layout::kMemory, g.context), g.logits_without),
              kTolerance);
  }
}

TEST_P(MemoryGoldenTest, PermutingAChunksMemoriesChangesNothing) {
  const Golden g = ReadGolden(GetParam());
  for (const std::string& instructions : InstructionSets()) {
    SCOPED_TRACE(instructions);
    const std::unique_ptr<Device> device = TestDevice(instructions);
    const std::shared_ptr<const Model> model = LoadModel(device.get());
    std::unique_ptr<Decoder> decoder = TestDecoder(model, {.memory = g.geometry});
    LoadMemories(*decoder, WriteMemories(*decoder, g.references));
    const std::vector<float> expected = FeedNew(*decoder, Layout::kMemory, g.context, g.reads);
    // The slots listed backwards, and the memories in other slots.
    std::vector<MemoryRead> reversed = g.reads, moved = g.reads;
    for (MemoryRead& read : reversed) std::reverse(read.slots.begin(), read.slots.end());
    EXPECT_EQ(FeedNew(*decoder, Layout::kMemory, g.context, reversed), expected);
    const int n = static_cast<int>(g.references.size());
    std::vector<std::vector<int32_t>> references = g.references;
    std::rotate(references.begin(), references.begin() + 1, references.end());
    LoadMemories(*decoder, WriteMemories(*decoder, references));
    for (MemoryRead& read : moved) {
      for (int& slot : read.slots) slot = (slot + n - 1) % n;
    }
    EXPECT_EQ(FeedNew(*decoder, Layout::kMemory, g.context, moved), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Geometries, MemoryGoldenTest, ::testing::Values("first_half", "spread"),
                         [](const auto& info) { return info.param; });

TEST(MemoryWriterTest, BadReferencesAreRefusedByNumber) {
  const std::unique_ptr<Device> device = TestDevice();
  const ModelConfig config = SmallConfig();
  auto writer = MemoryWriter::Create(RandomModel(device.get(), config), {});
  ASSERT_TRUE(writer.ok()) << writer.status();
  const std::vector<int32_t> good = {3, 4};
  const std::vector<std::pair<std::vector<int32_t>, std::string>> bad = {
      {{}, "reference 1 is empty"},
      {RandomIds(config, 33, 1), "reference 1 has 33 tokens"},
      {{3, 96}, "reference 1: token id 96"},
      {{-1}, "reference 1: token id -1"},
  };
  for (const auto& [ids, message] : bad) {
    const std::vector<std::vector<int32_t>> references = {good, ids};
    const auto written = (*writer)->Write(references);
    EXPECT_EQ(written.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(written.status().message()), HasSubstr(message));
  }
  EXPECT_TRUE((*writer)->Write({})->empty());
}

TEST(MemoryWriterTest, NeedsAGeometryAndRoomForAReference) {
  const std::unique_ptr<Device> device = TestDevice();
  ModelConfig config = SmallConfig();
  EXPECT_EQ(
      MemoryWriter::Create(RandomModel(device.get(), config), {.max_rows = 31}).status().code(),
      absl::StatusCode::kInvalidArgument);
  config.explicit_memory.reset();
  EXPECT_EQ(MemoryWriter::Create(RandomModel(device.get(), config), {}).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

// A batch of references fuller than one pass holds; many shorter than tokens_kept.
TEST(MemoryWriterTest, AnyNumberOfReferences) {
  const std::unique_ptr<Device> device = TestDevice();
  const ModelConfig config = SmallConfig();
  const std::shared_ptr<const Model> model = RandomModel(device.get(), config);
  auto large = MemoryWriter::Create(model, {}),
       small = MemoryWriter::Create(model, {.max_rows = 40});
  ASSERT_TRUE(large.ok() && small.ok());
  std::vector<std::vector<int32_t>> references;
  for (int i = 0; i < 300; ++i) references.push_back(RandomIds(config, 1 + i * 7 % 32, i));
  auto a = (*large)->Write(references), b = (*small)->Write(references);
  ASSERT_TRUE(a.ok() && b.ok());
  ASSERT_EQ(a->size(), 300u);
  for (int i = 0; i < 300; ++i) {
    EXPECT_EQ((*a)[i].shape.tokens, std::min(4, 1 + i * 7 % 32));
    EXPECT_EQ((*a)[i].values, (*b)[i].values) << i;
  }
}

}  // namespace
}  // namespace memory3
