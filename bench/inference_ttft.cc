// inference_ttft: the time to the first token of a question of 64 tokens, cold, with five
// references as memories (found, fetched over gRPC, checked, decoded, none cached) and with five
// references of 128 tokens each as text before the question.
//
//   text_over_memory   time to the first token with text over that with memories: the median
//
// The memories have the model's sparse geometry: 8 of 128 tokens a KV head, in 11 of 22 layers.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/inference_world.h"
#include "bench/report.h"

namespace memory3 {
namespace {

constexpr int kQuestion = 64, kReference = 128, kReferences = 5;

// Seconds to the first token.
double FirstToken(InferenceWorld& world, std::vector<int32_t> prompt, bool memory) {
  EngineRequest request;
  request.prompt = std::move(prompt);
  request.max_new_tokens = 1;
  if (memory) request.memory.base = world.base();
  request.memory.references_per_chunk = kReferences;
  const auto sink = std::make_shared<TimingSink>();
  Must(world.engine().Submit(std::move(request), sink).status());
  sink->Wait();
  if (memory && sink->memories != kReferences)
    Must(absl::InternalError(absl::StrCat(sink->memories, " memories were read")));
  return sink->tokens.at(0);
}

int Main(int argc, char** argv) {
  CLI::App app("Time to the first token: five references as memories or as text");
  std::string out = "build/bench", codec = "int8";
  int rounds = 7;
  InferenceWorldOptions options;
  options.batch = 4;
  options.kv_pages = 128;
  options.max_rows = 1024;
  options.slice_tokens = 1024;
  options.memory_slots = 64;
  app.add_option("--out", out, "where inference_ttft.json goes");
  app.add_option("--rounds", rounds, "counted rounds")->check(CLI::PositiveNumber);
  app.add_option("--directory", options.directory, "where model and knowledge base are kept");
  app.add_option("--references", options.references, "in the knowledge base");
  app.add_option("--codec", codec, "f32, bf16 or int8");
  app.add_option("--weights", options.weights, "bf16 or int8");
  CLI11_PARSE(app, argc, argv);
  options.codec = Must(ParseCodecId(codec));
  const std::unique_ptr<InferenceWorld> world = InferenceWorld::Create(options);
  if (world == nullptr) return 0;
  std::vector<double> memory, text, bare, ratios;
  for (int r = 0; r <= rounds; ++r) {
    const std::vector<int32_t> question = world->Prompt(2 * r, kQuestion);
    std::vector<int32_t> with_text;
    for (int i = 0; i < kReferences; ++i) {
      // A reference shorter than 128 tokens goes on with the next one's text.
      std::vector<int32_t> ids;
      for (size_t j = r * 2 * kReferences + 2 * i; static_cast<int>(ids.size()) < kReference; ++j) {
        const std::vector<int32_t> more = world->tokenizer().Encode(world->references().at(j));
        ids.insert(ids.end(), more.begin(), more.end());
      }
      with_text.insert(with_text.end(), ids.begin(), ids.begin() + kReference);
    }
    with_text.insert(with_text.end(), question.begin(), question.end());
    const double m = FirstToken(*world, question, true);
    const double t = FirstToken(*world, std::move(with_text), false);
    const double b = FirstToken(*world, question, false);
    std::cout << "round " << r << ": memories " << m << " s, text " << t << " s, question alone "
              << b << " s" << std::endl;
    if (r == 0) continue;
    memory.push_back(m);
    text.push_back(t);
    bare.push_back(b);
    ratios.push_back(t / m);
  }
  BenchReport report("inference_ttft");
  report.Add("text_over_memory", Median(ratios), "", ">= 8");
  report.Add("ttft_memory_ms", 1e3 * Median(memory), "ms");
  report.Add("ttft_text_ms", 1e3 * Median(text), "ms");
  report.Add("ttft_question_alone_ms", 1e3 * Median(bare), "ms");
  report.Add("text_over_question_alone", Median(text) / Median(bare), "", "what is possible");
  report.Note(world->description());
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
