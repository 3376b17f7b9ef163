// Training on a GPU: whole steps (forward, backward, AdamW; bf16 with f32 master weights) of a 124
// M and a 1.1 B parameter model, plain and with references, in tokens a second and as a fraction of
// the GPU's bf16 rate (MFU).
//
//   trainer_cuda [--out DIR] [--pytorch_tokens_per_s N]
//
// The rate is the data sheet's for GPUs known here, else that of a large product of cuBLASLt, which
// is reported in any case. bench/peers/pytorch_train.py measures PyTorch on the same model and
// passes its rate, for `vs_pytorch_124m`. Without a GPU it says so and ends well.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/report.h"
#include "bench/training_load.h"
#include "transformer/device.h"
#include "transformer/parameters.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

// Ends the benchmark: a failing call leaves nothing to measure.
void Check(const absl::Status& status, const char* what) {
  if (status.ok()) return;
  std::fprintf(stderr, "trainer_cuda: %s: %s\n", what, std::string(status.message()).c_str());
  std::exit(1);
}
template <typename T>
T Take(absl::StatusOr<T> value, const char* what) {
  Check(value.status(), what);
  return *std::move(value);
}

// Median seconds of `repeats` runs that each end with the device idle, after two to warm up.
double Median(Device& device, int repeats, const std::function<void()>& work) {
  std::vector<double> times;
  for (int i = -2; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    Check(device.Synchronize(), "run");
    const double time =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (i >= 0) times.push_back(time);
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

// Operations a second of a product of 8192³ in bf16.
double ProductRate(Device& device) {
  const int64_t n = 8192;
  std::vector<float> numbers(n * n);
  std::mt19937 random(1);
  for (float& x : numbers) x = static_cast<float>(random() % 2048) / 1024 - 1;
  const auto weight = Take(device.PrepareWeight(numbers, n, n, WeightFormat::kBF16), "product");
  const Buffer x = Take(device.Allocate(n * n * 2), "product");
  const Buffer y = Take(device.Allocate(n * n * 2), "product");
  std::vector<uint16_t> halves(n * n);
  for (int64_t i = 0; i < n * n; ++i) {
    halves[i] = static_cast<uint16_t>(0x3f00 + (i * 7919) % 256);  // 0.5 … 2
  }
  device.Upload(x.data(), halves.data(), halves.size() * 2);
  const Tensor input{x.data(), DType::kBF16, n, n, n}, output{y.data(), DType::kBF16, n, n, n};
  return 2.0 * n * n * n / Median(device, 5, [&] { device.MatMul(output, input, *weight, false); });
}

// Dense bf16 operations a second by the data sheet; 0: not known here.
double DataSheetRate(const std::string& name) {
  for (const auto& [part, rate] : {std::pair{"H200", 989e12}, {"H100", 989e12}, {"A100", 312e12}}) {
    if (name.find(part) != std::string::npos) return rate;
  }
  return 0;
}

struct Geometry {
  const char* name;
  int layers, heads, kv_heads, head_dim, hidden, intermediate, vocabulary;
  bool tied;
  int sequences, tokens;
};

ModelConfig ConfigOf(const Geometry& g) {
  ModelConfig c;
  c.vocab_size = g.vocabulary;
  c.hidden_size = g.hidden;
  c.intermediate_size = g.intermediate;
  c.layers = g.layers;
  c.heads = g.heads;
  c.kv_heads = g.kv_heads;
  c.head_dim = g.head_dim;
  c.tie_word_embeddings = g.tied;
  c.max_position_embeddings = 4096;
  // The paper's: the first half of the layers, 8 of 128 tokens, 5 references a chunk.
  c.explicit_memory.emplace();
  for (int i = 0; i < g.layers / 2; ++i) c.explicit_memory->memory_layers.push_back(i);
  c.explicit_memory->prefix_token_ids = {1, 2, 3};
  return c;
}

// Tokens a second of plain steps.
double Train(Device& device, const Geometry& g, double rate, BenchReport& report) {
  const ModelConfig config = ConfigOf(g);
  const auto parameters = Take(Parameters::Create(&device, config), "parameters");
  Check(parameters->Load(InitialParameters(/*seed=*/1, config.layers)), "parameters");
  const Buffer gradient = Take(parameters->AllocateLike(), "gradient");
  const Buffer m = Take(parameters->AllocateLike(), "moments");
  const Buffer v = Take(parameters->AllocateLike(), "moments");
  TrainingStep step(parameters.get());
  int64_t count = 0;
  const auto seconds_of = [&](const TrainingBatch& batch) {
    return Median(device, 7, [&] {
      device.Zero(gradient.data(), gradient.bytes());
      const TrainingResult result = Take(step.Run(batch, gradient.as<float>()), "step");
      parameters->AdamWStep(gradient.as<float>(), m.as<float>(), v.as<float>(),
                            {.learning_rate = 1e-4f, .weight_decay = 0.1f, .step = ++count},
                            1.0f / static_cast<float>(result.tokens));
    });
  };
  TrainingBatch batch = RandomBatch(config, g.sequences, g.tokens);
  const double plain = seconds_of(batch);
  const double tokens_per_s = g.sequences * g.tokens / plain;
  const std::string name = g.name;
  report.Add("tokens_per_s_" + name, tokens_per_s, "tokens/s");
  report.Add("mfu_" + name, StepOperations(config, g.sequences, g.tokens) / plain / rate, "");
  AddReferences(config, &batch);
  report.Add("continual_step_cost_" + name, seconds_of(batch) / plain, "x warm-up", "<= 2.2");
  return tokens_per_s;
}

int Main(const std::string& out, double pytorch_tokens_per_s) {
  const auto device = MakeCudaDevice({});
  if (!device.ok()) {
    std::printf("trainer_cuda: skipped: %s\n", std::string(device.status().message()).c_str());
    return 0;
  }
  BenchReport report("trainer_cuda");
  report.Note((*device)->name());
  const double products = ProductRate(**device);
  report.Add("cublaslt_tflops", products / 1e12, "TFLOP/s");
  double rate = DataSheetRate((*device)->name());
  if (rate == 0) {
    rate = products;
    report.Note("MFU is against cuBLASLt's rate: this GPU's data sheet is not known here");
  }
  const Geometry geometries[] = {
      {"124m", 12, 12, 12, 64, 768, 2048, 50257, true, 32, 1024},
      {"1b", 22, 32, 4, 64, 2048, 5632, 32000, false, 8, 2048},
  };
  for (const Geometry& g : geometries) {
    const double tokens_per_s = Train(**device, g, rate, report);
    if (std::string(g.name) == "124m" && pytorch_tokens_per_s > 0) {
      report.Add("vs_pytorch_124m", tokens_per_s / pytorch_tokens_per_s, "", ">= 1");
    }
  }
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) {
  std::string out = "build/bench";
  double pytorch_tokens_per_s = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--out" && i + 1 < argc) {
      out = argv[++i];
    } else if (flag == "--pytorch_tokens_per_s" && i + 1 < argc) {
      pytorch_tokens_per_s = std::strtod(argv[++i], nullptr);
    } else {
      std::fprintf(stderr, "usage: trainer_cuda [--out DIR] [--pytorch_tokens_per_s N]\n");
      return 2;
    }
  }
  return memory3::Main(out, pytorch_tokens_per_s);
}
