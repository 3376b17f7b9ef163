// embedder_idf: documents → the lexical embedder's table of word rarity (embedder/idf_table.h).
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "CLI/CLI.hpp"
#include "embedder/idf_table.h"
#include "trainer/documents.h"

namespace {

int Fail(const absl::Status& status) {
  std::cerr << "embedder_idf: " << status.message() << "\n";
  return 1;
}
int Fail(const std::string& message) {
  std::cerr << "embedder_idf: " << message << "\n";
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Counts words in training text and writes the lexical embedder's IDF table.");
  std::vector<std::string> inputs;
  std::string out, titles;
  int64_t modulus = 10, remainder = 3;
  int buckets_log2 = 18;
  uint32_t min_count = 4;
  app.add_option("documents", inputs, ".txt or .jsonl files, also .gz or .zst")->required();
  app.add_option("--out", out, "The table to write, e.g. models/lexical/idf.bin")->required();
  app.add_option("--hold-out-modulus", modulus,
                 "Leave out documents with id % modulus == remainder; 0: none")
      ->capture_default_str();
  app.add_option("--hold-out-remainder", remainder)->capture_default_str();
  app.add_option("--hold-out-titles", titles,
                 "A .jsonl whose `title` fields name documents to leave out");
  app.add_option("--buckets-log2", buckets_log2)->capture_default_str()->check(CLI::Range(8, 18));
  app.add_option("--min-count", min_count, "Words in fewer paragraphs count as unknown")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  memory3::HoldOut hold_out(modulus, remainder);
  if (!titles.empty()) {
    if (absl::Status status = hold_out.AddTitlesFrom(titles); !status.ok()) {
      return Fail(status);
    }
  }
  auto reader = memory3::DocumentReader::Open(inputs);
  if (!reader.ok()) return Fail(reader.status());
  memory3::IdfBuilder builder;
  memory3::Document document;
  int64_t held_out = 0;
  while (true) {
    absl::StatusOr<bool> found = (*reader)->Next(&document);
    if (!found.ok()) return Fail(found.status());
    if (!*found) break;
    if (hold_out.Contains(document)) {
      ++held_out;
    } else {
      builder.AddDocument(document.text);
    }
  }
  for (const std::string& warning : (*reader)->warnings()) std::cerr << warning << "\n";
  if (builder.paragraphs() == 0) return Fail("the documents hold no paragraph of ten words");

  // Written beside and renamed, so that a reader never sees half a table.
  const std::string partial = out + ".partial";
  {
    std::ofstream file(partial, std::ios::binary);
    file << builder.Finish(buckets_log2, min_count);
    file.flush();
    if (!file) return Fail(partial + ": cannot be written");
  }
  std::error_code error;
  std::filesystem::rename(partial, out, error);
  if (error) return Fail(out + ": " + error.message());
  std::printf(
      "%s: %lld documents (%lld held out, %lld lines skipped), %llu paragraphs, %zu words\n",
      out.c_str(), static_cast<long long>((*reader)->documents() - held_out),
      static_cast<long long>(held_out), static_cast<long long>((*reader)->skipped()),
      static_cast<unsigned long long>(builder.paragraphs()), builder.words());
  return 0;
}
