// memory_server_recall: recall@5 of the large index at its default settings against exact search,
// on `lexical` vectors of Wikipedia references (1,024 dimensions) and on a random projection of
// them to 384 dense ones. Queries: 64-token chunks, cut across the references (the second half of
// one and the first of the next), as a reader of the text would ask.
//   memory_server_recall [--references 30000] [--queries 400] [--out DIR]
// Reads MEMORY3_DATA (default ../shared/data); without it says so and ends well.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "bench/report.h"
#include "embedder/embedder.h"
#include "memory_server/base_index.h"
#include "memory_server/dot.h"
#include "memory_server/message.h"
#include "trainer/documents.h"

namespace memory3 {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kReferenceChars = 512;  // about 128 tokens
constexpr size_t kDepth = 5;
constexpr int kProjected = 384;

template <typename T>
T Must(absl::StatusOr<T> v) {
  if (v.ok()) return *std::move(v);
  std::cerr << v.status() << "\n";
  std::exit(1);
}

// Cuts at the space after kReferenceChars.
std::vector<std::string> Cut(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find(' ', std::min(text.size(), at + kReferenceChars));
    end = std::min(end, text.size());
    parts.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

void Measure(const std::string& name, int dimension, const std::vector<float>& vectors,
             const std::vector<float>& queries, BenchReport* report) {
  const size_t n = vectors.size() / dimension, m = queries.size() / dimension;
  BaseIndex::BuildInput input;
  input.dimension = dimension;
  input.normalised = true;
  std::vector<size_t> row(n);  // of each slot
  for (size_t i = 0; i < n; ++i) {
    SlotKey key;
    key.record_id = Sha256Of(std::to_string(i));
    input.keys.push_back(key);
    row[i] = i;
  }
  std::sort(row.begin(), row.end(),
            [&](size_t a, size_t b) { return input.keys[a] < input.keys[b]; });
  std::sort(input.keys.begin(), input.keys.end());
  input.scan = [&](std::span<const SlotKey>,
                   const std::function<bool(size_t, const float*)>& each) {
    for (size_t s = 0; s < n && each(s, &vectors[row[s] * dimension]); ++s) {
    }
    return absl::OkStatus();
  };
  Clock::time_point start = Clock::now();
  std::shared_ptr<const BaseIndex> index = Must(BaseIndex::Build(std::move(input)));
  report->Add(name + "_build_s", std::chrono::duration<double>(Clock::now() - start).count(), "s");

  size_t found = 0, wanted = 0;
  double search = 0, exact = 0;
  for (size_t q = 0; q < m; ++q) {
    const float* query = &queries[q * dimension];
    start = Clock::now();
    std::vector<float> scores(n);
    DotRows(query, vectors.data(), static_cast<int64_t>(n), dimension, scores.data());
    std::vector<float> best = scores;
    std::nth_element(best.begin(), best.begin() + kDepth - 1, best.end(), std::greater<>());
    const float least = best[kDepth - 1];
    exact += std::chrono::duration<double>(Clock::now() - start).count();

    // As the store does: candidates, then exact scores.
    start = Clock::now();
    std::vector<ScoredSlot> candidates;
    index->Search(query, 4 * kDepth + 64, nullptr, &candidates);
    std::vector<float> rescored;
    rescored.reserve(candidates.size());
    for (const ScoredSlot& c : candidates) {
      rescored.push_back(Dot(query, &vectors[row[c.slot] * dimension], dimension));
    }
    std::sort(rescored.begin(), rescored.end(), std::greater<>());
    search += std::chrono::duration<double>(Clock::now() - start).count();
    wanted += kDepth;
    for (size_t i = 0; i < std::min(kDepth, rescored.size()); ++i) found += rescored[i] >= least;
  }
  report->Add(name + "_recall_at_5", static_cast<double>(found) / static_cast<double>(wanted), "",
              ">= 0.99");
  report->Add(name + "_search_ms", 1e3 * search / static_cast<double>(m), "ms");
  report->Add(name + "_exact_ms", 1e3 * exact / static_cast<double>(m), "ms");
  report->Add(name + "_index_mb", static_cast<double>(index->memory_bytes()) / 1e6, "MB");
  report->Note(Message(name, ": ", n, " vectors, ", m, " queries, index ", index->description()));
}

int Main(int argc, char** argv) {
  size_t references = 30000, questions = 400;
  std::string out = "build/bench";
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--references") references = std::strtoull(argv[i + 1], nullptr, 10);
    if (flag == "--queries") questions = std::strtoull(argv[i + 1], nullptr, 10);
    if (flag == "--out") out = argv[i + 1];
  }
  const char* set = std::getenv("MEMORY3_DATA");
  const std::string data = set != nullptr ? set : "../shared/data";
  std::vector<std::string> paths;
  for (int shard = 0; shard < 8; ++shard) {
    std::string path = Message(data, "/enwiki/articles-", shard, ".jsonl.zst");
    if (std::filesystem::exists(path)) paths.push_back(path);
  }
  if (paths.empty()) {
    std::cout << "memory_server_recall: no articles in " << data << "/enwiki; nothing measured\n";
    return 0;
  }
  std::unique_ptr<DocumentReader> reader = Must(DocumentReader::Open(paths));
  std::vector<std::string> texts;
  std::vector<std::string> asked;
  Document document;
  while (texts.size() < references && Must(reader->Next(&document))) {
    std::vector<std::string> parts = Cut(document.text);
    for (size_t p = 0; p < parts.size() && texts.size() < references; ++p) {
      if (p > 0 && texts.size() % std::max<size_t>(1, references / questions) == 0) {
        asked.push_back(parts[p - 1].substr(parts[p - 1].size() * 3 / 4) + " " +
                        parts[p].substr(0, parts[p].size() / 4));
      }
      texts.push_back(std::move(parts[p]));
    }
  }
  std::unique_ptr<Embedder> embedder = Must(MakeEmbedder("lexical"));
  auto embed = [&](const std::vector<std::string>& strings) {
    std::vector<std::string_view> views(strings.begin(), strings.end());
    std::vector<float> v(views.size() * embedder->dimension());
    if (absl::Status s = embedder->Embed(views, std::span<float>(v)); !s.ok()) {
      std::cerr << s << "\n";
      std::exit(1);
    }
    return v;
  };
  const std::vector<float> vectors = embed(texts), queries = embed(asked);
  const int dimension = embedder->dimension();

  BenchReport report("memory_server_recall");
  Measure("lexical", dimension, vectors, queries, &report);

  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> projection(static_cast<size_t>(kProjected) * dimension);
  for (float& p : projection) p = normal(random);
  auto project = [&](const std::vector<float>& v) {
    std::vector<float> to(v.size() / dimension * kProjected);
    for (size_t i = 0; i < v.size() / dimension; ++i) {
      float* row = &to[i * kProjected];
      DotRows(&v[i * dimension], projection.data(), kProjected, dimension, row);
      const float length = std::sqrt(Dot(row, row, kProjected));
      for (int d = 0; d < kProjected; ++d) row[d] /= std::max(length, 1e-20f);
    }
    return to;
  };
  Measure("dense384", kProjected, project(vectors), project(queries), &report);
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
