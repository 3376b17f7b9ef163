// Properties of the decoder that need no outside reference: what must not change an output, what
// must.
#include "transformer/decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "memory/codec.h"
#include "memory/record.h"
#include "memory/vq_codebook.h"
#include "transformer/testing/decoder_fixture.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

class DecoderTest : public ::testing::Test {
 protected:
  DecoderTest() : device_(TestDevice()), config_(SmallConfig()) { decoder_ = Make({}); }

  std::unique_ptr<Decoder> Make(const DecoderOptions& options) {
    return TestDecoder(RandomModel(device_.get(), config_), options);
  }

  // Three memories in slots 0, 1, 2: whole, shorter, shorter than tokens_kept.
  void LoadThree() {
    LoadMemories(*decoder_,
                 WriteMemories(*decoder_, {RandomIds(config_, 32, 1), RandomIds(config_, 19, 2),
                                           RandomIds(config_, 3, 3)}));
  }

  std::unique_ptr<Device> device_;
  ModelConfig config_;
  std::unique_ptr<Decoder> decoder_;
};

const std::vector<MemoryRead> kReads = {{17, {0, 1}}, {16, {2, 1}}, {16, {}}, {30, {0, 1, 2}}};

TEST_F(DecoderTest, SlicesOfAnySizeGiveTheSameLogits) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 79, 4);
  for (Layout layout : {Layout::kPlain, Layout::kMemory}) {
    const std::vector<MemoryRead> reads =
        layout == Layout::kMemory ? kReads : std::vector<MemoryRead>{};
    const std::vector<float> whole = FeedNew(*decoder_, layout, ids, reads);
    ASSERT_EQ(whole.size(), ids.size() * config_.vocab_size);
    for (const std::vector<int>& slices : std::vector<std::vector<int>>{
             {1}, {2}, {7}, {16}, {17}, {33}, {64}, {40, 1}, {3, 29, 5, 1, 1, 30}}) {
      EXPECT_EQ(FeedNew(*decoder_, layout, ids, reads, slices), whole) << "slices of " << slices[0];
    }
  }
}

// What architecture.md promises of every weight format, on every kernel path: rows that are
// quantised on the fly, and products of few and of many rows, included.
TEST_F(DecoderTest, SlicesChangeNothingInAnyFormat) {
  const std::vector<int32_t> ids = RandomIds(config_, 79, 4);
  for (const std::string& instructions : InstructionSets()) {
    const std::unique_ptr<Device> device = TestDevice(instructions, 2);
    for (WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kInt8}) {
      SCOPED_TRACE(instructions + ", format " + std::to_string(static_cast<int>(format)));
      const std::unique_ptr<Decoder> decoder =
          TestDecoder(RandomModel(device.get(), config_, format));
      LoadMemories(*decoder,
                   WriteMemories(*decoder, {RandomIds(config_, 32, 1), RandomIds(config_, 19, 2),
                                            RandomIds(config_, 3, 3)}));
      const std::vector<float> whole = FeedNew(*decoder, Layout::kMemory, ids, kReads);
      for (int slice : {1, 5, 16, 40}) {
        EXPECT_EQ(FeedNew(*decoder, Layout::kMemory, ids, kReads, {slice}), whole) << slice;
      }
    }
  }
}

TEST_F(DecoderTest, BatchCompositionDoesNotChangeASequence) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 79, 5);
  const std::vector<float> alone = FeedNew(*decoder_, Layout::kMemory, ids, kReads);
  // Its prefill in slices of 13, then single steps, among nine others that prefill and decode in
  // both layouts and come and go.
  auto own = decoder_->Start(Layout::kMemory);
  ASSERT_TRUE(own.ok());
  std::vector<Sequence> others;
  others.reserve(9);
  for (int i = 0; i < 9; ++i)
    others.push_back(*decoder_->Start(i % 2 == 0 ? Layout::kPlain : Layout::kMemory));
  std::vector<float> together;
  int step = 0;
  for (int begin = 0; begin < 79; ++step) {
    const int end = std::min(79, begin + (begin < 52 ? 13 : 1));
    const std::vector<MemoryRead> reads = CutReads(kReads, begin, end);
    std::vector<std::vector<int32_t>> other_ids;
    std::vector<Slice> slices;
    std::vector<MemoryRead> other_reads[9];
    const int own_place = step % 4;
    int logits_before = 0;
    other_ids.reserve(9);
    for (int i = 0; i < 9; ++i)
      other_ids.push_back(RandomIds(config_, i % 3 == 0 ? 11 : 1, 100 * step + i));
    for (int i = 0; i < 9; ++i) {
      if (i == own_place) {
        slices.push_back({&*own, std::span(ids).subspan(begin, end - begin), reads, end - begin});
      }
      if ((step + i) % 4 == 3) {
        others[i] = *decoder_->Start(others[i].layout());
        continue;
      }
      if (others[i].layout() == Layout::kMemory) {
        other_reads[i] = {{static_cast<int>(other_ids[i].size()), {i % 3, (i + 1) % 3}}};
      }
      slices.push_back({&others[i], other_ids[i], other_reads[i], 1});
      logits_before += i < own_place;
    }
    ASSERT_TRUE(decoder_->Forward(slices).ok());
    std::vector<float> logits;
    ASSERT_TRUE(decoder_->DownloadLogits(&logits).ok());
    const auto first = logits.begin() + int64_t{logits_before} * config_.vocab_size;
    together.insert(together.end(), first, first + int64_t{end - begin} * config_.vocab_size);
    begin = end;
  }
  EXPECT_EQ(together, alone);
}

TEST_F(DecoderTest, ThreadsDoNotChangeALogit) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 79, 5);
  const std::vector<float> expected = FeedNew(*decoder_, Layout::kMemory, ids, kReads);
  for (int threads : {2, 3}) {
    std::unique_ptr<Device> device = TestDevice("", threads);
    std::unique_ptr<Decoder> decoder = TestDecoder(RandomModel(device.get(), config_));
    LoadMemories(*decoder,
                 WriteMemories(*decoder, {RandomIds(config_, 32, 1), RandomIds(config_, 19, 2),
                                          RandomIds(config_, 3, 3)}));
    EXPECT_EQ(FeedNew(*decoder, Layout::kMemory, ids, kReads), expected) << threads;
  }
}

TEST_F(DecoderTest, MemoriesChangeTheLogits) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 20, 6);
  const std::vector<float> none = FeedNew(*decoder_, Layout::kMemory, ids);
  const std::vector<float> one = FeedNew(*decoder_, Layout::kMemory, ids, {{20, {0}}});
  const std::vector<float> other = FeedNew(*decoder_, Layout::kMemory, ids, {{20, {1}}});
  EXPECT_GT(Difference(one, none), 0.01);
  EXPECT_GT(Difference(one, other), 0.01);
  // And only from the token on that reads them.
  const std::vector<float> later = FeedNew(*decoder_, Layout::kMemory, ids, {{12, {}}, {8, {0}}});
  const size_t before = size_t{12} * config_.vocab_size;
  EXPECT_TRUE(std::equal(later.begin(), later.begin() + before, none.begin()));
  EXPECT_GT(Difference(std::span(later).subspan(before), std::span(none).subspan(before)), 0.01);
}

TEST_F(DecoderTest, PermutingAChunksMemoriesChangesNothing) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 40, 7);
  const std::vector<float> expected = FeedNew(*decoder_, Layout::kMemory, ids, {{40, {0, 1, 2}}});
  for (const std::vector<int>& order :
       std::vector<std::vector<int>>{{0, 2, 1}, {1, 2, 0}, {2, 1, 0}}) {
    EXPECT_EQ(FeedNew(*decoder_, Layout::kMemory, ids, {{40, order}}), expected);
  }
}

TEST_F(DecoderTest, SequencesThatShareASlotReadTheSame) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 25, 8);
  const std::vector<float> alone = FeedNew(*decoder_, Layout::kMemory, ids, {{25, {1}}});
  Sequence a = *decoder_->Start(Layout::kMemory), b = *decoder_->Start(Layout::kMemory);
  const MemoryRead read{25, {1}};
  const Slice slices[] = {{&a, ids, {&read, 1}, 25}, {&b, ids, {&read, 1}, 25}};
  ASSERT_TRUE(decoder_->Forward(slices).ok());
  std::vector<float> logits;
  ASSERT_TRUE(decoder_->DownloadLogits(&logits).ok());
  const size_t half = alone.size();
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), logits.begin()));
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), logits.begin() + half));
}

// explicit-memory.md: one full-length memory kept dense is exactly the plain forward of prefix +
// reference + context.
TEST_F(DecoderTest, DenseMemoryIsThePlainForward) {
  config_ = SmallConfig();
  ExplicitMemoryConfig dense = DenseMode(config_, {1, 20, 30});
  for (int reference_tokens : {32, 128}) {
    dense.reference_tokens = dense.tokens_kept = reference_tokens;
    std::unique_ptr<Decoder> decoder = Make({.memory = dense});
    const std::vector<int32_t> reference = RandomIds(config_, reference_tokens, 9);
    std::vector<int32_t> context = {1};
    for (int32_t id : RandomIds(config_, 60, 10)) context.push_back(id);
    LoadMemories(*decoder, WriteMemories(*decoder, {reference}));
    ASSERT_EQ(decoder->pool().tokens(0), reference_tokens);
    const std::vector<float> with_memory = FeedNew(*decoder, Layout::kMemory, context, {{61, {0}}});

    std::vector<int32_t> everything = dense.prefix_token_ids;
    everything.insert(everything.end(), reference.begin(), reference.end());
    everything.insert(everything.end(), context.begin(), context.end());
    const std::vector<float> plain = FeedNew(*decoder, Layout::kPlain, everything);
    const std::span<const float> tail =
        std::span(plain).subspan((everything.size() - context.size()) * config_.vocab_size);
    EXPECT_LE(Difference(with_memory, tail), 1e-5) << reference_tokens;
  }
}

TEST_F(DecoderTest, StoredAndLoadedMemoriesAreTheSameBits) {
  const std::vector<ExplicitMemory> written =
      WriteMemories(*decoder_, {RandomIds(config_, 32, 1), RandomIds(config_, 3, 3)});
  const std::unique_ptr<Codec> codec = MakeF32Codec(config_.head_dim);
  const Hash256 fingerprint = Sha256Of("a model");
  std::vector<ExplicitMemory> loaded;
  for (const ExplicitMemory& memory : written) {
    auto record = EncodeRecord(memory, fingerprint, *codec);
    ASSERT_TRUE(record.ok()) << record.status();
    auto decoded = DecodeRecord(*record, fingerprint, *codec);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(decoded->values, memory.values);
    EXPECT_EQ(decoded->shape, memory.shape);
    EXPECT_EQ(decoded->reference_tokens, memory.reference_tokens);
    loaded.push_back(*std::move(decoded));
  }
  const std::vector<int32_t> ids = RandomIds(config_, 20, 6);
  LoadMemories(*decoder_, written);
  const std::vector<float> expected = FeedNew(*decoder_, Layout::kMemory, ids, {{20, {0, 1}}});
  LoadMemories(*decoder_, loaded);
  EXPECT_EQ(FeedNew(*decoder_, Layout::kMemory, ids, {{20, {0, 1}}}), expected);
}

TEST_F(DecoderTest, Bf16CachesStayClose) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 79, 11);
  const std::vector<float> exact = FeedNew(*decoder_, Layout::kMemory, ids, kReads);
  decoder_ = Make({.kv_dtype = DType::kBF16, .memory_dtype = DType::kBF16});
  LoadThree();
  const std::vector<float> rounded = FeedNew(*decoder_, Layout::kMemory, ids, kReads);
  // bf16 has 8 bits of mantissa: half a unit is 0.2 %, through four layers.
  EXPECT_LT(Difference(rounded, exact), 0.03);
  EXPECT_GT(Difference(rounded, exact), 0) << "the caches are not bf16";
  // Slices change nothing here either: attention reads every key from the cache.
  EXPECT_EQ(FeedNew(*decoder_, Layout::kMemory, ids, kReads, {9}), rounded);
}

// A record's payload loads as the memory it stands for, through every codec: to the bit, for the
// order of sums hangs on the values.
TEST_F(DecoderTest, EncodedMemoriesLoadAsDecodedOnes) {
  VqCodebook book;
  book.head_dim = config_.head_dim;
  book.coarse_bits = 3;
  book.fine_bits = 2;
  book.rotation.assign(64, 0.0f);
  for (int i = 0; i < 8; ++i) book.rotation[i * 8 + (i * 3 + 1) % 8] = 1;
  for (int i = 0; i < 8 << 3; ++i) book.coarse.push_back(static_cast<float>(i % 11) - 5);
  for (int i = 0; i < 8 << 2; ++i) book.fine.push_back(0.1f * static_cast<float>(i % 7));
  const std::string file = SerializeCodebook(book).value();
  const std::vector<ExplicitMemory> written =
      WriteMemories(*decoder_, {RandomIds(config_, 32, 1), RandomIds(config_, 3, 3)});
  const Hash256 fingerprint = Sha256Of("a model");
  const std::vector<int32_t> ids = RandomIds(config_, 20, 6);
  for (const CodecId id : {CodecId::kF32, CodecId::kBF16, CodecId::kInt8, CodecId::kVq}) {
    SCOPED_TRACE(CodecName(id));
    const auto codec =
        MakeCodec(id, config_.head_dim, id == CodecId::kVq ? std::string_view(file) : "");
    ASSERT_TRUE(codec.ok()) << codec.status();
    std::vector<ExplicitMemory> decoded;
    std::vector<std::string> records;
    for (const ExplicitMemory& memory : written) {
      records.push_back(EncodeRecord(memory, fingerprint, **codec).value());
      decoded.push_back(DecodeRecord(records.back(), fingerprint, **codec).value());
    }
    LoadMemories(*decoder_, decoded);
    const std::vector<float> expected = FeedNew(*decoder_, Layout::kMemory, ids, {{20, {0, 1}}});
    MemoryPool& pool = decoder_->pool();
    const auto codes = [&](int i) {
      const std::string_view payload = RecordPayload(records[i]);
      return std::span(reinterpret_cast<const uint8_t*>(payload.data()), payload.size());
    };
    for (const int i : {0, 1}) {
      pool.Unload(i);
      const absl::Status status = pool.LoadEncoded(i, decoded[i].shape, codes(i), **codec);
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_EQ(FeedNew(*decoder_, Layout::kMemory, ids, {{20, {0, 1}}}), expected);

    const auto refused = [&](int slot, const MemoryShape& shape, std::span<const uint8_t> bytes) {
      return pool.LoadEncoded(slot, shape, bytes, **codec).code();
    };
    const MemoryShape& shape = decoded[0].shape;
    EXPECT_EQ(refused(64, shape, codes(0)), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(refused(0, shape, codes(0).subspan(1)), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(refused(0, decoded[1].shape, codes(0)), absl::StatusCode::kInvalidArgument);
    const auto wide = MakeF32Codec(2 * config_.head_dim);
    EXPECT_EQ(pool.LoadEncoded(0, shape, std::vector<uint8_t>(shape.vectors() * 64), *wide).code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(pool.tokens(0), 4) << "a refused memory must leave the slot as it was";
  }
}

// The memory reader fills slots while the engine computes with others.
TEST_F(DecoderTest, SlotsAreLoadedBesideCompute) {
  LoadThree();
  const std::vector<ExplicitMemory> more =
      WriteMemories(*decoder_, {RandomIds(config_, 30, 21), RandomIds(config_, 2, 22)});
  const std::vector<int32_t> ids = RandomIds(config_, 79, 4);
  const std::vector<float> expected = FeedNew(*decoder_, Layout::kMemory, ids, kReads);
  std::atomic<bool> done = false;
  std::thread reader([&] {
    for (int i = 0; !done || i < 100; ++i) {
      const absl::Status status = decoder_->pool().Load(3 + i % 4, more[i % 2]);
      ASSERT_TRUE(status.ok()) << status;
    }
  });
  for (int i = 0; i < 10; ++i)
    EXPECT_EQ(FeedNew(*decoder_, Layout::kMemory, ids, kReads, {i + 1}), expected);
  done = true;
  reader.join();
  const std::vector<float> with_new = FeedNew(*decoder_, Layout::kMemory, ids, {{79, {3, 4}}});
  LoadMemories(*decoder_, more);
  EXPECT_EQ(FeedNew(*decoder_, Layout::kMemory, ids, {{79, {0, 1}}}), with_new);
}

TEST_F(DecoderTest, FullPagesMayBeShared) {
  LoadThree();
  const std::vector<int32_t> ids = RandomIds(config_, 79, 12);
  const std::vector<float> expected = FeedNew(*decoder_, Layout::kMemory, ids, kReads);
  Sequence first = *decoder_->Start(Layout::kMemory);
  Feed(*decoder_, first, std::span(ids).first(50), kReads);
  const std::vector<KvPage> full(first.pages().begin(), first.pages().begin() + 3);
  auto second = decoder_->Start(Layout::kMemory, full);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->length(), 48);
  EXPECT_EQ(full[0].use_count(), 3);
  const std::vector<float> rest =
      Feed(*decoder_, *second, std::span(ids).subspan(48), CutReads(kReads, 48, 79));
  EXPECT_EQ(rest, std::vector<float>(expected.begin() + 48 * config_.vocab_size, expected.end()));
}

TEST_F(DecoderTest, PagesAreFreedWithTheirSequences) {
  const int free = decoder_->cache().free_pages();
  {
    Sequence sequence = *decoder_->Start(Layout::kPlain);
    EXPECT_EQ(Decoder::PagesNeeded(sequence, 17), 2);
    Feed(*decoder_, sequence, RandomIds(config_, 17, 1));
    EXPECT_EQ(decoder_->cache().free_pages(), free - 2);
    EXPECT_EQ(Decoder::PagesNeeded(sequence, 15), 0);
    EXPECT_EQ(Decoder::PagesNeeded(sequence, 16), 1);
  }
  EXPECT_EQ(decoder_->cache().free_pages(), free);
}

TEST_F(DecoderTest, AFullCacheFeedsNothing) {
  decoder_ = Make({.kv_pages = 3});
  Sequence a = *decoder_->Start(Layout::kPlain), b = *decoder_->Start(Layout::kPlain);
  const std::vector<int32_t> ids = RandomIds(config_, 32, 1);
  const Slice slices[] = {{&a, ids}, {&b, ids}};
  const absl::Status status = decoder_->Forward(slices);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_EQ(a.length(), 0);
  EXPECT_EQ(decoder_->cache().free_pages(), 3);
  EXPECT_TRUE(decoder_->Forward({slices, 1}).ok());
}

TEST_F(DecoderTest, ArgMaxIsTheLogitsArgMax) {
  Sequence sequence = *decoder_->Start(Layout::kMemory);
  const std::vector<int32_t> ids = RandomIds(config_, 12, 3);
  const std::vector<float> logits = Feed(*decoder_, sequence, ids);
  auto chosen = decoder_->ArgMax();
  ASSERT_TRUE(chosen.ok());
  ASSERT_EQ(chosen->size(), ids.size());
  for (size_t row = 0; row < ids.size(); ++row) {
    const auto begin = logits.begin() + row * config_.vocab_size;
    EXPECT_EQ((*chosen)[row], std::max_element(begin, begin + config_.vocab_size) - begin) << row;
  }
}

TEST_F(DecoderTest, PositionsAreTheLayouts) {
  // Prefix of 3, references of 32.
  EXPECT_EQ(decoder_->Position(Layout::kPlain, 0), 0);
  EXPECT_EQ(decoder_->Position(Layout::kMemory, 0), 35);
  EXPECT_EQ(decoder_->Position(Layout::kMemory, 7), 42);
  EXPECT_EQ(decoder_->max_context(Layout::kPlain), 512);
  EXPECT_EQ(decoder_->max_context(Layout::kMemory), 512 - 3 - 32);
}

TEST_F(DecoderTest, LongestContext) {
  for (Layout layout : {Layout::kPlain, Layout::kMemory}) {
    Sequence sequence = *decoder_->Start(layout);
    const int longest = decoder_->max_context(layout);
    ASSERT_FALSE(Feed(*decoder_, sequence, RandomIds(config_, longest, 1)).empty());
    const std::vector<int32_t> one = {5};
    const Slice slice{&sequence, one};
    const absl::Status status = decoder_->Forward({&slice, 1});
    EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange) << status;
    EXPECT_EQ(sequence.length(), longest);
  }
}

TEST_F(DecoderTest, BadSlicesAreRefusedAndFeedNothing) {
  LoadThree();
  Sequence plain = *decoder_->Start(Layout::kPlain), memory = *decoder_->Start(Layout::kMemory);
  const std::vector<int32_t> good = {1, 2, 3}, negative = {1, -1}, large = {config_.vocab_size},
                             none;
  const std::vector<int32_t> many = RandomIds(config_, decoder_->options().max_rows + 1, 1);
  const std::vector<MemoryRead> reads = {{3, {0}}}, few = {{2, {0}}}, zero = {{0, {0}}, {3, {}}},
                                twice = {{3, {1, 1}}}, beyond = {{3, {64}}}, below = {{3, {-1}}},
                                empty_slot = {{3, {5}}};
  struct Case {
    std::vector<Slice> slices;
    absl::StatusCode code;
    std::string message;
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const std::vector<Case> cases = {
      {{}, kInvalid, "0 rows"},
      {{{&plain, none}}, kInvalid, "no tokens"},
      {{{&plain, negative}}, kInvalid, "token_ids[1] is -1"},
      {{{&plain, large}}, kInvalid, "token_ids[0] is 96"},
      {{{&plain, good, {}, 4}}, kInvalid, "logit_rows"},
      {{{&plain, good}, {&plain, good}}, kInvalid, "one sequence"},
      {{{&plain, good, reads}}, kInvalid, "plain layout"},
      {{{&memory, good, few}}, kInvalid, "reads cover 2"},
      {{{&memory, good, zero}}, kInvalid, "a run of 0"},
      {{{&memory, good, twice}}, kInvalid, "slot 1 twice"},
      {{{&memory, good, beyond}}, kInvalid, "slot 64"},
      {{{&memory, good, below}}, kInvalid, "slot -1"},
      {{{&memory, good, empty_slot}}, absl::StatusCode::kFailedPrecondition, "slot 5"},
      {{{&plain, good}, {&memory, many}}, absl::StatusCode::kOutOfRange, "longest"},
  };
  for (const Case& c : cases) {
    const absl::Status status = decoder_->Forward(c.slices);
    EXPECT_EQ(status.code(), c.code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
    EXPECT_EQ(plain.length() + memory.length(), 0);
  }
  decoder_ = Make({.max_rows = 4, .max_logit_rows = 2});
  Sequence sequence = *decoder_->Start(Layout::kPlain);
  const std::vector<int32_t> five = {1, 2, 3, 4, 5};
  const Slice too_many{&sequence, five}, too_many_logits{&sequence, good, {}, 3};
  EXPECT_THAT(std::string(decoder_->Forward({&too_many, 1}).message()), HasSubstr("max_rows"));
  EXPECT_THAT(std::string(decoder_->Forward({&too_many_logits, 1}).message()),
              HasSubstr("max_logit_rows"));
}

TEST_F(DecoderTest, WithoutGeometryThereIsOnlyThePlainLayout) {
  config_.explicit_memory.reset();
  decoder_ = Make({});
  EXPECT_EQ(decoder_->Start(Layout::kMemory).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(FeedNew(*decoder_, Layout::kPlain, RandomIds(config_, 5, 1)).size(),
            size_t(5 * config_.vocab_size));
}

TEST_F(DecoderTest, BadGeometryIsRefusedByItsField) {
  const std::shared_ptr<const Model> model = RandomModel(device_.get(), config_);
  const auto message = [&](auto change) {
    ExplicitMemoryConfig memory = *config_.explicit_memory;
    change(memory);
    const auto decoder = Decoder::Create(model, {.memory = memory});
    EXPECT_EQ(decoder.status().code(), absl::StatusCode::kInvalidArgument) << decoder.status();
    return std::string(decoder.status().message());
  };
  EXPECT_THAT(message([](auto& m) { m.memory_layers = {}; }), HasSubstr("memory_layers"));
  EXPECT_THAT(message([](auto& m) { m.memory_layers = {0, 4}; }), HasSubstr("memory_layers"));
  EXPECT_THAT(message([](auto& m) { m.memory_layers = {2, 0}; }), HasSubstr("memory_layers"));
  EXPECT_THAT(message([](auto& m) { m.tokens_kept = 0; }), HasSubstr("tokens_kept"));
  EXPECT_THAT(message([](auto& m) { m.prefix_token_ids = {}; }), HasSubstr("prefix_token_ids"));
  EXPECT_THAT(message([](auto& m) { m.prefix_token_ids = {96}; }), HasSubstr("prefix_token_ids"));
  EXPECT_THAT(message([](auto& m) { m.reference_tokens = 509; }),
              HasSubstr("max_position_embeddings"));
}

TEST_F(DecoderTest, PoolRefusesAnotherModelsMemories) {
  ExplicitMemory memory = WriteMemories(*decoder_, {RandomIds(config_, 8, 1)})[0];
  EXPECT_TRUE(decoder_->pool().Load(0, memory).ok());
  EXPECT_EQ(decoder_->pool().Load(-1, memory).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(decoder_->pool().Load(64, memory).code(), absl::StatusCode::kInvalidArgument);
  for (int MemoryShape::*field :
       {&MemoryShape::layers, &MemoryShape::kv_heads, &MemoryShape::head_dim}) {
    ExplicitMemory other = memory;
    ++(other.shape.*field);
    other.values.resize(other.shape.values());
    EXPECT_EQ(decoder_->pool().Load(0, other).code(), absl::StatusCode::kInvalidArgument);
  }
  ExplicitMemory wide = memory;
  wide.shape.tokens = 5;
  wide.values.resize(wide.shape.values());
  EXPECT_EQ(decoder_->pool().Load(0, wide).code(), absl::StatusCode::kInvalidArgument);
  memory.values.pop_back();
  EXPECT_EQ(decoder_->pool().Load(0, memory).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(decoder_->pool().tokens(0), 4) << "a refused memory must leave the slot as it was";
  decoder_->pool().Unload(0);
  EXPECT_EQ(decoder_->pool().tokens(0), 0);
}

}  // namespace
}  // namespace memory3
