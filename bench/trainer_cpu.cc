// How much of oneDNN's f32 matmul rate a whole training step (forward, backward, AdamW) of a 124 M
// parameter model reaches on this CPU. The rate is measured in the same run on this model's own
// products: forward, gradient of the input, gradient of the weight.
//
//   trainer_cpu [--out DIR] [--threads N]

#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/report.h"
#include "bench/training_load.h"
#include "transformer/device.h"
#include "transformer/parameters.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

ModelConfig Config() {
  ModelConfig c;
  c.vocab_size = 50257;
  c.hidden_size = 768;
  c.intermediate_size = 2048;
  c.layers = 12;
  c.heads = 12;
  c.kv_heads = 12;
  c.head_dim = 64;
  c.max_position_embeddings = 1024;
  c.tie_word_embeddings = true;
  // The paper's: the first half of the layers, 8 of 128 tokens, 5 references a chunk.
  c.explicit_memory.emplace();
  c.explicit_memory->memory_layers = {0, 1, 2, 3, 4, 5};
  c.explicit_memory->prefix_token_ids = {1, 2, 3};
  return c;
}

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The shortest of `repeats`, after one to warm up.
double Best(int repeats, const std::function<void()>& work) {
  work();
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) best = std::min(best, Seconds(work));
  return best;
}

// Floating point operations of all products of one step over the time oneDNN takes for them.
double PeakRate(const ModelConfig& c, int64_t rows, int threads) {
  omp_set_num_threads(threads);
  double operations = 0, seconds = 0;
  for (const Product& p : Products(c)) {
    std::vector<float> x(rows * p.in, 0.5f), y(rows * p.out, 0.25f), w(p.out * p.in, 0.125f);
    const double once = Best(3,
                             [&] {
                               dnnl_sgemm('N', 'T', rows, p.out, p.in, 1, x.data(), p.in, w.data(),
                                          p.in, 0, y.data(), p.out);
                             }) +
                        Best(3,
                             [&] {
                               dnnl_sgemm('N', 'N', rows, p.in, p.out, 1, y.data(), p.out, w.data(),
                                          p.in, 0, x.data(), p.in);
                             }) +
                        Best(3, [&] {
                          dnnl_sgemm('T', 'N', p.out, p.in, rows, 1, y.data(), p.out, x.data(),
                                     p.in, 0, w.data(), p.in);
                        });
    operations += 6.0 * rows * p.out * p.in * p.layers;
    seconds += once * p.layers;
  }
  return operations / seconds;
}

int Main(int argc, char** argv) {
  std::string out = "build/bench";
  int threads = omp_get_max_threads();
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--out") out = argv[i + 1];
    if (std::string(argv[i]) == "--threads") threads = std::atoi(argv[i + 1]);
  }
  const ModelConfig config = Config();
  absl::StatusOr<std::unique_ptr<Device>> device = MakeCpuDevice({.threads = threads});
  absl::StatusOr<std::unique_ptr<Parameters>> parameters =
      device.ok() ? Parameters::Create(device->get(), config) : device.status();
  if (!parameters.ok()) {
    std::fprintf(stderr, "%s\n", parameters.status().ToString().c_str());
    return 1;
  }
  absl::Status loaded = (*parameters)->Load(InitialParameters(/*seed=*/1, config.layers));
  absl::StatusOr<Buffer> gradient = (*parameters)->AllocateLike();
  absl::StatusOr<Buffer> m = (*parameters)->AllocateLike(), v = (*parameters)->AllocateLike();
  if (!loaded.ok() || !gradient.ok() || !m.ok() || !v.ok()) {
    std::fprintf(stderr, "not enough memory\n");
    return 1;
  }

  BenchReport report("trainer_cpu");
  TrainingStep step(parameters->get());
  int64_t count = 0;
  for (const int tokens : {64, 512}) {
    const int sequences = 4;
    TrainingBatch batch = RandomBatch(config, sequences, tokens);
    double loss = 0;
    const auto train = [&] {
      (*device)->Zero(gradient->data(), gradient->bytes());
      const TrainingResult result = step.Run(batch, gradient->as<float>()).value();
      loss = result.loss / result.tokens;
      (*parameters)
          ->AdamWStep(gradient->as<float>(), m->as<float>(), v->as<float>(),
                      {.learning_rate = 1e-4f, .weight_decay = 0.1f, .step = ++count},
                      1.0f / result.tokens);
    };
    // The rate before and after, so that a neighbour's load does not count for one side only.
    double peak = PeakRate(config, sequences * tokens, threads);
    const double seconds = Best(tokens == 64 ? 5 : 3, train);
    peak = std::max(peak, PeakRate(config, sequences * tokens, threads));
    const double operations = StepOperations(config, sequences, tokens);
    const std::string shape = "4x" + std::to_string(tokens);
    report.Add("peak_fraction_" + shape, operations / seconds / peak, "",
               tokens == 64 ? ">= 0.50" : ">= 0.65");
    report.Add(tokens == 64 ? "tokens_per_s" : "tokens_per_s_" + shape,
               sequences * tokens / seconds, "tokens/s");
    report.Add("gflops_" + shape, operations / seconds * 1e-9, "GFLOP/s");
    report.Add("onednn_gflops_" + shape, peak * 1e-9, "GFLOP/s");
    if (tokens == 512) {
      AddReferences(config, &batch);
      const double with_references = Best(1, train);
      report.Add("tokens_per_s_4x512_memory", sequences * tokens / with_references, "tokens/s");
      report.Add("memory_step_cost", with_references / seconds, "x plain");
    }
    std::printf("4x%d: loss %.3f after %lld steps\n", tokens, loss, static_cast<long long>(count));
  }
  report.Note(
      "124 M parameters, f32, forward + backward + AdamW; rate: dnnl_sgemm on these shapes");
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
