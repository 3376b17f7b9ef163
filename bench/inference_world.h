// What the inference benchmarks share: a model of TinyLlama-1.1B's geometry with random weights, a
// knowledge base of Wikipedia references with a random memory each, kept in a directory from run to
// run, and the memory server's process.
//
// A memory is 11 layers, 4 KV heads, 8 of 128 tokens, 64 numbers (45,056 numbers; in int8 47,872
// bytes of payload, every record's its own). The texts are real and embedded by `lexical`, so that
// searches cost what they cost; what the numbers of a memory are changes no time.
//
// Thread-safety: one thread. Reads MEMORY3_DATA (default ../shared/data); errors end the process.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "embedder/embedder.h"
#include "inference_server/engine.h"
#include "inference_server/remote_memory_source.h"
#include "memory/codec.h"
#include "tests/child_process.h"
#include "transformer/decoder.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// What a benchmark cannot go on without.
inline void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "bench: %s\n", status.ToString().c_str());
  std::exit(1);
}
template <typename T>
T Must(absl::StatusOr<T> value) {
  Must(value.status());
  return *std::move(value);
}

// Of an even number the mean of the middle two.
inline double Median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
}

struct InferenceWorldOptions {
  std::string directory = "build/bench/inference";  // 2.2 GB of model, 5 GB of knowledge base
  uint64_t references = 100'000;
  CodecId codec = CodecId::kInt8;
  std::string weights = "bf16";       // bf16, int8
  std::string memory_dtype = "bf16";  // of memories on the device: f32, bf16
  std::string kv_dtype = "f32";
  int batch = 32;
  int max_rows = 512;
  int slice_tokens = 512;
  int memory_slots = 512;
  int kv_pages = 0;  // default: of `batch` sequences of 17 pages, and 64
  int64_t host_cache_bytes = 0;
  int reader_threads = 1;
  // A BERT directory that every query is embedded by as well, its vector not used: what a neural
  // embedder costs, without a knowledge base of its own.
  std::string also_embed;
};

class InferenceWorld {
 public:
  // Null: the articles are not here, and it says so.
  static std::unique_ptr<InferenceWorld> Create(const InferenceWorldOptions& options);
  ~InferenceWorld();

  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const Embedder& embedder() const { return *embedder_; }
  Engine& engine() { return *engine_; }
  MemoryReader& reader() { return *reader_; }
  const std::string& model_directory() const { return model_directory_; }
  const std::string& memory_target() const { return memory_target_; }
  // The knowledge base, as a reader of the memory server has it.
  std::shared_ptr<MemoryBase> base() const { return base_; }
  // Of the knowledge base: the first few thousand, in order.
  const std::vector<std::string>& references() const { return references_; }
  // `tokens` ids of an article that is in no knowledge base; another one for another number.
  std::vector<int32_t> Prompt(int number, int tokens) const;
  std::string description() const;

 private:
  InferenceWorld() = default;
  void MakeModel(const std::string& tokenizer_file);
  void MakeKnowledgeBase(const std::vector<std::string>& articles);

  InferenceWorldOptions options_;
  std::string model_directory_, base_directory_, memory_target_, index_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Embedder> embedder_;
  std::unique_ptr<Embedder> query_embedder_;  // the reader's, where it is another
  std::vector<std::string> references_, others_;
  std::optional<ChildProcess> server_;
  std::unique_ptr<RemoteMemorySource> source_;
  std::shared_ptr<MemoryBase> base_;
  std::unique_ptr<MemoryReader> reader_;
  std::unique_ptr<Engine> engine_;
};

// Seconds from the submission of a request, as its client saw them.
class TimingSink final : public EventSink {
 public:
  TimingSink() : start_(absl::Now()) {}
  void Send(v1::GenerateResponse event) override;
  void Scored(ContinuationScore) override {}
  void End(absl::Status status) override;
  // Waits for the end.
  void Wait();

  // After Wait.
  std::vector<double> tokens;  // when each came
  double end = 0;
  v1::Finish finish;
  int memories = 0;

 private:
  const absl::Time start_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
  absl::Status status_;
};

}  // namespace memory3
