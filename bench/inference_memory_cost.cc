// inference_memory_cost: the paper's measurement of what memories cost. A batch of requests of 128
// tokens in, 128 out, with memories and without, in turns; three retrievals of five a request, over
// gRPC from a memory server in another process, caches off.
//
//   with_over_without   tokens per second with memory over without: the median over the rounds
//
// Warm start: one round of each is not counted. The search is really made; what it finds that the
// round has read already is replaced by another record (one more search), so that all memories of a
// round are distinct and each one's bytes are fetched, checked, decoded and read.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "bench/inference_world.h"
#include "bench/report.h"
#include "embedder/embedder.h"

namespace memory3 {
namespace {

constexpr int kIn = 128, kOut = 128;
constexpr uint32_t kTopK = 5;

// Answers what `inner` does, with another record in the place of each that this round has had.
class DistinctBase final : public MemoryBase {
 public:
  DistinctBase(std::shared_ptr<MemoryBase> inner, const InferenceWorld* world)
      : MemoryBase(inner->tenant(), inner->name(), inner->version(), inner->codec()),
        inner_(std::move(inner)),
        world_(world) {}

  void NextRound() {
    const std::lock_guard lock(mutex_);
    seen_.clear();
  }
  int found() const { return found_; }
  int replaced() const { return replaced_; }

  void Retrieve(SourceRequest request, SourceCallback done) override {
    auto answer = std::make_shared<SourceAnswer>();
    request.part = nullptr;  // only whole answers are told: hits are replaced
    inner_->Retrieve(std::move(request),
                     [this, answer, done = std::move(done)](absl::StatusOr<SourceAnswer> got) {
                       if (!got.ok()) {
                         done(got.status());
                         return;
                       }
                       *answer = *std::move(got);
                       std::vector<SourceHit*> again;
                       {
                         const std::lock_guard lock(mutex_);
                         for (std::vector<SourceHit>& hits : answer->queries) {
                           for (SourceHit& hit : hits) {
                             ++found_;
                             if (!seen_.insert(hit.id).second) again.push_back(&hit);
                           }
                         }
                       }
                       Replace(answer, std::move(again), done);
                     });
  }
  void Evicted(const RecordId& id) override { inner_->Evicted(id); }

 private:
  void Replace(const std::shared_ptr<SourceAnswer>& answer, std::vector<SourceHit*> again,
               SourceCallback done) {
    if (again.empty()) {
      done(std::move(*answer));
      return;
    }
    SourceRequest request;
    {
      const std::lock_guard lock(mutex_);
      for (size_t i = 0; i < again.size(); ++i) {
        const std::string& text = world_->references()[next_++ % world_->references().size()];
        request.queries.push_back({Must(world_->embedder().EmbedOne(text)), 1, std::nullopt, {}});
      }
    }
    inner_->Retrieve(std::move(request),
                     [this, answer, again = std::move(again),
                      done = std::move(done)](absl::StatusOr<SourceAnswer> got) mutable {
                       if (!got.ok()) {
                         done(got.status());
                         return;
                       }
                       std::vector<SourceHit*> left;
                       {
                         const std::lock_guard lock(mutex_);
                         for (size_t i = 0; i < again.size(); ++i) {
                           SourceHit& hit = got->queries[i].at(0);
                           if (!seen_.insert(hit.id).second) {
                             left.push_back(again[i]);
                             continue;
                           }
                           ++replaced_;
                           again[i]->id = hit.id;
                         }
                       }
                       for (auto& [id, record] : got->records)
                         answer->records[id] = std::move(record);
                       Replace(answer, std::move(left), std::move(done));
                     });
  }

  const std::shared_ptr<MemoryBase> inner_;
  const InferenceWorld* const world_;
  std::mutex mutex_;  // guards what follows
  absl::flat_hash_set<RecordId> seen_;
  size_t next_ = 0;
  int found_ = 0, replaced_ = 0;
};

struct Round {
  double seconds = 0;
  double first_token = 0;         // mean over the requests
  double retrieve = 0, load = 0;  // seconds, mean
  int memories = 0;
};

Round Run(InferenceWorld& world, const InferenceWorldOptions& options,
          const std::shared_ptr<DistinctBase>& base, int number) {
  std::vector<std::shared_ptr<TimingSink>> sinks;
  const absl::Time start = absl::Now();
  for (int i = 0; i < options.batch; ++i) {
    EngineRequest request;
    request.prompt = world.Prompt(number * options.batch + i, kIn);
    request.max_new_tokens = kOut;
    request.memory.base = base;
    request.memory.references_per_chunk = kTopK;
    sinks.push_back(std::make_shared<TimingSink>());
    Must(world.engine().Submit(std::move(request), sinks.back()).status());
  }
  Round round;
  for (const auto& sink : sinks) {
    sink->Wait();
    if (sink->tokens.size() != kOut) Must(absl::InternalError("a request ended early"));
    round.first_token += sink->tokens[0] / options.batch;
    const auto seconds = [](const google::protobuf::Duration& d) {
      return static_cast<double>(d.seconds()) + d.nanos() * 1e-9;
    };
    round.retrieve += seconds(sink->finish.timings().retrieve()) / options.batch;
    round.load += seconds(sink->finish.timings().load()) / options.batch;
    round.memories += sink->memories;
  }
  round.seconds = absl::ToDoubleSeconds(absl::Now() - start);
  return round;
}

int Main(int argc, char** argv) {
  CLI::App app("What memories cost: tokens per second with and without");
  std::string out = "build/bench", codec = "int8";
  int rounds = 3;
  InferenceWorldOptions options;
  app.add_option("--out", out, "where inference_memory_cost.json goes");
  app.add_option("--rounds", rounds, "counted rounds of each")->check(CLI::PositiveNumber);
  app.add_option("--directory", options.directory, "where model and knowledge base are kept");
  app.add_option("--references", options.references, "in the knowledge base");
  app.add_option("--codec", codec, "f32, bf16 or int8");
  app.add_option("--weights", options.weights, "bf16 or int8");
  app.add_option("--memory_dtype", options.memory_dtype, "of memories on the device");
  app.add_option("--kv_dtype", options.kv_dtype, "of the KV cache");
  app.add_option("--batch", options.batch, "requests at a time");
  app.add_option("--slice_tokens", options.slice_tokens, "prompt tokens of one step");
  app.add_option("--reader_threads", options.reader_threads, "that embed and decode");
  app.add_option("--also_embed", options.also_embed,
                 "BERT directory that embeds every query too, as all-MiniLM-L6-v2");
  CLI11_PARSE(app, argc, argv);
  options.codec = Must(ParseCodecId(codec));
  const std::unique_ptr<InferenceWorld> world = InferenceWorld::Create(options);
  if (world == nullptr) return 0;
  const auto base = std::make_shared<DistinctBase>(world->base(), world.get());
  std::vector<double> ratios, with_rate, without_rate, retrieve, load, wait_with, wait_without;
  for (int r = 0; r <= rounds; ++r) {
    const Round without = Run(*world, options, nullptr, r);
    base->NextRound();
    const Round with = Run(*world, options, base, r);
    const int expected = options.batch * 3 * static_cast<int>(kTopK);
    if (with.memories != expected) {
      Must(absl::InternalError(absl::StrCat(with.memories, " memories were read, not ", expected)));
    }
    std::cout << "round " << r << ": without " << without.seconds << " s, with " << with.seconds
              << " s, first token " << without.first_token << " / " << with.first_token
              << " s, retrieve " << with.retrieve << " s, load " << with.load << " s" << std::endl;
    if (r == 0) continue;
    const double tokens = options.batch * kOut;
    ratios.push_back(without.seconds / with.seconds);
    with_rate.push_back(tokens / with.seconds);
    without_rate.push_back(tokens / without.seconds);
    retrieve.push_back(with.retrieve);
    load.push_back(with.load);
    wait_with.push_back(with.first_token);
    wait_without.push_back(without.first_token);
  }
  BenchReport report("inference_memory_cost");
  report.Add("with_over_without", Median(ratios), "", ">= 0.95 (the paper: 0.65)");
  report.Add("tokens_per_s_with", Median(with_rate), "tokens/s");
  report.Add("tokens_per_s_without", Median(without_rate), "tokens/s");
  report.Add("ttft_with_s", Median(wait_with), "s, mean of the batch");
  report.Add("ttft_without_s", Median(wait_without), "s, mean of the batch");
  report.Add("retrieve_waited_s", Median(retrieve), "s a request");
  report.Add("load_s", Median(load), "s a request");
  report.Note(world->description());
  report.Note(absl::StrCat("batch ", options.batch, ", ", kIn, " in, ", kOut, " out, ", rounds,
                           " rounds; ", base->found(), " memories found, ", base->replaced(),
                           " replaced to be distinct"));
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
