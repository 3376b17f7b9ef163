// How much of the writer's forward pass is left when memories are not only computed but selected,
// compressed and uploaded to a real memory server: references a second of the whole pipeline
// (trainer/memory_writing.h) over those of the forward pass alone, through the memory layers, on
// the same references in the same batches. TinyLlama-1.1B's geometry with random weights in bf16,
// records in vq (a codebook of the standard size, random) and bf16; models/tiny where it is there.
//
//   writer [--out DIR] [--references N] [--rounds N]
//
// The forward pass alone stops where the writer's does: the last memory layer gives keys and values
// and goes no further. Rounds alternate between it and the pipeline; a number is the median.
// Needs the shared data ($MEMORY3_DATA, default ../shared/data) for real text and a tokenizer of
// 32,000 tokens.
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/random_llama.h"
#include "bench/report.h"
#include "memory/vq_codebook.h"
#include "memory_server/client.h"
#include "nlohmann/json.hpp"
#include "tests/child_process.h"
#include "trainer/memory_writing.h"
#include "trainer/references.h"
#include "transformer/block.h"
#include "transformer/json.h"
#include "transformer/prefix_kv.h"

namespace memory3 {
namespace {

using Clock = std::chrono::steady_clock;
using Phase = MemoryWritingProgress::Phase;

constexpr int kRows = 2048;

void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "writer: %s\n", std::string(status.message()).c_str());
  std::exit(1);
}
template <typename T>
T Must(absl::StatusOr<T> value) {
  Must(value.status());
  return *std::move(value);
}

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}
double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// A codebook of the standard size: what its numbers are does not change what encoding costs.
std::string RandomCodebook(int head_dim) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  VqCodebook book;
  book.head_dim = head_dim;
  book.coarse_bits = 14;
  book.fine_bits = 10;
  book.rotation.assign(int64_t{head_dim} * head_dim, 0);
  for (int i = 0; i < head_dim; ++i) book.rotation[i * head_dim + (i * 7 + 3) % head_dim] = 1;
  book.coarse.resize(2 * book.coarse_rows() * head_dim / 2);
  book.fine.resize(8 * book.fine_rows() * head_dim / 8);
  for (float& x : book.coarse) x = normal(random);
  for (float& x : book.fine) x = 0.1f * normal(random);
  return Must(SerializeCodebook(book));
}

// Real text for `count` references, as a file of documents.
struct Input {
  std::string path;
  std::vector<std::vector<int32_t>> references;
};
Input MakeInput(const std::string& from, const std::string& to, const WritingModel& model,
                size_t count) {
  Input input{to, {}};
  std::ofstream out(to);
  const auto reader = Must(DocumentReader::Open({from}));
  Document document;
  while (input.references.size() < count && Must(reader->Next(&document))) {
    auto references = Must(CutReferences(document.title, document.text, model.tokenizer(),
                                         model.memory().reference_tokens));
    // A document's end depends on nothing behind it.
    references.resize(std::min(references.size(), count - input.references.size()));
    const nlohmann::json line = {{"id", document.id},
                                 {"title", document.title},
                                 {"text", document.text.substr(0, references.back().end)}};
    out << line.dump() << "\n";
    for (CutReference& r : references) input.references.push_back(std::move(r.token_ids));
  }
  return input;
}

// The forward pass of batches of references as MemoryWriter runs it, and nothing else.
class ForwardOnly {
 public:
  explicit ForwardOnly(const WritingModel& model)
      : model_(model.writer()->model()),
        memory_(model.memory()),
        prefix_(Must(PrefixKv::Create(model_, memory_.prefix_token_ids, DType::kF32))),
        activations_(Must(ActivationBuffers::Create(model_, kRows))) {}

  double Seconds(std::span<const std::vector<int32_t>> references) {
    const Clock::time_point begin = Clock::now();
    while (!references.empty()) {
      size_t n = 0, rows = 0;
      while (n < references.size() && rows + references[n].size() <= kRows) {
        rows += references[n++].size();
      }
      Batch(references.first(n), static_cast<int>(rows));
      references = references.subspan(n);
    }
    return SecondsSince(begin);
  }

 private:
  void Batch(std::span<const std::vector<int32_t>> references, int rows) {
    Device& device = model_.device();
    const ModelConfig& c = model_.config();
    const LayerActivations a = activations_.View(rows);
    BatchInput input;
    AttentionPlan& plan = input.attention;
    plan.sources = {prefix_->source(), LiveKvSource(c, a.qkv)};
    plan.blocks.push_back(prefix_->Block(0));
    for (const std::vector<int32_t>& ids : references) {
      const int row = static_cast<int>(input.token_ids.size());
      const int tokens = static_cast<int>(ids.size());
      for (int j = 0; j < tokens; ++j) {
        input.token_ids.push_back(ids[j]);
        input.positions.push_back(prefix_->tokens() + j);
      }
      const int begin = static_cast<int>(plan.block_ids.size());
      plan.block_ids.insert(plan.block_ids.end(), {0, static_cast<int>(plan.blocks.size())});
      plan.blocks.push_back({1, KeyOf(c, a.qkv).Rows(row, tokens).data, nullptr, tokens, 0});
      plan.segments.push_back({row, tokens, 0, begin, begin + 2});
    }
    const PreparedBatch* batch = device.Prepare(input, 0);
    const int last = memory_.memory_layers.back();
    device.Run(0, [&] {
      device.Embed(a.x, *batch, model_.weights().embedding);
      for (int layer = 0; layer <= last; ++layer) {
        BlockQkv(model_, layer, a);
        BlockRope(model_, *batch, a);
        if (layer == last) break;
        const int source_layer[] = {layer, 0};
        BlockAttention(model_, layer, *batch, {source_layer, -1}, a);
        BlockMlp(model_, layer, a);
      }
    });
    Must(device.Synchronize());
  }

  const Model& model_;
  const ExplicitMemoryConfig& memory_;
  const std::shared_ptr<const PrefixKv> prefix_;
  ActivationBuffers activations_;
};

class WriterBench {
 public:
  WriterBench(std::string directory, BenchReport& report)
      : directory_(std::move(directory)),
        report_(report),
        server_("memory_server", {"--data", directory_ + "/store", "--listen", "127.0.0.1:0"}),
        embedder_(Must(MakeEmbedder("lexical"))) {
    const std::optional<std::string> port = server_.WaitForLine(R"(gRPC on port (\d+))");
    if (!port) Must(absl::UnavailableError("no memory server: " + server_.output()));
    client_ = Must(MemoryClient::Create({.target = "127.0.0.1:" + *port}));
  }

  // The worse of the two codecs' ratios.
  double Run(const std::string& name, const WritingModel& model, const Input& input, int rounds) {
    ForwardOnly forward(model);
    forward.Seconds(
        std::span(input.references).first(std::min<size_t>(16, input.references.size())));
    const auto n = static_cast<double>(input.references.size());
    std::vector<double> forwards;
    std::vector<double> whole[2];
    const CodecId codecs[] = {CodecId::kVq, CodecId::kBF16};
    for (int round = 0; round < rounds; ++round) {
      forwards.push_back(forward.Seconds(input.references));
      for (int c = 0; c < 2; ++c) {
        whole[c].push_back(Write(absl::StrCat(name, std::string(CodecName(codecs[c])), "-", round),
                                 model, input, codecs[c]));
        forwards.push_back(forward.Seconds(input.references));
      }
    }
    const double alone = Median(forwards);
    report_.Add(name + "forward_references_per_s", n / alone, "references/s");
    double worst = 1e9;
    for (int c = 0; c < 2; ++c) {
      const std::string codec(CodecName(codecs[c]));
      const double seconds = Median(whole[c]);
      report_.Add(absl::StrCat(name, codec, "_references_per_s"), n / seconds, "references/s");
      report_.Add(absl::StrCat(name, codec, "_vs_forward"), alone / seconds, "");
      worst = std::min(worst, alone / seconds);
    }
    return worst;
  }

 private:
  // Seconds from the call to the acknowledgement of the last entry; without the building of the
  // index.
  double Write(const std::string& knowledge_base, const WritingModel& model, const Input& input,
               CodecId codec) {
    MemoryWritingOptions options;
    options.inputs = {input.path};
    options.knowledge_base = knowledge_base;
    options.codec = codec;
    // A part of records' ids, so that the store holds none of this run's from the one before.
    options.tenant = knowledge_base;
    if (codec == CodecId::kVq) options.codebook = RandomCodebook(model.config().head_dim);
    options.threads = static_cast<int>(std::thread::hardware_concurrency());
    options.rows = kRows;
    const Clock::time_point begin = Clock::now();
    double seconds = 0;
    const auto result = Must(WriteMemories(options, model, *embedder_, client_.get(),
                                           [&](const MemoryWritingProgress& p) {
                                             if (p.phase == Phase::kWriting) seconds = 0;
                                             if (p.phase >= Phase::kIndexing && seconds == 0) {
                                               seconds = SecondsSince(begin);
                                             }
                                           }));
    if (result.progress.encoded + result.progress.counts.in_run !=
        static_cast<int64_t>(input.references.size())) {
      Must(absl::InternalError(absl::StrCat(result.progress.encoded, " references were encoded of ",
                                            input.references.size())));
    }
    return seconds;
  }

  const std::string directory_;
  BenchReport& report_;
  ChildProcess server_;
  std::unique_ptr<Embedder> embedder_;
  std::unique_ptr<MemoryClient> client_;
};

int Main(const std::string& out, size_t references, int rounds) {
  BenchReport report("writer");
  const char* env = std::getenv("MEMORY3_DATA");
  const std::string data = env != nullptr ? env : "../shared/data";
  const std::string text = data + "/kb/factbook.jsonl.zst";
  const std::string tokenizer = data + "/fixtures/tokenizers/llama2.model";
  if (!std::filesystem::exists(text) || !std::filesystem::exists(tokenizer)) {
    std::printf("writer: skipped: no shared data at %s (MEMORY3_DATA)\n", data.c_str());
    return 0;
  }
  std::string directory = std::filesystem::temp_directory_path() / "memory3-writer-XXXXXX";
  if (mkdtemp(directory.data()) == nullptr) Must(absl::UnavailableError("no temporary directory"));
  {
    WriterBench bench(directory, report);
    const auto device = Must(MakeCpuDevice({}));
    {
      const auto model = WritingModel::Of(
          TinyLlama(), std::make_unique<TableWeights>(),
          Must(MakeSentencePieceTokenizer(Must(ReadSmallFile(tokenizer, 1 << 24)), tokenizer)),
          Sha256Of("random TinyLlama"));
      Must(model->LoadWriter(device.get(), WeightFormat::kBF16, kRows));
      const Input input = MakeInput(text, directory + "/tinyllama.jsonl", *model, references);
      report.Add("end_to_end_vs_forward", bench.Run("", *model, input, rounds), "", ">= 0.85");
    }
    if (const auto tiny = DefaultModelDirectory("tiny"); tiny.ok()) {
      const auto model = Must(WritingModel::Open(*tiny));
      Must(model->LoadWriter(device.get(), WeightFormat::kF32, kRows));
      const Input input = MakeInput(text, directory + "/tiny.jsonl", *model, 20 * references);
      report.Add("tiny_end_to_end_vs_forward", bench.Run("tiny_", *model, input, rounds), "");
    } else {
      report.Note("models/tiny is not here; left out");
    }
  }
  std::filesystem::remove_all(directory);
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) {
  std::string out = "build/bench";
  size_t references = 96;
  int rounds = 2;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--out" && i + 1 < argc) {
      out = argv[++i];
    } else if (flag == "--references" && i + 1 < argc) {
      references = std::strtoul(argv[++i], nullptr, 10);
    } else if (flag == "--rounds" && i + 1 < argc) {
      rounds = std::atoi(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: writer [--out DIR] [--references N] [--rounds N]\n");
      return 2;
    }
  }
  return memory3::Main(out, references, rounds);
}
