// The decoder on the CPU against what the machine can do: TinyLlama-1.1B's geometry with random
// weights, bf16 and int8, with and without five memories a sequence.
//
//   roofline       weights' bytes of a decode step per second, over the bandwidth at which all
//   cores
//                  read a large buffer
//   peak fraction  arithmetic per second of a prefill of 512 tokens, over oneDNN's on the same
//                  matrices (packed as oneDNN likes them), for bf16 the better of its bf16 and f32
//   memory ratio   tokens per second with five memories a sequence, all different, over those with
//                  none
// What a ratio compares is measured in turns; the ratio is the median over the rounds.
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <dnnl.hpp>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/random_llama.h"
#include "bench/report.h"
#include "transformer/config.h"
#include "transformer/decoder.h"
#include "transformer/device.h"
#include "transformer/model.h"

namespace memory3 {
namespace {

constexpr int kPrefill = 512;  // tokens
constexpr int kContext = 128;  // tokens in a sequence's context when its decoding is measured
constexpr int kMemories = 5;   // of each sequence
constexpr int kBatches[] = {1, 8, 32};
constexpr int kMostBatch = 32;

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double TimeOf(const std::function<void()>& work) {
  const double start = Seconds();
  work();
  return Seconds() - start;
}

double Median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
  return v[v.size() / 2];
}

void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "decoder_cpu: %s\n", status.ToString().c_str());
  std::exit(1);
}

template <typename T>
T Must(absl::StatusOr<T> value) {
  Must(value.status());
  return *std::move(value);
}

// ---- what the machine can do ----

__attribute__((target_clones("avx512f", "avx2", "default"))) uint64_t SumOf(const uint64_t* p,
                                                                            size_t n) {
  uint64_t sum = 0;
  for (size_t i = 0; i < n; i += 64) {
    __builtin_prefetch(p + i + 512);
    for (size_t j = 0; j < 64; ++j) sum += p[i + j];
  }
  return sum;
}

class ReadBandwidth {
 public:
  explicit ReadBandwidth(Device& device) : buffer_(Must(device.Allocate(size_t{1} << 30))) {}
  // Bytes per second, all cores.
  double Measure() {
    const size_t words = buffer_.bytes() / 8;
    uint64_t total = 0;
    const double seconds = TimeOf([&] {
#pragma omp parallel reduction(+ : total)
      {
        const size_t share = words / omp_get_num_threads() / 64 * 64;
        total += SumOf(buffer_.as<uint64_t>() + share * omp_get_thread_num(), share);
      }
    });
    sink_ = total;
    return buffer_.bytes() / seconds;
  }

 private:
  Buffer buffer_;
  volatile uint64_t sink_ = 0;
};

// oneDNN's products with a block's four matrices at 512 rows.
class OneDnn {
 public:
  OneDnn(const ModelConfig& c, dnnl::memory::data_type source, dnnl::memory::data_type weights)
      : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    using dnnl::memory;
    const int64_t kv = int64_t{c.kv_heads} * c.head_dim, q = int64_t{c.heads} * c.head_dim;
    const int64_t shapes[][2] = {{q + 2 * kv, c.hidden_size},
                                 {c.hidden_size, q},
                                 {2 * c.intermediate_size, c.hidden_size},
                                 {c.hidden_size, c.intermediate_size}};
    for (const auto& [out, in] : shapes) {
      const memory::desc x({kPrefill, in}, source, memory::format_tag::ab);
      const memory::desc w({in, out}, weights, memory::format_tag::any);
      const memory::desc y({kPrefill, out}, memory::data_type::f32, memory::format_tag::ab);
      const dnnl::matmul::primitive_desc description({x, w, y}, engine_);
      Product product{dnnl::matmul(description), {}};
      for (const auto& [name, desc] : {std::pair{DNNL_ARG_SRC, description.src_desc()},
                                       {DNNL_ARG_WEIGHTS, description.weights_desc()},
                                       {DNNL_ARG_DST, description.dst_desc()}}) {
        memory m(desc, engine_);
        std::memset(m.get_data_handle(), 0, desc.get_size());
        product.arguments.emplace(name, m);
      }
      operations_ += 2.0 * kPrefill * out * in;
      products_.push_back(std::move(product));
    }
    Measure();  // its kernels are made on the first call
  }
  // Operations per second.
  double Measure() {
    return operations_ / TimeOf([&] {
             for (Product& p : products_) p.matmul.execute(stream_, p.arguments);
             stream_.wait();
           });
  }

 private:
  struct Product {
    dnnl::matmul matmul;
    std::unordered_map<int, dnnl::memory> arguments;
  };
  dnnl::engine engine_;
  dnnl::stream stream_;
  std::vector<Product> products_;
  double operations_ = 0;
};

// ---- the decoder ----

class Runner {
 public:
  Runner(Device& device, const ModelConfig& config, WeightFormat format) {
    model_ = Must(Model::Load(&device, config, TableWeights(), format));
    DecoderOptions options;
    options.memory = config.explicit_memory;
    options.max_rows = kPrefill;
    options.max_logit_rows = kMostBatch;
    // Two sets of sequences, with and without memories, and one being prefilled.
    options.kv_pages = 2 * kMostBatch * (kContext + 128) / kKvPageTokens + kPrefill / kKvPageTokens;
    options.memory_slots = kMostBatch * kMemories;
    decoder_ = Must(Decoder::Create(model_, options));
    ExplicitMemory memory;
    memory.shape = decoder_->pool().slot_shape();
    memory.reference_tokens = 128;
    memory.values.resize(memory.shape.values());
    std::mt19937 rng(2);
    std::normal_distribution<float> normal;
    for (int slot = 0; slot < options.memory_slots; ++slot) {
      for (float& x : memory.values) x = normal(rng);
      Must(decoder_->pool().Load(slot, memory));
    }
    for (auto& set : sequences_) {
      for (int i = 0; i < kMostBatch; ++i) {
        set.push_back(Must(decoder_->Start(Layout::kMemory)));
      }
      // Four contexts a pass.
      for (int i = 0; i < kMostBatch; i += kPrefill / kContext) {
        std::vector<Slice> slices;
        for (int j = i; j < i + kPrefill / kContext; ++j) {
          slices.push_back({&set[j], std::span(Tokens()).first(kContext), {}, 0});
        }
        Must(decoder_->Forward(slices));
      }
    }
  }

  int64_t weight_bytes() const { return model_->bytes_per_row(); }

  // Seconds of one decode step of `batch` sequences.
  double Decode(int batch, bool memories) {
    std::vector<Slice> slices;
    std::vector<MemoryRead> reads(batch);
    for (int i = 0; i < batch; ++i) {
      reads[i].tokens = 1;
      for (int m = 0; memories && m < kMemories; ++m) reads[i].slots.push_back(i * kMemories + m);
      Slice slice{&sequences_[memories][i], std::span(Tokens()).subspan(i, 1), {}, 1};
      slice.reads = std::span(&reads[i], 1);
      slices.push_back(slice);
    }
    return TimeOf([&] {
      Must(decoder_->Forward(slices));
      Must(decoder_->ArgMax());
    });
  }

  // Seconds of a prefill of kPrefill tokens, to the first token's id.
  double Prefill() {
    Sequence sequence = Must(decoder_->Start(Layout::kMemory));
    const Slice slice{&sequence, Tokens(), {}, 1};
    return TimeOf([&] {
      Must(decoder_->Forward(std::span(&slice, 1)));
      Must(decoder_->ArgMax());
    });
  }

 private:
  static const std::vector<int32_t>& Tokens() {
    static const std::vector<int32_t> tokens = [] {
      std::vector<int32_t> ids(kPrefill);
      std::mt19937 rng(3);
      for (int32_t& id : ids) id = static_cast<int32_t>(rng() % 32000);
      return ids;
    }();
    return tokens;
  }

  std::shared_ptr<const Model> model_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<Sequence> sequences_[2];  // without, with memories
};

// Arithmetic of the products of one prefill.
double PrefillOperations(const ModelConfig& c) {
  const double kv = double{1} * c.kv_heads * c.head_dim, q = double{1} * c.heads * c.head_dim;
  const double block =
      c.hidden_size * (q + 2 * kv) + q * c.hidden_size + 3.0 * c.hidden_size * c.intermediate_size;
  return 2 * (block * c.layers * kPrefill + double{1} * c.vocab_size * c.hidden_size);
}

int Main(int argc, char** argv) {
  CLI::App app("Speed of the decoder on the CPU, against the machine's own limits");
  std::string out = "build/bench";
  int rounds = 7;
  CpuDeviceOptions options;
  app.add_option("--out", out, "where decoder_cpu.json goes");
  app.add_option("--rounds", rounds, "rounds; a number is the median over them")
      ->check(CLI::PositiveNumber);
  app.add_option("--threads", options.threads, "0: one per core");
  app.add_option("--instructions", options.instructions,
                 "highest instruction set to use; empty: the best found");
  CLI11_PARSE(app, argc, argv);
  if (options.threads > 0) omp_set_num_threads(options.threads);

  const std::unique_ptr<Device> device = Must(MakeCpuDevice(options));
  const ModelConfig config = TinyLlama();
  BenchReport report("decoder_cpu");
  report.Note(device->name() + "; TinyLlama-1.1B geometry, random weights, " +
              std::to_string(rounds) + " rounds; decoding at a context of " +
              std::to_string(kContext) + " tokens and more");

  ReadBandwidth bandwidth(*device);
  using Type = dnnl::memory::data_type;
  std::map<std::string, OneDnn> peers;
  for (const auto& [name, source, weights] : {std::tuple{"f32", Type::f32, Type::f32},
                                              {"bf16", Type::bf16, Type::bf16},
                                              {"int8", Type::u8, Type::s8}}) {
    try {
      peers.emplace(std::piecewise_construct, std::forward_as_tuple(name),
                    std::forward_as_tuple(config, source, weights));
    } catch (const dnnl::error& error) {
      report.Note(std::string("oneDNN has no ") + name + " product on this CPU: " + error.what());
    }
  }

  std::map<std::string, std::vector<double>> samples;
  const auto sample = [&](const std::string& name, double value) {
    samples[name].push_back(value);
    return value;
  };
  for (const auto& [format, weights] :
       {std::pair{"bf16", WeightFormat::kBF16}, {"int8", WeightFormat::kInt8}}) {
    Runner runner(*device, config, weights);
    const std::string f = format;
    runner.Prefill();
    for (const bool memories : {false, true}) {
      for (const int batch : kBatches) runner.Decode(batch, memories);
    }
    for (int round = 0; round < rounds; ++round) {
      // One sequence, in turns with the bandwidth.
      std::vector<double> read, step;
      for (int i = 0; i < 4; ++i) {
        read.push_back(bandwidth.Measure());
        step.push_back(runner.Decode(1, false));
        step.push_back(runner.Decode(1, false));
      }
      const double bytes_s = sample("read_bandwidth_gb_s", Median(read) / 1e9) * 1e9;
      sample("decode_b1_" + f + "_tokens_per_s", 1 / Median(step));
      sample("decode_b1_" + f + "_roofline", runner.weight_bytes() / Median(step) / bytes_s);

      for (const int batch : kBatches) {
        std::vector<double> without, with;
        for (int i = 0; i < (batch == kMostBatch ? 2 : 5); ++i) {
          without.push_back(runner.Decode(batch, false));
          with.push_back(runner.Decode(batch, true));
        }
        const std::string name = "decode_b" + std::to_string(batch) + "_" + f + "_tokens_per_s";
        if (batch > 1) sample(name, batch / Median(without));
        sample(name + "_memory", batch / Median(with));
        if (batch == 8) {
          const double ratio = Median(without) / Median(with);
          sample(f == "bf16" ? "decode_b8_memory_ratio" : "decode_b8_int8_memory_ratio", ratio);
        }
      }

      double peak = 0;
      for (auto& [name, peer] : peers) {
        if ((name == "int8") != (f == "int8")) continue;
        peak = std::max(peak, sample("onednn_" + name + "_gflop_s", peer.Measure() / 1e9) * 1e9);
      }
      const double prefill = runner.Prefill();
      sample("prefill_" + f + "_tokens_per_s", kPrefill / prefill);
      sample("prefill_" + f + "_gflop_s", PrefillOperations(config) / prefill / 1e9);
      if (peak > 0) {
        sample("prefill_" + f + "_peak_fraction", PrefillOperations(config) / prefill / peak);
      }
    }
  }

  static const std::map<std::string, std::string> kTargets = {
      {"decode_b1_bf16_roofline", ">= 0.75"},    {"decode_b1_int8_roofline", ">= 0.75"},
      {"prefill_bf16_peak_fraction", ">= 0.70"}, {"prefill_int8_peak_fraction", ">= 0.70"},
      {"decode_b8_memory_ratio", ">= 0.97"},
  };
  for (const auto& [name, values] : samples) {
    const bool rate = name.find("tokens_per_s") != std::string::npos;
    const auto target = kTargets.find(name);
    report.Add(name, Median(values),
               rate                                        ? "tokens/s"
               : name.ends_with("_gb_s")                   ? "GB/s"
               : name.find("gflop_s") != std::string::npos ? "GFLOP/s"
                                                           : "",
               target == kTargets.end() ? "" : target->second);
  }
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
