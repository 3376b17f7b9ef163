// Codecs on one core, in the geometry of the paper's model (head_dim 80; a memory has 2,816
// vectors), with FAISS's own encoding of the same tables beside it. The tables are random: their
// size is what costs.
#include <faiss/Index2Layer.h>
#include <faiss/IndexPQ.h>
#include <faiss/IndexPreTransform.h>
#include <faiss/VectorTransform.h>
#include <faiss/index_factory.h>
#include <omp.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/report.h"
#include "memory/codec.h"
#include "memory/hash.h"
#include "memory/vq_codec.h"
#include "memory/vq_training.h"

namespace memory3 {
namespace {

constexpr int kHeadDim = 80;
constexpr int64_t kVectors = 2816;  // of one memory: 22 layers, K and V, 8 heads, 8 tokens

// Seconds of one call: the fastest of as many as fit half a second, three at least.
double Seconds(const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9, total = 0;
  for (int round = 0; round < 3 || total < 0.5; ++round) {
    const auto start = Clock::now();
    call();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::min(best, seconds);
    total += seconds;
  }
  return best;
}

std::vector<float> RandomNumbers(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(n);
  for (float& x : numbers) x = normal(random);
  return numbers;
}

// An index of the paper's string, its tables random instead of trained.
std::unique_ptr<faiss::Index> StandardIndex() {
  std::unique_ptr<faiss::Index> index(
      faiss::index_factory(kHeadDim, VqFactoryString(kHeadDim).c_str()));
  auto& outer = dynamic_cast<faiss::IndexPreTransform&>(*index);
  auto& layers = dynamic_cast<faiss::Index2Layer&>(*outer.index);
  auto& coarse = dynamic_cast<faiss::MultiIndexQuantizer&>(*layers.q1.quantizer);
  faiss::RandomRotationMatrix rotation(kHeadDim, kHeadDim);
  rotation.init(1);
  auto& opq = dynamic_cast<faiss::LinearTransform&>(*outer.chain[0]);
  opq.A = rotation.A;
  opq.is_orthonormal = true;
  coarse.pq.centroids = RandomNumbers(coarse.pq.centroids.size(), 2);
  layers.pq.centroids = RandomNumbers(layers.pq.centroids.size(), 3);
  for (faiss::Index* part :
       {index.get(), static_cast<faiss::Index*>(&layers), static_cast<faiss::Index*>(&coarse)})
    part->is_trained = true;
  opq.is_trained = true;
  return index;
}

int Run(const std::string& out) {
  omp_set_num_threads(1);
  BenchReport report("codec");
  const std::vector<float> x = RandomNumbers(kVectors * kHeadDim, 4);
  std::vector<float> y(x.size());
  const double megabytes = static_cast<double>(x.size()) * 4 / 1e6;

  for (const CodecId id : {CodecId::kF32, CodecId::kBF16, CodecId::kInt8}) {
    const auto codec = MakeCodec(id, kHeadDim).value();
    std::vector<uint8_t> bytes(kVectors * codec->bytes_per_vector());
    const std::string name(CodecName(id));
    report.Add(name + "_encode_mb_per_s",
               megabytes / Seconds([&] { (void)codec->Encode(x, bytes); }), "MB/s of f32");
    report.Add(name + "_decode_mb_per_s",
               megabytes / Seconds([&] { (void)codec->Decode(bytes, y); }), "MB/s of f32");
  }

  const std::unique_ptr<faiss::Index> index = StandardIndex();
  const VqCodebook codebook = CodebookFromFaiss(*index).value();
  const vq::Kernels* kernels[3];
  const int available = vq::AvailableKernels(kernels);
  double ours = 0;
  for (int i = available - 1; i >= 0; --i) {
    const auto codec = VqCodec::Create(codebook, Hash256{}, *kernels[i]).value();
    std::vector<uint8_t> bytes(kVectors * codec->bytes_per_vector());
    ours = Seconds([&] { (void)codec->Encode(x, bytes); }) / kVectors;
    const double decode = Seconds([&] { (void)codec->Decode(bytes, y); }) / kVectors;
    const std::string suffix = i == 0 ? "" : std::string("_") + kernels[i]->name;
    report.Add("vq_encode_us" + suffix, ours * 1e6, "us/vector");
    report.Add("vq_decode_us" + suffix, decode * 1e6, "us/vector");
  }
  constexpr int64_t kFaissVectors = 512;
  std::vector<uint8_t> theirs(kFaissVectors * index->sa_code_size());
  const double faiss_seconds =
      Seconds([&] { index->sa_encode(kFaissVectors, x.data(), theirs.data()); }) / kFaissVectors;
  report.Add("vq_encode_us_faiss", faiss_seconds * 1e6, "us/vector");
  report.Add("vq_encode_speedup_over_faiss", faiss_seconds / ours, "x", ">= 5");
  report.Add("vq_encode_memories_per_s", 1 / (ours * kVectors), "memories/s");

  const std::string blob(int64_t{16} << 20, 'x');
  uint32_t crc = 0;
  report.Add("crc32c_gb_per_s", blob.size() / 1e9 / Seconds([&] { crc ^= Crc32c(blob); }), "GB/s");
  report.Add("sha256_gb_per_s", blob.size() / 1e9 / Seconds([&] { (void)Sha256Of(blob); }), "GB/s");
  report.Note(std::string("one core; vq kernels: ") + kernels[0]->name);
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) {
  std::string out = "build/bench";
  if (argc == 3 && std::string(argv[1]) == "--out") {
    out = argv[2];
  } else if (argc != 1) {
    std::fprintf(stderr, "usage: codec [--out DIR]\n");
    return 2;
  }
  return memory3::Run(out);
}
