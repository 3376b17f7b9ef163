// inference_load: 1 to 64 clients, each with one request at a time (128 tokens in, 32 out, with
// memories over gRPC), on the engine in this process: throughput, time to the first token (TTFT)
// and between tokens (ITL).
//
//   engine_overhead   share of the steps' time that is spent outside the model, over all settings
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/inference_world.h"
#include "bench/report.h"

namespace memory3 {
namespace {

constexpr int kIn = 128, kOut = 32;
constexpr int kClients[] = {1, 8, 32, 64};

double Quantile(std::vector<double> v, double q) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  return v[std::min(v.size() - 1, static_cast<size_t>(q * static_cast<double>(v.size())))];
}

int Main(int argc, char** argv) {
  CLI::App app("The engine under load");
  std::string out = "build/bench", codec = "int8";
  int requests = 1, most_clients = 64;
  InferenceWorldOptions options;
  options.batch = 64;
  options.kv_pages = 64 * 12;
  options.memory_slots = 704;
  app.add_option("--out", out, "where inference_load.json goes");
  app.add_option("--requests", requests, "of each client; at least 4 in all")
      ->check(CLI::PositiveNumber);
  app.add_option("--most_clients", most_clients, "leave out settings with more clients");
  app.add_option("--directory", options.directory, "where model and knowledge base are kept");
  app.add_option("--references", options.references, "in the knowledge base");
  app.add_option("--codec", codec, "f32, bf16 or int8");
  app.add_option("--weights", options.weights, "bf16 or int8");
  app.add_option("--slice_tokens", options.slice_tokens, "prompt tokens of one step");
  CLI11_PARSE(app, argc, argv);
  options.codec = Must(ParseCodecId(codec));
  const std::unique_ptr<InferenceWorld> world = InferenceWorld::Create(options);
  if (world == nullptr) return 0;
  BenchReport report("inference_load");
  absl::Duration busy, in_model;
  int number = 0;
  const auto run = [&](int clients, bool counts) {
    const int each = std::max(requests, 4 / clients);
    std::vector<std::vector<std::shared_ptr<TimingSink>>> sinks(clients);
    const EngineStats before = world->engine().stats();
    const absl::Time start = absl::Now();
    std::vector<std::thread> threads;
    threads.reserve(clients);
    for (int c = 0; c < clients; ++c) {
      threads.emplace_back([&, c, first = number + c * each] {
        for (int i = 0; i < each; ++i) {
          EngineRequest request;
          request.prompt = world->Prompt(first + i, kIn);
          request.max_new_tokens = kOut;
          request.memory.base = world->base();
          sinks[c].push_back(std::make_shared<TimingSink>());
          Must(world->engine().Submit(std::move(request), sinks[c].back()).status());
          sinks[c].back()->Wait();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
    number += clients * each;
    if (!counts) return;
    const EngineStats after = world->engine().stats();
    busy += after.busy - before.busy;
    in_model += after.in_model - before.in_model;
    std::vector<double> first, between;
    for (const auto& of_client : sinks) {
      for (const auto& sink : of_client) {
        first.push_back(sink->tokens.at(0));
        for (size_t i = 1; i < sink->tokens.size(); ++i)
          between.push_back(sink->tokens[i] - sink->tokens[i - 1]);
      }
    }
    const std::string suffix = absl::StrCat("_", clients);
    report.Add("tokens_per_s" + suffix, clients * each * kOut / seconds, "tokens/s out");
    report.Add("ttft_p50_ms" + suffix, 1e3 * Quantile(first, 0.5), "ms");
    report.Add("ttft_p99_ms" + suffix, 1e3 * Quantile(first, 0.99), "ms");
    report.Add("itl_p50_ms" + suffix, 1e3 * Quantile(between, 0.5), "ms");
    report.Add("itl_p99_ms" + suffix, 1e3 * Quantile(between, 0.99), "ms");
  };
  run(2, /*counts=*/false);
  for (const int clients : kClients) {
    if (clients <= most_clients) run(clients, /*counts=*/true);
  }
  report.Add("engine_overhead", 1 - absl::FDivDuration(in_model, busy), "", "<= 0.05");
  report.Note(world->description());
  report.Note(absl::StrCat(kIn, " in, ", kOut, " out, five memories a chunk, slices of ",
                           options.slice_tokens, " tokens"));
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
