// The decoder on a GPU: prefill and decode of TinyLlama-1.1B's geometry and the paper's 2.4 B one,
// with and without memories, and vq decoding, beside this machine's own limits: the rate of a large
// product of cuBLASLt and the bandwidth of a large copy, both measured in the same run.
//
//   decoder_cuda [--out DIR]
//
// Without a GPU it says so and ends well.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/report.h"
#include "transformer/cuda/vq_decode.h"
#include "transformer/decoder.h"
#include "transformer/device.h"
#include "transformer/model.h"

namespace memory3 {
namespace {

constexpr int kPromptTokens = 128;
constexpr int kNewTokens = 128;
constexpr int kPrefillTokens = 2048;
constexpr int kMostSequences = 32;
constexpr int kMemoriesPerChunk = 5;

// Ends the benchmark: a failing call leaves nothing to measure.
void Check(const absl::Status& status, const char* what) {
  if (status.ok()) return;
  std::fprintf(stderr, "decoder_cuda: %s: %s\n", what, std::string(status.message()).c_str());
  std::exit(1);
}
template <typename T>
T Take(absl::StatusOr<T> value, const char* what) {
  Check(value.status(), what);
  return *std::move(value);
}

// Gaussian numbers from one table read at an offset that the name gives: weights of billions of
// parameters in seconds. (Never zeros: products of zeros run faster.)
class TableWeights : public TensorSource {
 public:
  TableWeights() : table_(kSize) {
    std::mt19937 engine(1);
    std::normal_distribution<float> normal(0, 0.02f);
    for (float& x : table_) x = normal(engine);
  }
  absl::Status Read(std::string_view name, int64_t, int64_t, std::span<float> out) const override {
    if (name.find("norm") != std::string_view::npos) {
      std::fill(out.begin(), out.end(), 1.0f);
      return absl::OkStatus();
    }
    size_t at = std::hash<std::string_view>()(name) % kSize;
    for (size_t done = 0; done < out.size();) {
      const size_t count = std::min(out.size() - done, kSize - at);
      std::copy_n(table_.begin() + at, count, out.begin() + done);
      done += count;
      at = 0;
    }
    return absl::OkStatus();
  }

 private:
  static constexpr size_t kSize = 1 << 20 | 1;  // odd, so that rows do not repeat in step
  std::vector<float> table_;
};

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Median of `repeats` runs that each end with the device idle, after two to warm up.
double Median(Device& device, int repeats, const std::function<void()>& work) {
  std::vector<double> times;
  for (int i = -2; i < repeats; ++i) {
    const double time = Seconds([&] {
      work();
      Check(device.Synchronize(), "run");
    });
    if (i >= 0) times.push_back(time);
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

struct Limits {
  double flops = 0;      // of cuBLASLt, bf16
  double bandwidth = 0;  // bytes read and written a second
};

Limits MeasureLimits(Device& device, BenchReport& report) {
  Limits limits;
  const size_t bytes = size_t{2} << 30;
  const Buffer from = Take(device.Allocate(bytes), "copy"),
               to = Take(device.Allocate(bytes), "copy");
  limits.bandwidth = 2 * 8.0 * bytes / Median(device, 5, [&] {
                       for (int i = 0; i < 8; ++i) device.Copy(to.data(), from.data(), bytes);
                     });

  const int64_t n = 8192;
  std::vector<float> numbers(n * n);
  Check(TableWeights().Read("matrix", n, n, numbers), "matrix");
  const auto weight = Take(device.PrepareWeight(numbers, n, n, WeightFormat::kBF16), "matrix");
  const Buffer x = Take(device.Allocate(n * n * 2), "matrix");
  const Buffer y = Take(device.Allocate(n * n * 2), "matrix");
  // bf16 activations from the same table: the upper halves of the floats.
  std::vector<uint16_t> halves(n * n);
  for (int64_t i = 0; i < n * n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &numbers[i], sizeof bits);
    halves[i] = static_cast<uint16_t>(bits >> 16);
  }
  device.Upload(x.data(), halves.data(), halves.size() * 2);
  const Tensor input{x.data(), DType::kBF16, n, n, n}, output{y.data(), DType::kBF16, n, n, n};
  limits.flops = 2.0 * n * n * n * 4 / Median(device, 5, [&] {
                   for (int i = 0; i < 4; ++i) device.MatMul(output, input, *weight, false);
                 });
  report.Add("cublaslt_tflops", limits.flops / 1e12, "TFLOP/s");
  report.Add("copy_bandwidth", limits.bandwidth / 1e9, "GB/s");
  return limits;
}

struct Geometry {
  const char* name;
  int layers, heads, kv_heads, head_dim, hidden, intermediate, vocabulary;
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
  c.max_position_embeddings = 4096;
  ExplicitMemoryConfig memory;
  for (int i = 0; i < g.layers / 2; ++i) memory.memory_layers.push_back(i);
  memory.prefix_token_ids = {1, 100, 200, 300};
  c.explicit_memory = memory;
  return c;
}

int64_t ParametersPerToken(const ModelConfig& c) {
  const int64_t block = int64_t{c.hidden_size} * (c.heads + 2 * c.kv_heads) * c.head_dim +
                        int64_t{c.hidden_size} * c.heads * c.head_dim +
                        int64_t{3} * c.hidden_size * c.intermediate_size;
  return block * c.layers;
}

class DecoderBench {
 public:
  DecoderBench(Device& device, const Geometry& geometry, const Limits& limits, BenchReport& report)
      : device_(device),
        name_(geometry.name),
        config_(ConfigOf(geometry)),
        limits_(limits),
        report_(report) {
    const auto model =
        Take(Model::Load(&device, config_, TableWeights(), WeightFormat::kBF16), "model");
    bytes_per_step_ = model->bytes_per_row();
    DecoderOptions options;
    options.max_rows = kMostSequences * kPromptTokens;
    options.max_logit_rows = kMostSequences;
    options.kv_pages = kMostSequences * (kPromptTokens + kNewTokens) / kKvPageTokens +
                       kPrefillTokens / kKvPageTokens + kMostSequences;
    options.memory_slots = kMostSequences * kMemoriesPerChunk;
    options.kv_dtype = options.memory_dtype = DType::kBF16;
    decoder_ = Take(Decoder::Create(model, options), "decoder");
    std::mt19937 engine(2);
    std::normal_distribution<float> normal;
    ExplicitMemory memory;
    memory.shape = decoder_->pool().slot_shape();
    memory.reference_tokens = 128;
    memory.values.resize(memory.shape.values());
    for (float& x : memory.values) x = normal(engine);
    for (int slot = 0; slot < options.memory_slots; ++slot) {
      Check(decoder_->pool().Load(slot, memory), "memory");
    }
  }

  void Run() {
    const double prefill = Prefill();
    Add("prefill_tokens_per_s", kPrefillTokens / prefill, "tokens/s");
    Add("prefill_of_cublaslt",
        2.0 * ParametersPerToken(config_) * kPrefillTokens / prefill / limits_.flops, "",
        ">= 0.50");
    for (const int sequences : {1, kMostSequences}) {
      const std::string batch = "_batch" + std::to_string(sequences);
      const double step = DecodeStep(sequences, /*with_memories=*/false);
      Add("decode_tokens_per_s" + batch, sequences / step, "tokens/s");
      Add("decode_of_bandwidth" + batch,
          static_cast<double>(BytesOfStep(sequences)) / step / limits_.bandwidth, "", ">= 0.70");
      const double with = DecodeStep(sequences, /*with_memories=*/true);
      Add("decode_memory_tokens_per_s" + batch, sequences / with, "tokens/s");
      Add("decode_memory_ratio" + batch, step / with, "", ">= 0.97");
    }
  }

 private:
  void Add(const std::string& metric, double value, const char* unit, const char* target = "") {
    report_.Add(name_ + "_" + metric, value, unit, target);
  }

  // Weights once, and the keys and values of contexts half way through the generated tokens.
  int64_t BytesOfStep(int sequences) const {
    const int64_t token = int64_t{4} * config_.layers * config_.kv_heads * config_.head_dim;
    return bytes_per_step_ + token * sequences * (kPromptTokens + kNewTokens / 2);
  }

  double Prefill() {
    std::vector<int32_t> ids(kPrefillTokens);
    for (int i = 0; i < kPrefillTokens; ++i) ids[i] = (i * 7919 + 13) % config_.vocab_size;
    return Median(device_, 5, [&] {
      Sequence sequence = Take(decoder_->Start(Layout::kPlain), "sequence");
      const Slice slice{&sequence, ids, {}, 1};
      Check(decoder_->Forward({&slice, 1}), "prefill");
      Check(device_.Synchronize(), "prefill");  // before the pages go back
    });
  }

  // Mean seconds of a greedy step, the choice brought to the host each time.
  double DecodeStep(int sequences, bool with_memories) {
    std::vector<Sequence> all;
    std::vector<std::vector<int32_t>> ids(sequences);
    std::vector<std::vector<MemoryRead>> reads(sequences);
    for (int s = 0; s < sequences; ++s) {
      all.push_back(Take(decoder_->Start(Layout::kMemory), "sequence"));
      for (int i = 0; i < kPromptTokens; ++i) {
        ids[s].push_back((s * 31 + i * 7919 + 13) % config_.vocab_size);
      }
      reads[s] = {{kPromptTokens, {}}};
      // All memories differ: the worst case.
      for (int m = 0; with_memories && m < kMemoriesPerChunk; ++m) {
        reads[s][0].slots.push_back(s * kMemoriesPerChunk + m);
      }
    }
    const auto forward = [&] {
      std::vector<Slice> slices;
      slices.reserve(sequences);
      for (int s = 0; s < sequences; ++s) slices.push_back({&all[s], ids[s], reads[s], 1});
      Check(decoder_->Forward(slices), "decode");
      const std::vector<int32_t> next = Take(decoder_->ArgMax(), "decode");
      for (int s = 0; s < sequences; ++s) {
        ids[s] = {next[s]};
        reads[s][0].tokens = 1;
      }
    };
    forward();                              // the prompt
    for (int i = 0; i < 8; ++i) forward();  // recordings are made
    const int steps = kNewTokens - 16;
    return Seconds([&] {
             for (int i = 0; i < steps; ++i) forward();
           }) /
           steps;
  }

  Device& device_;
  const std::string name_;
  const ModelConfig config_;
  const Limits limits_;
  BenchReport& report_;
  int64_t bytes_per_step_ = 0;
  std::unique_ptr<Decoder> decoder_;
};

// The vectors of 160 memories of the paper's geometry, codes to bf16 on the device.
void VqDecode(Device& device, BenchReport& report) {
  VqCodebook book;
  book.head_dim = 80;
  book.coarse_bits = 14;
  book.fine_bits = 10;
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;
  book.rotation.assign(80 * 80, 0.0f);
  for (int i = 0; i < 80; ++i) book.rotation[i * 80 + (i * 7 + 3) % 80] = 1;
  book.coarse.resize(2 * 16384 * 40);
  book.fine.resize(8 * 1024 * 10);
  for (float& x : book.coarse) x = normal(engine);
  for (float& x : book.fine) x = 0.1f * normal(engine);
  const auto decoder = Take(CudaVqDecoder::Create(&device, book), "vq");
  const int64_t vectors = int64_t{160} * 2 * 22 * 8 * 8;
  std::vector<uint8_t> codes(vectors * decoder->code_bytes());
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(engine());
  const Buffer from = Take(device.Allocate(codes.size()), "vq");
  const Buffer to = Take(device.Allocate(vectors * 80 * 2), "vq");
  device.Upload(from.data(), codes.data(), codes.size());
  const Tensor out{to.data(), DType::kBF16, vectors, 80, 80};
  const double seconds =
      Median(device, 20, [&] { Check(decoder->Decode(out, from.as<uint8_t>()), "vq"); });
  report.Add("vq_decode_160_memories_ms", seconds * 1e3, "ms", "<= 5");
}

int Main(const std::string& out) {
  auto device = MakeCudaDevice({});
  if (!device.ok()) {
    std::printf("decoder_cuda: skipped: %s\n", std::string(device.status().message()).c_str());
    return 0;
  }
  BenchReport report("decoder_cuda");
  report.Note((*device)->name());
  const Limits limits = MeasureLimits(**device, report);
  const Geometry geometries[] = {{"tinyllama", 22, 32, 4, 64, 2048, 5632, 32000},
                                 {"paper", 44, 40, 8, 80, 3200, 3200, 60416}};
  for (const Geometry& geometry : geometries) {
    DecoderBench(**device, geometry, limits, report).Run();
  }
  VqDecode(**device, report);
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) {
  std::string out = "build/bench";
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--out" && i + 1 < argc) {
      out = argv[++i];
    } else {
      std::fprintf(stderr, "usage: decoder_cuda [--out DIR]\n");
      return 2;
    }
  }
  return memory3::Main(out);
}
