// The CUDA device against the CPU device, operation by operation, with the same inputs: in f32 the
// two must agree closely, in bf16 within what rounding of activations explains. Skipped, loudly,
// where there is no GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "memory/vq_codec.h"
#include "transformer/block.h"
#include "transformer/cuda/vq_decode.h"
#include "transformer/decoder.h"
#include "transformer/device.h"
#include "transformer/memory_pool.h"
#include "transformer/model.h"
#include "transformer/parameters.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

using Floats = std::vector<float>;

uint16_t ToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float FromBf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Numbers that bf16 holds exactly, so that both devices read the same.
Floats Random(int64_t n, uint32_t seed, float deviation = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, deviation);
  Floats x(n);
  for (float& v : x) v = FromBf16(ToBf16(normal(engine)));
  return x;
}

// max|a - b| / max|b|; infinite where a holds NaN or the sizes differ.
double Difference(const Floats& a, const Floats& b) {
  if (a.size() != b.size()) return INFINITY;
  double most = 0, scale = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) < INFINITY)) return INFINITY;
    most = std::max<double>(most, std::fabs(a[i] - b[i]));
    scale = std::max<double>(scale, std::fabs(b[i]));
  }
  return scale == 0 ? most : most / scale;
}

// One device and the buffers a test makes on it.
class Side {
 public:
  explicit Side(Device* device) : device(*device) {}

  void* Bytes(size_t bytes) {
    absl::StatusOr<Buffer> buffer = device.Allocate(bytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    buffers_.push_back(*std::move(buffer));
    return buffers_.back().data();
  }
  Tensor Put(const Floats& values, int64_t rows, int64_t cols, DType dtype) {
    EXPECT_EQ(static_cast<int64_t>(values.size()), rows * cols);
    Tensor t{Bytes(rows * cols * SizeOf(dtype)), dtype, rows, cols, cols};
    if (dtype == DType::kF32) {
      device.Upload(t.data, values.data(), values.size() * 4);
    } else {
      std::vector<uint16_t> rounded(values.size());
      for (size_t i = 0; i < values.size(); ++i) rounded[i] = ToBf16(values[i]);
      device.Upload(t.data, rounded.data(), rounded.size() * 2);
    }
    EXPECT_TRUE(device.Synchronize().ok());
    return t;
  }
  Tensor F32(const Floats& values, int64_t rows, int64_t cols) {
    return Put(values, rows, cols, DType::kF32);
  }
  // In the device's activation type.
  Tensor Act(const Floats& values, int64_t rows, int64_t cols) {
    return Put(values, rows, cols, device.activation_dtype());
  }
  Floats Get(const Tensor& t) {
    Floats values(t.rows * t.cols);
    for (int64_t r = 0; r < t.rows; ++r) {
      const Tensor row = t.Rows(r, 1);
      absl::Status status;
      if (t.dtype == DType::kF32) {
        status = device.Download(&values[r * t.cols], row.data, t.cols * 4);
      } else {
        std::vector<uint16_t> bits(t.cols);
        status = device.Download(bits.data(), row.data, t.cols * 2);
        std::transform(bits.begin(), bits.end(), values.begin() + r * t.cols, FromBf16);
      }
      EXPECT_TRUE(status.ok()) << status;
    }
    return values;
  }
  std::vector<int32_t> GetInts(const void* data, int64_t n) {
    std::vector<int32_t> values(n);
    const absl::Status status = device.Download(values.data(), data, n * 4);
    EXPECT_TRUE(status.ok()) << status;
    return values;
  }

  Device& device;

 private:
  std::vector<Buffer> buffers_;
};

class CudaDeviceTest : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    auto cuda = MakeCudaDevice({.ordinal = 0, .activations = GetParam()});
    if (absl::IsFailedPrecondition(cuda.status())) GTEST_SKIP() << cuda.status().message();
    ASSERT_TRUE(cuda.ok()) << cuda.status();
    auto cpu = MakeCpuDevice({});
    ASSERT_TRUE(cpu.ok()) << cpu.status();
    cuda_ = *std::move(cuda);
    cpu_ = *std::move(cpu);
  }
  // What one operation may differ by: f32 by the order of sums, bf16 by a rounding or a few.
  double tolerance() const { return GetParam() == DType::kF32 ? 1e-4 : 2e-2; }

  // Runs `test` on both devices, the CUDA device twice: its results agree with the CPU's, and with
  // themselves to the bit.
  void Compare(const std::function<std::vector<Floats>(Side&)>& test) {
    Side cpu(cpu_.get()), cuda(cuda_.get()), again(cuda_.get());
    const std::vector<Floats> wanted = test(cpu), got = test(cuda), repeated = test(again);
    ASSERT_EQ(got.size(), wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
      EXPECT_LE(Difference(got[i], wanted[i]), tolerance()) << "result " << i;
      EXPECT_EQ(got[i], repeated[i]) << "result " << i << " of a call repeated";
    }
  }

  std::unique_ptr<Device> cuda_, cpu_;
};

INSTANTIATE_TEST_SUITE_P(Activations, CudaDeviceTest, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) {
                           return info.param == DType::kF32 ? std::string("f32")
                                                            : std::string("bf16");
                         });

// ---- products ----

TEST_P(CudaDeviceTest, MatMulOfAnyNumberOfRows) {
  // Rows on both sides of the kernels' limits; sizes that no tile divides.
  for (const auto& [out, in] : std::vector<std::pair<int, int>>{{96, 64}, {250, 200}, {33, 24}}) {
    for (const int rows : {1, 3, 8, 9, 16, 17, 64, 130}) {
      SCOPED_TRACE(std::to_string(rows) + " rows, " + std::to_string(in) + " to " +
                   std::to_string(out));
      Compare([&, out = out, in = in](Side& s) {
        const Tensor x = s.Act(Random(rows * in, 1), rows, in);
        const Tensor y = s.F32(Random(rows * out, 2), rows, out);
        const Tensor z = s.Act(Floats(rows * out), rows, out);
        auto w = s.device.PrepareWeight(Random(out * in, 3, 0.1f), out, in, WeightFormat::kBF16);
        EXPECT_TRUE(w.ok());
        s.device.MatMul(y, x, **w, /*accumulate=*/true);
        s.device.MatMul(z, x, **w, /*accumulate=*/false);
        return std::vector<Floats>{s.Get(y), s.Get(z)};
      });
    }
  }
}

TEST_P(CudaDeviceTest, MatMulOfExactAndOfInt8Weights) {
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kInt8}) {
    for (const int rows : {1, 12, 40}) {
      Compare([&](Side& s) {
        const int out = 112, in = 144;
        const Tensor x = s.Act(Random(rows * in, 4), rows, in);
        const Tensor y = s.F32(Floats(rows * out), rows, out);
        auto w = s.device.PrepareWeight(Random(out * in, 5, 0.1f), out, in, format);
        EXPECT_TRUE(w.ok());
        s.device.MatMul(y, x, **w, false);
        return std::vector<Floats>{s.Get(y)};
      });
    }
  }
}

TEST_P(CudaDeviceTest, MatMulReadsViewsOfRowsAndColumns) {
  Compare([](Side& s) {
    const int rows = 21, in = 40, out = 56;
    const Tensor x = s.Act(Random(30 * 104, 6), 30, 104).Rows(5, rows).Cols(8, in);
    const Tensor y = s.F32(Random(40 * 90, 7), 40, 90).Rows(3, rows).Cols(17, out);
    auto w = s.device.PrepareWeight(Random(out * in, 8), out, in, WeightFormat::kBF16);
    EXPECT_TRUE(w.ok());
    s.device.MatMul(y, x, **w, true);
    return std::vector<Floats>{s.Get(y)};
  });
}

TEST_P(CudaDeviceTest, MatMulBackward) {
  for (const int rows : {5, 77}) {
    Compare([&](Side& s) {
      const int in = 48, out = 72;
      const Tensor w = s.F32(Random(out * in, 9, 0.1f), out, in);
      const Tensor shadow = s.Act(Random(out * in, 9, 0.1f), out, in);
      const bool has_shadow = s.device.activation_dtype() == DType::kBF16;
      const auto weight = s.device.TrainableWeight(w, has_shadow ? shadow.data : nullptr);
      const Tensor x = s.Act(Random(rows * in, 10), rows, in);
      const Tensor dy = s.Act(Random(rows * out, 11), rows, out);
      const Tensor dx = s.F32(Random(rows * in, 12), rows, in);
      const Tensor dx_new = s.Act(Floats(rows * in), rows, in);
      const Tensor dw = s.F32(Random(out * in, 13), out, in);
      s.device.MatMulBackwardInput(dx, dy, *weight, true);
      s.device.MatMulBackwardInput(dx_new, dy, *weight, false);
      s.device.MatMulBackwardWeight(dw, dy, x);
      return std::vector<Floats>{s.Get(dx), s.Get(dx_new), s.Get(dw)};
    });
  }
}

// ---- rows ----

TEST_P(CudaDeviceTest, NormForwardAndBackward) {
  for (const int cols : {64, 90, 3200}) {
    Compare([&](Side& s) {
      const int rows = 70;
      const Tensor x = s.F32(Random(rows * cols, 14), rows, cols);
      const Tensor gain = s.F32(Random(cols, 15), 1, cols);
      const Tensor inv_rms = s.F32(Floats(rows), 1, rows);
      const Tensor y = s.Act(Floats(rows * cols), rows, cols);
      s.device.RmsNorm(y, x, gain.as<float>(), 1e-5f, inv_rms.as<float>());
      const Tensor dy = s.Act(Random(rows * cols, 16), rows, cols);
      const Tensor dx = s.F32(Random(rows * cols, 17), rows, cols);
      const Tensor dgain = s.F32(Random(cols, 18), 1, cols);
      s.device.RmsNormBackward(dx, dgain.as<float>(), dy, x, gain.as<float>(), inv_rms.as<float>());
      return std::vector<Floats>{s.Get(y), s.Get(inv_rms), s.Get(dx), s.Get(dgain)};
    });
  }
}

TEST_P(CudaDeviceTest, EmbedRopeSiluGatherAndTheirBackwards) {
  BatchInput input;
  for (int i = 0; i < 37; ++i) {
    input.token_ids.push_back(i * i % 11);  // ids come several times
    input.positions.push_back(i * 53);
    if (i % 3 == 1) input.logit_rows.push_back(i);
  }
  const int rows = 37, d = 48, picked = static_cast<int>(input.logit_rows.size());
  Floats inv_freq(8);
  for (int i = 0; i < 8; ++i) inv_freq[i] = std::pow(10000.0f, -i / 8.0f);
  Compare([&](Side& s) {
    const PreparedBatch& batch = *s.device.Prepare(input, 1);
    const Tensor table = s.F32(Random(11 * d, 19), 11, d);
    const Tensor x = s.F32(Floats(rows * d), rows, d);
    s.device.Embed(x, batch, table);
    const Tensor dtable = s.F32(Random(11 * d, 20), 11, d);
    s.device.EmbedBackward(dtable, s.F32(Random(rows * d, 21), rows, d), batch);

    const Tensor heads = s.Act(Random(rows * d, 22), rows, d);
    s.device.Rope(heads, batch, inv_freq, 3, 16, /*inverse=*/false);
    const Tensor back = s.Act(Random(rows * d, 23), rows, d);
    s.device.Rope(back.Cols(0, 32), batch, inv_freq, 2, 16, /*inverse=*/true);

    const Tensor gate_up = s.Act(Random(rows * d, 24, 2), rows, d);
    const Tensor hidden = s.Act(Floats(rows * d / 2), rows, d / 2);
    s.device.SiluMul(hidden, gate_up);
    const Tensor dgate_up = s.Act(Floats(rows * d), rows, d);
    s.device.SiluMulBackward(dgate_up, s.Act(Random(rows * d / 2, 25), rows, d / 2), gate_up);

    const Tensor gathered = s.F32(Floats(picked * d), picked, d);
    s.device.GatherRows(gathered, x, batch);
    const Tensor scattered = s.F32(Random(rows * d, 26), rows, d);
    s.device.ScatterRows(scattered, gathered, batch);
    return std::vector<Floats>{s.Get(x),      s.Get(dtable),   s.Get(heads),    s.Get(back),
                               s.Get(hidden), s.Get(dgate_up), s.Get(gathered), s.Get(scattered)};
  });
}

TEST_P(CudaDeviceTest, ArgMaxTakesTheLowerOfEquals) {
  Floats logits = Random(5 * 4099, 27);
  logits[0 * 4099 + 3000] = logits[0 * 4099 + 17] = 50;
  logits[1 * 4099 + 4098] = 50;
  std::fill_n(logits.begin() + 2 * 4099, 4099, -INFINITY);
  Side cpu(cpu_.get()), cuda(cuda_.get());
  std::vector<int32_t> ids[2];
  for (Side* s : {&cpu, &cuda}) {
    void* out = s->Bytes(5 * 4);
    s->device.ArgMax(static_cast<int32_t*>(out), s->F32(logits, 5, 4099));
    ids[s == &cuda] = s->GetInts(out, 5);
  }
  EXPECT_EQ(ids[1], ids[0]);
  EXPECT_EQ(ids[1][0], 17);
}

TEST_P(CudaDeviceTest, CrossEntropy) {
  for (const int vocab : {1000, 4099, 32000}) {
    Compare([&](Side& s) {
      Floats numbers = Random(6 * vocab, 28, 3);
      // A thread may meet nothing but minus infinities before its first number.
      std::fill_n(numbers.begin() + 4 * vocab, 400, -INFINITY);
      const Tensor logits = s.F32(numbers, 6, vocab);
      const Tensor losses = s.F32(Floats(6, -1), 1, 6);
      const std::vector<int32_t> targets = {0, vocab - 1, -1, 7, 500, -1};
      s.device.CrossEntropy(losses.as<float>(), logits, targets, 0.25f);
      return std::vector<Floats>{s.Get(losses), s.Get(logits)};
    });
  }
}

TEST_P(CudaDeviceTest, OptimizerStepAndNorm) {
  Compare([](Side& s) {
    const int n = 100003;
    const Tensor p = s.F32(Random(n, 29), 1, n), g = s.F32(Random(n, 30), 1, n);
    const Tensor m = s.F32(Random(n, 31, 0.1f), 1, n);
    Floats squares = Random(n, 32, 0.1f);
    for (float& v : squares) v *= v;
    const Tensor v = s.F32(squares, 1, n);
    AdamW options;
    options.learning_rate = 1e-3f;
    options.weight_decay = 0.1f;
    options.step = 7;
    s.device.AdamWStep(p.as<float>(), nullptr, g.as<float>(), m.as<float>(), v.as<float>(), n,
                       options, 0.5f);
    const auto sum = s.device.SumOfSquares(g.as<float>(), n);
    EXPECT_TRUE(sum.ok());
    return std::vector<Floats>{s.Get(p), s.Get(m), s.Get(v), {static_cast<float>(*sum)}};
  });
}

TEST_P(CudaDeviceTest, OptimizerKeepsTheShadow) {
  Side s(cuda_.get());
  const int n = 1000;
  const Tensor p = s.F32(Random(n, 33), 1, n), g = s.F32(Random(n, 34), 1, n);
  const Tensor m = s.F32(Floats(n), 1, n), v = s.F32(Floats(n), 1, n);
  const Tensor shadow = s.Put(Floats(n), 1, n, DType::kBF16);
  AdamW options;
  options.learning_rate = 0.1f;
  s.device.AdamWStep(p.as<float>(), shadow.data, g.as<float>(), m.as<float>(), v.as<float>(), n,
                     options, 1);
  Floats rounded = s.Get(p);
  for (float& x : rounded) x = FromBf16(ToBf16(x));
  EXPECT_EQ(s.Get(shadow), rounded);
}

// ---- attention ----

struct AttentionCase {
  int heads, kv_heads, head_dim;
  // Type of the prefix, the memories and the pages.
  DType kv_dtype;
};

// Prefix, two memories (one of them short) and pages, read by segments of 40, 30, 1, 3, 1, 2, 1 and
// 6 rows; with the gradient of everything. The last two read memories only: where memories are not
// read, nothing. Rows 40 and 41 are in no segment.
class AttentionWorld {
 public:
  static constexpr int kRows = 86, kLayers = 2, kPrefix = 3, kKept = 8, kPageTokens = 16;
  static constexpr int kPages = 12;

  AttentionWorld(Side& s, const AttentionCase& c) : s_(s), c_(c) {
    AddSource(1, kPrefix);
    AddSource(2, kKept);
    AddSource(kPages, kPageTokens);
    AddBlock(0, 0, kPrefix, KvBlock::kSeenByAll);
    AddBlock(1, 0, kKept, KvBlock::kSeenByAll);
    AddBlock(1, 1, 5, KvBlock::kSeenByAll);
    // A context of 75 tokens and one of 38; the last pages are partly filled.
    for (int i = 0; i < 5; ++i) AddBlock(2, i, std::min(16, 75 - i * 16), i * 16);
    for (int i = 0; i < 3; ++i) AddBlock(2, 6 + i, std::min(16, 38 - i * 16), i * 16);
    // Page 6 once more, seen by all: its gradient is shared with the block above.
    AddBlock(2, 6, 10, KvBlock::kSeenByAll);
    AddSegment(0, 40, 5, {0, 1, 2, 3, 4, 5});
    AddSegment(42, 30, 45, {0, 2, 3, 4, 5, 6, 7});
    AddSegment(72, 1, 37, {0, 1, 8, 9, 10});
    AddSegment(73, 3, 30, {8, 9, 10});
    AddSegment(76, 1, 0, {0, 8});
    AddSegment(77, 2, 0, {11});
    AddSegment(79, 1, 0, {1});
    AddSegment(80, 6, 0, {2, 1});
    input.token_ids.assign(kRows, 0);
    input.positions.assign(kRows, 0);
    shape = {c.heads, c.kv_heads, c.head_dim, 1 / std::sqrt(static_cast<float>(c.head_dim))};
  }

  std::vector<Floats> Gradients() {
    std::vector<Floats> all;
    for (const Tensor& t : gradients_) all.push_back(s_.Get(t));
    return all;
  }

  BatchInput input;
  AttentionShape shape;

 private:
  void AddSource(int items, int tokens) {
    KvSource source;
    source.dtype = c_.kv_dtype;
    source.token_stride = c_.head_dim;
    source.head_stride = int64_t{tokens} * c_.head_dim;
    source.value_offset = source.head_stride * c_.kv_heads;
    source.layer_stride = source.value_offset * 2;
    const int64_t n = source.layer_stride * kLayers * items;
    storage_.push_back(s_.Put(Random(n, 40 + storage_.size()), 1, n, c_.kv_dtype));
    gradients_.push_back(s_.F32(Random(n, 50 + storage_.size(), 0.1f), 1, n));
    input.attention.sources.push_back(source);
  }
  void AddBlock(int source, int item, int tokens, int first) {
    const int64_t at = input.attention.sources[source].layer_stride * kLayers * item;
    input.attention.blocks.push_back({source,
                                      storage_[source].as<char>() + at * SizeOf(c_.kv_dtype),
                                      gradients_[source].as<float>() + at, tokens, first});
  }
  void AddSegment(int row, int rows, int first, const std::vector<int>& ids) {
    std::vector<int32_t>& all = input.attention.block_ids;
    const int begin = static_cast<int>(all.size());
    all.insert(all.end(), ids.begin(), ids.end());
    input.attention.segments.push_back({row, rows, first, begin, static_cast<int>(all.size())});
  }

  Side& s_;
  AttentionCase c_;
  std::vector<Tensor> storage_, gradients_;
};

TEST_P(CudaDeviceTest, AttentionForwardAndBackward) {
  const std::vector<AttentionCase> cases = {{4, 4, 16, DType::kF32},   {8, 1, 64, DType::kBF16},
                                            {10, 2, 80, DType::kBF16}, {4, 2, 128, DType::kF32},
                                            {6, 2, 20, DType::kF32},   {2, 1, 160, DType::kF32},
                                            {4, 4, 48, DType::kBF16},  {24, 2, 32, DType::kBF16}};
  for (const AttentionCase& c : cases) {
    for (const std::vector<int>& layers : {std::vector<int>{1, 0, 1}, std::vector<int>{0, -1, 0}}) {
      SCOPED_TRACE(std::to_string(c.heads) + " heads, " + std::to_string(c.kv_heads) +
                   " KV heads of " + std::to_string(c.head_dim) + ", memory layer " +
                   std::to_string(layers[1]));
      Compare([&](Side& s) {
        AttentionWorld world(s, c);
        const int rows = AttentionWorld::kRows, cols = c.heads * c.head_dim;
        const PreparedBatch& batch = *s.device.Prepare(world.input, 0);
        const Tensor q = s.Act(Random(rows * cols, 60), rows, cols);
        const Tensor out = s.Act(Random(rows * cols, 61), rows, cols);
        const Tensor lse = s.F32(Floats(rows * c.heads), rows, c.heads);
        s.device.Attention(out, q, batch, layers, world.shape, lse.as<float>());
        const Tensor dout = s.Act(Random(rows * cols, 62), rows, cols);
        const Tensor dq = s.F32(Floats(rows * cols), rows, cols);
        s.device.AttentionBackward(dq, dout, out, q, batch, layers, world.shape, lse.as<float>());
        // The log of a sum of nothing, as a number that can be compared.
        Floats lse_values = s.Get(lse);
        std::replace(lse_values.begin(), lse_values.end(), -INFINITY, -1.0f);
        std::vector<Floats> all = {s.Get(out), lse_values, s.Get(dq)};
        for (Floats& gradient : world.Gradients()) all.push_back(std::move(gradient));
        return all;
      });
    }
  }
}

TEST_P(CudaDeviceTest, LongContextOfOneRowIsCutIntoParts) {
  Compare([](Side& s) {
    const int tokens = 5000, d = 64, heads = 8;
    BatchInput input;
    KvSource source{DType::kBF16, int64_t{2} * tokens * d, int64_t{tokens} * d, d,
                    int64_t{tokens} * d};
    const Tensor kv = s.Put(Random(2 * tokens * d, 63), 1, 2 * tokens * d, DType::kBF16);
    input.token_ids = {1};
    input.positions = {tokens - 1};
    input.attention = {
        {source}, {{0, kv.data, nullptr, tokens, 0}}, {0}, {{0, 1, tokens - 1, 0, 1}}};
    const Tensor q = s.Act(Random(heads * d, 64), 1, heads * d);
    const Tensor out = s.Act(Floats(heads * d), 1, heads * d);
    const int layer = 0;
    s.device.Attention(out, q, *s.device.Prepare(input, 0), {&layer, 1}, {heads, 1, d, 0.125f},
                       nullptr);
    return std::vector<Floats>{s.Get(out)};
  });
}

TEST_P(CudaDeviceTest, KeysAndValuesGoWhereTheyBelong) {
  for (const DType kept : {DType::kF32, DType::kBF16}) {
    Compare([&](Side& s) {
      const int rows = 5, kv_heads = 2, d = 16, tokens = 8, layers = 3;
      KvSource source{kept, int64_t{4} * tokens * d, int64_t{tokens} * d, d,
                      int64_t{2} * tokens * d};
      const int64_t n = source.layer_stride * layers;
      const Tensor storage = s.Put(Random(n, 65), 1, n, kept);
      BatchInput input;
      input.token_ids.assign(rows, 0);
      input.positions.assign(rows, 0);
      input.attention.sources = {source};
      for (int r = 0; r < rows; ++r) {
        input.destination.push_back(r == 2 ? nullptr
                                           : storage.as<char>() + (7 - r) * d * SizeOf(kept));
      }
      const Tensor qkv = s.Act(Random(rows * 96, 66), rows, 96);
      s.device.StoreKv(*s.device.Prepare(input, 0), qkv.Cols(32, 32), qkv.Cols(64, 32), 1, kv_heads,
                       d);
      return std::vector<Floats>{s.Get(storage)};
    });
  }
}

// ---- writing ----

TEST_P(CudaDeviceTest, WritingScoresSelectsGathersAndScatters) {
  const AttentionShape shape{6, 2, 24, 1 / std::sqrt(24.0f)};
  const std::vector<ReferenceRows> references = {{2, 128}, {130, 1}, {131, 40}, {175, 5}};
  const int rows = 180, keep = 8, count = 4;
  Compare([&](Side& s) {
    const Tensor q = s.Act(Random(rows * 144, 70), rows, 144);
    const Tensor k = s.Act(Random(rows * 48, 71), rows, 48);
    const Tensor v = s.Act(Random(rows * 48, 72), rows, 48);
    const Tensor weights = s.F32(Floats(rows * 2), rows, 2);
    s.device.AttentionReceived(weights, q, k, references, shape);

    // The rest from given weights with many ties, so that both devices keep the same rows.
    Floats given = Random(rows * 2, 73);
    for (float& w : given) w = std::round(w);
    void* kept = s.Bytes(count * 2 * keep * 4);
    s.device.SelectKept(static_cast<int32_t*>(kept), s.F32(given, rows, 2), references, keep);
    const int64_t n = int64_t{count} * 2 * 2 * keep * 24;
    const Tensor memory = s.F32(Floats(n, -1), 1, n);
    s.device.GatherKept(memory.as<float>(), static_cast<int32_t*>(kept), k, v, count, keep, 2, 24);
    const Tensor dk = s.Act(Random(rows * 48, 74), rows, 48);
    const Tensor dv = s.Act(Random(rows * 48, 75), rows, 48);
    s.device.ScatterKept(dk, dv, memory.as<float>(), static_cast<int32_t*>(kept), count, keep, 2,
                         24);
    const std::vector<int32_t> ids = s.GetInts(kept, count * 2 * keep);
    return std::vector<Floats>{s.Get(weights), Floats(ids.begin(), ids.end()), s.Get(memory),
                               s.Get(dk), s.Get(dv)};
  });
}

// Of the standard code, head size 16.
VqCodebook Codebook() {
  VqCodebook book;
  book.head_dim = 16;
  book.coarse_bits = 14;
  book.fine_bits = 10;
  // A rotation by one angle in every plane (i, i + 8), then a permutation.
  book.rotation.assign(256, 0.0f);
  for (int i = 0; i < 8; ++i) {
    const int row = (i * 3 + 1) % 8;
    book.rotation[row * 16 + i] = book.rotation[(row + 8) * 16 + i + 8] = 0.6f;
    book.rotation[row * 16 + i + 8] = -0.8f;
    book.rotation[(row + 8) * 16 + i] = 0.8f;
  }
  book.coarse = Random(2 * 16384 * 8, 76);
  book.fine = Random(8 * 1024 * 2, 77, 0.1f);
  return book;
}

TEST_P(CudaDeviceTest, VqDecodesAsTheCodecDoes) {
  const VqCodebook book = Codebook();
  const auto codec = VqCodec::Create(book, Hash256{});
  ASSERT_TRUE(codec.ok()) << codec.status();
  const int n = 1003;
  Floats wanted(n * 16);
  std::vector<uint8_t> codes(n * 14);
  ASSERT_TRUE((*codec)->Encode(Random(n * 16, 78), codes).ok());
  ASSERT_TRUE((*codec)->Decode(codes, wanted).ok());

  Side s(cuda_.get());
  const auto decoder = CudaVqDecoder::Create(cuda_.get(), book);
  ASSERT_TRUE(decoder.ok()) << decoder.status();
  void* device_codes = s.Bytes(codes.size());
  cuda_->Upload(device_codes, codes.data(), codes.size());
  const Tensor vectors = s.Act(Floats(n * 16), n, 16);
  ASSERT_TRUE((*decoder)->Decode(vectors, static_cast<const uint8_t*>(device_codes)).ok());
  EXPECT_LE(Difference(s.Get(vectors), wanted), GetParam() == DType::kF32 ? 1e-5 : 5e-3);
}

// The pool decodes a record's codes into the slot: a full memory, a short one that leaves gaps
// between the heads, from several threads at once.
TEST_P(CudaDeviceTest, EncodedMemoriesAreDecodedIntoTheirSlots) {
  const auto codec = VqCodec::Create(Codebook(), Sha256Of("a codebook"));
  ASSERT_TRUE(codec.ok()) << codec.status();
  ASSERT_TRUE(cuda_->DecodesVectors(CodecId::kVq));
  ModelConfig config;
  config.kv_heads = 3;
  config.head_dim = 16;
  ExplicitMemoryConfig memory;
  memory.memory_layers = {0, 1, 3, 4};
  constexpr int kSlots = 12;
  auto pool = MemoryPool::Create(cuda_.get(), config, memory, GetParam(), kSlots);
  ASSERT_TRUE(pool.ok()) << pool.status();
  auto wanted = MemoryPool::Create(cpu_.get(), config, memory, DType::kF32, kSlots);
  ASSERT_TRUE(wanted.ok()) << wanted.status();
  const auto shape_of = [](int slot) {
    return MemoryShape{4, 3, slot % 3 == 0 ? 8 : slot % 7 + 1, 16};
  };
  std::vector<std::thread> threads;
  for (int slot = 0; slot < kSlots; ++slot) {
    threads.emplace_back([&, slot] {
      const MemoryShape shape = shape_of(slot);
      std::vector<uint8_t> codes(shape.vectors() * 14);
      ASSERT_TRUE((*codec)->Encode(Random(shape.values(), 90 + slot), codes).ok());
      for (MemoryPool* each : {pool->get(), wanted->get()}) {
        const absl::Status status = each->LoadEncoded(slot, shape, codes, **codec);
        EXPECT_TRUE(status.ok()) << status;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  Side cuda(cuda_.get()), cpu(cpu_.get());
  const KvSource& source = (*wanted)->source();
  for (int slot = 0; slot < kSlots; ++slot) {
    SCOPED_TRACE(slot);
    const MemoryShape shape = shape_of(slot);
    EXPECT_EQ((*pool)->tokens(slot), shape.tokens);
    const int64_t run = int64_t{shape.tokens} * 16;
    const int64_t runs = int64_t{2} * shape.layers * shape.kv_heads;
    const Tensor got{(*pool)->data(slot), GetParam(), runs, run, source.head_stride};
    const Tensor expected{(*wanted)->data(slot), DType::kF32, runs, run, source.head_stride};
    EXPECT_LE(Difference(cuda.Get(got), cpu.Get(expected)),
              GetParam() == DType::kF32 ? 1e-5 : 5e-3);
  }
}

// ---- memory and recording ----

TEST_P(CudaDeviceTest, UploadsAsideFromManyThreads) {
  Side s(cuda_.get());
  const int64_t n = int64_t{3} << 20;  // more than one piece of pinned memory
  std::vector<Tensor> to;
  for (int i = 0; i < 6; ++i) to.push_back(s.F32(Floats(n), 1, n));
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] {
      Floats values(n);
      for (int64_t j = 0; j < n; ++j) values[j] = static_cast<float>(j % 1000 + i);
      EXPECT_TRUE(cuda_->UploadAside(to[i].data, values.data(), n * 4).ok());
      std::fill(values.begin(), values.end(), -1.0f);  // the bytes are there already
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 6; ++i) {
    const Floats got = s.Get(to[i]);
    for (int64_t j = 0; j < n; j += 997) ASSERT_EQ(got[j], static_cast<float>(j % 1000 + i));
  }
}

TEST_P(CudaDeviceTest, ARecordingReadsTheNewBatch) {
  Side s(cuda_.get());
  const Tensor table = s.F32(Random(16 * 8, 80), 16, 8);
  const Tensor y = s.F32(Floats(3 * 8), 3, 8);
  const Floats all = s.Get(table);
  // Plain, recorded, replayed: the ids change under the same key.
  for (int step = 0; step < 6; ++step) {
    BatchInput input;
    for (int r = 0; r < 3; ++r) input.token_ids.push_back((step * 5 + r) % 16);
    input.positions.assign(3, 0);
    const PreparedBatch& batch = *cuda_->Prepare(input, 0);
    cuda_->Run(77, [&] { cuda_->Embed(y, batch, table); });
    const Floats got = s.Get(y);
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 8; ++c) EXPECT_EQ(got[r * 8 + c], all[input.token_ids[r] * 8 + c]);
    }
  }
}

TEST_P(CudaDeviceTest, OperationsWithHostDataAreNotRecorded) {
  Side s(cuda_.get());
  for (int step = 0; step < 4; ++step) {
    const Tensor logits = s.F32(Random(2 * 64, 81), 2, 64);
    const Tensor losses = s.F32(Floats(2), 1, 2);
    const std::vector<int32_t> targets = {step, -1};
    cuda_->Run(78, [&] { cuda_->CrossEntropy(losses.as<float>(), logits, targets, 1); });
    Side cpu(cpu_.get());
    const Tensor wanted = cpu.F32(Floats(2), 1, 2);
    cpu_->CrossEntropy(wanted.as<float>(), cpu.F32(Random(2 * 64, 81), 2, 64), targets, 1);
    EXPECT_LE(Difference(s.Get(losses), cpu.Get(wanted)), 1e-4);
  }
}

TEST_P(CudaDeviceTest, TooLargeABufferIsAnError) {
  const absl::StatusOr<Buffer> buffer = cuda_->Allocate(size_t{1} << 50);
  EXPECT_TRUE(absl::IsResourceExhausted(buffer.status())) << buffer.status();
  EXPECT_TRUE(cuda_->Synchronize().ok());
}

// ---- the decoder as a whole ----

TEST_P(CudaDeviceTest, DecoderAgreesTeacherForced) {
  ModelConfig c;
  c.vocab_size = 300;
  c.hidden_size = 96;
  c.intermediate_size = 160;
  c.layers = 3;
  c.heads = 6;
  c.kv_heads = 2;
  c.head_dim = 16;
  c.max_position_embeddings = 512;
  ExplicitMemoryConfig memory;
  memory.memory_layers = {0, 1};
  memory.prefix_token_ids = {1, 9, 8};
  ExplicitMemory written;
  written.shape = {2, 2, 5, 16};
  written.reference_tokens = 20;
  written.values = Random(written.shape.values(), 90);

  const auto logits_of = [&](Device* device) {
    std::vector<Floats> all;
    auto model = Model::Load(device, c, RandomWeights(7, 0.1f), WeightFormat::kBF16);
    EXPECT_TRUE(model.ok()) << model.status();
    DecoderOptions options;
    options.memory = memory;
    options.max_rows = 128;
    options.kv_dtype = options.memory_dtype = device->activation_dtype();
    auto decoder = Decoder::Create(*model, options);
    EXPECT_TRUE(decoder.ok()) << decoder.status();
    EXPECT_TRUE((*decoder)->pool().Load(2, written).ok());
    auto with = (*decoder)->Start(Layout::kMemory), without = (*decoder)->Start(Layout::kPlain);
    const std::vector<int32_t> prompt_ids(70, 5), other = {1, 2, 3};
    const std::vector<MemoryRead> reads = {{65, {2}}, {5, {}}};
    const Slice prompt[] = {{&*with, prompt_ids, reads, 2}, {&*without, other, {}, 1}};
    Floats logits;
    EXPECT_TRUE((*decoder)->Forward(prompt).ok());
    EXPECT_TRUE((*decoder)->DownloadLogits(&logits).ok());
    all.push_back(logits);
    // Steps of the same shape: plain, recorded and replayed.
    for (int step = 0; step < 5; ++step) {
      const std::vector<int32_t> id = {step * 7 + 3};
      const std::vector<MemoryRead> read = {{1, {2}}};
      const Slice slices[] = {{&*with, id, read, 1}, {&*without, id, {}, 1}};
      EXPECT_TRUE((*decoder)->Forward(slices).ok());
      EXPECT_TRUE((*decoder)->DownloadLogits(&logits).ok());
      all.push_back(logits);
    }
    return all;
  };
  const std::vector<Floats> wanted = logits_of(cpu_.get()), got = logits_of(cuda_.get());
  ASSERT_EQ(got.size(), wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    EXPECT_LE(Difference(got[i], wanted[i]), GetParam() == DType::kF32 ? 1e-2 : 4e-2)
        << "step " << i;
  }
}

TEST_P(CudaDeviceTest, TrainingStepAgrees) {
  const bool f32 = GetParam() == DType::kF32;
  ModelConfig c;
  c.vocab_size = 200;
  c.hidden_size = 64;
  c.intermediate_size = 96;
  c.layers = 3;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 16;
  c.explicit_memory = ExplicitMemoryConfig{.memory_layers = {0, 1},
                                           .tokens_kept = 4,
                                           .reference_tokens = 24,
                                           .chunk_tokens = 16,
                                           .references_per_chunk = 2,
                                           .prefix_token_ids = {1, 7}};
  TrainingBatch batch;
  batch.layout = TrainingBatch::Layout::kMemory;
  // In bf16 two devices may keep different tokens of nearly equal scores: there all are kept.
  batch.tokens_kept = f32 ? 4 : 24;
  std::mt19937 engine(91);
  const auto ids = [&](int n) {
    std::vector<int32_t> all(n);
    for (int32_t& id : all) id = static_cast<int32_t>(engine() % 200);
    return all;
  };
  batch.references = {ids(24), ids(9), ids(17)};
  for (const int tokens : {70, 35}) {
    TrainingSequence sequence{ids(tokens), ids(tokens), {}};
    for (int chunk = 0; chunk * 16 < tokens - 1; ++chunk) {
      sequence.chunk_references.push_back({chunk % 3, (chunk + 1) % 3});
    }
    sequence.targets.back() = -1;
    batch.sequences.push_back(sequence);
  }
  const auto run = [&](Device* device) -> std::pair<double, Floats> {
    auto parameters = Parameters::Create(device, c);
    EXPECT_TRUE(parameters.ok()) << parameters.status();
    EXPECT_TRUE((*parameters)->Load(RandomWeights(5, 0.1f)).ok());
    auto gradient = (*parameters)->AllocateLike();
    EXPECT_TRUE(gradient.ok()) << gradient.status();
    TrainingStep step(parameters->get());
    const auto result = step.Run(batch, gradient->as<float>());
    EXPECT_TRUE(result.ok()) << result.status();
    Floats host((*parameters)->size());
    EXPECT_TRUE(device->Download(host.data(), gradient->data(), host.size() * 4).ok());
    return {result.ok() ? result->loss : NAN, host};
  };
  const auto [wanted_loss, wanted] = run(cpu_.get());
  const auto [loss, got] = run(cuda_.get());
  const auto [again_loss, again] = run(cuda_.get());
  EXPECT_EQ(again_loss, loss);
  EXPECT_EQ(again, got);
  EXPECT_NEAR(loss / wanted_loss, 1, f32 ? 1e-5 : 5e-3);
  double error = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += std::pow(double{got[i]} - wanted[i], 2);
    norm += std::pow(double{wanted[i]}, 2);
  }
  EXPECT_LE(std::sqrt(error / norm), f32 ? 1e-3 : 5e-2);
}

}  // namespace
}  // namespace memory3
