#include "embedder/bm25.h"

#include <cmath>

#include "embedder/idf_table.h"
#include "embedder/words.h"

namespace memory3 {

void Bm25Index::Add(std::string_view text) {
  WordSplitter words;
  words.Split(text);
  const auto document = static_cast<uint32_t>(lengths_.size());
  for (size_t i = 0; i < words.size(); ++i) {
    std::vector<Posting>& list = postings_[HashWord(words.word(i))];
    if (list.empty() || list.back().document != document) list.push_back({document, 0});
    ++list.back().count;
  }
  lengths_.push_back(static_cast<uint32_t>(words.size()));
  total_length_ += words.size();
}

std::vector<float> Bm25Index::Scores(std::string_view query) const {
  std::vector<float> scores(lengths_.size(), 0.0f);
  if (total_length_ == 0) return scores;
  const double n = static_cast<double>(lengths_.size());
  const double mean = static_cast<double>(total_length_) / n;
  WordSplitter words;
  words.Split(query);
  for (size_t i = 0; i < words.size(); ++i) {
    const auto it = postings_.find(HashWord(words.word(i)));
    if (it == postings_.end()) continue;
    const double df = static_cast<double>(it->second.size());
    const double idf = std::log1p((n - df + 0.5) / (df + 0.5));
    for (const Posting& p : it->second) {
      const double saturation = k1_ * (1 - b_ + b_ * lengths_[p.document] / mean);
      scores[p.document] += static_cast<float>(idf * p.count * (k1_ + 1) / (p.count + saturation));
    }
  }
  return scores;
}

}  // namespace memory3
