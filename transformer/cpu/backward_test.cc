// Every backward operation and the optimiser against double precision loops straight from the
// formulas, on each instruction set this CPU has.

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "transformer/bf16.h"
#include "transformer/cpu/backward_kernels.h"
#include "transformer/cpu/cpu_device.h"
#include "transformer/device.h"

namespace memory3 {
namespace {

std::vector<float> Random(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(n);
  for (float& v : values) v = normal(generator);
  return values;
}

Tensor View(std::vector<float>& v, int64_t rows, int64_t cols, int64_t stride = 0) {
  return {v.data(), DType::kF32, rows, cols, stride == 0 ? cols : stride};
}

// max|a-b| / max|b|
double Error(const std::vector<float>& got, const std::vector<double>& want) {
  EXPECT_EQ(got.size(), want.size());
  double error = 0, scale = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error = std::max(error, std::abs(got[i] - want[i]));
    scale = std::max(scale, std::abs(want[i]));
    if (!std::isfinite(got[i])) return HUGE_VAL;
  }
  return error / scale;
}

std::vector<double> Doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }

class BackwardTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    device_ = MakeCpuDevice({.threads = 2, .instructions = GetParam()}).value();
  }
  std::unique_ptr<Device> device_;
};

TEST_P(BackwardTest, MatMul) {
  const int rows = 37, in = 50, out = 70;
  std::vector<float> x = Random(rows * in, 1), dy = Random(rows * out, 2), w = Random(out * in, 3);
  std::vector<float> dx = Random(rows * (in + 3), 4), dw = Random(out * in, 5);
  for (const bool accumulate : {false, true}) {
    std::vector<double> want_dx = Doubles(dx), want_dw = Doubles(dw);
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < in; ++i) {
        double sum = accumulate ? want_dx[r * (in + 3) + i] : 0;
        for (int o = 0; o < out; ++o) sum += double{dy[r * out + o]} * w[o * in + i];
        want_dx[r * (in + 3) + i] = sum;
      }
    }
    for (int o = 0; o < out; ++o) {
      for (int i = 0; i < in; ++i) {
        for (int r = 0; r < rows; ++r)
          want_dw[o * in + i] += double{dy[r * out + o]} * x[r * in + i];
      }
    }
    const std::unique_ptr<Weight> weight = device_->TrainableWeight(View(w, out, in), nullptr);
    device_->MatMulBackwardInput(View(dx, rows, in, in + 3), View(dy, rows, out), *weight,
                                 accumulate);
    device_->MatMulBackwardWeight(View(dw, out, in), View(dy, rows, out), View(x, rows, in));
    EXPECT_LT(Error(dx, want_dx), 1e-6);
    EXPECT_LT(Error(dw, want_dw), 1e-6);
  }
}

TEST_P(BackwardTest, EmbedAddsRowsOfOneTokenTogether) {
  const int cols = 35, vocabulary = 9;
  BatchInput input;
  input.token_ids = {3, 8, 3, 0, 3, 8};
  input.positions.resize(6);
  const int rows = 6;
  std::vector<float> dtable = Random(vocabulary * cols, 1), dy = Random(rows * cols, 2);
  std::vector<double> want = Doubles(dtable);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) want[input.token_ids[r] * cols + c] += dy[r * cols + c];
  }
  device_->EmbedBackward(View(dtable, vocabulary, cols), View(dy, rows, cols),
                         *device_->Prepare(input, 0));
  EXPECT_LT(Error(dtable, want), 1e-6);
}

TEST_P(BackwardTest, ScatterRows) {
  const int cols = 35;
  BatchInput input;
  input.token_ids.resize(7);
  input.positions.resize(7);
  input.logit_rows = {1, 2, 6};
  std::vector<float> dx = Random(7 * cols, 1), dy = Random(3 * cols, 2);
  std::vector<double> want = Doubles(dx);
  for (int i = 0; i < 3; ++i) {
    for (int c = 0; c < cols; ++c) want[input.logit_rows[i] * cols + c] += dy[i * cols + c];
  }
  device_->ScatterRows(View(dx, 7, cols), View(dy, 3, cols), *device_->Prepare(input, 0));
  EXPECT_LT(Error(dx, want), 1e-6);
}

TEST_P(BackwardTest, RmsNorm) {
  const int rows = 11, cols = 77;
  std::vector<float> x = Random(rows * cols, 1), dy = Random(rows * cols, 2);
  std::vector<float> gain = Random(cols, 3), inv_rms(rows);
  std::vector<float> dx = Random(rows * cols, 4), dgain = Random(cols, 5);
  std::vector<double> want_dx = Doubles(dx), want_dgain = Doubles(dgain);
  for (int r = 0; r < rows; ++r) {
    double squares = 0, sum = 0;
    for (int c = 0; c < cols; ++c) squares += double{x[r * cols + c]} * x[r * cols + c];
    const double inverse = 1 / std::sqrt(squares / cols + 1e-5);
    inv_rms[r] = static_cast<float>(inverse);
    for (int c = 0; c < cols; ++c) sum += double{dy[r * cols + c]} * gain[c] * x[r * cols + c];
    for (int c = 0; c < cols; ++c) {
      const int i = r * cols + c;
      want_dx[i] += inverse * dy[i] * gain[c] - inverse * inverse * inverse * x[i] * sum / cols;
      want_dgain[c] += double{dy[i]} * x[i] * inverse;
    }
  }
  device_->RmsNormBackward(View(dx, rows, cols), dgain.data(), View(dy, rows, cols),
                           View(x, rows, cols), gain.data(), inv_rms.data());
  EXPECT_LT(Error(dx, want_dx), 1e-6);
  EXPECT_LT(Error(dgain, want_dgain), 1e-6);
}

TEST_P(BackwardTest, SiluMul) {
  const int rows = 5, n = 43;
  std::vector<float> gate_up = Random(rows * 2 * n, 1, 4), dy = Random(rows * n, 2);
  gate_up[0] = 200;
  gate_up[1] = -200;  // saturates without overflow
  std::vector<float> got(rows * 2 * n);
  std::vector<double> want(rows * 2 * n);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      const double g = gate_up[r * 2 * n + c], u = gate_up[r * 2 * n + n + c], d = dy[r * n + c];
      const double s = 1 / (1 + std::exp(-g));
      want[r * 2 * n + c] = d * u * s * (1 + g * (1 - s));
      want[r * 2 * n + n + c] = d * g * s;
    }
  }
  device_->SiluMulBackward(View(got, rows, 2 * n), View(dy, rows, n), View(gate_up, rows, 2 * n));
  EXPECT_LT(Error(got, want), 1e-6);
  device_->SiluMulBackward(View(gate_up, rows, 2 * n), View(dy, rows, n),
                           View(gate_up, rows, 2 * n));
  EXPECT_EQ(gate_up, got) << "in place";
}

TEST_P(BackwardTest, CrossEntropy) {
  const int rows = 4, vocabulary = 1003;
  std::vector<float> logits = Random(rows * vocabulary, 1, 5), losses(rows);
  logits[2 * vocabulary + 7] = 300;   // certain and right
  logits[3 * vocabulary + 7] = -300;  // certain and wrong
  const std::vector<int32_t> targets = {1002, -1, 7, 7};
  const float scale = 0.25f;
  std::vector<double> want(rows * vocabulary), want_losses(rows);
  for (int r = 0; r < rows; ++r) {
    if (targets[r] < 0) continue;
    const float* row = &logits[r * vocabulary];
    double highest = row[0], sum = 0;
    for (int c = 0; c < vocabulary; ++c) highest = std::max<double>(highest, row[c]);
    for (int c = 0; c < vocabulary; ++c) sum += std::exp(row[c] - highest);
    want_losses[r] = std::log(sum) + highest - row[targets[r]];
    for (int c = 0; c < vocabulary; ++c) {
      want[r * vocabulary + c] =
          scale * (std::exp(row[c] - highest) / sum - (c == targets[r] ? 1 : 0));
    }
  }
  device_->CrossEntropy(losses.data(), View(logits, rows, vocabulary), targets, scale);
  EXPECT_LT(Error(losses, want_losses), 1e-6);
  EXPECT_LT(Error(logits, want), 1e-6);
  EXPECT_EQ(losses[1], 0);
}

TEST_P(BackwardTest, CrossEntropyOfNotANumberIsNotANumber) {
  std::vector<float> logits = Random(100, 1), loss(1);
  logits[41] = NAN;
  const std::vector<int32_t> target = {3};
  device_->CrossEntropy(loss.data(), View(logits, 1, 100), target, 1);
  EXPECT_TRUE(std::isnan(loss[0]));
}

TEST_P(BackwardTest, ScatterKept) {
  const int references = 2, keep = 3, heads = 2, d = 5, rows = 9;
  const std::vector<int32_t> kept = {0, 2, 3, 1, 2, 3, 4, 8, -1, 6, 7, -1};
  std::vector<float> dk = Random(rows * heads * d, 1), dv = Random(rows * heads * d, 2);
  const std::vector<float> dmemory = Random(references * 2 * heads * keep * d, 3);
  std::vector<double> want_k = Doubles(dk), want_v = Doubles(dv);
  for (int r = 0; r < references; ++r) {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < keep; ++i) {
        const int row = kept[(r * heads + h) * keep + i];
        if (row < 0) continue;
        for (int c = 0; c < d; ++c) {
          const auto at = [&](int kv) {
            return dmemory[(((r * 2 + kv) * heads + h) * keep + i) * d + c];
          };
          want_k[row * heads * d + h * d + c] += at(0);
          want_v[row * heads * d + h * d + c] += at(1);
        }
      }
    }
  }
  device_->ScatterKept(View(dk, rows, heads * d), View(dv, rows, heads * d), dmemory.data(),
                       kept.data(), references, keep, heads, d);
  EXPECT_LT(Error(dk, want_k), 1e-6);
  EXPECT_LT(Error(dv, want_v), 1e-6);
}

TEST_P(BackwardTest, SumOfSquares) {
  std::vector<float> x = Random(200003, 1);
  double want = 0;
  for (const float v : x) want += double{v} * v;
  EXPECT_NEAR(device_->SumOfSquares(x.data(), x.size()).value() / want, 1, 1e-6);
  EXPECT_EQ(device_->SumOfSquares(x.data(), 0).value(), 0);
}

TEST_P(BackwardTest, AdamWFollowsTheFormula) {
  const int64_t n = 70001;  // more than one piece, and a tail
  std::vector<float> parameter = Random(n, 1), m(n), v(n);
  std::vector<double> p = Doubles(parameter), first(n), second(n);
  AdamW options{.learning_rate = 0.01f,
                .beta1 = 0.9f,
                .beta2 = 0.95f,
                .epsilon = 1e-8f,
                .weight_decay = 0.1f};
  const double lr = options.learning_rate, b1 = options.beta1, b2 = options.beta2;
  for (int step = 1; step <= 5; ++step) {
    const std::vector<float> gradient = Random(n, 10 + step, 3);
    options.step = step;
    for (int64_t i = 0; i < n; ++i) {
      const double g = 0.5 * gradient[i];
      first[i] = b1 * first[i] + (1 - b1) * g;
      second[i] = b2 * second[i] + (1 - b2) * g * g;
      p[i] -= lr * options.weight_decay * p[i];
      p[i] -= lr * (first[i] / (1 - std::pow(b1, step))) /
              (std::sqrt(second[i] / (1 - std::pow(b2, step))) + options.epsilon);
    }
    device_->AdamWStep(parameter.data(), nullptr, gradient.data(), m.data(), v.data(), n, options,
                       0.5f);
  }
  EXPECT_LT(Error(parameter, p), 1e-6);
  EXPECT_LT(Error(m, first), 1e-6);
  EXPECT_LT(Error(v, second), 1e-6);
}

// Attention over several sources: keys and values of f32 and bf16, with and without gradients,
// blocks shared by segments, more than one tile of keys and of rows, a layer that reads one source
// only.
struct AttentionCase {
  int heads, kv_heads, head_dim;
};

void CheckAttention(Device* device, const AttentionCase& shape_case, bool read_memory) {
  const int heads = shape_case.heads, kv_heads = shape_case.kv_heads, d = shape_case.head_dim;
  const AttentionShape shape{heads, kv_heads, d, 1 / std::sqrt(static_cast<float>(d))};
  const int context = 150, other = 21, rows = context + other + 2;  // two rows in no segment
  const int row_width = (heads + 2 * kv_heads) * d;
  std::vector<float> qkv = Random(rows * row_width, 1), dqkv(qkv.size());
  // Memories of 8 tokens: [reference, 2, kv_heads, 8, d], two layers of them; a frozen bf16 bank
  // of 5.
  const int tokens = 8, references = 9;
  const int64_t memory_layer = references * 2 * kv_heads * tokens * d;
  std::vector<float> memory = Random(2 * memory_layer, 2), dmemory(memory.size());
  const std::vector<float> bank_values = Random(2 * kv_heads * 5 * d, 3);
  std::vector<uint16_t> bank(bank_values.size());
  for (size_t i = 0; i < bank.size(); ++i) bank[i] = FloatToBf16(bank_values[i]);

  BatchInput input;
  input.token_ids.resize(rows);
  input.positions.resize(rows);
  AttentionPlan& plan = input.attention;
  plan.sources = {
      {DType::kF32, 0, d, row_width, int64_t{kv_heads} * d},
      {DType::kF32, memory_layer, tokens * d, d, int64_t{kv_heads} * tokens * d},
      {DType::kBF16, 0, 5 * d, d, int64_t{kv_heads} * 5 * d},
  };
  const auto live = [&](int row, int count, int first) {
    const int64_t at = int64_t{row} * row_width + heads * d;
    plan.blocks.push_back({0, &qkv[at], &dqkv[at], count, first});
  };
  live(0, context, 0);
  live(context, other, 0);
  for (int r = 0; r < references; ++r) {
    const int64_t at = r * 2 * kv_heads * tokens * d;
    plan.blocks.push_back({1, &memory[at], r == 4 ? nullptr : &dmemory[at], r == 3 ? 2 : tokens,
                           KvBlock::kSeenByAll});
  }
  plan.blocks.push_back({2, bank.data(), nullptr, 5, KvBlock::kSeenByAll});
  const auto segment = [&](int row, int count, int first, std::vector<int> blocks) {
    const int begin = plan.block_ids.size();
    plan.block_ids.insert(plan.block_ids.end(), blocks.begin(), blocks.end());
    plan.segments.push_back({row, count, first, begin, static_cast<int>(plan.block_ids.size())});
  };
  segment(0, 65, 0, {2, 3, 11, 0});
  segment(65, 64, 65, {3, 4, 5, 6, 7, 8, 9, 10, 0});
  segment(129, context - 129, 129, {11, 0});
  segment(context, other, 0, {1, 2});
  const int layer = 1;
  const std::vector<int> source_layer = {0, read_memory ? layer : -1, 0};

  // The reference, in double.
  std::vector<float> out(rows * heads * d), dout = Random(rows * heads * d, 4), lse(rows * heads);
  std::vector<double> want_dq(rows * heads * d), want_dqkv(qkv.size()), want_dmemory(memory.size());
  for (const AttentionSegment& s : plan.segments) {
    for (int i = 0; i < s.rows; ++i) {
      for (int h = 0; h < heads; ++h) {
        struct Key {
          std::vector<double> k, v;
          double *dk = nullptr, *dv = nullptr;
          double score = 0;
        };
        std::vector<Key> keys;
        const float* q = &qkv[(s.row + i) * row_width + h * d];
        double highest = -1e300, sum = 0;
        for (int b = s.block_begin; b < s.block_end; ++b) {
          const KvBlock& block = plan.blocks[plan.block_ids[b]];
          const KvSource& source = plan.sources[block.source];
          if (source_layer[block.source] < 0) continue;
          for (int t = 0; t < block.tokens; ++t) {
            if (block.first != KvBlock::kSeenByAll && block.first + t > s.first + i) break;
            const int64_t at = source_layer[block.source] * source.layer_stride +
                               h / (heads / kv_heads) * source.head_stride +
                               t * source.token_stride;
            Key key;
            for (int c = 0; c < d; ++c) {
              const auto value = [&](int64_t offset) -> double {
                if (source.dtype == DType::kBF16) {
                  return Bf16ToFloat(static_cast<const uint16_t*>(block.base)[offset]);
                }
                return static_cast<const float*>(block.base)[offset];
              };
              key.k.push_back(value(at + c));
              key.v.push_back(value(at + source.value_offset + c));
              key.score += q[c] * key.k[c];
            }
            key.score *= shape.scale;
            highest = std::max(highest, key.score);
            if (block.gradient != nullptr) {
              double* base = block.source == 0
                                 ? want_dqkv.data() + (block.gradient - dqkv.data())
                                 : want_dmemory.data() + (block.gradient - dmemory.data());
              key.dk = base + at;
              key.dv = base + at + source.value_offset;
            }
            keys.push_back(key);
          }
        }
        const int64_t row = (s.row + i) * heads * d + h * d;
        std::vector<double> o(d);
        for (Key& key : keys) sum += std::exp(key.score - highest);
        for (Key& key : keys) {
          for (int c = 0; c < d; ++c) o[c] += std::exp(key.score - highest) / sum * key.v[c];
        }
        double delta = 0;
        for (int c = 0; c < d; ++c) {
          out[row + c] = o[c];
          delta += o[c] * dout[row + c];
        }
        lse[(s.row + i) * heads + h] = highest + std::log(sum);
        for (Key& key : keys) {
          const double p = std::exp(key.score - highest) / sum;
          double dp = 0;
          for (int c = 0; c < d; ++c) dp += dout[row + c] * key.v[c];
          const double ds = p * (dp - delta) * shape.scale;
          for (int c = 0; c < d; ++c) {
            want_dq[row + c] += ds * key.k[c];
            if (key.dk == nullptr) continue;
            key.dk[c] += ds * q[c];
            key.dv[c] += p * dout[row + c];
          }
        }
      }
    }
  }

  // Rows outside every segment are left alone.
  std::vector<float> dq(rows * heads * d, 0.0f);
  for (int i = (context + other) * heads * d; i < rows * heads * d; ++i) want_dq[i] = dq[i] = 3;
  const auto run = [&] {
    device->AttentionBackward(View(dq, rows, heads * d), View(dout, rows, heads * d),
                              View(out, rows, heads * d), View(qkv, rows, heads * d, row_width),
                              *device->Prepare(input, 0), source_layer, shape, lse.data());
  };
  run();
  EXPECT_LT(Error(dq, want_dq), 2e-6);
  EXPECT_LT(Error(dqkv, want_dqkv), 2e-6);
  if (read_memory) {
    EXPECT_LT(Error(dmemory, want_dmemory), 2e-6);
  } else {
    EXPECT_EQ(dmemory, std::vector<float>(memory.size()));
  }
  // Key and value gradients add up, bit for bit the same each time.
  const std::vector<float> once = dqkv, dq_once = dq;
  run();
  EXPECT_EQ(dq, dq_once);
  for (double& w : want_dqkv) w *= 2;
  EXPECT_LT(Error(dqkv, want_dqkv), 2e-6);
  std::fill(dqkv.begin(), dqkv.end(), 0.0f);
  run();
  EXPECT_EQ(dqkv, once);
}

TEST_P(BackwardTest, Attention) {
  for (const AttentionCase& shape : {AttentionCase{4, 2, 16}, {3, 3, 64}, {4, 1, 40}, {2, 2, 80}}) {
    for (const bool read_memory : {true, false}) {
      SCOPED_TRACE(testing::Message() << shape.heads << " " << shape.kv_heads << " "
                                      << shape.head_dim << " " << read_memory);
      CheckAttention(device_.get(), shape, read_memory);
    }
  }
}

std::vector<const char*> InstructionSets() {
  std::vector<const char*> sets = {"avx2"};
  if (BestCpuIsa() >= CpuIsa::kAvx512) sets.push_back("avx512");
  return sets;
}

INSTANTIATE_TEST_SUITE_P(Instructions, BackwardTest, ::testing::ValuesIn(InstructionSets()),
                         [](const auto& info) { return std::string(info.param); });

// The device cannot be asked for less than AVX2 everywhere; its fallback is compared here.
TEST(GenericBackwardKernelsTest, AgreeWithTheBestOnes) {
  const BackwardKernels& generic = GenericBackwardKernels();
  const BackwardKernels& best = BackwardKernelsFor(BestCpuIsa());
  const int m = 16, n = 64, k = 24;
  const std::vector<float> a = Random(m * k, 1), b = Random(k * n, 2);
  std::vector<float> c1(m * n), c2(m * n);
  generic.product(m, n, k, a.data(), k, 1, b.data(), n, c1.data(), n, false);
  best.product(m, n, k, a.data(), k, 1, b.data(), n, c2.data(), n, false);
  EXPECT_LT(Error(c1, Doubles(c2)), 1e-6);
  std::vector<float> s1 = Random(n, 3), s2 = s1, dp1 = Random(n, 4), dp2 = dp1;
  generic.softmax_backward(s1.data(), dp1.data(), n, 50, 0.3f, 1, 0.2f);
  best.softmax_backward(s2.data(), dp2.data(), n, 50, 0.3f, 1, 0.2f);
  EXPECT_LT(Error(s1, Doubles(s2)), 1e-6);
  EXPECT_LT(Error(dp1, Doubles(dp2)), 1e-6);
  std::vector<float> l1 = Random(1001, 5), l2 = l1;
  EXPECT_NEAR(generic.cross_entropy(l1.data(), 1001, 3, 1),
              best.cross_entropy(l2.data(), 1001, 3, 1), 1e-5);
  EXPECT_LT(Error(l1, Doubles(l2)), 1e-5);
  EXPECT_NEAR(generic.dot(a.data(), b.data(), m * k), best.dot(a.data(), b.data(), m * k), 1e-4);
}

}  // namespace
}  // namespace memory3
