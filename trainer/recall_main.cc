// embedder_recall: recall@k of an embedder and of exact BM25 over one store
// (trainer/retrieval_recall.h).
#include <cstdio>
#include <iostream>

#include "CLI/CLI.hpp"
#include "embedder/embedder.h"
#include "nlohmann/json.hpp"
#include "trainer/retrieval_recall.h"

int main(int argc, char** argv) {
  CLI::App app("Measures how often retrieval finds the passage that answers a question.");
  std::string questions, spec = "lexical";
  std::vector<std::string> articles;
  memory3::RetrievalSetOptions options;
  int k = 5, threads = 0;
  bool json = false;
  app.add_option("--questions", questions, "A .jsonl with `question` and `passage`")->required();
  app.add_option("--articles", articles, "Where the other references come from")->required();
  app.add_option("--embedder", spec, "lexical, lexical:DIR or bert:DIR")->capture_default_str();
  app.add_option("--others", options.other_references, "Number of other references")
      ->capture_default_str();
  app.add_option("--max-questions", options.max_questions);
  app.add_option("--modulus", options.modulus,
                 "Others from articles with id % modulus == remainder")
      ->capture_default_str();
  app.add_option("--remainder", options.remainder)->capture_default_str();
  app.add_option("-k,--top", k)->capture_default_str();
  app.add_option("--threads", threads)->capture_default_str();
  app.add_flag("--json", json);
  CLI11_PARSE(app, argc, argv);

  const auto fail = [](const absl::Status& status) {
    std::cerr << "embedder_recall: " << status.message() << "\n";
    return 1;
  };
  auto embedder = memory3::MakeEmbedder(spec, {.threads = threads});
  if (!embedder.ok()) return fail(embedder.status());
  auto set = memory3::LoadRetrievalSet(questions, articles, options);
  if (!set.ok()) return fail(set.status());
  auto recall = memory3::EmbedderRecall(*set, k, **embedder);
  if (!recall.ok()) return fail(recall.status());
  const double bm25_12 = memory3::Bm25Recall(*set, k, 1.2, 0.75);
  const double bm25_15 = memory3::Bm25Recall(*set, k, 1.5, 0.75);
  if (json) {
    nlohmann::json out = {{"questions", set->questions.size()},
                          {"references", set->references.size()},
                          {"k", k},
                          {"embedder", spec},
                          {"recall", *recall},
                          {"bm25_k1_1.2", bm25_12},
                          {"bm25_k1_1.5", bm25_15}};
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  std::printf("%zu questions, %zu references, recall@%d\n", set->questions.size(),
              set->references.size(), k);
  std::printf("  %-28s %.4f\n", "BM25 k1 1.2 b 0.75", bm25_12);
  std::printf("  %-28s %.4f\n", "BM25 k1 1.5 b 0.75", bm25_15);
  std::printf("  %-28s %.4f  %.3f of the better BM25\n", spec.c_str(), *recall,
              *recall / std::max(bm25_12, bm25_15));
  return 0;
}
