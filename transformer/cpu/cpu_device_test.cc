// Every forward operation of the CPU device against plain loops in double precision, with every
// instruction set this machine has.
#include "transformer/cpu/cpu_device.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "transformer/bf16.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<float> Random(int64_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(rng);
  return v;
}

Tensor View(std::vector<float>& v, int64_t rows, int64_t cols) {
  EXPECT_EQ(v.size(), rows * cols);
  return Tensor{v.data(), DType::kF32, rows, cols, cols};
}

// max |a - b| / max |b|
double Difference(const std::vector<float>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0, largest = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= worst)) worst = std::abs(a[i] - b[i]);
    largest = std::max(largest, std::abs(b[i]));
  }
  return worst / largest;
}

std::vector<std::string> InstructionSets() {
  std::vector<std::string> names;
  for (int isa = 0; isa <= static_cast<int>(BestCpuIsa()); ++isa) {
    names.emplace_back(CpuIsaName(static_cast<CpuIsa>(isa)));
  }
  return names;
}

class CpuDeviceTest : public ::testing::TestWithParam<std::string> {
 protected:
  CpuDeviceTest() : device_(*CpuDevice::Make({.threads = 2, .instructions = GetParam()})) {}

  std::unique_ptr<Weight> Pack(const std::vector<float>& w, int64_t out, int64_t in,
                               WeightFormat format) {
    return *device_->PrepareWeight(w, out, in, format);
  }

  std::unique_ptr<CpuDevice> device_;
};

INSTANTIATE_TEST_SUITE_P(All, CpuDeviceTest, ::testing::ValuesIn(InstructionSets()),
                         [](const auto& info) { return info.param; });

struct Product {
  int64_t rows, in, out;
};
const Product kProducts[] = {{1, 64, 64}, {7, 96, 130}, {3, 33, 1}, {40, 257, 192}, {13, 1, 65}};

// What a product in `format` should give, and how far it may be off.
std::vector<double> Reference(const std::vector<float>& x, const std::vector<float>& w,
                              const Product& p, WeightFormat format) {
  std::vector<double> y(p.rows * p.out);
  for (int64_t o = 0; o < p.out; ++o) {
    std::vector<double> row(p.in);
    float largest = 0;
    for (int64_t i = 0; i < p.in; ++i) largest = std::max(largest, std::abs(w[o * p.in + i]));
    for (int64_t i = 0; i < p.in; ++i) {
      const float value = w[o * p.in + i];
      row[i] = format == WeightFormat::kF32 ? value
               : format == WeightFormat::kBF16
                   ? Bf16ToFloat(FloatToBf16(value))
                   : std::round(value * 127.0 / largest) * largest / 127.0;
    }
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t i = 0; i < p.in; ++i) y[r * p.out + o] += row[i] * x[r * p.in + i];
    }
  }
  return y;
}

TEST_P(CpuDeviceTest, ProductsMatch) {
  for (const Product& p : kProducts) {
    std::vector<float> x = Random(p.rows * p.in, 1);
    const std::vector<float> w = Random(p.out * p.in, 2);
    for (const auto& [format, tolerance] : {std::pair{WeightFormat::kF32, 2e-6},
                                            {WeightFormat::kBF16, 6e-3},
                                            {WeightFormat::kInt8, 1.5e-2}}) {
      SCOPED_TRACE(testing::Message() << p.rows << "x" << p.in << "x" << p.out << " format "
                                      << static_cast<int>(format));
      const std::unique_ptr<Weight> weight = Pack(w, p.out, p.in, format);
      std::vector<double> expected = Reference(x, w, p, format);
      std::vector<float> y = Random(p.rows * p.out, 3);
      device_->MatMul(View(y, p.rows, p.out), View(x, p.rows, p.in), *weight, false);
      EXPECT_LE(Difference(y, expected), tolerance);

      std::vector<float> sum = Random(p.rows * p.out, 4);
      for (size_t i = 0; i < sum.size(); ++i) expected[i] += sum[i];
      device_->MatMul(View(sum, p.rows, p.out), View(x, p.rows, p.in), *weight, true);
      EXPECT_LE(Difference(sum, expected), tolerance);
    }
  }
}

// bf16 products differ from the exact ones only by the rounding of the activations: with
// activations that bf16 holds they are as exact as f32.
TEST_P(CpuDeviceTest, Bf16ProductsOfRepresentableActivationsAreExact) {
  const Product p{9, 512, 70};
  std::vector<float> x = Random(p.rows * p.in, 1);
  for (float& v : x) v = Bf16ToFloat(FloatToBf16(v));
  const std::vector<float> w = Random(p.out * p.in, 2);
  std::vector<float> y(p.rows * p.out);
  device_->MatMul(View(y, p.rows, p.out), View(x, p.rows, p.in),
                  *Pack(w, p.out, p.in, WeightFormat::kBF16), false);
  EXPECT_LE(Difference(y, Reference(x, w, p, WeightFormat::kBF16)), 3e-6);
}

// The integers are exact: the result is the rounded factors' product to the last bit.
TEST_P(CpuDeviceTest, Int8ProductsAreExactInIntegers) {
  const Product p{5, 300, 66};
  std::vector<float> x = Random(p.rows * p.in, 1);
  const std::vector<float> w = Random(p.out * p.in, 2);
  std::vector<float> y(p.rows * p.out);
  device_->MatMul(View(y, p.rows, p.out), View(x, p.rows, p.in),
                  *Pack(w, p.out, p.in, WeightFormat::kInt8), false);
  const auto quantize = [](const float* v, int64_t n, std::vector<int>* q) {
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(v[i]));
    for (int64_t i = 0; i < n; ++i) q->push_back(std::lrintf(v[i] * (127.0f / largest)));
    return largest / 127.0f;
  };
  for (int64_t r = 0; r < p.rows; ++r) {
    std::vector<int> qx;
    const float sx = quantize(&x[r * p.in], p.in, &qx);
    for (int64_t o = 0; o < p.out; ++o) {
      std::vector<int> qw;
      const float sw = quantize(&w[o * p.in], p.in, &qw);
      const int sum = std::inner_product(qx.begin(), qx.end(), qw.begin(), 0);
      ASSERT_EQ(y[r * p.out + o], static_cast<float>(sum) * (sx * sw)) << r << ", " << o;
    }
  }
}

TEST_P(CpuDeviceTest, RowOfAProductHasTheSameBitsInEveryBatch) {
  constexpr int64_t kIn = 1155, kOut = 200, kRows = 40;  // more than one chunk of k
  std::vector<float> x = Random(kRows * kIn, 1);
  const std::vector<float> w = Random(kOut * kIn, 2);
  const std::vector<float> start = Random(kRows * kOut, 3);
  for (const auto format : {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kInt8}) {
    const std::unique_ptr<Weight> weight = Pack(w, kOut, kIn, format);
    for (const bool accumulate : {false, true}) {
      std::vector<float> alone = start;
      for (int64_t r = 0; r < kRows; ++r) {
        device_->MatMul(View(alone, kRows, kOut).Rows(r, 1), View(x, kRows, kIn).Rows(r, 1),
                        *weight, accumulate);
      }
      for (int64_t rows = 1; rows <= kRows; ++rows) {
        std::vector<float> y = start;
        device_->MatMul(View(y, kRows, kOut).Rows(0, rows), View(x, kRows, kIn).Rows(0, rows),
                        *weight, accumulate);
        ASSERT_EQ(0, std::memcmp(y.data(), alone.data(), rows * kOut * sizeof(float)))
            << rows << " rows, format " << static_cast<int>(format);
      }
    }
  }
}

TEST_P(CpuDeviceTest, ThreadsDoNotChangeAProduct) {
  constexpr int64_t kIn = 1100, kOut = 300, kRows = 130;
  std::vector<float> x = Random(kRows * kIn, 1);
  const std::vector<float> w = Random(kOut * kIn, 2);
  for (const auto format : {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kInt8}) {
    std::vector<float> y[3];
    for (int i = 0; i < 3; ++i) {
      const auto device = *CpuDevice::Make({.threads = 1 + 3 * i, .instructions = GetParam()});
      y[i].resize(kRows * kOut);
      device->MatMul(View(y[i], kRows, kOut), View(x, kRows, kIn),
                     **device->PrepareWeight(w, kOut, kIn, format), false);
    }
    EXPECT_EQ(y[0], y[1]);
    EXPECT_EQ(y[0], y[2]);
  }
}

// The same sums as the packed weight's, so the same bits in every batch, too.
TEST_P(CpuDeviceTest, TrainableProductsFollowTheMatrix) {
  for (const auto& [in, out] : {std::pair<int64_t, int64_t>{192, 200}, {1155, 70}}) {
    constexpr int64_t kRows = 40;
    std::vector<float> x = Random(kRows * in, 1), w = Random(out * in, 2);
    const auto weight = device_->TrainableWeight(View(w, out, in), nullptr);
    for (const int64_t rows : {int64_t{1}, int64_t{7}, kRows}) {
      std::vector<float> y = Random(kRows * out, 3), packed = y;
      const std::vector<float> start = y;
      device_->MatMul(View(y, kRows, out).Rows(0, rows), View(x, kRows, in).Rows(0, rows), *weight,
                      true);
      device_->MatMul(View(packed, kRows, out).Rows(0, rows), View(x, kRows, in).Rows(0, rows),
                      *Pack(w, out, in, WeightFormat::kF32), true);
      EXPECT_EQ(y, packed);
      EXPECT_NE(y, start);
    }
    std::vector<float> before(kRows * out), after(kRows * out);
    device_->MatMul(View(before, kRows, out), View(x, kRows, in), *weight, false);
    w[0] += 1;  // the weight is the matrix itself
    device_->MatMul(View(after, kRows, out), View(x, kRows, in), *weight, false);
    EXPECT_NE(before[0], after[0]);
    EXPECT_EQ(before[1], after[1]);
  }
}

TEST_P(CpuDeviceTest, StridedViewsLeaveTheRestAlone) {
  std::vector<float> x = Random(4 * 100, 1), y(4 * 300, 7.0f);
  const std::vector<float> w = Random(70 * 64, 2);
  device_->MatMul(View(y, 4, 300).Cols(100, 70), View(x, 4, 100).Cols(20, 64),
                  *Pack(w, 70, 64, WeightFormat::kF32), false);
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < 300; ++c) {
      double expected = 7.0;
      if (c >= 100 && c < 170) {
        expected = 0;
        for (int i = 0; i < 64; ++i) expected += x[r * 100 + 20 + i] * w[(c - 100) * 64 + i];
      }
      ASSERT_NEAR(y[r * 300 + c], expected, 1e-4);
    }
  }
}

TEST_P(CpuDeviceTest, RmsNormMatches) {
  for (const int64_t cols : {1, 20, 64, 333}) {
    std::vector<float> x = Random(5 * cols, 1), gain = Random(cols, 2), y(5 * cols), inv(5);
    device_->RmsNorm(View(y, 5, cols), View(x, 5, cols), gain.data(), 1e-5f, inv.data());
    std::vector<double> expected(5 * cols);
    for (int64_t r = 0; r < 5; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < cols; ++c) sum += double{x[r * cols + c]} * x[r * cols + c];
      const double inv_rms = 1 / std::sqrt(sum / cols + 1e-5);
      EXPECT_NEAR(inv[r] / inv_rms, 1, 1e-6);
      for (int64_t c = 0; c < cols; ++c)
        expected[r * cols + c] = x[r * cols + c] * inv_rms * gain[c];
    }
    EXPECT_LE(Difference(y, expected), 1e-6);
  }
}

TEST_P(CpuDeviceTest, SiluMulMatchesOverTheWholeRangeOfExp) {
  std::vector<float> gate;
  for (float g = -120; g <= 120; g += 0.37f) gate.push_back(g);
  for (const float g : {0.0f, -0.0f, 1e-30f, -3e38f, 3e38f}) gate.push_back(g);
  const int64_t n = gate.size();
  std::vector<float> gate_up = gate, y(n);
  const std::vector<float> up = Random(n, 1);
  gate_up.insert(gate_up.end(), up.begin(), up.end());
  device_->SiluMul(View(y, 1, n), View(gate_up, 1, 2 * n));
  for (int64_t i = 0; i < n; ++i) {
    const double expected = double{gate[i]} / (1 + std::exp(-double{gate[i]})) * up[i];
    ASSERT_NEAR(y[i], expected, 4e-7 * std::abs(expected) + 1e-35) << gate[i];
  }
}

TEST_P(CpuDeviceTest, RopeMatchesAndTurnsBack) {
  for (const int head_dim : {2, 24, 64, 80}) {
    constexpr int kHeads = 3;
    BatchInput input;
    input.token_ids = {1, 2, 3, 4};
    input.positions = {0, 5, 131, 4095};
    const PreparedBatch* batch = device_->Prepare(input, 0);
    std::vector<float> inv_freq(head_dim / 2);
    for (int i = 0; i < head_dim / 2; ++i) inv_freq[i] = std::pow(10000.0, -2.0 * i / head_dim);
    const int64_t cols = kHeads * head_dim + 5;
    std::vector<float> x = Random(4 * cols, 1);
    const std::vector<float> before = x;
    std::vector<double> expected(x.begin(), x.end());
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < kHeads; ++h) {
        for (int i = 0; i < head_dim / 2; ++i) {
          const float angle = static_cast<float>(input.positions[r]) * inv_freq[i];
          const int64_t at = r * cols + h * head_dim + i;
          const double a = x[at], b = x[at + head_dim / 2];
          expected[at] = a * std::cos(double{angle}) - b * std::sin(double{angle});
          expected[at + head_dim / 2] = b * std::cos(double{angle}) + a * std::sin(double{angle});
        }
      }
    }
    device_->Rope(View(x, 4, cols), *batch, inv_freq, kHeads, head_dim, false);
    EXPECT_LE(Difference(x, expected), 3e-7);
    device_->Rope(View(x, 4, cols), *batch, inv_freq, kHeads, head_dim, true);
    EXPECT_LE(Difference(x, {before.begin(), before.end()}), 3e-7);
  }
}

// The table is kept between calls, not beyond the batch it belongs to.
TEST_P(CpuDeviceTest, RopeFollowsThePositions) {
  const std::vector<float> inv_freq = {1.0f};
  for (const int position : {0, 1, 2}) {
    BatchInput input;
    input.token_ids = {0};
    input.positions = {position};
    std::vector<float> x = {1.0f, 0.0f};
    device_->Rope(View(x, 1, 2), *device_->Prepare(input, 0), inv_freq, 1, 2, false);
    EXPECT_NEAR(x[0], std::cos(position), 1e-6);
    EXPECT_NEAR(x[1], std::sin(position), 1e-6);
  }
}

TEST_P(CpuDeviceTest, EmbedGatherAndArgMax) {
  std::vector<float> table = Random(10 * 21, 1), y(3 * 21), gathered(2 * 21);
  BatchInput input;
  input.token_ids = {9, 0, 9};
  input.logit_rows = {0, 1};
  const PreparedBatch* batch = device_->Prepare(input, 1);
  device_->Embed(View(y, 3, 21), *batch, View(table, 10, 21));
  EXPECT_TRUE(std::equal(y.begin(), y.begin() + 21, table.begin() + 9 * 21));
  EXPECT_TRUE(std::equal(y.begin() + 21, y.begin() + 42, table.begin()));
  device_->GatherRows(View(gathered, 2, 21), View(y, 3, 21), *batch);
  EXPECT_TRUE(std::equal(gathered.begin(), gathered.end(), y.begin()));

  std::vector<uint16_t> half(table.size());
  std::transform(table.begin(), table.end(), half.begin(), FloatToBf16);
  device_->Embed(View(y, 3, 21), *batch, Tensor{half.data(), DType::kBF16, 10, 21, 21});
  for (int c = 0; c < 21; ++c) EXPECT_EQ(y[c], Bf16ToFloat(half[9 * 21 + c]));

  std::vector<float> logits = Random(4 * 101, 5);
  logits[101 + 40] = logits[101 + 77] = 50;                          // a tie: the lower id
  std::fill(logits.begin() + 202, logits.begin() + 303, -INFINITY);  // nothing larger: id 0
  logits[303 + 100] = 60;                                            // the last one
  std::vector<int32_t> ids(4);
  device_->ArgMax(ids.data(), View(logits, 4, 101));
  const int first = std::max_element(logits.begin(), logits.begin() + 101) - logits.begin();
  EXPECT_THAT(ids, ElementsAre(first, 40, 0, 100));
}

TEST_P(CpuDeviceTest, ArgMaxPassesOverNaN) {
  std::vector<float> logits(70, NAN);
  logits[3] = 1;
  logits[69] = 2;
  int32_t id = -1;
  device_->ArgMax(&id, View(logits, 1, 70));
  EXPECT_EQ(id, 69);
}

// ---- attention ----

// A cache of one source, [layers, kv_heads, 2, tokens, head_dim] or, bf16, the same rounded.
struct Bank {
  KvSource source;
  std::vector<float> f32;
  std::vector<uint16_t> bf16;
  int64_t tokens;

  Bank(int layers, int kv_heads, int64_t tokens_, int head_dim, DType dtype, uint32_t seed)
      : f32(Random(layers * kv_heads * 2 * tokens_ * head_dim, seed)), tokens(tokens_) {
    source.dtype = dtype;
    source.token_stride = head_dim;
    source.value_offset = tokens * head_dim;
    source.head_stride = 2 * tokens * head_dim;
    source.layer_stride = kv_heads * source.head_stride;
    if (dtype == DType::kBF16) {
      for (float& v : f32) {
        bf16.push_back(FloatToBf16(v));
        v = Bf16ToFloat(bf16.back());
      }
    }
  }
  const void* at(int64_t token) const {
    const int64_t element = token * source.token_stride;
    return source.dtype == DType::kF32 ? static_cast<const void*>(f32.data() + element)
                                       : bf16.data() + element;
  }
};

struct AttentionCase {
  AttentionShape shape;
  std::vector<const Bank*> banks;
  std::vector<int> layers;  // of each source
  BatchInput input;
  // Token within its bank of each block's first, for the reference.
  std::vector<int64_t> start;

  void AddBlock(int source, int64_t token, int tokens, int first = KvBlock::kSeenByAll) {
    KvBlock block;
    block.source = source;
    block.base = banks[source]->at(token);
    block.tokens = tokens;
    block.first = first;
    input.attention.blocks.push_back(block);
    start.push_back(token);
  }
};

void AttentionReference(const AttentionCase& c, const std::vector<float>& q,
                        std::vector<double>* out, std::vector<double>* lse) {
  const int d = c.shape.head_dim;
  const AttentionPlan& plan = c.input.attention;
  for (const AttentionSegment& s : plan.segments) {
    for (int i = 0; i < s.rows; ++i) {
      for (int h = 0; h < c.shape.heads; ++h) {
        const int kv_head = h / (c.shape.heads / c.shape.kv_heads);
        const float* query = &q[((s.row + i) * c.shape.heads + h) * d];
        std::vector<double> scores;
        std::vector<const float*> values;
        for (int b = s.block_begin; b < s.block_end; ++b) {
          const int id = plan.block_ids[b];
          const KvBlock& block = plan.blocks[id];
          if (c.layers[block.source] < 0) continue;
          const Bank& bank = *c.banks[block.source];
          for (int t = 0; t < block.tokens; ++t) {
            if (block.first != KvBlock::kSeenByAll && block.first + t > s.first + i) continue;
            const float* key = bank.f32.data() + c.layers[block.source] * bank.source.layer_stride +
                               kv_head * bank.source.head_stride +
                               (c.start[id] + t) * bank.source.token_stride;
            double dot = 0;
            for (int j = 0; j < d; ++j) dot += double{query[j]} * key[j];
            scores.push_back(dot * c.shape.scale);
            values.push_back(key + bank.source.value_offset);
          }
        }
        if (scores.empty()) continue;
        const double max = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (const double x : scores) sum += std::exp(x - max);
        for (size_t t = 0; t < scores.size(); ++t) {
          for (int j = 0; j < d; ++j) {
            (*out)[((s.row + i) * c.shape.heads + h) * d + j] +=
                std::exp(scores[t] - max) / sum * values[t][j];
          }
        }
        (*lse)[(s.row + i) * c.shape.heads + h] = max + std::log(sum);
      }
    }
  }
}

// A batch as a server makes it: a prefill slice that reads two memories, another of the same
// sequence that reads one of them and one more, a decode step without memories, one of a sequence
// with everything, over paged context.
AttentionCase MixedCase(const std::vector<Bank>& banks, int heads, int kv_heads, int head_dim) {
  AttentionCase c;
  c.shape = {heads, kv_heads, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim))};
  for (const Bank& bank : banks) {
    c.banks.push_back(&bank);
    c.input.attention.sources.push_back(bank.source);
  }
  c.layers = {1, 0, 1};
  AttentionPlan& plan = c.input.attention;
  c.AddBlock(0, 0, 3);                                                  // 0: the prefix
  for (int m = 0; m < 4; ++m) c.AddBlock(1, 8 * m, m == 2 ? 5 : 8);     // 1-4: memories
  for (int p = 0; p < 12; ++p) c.AddBlock(2, 16 * p, 16, 16 * p);       // 5-16: one context's pages
  for (int p = 0; p < 3; ++p) c.AddBlock(2, 200 + 16 * p, 16, 16 * p);  // 17-19: another's
  const auto segment = [&](int row, int rows, int first, const std::vector<int>& ids) {
    AttentionSegment s{row, rows, first, static_cast<int>(plan.block_ids.size()), 0};
    plan.block_ids.insert(plan.block_ids.end(), ids.begin(), ids.end());
    s.block_end = plan.block_ids.size();
    plan.segments.push_back(s);
  };
  segment(0, 64, 20, {0, 1, 2, 5, 6, 7, 8, 9, 10});
  segment(64, 90, 84, {0, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16});
  segment(155, 1, 0, {0, 17});
  segment(156, 1, 41, {0, 1, 2, 3, 4, 17, 18, 19});
  c.input.token_ids.assign(157, 0);
  return c;
}

TEST_P(CpuDeviceTest, AttentionMatches) {
  struct {
    int heads, kv_heads, head_dim;
  } const shapes[] = {{8, 2, 64}, {4, 4, 16}, {6, 3, 80}, {5, 1, 12}, {2, 1, 128}};
  for (const auto& [heads, kv_heads, head_dim] : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      SCOPED_TRACE(testing::Message() << heads << "/" << kv_heads << "/" << head_dim << " "
                                      << static_cast<int>(dtype));
      std::vector<Bank> banks;
      banks.emplace_back(2, kv_heads, 3, head_dim, DType::kF32, 1);
      banks.emplace_back(1, kv_heads, 32, head_dim, dtype, 2);
      banks.emplace_back(2, kv_heads, 260, head_dim, dtype, 3);
      AttentionCase c = MixedCase(banks, heads, kv_heads, head_dim);
      const int64_t cols = heads * head_dim;
      std::vector<float> q = Random(157 * cols, 4, 2.0f), out(157 * cols), lse(157 * heads);
      std::vector<double> expected(out.size()), expected_lse(lse.size());
      for (const int memory_layer : {0, -1}) {
        c.layers[1] = memory_layer;
        std::fill(expected.begin(), expected.end(), 0.0);
        AttentionReference(c, q, &expected, &expected_lse);
        // Row 154 is in no segment: it is left alone.
        for (int64_t i = 154 * cols; i < 155 * cols; ++i) expected[i] = out[i] = 3;
        lse[154 * heads] = expected_lse[154 * heads] = 4;
        device_->Attention(View(out, 157, cols), View(q, 157, cols), *device_->Prepare(c.input, 0),
                           c.layers, c.shape, lse.data());
        EXPECT_LE(Difference(out, expected), 2e-6);
        EXPECT_LE(Difference(lse, expected_lse), 1e-6);
      }
    }
  }
}

// A row's bits depend neither on its neighbours, nor on the slicing, nor on the blocks.
TEST_P(CpuDeviceTest, AttentionRowsHaveTheSameBitsHoweverTheyAreGrouped) {
  constexpr int kHeads = 8, kKvHeads = 2, kDim = 64, kRows = 150;
  std::vector<Bank> banks;
  banks.emplace_back(1, kKvHeads, 5, kDim, DType::kF32, 1);
  banks.emplace_back(1, kKvHeads, 16, kDim, DType::kF32, 2);
  banks.emplace_back(1, kKvHeads, 160, kDim, DType::kF32, 3);
  std::vector<float> q = Random(kRows * kHeads * kDim, 4, 2.0f);

  const auto run = [&](int slice, int page) {
    std::vector<float> out(q.size());
    for (int begin = 0; begin < kRows; begin += slice) {
      const int rows = std::min(slice, kRows - begin);
      AttentionCase c;
      c.shape = {kHeads, kKvHeads, kDim, 0.125f};
      for (const Bank& bank : banks) {
        c.banks.push_back(&bank);
        c.input.attention.sources.push_back(bank.source);
      }
      c.layers = {0, 0, 0};
      c.AddBlock(0, 0, 5);
      c.AddBlock(1, 0, 8);
      c.AddBlock(1, 8, 8);
      for (int t = 0; t < begin + rows; t += page) {
        c.AddBlock(2, t, std::min(page, begin + rows - t), t);
      }
      AttentionPlan& plan = c.input.attention;
      plan.block_ids.resize(plan.blocks.size());
      std::iota(plan.block_ids.begin(), plan.block_ids.end(), 0);
      plan.segments = {{0, rows, begin, 0, static_cast<int>(plan.blocks.size())}};
      c.input.token_ids.assign(rows, 0);
      device_->Attention(View(out, kRows, kHeads * kDim).Rows(begin, rows),
                         View(q, kRows, kHeads * kDim).Rows(begin, rows),
                         *device_->Prepare(c.input, 0), c.layers, c.shape, nullptr);
    }
    return out;
  };
  const std::vector<float> whole = run(kRows, 160);
  for (const auto& [slice, page] : {std::pair{1, 16}, {7, 16}, {64, 16}, {150, 16}, {33, 50}}) {
    EXPECT_EQ(run(slice, page), whole) << "slices of " << slice << ", pages of " << page;
  }
}

TEST_P(CpuDeviceTest, StoreKvPutsRowsWhereThePlanSays) {
  constexpr int kKvHeads = 2, kDim = 20;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Bank bank(2, kKvHeads, 6, kDim, dtype, 1);
    const std::vector<float> before = bank.f32;
    BatchInput input;
    input.token_ids = {0, 0, 0};
    input.attention.sources = {KvSource{}, bank.source};
    input.destination = {const_cast<void*>(bank.at(4)), nullptr, const_cast<void*>(bank.at(0))};
    input.destination_source = 1;
    std::vector<float> k = Random(3 * kKvHeads * kDim, 2), v = Random(3 * kKvHeads * kDim, 3);
    device_->StoreKv(*device_->Prepare(input, 0), View(k, 3, kKvHeads * kDim),
                     View(v, 3, kKvHeads * kDim), 1, kKvHeads, kDim);
    for (int layer = 0; layer < 2; ++layer) {
      for (int h = 0; h < kKvHeads; ++h) {
        for (int part = 0; part < 2; ++part) {
          for (int t = 0; t < 6; ++t) {
            for (int j = 0; j < kDim; ++j) {
              const int64_t at = (((layer * kKvHeads + h) * 2 + part) * 6 + t) * kDim + j;
              float expected = before[at];
              if (layer == 1 && (t == 4 || t == 0)) {
                expected = (part == 0 ? k : v)[((t == 4 ? 0 : 2) * kKvHeads + h) * kDim + j];
              }
              if (dtype == DType::kF32) {
                ASSERT_EQ(bank.f32[at], expected);
              } else {
                ASSERT_EQ(bank.bf16[at], FloatToBf16(expected));
              }
            }
          }
        }
      }
    }
  }
}

// ---- writing ----

TEST_P(CpuDeviceTest, AttentionReceivedMatches) {
  constexpr int kHeads = 6, kKvHeads = 2, kDim = 24, kRows = 220;
  const std::vector<ReferenceRows> references = {{0, 128}, {130, 1}, {131, 70}};
  std::vector<float> q = Random(kRows * kHeads * kDim, 1), k = Random(kRows * kKvHeads * kDim, 2);
  std::vector<float> weights(kRows * kKvHeads);
  const AttentionShape shape{kHeads, kKvHeads, kDim, 0.3f};
  device_->AttentionReceived(View(weights, kRows, kKvHeads), View(q, kRows, kHeads * kDim),
                             View(k, kRows, kKvHeads * kDim), references, shape);
  std::vector<double> expected(weights.size());
  for (const ReferenceRows& reference : references) {
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < reference.tokens; ++i) {
        std::vector<double> p(reference.tokens);
        double sum = 0;
        for (int j = 0; j < reference.tokens; ++j) {
          double dot = 0;
          for (int c = 0; c < kDim; ++c) {
            dot += double{q[((reference.row + i) * kHeads + h) * kDim + c]} *
                   k[((reference.row + j) * kKvHeads + h / 3) * kDim + c];
          }
          sum += p[j] = std::exp(dot * shape.scale);
        }
        for (int j = 0; j < reference.tokens; ++j) {
          expected[(reference.row + j) * kKvHeads + h / 3] += p[j] / sum;
        }
      }
    }
  }
  EXPECT_LE(Difference(weights, expected), 2e-6);
}

TEST_P(CpuDeviceTest, SelectKeptTakesTheLargestAndTheLowerRowOfATie) {
  // Two heads; reference 0 in rows 1..4, reference 1 in rows 5 and 6.
  std::vector<float> weights = {9, 9, 1, 4, 3, 4, 3, 4, 2, 4, 1, 2, 5, 1};
  const std::vector<ReferenceRows> references = {{1, 4}, {5, 2}};
  std::vector<int32_t> kept(2 * 2 * 3, -7);
  device_->SelectKept(kept.data(), View(weights, 7, 2), references, 3);
  EXPECT_THAT(kept, ElementsAre(2, 3, 4, 1, 2, 3, 5, 6, -1, 5, 6, -1));

  std::vector<float> k = Random(7 * 2 * 4, 1), v = Random(7 * 2 * 4, 2);
  std::vector<float> memory(2 * 2 * 2 * 3 * 4, NAN);
  device_->GatherKept(memory.data(), kept.data(), View(k, 7, 8), View(v, 7, 8), 2, 3, 2, 4);
  for (int reference = 0; reference < 2; ++reference) {
    for (int part = 0; part < 2; ++part) {
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 3; ++i) {
          const int row = kept[(reference * 2 + h) * 3 + i];
          for (int j = 0; j < 4; ++j) {
            const float expected = row < 0 ? 0 : (part == 0 ? k : v)[row * 8 + h * 4 + j];
            EXPECT_EQ(memory[(((reference * 2 + part) * 2 + h) * 3 + i) * 4 + j], expected);
          }
        }
      }
    }
  }
}

// ---- the device itself ----

TEST(CpuDevice, RefusesUnknownOptions) {
  EXPECT_THAT(
      std::string(CpuDevice::Make({.threads = 0, .instructions = "sse9"}).status().message()),
      HasSubstr("\"sse9\""));
  EXPECT_EQ(CpuDevice::Make({.threads = -1, .instructions = ""}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CpuDevice, NameTellsInstructionsAndThreads) {
  const auto device = *CpuDevice::Make({.threads = 3, .instructions = "generic"});
  EXPECT_EQ(device->name(), "cpu (generic, 3 threads)");
  EXPECT_EQ((*CpuDevice::Make({}))->isa(), BestCpuIsa());
}

TEST(CpuDevice, MemoryIsZeroedAndCopied) {
  const auto device = *CpuDevice::Make({});
  for (const size_t bytes : {size_t{0}, size_t{100}, size_t{5} << 20}) {
    Buffer buffer = *device->Allocate(bytes);
    EXPECT_EQ(buffer.bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0);
    EXPECT_TRUE(
        std::all_of(buffer.as<char>(), buffer.as<char>() + bytes, [](char c) { return c == 0; }));
  }
  EXPECT_EQ(device->Allocate(size_t{1} << 60).status().code(),
            absl::StatusCode::kResourceExhausted);
  Buffer a = *device->Allocate(8), b = *device->Allocate(8);
  device->Upload(a.data(), "1234567", 8);
  device->Copy(b.data(), a.data(), 8);
  char back[8];
  ASSERT_TRUE(device->Download(back, b.data(), 8).ok());
  EXPECT_STREQ(back, "1234567");
  device->Zero(b.data(), 8);
  EXPECT_EQ(b.as<char>()[0], 0);
  a = std::move(b);
  EXPECT_EQ(a.as<char>()[3], 0);
}

}  // namespace
}  // namespace memory3
